"""PSPNet: dilated ResNet, pyramid pooling, the head and, in training, the auxiliary head."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from psp_jax.data.labels import label_space
from psp_jax.model.layers import BatchNorm, Conv, fan_in_uniform, strided
from psp_jax.model.pyramid_pooling import PyramidPooling
from psp_jax.model.resnet import ResNet


class Head(nn.Module):
    """[B, h, w, C] -> class scores [B, h, w, classes]: 3x3, BN, ReLU, dropout, 1x1 with bias."""

    width: int
    classes: int
    dropout: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, cells: jax.Array | None = None) -> jax.Array:
        kinds = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
        x = Conv(self.width, 3, kernel_init=fan_in_uniform, name='conv', **kinds)(x, cells)
        x = nn.relu(BatchNorm(name='bn', **kinds)(x, train))
        # Whole channels drop, as the reference's Dropout2d: neighbouring cells are too alike.
        x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
        # The scores are exact even where features are bfloat16.
        kinds['dtype'] = self.param_dtype
        classifier = Conv(
            self.classes, 1, bias=True, kernel_init=fan_in_uniform, name='classifier', **kinds
        )
        return classifier(x)


class PSPNet(nn.Module):
    """Pyramid scene parsing network (Zhao et al. 2017).

    `__call__(images, train)` takes normalised images [B, H, W, 3] and gives `(logits, aux_logits)`
    at 1/8 of the resolution, [B, ceil(H/8), ceil(W/8), classes]; `aux_logits`, from layer3 (the
    paper's fourth stage), is None outside training or with `aux_width=0`. `bins=()` leaves the
    pyramid out: the paper's dilated FCN baseline. Training needs the random stream 'dropout' and
    the mutable collection 'batch_stats'.

    `sizes` int32[B, 2], for test mode: the true (height, width) of each image, which lies at the
    top left of its H x W. The logits of its own ceil(h/8) x ceil(w/8) cells are those that it
    would have alone, whatever lies beyond; so images of many sizes share one program.
    """

    classes: int
    depth: int = 50
    stem: str = 'deep'
    dilation: str = 'full'
    bins: tuple[int, ...] = (1, 2, 3, 6)
    pool: str = 'average'
    reduce: bool = True
    head_width: int = 512
    aux_width: int = 256
    dropout: float = 0.1
    align_corners: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool, sizes: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        kinds = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
        backbone = ResNet(self.depth, self.stem, self.dilation, name='backbone', **kinds)
        layer3, x = backbone(images, train, sizes)
        cells = strided(sizes, 8)
        if self.bins:
            pyramid = PyramidPooling(
                self.bins, self.pool, self.reduce, self.align_corners, name='pyramid', **kinds
            )
            x = pyramid(x, train, cells)
        head = Head(self.head_width, self.classes, self.dropout, name='head', **kinds)
        logits = head(x, train, cells)
        if not train or not self.aux_width:
            return logits, None
        aux_head = Head(self.aux_width, self.classes, self.dropout, name='aux_head', **kinds)
        return logits, aux_head(layer3, train)


def build(config: ConfigDict) -> PSPNet:
    """The network of a configuration. Parameters are float32, or float64 if `dtype` is."""
    dtype = jnp.dtype(config.dtype)
    model = config.model
    return PSPNet(
        classes=len(label_space(config.data.classes).names),
        depth=model.depth,
        stem=model.stem,
        dilation=model.dilation,
        bins=tuple(model.bins),
        pool=model.pool,
        reduce=model.reduce,
        head_width=model.head_width,
        aux_width=model.aux_width if config.loss.aux_weight else 0,
        dropout=model.dropout,
        align_corners=model.align_corners,
        dtype=dtype,
        param_dtype=jnp.promote_types(dtype, jnp.float32),
    )


def normalise(images: jax.Array, config: ConfigDict) -> jax.Array:
    """uint8 [B, H, W, 3] -> (images - mean) / std per channel, in the parameters' precision."""
    exact = jnp.promote_types(config.dtype, jnp.float32)
    mean, std = (jnp.asarray(v, exact) for v in (config.data.mean, config.data.std))
    return (images.astype(exact) - mean) / std
