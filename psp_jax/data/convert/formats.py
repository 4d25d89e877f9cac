"""The formats of annotations: where their files are, and what their classes are.

`annotations` makes class ids of the files' content.
"""

import argparse
import contextlib
import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from psp_jax.data.check.faults import some
from psp_jax.data.convert import annotations
from psp_jax.data.convert.annotations import IGNORED, Shape, Size, class_name
from psp_jax.data.convert.converted import list_line
from psp_jax.data.decode import exists, is_passing, read_bytes, read_image, try_again
from psp_jax.data.labels import IGNORE, label_space
from psp_jax.data.sources import PICTURES
from psp_jax.errors import PassingError, UserError

T = TypeVar('T')
Made = tuple[str, np.ndarray, frozenset[str]]


class Plan(NamedTuple):
    """What there is to convert.

    classes: for data.classes. lists: by the name of a list, the names of its label maps, which are
    normalised relative paths without suffix; one that leads outside is a bad example. make: name of
    a label map that does not -> path of its image, ids uint8 [H, W], and labels in it that are no
    classes; raises UserError for a bad file. labels: those found beforehand, as they are written.
    """

    classes: str
    lists: Mapping[str, Sequence[str]]
    make: Callable[[str], Made]
    labels: Sequence[str] = ()


def labelme(folder: str, flags: argparse.Namespace) -> Plan:
    """Plan of the JSON files under a folder.

    Without --classes the classes are _background_ and then all labels found, sorted.
    """
    files = {os.path.splitext(n)[0]: os.path.join(folder, n) for n in _find(folder, '**/*.json')}
    if not files:
        raise UserError(f'{folder}: holds no JSON file of labelme')
    found: dict[str, None] = {}
    bad: list[UserError] = []
    for path in () if flags.classes else files.values():
        try:
            found |= dict.fromkeys(s.label for s in _parsed(path, annotations.labelme)[2])
        except UserError as error:  # `make` tells it
            bad.append(error)
    if not (found or flags.classes):
        why = f': {bad[0]}' if bad else ''
        raise UserError(f'{folder}: no labelled shape can be read from its JSON files{why}')
    labels = sorted(found.keys() - {'_background_'})
    labels = [] if flags.classes else ['_background_', *labels]
    classes, ids = _classes(flags, labels, folder)

    def make(name: str) -> Made:
        path = files[name]
        written, size, shapes = _parsed(path, annotations.labelme)
        shapes = [shape._replace(label=class_name(shape.label)) for shape in shapes]
        for shape in shapes:
            if shape.label not in ids:
                known = some([label for label, value in ids.items() if value != IGNORE])
                raise UserError(
                    f'{path}: label {shape.label!r} is none of the classes {known}: correct it, '
                    'or name it in --classes or --ignore'
                )
        image = os.path.join(os.path.dirname(path), written)
        if flags.images:
            image = os.path.join(flags.images, os.path.basename(written))
        return image, _drawn(path, image, shapes, ids, size), frozenset()

    return Plan(classes, _lists(files), make, labels)


def voc(folder: str, flags: argparse.Namespace) -> Plan:
    """Plan of colour masks as of PASCAL VOC, or of CVAT's 'Segmentation mask'.

    labelmap.txt has the labels and their colours; without it they are those of --classes in VOC's
    colour map, by default VOC's own 21. Lists are ImageSets/Segmentation/*.txt, or `all`.
    """
    masks, sets = (os.path.join(folder, n) for n in ('SegmentationClass', 'ImageSets/Segmentation'))
    labelmap = os.path.join(folder, 'labelmap.txt')
    written: list[str] = []
    if os.path.exists(labelmap):
        found = _parsed(labelmap, annotations.labelmap, _text)
        written = list(found.values())
        labels = {color: class_name(label) for color, label in found.items()}
        classes, ids = _classes(flags, written, labelmap)
    else:
        classes, ids = _classes(flags, (), '', 'voc2012')
        space = label_space(flags.classes or 'voc2012')
        names, colors = space.names, space.colors
        labels = {}
        for name, color in zip(names, annotations.packed(colors).tolist(), strict=True):
            if color in labels:
                raise UserError(
                    f'--classes={flags.classes}: {name} has the colour of {labels[color]}, so that '
                    f'masks cannot tell them apart: write {labelmap} with the labels that they have'
                )
            labels[color] = name
    labels[annotations.VOID] = IGNORED
    lists = {
        file.removesuffix('.txt'): [*map(os.path.normpath, examples)]
        for file in _find(sets, '*.txt')
        if (examples := _parsed(os.path.join(sets, file), annotations.image_set, _text))
    } or _lists(name.removesuffix('.png') for name in _find(masks, '**/*.png'))
    if not lists:
        raise UserError(f'{masks}: holds no PNG')

    def make(name: str) -> Made:
        image = _picture(flags.images or os.path.join(folder, 'JPEGImages'), name)
        mask = os.path.join(masks, f'{name}.png')
        return image, *_colored(mask, image, labels, ids)

    return Plan(classes, lists, make, written)


def cityscapes(folder: str, flags: argparse.Namespace) -> Plan:
    """Plan of gtFine/SPLIT/CITY/*_gtFine_polygons.json; labels that are no classes become 255."""
    classes, ids = _classes(flags, (), '', 'cityscapes')
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
        return image, _drawn(path, image, shapes, ids, size), frozenset(others)

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
            name = os.path.normpath(os.path.join(split, os.path.splitext(png)[0]))
            found[name] = image, os.path.join(base, png), segments
    classes, ids = _classes(flags, [*known], path)

    def make(name: str) -> Made:
        image, mask, segments = found[name]
        labels = {color: class_name(label) for color, label in segments.items()}
        return image, *_colored(mask, image, labels, ids)

    return Plan(classes, _lists(found), make, [*known])


FORMATS = {plan.__name__: plan for plan in (labelme, voc, cityscapes, coco_panoptic)}


def _classes(
    flags: argparse.Namespace, labels: Sequence[str], source: str, default: str = ''
) -> tuple[str, dict[str, int]]:
    """Text for data.classes, and class -> id, 255 for those to ignore.

    labels: those of `source`, if there can be no others; without any the classes are `default`.
    Raises UserError for a class of --classes that is none of them, and for too few or too many.
    """
    known = tuple(dict.fromkeys(map(class_name, labels)))
    culprit, names, text = source, known, ','.join(known)
    if flags.classes or not known:
        culprit, text = '--classes' if flags.classes else '--ignore', flags.classes or default
        names = tuple(text.split(','))
        if len(names) <= IGNORE:  # of more, the message would be long
            try:
                names = label_space(text).names
            except UserError as error:
                raise UserError(str(error).replace('data.classes', '--classes')) from None
    for name in names if known else ():
        if name not in known:
            raise UserError(f'--classes: {source} has no {name!r}; it has {some(known)}')
    ignored = {IGNORED, *(label.strip() for label in flags.ignore.split(',') if label.strip())}
    left = [name for name in names if name not in ignored]
    if len(left) > IGNORE:
        raise UserError(f'{culprit}: {len(left)} classes, 255 at most: --ignore takes some off')
    if len(left) < 2:
        raise UserError(
            f'{culprit}: {f"one class, {left[0]!r}" if left else "no class"}, but two are needed; '
            'the background is one too'
        )
    if len(left) < len(names):
        text = ','.join(left)
    return text, dict.fromkeys(ignored, IGNORE) | {name: i for i, name in enumerate(left)}


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


@contextlib.contextmanager
def _errors_of(path: str) -> Iterator[None]:
    """Has complaints about the content of a file as UserErrors that name it."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise UserError(f'{path} is not JSON ({error})') from None
    except ValueError as error:
        raise UserError(f'{path}: {error}') from error
    except MemoryError as error:
        raise UserError(f'{path}: there is not memory enough for it') from error
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError, OSError) as error:
        reason = f'no {error}' if isinstance(error, KeyError) else error
        raise UserError(f'{path} is not as its tool writes it ({reason})') from error


def _parsed(path: str, parse: Callable[[Any], T], read: Callable[[str], Any] = _json) -> T:
    with _errors_of(path):
        return parse(read(path))


def _drawn(
    path: str, image: str, shapes: Sequence[Shape], ids: Mapping[str, int], size: Size
) -> np.ndarray:
    """`annotations.draw` of a file, once its image is known to be of this size."""
    _check_image(image, size)  # a size that is a slip may be more than the memory holds
    with _errors_of(path):
        return annotations.draw(shapes, ids, size)


def _colored(
    mask: str, image: str, labels: Mapping[int, str], ids: Mapping[str, int]
) -> tuple[np.ndarray, frozenset[str]]:
    """`annotations.color_ids` of a file, if its image is of the same size."""
    made = _parsed(mask, lambda rgb: annotations.color_ids(rgb, labels, ids), read_image)
    _check_image(image, made[0].shape)
    return made


def _check_image(path: str, size: tuple[int, ...]) -> None:
    """Raises UserError where an image cannot be read or listed, or has another (height, width).

    PassingError where a disk does not answer, after some tries.
    """
    list_line(path)
    height, width = try_again(partial(_image_size, path))
    if (height, width) != size:
        raise UserError(f'{path} is {width}x{height}, its annotation for {size[1]}x{size[0]}')


def _image_size(path: str) -> Size:
    try:
        with Image.open(path) as image:  # reads the file's head alone
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientation
    except FileNotFoundError:
        raise UserError(f'{path} does not exist; --images DIR says where images are') from None
    except Exception as error:  # Pillow raises nearly anything on broken files
        # without a number it is Pillow's own, whose text has the path, which may hold any word
        if isinstance(error, OSError) and error.errno and is_passing(error):
            raise PassingError(f'{path} cannot be read: {error.strerror}') from None
        raise UserError(f'{path} cannot be read as a picture ({type(error).__name__})') from error
    return (width, height) if turned else (height, width)


def _find(folder: str, pattern: str) -> list[str]:
    """Sorted paths, relative to a folder, of the files under it that are not hidden."""
    return sorted(glob.glob(pattern, root_dir=folder, recursive=True))


def _picture(folder: str, name: str) -> str:
    """The path of the image of this name, with its suffix; .jpg if there is none."""
    stem = os.path.join(folder, name)
    suffixes = (case for suffix in PICTURES for case in (suffix, suffix.upper()))
    found = (stem + s for s in suffixes if try_again(partial(exists, stem + s)))
    return next(found, f'{stem}.jpg')
