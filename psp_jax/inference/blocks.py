"""Blocks of an image: what a device works on at a time, in nearly all cases the whole image."""

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from psp_jax.data.labels import label_space
from psp_jax.inference.protocols import protocol_of
from psp_jax.inference.views import Axis, View, padded_image, rounded_up, views
from psp_jax.model.geometry import Size, crop_size
from psp_jax.model.resample import Taps

CANVAS_BYTES = 3 * 2**30  # of float32 scores that a device holds at a time, for one image
LEAST_SIDE = 64  # pixels; blocks are not cut smaller


class Part(NamedTuple):
    """What one view gives to a block of the image. Places are (row, column)."""

    image: np.ndarray  # [H, W, 3], resized and padded
    sources: tuple[Size, ...]  # where windows are cut from it
    targets: tuple[Size, ...]  # where their scores go on the canvas
    window: Size  # of each window
    input: Size  # of the network's input that holds it
    canvas: Size  # cells that scores lie on
    rows: Taps  # from the canvas to the block's pixels
    columns: Taps


class Block(NamedTuple):
    """A rectangle of an image whose scores are computed at a time."""

    protocol: str
    place: Size  # its top left pixel in the image
    size: Size
    parts: tuple[Part, ...]  # one a view

    @property
    def kind(self) -> tuple[Any, ...]:
        """Blocks of the same kind go through the same programs, in the same number of calls."""
        parts = ((part.canvas, part.input, len(part.sources)) for part in self.parts)
        return self.protocol, *parts


def blocks(image: np.ndarray, config: ConfigDict) -> list[Block]:
    """All views of an image uint8 [H, W, 3], in as many blocks as the devices' memory asks for."""
    size = image.shape[0], image.shape[1]
    seen = views(size, config)
    images = [padded_image(image, view, config) for view in seen]
    counts, canvases = divide(seen, size, config)
    found = []
    for (top, bottom), (left, right) in product(*map(spans, size, counts)):
        parts = []
        for view, padded, canvas in zip(seen, images, canvases, strict=True):
            rows, tops = cut(view.rows, top, bottom, canvas[0])
            columns, lefts = cut(view.columns, left, right, canvas[1])
            sources = tuple(product(tops, lefts))
            targets = tuple((y - tops[0], x - lefts[0]) for y, x in sources)
            window = view.rows.window, view.columns.window
            parts.append(Part(padded, sources, targets, window, view.input, canvas, rows, columns))
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
        canvases = [canvas_of_blocks(view, sides, crop_size(config)) for view in seen]
    return (counts[0], counts[1]), canvases


def spans(size: int, count: int) -> list[tuple[int, int]]:
    """(start, stop) of `count` stretches that cover an axis."""
    edges = [i * size // count for i in range(count + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def windows_over(axis: Axis, start: int, stop: int) -> tuple[int, ...]:
    """The starts of the windows that pixels start..stop-1 get scores from."""
    places, weight = (x[start:stop] for x in axis.taps)
    used = places[weight > 0]
    return tuple(s for s in axis.starts if s <= used.max() and s + axis.window > used.min())


def cut(axis: Axis, start: int, stop: int, canvas: int) -> tuple[Taps, tuple[int, ...]]:
    """The taps of pixels start..stop-1 from a canvas that begins at their first window.

    And the starts of their windows.
    """
    starts = windows_over(axis, start, stop)
    places, weight = (x[start:stop] for x in axis.taps)
    return Taps(np.clip(places - starts[0], 0, canvas - 1), weight), starts


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
