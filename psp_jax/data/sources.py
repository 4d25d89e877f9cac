"""Where examples come from: a list file, a pair of folders, TFDS, or the built-in scenes.

A source answers `read(i)` with one decoded example; it holds no state beyond the list of names,
so any number of threads may read from it.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from psp_jax.data.decode import (
    decode_image,
    decode_label,
    exists,
    gfile,
    is_passing,
    read_bytes,
    to_classes,
    told,
)
from psp_jax.data.labels import label_space, label_table
from psp_jax.errors import UserError

PICTURES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm', '.gif')


class Encoded(NamedTuple):
    """An example as it is stored: the bytes of its pictures, and what messages call them.

    `label` is b'' in a split without labels.
    """

    image: bytes
    label: bytes
    image_name: str
    label_name: str


class Source(NamedTuple):
    """Examples 0..length-1.

    name: index -> what to call the example in messages (its paths, or 'scene 17').
    read: index -> (image uint8 [H, W, 3] RGB, label uint8 [H, W] classes, 255 = ignore); raises
        UserError, naming the file, where the example is missing or bad.
    files: the (image, label) path pairs; empty where there are no single files.
    labelled: False where the split has no labels; those of `read` are None then.
    encoded: index -> the stored bytes; None where nothing is stored.
    """

    length: int
    name: Callable[[int], str]
    read: Callable[[int], tuple[np.ndarray, Any]]
    files: Sequence[tuple[str, str]] = ()
    labelled: bool = True
    encoded: Callable[[int], Encoded] | None = None

    def names(self, index: int) -> tuple[str, str]:
        """What to call image and label of an example: their paths, where they have some."""
        return self.files[index] if self.files else (self.name(index),) * 2


def make_source(data: ConfigDict, split: str) -> Source:
    """Returns the source of one split ('train', 'val' or 'test') as `data` (config.data) says.

    data.source 'list':      data[split] is a file of lines `image label`
                'dirs':      data[split] is 'IMAGES_DIR,LABELS_DIR'
                'tfds:NAME': data[split] is a split of the TFDS data set NAME: 'train[:90%]'
                'scenes':    data[split] is 'FIRST:LAST', scenes FIRST to LAST - 1
    The split 'test' may have images alone: lines `image`, or 'IMAGES_DIR'.
    Paths are relative to data.root, absolute, or of the form scheme://...; of TFDS data.root is the
    folder of all its data sets ('' = its default). 'list:FOLDER' is short for 'list' and data.root.
    Raises UserError where the description is wrong or the set is empty.
    """
    if not data[split]:
        raise UserError(f'data.{split} is empty: set it (data.source is {data.source!r})')
    pairs = path_pairs(data, split)
    if pairs:
        files, problems = pairs
        if problems:
            raise UserError(_first_of(problems))
        return files_source(files, data)
    kind, _, name = data.source.partition(':')
    if kind == 'scenes':
        return _scenes_source(data, split)
    if kind == 'tfds':
        from psp_jax.data.tfds_source import open_split  # imports TFDS, which takes seconds

        return stored_source(*open_split(name, root_of(data), data[split]), data)
    raise UserError(f"data.source = {data.source!r}: use 'list', 'dirs', 'tfds:NAME' or 'scenes'")


def root_of(data: ConfigDict) -> str:
    """The folder that the paths of `data` are relative to."""
    kind, _, rest = data.source.partition(':')
    return os.path.expanduser(rest if rest and kind != 'tfds' else data.root)


def path_pairs(data: ConfigDict, split: str) -> tuple[list[tuple[str, str]], list[str]] | None:
    """The (image, label) paths of a list or of folders, and what is wrong with others of them.

    None where data.source is neither. Raises UserError where there is no pair at all.
    """
    kind = data.source.partition(':')[0]
    if kind == 'list':
        return list_pairs(root_of(data), data[split], split == 'test')
    if kind == 'dirs':
        return dir_pairs(root_of(data), data[split], f'data.{split}')
    return None


def files_source(files: Sequence[tuple[str, str]], data: ConfigDict) -> Source:
    """The source of (image, label) path pairs, one or more; '' for labels that there are not."""

    def encoded(index: int) -> Encoded:
        image, label = files[index]
        return Encoded(read_bytes(image), read_bytes(label) if label else b'', image, label)

    def name(index: int) -> str:
        return ' '.join(files[index]).strip()

    return stored_source(len(files), name, encoded, data, files)


def stored_source(
    length: int,
    name: Callable[[int], str],
    encoded: Callable[[int], Encoded],
    data: ConfigDict,
    files: Sequence[tuple[str, str]] = (),
) -> Source:
    """The source of examples whose pictures are stored, whose labels become classes here."""
    classes = len(label_space(data.classes).names)
    table = label_table(data.label_map)
    labelled = not files or bool(files[0][1])

    def read(index: int) -> tuple[np.ndarray, Any]:
        example = encoded(index)
        image = decode_image(example.image, example.image_name)
        if not labelled:
            return image, None
        stored = decode_label(example.label, example.label_name)
        if image.shape[:2] != stored.shape:
            sizes = [f'{a.shape[1]}x{a.shape[0]}' for a in (image, stored)]
            raise UserError(
                f'{example.image_name} is {sizes[0]} but its label {example.label_name} is '
                f'{sizes[1]} (width x height, EXIF orientation applied): they must be of the same '
                'size'
            )
        return image, to_classes(stored, table, classes, data.label_map, example.label_name)

    return Source(length, name, read, files, labelled, encoded)


def check_source(source: Source, examples: int = 64, skip: bool = False) -> str:
    """Checks that every file exists and reads `examples` examples spread evenly over the set.

    Raises the UserError of the first problem, in the order of the set; with `skip` only where most
    files are missing or all that was read is bad. Returns what else there is to say.
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
    return f'; of {len(picks)} that were tried {len(bad)} cannot be read' if bad else ''


def _scenes_source(data: ConfigDict, split: str) -> Source:
    from psp_jax.data import scenes

    first, colon, last = data[split].partition(':')
    if not (colon and first.strip().isdigit() and last.strip().isdigit()):
        raise UserError(f"data.{split} = {data[split]!r}: use 'FIRST:LAST', such as '0:1000'")
    indices = range(int(first), int(last))
    if not indices:
        raise UserError(f'data.{split} = {data[split]!r} holds no scene: LAST must exceed FIRST')
    classes = len(label_space(data.classes).names)
    table = label_table(data.label_map)

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        image, stored = scenes.draw(indices[index])
        return image, to_classes(stored, table, classes, data.label_map, name(index))

    def name(index: int) -> str:
        return f'scene {indices[index]}'

    return Source(len(indices), name, read)


def list_pairs(
    root: str, list_file: str, may_lack_labels: bool
) -> tuple[list[tuple[str, str]], list[str]]:
    """The (image, label) paths of a list file, and a message for each line that gives none.

    Raises UserError where no line gives any.
    """
    path = joined(root, list_file)
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
        pictures = [field.lower().endswith(PICTURES) for field in fields]
        if may_lack_labels and pictures != [True, True]:  # a path with spaces, or one alone
            pairs.append([line.strip(), ''])
        elif len(fields) == 2 and all(fields):
            pairs.append(fields)
        else:
            problems.append(
                f'{path}:{number}: {line.strip()!r} is not `image label` '
                '(two paths, separated by a tab or by the last space)'
            )
    if not pairs:
        raise UserError(_first_of(problems or [f'{path} lists no example']))
    unlabelled = sum(not label for _, label in pairs)
    if 0 < unlabelled < len(pairs):
        raise UserError(f'{path}: {unlabelled} of {len(pairs)} lines have no label; all or none')
    # Lists of PASCAL VOC begin paths with a slash and mean the data set's folder by it. One path
    # decides for the whole list, which may be long and on a slow file system.
    slashed = next((field for pair in pairs for field in pair if field.startswith('/')), '')
    if slashed and root:
        below_root = exists(root.rstrip('/') + slashed)
        if below_root or not exists(os.path.dirname(slashed)):
            pairs = [[field.lstrip('/') for field in pair] for pair in pairs]
    return [
        (joined(root, image), label and joined(root, label)) for image, label in pairs
    ], problems


def dir_pairs(root: str, spec: str, where: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The (image, label) paths of 'IMAGES_DIR,LABELS_DIR', and a message for each without partner.

    `where`: the key that says so; data.test may be 'IMAGES_DIR'. Raises UserError where a folder
    is missing, or there is no pair.
    """
    folders = [joined(root, part.strip()) for part in spec.split(',')]
    if len(folders) == 1 and where == 'data.test':
        found, problems = _list_dir(folders[0])
        if not found:
            raise UserError(f'{where}: {folders[0]} holds no image')
        return [(found[stem], '') for stem in sorted(found)], problems
    if len(folders) != 2:
        raise UserError(f"{where} = {spec!r}: use 'IMAGES_DIR,LABELS_DIR'")
    (images, twice), (labels, twice_labels) = (_list_dir(folder) for folder in folders)
    problems = [*twice, *twice_labels]
    problems += [
        f'{here[stem]} has no partner of the same name in {folder}'
        for here, there, folder in ((images, labels, folders[1]), (labels, images, folders[0]))
        for stem in sorted(here.keys() - there.keys())
    ]
    pairs = [(images[stem], labels[stem]) for stem in sorted(images.keys() & labels.keys())]
    if not pairs:
        raise UserError(_first_of(problems or [f'{where}: {folders[0]} holds no image']))
    return pairs, problems


def _first_of(problems: Sequence[str]) -> str:
    return problems[0] + (f' (and {len(problems) - 1} more)' if problems[1:] else '')


def _list_dir(folder: str) -> tuple[dict[str, str], list[str]]:
    """Pictures under a folder, by their path relative to it without the suffix.

    And a message for each that would have the name of another.
    """
    remote = '://' in folder
    if not (exists(folder) and (gfile() if remote else os.path).isdir(folder)):
        raise UserError(f'{folder} is not a folder')
    found: dict[str, str] = {}
    problems = []
    with told(folder):
        walk = gfile().walk(folder) if remote else os.walk(folder, onerror=_stop, followlinks=True)
        paths = [
            os.path.join(parent, name)
            for parent, _, names in walk
            for name in sorted(names)
            if not name.startswith('.') and name.lower().endswith(PICTURES)
        ]
    for path in paths:
        stem = os.path.splitext(path)[0][len(folder) :].lstrip('/')
        if not path.isprintable():
            problems.append(f'{path!r}: rename it, lists of files cannot hold such a name')
        elif stem in found:
            problems.append(f'{found[stem]} and {path} have the same name: remove one')
        else:
            found[stem] = path
    return found, problems


def _stop(error: OSError) -> None:
    """Of a walk: what does not answer must not pass for an empty folder."""
    if is_passing(error):
        raise error


def joined(root: str, path: str) -> str:
    """A path of the configuration or of a list: relative ones lie in `root`, `~` is the user's."""
    return path if '://' in path else os.path.join(root, os.path.expanduser(path))
