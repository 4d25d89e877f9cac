"""Blocks of an image: a device works on one at a time. Nearly always it is the whole image."""

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from psp_jax.config import crop_size
from psp_jax.data.labels import label_space
from psp_jax.inference.protocols import protocol_of
from psp_jax.inference.views import Axis, View, padded_image, rounded_up, views
from psp_jax.model.geometry import Size
from psp_jax.model.resample import Taps

CANVAS_BYTES = 3 * 2**30  # of float32 scores that a device holds at a time, for one image
LEAST_SIDE = 64  # pixels; blocks are not cut smaller


class Part(NamedTuple):
    """One view's share of a block: its windows, and the taps that resize to the block's pixels."""

    image: np.ndarray  # [H, W, 3], resized and padded
    view: View


class Block(NamedTuple):
    """A rectangle of an image whose scores are computed at a time."""

    protocol: str
    place: Size  # its top left pixel in the image
    size: Size
    parts: tuple[Part, ...]  # one a view

    @property
    def kind(self) -> tuple[Any, ...]:
        """Blocks of the same kind go through the same programs, in the same number of calls."""
        views = (view for _, view in self.parts)
        return self.protocol, *((v.canvas, v.input, len(v.sources)) for v in views)


def blocks(image: np.ndarray, config: ConfigDict) -> list[Block]:
    """All views of an image uint8 [H, W, 3], in blocks that fit into the devices' memory."""
    size = image.shape[0], image.shape[1]
    seen = views(size, config)
    images = [padded_image(image, view, config) for view in seen]
    counts, canvases = divide(seen, size, config)
    found = []
    for (top, bottom), (left, right) in product(*map(spans, size, counts)):
        parts = []
        for view, padded, canvas in zip(seen, images, canvases, strict=True):
            rows = cut(view.rows, top, bottom, canvas[0])
            columns = cut(view.columns, left, right, canvas[1])
            parts.append(Part(padded, View(rows, columns, view.mirror)))
        extent = bottom - top, right - left
        found.append(Block(config.eval.protocol, (top, left), extent, tuple(parts)))
    return found


def divide(seen: Sequence[View], size: Size, config: ConfigDict) -> tuple[Size, list[Size]]:
    """The numbers of blocks over height and width, and each view's canvas of a block.

    Windows can be divided among blocks so that a block's canvases take at most CANVAS_BYTES.
    """
    counts = [1, 1]
    canvases = [view.canvas for view in seen]
    classes = len(label_space(config.data.classes).names)
    cells = CANVAS_BYTES // (4 * classes)
    while protocol_of(config).slides and sum(h * w for h, w in canvases) > cells:
        longest = 0 if size[0] / counts[0] >= size[1] / counts[1] else 1
        if size[longest] // counts[longest] < LEAST_SIDE:
            break
        counts[longest] += 1
        sides = counts[0], counts[1]
        canvases = [canvas_of_blocks(view, sides, crop_size(config.data)) for view in seen]
    return (counts[0], counts[1]), canvases


def spans(size: int, count: int) -> list[tuple[int, int]]:
    """(start, stop) of `count` intervals that cover an axis."""
    edges = [i * size // count for i in range(count + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def windows_over(axis: Axis, start: int, stop: int) -> tuple[int, ...]:
    """The starts of the windows whose scores reach pixels start..stop-1."""
    places, weight = (x[start:stop] for x in axis.taps)
    used = places[weight > 0]
    return tuple(s for s in axis.starts if s <= used.max() and s + axis.window > used.min())


def cut(axis: Axis, start: int, stop: int, canvas: int) -> Axis:
    """Pixels start..stop-1 of an axis, on a canvas that begins with their first window."""
    starts = windows_over(axis, start, stop)
    places, weight = (x[start:stop] for x in axis.taps)
    taps = Taps(np.clip(places - starts[0], 0, canvas - 1), weight)
    return axis._replace(pixels=stop - start, canvas=canvas, starts=starts, taps=taps)


def canvas_of_blocks(view: View, counts: Size, crop: Size) -> Size:
    """A canvas that holds the windows of any of the blocks."""
    sides = []
    for axis, count, least in zip((view.rows, view.columns), counts, crop, strict=True):
        extents = [least]
        for start, stop in spans(axis.pixels, count):
            starts = windows_over(axis, start, stop)
            extents.append(starts[-1] - starts[0] + axis.window)
        sides.append(rounded_up(max(extents), 256))
    return sides[0], sides[1]
