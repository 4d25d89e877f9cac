"""Views of an image: at each scale, in one piece or in windows, as a protocol says.

All of it is numpy and separable: for each axis one sparse matrix resizes scores to the image's
pixels, divides by the number of windows over a pixel and cuts padding away.
"""

import math
from itertools import product
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from psp_jax.config import crop_size
from psp_jax.inference.protocols import flips, protocol_of
from psp_jax.model.geometry import Size, cells
from psp_jax.model.resample import Taps, resize_taps


class Axis(NamedTuple):
    """One axis of a view, rows or columns. All but `canvas` are in pixels."""

    pixels: int  # of the image
    seen: int  # after the image is resized
    before: int  # of padding above or to the left of the image
    padded: int  # of the image with all padding
    window: int  # of each window
    input: int  # of the network's input, which contains a window
    canvas: int  # cells that the scores of all windows lie on
    starts: tuple[int, ...]  # of the windows; the canvas begins with the first
    taps: Taps  # from cells of the canvas, one row a pixel of the image


class View(NamedTuple):
    """An image at one scale as the network sees it."""

    rows: Axis
    columns: Axis
    mirror: bool  # whether the network sees the mirror image

    @property
    def seen(self) -> Size:
        """The size that the image is resized to."""
        return self.rows.seen, self.columns.seen

    @property
    def input(self) -> Size:
        """The size of the network's input."""
        return self.rows.input, self.columns.input

    @property
    def canvas(self) -> Size:
        """The cells that scores lie on."""
        return self.rows.canvas, self.columns.canvas

    @property
    def window(self) -> Size:
        """The size of each window."""
        return self.rows.window, self.columns.window

    @property
    def sources(self) -> list[Size]:
        """The top left pixels of the windows in the padded image."""
        return list(product(self.rows.starts, self.columns.starts))

    @property
    def targets(self) -> list[Size]:
        """The top left cells of the windows' scores on the canvas."""
        top, left = self.sources[0]
        return [(y - top, x - left) for y, x in self.sources]


def views(size: Size, config: ConfigDict) -> list[View]:
    """The views of an image of this size: each scale, and its mirror image if views have one."""
    mirrored = flips(config) and not protocol_of(config).mirrors_windows
    return [
        view(size, scale, mirror, config)
        for scale in config.eval.scales
        for mirror in ((False, True) if mirrored else (False,))
    ]


def view(size: Size, scale: float, mirror: bool, config: ConfigDict) -> View:
    """One view of an image of this size."""
    protocol = protocol_of(config)
    seen = protocol.seen_size(size, scale, config)
    if not protocol.slides:
        rows, columns = (whole_axis(size[i], seen[i], config) for i in (0, 1))
    else:
        crop, base = crop_size(config.data), config.eval.base_size
        rows, columns = (sliding_axis(size[i], seen[i], crop[i], config) for i in (0, 1))
        # Few shapes of canvases for many sizes of images: a square for each scale if all images
        # have the same long side.
        sides = max(rows.padded, crop[0]), max(columns.padded, crop[1])
        if base and protocol.longest_side(base) == base:
            sides = max(sides), max(sides)
        else:
            sides = rounded_up(sides[0], 256), rounded_up(sides[1], 256)
        rows, columns = rows._replace(canvas=sides[0]), columns._replace(canvas=sides[1])
    if mirror:
        columns = columns._replace(taps=Taps(*(x[::-1] for x in columns.taps)))
    return View(rows, columns, mirror)


def whole_axis(pixels: int, seen: int, config: ConfigDict) -> Axis:
    """An axis seen in one piece. Its canvas has the logits' own cells."""
    multiple, align_corners = config.eval.multiple, config.model.align_corners
    extra = 1 if align_corners else 0
    input_ = rounded_up(seen - extra, multiple) + extra
    last = protocol_of(config).score_taps(seen, pixels, align_corners)
    taps = chained(resize_taps(cells(seen), seen, align_corners), last)
    return Axis(pixels, seen, 0, seen, seen, input_, cells(input_), (0,), taps)


def sliding_axis(pixels: int, seen: int, crop: int, config: ConfigDict) -> Axis:
    """An axis with a window at every step, the last one shifted back to its end."""
    protocol = protocol_of(config)
    share = protocol.padding_before
    padded = seen if share is None else max(seen, crop)
    before = math.floor((padded - seen) * (share or 0))
    window, step = min(crop, padded), math.ceil(crop * protocol.window_step)
    count = max(math.ceil((padded - window) / step), 0) + 1
    starts = tuple(min(i * step, padded - window) for i in range(count))
    covering = np.zeros(padded)
    for start in starts:
        covering[start : start + window] += 1
    places, weight = protocol.score_taps(seen, pixels, config.model.align_corners)
    taps = Taps(places + before, weight / covering[places + before])
    return Axis(pixels, seen, before, padded, window, crop, padded, starts, taps)


def chained(first: Taps, last: Taps) -> Taps:
    """The taps that resize by `first`, then by `last`, as the references do."""
    weight = last.weight[..., None] * first.weight[last.cells]
    count = len(last.cells)
    return Taps(first.cells[last.cells].reshape(count, -1), weight.reshape(count, -1))


def rounded_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def padded_image(image: np.ndarray, view: View, config: ConfigDict) -> np.ndarray:
    """The image uint8 [H, W, 3] resized and padded for a view: uint8 or float32."""
    resized = protocol_of(config).resize_image(image, view.seen)
    if view.mirror:
        resized = resized[:, ::-1]
    rows, columns = view.rows, view.columns
    if (rows.padded, columns.padded) == view.seen:
        return resized
    padded = np.empty((rows.padded, columns.padded, 3), np.float32)
    padded[:] = config.data.mean
    top, left = rows.before, columns.before
    padded[top : top + rows.seen, left : left + columns.seen] = resized
    return padded
