"""Values of the configuration: their types, and how the command line writes them."""

import ast
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from psp_jax.errors import UserError

T = TypeVar('T')
_KINDS = {
    bool: ('true or false', 'booleans'),
    int: ('an integer', 'integers'),
    float: ('a number', 'numbers'),
    str: ('text', 'texts'),
}


def choose(key: str, value: Any, table: Mapping[Any, T]) -> T:
    """table[value]; raises UserError that lists the legal values if `value` is not among them."""
    if value not in table:
        raise UserError(f'{key}={as_text(value)}: must be one of {", ".join(map(str, table))}')
    return table[value]


def typed(key: str, value: Any, default: Any) -> Any:
    """`value` in the type of `default` (an int may stand for a float), or a UserError."""
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
            value = (value,)  # users write a tuple of one as '(6)', which Python reads as a number
    return typed(key, value, default)


def as_text(value: Any) -> str:
    """As it is written on the command line; the empty text as ''."""
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` most like `name`, whole or by the part behind the last dot."""

    def likeness(other: str) -> float:
        pairs = ((name, other), (name.split('.')[-1], other.split('.')[-1]))
        return sum(difflib.SequenceMatcher(None, a, b).ratio() for a, b in pairs)

    return max(names, key=likeness)


def _is(value: Any, kind: type) -> bool:
    """As isinstance, but a bool is not a number, and an int counts as a float."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
