"""Finds the faults of a data set that show only in all examples together, and their causes."""

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from psp_jax.data.check.read import BEYOND, NO_CLASS, Finding, Split, class_ids, totals
from psp_jax.data.labels import IGNORE, label_space, published_map
from psp_jax.data.sources import first_few

FEW = 0.05  # a value in a larger share of the labels is not a mistake in single files

TWICE = 'Listed more than once: delete the repeated lines'
LEAKED = 'Images of train that are also in val or test: take them off train'


def judge(splits: Sequence[Split], data: ConfigDict) -> list[Finding]:
    """Returns all faults that the examples show together."""
    of_labels = [
        finding
        for split in splits
        for finding in (*judge_values(split, data), *judge_map(split, data))
    ]
    return [*of_labels, *judge_copies(splits)]


def judge_values(split: Split, data: ConfigDict) -> Iterator[Finding]:
    """Yields a fault, with its likely cause, for each label with values that are not classes."""
    ids, classes = class_ids(data), len(label_space(data.classes).names)
    stored = totals(split, range(257))[1]
    total = sum(bool(facts.pixels) for facts in split.facts)
    wrong = [value for value in sorted(stored) if ids[value] == NO_CLASS]
    often = [value for value in wrong if stored[value] > FEW * total]
    seldom = [value for value in wrong if value not in often]
    for values in filter(None, (often, seldom)):  # their causes differ
        own = {i: sorted(f.pixels.keys() & values) for i, f in enumerate(split.facts)}
        own = {i: found for i, found in own.items() if found}
        heading = (
            f'Label values of {split.name} outside the classes 0..{classes - 1}: {ranges(values)} '
            f'in {len(own)} of {total} labels; {likely_cause(stored, values, total, data)}'
        )
        for i, found in own.items():
            file = split.source.names(i)[1]
            yield Finding(heading, split.name, i, file, f'{file}: {ranges(found)}')


def likely_cause(labels: Counter[int], wrong: Sequence[int], total: int, data: ConfigDict) -> str:
    """Returns why the stored values `wrong` of a split are not classes, and the remedy.

    labels: the number of labels, of all `total`, that hold each stored value.
    """
    space = label_space(data.classes)
    classes = len(space.names)
    if BEYOND in wrong:
        return '256 is any beyond 255; store class ids, not ids of instances or segments'
    if not data.label_map and (published := published_map(space, wrong)):
        return f'are they stored as published? Set {_map_flag(published)}'
    if not data.label_map and list(wrong) == [classes]:
        void = f'is {classes} void? Set {_map_flag({classes: IGNORE})}'
        other = f'is 0 "other", and 1 the first class? Set {_map_flag("minus_one")}'
        if not labels[0]:
            return other
        # Pixels without a class are in nearly every image: the more frequent value comes first.
        return '; '.join([void, other] if labels[classes] >= labels[0] else [other, void])
    if max(labels[value] for value in wrong) <= FEW * total:
        return 'so few may be mistakes; correct these labels, or leave them out'
    found = sorted(labels.keys() - {IGNORE})
    found = found if len(found) == classes else sorted(labels)
    if len(found) == classes <= 32 and not data.label_map:
        table = {value: i for i, value in enumerate(found) if value != i}
        return f'are these the classes in their order? Set {_map_flag(table)}'
    return (
        f'{ranges(sorted(labels))} are stored; name all classes in data.classes in the order of '
        'their ids, or set data.label_map to turn the others into 255'
    )


def judge_map(split: Split, data: ConfigDict) -> Iterator[Finding]:
    """Yields a fault if data.label_map ignores everything, or cannot be meant for these labels."""
    ids, classes = class_ids(data), len(label_space(data.classes).names)
    stored = sorted(totals(split, range(257))[1])
    if not stored or split.name == 'test':  # labels of test may be secret, all 255
        return
    inner = [value for value in stored if value != IGNORE]
    beyond = {v for v in range(classes, IGNORE) if ids[v] < classes}  # the map makes them classes
    heading = ''
    if not data.label_map and classes > 1 and IGNORE in stored:
        if inner == [0] or not inner and classes == 2:
            heading = f'Only 0, and 255, which is ignored: is it a class? Set {_map_flag({255: 1})}'
    elif {ids[value] for value in stored} == {IGNORE}:
        heading = 'All pixels are ignored: correct data.label_map'
    elif inner and len(beyond) > classes / 3 and not beyond.intersection(inner):
        heading = f'No value beyond {classes - 1}: are they classes already? Set {_map_flag("")}'
    if heading:
        text = f'the labels store {ranges(stored)}'
        yield Finding(heading, split.name, -1, f'labels of {split.name}', text)


def judge_copies(splits: Sequence[Split]) -> Iterator[Finding]:
    """Yields a fault for each path listed twice, and each image of train also in val or test."""
    held_out: dict[bytes, tuple[Split, int]] = {}  # by the hash of the image
    for split in sorted(splits, key=lambda split: split.name == 'train'):  # train last
        paths: set[str] = set()
        for i, facts in enumerate(split.facts):
            name = split.source.names(i)[0]
            if split.source.files and name in paths:
                yield Finding(TWICE, split.name, i, name, name)
                continue
            paths.add(name)
            if split.name != 'train':
                held_out.setdefault(facts.digest, (split, i))
            elif facts.digest and facts.digest in held_out:
                other, at = held_out[facts.digest]
                text = f'{name} = {other.source.names(at)[0]} of {other.name}'
                yield Finding(LEAKED, split.name, i, name, text)


def _map_flag(label_map: object) -> str:
    return shlex.quote(f'--config.data.label_map={label_map}'.replace(' ', ''))


def ranges(values: Sequence[int]) -> str:
    """Returns '0..11, 255' for sorted numbers."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return first_few([f'{run[0]}..{run[-1]}' if run[1:] else f'{run[0]}' for run in runs], 12)
