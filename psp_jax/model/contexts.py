"""The context modules, between backbone and head, that `model.context` can name.

To add one, add an entry to CONTEXTS. Its parameters get the entry's name.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from psp_jax.model.pyramid_pooling import PyramidPooling


def pyramid(model: ConfigDict, **kinds: Any) -> nn.Module:
    """PSPNet's pyramid pooling module (paper section 3.2)."""
    return PyramidPooling(tuple(model.bins), model.pool, model.reduce, model.align_corners, **kinds)


def no_context(model: ConfigDict, **kinds: Any) -> None:
    """The head sees the backbone's features: the dilated FCN that the paper calls the baseline."""


# (config.model, name, dtype, param_dtype) -> a module whose `__call__(features, train)` maps
# [B, h, w, C] to [B, h, w, any number of channels], or None.
CONTEXTS: dict[str, Callable[..., nn.Module | None]] = {'pyramid': pyramid, 'none': no_context}
