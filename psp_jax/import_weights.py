"""Weights of other code bases -> this network, and a checkpoint of them.

    python -m psp_jax.import_weights SOURCE [SOURCE2] --config configs/X.py --output DIR

A source is a `.pth`, `.pt` or `.safetensors` file, `hf://OWNER/NAME[/FILE]`, or a checkpoint of
psp_jax: a working directory (its newest checkpoint) or a checkpoint's own path. The names in it say
which format it is (weight_formats.py). Every array of it is used or on the format's list of what to
drop, and every parameter of the network is filled, or the import fails and says what is wrong.
"""

import os
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from psp_jax.command_line import Parser, exit_code, quieten_libraries, split_overrides
from psp_jax.config import flatten, to_json
from psp_jax.config_check import load_config
from psp_jax.config_values import as_text
from psp_jax.errors import UserError
from psp_jax.weights.files import Arrays, is_checkpoint, read_file
from psp_jax.weights.formats import COUNTERS, FORMATS, LEAVES, OURS, Format

HEADS = ('pyramid', 'head', 'aux_head')  # what a backbone's weights leave fresh


class Weights(NamedTuple):
    """What a source holds for a network: arrays by our names ('params/head/conv/kernel')."""

    arrays: Arrays
    report: list[str]  # lines for people: what was loaded from where, and what was not


def load(source: str, config: ConfigDict, wanted: dict[str, Any]) -> Weights:
    """The weights in `source` (two with a comma) for the arrays `wanted` (by name: shape, dtype).

    What `config.init_skip` matches, and heads that the source has none of, are left out. Raises
    UserError where the source cannot be read, or does not fit.
    """
    parts = [part.strip() for part in source.split(',') if part.strip()]
    patterns = _patterns(config.init_skip, wanted)
    skipped = {name for name in wanted if _matches(patterns, name)}
    if len(parts) == 1 and is_checkpoint(parts[0]):
        return _from_checkpoint(parts[0], config, wanted, skipped)
    tensors: Arrays = {}
    stated: dict[str, Any] = {}
    for part in parts:
        read, options = read_file(part)
        both = sorted(tensors.keys() & read.keys())
        if both:
            raise UserError(f'{part}: holds {both[0]} like the file before it; give one of them')
        tensors |= read
        stated |= as_options(options)
    return _from_tensors(source, tensors, stated, config, wanted, skipped)


def as_options(values: dict[str, Any]) -> dict[str, Any]:
    """What of a flat configuration, as JSON has it, decides about the function of the weights."""
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
        if key.startswith('model.') and key != 'model.dropout'
    }


# ---- Names and shapes


def semseg_name(ours: str) -> str:
    """'params/head/conv/kernel' -> 'cls.0.weight'."""
    _, _, path = ours.partition('/')
    module, _, leaf = path.rpartition('/')
    for pattern, name in OURS:
        match = re.fullmatch(pattern, module)
        if match:
            return f'{match.expand(name)}.{LEAVES[leaf]}'
    raise KeyError(ours)


def to_torch(array: np.ndarray) -> np.ndarray:
    """A kernel [H, W, in, out] as PyTorch's [out, in, H, W]; others as they are."""
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else array


def to_ours(array: np.ndarray) -> np.ndarray:
    """PyTorch's kernel [out, in, H, W] as [H, W, in, out]; others as they are."""
    return np.ascontiguousarray(array.transpose(2, 3, 1, 0)) if array.ndim == 4 else array


def recognise(names: Sequence[str]) -> Format | None:
    """The first format all of whose marks are among the names."""
    for format in FORMATS:
        if all(any(re.match(mark, name) for name in names) for mark in format.marks):
            return format
    return None


def architecture(tensors: Arrays, format: Format, stated: dict[str, Any]) -> dict[str, Any]:
    """The keys of the configuration on which weights depend: by shapes, format, and own word."""
    from psp_jax.model.resnet import BLOCKS, STEMS, is_basic

    kernels = {name: array for name, array in tensors.items() if array.ndim == 4}
    found: dict[str, Any] = {}
    blocks = [
        len({n.split('.')[1] for n in kernels if n.startswith(f'layer{i}.')}) for i in (1, 2, 3, 4)
    ]
    basic = 'layer1.0.conv3.weight' not in kernels
    for depth, counts in BLOCKS.items():
        if list(counts) == blocks and is_basic(depth) == basic:
            found['model.depth'] = depth
    convs = [f'layer0.{i}.weight' for i in (0, 3, 6) if f'layer0.{i}.weight' in kernels]
    stem = tuple((kernels[name].shape[-1], kernels[name].shape[0]) for name in convs)
    for name, layers in STEMS.items():
        if layers == stem:
            found['model.stem'] = name
    if format.complete:
        widths = {'model.head_width': 'cls.0.weight', 'model.aux_width': 'aux.0.weight'}
        found |= {key: len(kernels[name]) for key, name in widths.items() if name in kernels}
        found |= format.needs | stated
    return found


def _check_network(
    source: str, found: dict[str, Any], config: ConfigDict, wanted: dict[str, Any], fresh: set[str]
) -> None:
    """Raises UserError with the flags to set if `found` is of another network than `config`."""
    of_part = {
        'head': ('model.head_width',),
        'aux_head': ('model.aux_width',),
        'pyramid': ('model.bins', 'model.pool', 'model.reduce'),
    }
    found, flat = dict(found), flatten(config)
    for part, keys in of_part.items():
        names = {name for name in wanted if name.split('/')[1] == part}
        if names <= fresh and (names or part == 'aux_head'):  # nothing of it is loaded
            for key in keys:
                found.pop(key, None)
    for values in (found, flat):
        if values.get('model.dilation') == 'contract_first' and found.get('model.depth', 50) >= 50:
            values['model.dilation'] = 'contract'  # the same for bottlenecks
    differing = {key: value for key, value in found.items() if flat[key] != value}
    if differing:
        flags = ' '.join(f'--config.{key}={_quoted(value)}' for key, value in differing.items())
        raise UserError(
            f'{source} is of another network: set {flags} (or another source of weights)'
        )


def _quoted(value: Any) -> str:
    """As the shell takes it."""
    return f"'{value}'" if isinstance(value, tuple) else as_text(value)


def _patterns(skip: str, wanted: dict[str, Any]) -> list[re.Pattern[str]]:
    patterns = []
    for text in filter(None, (part.strip() for part in skip.split(','))):
        try:
            patterns.append(re.compile(text))
        except re.error as error:
            raise UserError(f'init_skip: {text!r} is not a pattern ({error})') from error
        if not any(_matches(patterns[-1:], name) for name in wanted):
            raise UserError(f"init_skip: {text!r} matches no parameter's name")
    return patterns


def _matches(patterns: Sequence[re.Pattern[str]], name: str) -> bool:
    name = name.partition('/')[2]  # without params/ or batch_stats/
    return any(pattern.search(name) for pattern in patterns)


def _shown(texts: Sequence[str], most: int = 4) -> str:
    more = f' and {len(texts) - most} more' if len(texts) > most else ''
    return ', '.join(texts[:most]) + more


# ---- Fitting


def _from_tensors(
    source: str,
    tensors: Arrays,
    stated: dict[str, Any],
    config: ConfigDict,
    wanted: dict[str, Any],
    skipped: set[str],
) -> Weights:
    names = [name.removeprefix('module.') for name in tensors]
    format = recognise(names)
    if format is None:
        raise UserError(
            f'{source}: its names ({_shown(sorted(names), 3)}) are of no known format; there are: '
            + ', '.join(f.name for f in FORMATS)
        )

    # ---- Rename
    dropped: list[str] = []
    renamed: Arrays = {}
    for name, array in zip(names, tensors.values(), strict=True):
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
    ours = {semseg_name(name): name for name in wanted}

    # ---- What is not loaded on purpose
    absent = set(HEADS) if not format.complete else set()
    if not any(name.startswith('aux.') for name in renamed):
        absent.add('aux_head')
    fresh = skipped | {name for name in wanted if name.split('/')[1] in absent}
    if config.loss.aux_weight == 0:  # the file's auxiliary head is of no use
        unused = [name for name in renamed if name.startswith('aux.')]
        dropped += unused
        for name in unused:
            del renamed[name]

    label = f'{source} ({format.name})'
    _check_network(label, architecture(renamed, format, stated), config, wanted, fresh)
    given = {ours[name]: to_ours(array) for name, array in renamed.items() if name in ours}
    left = sorted(renamed.keys() - ours.keys())
    needed = _fitting(label, given, wanted, fresh, left)
    arrays = {name: given[name].astype(leaf.dtype) for name, leaf in needed.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f'{source}: {name} holds values that are not finite')
    line = f'{len(arrays)} arrays from {source} ({format.name}), {len(dropped)} dropped by rule'
    return Weights(arrays, [line, *_fresh_lines(wanted, fresh)])


def _from_checkpoint(
    source: str, config: ConfigDict, wanted: dict[str, Any], skipped: set[str]
) -> Weights:
    from psp_jax.runtime import checkpoint

    path, step = checkpoint.find_in(source)
    saved = checkpoint.config_of(path, step)
    given = checkpoint.shapes(path, step, ('params', 'batch_stats'))
    fresh = set(skipped)
    if not any('/aux_head/' in name for name in given):
        fresh |= {name for name in wanted if '/aux_head/' in name}
    left = sorted(name for name in given if name not in wanted and '/aux_head/' not in name)
    label = str(path / str(step))
    _check_network(label, as_options(flatten(saved)), config, wanted, fresh)
    needed = _fitting(label, given, wanted, fresh, left)
    arrays = checkpoint.read_arrays(path, step, needed)
    line = f'{len(arrays)} arrays from {label}'
    return Weights(arrays, [line, *_fresh_lines(wanted, fresh)])


def _fitting(
    source: str,
    given: dict[str, Any],
    wanted: dict[str, Any],
    fresh: set[str],
    left: list[str],
) -> dict[str, Any]:
    """`wanted` without what stays fresh; all of it is in `given`, with its shape.

    Raises one UserError for all that is missing, left over or of another shape.
    """
    needed = {name: leaf for name, leaf in wanted.items() if name not in fresh}
    missing = sorted(needed.keys() - given.keys())
    reshaped = [
        f'{name} {list(given[name].shape)}, not {list(leaf.shape)}'
        for name, leaf in needed.items()
        if name in given and tuple(given[name].shape) != tuple(leaf.shape)
    ]
    kinds = {'missing': missing, 'left over': left, 'of another shape': reshaped}
    texts = [f'{kind}: {_shown(names)}' for kind, names in kinds.items() if names]
    if not texts:
        return needed
    hint = ''
    if not (missing or left) and all('/classifier/' in text for text in reshaped):
        classes = given[reshaped[0].split(' ')[0]].shape[-1]
        hint = (
            f'. It is for {classes} classes: to go on from it with others, leave the last layers '
            'fresh by --config.init_skip=classifier'
        )
    raise UserError(f'{source} does not fit the configuration: {"; ".join(texts)}{hint}')


def _fresh_lines(wanted: dict[str, Any], fresh: set[str]) -> list[str]:
    """Which modules keep their fresh values: whole parts by their name, others one by one."""
    if not fresh:
        return []
    modules = {name.partition('/')[2].rpartition('/')[0] for name in fresh}
    loaded = {name.split('/')[1] for name in wanted.keys() - fresh}
    shown = sorted({m if m.split('/')[0] in loaded else m.split('/')[0] for m in modules})
    return [f'fresh: {", ".join(shown)}']


# ---- The command line


def run(argv: Sequence[str]) -> None:
    """Does what the flags say; raises UserError for what is the user's to mend."""
    overrides, words = split_overrides(argv)
    parser = Parser(
        prog='python -m psp_jax.import_weights',
        description='Writes weights of semseg, mmsegmentation, CSAIL, torchvision or timm as a '
        'checkpoint that --mode eval takes, and training by --config.init_from=DIR.',
    )
    parser.add_argument(
        'sources',
        nargs='+',
        metavar='SOURCE',
        help='.pth, .pt, .safetensors or hf://OWNER/NAME[/FILE]; two for CSAIL (encoder, decoder)',
    )
    parser.add_argument('--config', required=True, metavar='FILE[:ARGS]', help='the network')
    parser.add_argument('--output', required=True, metavar='DIR', help='a folder to be made')
    flags = parser.parse_args(words)
    source = f'--config.init_from={",".join(flags.sources)}'
    config = load_config(flags.config, [*overrides, source])
    quieten_libraries()
    from psp_jax.runtime import checkpoint

    folder = checkpoint.directory(flags.output)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f'--output={flags.output}: holds checkpoints already; name another folder')
    variables, report = initial_variables(config)
    made = not os.path.exists(flags.output)
    try:
        checkpoint.save_variables(flags.output, variables, {'config': to_json(config)})
    except BaseException:
        shutil.rmtree(flags.output if made else str(folder), ignore_errors=True)
        raise
    print('\n'.join([*report, f'written to {folder / "0"}']))


def initial_variables(config: ConfigDict) -> tuple[dict[str, Any], list[str]]:
    """`params` and `batch_stats` from `config.init_from`, what it lacks fresh; and the report."""
    import jax

    from psp_jax.runtime.checkpoint import named_leaves
    from psp_jax.state import new_state, setup

    run = setup(config)
    wanted = named_leaves(run.variables)
    weights = load(config.init_from, config, wanted)

    @jax.jit
    def fresh() -> Arrays:
        leaves = named_leaves(new_state(run).variables)
        return {name: leaf for name, leaf in leaves.items() if name not in weights.arrays}

    values = weights.arrays if len(weights.arrays) == len(wanted) else weights.arrays | fresh()
    tree = jax.tree.unflatten(jax.tree.structure(run.variables), [values[n] for n in wanted])
    return tree, weights.report


def replace(variables: Any, arrays: Arrays) -> Any:
    """`variables` with the named arrays in place of its own, on the same devices."""
    import jax

    from psp_jax.runtime.checkpoint import named_leaves

    leaves = [
        jax.device_put(arrays[name], leaf.sharding) if name in arrays else leaf
        for name, leaf in named_leaves(variables).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(variables), leaves)


if __name__ == '__main__':
    sys.exit(exit_code(run))
