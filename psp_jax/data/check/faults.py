"""What is in the examples of a data set, and what is wrong with them: faults and notes.

`examine` gathers the facts of one example, counts and a hash; the judgements are made of these.
"""

import io
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from psp_jax.data.decode import decode_image, decode_label
from psp_jax.data.labels import IGNORE, label_space, label_table
from psp_jax.data.sources import Encoded, Source, files_source, make_source, path_pairs
from psp_jax.errors import PassingError, UserError

FEW = 0.05  # share of labels; what more of them hold is meant
BEYOND = 256  # in place of label values outside 0..255
NONE = 256  # in place of the class of values that are of none

# Faults, each with its remedy.
UNREADABLE = 'Cannot be read: replace the files, or leave the examples out'
NO_LABEL = 'No label maps: store one class id a pixel, as grey or palette PNG'
SIZES = 'Image and label differ in size (width x height): is one of another picture, or resized?'
SUFFIX = 'The content is not what the suffix says: rename the files'
MIXED = 'Few {} labels among {} ones: do their values mean the same? Store all in one way'
TWICE = 'Listed more than once: take the repeated lines off'
LEAKED = 'Images of train that are in val or test, too: take them off train'
# Notes: may be as it should or not.
VOID = 'Labels without a pixel of a class'
EQUAL = 'Files of equal content'
ABSENT = 'Classes without a pixel in train'
TWO_WAYS = 'Both palette and grey labels: do their values mean the same?'
NOTES = (VOID, EQUAL, ABSENT, TWO_WAYS)


class Finding(NamedTuple):
    """A fault or a note.

    heading: what it is; one of NOTES if a note. example: its number in the split, -1 if it is of
    none. file: its culprit. text: what is printed.
    """

    heading: str
    split: str
    example: int
    file: str
    text: str


class Facts(NamedTuple):
    """What is kept of an example.

    digest: of the image's bytes, b'' if it is bad. size: (height, width) of the image, None if bad.
    pixels: the number of the label's pixels by stored value; {} if it is bad or there is none.
    is_palette: whether the label is a palette picture; None if it is bad or there is none.
    """

    digest: bytes
    size: tuple[int, int] | None
    pixels: dict[int, int]
    is_palette: bool | None
    faults: list[Finding]


class Split(NamedTuple):
    name: str
    source: Source
    facts: list[Facts]


# ---- Facts


def examine(example: Encoded, split: str, index: int, labelled: bool, are_files: bool) -> Facts:
    """The facts of one example; where its names are those of files, their suffixes have to fit."""
    faults: list[Finding] = []

    def fault(heading: str, file: str, text: str) -> None:
        faults.append(Finding(heading, split, index, file, text))

    def decoded(
        decode: Callable[[bytes, str], np.ndarray], content: bytes, name: str
    ) -> tuple[np.ndarray | None, str]:
        try:
            array = decode(content, name)
        except UserError as error:
            said = str(error).rpartition(': ')[0]  # the rest is the remedy
            fault(UNREADABLE if 'cannot be decoded' in said else NO_LABEL, name, said)
            return None, ''
        with Image.open(io.BytesIO(content)) as header:
            kind, mode = str(header.format).replace('MPO', 'JPEG'), header.mode
        suffix = os.path.splitext(name)[1].lower()
        if are_files and Image.registered_extensions().get(suffix, kind) != kind:
            fault(SUFFIX, name, f'{name} is {kind}')
        return array, mode

    image, _ = decoded(decode_image, example.image, example.image_name)
    digest, size = b'', None
    if image is not None:
        digest, size = blake2b(example.image).digest()[:16], (image.shape[0], image.shape[1])
    if not labelled:
        return Facts(digest, size, {}, None, faults)
    label, mode = decoded(decode_label, example.label, example.label_name)
    if label is None:
        return Facts(digest, size, {}, None, faults)
    if size and size != label.shape:
        of_image, of_label = (f'{width}x{height}' for height, width in (size, label.shape))
        text = f'{example.image_name} is {of_image}, {example.label_name} is {of_label}'
        fault(SIZES, example.label_name, text)
    return Facts(digest, size, counted(label), mode == 'P', faults)


def counted(label: np.ndarray) -> dict[int, int]:
    """Number of pixels of a label by value, those outside 0..255 as BEYOND."""
    if label.dtype != np.uint8:
        label = np.where((label < 0) | (label > 255), BEYOND, label)
    return {value: n for value, n in enumerate(np.bincount(label.ravel()).tolist()) if n}


def _read(source: Source, split: str, index: int) -> Facts:
    try:
        if source.encoded is None:  # drawn
            image, label = source.read(index)
            return Facts(
                blake2b(image.data).digest()[:16], image.shape[:2], counted(label), None, []
            )
        example = source.encoded(index)
    except (UserError, PassingError) as error:  # it begins with the file
        return Facts(
            b'', None, {}, None, [Finding(UNREADABLE, split, index, str(error), str(error))]
        )
    return examine(example, split, index, source.labelled, bool(source.files))


def open_split(data: ConfigDict, split: str) -> tuple[Source | None, list[Finding]]:
    """The source of a split, as far as there is one, and the faults of its list or folders."""
    heading = f'data.{split}: mend it, or what it names'
    try:
        pairs = path_pairs(data, split)
        if pairs is None:
            return make_source(data, split), []
    except UserError as error:
        return None, [Finding(heading, split, -1, data[split], str(error))]
    files, problems = pairs
    # A message begins with LIST:LINE:, or with the file that has no partner.
    named = [(re.split(r':\d+: | has no partner ', problem)[0], problem) for problem in problems]
    return files_source(files, data), [Finding(heading, split, -1, *both) for both in named]


def read_split(source: Source, name: str, threads: int) -> Split:
    """Reads all examples, `threads` at a time (0 = one a core), with a progress bar."""
    # pipeline.read_ahead would bring TensorFlow in, which takes seconds; and results are small.
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        facts = pool.map(lambda i: _read(source, name, i), range(source.length))
        bar = tqdm(facts, f'reading {name}', source.length, unit='image', disable=None)
        return Split(name, source, list(bar))


def totals(split: Split, ids: Sequence[int]) -> tuple[Counter[int], Counter[int]]:
    """The pixels of each id and the labels that hold it; ids: of the values 0..255 and BEYOND."""
    pixels: Counter[int] = Counter()
    labels: Counter[int] = Counter()
    for facts in split.facts:
        for value, count in facts.pixels.items():
            pixels[ids[value]] += count
        labels.update({ids[value] for value in facts.pixels})
    return pixels, labels


def class_ids(data: ConfigDict) -> list[int]:
    """The class, IGNORE or NONE of the stored values 0..255 and BEYOND."""
    classes = len(label_space(data.classes).names)
    table = label_table(data.label_map).tolist()
    return [i if i < classes or i == IGNORE else NONE for i in table] + [NONE]


# ---- Judgements: faults, and notes on what may be as it should or not


def likely_cause(labels: Counter[int], wrong: Sequence[int], total: int, data: ConfigDict) -> str:
    """Why the stored values `wrong` of a split are no classes, and the remedy.

    labels: how many of all `total` labels hold each stored value.
    """
    classes = len(label_space(data.classes).names)
    if BEYOND in wrong:
        return '256 is any beyond 255; store class ids, not ids of instances or segments'
    if not data.label_map:
        if list(wrong) == [classes]:
            void = f'is {classes} void? Set {_map_flag({classes: IGNORE})}'
            other = f'is 0 "other", and 1 the first class? Set {_map_flag("minus_one")}'
            published = label_space(data.classes).label_map
            if published:
                return f'as the data set is published? Set {_map_flag(published)}'
            if not labels[0]:
                return other
            # What is not labelled is in nearly every picture.
            return '; '.join([void, other] if labels[classes] >= labels[0] else [other, void])
        if classes == 19 and max(wrong) <= 33:
            return f'ids of Cityscapes? Set {_map_flag("cityscapes_ids")}'
    if max(labels[value] for value in wrong) <= FEW * total:
        return 'so few may be of another labelling; mend them, or leave them out'
    found = sorted(labels.keys() - {IGNORE})
    found = found if len(found) == classes else sorted(labels)
    if len(found) == classes <= 32 and not data.label_map:
        table = {value: i for i, value in enumerate(found) if value != i}
        return f'are these the classes in their order? Set {_map_flag(table)}'
    return (
        f'{ranges(sorted(labels))} are stored; name all classes in data.classes in the order of '
        'their ids, or have data.label_map turn the others into 255'
    )


def judge_labels(split: Split, data: ConfigDict) -> Iterator[Finding]:
    """What all labels of a split show together."""
    ids, classes = class_ids(data), len(label_space(data.classes).names)
    stored, labels = totals(split, range(257))[1], totals(split, ids)[1]
    total = sum(bool(facts.pixels) for facts in split.facts)

    def of(heading: str, example: int, more: str = '') -> Finding:
        file = split.source.names(example)[1]
        return Finding(heading, split.name, example, file, file + more)

    wrong = [value for value in sorted(stored) if ids[value] == NONE]
    often = [value for value in wrong if stored[value] > FEW * total]
    seldom = [value for value in wrong if value not in often]
    for values in filter(None, (often, seldom)):  # they have not the same cause
        own = {i: sorted(f.pixels.keys() & values) for i, f in enumerate(split.facts)}
        own = {i: found for i, found in own.items() if found}
        heading = (
            f'Label values of {split.name} outside the classes 0..{classes - 1}: {ranges(values)} '
            f'in {len(own)} of {total} labels; {likely_cause(stored, values, total, data)}'
        )
        yield from (of(heading, i, f': {ranges(found)}') for i, found in own.items())

    heading, inner = '', sorted(stored.keys() - {IGNORE})
    masks = inner == [0] or not inner and classes == 2 and split.name != 'test'
    if stored[IGNORE] and masks and classes > 1 and not data.label_map:
        heading = (
            f'Nothing but 0, and 255, which is ignored: is it a class? Set {_map_flag({255: 1})}'
        )
    elif data.label_map == 'cityscapes_ids' and inner and inner[-1] < 19:
        heading = f'No id of Cityscapes beyond 18: are they train ids? Set {_map_flag("")}'
    elif labels.keys() == {IGNORE} and split.name != 'test':  # those of test may be secret
        heading = 'All pixels are ignored: correct data.label_map'
    if heading:
        text = f'{total} labels store {ranges(sorted(stored))}'
        yield Finding(heading, split.name, -1, f'labels of {split.name}', text)

    of_kind: dict[str, list[int]] = {'palette': [], 'grey': []}
    for i, facts in enumerate(split.facts):
        if facts.is_palette is not None:
            of_kind['palette' if facts.is_palette else 'grey'].append(i)
    (few, rare), (many, usual) = sorted(of_kind.items(), key=lambda item: len(item[1]))
    if len(rare) < len(usual) and len(rare) <= max(3, len(usual) // 10):
        yield from (of(MIXED.format(few, many), i) for i in rare)
    elif rare:
        text = f'{len(rare)} {few} and {len(usual)} {many} labels'
        yield Finding(TWO_WAYS, split.name, -1, '', text)
    for i, facts in enumerate(split.facts):
        if {ids[value] for value in facts.pixels} == {IGNORE}:
            yield of(VOID, i)


def judge_classes(splits: Sequence[Split], data: ConfigDict) -> Iterator[Finding]:
    """Notes on classes that train lacks: all of them, and those that another split has."""
    labels = {split.name: totals(split, class_ids(data))[1] for split in splits}
    for split in labels if labels.get('train') else ():
        for i, name in enumerate(label_space(data.classes).names):
            if not labels['train'][i] and (split == 'train' or labels[split][i]):
                has = f' is in {labels[split][i]} labels' if labels[split][i] else ''
                yield Finding(ABSENT, split, -1, '', f'{i} {name}{has}')


def judge_copies(splits: Sequence[Split]) -> Iterator[Finding]:
    """Images that are there twice.

    A fault is a path that is listed twice in a split, and an image of train whose content is in val
    or test; a note is equal content in two files of a split, or in val and test.
    """
    first: dict[bytes, tuple[Split, int]] = {}
    for split in sorted(splits, key=lambda split: ('val', 'test', 'train').index(split.name)):
        paths: set[str] = set()
        for i, facts in enumerate(split.facts):
            if split.source.files:
                path = split.source.files[i][0]
                if path in paths:
                    yield Finding(TWICE, split.name, i, path, path)
                    continue
                paths.add(path)
            other, at = first.setdefault(facts.digest, (split, i))
            if facts.digest and (other is not split or at != i):
                name, twin = split.source.names(i)[0], other.source.names(at)[0]
                leaked = other is not split and split.name == 'train'
                text = f'{name} = {twin}' + (f' of {other.name}' if other is not split else '')
                yield Finding(LEAKED if leaked else EQUAL, split.name, i, name, text)


def _map_flag(label_map: object) -> str:
    return shlex.quote(f'--config.data.label_map={label_map}'.replace(' ', ''))


def ranges(values: Sequence[int]) -> str:
    """'0..11, 255' of sorted numbers."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return some([f'{run[0]}..{run[-1]}' if run[1:] else f'{run[0]}' for run in runs], 12)


def some(items: Sequence[str], most: int = 5) -> str:
    """'a, b, c (and 7 more)'."""
    return ', '.join(items[:most]) + (f' (and {len(items) - most} more)' if items[most:] else '')
