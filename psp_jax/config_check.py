"""Which types and values the keys of a configuration may have."""

import ast
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from psp_jax.errors import UserError

T = TypeVar('T')


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
    choose('data.source', kind, dict.fromkeys(('list', 'dirs', 'tfds', 'scenes')))
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
            f'init_skip={flat["init_skip"]}: is about what init_from loads; set init_from too'
        )
    if flat['batch_size'] == 1 and flat['model.reduce'] and 1 in flat['model.bins']:
        raise UserError(
            'batch_size=1: batch normalisation of the 1 x 1 pyramid level would see one value a '
            'channel; take 2 images or more, or bins without 1'
        )


_CHOICES: dict[str, tuple[str | int, ...]] = {
    'dtype': ('float32', 'bfloat16', 'float64'),
    'model.depth': (18, 34, 50, 101, 152, 269),
    'model.stem': ('deep', 'deep_small', 'conv7'),
    'model.dilation': ('full', 'contract', 'contract_first'),
    'model.pool': ('average', 'max'),
    'eval.protocol': ('whole', 'semseg', 'caffe', 'mmseg', 'mmseg_slide'),
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
    ('eval.multiple', 'a positive multiple of 8', lambda value: value > 0 and value % 8 == 0),
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
        if side >= 9 and side % 8 == 1 or not align_corners and side >= 8 and side % 8 == 0:
            continue
        below = max(9, (side - 1) // 8 * 8 + 1)
        legal = f'{below} or {below + 8}' if below < side else f'{below}'
        if align_corners:
            raise UserError(
                f'data.crop={crop}: a crop must be 8n + 1 ({legal}), so that the '
                "network's stride of 8 meets both edges; "
                'model.align_corners=false allows multiples of 8 too'
            )
        raise UserError(
            f'data.crop={crop}: a crop must be divisible by 8, or 8n + 1 ({legal}), '
            "as the network's stride is 8"
        )


def choose(key: str, value: Any, table: Mapping[Any, T]) -> T:
    """table[value]; raises UserError that lists the legal values if there is none."""
    if value not in table:
        raise UserError(f'{key}={as_text(value)}: must be one of {", ".join(map(str, table))}')
    return table[value]


def typed(key: str, value: Any, default: Any) -> Any:
    """`value` in the type of `default` (int for float is welcome), or a UserError."""
    if key == 'data.crop':
        if (
            _is(value, int)
            or _is(value, tuple)
            and len(value) == 2
            and all(_is(side, int) for side in value)
        ):
            return value
        expected = 'an integer or (height, width)'
    elif isinstance(default, tuple):
        kind = type(default[0])
        if _is(value, tuple) and all(_is(item, kind) for item in value):
            return tuple(kind(item) for item in value)
        expected = f'a tuple of {_KINDS[kind][1]}, such as {as_text(default)}'
    else:
        if _is(value, type(default)):
            return type(default)(value)
        expected = _KINDS[type(default)][0]
    raise UserError(
        f'{key}={as_text(value)}: expected {expected}, got {value!r} ({type(value).__name__})'
    )


_KINDS = {
    bool: ('true or false', 'booleans'),
    int: ('an integer', 'integers'),
    float: ('a number', 'numbers'),
    str: ('text', 'texts'),
}


def _is(value: Any, kind: type) -> bool:
    """isinstance, but a bool is no number, and an int is a float."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def parsed(key: str, text: str, default: Any) -> Any:
    """The value that command-line text stands for, in the type of `default`, or a UserError."""
    value: Any = text
    if isinstance(default, bool):
        value = {'true': True, 'false': False}.get(text.lower(), text)
    elif not isinstance(default, str):
        try:
            value = float(text) if isinstance(default, float) else ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = text
        if isinstance(default, tuple) and isinstance(value, (int, float)):
            value = (value,)  # a tuple of one is '(6)' to anyone but Python
    return typed(key, value, default)


def as_text(value: Any) -> str:
    """As it is written on the command line; the empty text as ''."""
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"
