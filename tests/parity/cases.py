"""What both sides of a comparison get: made-up weights, images and labels. Numpy only."""

import zlib
from typing import NamedTuple

import numpy as np

CLASSES = 7
RECIPE = {
    'learning_rate': 0.01,
    'momentum': 0.9,
    'weight_decay': 1e-4,
    'head_multiplier': 10.0,
    'power': 0.9,
    'aux_weight': 0.4,
}
MEAN, STD = np.array((123.675, 116.28, 103.53)), np.array((58.395, 57.12, 57.375))


class Network(NamedTuple):
    depth: int = 18
    stem: str = 'deep_small'
    dilation: str = 'full'
    align_corners: bool = True
    pool: str = 'average'
    head_width: int = 128
    aux_width: int = 64
    classes: int = CLASSES


R18 = Network()
R50 = Network(depth=50, stem='deep', head_width=512, aux_width=256)


def made_up(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Values for arrays in PyTorch's shapes that keep activations of order one. float32.

    Each is a function of its name and shape alone, whatever the order.
    """
    arrays = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(f'{name}{tuple(shape)}'.encode()))
        if name.endswith('running_var'):
            value = rng.uniform(0.5, 1.5, shape)
        elif len(shape) == 4:
            value = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        elif name.endswith('.weight'):  # of batch normalisation
            value = rng.uniform(0.4, 0.8, shape)
        else:
            value = rng.normal(0, 0.1, shape)
        arrays[name] = value.astype(np.float32)
    return arrays


def pictures(batch: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Blocks with noise uint8 [B, size, size, 3] and labels uint8 [B, size, size], some 255."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (batch, -(-size // 8), -(-size // 8), 3))
    images = coarse.repeat(8, 1).repeat(8, 2)[:, :size, :size] + rng.normal(
        0, 20, (1, size, size, 3)
    )
    labels = rng.integers(0, CLASSES, (batch, -(-size // 8), -(-size // 8)))
    labels = labels.repeat(8, 1).repeat(8, 2)[:, :size, :size]
    labels[:, : size // 5] = 255
    labels[0, :, size // 2 :] = 255  # unequal numbers of valid pixels
    return np.clip(images, 0, 255).astype(np.uint8), labels.astype(np.uint8)


def normalised(images: np.ndarray) -> np.ndarray:
    return (images - MEAN) / STD
