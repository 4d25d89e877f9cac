"""Small networks for the tests."""

from typing import Any

from ml_collections import ConfigDict

from psp_jax.config_check import resolve
from psp_jax.state import Setup, setup

SMALL = {
    'data.classes': '3',
    'data.crop': 33,
    'batch_size': 2,
    'model.depth': 10,
    'model.stem': 'deep_small',
    'model.head_width': 8,
    'model.aux_width': 8,
}


def small_config(**groups: Any) -> ConfigDict:
    """PSPNet-10 with narrow heads and 3 classes; small_config(model={'pool': 'max'}, seed=3)."""
    values = dict(SMALL)
    for name, value in groups.items():
        inner = value if isinstance(value, dict) else {}
        values |= {f'{name}.{key}': v for key, v in inner.items()} or {name: value}
    return resolve(values)


def small_setup(**groups: Any) -> Setup:
    return setup(small_config(**groups))
