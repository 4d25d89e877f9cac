"""Loads the weights of another training, ours or another code base's, into a network.

A part is a module at the top of the network: backbone, context module, head, aux_head. A part that
only the network has starts fresh. A part that only the source has is dropped. Modules for which the
source's format has no name start fresh too. The report lists them. All other arrays must fit.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from psp_jax.config import flatten
from psp_jax.config_values import as_text
from psp_jax.errors import UserError
from psp_jax.runtime import checkpoint
from psp_jax.weights.files import Arrays, is_checkpoint, read_file
from psp_jax.weights.names import (
    architecture,
    as_options,
    modules,
    part_of,
    recognise,
    semseg_name,
    semseg_part,
    to_ours,
    to_semseg,
)

# Options that only matter if this part is loaded. The others always matter.
OPTIONS_OF_PART = {
    'backbone': ('model.backbone', 'model.depth', 'model.stem', 'model.dilation'),
    'pyramid': ('model.context', 'model.bins', 'model.pool', 'model.reduce'),
    'head': ('model.head_width',),
    'aux_head': ('model.aux_width',),
}


@dataclass(frozen=True)
class Weights:
    """The arrays to load, by our names ('params/head/conv/kernel'), and lines that report them."""

    arrays: Arrays
    report: list[str]


@dataclass(frozen=True)
class Source:
    """The contents of a file or a checkpoint.

    `arrays` has our names for the network's parameters, and the file's own names for others; of a
    checkpoint it has shapes instead of values. `parts` has the part of each, '' if unknown.
    `options` are the keys of the configuration that the weights depend on.
    """

    label: str
    arrays: dict[str, Any]
    parts: dict[str, str]
    options: dict[str, Any]


def replace_arrays(state: Any, arrays: Arrays) -> Any:
    """`state` with the named arrays in place of its own, on the same devices."""
    leaves = [
        jax.device_put(arrays[name], leaf.sharding) if name in arrays else leaf
        for name, leaf in checkpoint.named_leaves(state).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def load_weights(source: str, config: ConfigDict, wanted: dict[str, Any]) -> Weights:
    """The weights in `source` for the arrays `wanted` ({name: leaf with shape and dtype}).

    `source` is a file, `hf://OWNER/NAME[/FILE]`, two of these with a comma between, or a checkpoint
    of psp_jax. Names that match `config.init_skip` are left out. Raises UserError if the source
    cannot be read or does not fit.
    """
    skipped = names_to_skip(config.init_skip, wanted)
    paths = [path.strip() for path in source.split(',') if path.strip()]
    if len(paths) == 1 and is_checkpoint(paths[0]):
        return _load_checkpoint(paths[0], config, wanted, skipped)
    return _load_files(paths, config, wanted, skipped)


def names_to_skip(init_skip: str, names: Iterable[str]) -> set[str]:
    """The names in which a pattern of `init_skip` matches the beginning of a module's name.

    'head' matches 'params/head/conv/kernel' but not 'params/aux_head/conv/kernel'. Raises UserError
    if a pattern is no regular expression or matches nothing.
    """
    skipped: set[str] = set()
    for text in filter(None, (part.strip() for part in init_skip.split(','))):
        try:
            pattern = re.compile(f'/(?:{text})')
        except re.error as error:
            raise UserError(f'init_skip: {text!r} is not a pattern ({error})') from error
        matching = {name for name in names if pattern.search(name)}
        if not matching:
            raise UserError(f"init_skip: {text!r} matches no parameter's name")
        skipped |= matching
    return skipped


def _load_files(
    paths: Sequence[str], config: ConfigDict, wanted: dict[str, Any], skipped: set[str]
) -> Weights:
    tensors: Arrays = {}
    stated: dict[str, Any] = {}
    for path in paths:
        read, options = read_file(path)
        both = sorted(tensors.keys() & read.keys())
        if both:
            raise UserError(
                f'{path}: holds {both[0]}, as the file before it does; give only one of them'
            )
        tensors |= read
        stated |= as_options(options)
    label = ','.join(paths)
    # DataParallel, which semseg trains with, puts 'module.' before each name.
    tensors = {name.removeprefix('module.'): array for name, array in tensors.items()}
    format = recognise(tensors, label)
    renamed, dropped = to_semseg(tensors, format, label)
    ours = {semseg: name for name in wanted if (semseg := semseg_name(name))}
    source = Source(
        label=f'{label} ({format.name})',
        arrays={ours.get(name, name): to_ours(array) for name, array in renamed.items()},
        parts={ours.get(name, name): semseg_part(name) for name in renamed},
        options=architecture(renamed, format, stated),
    )
    nameless = wanted.keys() - ours.values()
    needed, lines = _fit(source, config, wanted, skipped | nameless)
    arrays = {name: source.arrays[name].astype(leaf.dtype) for name, leaf in needed.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f'{label}: {name} holds values that are not finite')
    count = f'{len(arrays)} arrays from {source.label}, {len(dropped)} dropped by rule'
    return Weights(arrays, [count, *lines])


def _load_checkpoint(
    path: str, config: ConfigDict, wanted: dict[str, Any], skipped: set[str]
) -> Weights:
    folder, step = checkpoint.find_in(path)
    shapes = checkpoint.shapes(folder, step, ('params', 'batch_stats'))
    source = Source(
        label=str(folder / str(step)),
        arrays=shapes,
        parts={name: part_of(name) for name in shapes},
        options=as_options(flatten(checkpoint.config_of(folder, step))),
    )
    needed, lines = _fit(source, config, wanted, skipped)
    arrays = checkpoint.read_arrays(folder, step, needed)
    return Weights(arrays, [f'{len(arrays)} arrays from {source.label}', *lines])


# ---- Does it fit?


def _fit(
    source: Source, config: ConfigDict, wanted: dict[str, Any], skipped: set[str]
) -> tuple[dict[str, Any], list[str]]:
    """The part of `wanted` to load, and lines for the report about what is left out on each side.

    Raises UserError if the parts that both sides have do not fit.
    """
    candidates = {name: leaf for name, leaf in wanted.items() if name not in skipped}
    parts = {part_of(name) for name in candidates} & set(source.parts.values())
    if not parts:
        raise UserError(f'{source.label}: holds nothing that this network has; see --config.model')
    _check_options(source, config, parts)
    needed = {name: leaf for name, leaf in candidates.items() if part_of(name) in parts}
    left = source.arrays.keys() - wanted.keys()
    _check_arrays(source, needed, sorted(n for n in left if source.parts[n] in {*parts, ''}))
    fresh = modules(wanted.keys() - needed.keys(), wanted)
    lacking = sorted(set(source.parts.values()) - {part_of(name) for name in wanted})
    lines = [f'fresh: {", ".join(fresh)}'] if fresh else []
    if lacking:
        lines.append(f'dropped: {", ".join(lacking)}, which this network lacks')
    return needed, lines


def _check_options(source: Source, config: ConfigDict, parts: set[str]) -> None:
    """Raises UserError, with the flags to set, if an option of the loaded parts differs."""
    ignored = {key for part, keys in OPTIONS_OF_PART.items() if part not in parts for key in keys}
    found, flat = dict(source.options), flatten(config)
    for values in (found, flat):
        if values.get('model.dilation') == 'contract_first' and found.get('model.depth', 50) >= 50:
            values['model.dilation'] = 'contract'  # the same for bottlenecks
    differing = {
        key: value for key, value in found.items() if key not in ignored and flat.get(key) != value
    }
    if differing:
        flags = ' '.join(f'--config.{key}={_quoted(value)}' for key, value in differing.items())
        raise UserError(
            f'{source.label} is of another network: set {flags} (or another source of weights)'
        )


def _quoted(value: Any) -> str:
    return f"'{value}'" if isinstance(value, tuple) else as_text(value)  # as the shell needs it


def _check_arrays(source: Source, needed: dict[str, Any], left: list[str]) -> None:
    """Raises one UserError for all arrays that are missing, left over or of another shape."""
    shapes = {name: tuple(array.shape) for name, array in source.arrays.items()}
    missing = sorted(needed.keys() - shapes.keys())
    reshaped = [name for name in needed.keys() - set(missing) if shapes[name] != needed[name].shape]
    reshaped.sort()
    differences = {
        'missing': missing,
        'left over': left,
        'of another shape': [
            f'{name} {list(shapes[name])}, not {list(needed[name].shape)}' for name in reshaped
        ],
    }
    texts = [f'{kind}: {_shortened(names)}' for kind, names in differences.items() if names]
    if not texts:
        return
    if missing or left or any(part_of(name) == 'backbone' for name in reshaped):
        hint = 'Set the keys of --config.model to its network, or skip parts by --config.init_skip'
    else:
        hint = _hint({name: shapes[name] for name in reshaped})
    raise UserError(f'{source.label} does not fit the configuration: {"; ".join(texts)}. {hint}')


def _hint(reshaped: dict[str, tuple[int, ...]]) -> str:
    """Why heads have other shapes in the source, and the `init_skip` that starts them fresh."""
    classes = [shape[-1] for name, shape in reshaped.items() if '/classifier/' in name]
    parts = sorted({part_of(name) for name in reshaped if '/classifier/' not in name})
    reasons = [f'is for {classes[0]} classes'] if classes else []
    if parts:
        reasons.append(f'has other inputs to its {" and ".join(parts)}')
    skip = ','.join([*parts, *(['classifier'] if classes else [])])
    return (
        f'It {" and ".join(reasons)}: to go on from it, start what differs from fresh values by '
        f'--config.init_skip={skip}'
    )


def _shortened(texts: Sequence[str], most: int = 4) -> str:
    more = f' and {len(texts) - most} more' if len(texts) > most else ''
    return ', '.join(texts[:most]) + more
