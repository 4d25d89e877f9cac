"""Makes label maps, and lists of them for training, of what annotation tools write.

Writes DIR/labels/**.png, class ids uint8 with the classes' colours as palette and 255 = ignore, and
lists DIR/*.txt of lines 'image<tab>label', for data.source=list. Images stay where they are.
The same conversion again replaces the files that it wrote, which DIR/converted.txt records, if they
are as they were, and no others.

formats, and what INPUT is:
  labelme        a folder of labelme's JSON files; subfolders train and val make lists of their own
  voc            a folder with SegmentationClass, JPEGImages, ImageSets/Segmentation and, for other
                 classes than PASCAL VOC's, labelmap.txt: what CVAT exports as 'Segmentation mask'
  cityscapes     a folder with leftImg8bit and gtFine
  coco_panoptic  a panoptic JSON file beside its folder of PNGs, or COCO's folder

exit codes: 0 done, 1 a disk or a network did not answer, 2 an error of the user's (one line on
  stderr says which), 130 interrupted
"""

import argparse
import io
import os
import shlex
import sys
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from PIL import Image
from tqdm import tqdm

from psp_jax.command_line import Parser, exit_code
from psp_jax.data.check.faults import some
from psp_jax.data.convert.annotations import class_name
from psp_jax.data.convert.converted import Write, claimed, list_line, listed
from psp_jax.data.convert.formats import FORMATS, Plan
from psp_jax.data.labels import label_space, palette
from psp_jax.errors import UserError


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; raises UserError for an unknown one and a missing or illegal value."""
    parser = Parser(
        prog='python -m psp_jax.data.convert',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, path = parser.add_argument, os.path.expanduser
    add('format', choices=FORMATS, metavar='FORMAT', help=', '.join(FORMATS))
    add('input', type=path, metavar='INPUT', help='a folder, or a file; see above')
    add('--output', type=path, metavar='DIR', required=True, help='gets labels/, train.txt, ...')
    add('--classes', default='', help="in the order of their ids: 'road,tree,car'; default: all")
    add('--ignore', default='', metavar='LABELS', help="labels that become 255: 'blurred,unsure'")
    add('--images', type=path, default='', metavar='DIR', help='where the images are')
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
    if flags.val and len(plan.lists) > 1:
        raise UserError(f'--val={flags.val}: there are lists already: {", ".join(plan.lists)}')
    convert(plan, flags.output, f'{flags.format} {os.path.abspath(flags.input)}', flags.val)


def _split(names: Sequence[str], share: float) -> dict[str, list[str]]:
    """Two or more names as train and val; by a hash of each, so that new ones move few others."""
    count = min(max(round(share * len(names)), 1), len(names) - 1)
    val = set(sorted(names, key=lambda name: zlib.crc32(name.encode()))[:count])
    return {'train': [name for name in names if name not in val], 'val': sorted(val)}


def _leads_outside(name: str) -> bool:
    return os.path.isabs(name) or name.split(os.sep)[0] == os.pardir


def convert(plan: Plan, output: str, origin: str, val: float = 0) -> None:
    """Writes label maps and lists, and prints what was done; `origin` says of what they are made.

    val: the share of the one list that becomes val.txt; 0 leaves the lists as they are. Raises
    UserError for bad files when all others are done, and at once where the folder cannot be written
    or a file is in the way.
    """
    names = list(dict.fromkeys(name for examples in plan.lists.values() for name in examples))
    titles = ('train', 'val') if val else plan.lists
    paths = {title: os.path.join(output, f'{title}.txt') for title in titles}
    labels = {name: os.path.join(output, 'labels', f'{name}.png') for name in names}
    inside = [path for name, path in labels.items() if not _leads_outside(name)]
    colors = palette(label_space(plan.classes)).tobytes()

    def make(write: Write, name: str) -> tuple[str, frozenset[str]] | UserError:
        label = listed(labels[name], output)
        try:
            list_line(label)  # the other messages could not be printed
            if _leads_outside(name):
                raise UserError(
                    f'{name} leads outside of the folder of label maps: correct the file that '
                    'lists it'
                )
            image, ids, others = plan.make(name)
            line = list_line(listed(image, output), label)
        except UserError as error:
            return error
        picture, encoded = Image.fromarray(ids), io.BytesIO()
        picture.putpalette(colors)
        picture.save(encoded, 'PNG')
        write(labels[name], encoded.getvalue())
        return line, others

    with claimed(output, origin, [*paths.values(), *inside]) as write:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = pool.map(partial(make, write), names)
            done = dict(
                zip(names, tqdm(results, 'converting', len(names), disable=None), strict=True)
            )
        made = {name: result for name, result in done.items() if not isinstance(result, UserError)}
        bad = [str(result) for result in done.values() if isinstance(result, UserError)]
        for text in bad:
            print(f'not made: {text}')
        more = f' (and {len(bad) - 1} more, listed above)' if bad[1:] else ''
        if val and len(made) < 2:
            raise UserError(
                f'--val={val}: {len(made)} of {len(names)} label maps were made, and train and val '
                f'need one each{f": {bad[0]}{more}" if bad else ""}'
            )
        lists = _split(list(made), val) if val else plan.lists
        for title, path in paths.items():
            lines = [made[name][0] for name in lists[title] if name in made]
            if lines:
                write(path, ''.join(lines).encode())
                print(f'{len(lines)} images with label maps in {path}')
            else:
                print(f'{path} is not written, as none of its label maps was made')
    _print_labels(plan, {label for _, others in made.values() for label in others})
    if len(lists) == 1:
        print('This is one list for both training and validation; --val 0.2 divides it')
    if all(map(os.path.exists, paths.values())):
        print(f'To train:\n  {_command(plan.classes, lists, output)}')
    if bad:
        raise UserError(f'{len(bad)} of {len(names)} label maps were not made: {bad[0]}{more}')


def _print_labels(plan: Plan, ignored: Iterable[str]) -> None:
    """Says which labels are no classes, and which have another name as a class."""
    classes = label_space(plan.classes).names
    renamed = [
        f'{label!r} is {class_name(label)!r}'
        for label in dict.fromkeys(plan.labels)
        if class_name(label) != label and class_name(label) in classes
    ]
    if renamed:
        print(f'Commas divide the names of classes, so that {some(renamed)}')
    if ignored:
        print(f'255 (ignore), since they are no classes: {", ".join(sorted(ignored))}')


def _command(classes: str, lists: Iterable[str], output: str) -> str:
    """A command that trains on the lists with configs/custom.py."""
    words = ['python', '-m', 'psp_jax.main', '--config', 'configs/custom.py:source=list']
    words += [f'--config.data.root={output}', f'--config.data.classes={classes}']
    for split in ('train', 'val'):
        # the shortest, not trainval; or train2017, or CVAT's Train
        found = min([n for n in lists if n.lower().startswith(split)] or lists, key=len)
        words += [f'--config.data.{split}={found}.txt'] * (found != split)
    return shlex.join(words)


if __name__ == '__main__':
    sys.exit(exit_code(run))
