"""A configuration from its file, its flags or its JSON, checked key by key.

Legal names are read from the tables themselves, so that a new entry is legal at once.
"""

import fnmatch
import importlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from psp_jax.config import default_config, flatten
from psp_jax.config_values import as_text, choose, nearest, parsed, typed
from psp_jax.data.sources import SOURCES
from psp_jax.errors import UserError
from psp_jax.inference.protocols import PROTOCOLS
from psp_jax.losses import LOSSES
from psp_jax.model.backbones import BACKBONES
from psp_jax.model.contexts import CONTEXTS
from psp_jax.model.geometry import STRIDE
from psp_jax.model.pyramid_pooling import POOLS
from psp_jax.model.resnet import BLOCKS, DILATIONS, STEMS
from psp_jax.optimizer import OPTIMIZERS

# Keys that a resumed run may change, because none of them affects the parameters. `total_steps` is
# not among them: the decay of the learning rate depends on it.
FREE_ON_RESUME = (
    'custom_imports',
    'log_every',
    'hang_seconds',
    'eval_every',
    'checkpoint_every',
    'checkpoint_keep',
    'optimizer.recipe_batch_size',
    'eval.*',
    'mesh.*',
    'data.root',
    'data.threads',
    'data.on_error',
    'data.val',
    'data.test',
)


def load_config(path_with_args: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The checked configuration of `configs/X.py[:arg=value,...]` and `--config.key=value` flags.

    Raises UserError for a missing file, an unknown argument or key, and a wrong or illegal value.
    """
    path, arg = split_path(path_with_args)
    if not os.path.isfile(path):
        raise UserError(f'--config={path}: there is no such file')
    spec = importlib.util.spec_from_file_location('psp_jax_user_config', path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        line = getattr(error, 'lineno', None)
        where = f'{path}, line {line}' if line else path
        raise UserError(f'{where}: the config file cannot be loaded ({error})') from error
    if not hasattr(module, 'get_config'):
        raise UserError(f"{path}: defines no function get_config(arg: str = '')")
    try:
        made = module.get_config(arg)
    except (AttributeError, KeyError) as error:
        reason = ' '.join(str(error).replace('\\n', ' ').split())
        raise UserError(f'{path}: reads a key that does not exist ({reason})') from error
    if not isinstance(made, ConfigDict):
        raise UserError(f'{path}: get_config returned {type(made).__name__}, not a ConfigDict')
    return resolve(flatten(made), overrides, where=f'{path}: ')


def resolve(
    values: Mapping[str, Any], overrides: Iterable[str] = (), where: str = ''
) -> ConfigDict:
    """The checked configuration of flat `values` ('data.crop': 473), defaults and overrides.

    Raises UserError for an unknown key, a wrong type or an illegal value; the message of the first
    two begins with `where` if it is about `values`.
    """
    config = default_config().lock()
    for key, value in values.items():
        try:
            _assign(config, key, value)
        except UserError as error:
            raise UserError(f'{where}{error}') from error
    apply_overrides(config, overrides)
    import_custom(config)
    check_values(flatten(config))
    return config


def import_custom(config: ConfigDict) -> None:
    """Imports the modules of config.custom_imports, which add entries to the tables.

    Raises UserError if there is no such module.
    """
    for name in filter(None, map(str.strip, config.custom_imports.split(','))):
        try:
            importlib.import_module(name)
        except (ImportError, SyntaxError, TypeError) as error:
            raise UserError(
                f'custom_imports={config.custom_imports}: cannot import {name} ({error}); name '
                'modules of the current folder or of PYTHONPATH'
            ) from error


def from_json(text: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The configuration in the text of to_json; keys that are not there get their defaults."""
    return resolve(
        {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in json.loads(text).items()
        },
        overrides,
    )


def split_path(path_with_args: str) -> tuple[str, str]:
    """'configs/ade20k.py:depth=101' -> ('configs/ade20k.py', 'depth=101')."""
    match = re.fullmatch(r'(.+?\.py)(?::(.*))?', path_with_args)
    if not match:
        raise UserError(
            f'--config={path_with_args}: expected a Python file and, after a colon, '
            'its arguments, as in configs/ade20k.py:depth=101'
        )
    return match[1], match[2] or ''


def config_name(path_with_args: str) -> str:
    """'configs/ade20k.py:depth=101' -> 'ade20k'."""
    return os.path.splitext(os.path.basename(split_path(path_with_args)[0]))[0]


def apply_overrides(config: ConfigDict, overrides: Iterable[str]) -> None:
    """Sets `--config.key=value` or `--config.key`, `value` in place, typed as the defaults are.

    Raises UserError for an unknown key, a missing value and a value of another type.
    """
    words = iter(overrides)
    for word in words:
        key, equals, text = word.partition('=')
        key = key.removeprefix('--config.')
        if not equals:
            text = next(words, '--')
            if text.startswith('--'):
                raise UserError(f'--config.{key} needs a value, as in --config.{key}=VALUE')
        _assign(config, key, parsed(key, text, _default(key)))


def resume_differences(saved: ConfigDict, current: ConfigDict) -> list[str]:
    """'key: old in the checkpoint, new now' for keys that differ and are not FREE_ON_RESUME."""
    before, now = flatten(saved), flatten(current)
    return [
        f'{key}: {as_text(before[key])} in the checkpoint, {as_text(value)} now'
        for key, value in now.items()
        if before[key] != value
        and not any(fnmatch.fnmatchcase(key, pattern) for pattern in FREE_ON_RESUME)
    ]


def check_values(flat: Mapping[str, Any]) -> None:
    """Raises UserError naming the first key of a flat configuration whose value is not legal."""
    for key, choices in _CHOICES.items():
        choose(key, flat[key], dict.fromkeys(choices))
    for key, value in flat.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f'{key}={as_text(value)}: must be finite')
    for keys, meaning, legal in _RANGES:
        for key in keys.split():
            if not legal(flat[key]):
                raise UserError(f'{key}={as_text(flat[key])}: must be {meaning}')
    kind, _, name = flat['data.source'].partition(':')  # after the colon is a folder or a name
    choose('data.source', kind, SOURCES)
    if kind == 'tfds' and not name or kind == 'scenes' and name:
        raise UserError(
            f'data.source={flat["data.source"]}: must be list, dirs, scenes or tfds:NAME, such as '
            'tfds:ade20k'
        )
    if not flat['data.classes']:
        raise UserError(
            "data.classes='': must be set, to the name of a label space (cityscapes), "
            'to comma-separated class names or to a number of classes'
        )
    if flat['optimizer.warmup_steps'] >= flat['total_steps']:
        raise UserError(
            f'optimizer.warmup_steps={flat["optimizer.warmup_steps"]}: must be less '
            f'than total_steps={flat["total_steps"]}'
        )
    _check_crop(flat['data.crop'], flat['model.align_corners'])
    if flat['init_skip'] and not flat['init_from']:
        raise UserError(
            f'init_skip={flat["init_skip"]}: has no effect without init_from; set init_from too'
        )
    pyramid = flat['model.context'] == 'pyramid' and flat['model.reduce']
    if pyramid and flat['batch_size'] == 1 and 1 in flat['model.bins']:
        raise UserError(
            'batch_size=1: batch normalisation of the 1 x 1 pyramid level would see one value a '
            'channel; take 2 images or more, or bins without 1'
        )


_CHOICES: dict[str, Iterable[Any]] = {
    'dtype': ('float32', 'bfloat16', 'float64'),
    'model.backbone': BACKBONES,
    'model.depth': BLOCKS,
    'model.stem': STEMS,
    'model.dilation': DILATIONS,
    'model.context': CONTEXTS,
    'model.pool': POOLS,
    'loss.name': LOSSES,
    'optimizer.name': OPTIMIZERS,
    'eval.protocol': PROTOCOLS,
    'eval.flip': ('auto', 'true', 'false'),
    'eval.split': ('train', 'val', 'test'),
    'data.on_error': ('stop', 'skip'),
}
_RANGES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    (
        'batch_size total_steps eval_every checkpoint_every checkpoint_keep log_every '
        'model.head_width model.aux_width optimizer.learning_rate optimizer.head_multiplier '
        'optimizer.recipe_batch_size eval.batch_size mesh.space',
        'positive',
        lambda value: value > 0,
    ),
    (
        'data.threads loss.aux_weight optimizer.power optimizer.weight_decay '
        'optimizer.warmup_steps eval.base_size eval.panels hang_seconds',
        '0 or more',
        lambda value: value >= 0,
    ),
    # the data order draws its random numbers from a 32-bit signed seed
    ('seed', '0 or more and less than 2 ** 31', lambda value: 0 <= value < 2**31),
    ('mesh.data', 'positive, or -1 for all devices', lambda value: value == -1 or value > 0),
    (
        'eval.multiple',
        f'a positive multiple of {STRIDE}',
        lambda value: value > 0 and value % STRIDE == 0,
    ),
    ('data.blur data.mirror', 'a probability, 0 to 1', lambda value: 0 <= value <= 1),
    ('model.dropout optimizer.momentum', '0 or more and less than 1', lambda value: 0 <= value < 1),
    ('data.rotate', 'from 0 to 180 degrees', lambda value: 0 <= value <= 180),
    (
        'data.scale',
        'two positive numbers, the lower first',
        lambda value: len(value) == 2 and 0 < value[0] <= value[1],
    ),
    (
        'eval.scales',
        'one positive number or more',
        lambda value: len(value) > 0 and min(value) > 0,
    ),
    (
        'data.mean',
        'three numbers, for R, G, B, of pixels in 0..255 (not 0..1)',
        lambda value: len(value) == 3 and 1 < max(value) <= 255 and min(value) >= 0,
    ),
    (
        'data.std',
        'three positive numbers, for R, G, B',
        lambda value: len(value) == 3 and min(value) > 0,
    ),
    ('model.bins', 'positive integers', lambda value: all(bins > 0 for bins in value)),
)


def _check_crop(crop: int | tuple[int, int], align_corners: bool) -> None:
    for side in crop if isinstance(crop, tuple) else (crop,):
        rest = side % STRIDE
        if side > STRIDE and rest == 1 or not align_corners and side >= STRIDE and rest == 0:
            continue
        below = max(STRIDE + 1, (side - 1) // STRIDE * STRIDE + 1)
        legal = f'{below} or {below + STRIDE}' if below < side else f'{below}'
        if align_corners:
            raise UserError(
                f'data.crop={crop}: a crop must be {STRIDE}n + 1 ({legal}), so that the '
                f"network's stride of {STRIDE} meets both edges; "
                f'model.align_corners=false allows multiples of {STRIDE} too'
            )
        raise UserError(
            f'data.crop={crop}: a crop must be divisible by {STRIDE}, or {STRIDE}n + 1 ({legal}), '
            f"as the network's stride is {STRIDE}"
        )


def _default(key: str) -> Any:
    """The key's default value, or the UserError that names the nearest key."""
    defaults = flatten(default_config())
    if key in defaults:
        return defaults[key]
    inside = [name for name in defaults if name.startswith(f'{key}.')]
    if inside:
        raise UserError(f'config key {key!r} is a group; its keys are {", ".join(inside)}')
    raise UserError(f'config key {key!r} is unknown; did you mean {nearest(key, defaults)!r}?')


def _assign(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a key by its dotted name after the check of name and type."""
    value = typed(key, value, _default(key))
    *groups, name = key.split('.')
    for group in groups:
        config = config[group]
    config[name] = value
