"""Pooling and bilinear interpolation of feature maps as constant matrices.

Both are linear and separable: one small matrix for each axis. They are exact at every size, and
matrix products are what accelerators do best. Max pooling is not linear: it loops over its
windows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def zero_filler(x: jax.Array, cells: jax.Array) -> jax.Array:
    """[B, H, W, C] with zeros beyond the first `cells` of each map: int32[B, 2] (height, width)."""
    rows, columns = (jnp.arange(x.shape[axis]) < cells[:, axis - 1, None] for axis in (1, 2))
    return jnp.where(rows[:, :, None, None] & columns[:, None, :, None], x, 0)


def window_bounds(size: int, bins: int) -> list[tuple[int, int]]:
    """First and one-past-last cell of each of `bins` windows over an axis of `size` cells.

    Bin i covers cells floor(i * size / bins) to ceil((i + 1) * size / bins), as adaptive pooling
    does, so neighbouring windows may share a cell if `size` is no multiple of `bins`.
    """
    return [(i * size // bins, -(-(i + 1) * size // bins)) for i in range(bins)]


def pooling_matrix(size: int, bins: int) -> np.ndarray:
    """Averages an axis of `size` cells into `bins` cells: float64[bins, size], rows sum to 1."""
    matrix = np.zeros((bins, size))
    for row, (start, stop) in zip(matrix, window_bounds(size, bins), strict=True):
        row[start:stop] = 1.0 / (stop - start)
    return matrix


class Taps(NamedTuple):
    """A sparse matrix [n, size] with a few values in each row."""

    cells: np.ndarray  # int32 [n, taps], the columns that the values are in
    weight: np.ndarray  # float64 [n, taps], the values


def resize_taps(size: int, new_size: int, align_corners: bool) -> Taps:
    """Interpolates an axis of `size` cells at `new_size` points, from the two nearest cells.

    Linear interpolation without antialiasing; weights sum to 1. With `align_corners` the first and
    the last cells of both axes coincide: point i lies at i * (size - 1) / (new_size - 1). Without
    it the outer edges coincide: point i lies at (i + 0.5) * size / new_size - 0.5, but not before
    the first cell.
    """
    points = np.arange(new_size)
    if align_corners:
        position = points * ((size - 1) / max(new_size - 1, 1))
    else:
        position = np.maximum((points + 0.5) * (size / new_size) - 0.5, 0.0)
    low = np.minimum(position.astype(np.int32), size - 1)
    high = np.minimum(low + 1, size - 1)
    weight = position - low
    return Taps(np.stack([low, high], 1), np.stack([1.0 - weight, weight], 1))


def resize_matrix(size: int, new_size: int, align_corners: bool) -> np.ndarray:
    """`resize_taps` as float64[new_size, size]; rows sum to 1."""
    cells, weight = resize_taps(size, new_size, align_corners)
    matrix = np.zeros((new_size, size))
    np.add.at(matrix, (np.arange(new_size)[:, None], cells), weight)
    return matrix


def cells_pooling_matrix(cells: jax.Array, size: int, bins: int) -> jax.Array:
    """`pooling_matrix` of each map's first `cells` int32[B]: float32[B, bins, size]."""
    bin_, cell = jnp.arange(bins)[:, None], jnp.arange(size)
    cells = cells[:, None, None]
    start, stop = bin_ * cells // bins, -(-(bin_ + 1) * cells // bins)
    inside = (cell >= start) & (cell < stop)
    return inside / (stop - start).astype(_exact())


def cells_resize_matrix(
    size: int,
    old_cells: jax.Array,
    new_size: int,
    cells: jax.Array,
    align_corners: bool,
) -> jax.Array:
    """`resize_matrix` from the first `old_cells` int32[B] to the first `cells` int32[B].

    float32[B, new_size, size]; the rows of the other points are meaningless.
    """
    point, cells = jnp.arange(new_size, dtype=_exact()), cells[:, None]
    old_cells = old_cells[:, None]
    if align_corners:
        position = point * ((old_cells - 1) / jnp.maximum(cells - 1, 1))
    else:
        position = (point + 0.5) * (old_cells / cells) - 0.5
    position = jnp.clip(position, 0, old_cells - 1)
    return jnp.maximum(0, 1 - jnp.abs(position[..., None] - jnp.arange(size)))


def _exact() -> Any:
    return jnp.result_type(float)  # float32, or float64 if that is enabled


def apply_matrices(
    x_BHWC: jax.Array, rows: np.ndarray | jax.Array, columns: np.ndarray | jax.Array
) -> jax.Array:
    """Maps height by `rows` [newH, H] and width by `columns` [newW, W]: [B, newH, newW, C].

    Each map may have its own matrices: [B, newH, H]. Computed in float32 or better, since weights
    such as 1/60 would lose digits in bfloat16.
    """
    exact = jnp.promote_types(x_BHWC.dtype, jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    x = x_BHWC.astype(exact)
    for matrix, own, out in ((rows, 'oh', 'bowc'), (columns, 'ow', 'bhoc')):
        own = 'b' + own if matrix.ndim == 3 else own
        x = jnp.einsum(f'{own},bhwc->{out}', matrix.astype(exact), x, precision=highest)
    return x.astype(x_BHWC.dtype)


def apply_taps(
    x_hwC: jax.Array, rows: tuple[jax.Array, jax.Array], columns: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Maps height by taps `rows`, (cells, weight) [H, taps], and width by `columns`: [H, W, C].

    TPUs multiply by matrices. CPUs and GPUs gather the few cells of each point, which is ten times
    faster on a CPU.
    """

    def gathered(x: jax.Array, *taps: jax.Array) -> jax.Array:
        for axis, (cells, weight) in enumerate(zip(taps[::2], taps[1::2], strict=True)):
            shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
            taken = (
                jnp.take(x, cells[:, t], axis) * weight[:, t].reshape(shape)
                for t in range(cells.shape[1])
            )
            x = functools.reduce(jnp.add, taken)
        return x

    def multiplied(x: jax.Array, *taps: jax.Array) -> jax.Array:
        dense = []
        for size, cells, weight in zip(x.shape, taps[::2], taps[1::2], strict=False):
            chosen = cells[..., None] == jnp.arange(size)
            dense.append(jnp.sum(jnp.where(chosen, weight[..., None], 0), 1))
        return apply_matrices(x[None], *dense)[0]

    return jax.lax.platform_dependent(
        x_hwC, *rows, *columns, cpu=gathered, cuda=gathered, default=multiplied
    )


def resize(
    x_BHWC: jax.Array,
    size: tuple[int, int],
    align_corners: bool,
    cells: jax.Array | None = None,
    old_cells: jax.Array | None = None,
) -> jax.Array:
    """Bilinear interpolation to `size` = (height, width), without antialiasing.

    cells: int32[B, 2]; if given, each map is resized to this many cells at the top left of `size`.
    old_cells: int32[B, 2]; if given, only this many cells at the top left of each map are resized.
    """
    old = x_BHWC.shape[1:3]
    if cells is None:
        return apply_matrices(
            x_BHWC, *(resize_matrix(old[i], size[i], align_corners) for i in (0, 1))
        )
    if old_cells is None:
        old_cells = jnp.broadcast_to(jnp.asarray(old), cells.shape)
    return apply_matrices(
        x_BHWC,
        *(
            cells_resize_matrix(old[i], old_cells[:, i], size[i], cells[:, i], align_corners)
            for i in (0, 1)
        ),
    )


def average_pool(x_BHWC: jax.Array, bins: int, cells: jax.Array | None = None) -> jax.Array:
    """Adaptive average pooling to [B, bins, bins, C], of the first `cells` int32[B, 2] if given."""
    size = x_BHWC.shape[1:3]
    if cells is None:
        return apply_matrices(x_BHWC, *(pooling_matrix(n, bins) for n in size))
    return apply_matrices(
        zero_filler(x_BHWC, cells),  # since a NaN times zero is a NaN
        *(cells_pooling_matrix(cells[:, i], size[i], bins) for i in (0, 1)),
    )


def max_pool(x_BHWC: jax.Array, bins: int, cells: jax.Array | None = None) -> jax.Array:
    """Adaptive max pooling to [B, bins, bins, C], over the same windows as `average_pool`."""
    size = x_BHWC.shape[1:3]
    if cells is None:
        rows = [largest(x_BHWC[:, a:b], 1) for a, b in window_bounds(size[0], bins)]
        x = jnp.stack(rows, axis=1)
        return jnp.stack([largest(x[:, :, a:b], 2) for a, b in window_bounds(size[1], bins)], 2)
    x = x_BHWC
    for axis in (1, 2):
        inside = cells_pooling_matrix(cells[:, axis - 1], size[axis - 1], bins) > 0
        inside = jnp.expand_dims(inside, (4 - axis, 4))  # [B, bins, H, 1, 1], [B, bins, 1, W, 1]
        windows = [jnp.where(inside[:, i], x, -jnp.inf).max(axis) for i in range(bins)]
        x = jnp.stack(windows, axis)
    return x


def largest(x: jax.Array, axis: int) -> jax.Array:
    """The maximum along an axis, with the gradient to the first cell that attains it.

    The gradient of `jnp.max` looks for the cells equal to the maximum. If the compiler computes the
    cells again with other rounding, it finds none and divides by zero.
    """
    index = jnp.argmax(x, axis, keepdims=True)
    chosen = jax.lax.broadcasted_iota(index.dtype, x.shape, axis) == index
    return jnp.sum(jnp.where(chosen, x, 0), axis)
