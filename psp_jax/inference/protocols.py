"""The evaluation protocols that `eval.protocol` can name, as a table of fields.

    semseg       windows of the training crop over the image at each scale, mirrored too (the
                 authors' PyTorch test, which most published numbers use)
    caffe        the same as in the authors' first code, in MATLAB
    mmseg        the image in one piece, resized by its short side
    mmseg_slide  windows as mmsegmentation slides them
    whole        the image in one piece, resized by its long side: quick, for training

To add a protocol, add an entry, such as dataclasses.replace(PROTOCOLS['semseg'], ...).
Sizes are (height, width) in pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import jax
import numpy as np
from ml_collections import ConfigDict

from psp_jax.model.geometry import STRIDE, Size
from psp_jax.model.resample import Taps, resize_taps

MMSEG_LONG_SIDE = 2048  # pixels; mmsegmentation's Resize(scale=(2048, ...)) of its data sets


# ---- The size that an image is resized to, from its own size. eval.base_size=0 is its own size.


def aligned_by_long_side(size: Size, scale: float, config: ConfigDict) -> Size:
    """The long side becomes about base_size * scale.

    Both sides are 8n + 1, or 8n without aligned corners: the network's stride meets both edges.
    """
    extra = 1 if config.model.align_corners else 0
    base = config.eval.base_size
    factor = scale * base / max(size) if base else scale
    steps = [max(round((side * factor - extra) / STRIDE), 1) for side in size]
    return steps[0] * STRIDE + extra, steps[1] * STRIDE + extra


def by_long_side(size: Size, scale: float, config: ConfigDict) -> Size:
    """The long side becomes base_size * scale."""
    long = max(round((config.eval.base_size or max(size)) * scale), 1)
    return _scaled(size, long / max(size), round)


def by_long_side_in_matlab(size: Size, scale: float, config: ConfigDict) -> Size:
    """The long side becomes base_size * scale + 1."""
    long = round((config.eval.base_size or max(size)) * scale) + 1
    return _scaled(size, long / max(size), _round_half_up)


def by_short_side(size: Size, scale: float, config: ConfigDict) -> Size:
    """The short side becomes base_size * scale, or less, so that the long side is not too long."""
    base = config.eval.base_size
    factor = min(mmseg_long_side(base) / max(size), base / min(size)) if base else 1.0
    return _scaled(size, factor, lambda side: _round_half_up(side * scale))


def base_side(base: int) -> int:
    """The long side of every image at scale 1, if images are resized by it."""
    return base


def mmseg_long_side(base: int) -> int:
    """The maximum of the long side at scale 1 in mmsegmentation's protocols."""
    return max(MMSEG_LONG_SIDE, 2 * base - 1)  # its base size of 1025 has 2049


def _scaled(size: Size, factor: float, to_int: Callable[[float], int]) -> Size:
    return max(to_int(size[0] * factor), 1), max(to_int(size[1] * factor), 1)


def _round_half_up(x: float) -> int:
    return math.floor(x + 0.5)


# ---- Interpolation


def by_opencv(image: np.ndarray, size: Size) -> np.ndarray:
    """Resizes [H, W, 3] in its own dtype: bilinear, without antialiasing."""
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


def by_opencv_in_float(image: np.ndarray, size: Size) -> np.ndarray:
    """`by_opencv` of float32, so that values are not rounded."""
    return by_opencv(image.astype(np.float32), size)


def by_matlab(image: np.ndarray, size: Size) -> np.ndarray:
    """MATLAB's imresize(..., 'bilinear') of uint8 [H, W, 3]: whole numbers as float32."""
    resized: np.ndarray = image
    for axis in (0, 1):
        taps = matlab_taps(resized.shape[axis], size[axis])
        resized = _resize_axis(resized, taps, axis)
    # Rounds halves up, even those that rounding errors made smaller.
    return np.floor(np.clip(resized, 0, 255) + 0.5 + 1e-9).astype(np.float32)


def opencv_taps(size: int, new_size: int, align_corners: bool = False) -> Taps:
    """OpenCV's bilinear interpolation, whatever the network's align_corners is."""
    return resize_taps(size, new_size, False)


def matlab_taps(size: int, new_size: int, align_corners: bool = False) -> Taps:
    """MATLAB's imresize(..., 'bilinear') of an axis; weights sum to 1.

    If the axis shrinks, the triangle is as wide as a new pixel (antialiasing). The axis is mirrored
    beyond its edges.
    """
    factor = new_size / size
    narrow = min(factor, 1.0)
    center = (np.arange(new_size) + 0.5) / factor - 0.5
    first = np.ceil(center - 1 / narrow)
    cells = first[:, None] + np.arange(math.floor(2 / narrow) + 1)
    weight = np.maximum(0, 1 - np.abs(narrow * (center[:, None] - cells)))
    around = cells.astype(np.int32) % (2 * size)
    index = np.where(around < size, around, 2 * size - 1 - around)
    return Taps(index, weight / weight.sum(1, keepdims=True))


def _resize_axis(x: np.ndarray, taps: Taps, axis: int) -> np.ndarray:
    """Maps an axis of [H, W, C]: float64."""
    shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    columns = zip(taps.cells.T, taps.weight.T, strict=True)
    return sum(np.take(x, cells, axis) * weight.reshape(shape) for cells, weight in columns)


# ---- Scores [h, w, classes] of a window, from its logits [1, h, w, classes], or [2, h, w, classes]
# with those of its mirror image


def mean_logits(logits: jax.Array) -> jax.Array:
    return logits.mean(0)


def mean_probabilities(logits: jax.Array) -> jax.Array:
    return jax.nn.softmax(logits).mean(0)


def probabilities_of_summed_logits(logits: jax.Array) -> jax.Array:
    return jax.nn.softmax(logits.sum(0))


# ---- The table


@dataclass(frozen=True)
class Protocol:
    """How an image is shown to the network, and how scores become probabilities of its pixels."""

    # (image's size, scale, config) -> the size that it is resized to.
    seen_size: Callable[[Size, float, ConfigDict], Size]
    # eval.base_size -> the most pixels that the long side of an image has at scale 1.
    longest_side: Callable[[int], int] = base_side
    # Whether resized images need no padding at eval.multiple=8.
    stride_aligned: bool = False
    # (uint8 [H, W, 3], size) -> the resized image, uint8 or float32.
    resize_image: Callable[[np.ndarray, Size], np.ndarray] = by_opencv
    # (pixels seen, pixels of the image, model.align_corners) -> how an axis of scores is resized.
    score_taps: Callable[[int, int, bool], Taps] = resize_taps

    # Windows of the training crop slide over the image by this share of their side; 0: the network
    # sees the image in one piece.
    window_step: float = 0.0
    # The share of padding above and on the left of an image that is smaller than a window; the
    # padding has the mean colour. None: no padding; the windows are smaller.
    padding_before: float | None = None
    # True: eval.flip=auto is true, and the network sees the mirror image of each window. False:
    # auto is false, and with eval.flip=true it sees the mirror image of each scale.
    mirrors_windows: bool = False
    # The scores that are averaged over windows, as explained above.
    window_scores: Callable[[jax.Array], jax.Array] = mean_logits
    # Whether these scores are probabilities; otherwise the softmax is taken at the image's own
    # pixels.
    averages_probabilities: bool = False

    # The protocol that `predict` uses for images too large to be seen in one piece.
    for_large_images: str = ''

    @property
    def slides(self) -> bool:
        return self.window_step > 0


PROTOCOLS: dict[str, Protocol] = {
    'whole': Protocol(
        seen_size=aligned_by_long_side, stride_aligned=True, for_large_images='semseg'
    ),
    'semseg': Protocol(
        seen_size=by_long_side,
        resize_image=by_opencv_in_float,
        score_taps=opencv_taps,
        window_step=2 / 3,
        padding_before=0.5,
        mirrors_windows=True,
        window_scores=mean_probabilities,
        averages_probabilities=True,
    ),
    'caffe': Protocol(
        seen_size=by_long_side_in_matlab,
        resize_image=by_matlab,
        score_taps=matlab_taps,
        window_step=2 / 3,
        padding_before=0.0,
        mirrors_windows=True,
        window_scores=probabilities_of_summed_logits,
        averages_probabilities=True,
    ),
    'mmseg': Protocol(
        seen_size=by_short_side, longest_side=mmseg_long_side, for_large_images='mmseg_slide'
    ),
    'mmseg_slide': Protocol(
        seen_size=by_short_side, longest_side=mmseg_long_side, window_step=2 / 3
    ),
}


def protocol_of(config: ConfigDict) -> Protocol:
    return PROTOCOLS[config.eval.protocol]


def flips(config: ConfigDict) -> bool:
    """Whether scores are averaged over mirror images too."""
    if config.eval.flip == 'auto':
        return protocol_of(config).mirrors_windows
    return config.eval.flip == 'true'


def needs_sizes(config: ConfigDict) -> bool:
    """Whether windows may be smaller than the network's input, which then needs their sizes."""
    protocol = protocol_of(config)
    if protocol.slides:
        return protocol.padding_before is None
    return not (protocol.stride_aligned and config.eval.multiple == STRIDE)
