"""Translates names and shapes of parameters between this network and other code bases' files."""

import re
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from psp_jax.errors import UserError
from psp_jax.model.resnet import BLOCKS, STEMS, is_basic
from psp_jax.weights.files import Arrays
from psp_jax.weights.formats import COUNTERS, FORMATS, LEAVES, OURS, PARTS, Format

# ---- Our names


def part_of(name: str) -> str:
    """The part of the network: 'params/head/conv/kernel' -> 'head'."""
    return name.split('/')[1]


def modules(names: Collection[str], among: Iterable[str]) -> list[str]:
    """The modules that hold `names`, sorted, such as ['aspp', 'head/classifier'].

    A part is shown by its own name if `names` has all that the network, `among`, has in this part.
    """
    incomplete = {part_of(name) for name in set(among) - set(names)}
    found = set()
    for name in names:
        _, *path, _ = name.split('/')
        found.add('/'.join(path) if path[0] in incomplete else path[0])
    return sorted(found)


# ---- Between ours and semseg's


def semseg_name(ours: str) -> str | None:
    """'params/head/conv/kernel' -> 'cls.0.weight'; None if semseg's format has no such module."""
    _, _, path = ours.partition('/')
    module, _, leaf = path.rpartition('/')
    for pattern, name in OURS:
        match = re.fullmatch(pattern, module)
        if match and leaf in LEAVES:
            return f'{match.expand(name)}.{LEAVES[leaf]}'
    return None


def semseg_part(name: str) -> str:
    """The part that an array of semseg's belongs to: 'cls.0.weight' -> 'head'; '' if unknown."""
    return next((part for start, part in PARTS.items() if name.startswith(start)), '')


def to_torch(array: np.ndarray) -> np.ndarray:
    """A kernel [H, W, in, out] as PyTorch's [out, in, H, W]; other arrays unchanged."""
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else array


def to_ours(array: np.ndarray) -> np.ndarray:
    """PyTorch's kernel [out, in, H, W] as [H, W, in, out]; other arrays unchanged."""
    return np.ascontiguousarray(array.transpose(2, 3, 1, 0)) if array.ndim == 4 else array


# ---- Formats of files


def recognise(tensors: Arrays, source: str) -> Format:
    """The first format whose marks are all among the names. Raises UserError if there is none."""
    for format in FORMATS:
        if all(any(re.match(mark, name) for name in tensors) for mark in format.marks):
            return format
    raise UserError(
        f'{source}: the format of its names ({", ".join(sorted(tensors)[:3])}, ...) is not known; '
        f'the known ones are {", ".join(format.name for format in FORMATS)}'
    )


def to_semseg(tensors: Arrays, format: Format, source: str) -> tuple[Arrays, list[str]]:
    """The tensors under semseg's names, and the names of those that the format says to drop.

    Raises UserError if two tensors get the same name.
    """
    dropped: list[str] = []
    renamed: Arrays = {}
    for name, array in tensors.items():
        if any(re.match(pattern, name) for pattern in (COUNTERS, *format.drop)):
            dropped.append(name)
            continue
        new = name
        for pattern, replacement in format.rename:
            new, changed = re.subn(f'^{pattern}', replacement, name)
            if changed:
                break
        if new in renamed:
            raise UserError(f'{source} ({format.name}): holds two arrays for {new}, as {name}')
        renamed[new] = array
    return renamed, dropped


# ---- Options that the weights depend on


def as_options(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of a flat configuration that change what the weights compute.

    Lists, which JSON has for tuples, become tuples.
    """
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
        if key.startswith('model.') and key != 'model.dropout'
    }


def architecture(tensors: Arrays, format: Format, stated: dict[str, Any]) -> dict[str, Any]:
    """The options of the network that tensors with semseg's names belong to.

    They follow from the shapes, from the format and from what the file states itself.
    """
    kernels = {name: array for name, array in tensors.items() if array.ndim == 4}
    found: dict[str, Any] = {}
    blocks = tuple(
        len({name.split('.')[1] for name in kernels if name.startswith(f'layer{i}.')})
        for i in (1, 2, 3, 4)
    )
    basic = 'layer1.0.conv3.weight' not in kernels
    for depth, counts in BLOCKS.items():
        if counts == blocks and is_basic(depth) == basic:
            found['model.depth'] = depth
    convs = [kernels.get(f'layer0.{i}.weight') for i in (0, 3, 6)]
    stem = tuple((conv.shape[-1], conv.shape[0]) for conv in convs if conv is not None)
    for name, layers in STEMS.items():
        if layers == stem:
            found['model.stem'] = name
    for key, name in (('model.head_width', 'cls.0.weight'), ('model.aux_width', 'aux.0.weight')):
        if name in kernels:
            found[key] = len(kernels[name])
    return found | format.needs | stated
