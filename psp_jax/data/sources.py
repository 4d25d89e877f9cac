"""The sources of examples: a list file, a pair of folders, a TFDS data set, the built-in scenes."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from ml_collections import ConfigDict

from psp_jax.data import scenes
from psp_jax.data.decode import exists, gfile, is_passing, naming, read_bytes, to_classes
from psp_jax.data.examples import Encoded, Source, stored_source
from psp_jax.data.labels import label_space, label_table
from psp_jax.errors import UserError

PICTURES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm', '.gif')

Pair = tuple[str, str]  # the paths of an image and of its label; '' if there is no label


def make_source(data: ConfigDict, split: str) -> Source:
    """Returns the source of one split ('train', 'val' or 'test') as `data` (config.data) says.

    data.source 'list':      data[split] is a file of lines `image label`
                'dirs':      data[split] is 'IMAGES_DIR,LABELS_DIR'
                'tfds:NAME': data[split] is a split of the TFDS data set NAME: 'train[:90%]'
                'scenes':    data[split] is 'FIRST:LAST', scenes FIRST to LAST - 1
    The split 'test' may have no labels: lines `image`, or 'IMAGES_DIR'.
    Paths are relative to data.root, absolute, or of the form scheme://...; for TFDS data.root is
    the folder of all its data sets ('' = its default). 'list:FOLDER' is short for 'list' with
    data.root=FOLDER.
    Raises UserError if the description is wrong or the split is empty.
    """
    if not data[split]:
        raise UserError(f'data.{split} is empty: set it (data.source is {data.source!r})')
    kind = data.source.partition(':')[0]
    if kind not in SOURCES:
        allowed = "use 'list', 'dirs', 'tfds:NAME' or 'scenes'"
        raise UserError(f'data.source = {data.source!r}: {allowed}')
    return SOURCES[kind](data, split)


def _paired_source(data: ConfigDict, split: str) -> Source:
    pairs, problems = find_pairs(data, split)
    if problems:
        raise UserError(first_few(problems, 1))
    return files_source(pairs, data)


def _tfds_source(data: ConfigDict, split: str) -> Source:
    from psp_jax.data.tfds_source import open_split  # here, since importing TFDS takes seconds

    records = open_split(data, split)
    return stored_source(records.length, records.name, records.encoded, data)


def _scenes_source(data: ConfigDict, split: str) -> Source:
    first, _, last = data[split].partition(':')
    if not (first.strip().isdigit() and last.strip().isdigit()):
        raise UserError(f"data.{split} = {data[split]!r}: use 'FIRST:LAST', such as '0:1000'")
    indices = range(int(first), int(last))
    if not indices:
        raise UserError(f'data.{split} = {data[split]!r} holds no scene: LAST must exceed FIRST')

    space, table = label_space(data.classes), label_table(data.label_map)

    def name(index: int) -> str:
        return f'scene {indices[index]}'

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        image, stored = scenes.draw(indices[index])
        return image, to_classes(stored, table, space, name(index))

    return Source(len(indices), name, read)


# Keys: the part of data.source before the colon.
SOURCES: dict[str, Callable[[ConfigDict, str], Source]] = {
    'list': _paired_source,
    'dirs': _paired_source,
    'tfds': _tfds_source,
    'scenes': _scenes_source,
}


def files_source(pairs: Sequence[Pair], data: ConfigDict) -> Source:
    """Returns the source of one or more pairs of paths; either all or none have labels."""

    def encoded(index: int) -> Encoded:
        image, label = pairs[index]
        return Encoded(read_bytes(image), read_bytes(label) if label else b'', image, label)

    def name(index: int) -> str:
        return ' '.join(pairs[index]).strip()

    return stored_source(len(pairs), name, encoded, data, pairs)


def check_source(source: Source, examples: int = 64, skip: bool = False) -> str:
    """Checks that every file exists and reads `examples` examples spread evenly over the set.

    skip: whether bad examples are allowed. Raises the UserError of the first problem, in the order
    of the set; with `skip` only if most files are missing or all examples that were read are bad.
    Returns a note for the message about the set, or ''.
    """
    with ThreadPoolExecutor(32) as pool:
        paths = [path for pair in source.files for path in pair if path]
        missing = [p for p, there in zip(paths, pool.map(exists, paths), strict=True) if not there]
        if len(missing) > (len(paths) // 2 if skip else 0):
            more = f' (and {len(missing) - 1} more of {len(paths)} files)' if missing[1:] else ''
            raise UserError(f'{missing[0]} does not exist{more}: check the list and data.root')
    picks = np.unique(np.linspace(0, source.length - 1, examples).round().astype(int)).tolist()

    def problem(index: int) -> UserError | None:
        try:
            source.read(index)
        except UserError as error:
            if not skip:
                raise
            return error
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bad = [error for error in pool.map(problem, picks) if error]
    if len(bad) == len(picks):
        raise bad[0]
    return f'; {len(bad)} of {len(picks)} examples that were tried cannot be read' if bad else ''


def find_pairs(data: ConfigDict, split: str) -> tuple[list[Pair], list[str]]:
    """Returns the pairs of a list or of folders, and a message for each line or file without one.

    Raises UserError if there is no pair at all.
    """
    return PAIRS[data.source.partition(':')[0]](data, split)


def root_of(data: ConfigDict) -> str:
    """Returns the folder that the paths of `data` are relative to."""
    kind, _, rest = data.source.partition(':')
    return os.path.expanduser(rest if rest and kind != 'tfds' else data.root)


def _list_pairs(data: ConfigDict, split: str) -> tuple[list[Pair], list[str]]:
    """Reads the list file data[split]; raises UserError also if only some lines have labels."""
    root = root_of(data)
    path = _full_path(root, data[split])
    try:
        text = read_bytes(path).decode('utf-8-sig')
    except UnicodeDecodeError:
        raise UserError(f'{path} is not a text file in UTF-8') from None
    pairs, problems = [], []
    for number, line in enumerate(text.split('\n'), 1):
        if not line.strip():
            continue
        fields = line.split('\t') if '\t' in line else line.strip().rsplit(' ', 1)
        fields = [field.strip() for field in fields]
        images = [field.lower().endswith(PICTURES) for field in fields]
        if split == 'test' and images != [True, True]:  # one path, perhaps with spaces
            pairs.append([line.strip(), ''])
        elif len(fields) == 2 and all(fields):
            pairs.append(fields)
        else:
            problems.append(
                f'{path}:{number}: {line.strip()!r} is not `image label` '
                '(two paths, separated by a tab or by the last space)'
            )
    if not pairs:
        raise UserError(first_few(problems or [f'{path} lists no example'], 1))
    unlabelled = sum(not label for _, label in pairs)
    if 0 < unlabelled < len(pairs):
        raise UserError(f'{path}: {unlabelled} of {len(pairs)} lines have no label; all or none')
    # In the lists of PASCAL VOC a leading slash means the data set's folder. The first such path
    # decides for the whole list, which may be long and on a slow file system.
    slashed = next((field for pair in pairs for field in pair if field.startswith('/')), '')
    if slashed and root and not exists(slashed):
        pairs = [[field.lstrip('/') for field in pair] for pair in pairs]
    full = [(_full_path(root, image), label and _full_path(root, label)) for image, label in pairs]
    return full, problems


def _dir_pairs(data: ConfigDict, split: str) -> tuple[list[Pair], list[str]]:
    """Pairs the files of the folders data[split]; raises UserError also if a folder is missing."""
    key, root = f'data.{split}', root_of(data)
    paths = [_full_path(root, part.strip()) for part in data[split].split(',')]
    if len(paths) == 1 and split == 'test':
        found, problems = _list_dir(paths[0])
        if not found:
            raise UserError(f'{key}: {paths[0]} holds no image')
        return [(found[stem], '') for stem in sorted(found)], problems
    if len(paths) != 2:
        raise UserError(f"{key} = {data[split]!r}: use 'IMAGES_DIR,LABELS_DIR'")
    (images, twice), (labels, twice_labels) = (_list_dir(folder) for folder in paths)
    problems = [*twice, *twice_labels]
    problems += [
        f'{here[stem]} has no partner of the same name in {folder}'
        for here, there, folder in ((images, labels, paths[1]), (labels, images, paths[0]))
        for stem in sorted(here.keys() - there.keys())
    ]
    pairs = [(images[stem], labels[stem]) for stem in sorted(images.keys() & labels.keys())]
    if not pairs:
        raise UserError(first_few(problems or [f'{key}: {paths[0]} holds no image'], 1))
    return pairs, problems


# The kinds of sources whose examples are single files, and the functions that find these files.
PAIRS: dict[str, Callable[[ConfigDict, str], tuple[list[Pair], list[str]]]] = {
    'list': _list_pairs,
    'dirs': _dir_pairs,
}


def _list_dir(folder: str) -> tuple[dict[str, str], list[str]]:
    """Returns the images under a folder by their relative path without the suffix.

    Also returns a message for each image whose path without the suffix equals that of another.
    """
    remote = '://' in folder
    if not (exists(folder) and (gfile() if remote else os.path).isdir(folder)):
        raise UserError(f'{folder} is not a folder')
    found: dict[str, str] = {}
    problems = []
    with naming(folder):
        walk = gfile().walk(folder) if remote else os.walk(folder, onerror=_stop, followlinks=True)
        paths = [
            os.path.join(parent, name)
            for parent, _, names in walk
            for name in sorted(names)
            if not name.startswith('.') and name.lower().endswith(PICTURES)
        ]
    for path in paths:
        stem = os.path.splitext(path)[0][len(folder) :].lstrip('/')
        if stem in found:
            problems.append(f'{found[stem]} and {path} have the same name: remove one')
        else:
            found[stem] = path
    return found, problems


def _stop(error: OSError) -> None:
    """Raises the error if a disk fails; otherwise the folder would seem to be empty."""
    if is_passing(error):
        raise error


def _full_path(root: str, path: str) -> str:
    """Returns a path of the configuration or of a list; relative paths start in `root`."""
    return path if '://' in path else os.path.join(root, os.path.expanduser(path))


def first_few(items: Sequence[str], most: int = 5) -> str:
    """Returns 'a, b, c (and 7 more)'."""
    return ', '.join(items[:most]) + (f' (and {len(items) - most} more)' if items[most:] else '')
