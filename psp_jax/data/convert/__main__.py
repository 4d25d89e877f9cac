"""Makes label maps, and lists of them for training, from the files of annotation tools.

Writes DIR/labels/**.png (class ids with the classes' colours as palette, 255 = ignore) and lists
DIR/*.txt of lines 'image<tab>label', for data.source=list. Images stay where they are.

formats, and what INPUT is:
  labelme        a folder of labelme's JSON files; subfolders train and val make lists of their own
  voc            a folder with SegmentationClass, JPEGImages, ImageSets/Segmentation and, if the
                 classes are not PASCAL VOC's, labelmap.txt: CVAT's export 'Segmentation mask'
  cityscapes     a folder with leftImg8bit and gtFine
  coco_panoptic  a panoptic JSON file beside its folder of PNGs, or COCO's folder

exit codes: 0 done, 1 a disk or a network did not answer, 2 an error of the user's (one line on
  stderr says which), 130 interrupted
"""

import argparse
import os
import shlex
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from PIL import Image
from tqdm import tqdm

from psp_jax.command_line import Parser, exit_code
from psp_jax.data.convert.formats import FORMATS, Plan
from psp_jax.data.labels import label_space, palette
from psp_jax.data.sources import first_few
from psp_jax.errors import UserError

Done = tuple[str, frozenset[str]]  # the line of a list, and labels that are not classes


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the flags; raises UserError for an unknown one and a missing or illegal value."""
    parser = Parser(
        prog='python -m psp_jax.data.convert',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, path = parser.add_argument, os.path.expanduser
    add('format', choices=FORMATS, metavar='FORMAT', help=', '.join(FORMATS))
    add('input', type=path, metavar='INPUT', help='a folder, or a file; see above')
    add('--output', type=path, metavar='DIR', required=True, help='a folder that is new or empty')
    add(
        '--overwrite',
        action='store_true',
        help='accept a DIR that holds files: replace those of the same names, leave the others',
    )
    add('--classes', default='', help="in the order of their ids: 'road,tree,car'; default: all")
    add('--ignore', default='', metavar='LABELS', help="labels that become 255: 'blurred,unsure'")
    add('--images', type=path, default='', metavar='DIR', help='where the images are')
    add('--val', type=float, default=0, metavar='SHARE', help='of the images, for val.txt: 0.2')
    flags = parser.parse_args(list(argv))
    if not 0 <= flags.val < 1:
        raise UserError(f'--val={flags.val}: must be between 0 and 1, such as 0.2')
    return flags


def run(argv: Sequence[str]) -> None:
    """Does what the flags say; raises UserError for what the user has to correct."""
    flags = parse_flags(argv)
    if '://' in flags.output:
        raise UserError(f'--output={flags.output}: must be a local folder')
    if not os.path.exists(flags.input):
        raise UserError(f'{flags.input} does not exist')
    if os.path.isdir(flags.output) and os.listdir(flags.output) and not flags.overwrite:
        raise UserError(
            f'--output={flags.output}: holds files already; name another folder, or add '
            '--overwrite to replace files of the same names'
        )
    plan = FORMATS[flags.format](flags.input, flags)
    if flags.val and len(plan.lists) > 1:
        raise UserError(f'--val={flags.val}: there are lists already: {", ".join(plan.lists)}')
    try:
        os.makedirs(flags.output, exist_ok=True)
    except OSError as error:
        raise UserError(f'--output={flags.output}: cannot be made ({error.strerror})') from None
    convert(plan, flags.output, flags.val)


def convert(plan: Plan, output: str, val: float = 0) -> None:
    """Writes label maps and lists to the folder `output`, and prints what was done.

    val: the share of the only list that becomes val.txt; 0 leaves the lists as they are.
    Raises UserError for bad files when all others are done.
    """
    names = list(dict.fromkeys(name for examples in plan.lists.values() for name in examples))
    colors = palette(label_space(plan.classes)).tobytes()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(partial(_write_label, plan, colors, output), names)
        results = list(tqdm(done, 'converting', len(names), disable=None))
    by_name = dict(zip(names, results, strict=True))
    made = {name: one for name, one in by_name.items() if not isinstance(one, UserError)}
    bad = [str(error) for error in results if isinstance(error, UserError)]
    for text in bad:
        print(f'not made: {text}')
    failure = f'{len(bad)} of {len(names)} label maps were not made: {first_few(bad, 1)}'
    if val and len(made) < 2:
        raise UserError(f'--val={val}: train and val need an image each; {failure}')
    lists = _split(list(made), val) if val else plan.lists
    complete = [_write_list(output, title, lists[title], made) for title in lists]
    others = sorted({label for _, labels in made.values() for label in labels})
    if others:
        print(f'255 (ignore), because they are not classes: {", ".join(others)}')
    if len(lists) == 1:
        print('This is one list for both training and validation; --val 0.2 divides it')
    if all(complete):
        print(f'To train:\n  {_command(plan.classes, lists, output)}')
    if bad:
        raise UserError(failure)


def _write_label(plan: Plan, colors: bytes, output: str, name: str) -> Done | UserError:
    """Writes one label map; returns the error if its files are bad: the others must continue."""
    try:
        image, ids, others = plan.make(name)
    except UserError as error:
        return error
    path = os.path.join(output, 'labels', f'{name}.png')
    os.makedirs(os.path.dirname(path), exist_ok=True)
    picture = Image.fromarray(ids)
    picture.putpalette(colors)
    picture.save(path)
    inside = os.path.relpath(image, output)
    listed = os.path.abspath(image) if inside.startswith(os.pardir) else inside
    return f'{listed}\tlabels/{name}.png\n', others


def _write_list(output: str, title: str, names: Sequence[str], made: Mapping[str, Done]) -> bool:
    """Writes the list of the label maps that were made; returns False if there are none."""
    path = os.path.join(output, f'{title}.txt')
    lines = [made[name][0] for name in names if name in made]
    if not lines:
        print(f'{path} is not written, because none of its label maps was made')
        return False
    with open(path, 'w', encoding='utf-8') as file:
        file.writelines(lines)
    print(f'{len(lines)} images with label maps in {path}')
    return True


def _split(names: Sequence[str], share: float) -> dict[str, list[str]]:
    """Divides two or more names into train and val by a hash: adding names moves few others."""
    count = min(max(round(share * len(names)), 1), len(names) - 1)
    val = set(sorted(names, key=lambda name: zlib.crc32(name.encode()))[:count])
    return {'train': [name for name in names if name not in val], 'val': sorted(val)}


def _command(classes: str, lists: Iterable[str], output: str) -> str:
    """Returns a command that trains on the lists with configs/custom.py."""
    words = ['python', '-m', 'psp_jax.main', '--config', 'configs/custom.py:source=list']
    words += [f'--config.data.root={output}', f'--config.data.classes={classes}']
    for split in ('train', 'val'):
        # the shortest name: train and not trainval; or train2017, or CVAT's Train
        found = min([n for n in lists if n.lower().startswith(split)] or lists, key=len)
        words += [f'--config.data.{split}={found}.txt'] * (found != split)
    return shlex.join(words)


if __name__ == '__main__':
    sys.exit(exit_code(run))
