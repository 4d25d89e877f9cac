"""PSPNet: dilated ResNet, pyramid pooling, the head and, in training, the auxiliary head."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from psp_jax.data.labels import label_space
from psp_jax.model.backbones import BACKBONES
from psp_jax.model.contexts import CONTEXTS
from psp_jax.model.layers import BatchNorm, Conv, fan_in_uniform


class Head(nn.Module):
    """[B, h, w, C] -> logits [B, h, w, classes]: 3x3, BN, ReLU, dropout, 1x1 with bias."""

    width: int
    classes: int
    dropout: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        kinds = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
        x = Conv(self.width, 3, kernel_init=fan_in_uniform, name='conv', **kinds)(x)
        x = nn.relu(BatchNorm(name='bn', **kinds)(x, train))
        # Drops whole channels, as the reference's Dropout2d: neighbouring cells are too alike.
        x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
        # The logits are float32 even if features are bfloat16.
        kinds['dtype'] = self.param_dtype
        classifier = Conv(
            self.classes, 1, bias=True, kernel_init=fan_in_uniform, name='classifier', **kinds
        )
        return classifier(x)


class PSPNet(nn.Module):
    """Pyramid scene parsing network (Zhao et al. 2017).

    `__call__(images, train)` takes normalised images [B, H, W, 3] and gives `(logits, aux_logits)`
    at 1/8 of the resolution, [B, ceil(H/8), ceil(W/8), classes]. `aux_logits`, from layer3 (the
    paper's fourth stage), is None outside training or without an auxiliary head. Training needs
    the random stream 'dropout' and the mutable collection 'batch_stats'.
    """

    backbone: nn.Module
    context: nn.Module | None
    head: nn.Module
    aux_head: nn.Module | None

    # flax's switch for given names: the context's parameters are called 'pyramid', not 'context'.
    preserve_adopted_names = True

    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, jax.Array | None]:
        layer3, x = self.backbone(images, train)
        if self.context is not None:
            x = self.context(x, train)
        logits = self.head(x, train)
        if not train or self.aux_head is None:
            return logits, None
        return logits, self.aux_head(layer3, train)


def build(config: ConfigDict) -> PSPNet:
    """The network of a configuration. Parameters are float32, or float64 if `dtype` is."""
    model, classes = config.model, len(label_space(config.data.classes).names)
    dtype = jnp.dtype(config.dtype)
    kinds = {'dtype': dtype, 'param_dtype': jnp.promote_types(dtype, jnp.float32)}

    def head(width: int, name: str) -> Head:
        return Head(width, classes, model.dropout, name=name, **kinds)

    return PSPNet(
        backbone=BACKBONES[model.backbone](model, name='backbone', **kinds),
        context=CONTEXTS[model.context](model, name=model.context, **kinds),
        head=head(model.head_width, 'head'),
        aux_head=head(model.aux_width, 'aux_head') if config.loss.aux_weight else None,
    )


def normalise(images: jax.Array, config: ConfigDict) -> jax.Array:
    """uint8 [B, H, W, 3] -> (images - mean) / std per channel, in the parameters' precision."""
    exact = jnp.promote_types(config.dtype, jnp.float32)
    mean, std = (jnp.asarray(v, exact) for v in (config.data.mean, config.data.std))
    return (images.astype(exact) - mean) / std
