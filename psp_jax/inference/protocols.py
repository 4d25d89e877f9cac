"""How an evaluation protocol shows an image to the network, and maps what comes out to its pixels.

    semseg       windows of the training crop over the image at each scale, mirrored too (the
                 authors' PyTorch test: the one of most published numbers)
    caffe        the same as the authors' first code did it in MATLAB
    mmseg        the image in one piece, by its short side
    mmseg_slide  windows as mmsegmentation slides them
    whole        the image in one piece, by its long side: quick, for training

All of it is numpy, and separable: for each axis a sparse matrix resizes, divides by the number of
windows over a pixel and cuts padding away in one product. Sizes are (height, width).
"""

import math
from itertools import product
from typing import Any, NamedTuple

import cv2
import numpy as np
from ml_collections import ConfigDict

from psp_jax.model.geometry import STRIDE, Size, cells, crop_size
from psp_jax.model.resample import Taps, resize_taps

PROTOCOLS = ('whole', 'semseg', 'caffe', 'mmseg', 'mmseg_slide')
SLIDING = ('semseg', 'caffe', 'mmseg_slide')
AVERAGES_PROBABILITIES = ('semseg', 'caffe')  # of windows; the others average logits
MIRRORS = ('semseg', 'caffe')  # by themselves, in each window; the others with eval.flip=true
MMSEG_LONG_SIDE = 2048  # pixels; mmsegmentation's Resize(scale=(2048, ...)) of its data sets
CANVAS_BYTES = 3 * 2**30  # of float32 scores that a device holds at a time, for one image


class Axis(NamedTuple):
    """One axis of a view: where windows lie, and how their scores become those of the pixels."""

    starts: tuple[int, ...]  # of the windows, in the padded picture and on the canvas
    taps: Taps  # from cells of the canvas, one row a pixel of the image


class View(NamedTuple):
    """An image at one scale as the network sees it, in one piece or in windows."""

    size: Size  # that the image is resized to
    lead: Size  # padding above and to the left of it
    padded: Size
    window: Size  # true size of each window
    mirror: bool  # the picture is the image's mirror image
    rows: Axis
    columns: Axis


def flips(config: ConfigDict) -> bool:
    """Whether mirror images are averaged in."""
    if config.eval.flip == 'auto':
        return config.eval.protocol in MIRRORS
    return config.eval.flip == 'true'


def views(size: Size, config: ConfigDict) -> list[View]:
    """The views of an image of this size: each scale, and its mirror image where views have one."""
    in_views = flips(config) and config.eval.protocol not in MIRRORS
    return [
        view(size, scale, mirror, config)
        for scale in config.eval.scales
        for mirror in ((False, True) if in_views else (False,))
    ]


def view(size: Size, scale: float, mirror: bool, config: ConfigDict) -> View:
    """One view; its taps are of the whole image (`_cut` makes parts of them)."""
    protocol, align_corners = config.eval.protocol, config.model.align_corners
    seen = seen_size(size, scale, config)
    if protocol not in SLIDING:
        rows, columns = (
            Axis((0,), full_taps(cells(seen[i]), seen[i], size[i], align_corners)) for i in (0, 1)
        )
        lead, padded, window = (0, 0), seen, seen
    else:
        crop = crop_size(config)
        # mmsegmentation's windows become smaller on small images, the authors' are padded.
        least = (0, 0) if protocol == 'mmseg_slide' else crop
        padded = max(seen[0], least[0]), max(seen[1], least[1])
        window = min(crop[0], padded[0]), min(crop[1], padded[1])
        lead = (0, 0)  # the others pad behind only
        if protocol == 'semseg':
            lead = (padded[0] - seen[0]) // 2, (padded[1] - seen[1]) // 2
        rows, columns = (
            sliding_axis(size[i], seen[i], lead[i], padded[i], window[i], crop[i], config)
            for i in (0, 1)
        )
    if mirror:
        columns = Axis(columns.starts, Taps(*(x[::-1] for x in columns.taps)))
    return View(seen, lead, padded, window, mirror, rows, columns)


def sliding_axis(
    pixels: int, seen: int, lead: int, padded: int, window: int, crop: int, config: ConfigDict
) -> Axis:
    """Windows of ceil(2/3 crop) apart over an axis, the last one shifted back to its end."""
    stride = math.ceil(crop * 2 / 3)
    count = max(math.ceil((padded - window) / stride), 0) + 1
    starts = tuple(min(i * stride, padded - window) for i in range(count))
    covering = np.zeros(padded)
    for start in starts:
        covering[start : start + window] += 1
    if config.eval.protocol == 'caffe':
        cells, weight = matlab_taps(seen, pixels)
    else:
        corners = config.model.align_corners and config.eval.protocol == 'mmseg_slide'
        # OpenCV's; semseg's, whatever its network does.
        cells, weight = resize_taps(seen, pixels, corners)
    return Axis(starts, Taps(cells + lead, weight / covering[cells + lead]))


def mmseg_long_side(base: int) -> int:
    """The most pixels that mmsegmentation's protocols leave the long side of an image."""
    return max(MMSEG_LONG_SIDE, 2 * base - 1)  # that of its base 1025 is 2049


def seen_size(size: Size, scale: float, config: ConfigDict) -> Size:
    """The size that the image is resized to. `eval.base_size=0` stands for the image's own."""
    height, width = size
    base, protocol = config.eval.base_size, config.eval.protocol
    if protocol == 'whole':
        # The nearest size that the stride meets at both edges: 8n + 1, or 8n.
        extra = 1 if config.model.align_corners else 0
        factor = scale * base / max(size) if base else scale
        seen = tuple(
            max(round((side * factor - extra) / STRIDE), 1) * STRIDE + extra for side in size
        )
        return seen[0], seen[1]
    if protocol in ('mmseg', 'mmseg_slide'):
        factor = min(mmseg_long_side(base) / max(size), base / min(size)) if base else 1.0
        return max(int(height * factor * scale + 0.5), 1), max(int(width * factor * scale + 0.5), 1)
    base = base or max(size)
    if protocol == 'caffe':
        long, to_int = round(base * scale) + 1, lambda x: math.floor(x + 0.5)  # MATLAB's round
    else:
        long, to_int = max(round(base * scale), 1), round
    if height > width:
        return long, max(to_int(long / height * width), 1)
    return max(to_int(long / width * height), 1), long


def full_taps(features: int, seen: int, size: int, align_corners: bool) -> Taps:
    """Logits of `features` cells -> the `seen` pixels of the network's input -> `size` pixels of
    the label, one axis of it. The references also resize in two steps.
    """
    up, last = resize_taps(features, seen, align_corners), resize_taps(seen, size, align_corners)
    weight = last.weight[..., None] * up.weight[last.cells]
    return Taps(up.cells[last.cells].reshape(size, -1), weight.reshape(size, -1))


def matlab_taps(size: int, new_size: int) -> Taps:
    """MATLAB's imresize(..., 'bilinear') of an axis; weights sum to 1.

    Where it shrinks, the triangle is as wide as a new pixel (antialiasing); beyond the edges the
    axis is mirrored.
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


def resample(x: np.ndarray, taps: Taps, axis: int) -> np.ndarray:
    """Maps an axis of [H, W, C]: float64."""
    shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    columns = zip(taps.cells.T, taps.weight.T, strict=True)
    return sum(np.take(x, cells, axis) * weight.reshape(shape) for cells, weight in columns)


def picture(image: np.ndarray, view: View, config: ConfigDict) -> np.ndarray:
    """The resized and padded image [H, W, 3]: uint8, or float32 in semseg's and caffe's way."""
    height, width = view.size
    protocol = config.eval.protocol
    if protocol == 'caffe':
        resized = image
        for axis in (0, 1):
            resized = resample(resized, matlab_taps(image.shape[axis], view.size[axis]), axis)
        # imresize gives uint8 as it gets uint8; halves are to round up whatever the last bit says.
        resized = np.floor(np.clip(resized, 0, 255) + 0.5 + 1e-9).astype(np.float32)
    else:
        # Bilinear without antialiasing; semseg reads images as float32.
        resized = image.astype(np.float32) if protocol == 'semseg' else image
        resized = cv2.resize(resized, (width, height), interpolation=cv2.INTER_LINEAR)
    if view.mirror:
        resized = resized[:, ::-1]
    if view.padded == view.size:
        return resized
    top, left = view.lead
    padded = np.empty((*view.padded, 3), np.float32)
    padded[:] = config.data.mean
    padded[top : top + height, left : left + width] = resized
    return padded


# ---- What a device works on


class Part(NamedTuple):
    """What one view gives to a block of the image."""

    picture: np.ndarray  # [H, W, 3]
    sources: tuple[Size, ...]  # where windows are cut from it
    targets: tuple[Size, ...]  # where their scores go on the canvas
    window: Size  # true size of a window
    shape: Size  # of the network's input that holds it
    canvas: Size  # [H, W] of the scores
    rows: Taps  # from the canvas to the block's pixels
    columns: Taps


class Block(NamedTuple):
    """A part of an image whose scores are computed at a time; nearly always the whole image."""

    protocol: str
    place: Size  # its top left pixel in the image
    size: Size
    parts: tuple[Part, ...]  # one a view

    @property
    def kind(self) -> tuple[Any, ...]:
        """Blocks of the same kind go through the same programs, in the same number of calls."""
        parts = ((part.canvas, part.shape, len(part.sources)) for part in self.parts)
        return self.protocol, *parts


def blocks(image: np.ndarray, config: ConfigDict, classes: int) -> list[Block]:
    """All views of an image uint8 [H, W, 3], in as many blocks as the devices' memory asks for."""
    size = image.shape[0], image.shape[1]
    seen = views(size, config)
    pictures = [picture(image, view, config) for view in seen]
    canvases = [canvas_size(view, config) for view in seen]
    counts = [1, 1]  # of blocks over the height and the width
    cells = CANVAS_BYTES // (4 * classes)
    while config.eval.protocol in SLIDING and sum(h * w for h, w in canvases) > cells:
        longest = 0 if size[0] / counts[0] >= size[1] / counts[1] else 1
        if size[longest] // counts[longest] < 64:
            break
        counts[longest] += 1
        canvases = [_canvas_of_blocks(view, size, counts, crop_size(config)) for view in seen]
    found = []
    for (top, bottom), (left, right) in product(*map(_spans, size, counts)):
        parts = []
        for view, picture_, canvas in zip(seen, pictures, canvases, strict=True):
            rows, tops = _cut(view.rows, top, bottom, view.window[0], canvas[0])
            columns, lefts = _cut(view.columns, left, right, view.window[1], canvas[1])
            sources = tuple(product(tops, lefts))
            targets = tuple((y - tops[0], x - lefts[0]) for y, x in sources)
            shape = window_shape(view, config)
            parts.append(
                Part(picture_, sources, targets, view.window, shape, canvas, rows, columns)
            )
        extent = bottom - top, right - left
        found.append(Block(config.eval.protocol, (top, left), extent, tuple(parts)))
    return found


def _spans(size: int, count: int) -> list[tuple[int, int]]:
    edges = [i * size // count for i in range(count + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _windows(axis: Axis, start: int, stop: int, window: int) -> tuple[int, ...]:
    """The windows that have a part in pixels start..stop-1."""
    cells, weight = (x[start:stop] for x in axis.taps)
    used = cells[weight > 0]
    return tuple(s for s in axis.starts if s <= used.max() and s + window > used.min())


def _cut(
    axis: Axis, start: int, stop: int, window: int, canvas: int
) -> tuple[Taps, tuple[int, ...]]:
    """The taps of pixels start..stop-1 from a canvas that begins at their first window."""
    starts = _windows(axis, start, stop, window)
    cells, weight = (x[start:stop] for x in axis.taps)
    return Taps(np.clip(cells - starts[0], 0, canvas - 1), weight), starts


def _canvas_of_blocks(view: View, size: Size, counts: list[int], crop: Size) -> Size:
    sides = []
    for axis, pixels, count, window, whole in zip(
        (view.rows, view.columns), size, counts, view.window, crop, strict=True
    ):
        extents = [whole]
        for start, stop in _spans(pixels, count):
            starts = _windows(axis, start, stop, window)
            extents.append(starts[-1] - starts[0] + window)
        sides.append(-(-max(extents) // 256) * 256)
    return sides[0], sides[1]


def canvas_size(view: View, config: ConfigDict) -> Size:
    """The shape that the scores of a view lie on: few for many sizes of images."""
    if config.eval.protocol not in SLIDING:
        height, width = window_shape(view, config)
        return cells(height), cells(width)
    crop = crop_size(config)
    height, width = max(view.padded[0], crop[0]), max(view.padded[1], crop[1])
    if config.eval.protocol == 'mmseg_slide' or not config.eval.base_size:
        return -(-height // 256) * 256, -(-width // 256) * 256  # no side is that of all images
    return max(height, width), max(height, width)


def window_shape(view: View, config: ConfigDict) -> Size:
    """The shape of the network's input that holds a window."""
    if config.eval.protocol in SLIDING:
        return crop_size(config)
    multiple, extra = config.eval.multiple, 1 if config.model.align_corners else 0
    height, width = (-(-(side - extra) // multiple) * multiple + extra for side in view.window)
    return height, width


def needs_sizes(config: ConfigDict) -> bool:
    """Whether windows may be smaller than the network's input."""
    return config.eval.protocol in ('mmseg', 'mmseg_slide') or (
        config.eval.protocol == 'whole' and config.eval.multiple > 8
    )
