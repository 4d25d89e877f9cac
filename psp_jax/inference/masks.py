"""The network on padded images, so that images of many sizes share one program.

Each image lies at the top left of its array. BatchNorm and biases make the padding non-zero; it is
set back to zero before each module that looks beyond its own cell. So every image gets the logits
that it would get alone. The network's own code does not change: flax's `intercept_methods` changes
the inputs of its modules.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from psp_jax.model.geometry import STRIDE, Size
from psp_jax.model.layers import reach_of
from psp_jax.model.resample import zero_filler


def apply_to_padded(
    model: nn.Module, variables: Any, images: jax.Array, sizes: jax.Array
) -> jax.Array:
    """Logits [B, ceil(H/8), ceil(W/8), classes] of images [B, H, W, 3], in test mode.

    sizes: int32 [B, 2], the true (height, width) of each. The logits of an image's own
    ceil(height/8) x ceil(width/8) cells do not depend on H and W; the others are meaningless.
    Modules with a `reach` see zeros in the padding. Modules with `takes_cells`, such as the
    pyramid, get the true (height, width) of each map as the keyword `cells`, int32 [B, 2].
    """
    padded = images.shape[1], images.shape[2]

    def mask(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != '__call__':
            return call(*args, **kwargs)
        reach, takes_cells = reach_of(context.module), getattr(context.module, 'takes_cells', False)
        # A map of another size than the image's at some stride is a pooled one, without padding.
        stride = stride_of(args[0].shape, padded) if reach or takes_cells else None
        if stride:
            cells = -(-sizes // stride)
            args = (zero_filler(args[0], cells), *args[1:]) if reach else args
            kwargs = {**kwargs, 'cells': cells} if takes_cells else kwargs
        return call(*args, **kwargs)

    with nn.intercept_methods(mask):
        return model.apply(variables, images, False)[0]


def stride_of(shape: tuple[int, ...], padded: Size) -> int | None:
    """Pixels of an image to a cell of a map [B, h, w, C]: 1, 2, 4 or 8, or None if it is none."""
    for stride in (2**i for i in range(STRIDE.bit_length())):
        if shape[1:3] == (-(-padded[0] // stride), -(-padded[1] // stride)):
            return stride
    return None
