"""The pyramid pooling module (paper section 3.2): context from regions of several sizes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from psp_jax.model.layers import BatchNorm, Conv
from psp_jax.model.resample import average_pool, max_pool, resize

POOLS = {'average': average_pool, 'max': max_pool}


class PyramidPooling(nn.Module):
    """[B, H, W, C] -> the input and then the context of every level, in the order of `bins`.

    Level b pools the whole map to b x b cells, reduces them to C / N channels (N levels; 1x1
    convolution, BN, ReLU) unless `reduce` is off, and is up-sampled to H x W. Output channels:
    2C with reduction (C divisible by N), (1 + N)C without.

    `cells` int32[B, 2], if given: the (rows, columns) that each map fills, from the top left on.
    """

    bins: tuple[int, ...]
    pool: str
    reduce: bool
    align_corners: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    takes_cells = True  # inference/masks.py passes them for padded images

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, cells: jax.Array | None = None) -> jax.Array:
        kinds = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
        _, height, width, channels = x.shape
        levels = [x]
        for i, bins in enumerate(self.bins):
            y = POOLS[self.pool](x, bins, cells)
            if self.reduce:
                y = Conv(channels // len(self.bins), 1, name=f'level{i}_conv', **kinds)(y)
                y = nn.relu(BatchNorm(name=f'level{i}_bn', **kinds)(y, train))
            levels.append(resize(y, (height, width), self.align_corners, cells))
        return jnp.concatenate(levels, axis=-1)
