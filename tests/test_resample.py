"""Pooling and interpolation against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psp_jax.model.resample import average_pool, max_pool, resize, resize_matrix

SIZES = (13, 60, 64, 65, 90)
BINS = (1, 2, 3, 6)


def pooled_by_loop(x: np.ndarray, bins: int, reduce) -> np.ndarray:
    """Adaptive pooling of [B, H, W, C], window by window, in float64."""
    _, height, width, _ = x.shape
    out = np.zeros((x.shape[0], bins, bins, x.shape[3]))
    for i in range(bins):
        for j in range(bins):
            top, bottom = int(np.floor(i * height / bins)), int(np.ceil((i + 1) * height / bins))
            left, right = int(np.floor(j * width / bins)), int(np.ceil((j + 1) * width / bins))
            out[:, i, j] = reduce(x[:, top:bottom, left:right].astype(float), axis=(1, 2))
    return out


def interpolated(line: np.ndarray, new_size: int, align_corners: bool) -> np.ndarray:
    """One line resized by np.interp at the points that the convention names."""
    size = len(line)
    if align_corners:
        points = np.linspace(0, size - 1, new_size) if new_size > 1 else np.zeros(1)
    else:
        points = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    return np.interp(points, np.arange(size), line)


@pytest.mark.parametrize('bins', BINS)
@pytest.mark.parametrize('size', SIZES)
def test_pooling_equals_a_loop_over_windows(size, bins):
    x = np.random.default_rng(size * 10 + bins).normal(size=(2, size, size + 3, 3))
    x = x.astype(np.float32)
    average, largest = average_pool(jnp.asarray(x), bins), max_pool(jnp.asarray(x), bins)
    np.testing.assert_allclose(average, pooled_by_loop(x, bins, np.mean), atol=2e-6)
    np.testing.assert_array_equal(largest, pooled_by_loop(x, bins, np.max))


def test_max_pooling_sends_its_gradient_to_one_cell_of_each_window():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 12, 12, 2)), jnp.float32)
    gradient = np.asarray(jax.grad(lambda x: max_pool(x, 3).sum())(x))
    assert set(np.unique(gradient)) == {0, 1}
    windows = gradient.reshape(1, 3, 4, 3, 4, 2)
    np.testing.assert_array_equal(windows.sum((2, 4)), 1)
    cells = np.asarray(x).reshape(windows.shape)
    np.testing.assert_array_equal((windows * cells).sum((2, 4)), cells.max((2, 4)))


def test_neighbouring_bins_share_cells_as_the_reference_does():
    # 64 cells in 3 bins: 0..21, 21..42 and 42..63
    x = jnp.zeros((1, 64, 64, 1)).at[0, 21, 0, 0].set(1.0)
    assert [float(v) > 0 for v in average_pool(x, 3)[0, :, 0, 0]] == [True, True, False]


@pytest.mark.parametrize('align_corners', [True, False])
@pytest.mark.parametrize('size', (1, 2, 3, 6, *SIZES))
def test_resizing_equals_numpy_interpolation(size, align_corners):
    rng = np.random.default_rng(size)
    for new_size in (1, 2, 25, 60, 473):
        line = rng.normal(size=size)
        matrix = resize_matrix(size, new_size, align_corners)
        np.testing.assert_allclose(matrix.sum(1), 1)
        expected = interpolated(line, new_size, align_corners)
        np.testing.assert_allclose(matrix @ line, expected, atol=1e-12)


@pytest.mark.parametrize('align_corners', [True, False])
def test_both_axes_are_resized(align_corners):
    x = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)
    expected = x
    for axis, size in ((1, 17), (2, 30)):
        expected = np.apply_along_axis(interpolated, axis, expected, size, align_corners)
    np.testing.assert_allclose(resize(jnp.asarray(x), (17, 30), align_corners), expected, atol=1e-5)


def test_a_single_cell_is_spread_over_the_whole_map():
    x = jnp.full((1, 1, 1, 2), 3.0)
    for align_corners in (True, False):
        np.testing.assert_array_equal(
            resize(x, (60, 60), align_corners), np.full((1, 60, 60, 2), 3)
        )
