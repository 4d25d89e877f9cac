"""The backbones that `model.backbone` can name. To add one, add an entry to BACKBONES."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from psp_jax.model.resnet import ResNet


def resnet(model: ConfigDict, **kinds: Any) -> nn.Module:
    """The dilated ResNet of model.depth, model.stem and model.dilation."""
    return ResNet(model.depth, model.stem, model.dilation, **kinds)


# (config.model, name, dtype, param_dtype) -> a module whose `__call__(images, train)` maps
# [B, H, W, 3] to (features of the auxiliary head, features), both [B, ceil(H/8), ceil(W/8), C].
BACKBONES: dict[str, Callable[..., nn.Module]] = {'resnet': resnet}
