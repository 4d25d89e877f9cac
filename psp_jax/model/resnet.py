"""Dilated ResNets at output stride 8: the backbone of PSPNet (paper section 3.2, figure 3).

Names within a block are those of the reference: conv1-bn1, conv2-bn2, (conv3-bn3), downsample.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from psp_jax.model.layers import BatchNorm, Conv, MaxPool

BLOCKS = {  # blocks of layer1 to layer4
    10: (1, 1, 1, 1),  # not in the paper: for first tries and tests
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    269: (3, 30, 48, 8),
}
STEMS = {  # kernel size and width of each convolution; the first has stride 2
    'deep': ((3, 64), (3, 64), (3, 128)),
    'deep_small': ((3, 32), (3, 32), (3, 64)),
    'conv7': ((7, 64),),
}
DILATIONS = {  # of the first and of the other blocks of layer3, then of layer4
    'full': ((2, 2), (4, 4)),
    'contract': ((1, 2), (2, 4)),
    'contract_first': ((1, 2), (2, 4)),  # and within basic blocks only the first 3x3 dilates
}


def is_basic(depth: int) -> bool:
    """Whether the blocks are two 3x3 convolutions; deeper networks have bottlenecks."""
    return depth < 50


class Block(nn.Module):
    """A residual block: basic (3x3, 3x3) or bottleneck (1x1, 3x3, 1x1 to 4 times the width).

    The first 3x3 has the stride; a bottleneck has only one 3x3. With `dilate_all` every 3x3
    dilates, otherwise only the first.
    """

    width: int
    basic: bool
    stride: int = 1
    dilation: int = 1
    dilate_all: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(Conv, dtype=self.dtype, param_dtype=self.param_dtype)
        norm = partial(BatchNorm, dtype=self.dtype, param_dtype=self.param_dtype)
        # (features, kernel size, stride, dilation) of each convolution
        if self.basic:
            second = self.dilation if self.dilate_all else 1
            plan = [(self.width, 3, self.stride, self.dilation), (self.width, 3, 1, second)]
        else:
            plan = [
                (self.width, 1, 1, 1),
                (self.width, 3, self.stride, self.dilation),
                (4 * self.width, 1, 1, 1),
            ]
        features = plan[-1][0]
        shortcut = x
        if self.stride != 1 or x.shape[-1] != features:
            shortcut = conv(features, 1, self.stride, name='downsample_conv')(x)
            shortcut = norm(name='downsample_bn')(shortcut, train)
        for i, arguments in enumerate(plan, 1):
            x = norm(name=f'bn{i}')(conv(*arguments, name=f'conv{i}')(x), train)
            x = nn.relu(x + shortcut if i == len(plan) else x)
        return x


class ResNet(nn.Module):
    """[B, H, W, 3] -> the outputs of layer3 and layer4, each [B, ceil(H/8), ceil(W/8), C].

    C is 256 and 512 for basic blocks, 1024 and 2048 for bottlenecks.
    """

    depth: int
    stem: str
    dilation: str
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        kinds = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
        for i, (size, width) in enumerate(STEMS[self.stem], 1):
            stride = 2 if i == 1 else 1
            x = Conv(width, size, stride, name=f'stem_conv{i}', **kinds)(x)
            x = nn.relu(BatchNorm(name=f'stem_bn{i}', **kinds)(x, train))
        x = MaxPool()(x)

        dilations = ((1, 1), (1, 1), *DILATIONS[self.dilation])
        features = []
        for layer, (blocks, (first, rest)) in enumerate(
            zip(BLOCKS[self.depth], dilations, strict=True), 1
        ):
            for block in range(blocks):
                stride = 2 if layer == 2 and block == 0 else 1
                x = Block(
                    width=32 * 2**layer,
                    basic=is_basic(self.depth),
                    stride=stride,
                    dilation=first if block == 0 else rest,
                    dilate_all=self.dilation != 'contract_first',
                    name=f'layer{layer}_block{block}',
                    **kinds,
                )(x, train)
            features.append(x)
        return features[2], features[3]
