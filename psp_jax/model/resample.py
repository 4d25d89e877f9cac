"""Pooling and bilinear interpolation of feature maps as constant matrices.

Both are linear and separable, so each is one small matrix an axis: exact at every size, made of
matrix products (what accelerators are best at), and differentiable by construction. Max pooling
is not linear and takes its windows one by one.
"""

import jax
import jax.numpy as jnp
import numpy as np


def window_bounds(size: int, bins: int) -> list[tuple[int, int]]:
    """First and one-past-last cell of each of `bins` windows over an axis of `size` cells.

    Bin i covers cells floor(i * size / bins) to ceil((i + 1) * size / bins), as adaptive pooling
    does, so neighbouring windows may share a cell where `size` is no multiple of `bins`.
    """
    return [(i * size // bins, -(-(i + 1) * size // bins)) for i in range(bins)]


def pooling_matrix(size: int, bins: int) -> np.ndarray:
    """Averages an axis of `size` cells into `bins` cells: float64[bins, size], rows sum to 1."""
    matrix = np.zeros((bins, size))
    for row, (start, stop) in zip(matrix, window_bounds(size, bins), strict=True):
        row[start:stop] = 1.0 / (stop - start)
    return matrix


def resize_matrix(size: int, new_size: int, align_corners: bool) -> np.ndarray:
    """Interpolates an axis of `size` cells at `new_size` points: float64[new_size, size].

    Linear interpolation, no antialiasing. With `align_corners` the first and last cells coincide
    (point i lies at i * (size - 1) / (new_size - 1)); without, the axes' outer edges do (point i
    lies at (i + 0.5) * size / new_size - 0.5, clamped to the first cell). Rows sum to 1.
    """
    points = np.arange(new_size)
    if align_corners:
        position = points * ((size - 1) / max(new_size - 1, 1))
    else:
        position = np.maximum((points + 0.5) * (size / new_size) - 0.5, 0.0)
    low = np.minimum(position.astype(int), size - 1)
    high = np.minimum(low + 1, size - 1)
    weight = position - low
    matrix = np.zeros((new_size, size))
    np.add.at(matrix, (points, low), 1.0 - weight)
    np.add.at(matrix, (points, high), weight)
    return matrix


def apply_matrices(
    x_BHWC: jax.Array, rows: np.ndarray | jax.Array, columns: np.ndarray | jax.Array
) -> jax.Array:
    """Maps height by `rows` [newH, H] and width by `columns` [newW, W]: [B, newH, newW, C].

    Computed in float32 or better: weights such as 1/60 are not to be rounded to bfloat16.
    """
    exact = jnp.promote_types(x_BHWC.dtype, jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    x = jnp.einsum('oh,bhwc->bowc', rows.astype(exact), x_BHWC.astype(exact), precision=highest)
    x = jnp.einsum('pw,bowc->bopc', columns.astype(exact), x, precision=highest)
    return x.astype(x_BHWC.dtype)


def resize(x_BHWC: jax.Array, size: tuple[int, int], align_corners: bool) -> jax.Array:
    """Bilinear interpolation to `size` = (height, width), without antialiasing."""
    _, height, width, _ = x_BHWC.shape
    return apply_matrices(
        x_BHWC,
        resize_matrix(height, size[0], align_corners),
        resize_matrix(width, size[1], align_corners),
    )


def average_pool(x_BHWC: jax.Array, bins: int) -> jax.Array:
    """Adaptive average pooling to [B, bins, bins, C]."""
    _, height, width, _ = x_BHWC.shape
    return apply_matrices(x_BHWC, pooling_matrix(height, bins), pooling_matrix(width, bins))


def max_pool(x_BHWC: jax.Array, bins: int) -> jax.Array:
    """Adaptive max pooling to [B, bins, bins, C], over the same windows as `average_pool`."""
    _, height, width, _ = x_BHWC.shape
    rows = [largest(x_BHWC[:, a:b], 1) for a, b in window_bounds(height, bins)]
    x = jnp.stack(rows, axis=1)
    return jnp.stack([largest(x[:, :, a:b], 2) for a, b in window_bounds(width, bins)], axis=2)


def largest(x: jax.Array, axis: int) -> jax.Array:
    """The maximum along an axis, with the gradient to the first cell that attains it.

    `jnp.max` looks in its gradient for the cells equal to the maximum; where the compiler computes
    the cells anew and rounds otherwise it finds none, and divides by zero.
    """
    index = jnp.argmax(x, axis, keepdims=True)
    chosen = jax.lax.broadcasted_iota(index.dtype, x.shape, axis) == index
    return jnp.sum(jnp.where(chosen, x, 0), axis)
