"""Reads all examples of a data set and gathers the facts of each: sizes, counts, a hash, faults."""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from psp_jax.data.decode import decode_image, decode_label
from psp_jax.data.examples import Source
from psp_jax.data.labels import IGNORE, label_space, label_table
from psp_jax.data.sources import PAIRS, files_source, find_pairs, make_source
from psp_jax.errors import PassingError, UserError

BEYOND = 256  # stands for all label values outside 0..255
NO_CLASS = 256  # stands for the class of a value that has none

UNREADABLE = 'Cannot be read: replace the files, or leave the examples out'
NO_LABEL = 'No label maps: store one class id a pixel, as grey or palette PNG'
SIZES = 'Image and label differ in size (width x height): does the label belong to another image?'


class Finding(NamedTuple):
    """A fault.

    heading: what the fault is, with the remedy. example: its number in the split, -1 if the fault
    is not of a single example. file: the file with the fault. text: the line that is printed.
    """

    heading: str
    split: str
    example: int
    file: str
    text: str


class Facts(NamedTuple):
    """What the check keeps of an example.

    digest: hash of the image's bytes, b'' if it is bad. size: (height, width) of the image, None if
    bad. pixels: number of the label's pixels by stored value; {} if it is bad or there is none.
    """

    digest: bytes
    size: tuple[int, int] | None
    pixels: dict[int, int]
    faults: list[Finding]


class Split(NamedTuple):
    """A split ('train', 'val' or 'test'), and the facts of each of its examples."""

    name: str
    source: Source
    facts: list[Facts]


def open_split(data: ConfigDict, split: str) -> tuple[Source | None, list[Finding]]:
    """Returns the source of a split, None if it has no example, and the faults of its list."""
    heading = f'data.{split}: correct it, or what it names'
    try:
        if data.source.partition(':')[0] not in PAIRS:
            return make_source(data, split), []
        pairs, problems = find_pairs(data, split)
    except UserError as error:
        return None, [Finding(heading, split, -1, data[split], str(error))]
    # A message begins with LIST:LINE:, or with the file that has no partner.
    named = [(re.split(r':\d+: | has no partner ', problem)[0], problem) for problem in problems]
    return files_source(pairs, data), [Finding(heading, split, -1, *both) for both in named]


def read_split(source: Source, name: str, threads: int) -> Split:
    """Reads all examples, `threads` at a time (0 = one a core), with a progress bar."""
    # not pipeline.read_ahead: importing TensorFlow takes seconds
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        facts = pool.map(lambda i: examine(source, name, i), range(source.length))
        bar = tqdm(facts, f'reading {name}', source.length, unit='image', disable=None)
        return Split(name, source, list(bar))


def examine(source: Source, split: str, index: int) -> Facts:
    """Reads one example and returns its facts; a bad one has faults."""
    try:
        if source.encoded is None:  # drawn, so that nothing is stored
            scene, classes = source.read(index)
            return Facts(_digest(scene.tobytes()), scene.shape[:2], count_values(classes), [])
        example = source.encoded(index)
    except (UserError, PassingError) as error:  # its message begins with the file
        return Facts(b'', None, {}, [Finding(UNREADABLE, split, index, str(error), str(error))])
    faults: list[Finding] = []

    def decoded(
        decode: Callable[[bytes, str], np.ndarray], content: bytes, name: str
    ) -> np.ndarray | None:
        try:
            return decode(content, name)
        except UserError as error:
            said = str(error).rpartition(': ')[0]  # the rest is the remedy
            heading = UNREADABLE if 'cannot be decoded' in said else NO_LABEL
            faults.append(Finding(heading, split, index, name, said))
            return None

    image = decoded(decode_image, example.image, example.image_name)
    digest = b'' if image is None else _digest(example.image)
    size = None if image is None else (image.shape[0], image.shape[1])
    label = decoded(decode_label, example.label, example.label_name) if source.labelled else None
    if label is None:
        return Facts(digest, size, {}, faults)
    if size and size != label.shape:
        of_image, of_label = (f'{width}x{height}' for height, width in (size, label.shape))
        text = f'{example.image_name} is {of_image}, {example.label_name} is {of_label}'
        faults.append(Finding(SIZES, split, index, example.label_name, text))
    return Facts(digest, size, count_values(label), faults)


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=16).digest()


def count_values(label: np.ndarray) -> dict[int, int]:
    """Returns the number of pixels by value; values outside 0..255 count as BEYOND."""
    if label.dtype != np.uint8:
        label = np.where((label < 0) | (label > 255), BEYOND, label)
    return {value: n for value, n in enumerate(np.bincount(label.ravel()).tolist()) if n}


def totals(split: Split, ids: Sequence[int]) -> tuple[Counter[int], Counter[int]]:
    """Returns the pixels of each id and the number of labels with it.

    ids: the id of each stored value 0..255 and of BEYOND.
    """
    pixels: Counter[int] = Counter()
    labels: Counter[int] = Counter()
    for facts in split.facts:
        for value, count in facts.pixels.items():
            pixels[ids[value]] += count
        labels.update({ids[value] for value in facts.pixels})
    return pixels, labels


def class_ids(data: ConfigDict) -> list[int]:
    """Returns the class, IGNORE or NO_CLASS of each stored value 0..255 and of BEYOND."""
    classes = len(label_space(data.classes).names)
    table = label_table(data.label_map).tolist()
    return [i if i < classes or i == IGNORE else NO_CLASS for i in table] + [NO_CLASS]
