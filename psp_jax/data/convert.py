"""Makes label maps, and lists of them for training, of what annotation tools write.

Writes DIR/labels/**.png, class ids uint8 with the classes' colours as palette and 255 = ignore, and
lists DIR/*.txt of lines 'image<tab>label', for data.source=list. Images stay where they are.

formats, and what INPUT is:
  labelme        a folder of labelme's JSON files; subfolders train and val make lists of their own
  voc            a folder with SegmentationClass, JPEGImages, ImageSets/Segmentation and, for other
                 classes than PASCAL VOC's, labelmap.txt: what CVAT exports as 'Segmentation mask'
  cityscapes     a folder with leftImg8bit and gtFine
  coco_panoptic  a panoptic JSON file beside its folder of PNGs, or COCO's folder

exit codes: 0 done, 2 an error of the user's (one line on stderr says which), 130 interrupted
"""

import argparse
import contextlib
import glob
import io
import json
import os
import re
import shlex
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from psp_jax.command_line import Parser, exit_code, whole_file
from psp_jax.data import annotations
from psp_jax.data.annotations import IGNORED
from psp_jax.data.decode import read_bytes, read_image
from psp_jax.data.labels import IGNORE, label_space, palette
from psp_jax.data.sources import PICTURES
from psp_jax.errors import UserError

T = TypeVar('T')
Made = tuple[str, np.ndarray, frozenset[str]]


class Plan(NamedTuple):
    """What there is to convert.

    classes: for data.classes. lists: by the name of a list, the names of its label maps, which are
    relative paths without suffix. make: name of a label map -> path of its image, ids uint8 [H, W],
    and labels in it that are no classes; raises UserError for a bad file.
    """

    classes: str
    lists: Mapping[str, Sequence[str]]
    make: Callable[[str], Made]


# ---- Where the files of a format are; `annotations` makes ids of their content


def labelme(folder: str, flags: argparse.Namespace) -> Plan:
    """Plan of the JSON files under a folder.

    Without --classes the classes are _background_ and then all labels found, sorted.
    """
    files = {os.path.splitext(n)[0]: os.path.join(folder, n) for n in _find(folder, '**/*.json')}
    if not files:
        raise UserError(f'{folder}: holds no JSON file of labelme')
    found: set[str] = set()
    for path in () if flags.classes else files.values():
        with contextlib.suppress(UserError):  # `make` tells it
            shapes = _parsed(path, annotations.labelme)[2]
            found.update(shape.label for shape in shapes if ',' not in shape.label)
    if not (found or flags.classes):
        raise UserError(f'{folder}: no labelled shape can be read from its JSON files')
    classes, ids = _classes(flags, ','.join(['_background_', *sorted(found - {'_background_'})]))

    def make(name: str) -> Made:
        path = files[name]
        written, size, shapes = _parsed(path, annotations.labelme)
        for shape in shapes:
            if shape.label not in ids:
                raise UserError(
                    f'{path}: label {shape.label!r} is none of the classes {classes}: correct it, '
                    'or name it in --classes or --ignore'
                )
        image = os.path.join(os.path.dirname(path), written)
        if flags.images:
            image = os.path.join(flags.images, os.path.basename(written))
        return image, annotations.draw(shapes, ids, size), frozenset()

    return Plan(classes, _lists(files), make)


def voc(folder: str, flags: argparse.Namespace) -> Plan:
    """Plan of colour masks as of PASCAL VOC, or of CVAT's 'Segmentation mask'.

    labelmap.txt has the labels and their colours; without it they are those of --classes in VOC's
    colour map, by default VOC's own 21. Lists are ImageSets/Segmentation/*.txt, or `all`.
    """
    masks, sets = (os.path.join(folder, n) for n in ('SegmentationClass', 'ImageSets/Segmentation'))
    labelmap = os.path.join(folder, 'labelmap.txt')
    if os.path.exists(labelmap):
        labels = _parsed(labelmap, annotations.labelmap, _text)
        known = list(dict.fromkeys(labels.values()))
        classes, ids = _classes(flags, ','.join(known), known, labelmap)
    else:
        classes, ids = _classes(flags, 'voc2012')
        names, colors = label_space(flags.classes or 'voc2012')
        labels = dict(zip(annotations.packed(colors).tolist(), names, strict=True))
    labels[annotations.VOID] = IGNORED
    lists = {
        file.removesuffix('.txt'): examples
        for file in _find(sets, '*.txt')
        if (examples := _parsed(os.path.join(sets, file), annotations.image_set, _text))
    } or _lists(name.removesuffix('.png') for name in _find(masks, '**/*.png'))
    if not lists:
        raise UserError(f'{masks}: holds no PNG')

    def make(name: str) -> Made:
        image = _picture(flags.images or os.path.join(folder, 'JPEGImages'), name)
        mask = os.path.join(masks, f'{name}.png')
        return image, *_parsed(mask, lambda r: annotations.color_ids(r, labels, ids), read_image)

    return Plan(classes, lists, make)


def cityscapes(folder: str, flags: argparse.Namespace) -> Plan:
    """Plan of gtFine/SPLIT/CITY/*_gtFine_polygons.json; labels that are no classes become 255."""
    classes, ids = _classes(flags, 'cityscapes')
    ending = '_gtFine_polygons.json'
    fine = os.path.join(folder, 'gtFine')
    names = [name.removesuffix(ending) for name in _find(fine, f'**/*{ending}')]
    if not names:
        raise UserError(f'{folder}: holds no gtFine/SPLIT/CITY/*{ending}')

    def make(name: str) -> Made:
        path = os.path.join(fine, name + ending)
        size, shapes = _parsed(path, lambda read: annotations.cityscapes(read, ids))
        pictures = flags.images or os.path.join(folder, 'leftImg8bit')
        image = _picture(pictures, f'{name}_leftImg8bit')
        others = {shape.label for shape in shapes} - ids.keys()
        return image, annotations.draw(shapes, ids, size), frozenset(others)

    return Plan(classes, _lists(names), make)


def coco_panoptic(path: str, flags: argparse.Namespace) -> Plan:
    """Plan of a panoptic JSON, or of those in a folder's `annotations`.

    The PNGs of A/panoptic_val2017.json are in A/panoptic_val2017, the images in A/../val2017.
    """
    jsons = [path]
    if os.path.isdir(path):
        jsons = [os.path.join(path, n) for n in _find(path, 'annotations/panoptic_*.json')]
    if not jsons:
        raise UserError(f'{path}: holds no annotations/panoptic_*.json')
    known: dict[str, None] = {}
    found: dict[str, tuple[str, str, dict[int, str]]] = {}  # image, mask, segments
    for file in jsons:
        categories, pngs = _parsed(file, annotations.panoptic)
        known |= dict.fromkeys(categories)
        base = os.path.splitext(file)[0]
        split = os.path.basename(base).removeprefix('panoptic_')
        pictures = flags.images or os.path.join(os.path.dirname(file), os.pardir, split)
        for png, (picture, segments) in pngs.items():
            image = os.path.normpath(os.path.join(pictures, picture))
            name = os.path.join(split, os.path.splitext(png)[0])
            found[name] = image, os.path.join(base, png), segments
    classes, ids = _classes(flags, ','.join(known), [*known], path)

    def make(name: str) -> Made:
        image, mask, segments = found[name]
        return image, *_parsed(mask, lambda r: annotations.color_ids(r, segments, ids), read_image)

    return Plan(classes, _lists(found), make)


FORMATS = {plan.__name__: plan for plan in (labelme, voc, cityscapes, coco_panoptic)}


def _classes(
    flags: argparse.Namespace, default: str, known: Sequence[str] = (), source: str = ''
) -> tuple[str, dict[str, int]]:
    """Text for data.classes, and label -> id, 255 for those to ignore.

    known: the labels that the file `source` has, where there can be no others. Raises UserError for
    a class that is none of them, and where the classes are no label space.
    """
    classes = flags.classes or default
    names = label_space(classes).names
    for name in names if known else ():
        if name not in known:
            raise UserError(f'--classes: {source} has no {name!r}; it has {", ".join(known)}')
    ignored = {IGNORED, *(label.strip() for label in flags.ignore.split(','))}
    if ignored & {*names}:
        classes = ','.join(name for name in names if name not in ignored)
        names = label_space(classes).names
    return classes, dict.fromkeys(ignored, IGNORE) | {name: i for i, name in enumerate(names)}


def _lists(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by their first folder if it is train, val2017 or the like, else `all`."""
    lists: dict[str, list[str]] = {}
    for name in names:
        split = re.match(r'(train|val|test)\d*[\\/]', name)
        lists.setdefault(split[0][:-1] if split else 'all', []).append(name)
    return lists


def _json(path: str) -> Any:
    return json.loads(read_bytes(path))


def _text(path: str) -> str:
    return read_bytes(path).decode('utf-8-sig')


def _parsed(path: str, parse: Callable[[Any], T], read: Callable[[str], Any] = _json) -> T:
    """parse(read(path)), their complaints as UserErrors that name the file."""
    try:
        return parse(read(path))
    except json.JSONDecodeError as error:
        raise UserError(f'{path} is not JSON ({error})') from None
    except ValueError as error:
        raise UserError(f'{path}: {error}') from error
    except (KeyError, TypeError, AttributeError, OSError) as error:
        reason = f'no {error}' if isinstance(error, KeyError) else error
        raise UserError(f'{path} is not as its tool writes it ({reason})') from error


def _find(folder: str, pattern: str) -> list[str]:
    """Sorted paths, relative to a folder, of the files under it that are not hidden."""
    return sorted(glob.glob(pattern, root_dir=folder, recursive=True))


def _picture(folder: str, name: str) -> str:
    """The path of the image of this name, with its suffix; .jpg if there is none."""
    stem = os.path.join(folder, name)
    suffixes = (case for suffix in PICTURES for case in (suffix, suffix.upper()))
    return next((stem + s for s in suffixes if os.path.exists(stem + s)), f'{stem}.jpg')


# ---- The command line


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; raises UserError for an unknown one and a missing or illegal value."""
    parser = Parser(
        prog='python -m psp_jax.data.convert',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('format', choices=FORMATS, metavar='FORMAT', help=', '.join(FORMATS))
    add('input', metavar='INPUT', help='a folder, or a file; see above')
    add('--output', metavar='DIR', required=True, help='gets labels/, train.txt and the like')
    add('--classes', default='', help="in the order of their ids: 'road,tree,car'; default: all")
    add('--ignore', default='', metavar='LABELS', help="labels that become 255: 'blurred,unsure'")
    add('--images', default='', metavar='DIR', help='where the images are')
    add('--val', type=float, default=0, metavar='SHARE', help='of a single list, for val.txt')
    flags = parser.parse_args(list(argv))
    if not 0 <= flags.val < 1:
        raise UserError(f'--val={flags.val}: must be between 0 and 1, such as 0.2')
    return flags


def run(argv: Sequence[str]) -> None:
    """Does what the flags say; raises UserError for what is the user's to mend."""
    flags = parse_flags(argv)
    if '://' in flags.output:
        raise UserError(f'--output={flags.output}: must be a local folder')
    if not os.path.exists(flags.input):
        raise UserError(f'{flags.input} does not exist')
    plan = FORMATS[flags.format](flags.input, flags)
    if flags.val:
        plan = plan._replace(lists=_split(plan.lists, flags.val))
    convert(plan, flags.output, f'{flags.format} {os.path.abspath(flags.input)}')


def _split(lists: Mapping[str, Sequence[str]], share: float) -> dict[str, list[str]]:
    """The one list as train and val; by a hash of the names, so that new ones move few others."""
    if len(lists) != 1:
        raise UserError(f'--val={share}: there are lists already: {", ".join(lists)}')
    (names,) = lists.values()
    count = min(max(round(share * len(names)), 1), len(names) - 1)
    val = set(sorted(names, key=lambda name: zlib.crc32(name.encode()))[:count])
    return {'train': [name for name in names if name not in val], 'val': sorted(val)}


def convert(plan: Plan, output: str, origin: str) -> None:
    """Writes label maps and lists, and prints what was done; `origin` says of what they are made.

    Raises UserError for bad files when all others are done, and at once where the folder cannot be
    written or a file in it is not of this origin.
    """
    names = list(dict.fromkeys(name for examples in plan.lists.values() for name in examples))
    lists = {title: os.path.join(output, f'{title}.txt') for title in plan.lists}
    labels = {name: os.path.join(output, 'labels', f'{name}.png') for name in names}
    _claim(output, origin, [*lists.values(), *labels.values()])
    for path in filter(os.path.exists, lists.values()):
        os.remove(path)  # should this end early, no list has label maps of other classes
    colors = palette(label_space(plan.classes)).tobytes()

    def write(name: str) -> tuple[str, frozenset[str]] | UserError:
        try:
            image, ids, others = plan.make(name)
            _check_image(image, ids.shape, output)
        except UserError as error:
            return error
        picture, encoded = Image.fromarray(ids), io.BytesIO()
        picture.putpalette(colors)
        picture.save(encoded, 'PNG')
        _write(labels[name], encoded.getvalue())
        return f'{_listed(image, output)}\t{_listed(labels[name], output)}\n', others

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(write, names)
        done = dict(zip(names, tqdm(results, 'converting', len(names), disable=None), strict=True))
    made = {name: result for name, result in done.items() if not isinstance(result, UserError)}
    bad = [str(result) for result in done.values() if isinstance(result, UserError)]
    for text in bad:
        print(f'not made: {text}')
    for title, path in lists.items():
        lines = [made[name][0] for name in plan.lists[title] if name in made]
        if lines:
            _write(path, ''.join(lines).encode())
            print(f'{len(lines)} images with label maps in {path}')
        else:
            print(f'{path} is not written, as none of its label maps was made')
    ignored = {label for _, others in made.values() for label in others}
    if ignored:
        print(f'255 (ignore), since they are no classes: {", ".join(sorted(ignored))}')
    if len(lists) == 1:
        print('This is one list for both training and validation; --val 0.2 divides it')
    if all(map(os.path.exists, lists.values())):
        print(f'To train:\n  {_command(plan, output)}')
    if bad:
        more = f' (and {len(bad) - 1} more, listed above)' if bad[1:] else ''
        raise UserError(f'{len(bad)} of {len(names)} label maps were not made: {bad[0]}{more}')


def _claim(output: str, origin: str, paths: Iterable[str]) -> None:
    """Marks a folder as made of `origin`; raises UserError where `paths` hold anything else."""
    mark = os.path.join(output, 'converted.txt')
    again = os.path.exists(mark) and read_bytes(mark) == origin.encode()
    for path in [mark, *paths]:
        if os.path.relpath(path, output).startswith(os.pardir):
            raise UserError(f'{path} would be written outside of --output={output}')
        if os.path.lexists(path) and not again:
            raise UserError(f'{path} is there, and not of {origin}: name another --output')
    _write(mark, origin.encode())


def _check_image(path: str, size: tuple[int, ...], output: str) -> None:
    """Raises UserError where an image cannot be read, or has another (height, width)."""
    try:
        with Image.open(path) as image:  # reads the file's head alone
            found = image.size
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientation
    except FileNotFoundError:
        raise UserError(f'{path} does not exist; --images DIR says where images are') from None
    except Exception as error:  # Pillow raises nearly anything on broken files
        raise UserError(f'{path} cannot be read as a picture ({type(error).__name__})') from error
    width, height = found[::-1] if turned else found
    if (height, width) != size:
        raise UserError(f'{path} is {width}x{height}, its annotation for {size[1]}x{size[0]}')
    if _listed(path, output).startswith(f'labels{os.sep}'):
        raise UserError(f'{path} lies where label maps are written: move it')


def _write(path: str, content: bytes) -> None:
    with whole_file(path) as unfinished:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(unfinished, 'wb') as file:
            file.write(content)


def _listed(path: str, root: str) -> str:
    """As a list in the folder `root` has a path: relative if it lies below it, else absolute."""
    inside = os.path.relpath(path, root)
    return os.path.abspath(path) if inside.startswith(os.pardir) else inside


def _command(plan: Plan, output: str) -> str:
    """A command that trains on the lists with configs/custom.py."""
    words = ['python', '-m', 'psp_jax.main', '--config', 'configs/custom.py:source=list']
    words += [f'--config.data.root={output}', f'--config.data.classes={plan.classes}']
    for split in ('train', 'val'):
        # the shortest, not trainval; or train2017, or CVAT's Train
        found = min([n for n in plan.lists if n.lower().startswith(split)] or plan.lists, key=len)
        words += [f'--config.data.{split}={found}.txt'] * (found != split)
    return shlex.join(words)


if __name__ == '__main__':
    sys.exit(exit_code(run))
