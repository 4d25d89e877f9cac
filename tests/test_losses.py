"""The loss against cross-entropy written out in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psp_jax.losses import segmentation_loss
from psp_jax.model.resample import resize_matrix


def loss_by_numpy(logits, labels, rows, columns):
    """Mean over valid pixels of -log softmax at the label, from the full-size logits."""
    full = np.einsum('oh,bhwc,pw->bopc', rows, logits.astype(float), columns)
    full -= full.max(-1, keepdims=True)
    log_probabilities = full - np.log(np.exp(full).sum(-1, keepdims=True))
    valid = labels != 255
    picked = np.take_along_axis(
        log_probabilities, np.where(valid, labels, 0)[..., None].astype(int), -1
    )[..., 0]
    return -(picked * valid).sum() / max(valid.sum(), 1)


def example(rng, batch, height, width, classes, align_corners=True):
    features = -(-height // 8), -(-width // 8)
    logits = rng.normal(scale=3, size=(batch, *features, classes)).astype(np.float32)
    labels = rng.integers(0, classes, (batch, height, width)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.3] = 255
    matrices = [
        resize_matrix(f, s, align_corners) for f, s in zip(features, (height, width), strict=True)
    ]
    return logits, labels, matrices


def loss_of(logits, labels, align_corners=True):
    return segmentation_loss(jnp.asarray(logits), labels, labels.shape[1:], align_corners)


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([9, 32, 33, 41, 65]),
    st.sampled_from([17, 73]),
    st.integers(2, 9),
    st.booleans(),
)
def test_loss_equals_numpy(seed, height, width, classes, align_corners):
    rng = np.random.default_rng(seed)
    logits, labels, matrices = example(rng, 2, height, width, classes, align_corners)
    expected = loss_by_numpy(logits, labels, *matrices)
    assert float(loss_of(logits, labels, align_corners)) == pytest.approx(expected, rel=1e-5)


def test_rows_below_the_image_do_not_count():
    """As images have them that are split over devices."""
    logits, labels, matrices = example(np.random.default_rng(2), 2, 41, 17, 5)
    padded = np.pad(labels, ((0, 0), (0, 23), (0, 0)), constant_values=255)
    loss = segmentation_loss(jnp.asarray(logits), jnp.asarray(padded), (41, 17), True)
    assert float(loss) == pytest.approx(loss_by_numpy(logits, labels, *matrices), rel=1e-5)


def test_gradient_equals_finite_differences():
    logits, labels, matrices = example(np.random.default_rng(3), 1, 41, 17, 4)
    gradient = jax.grad(loss_of)(jnp.asarray(logits), labels)
    for index in [(0, 0, 0, 0), (0, 2, 1, 3), (0, 5, 2, 1)]:
        step = np.zeros_like(logits)
        step[index] = 1e-3
        up, down = (loss_by_numpy(logits + s, labels, *matrices) for s in (step, -step))
        assert float(gradient[index]) == pytest.approx((up - down) / 2e-3, rel=1e-2, abs=1e-6)


def test_no_valid_pixel_gives_loss_zero_and_finite_gradients():
    logits, labels, _ = example(np.random.default_rng(4), 2, 33, 33, 5)
    labels[:] = 255
    loss, gradient = jax.value_and_grad(loss_of)(jnp.asarray(logits), labels)
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)


def test_no_full_resolution_logits_of_the_whole_batch_are_held():
    logits, labels, _ = example(np.random.default_rng(5), 2, 257, 257, 20)
    gradient = jax.jit(jax.grad(loss_of))
    compiled = gradient.lower(jnp.asarray(logits), jnp.asarray(labels)).compile()
    full = 2 * 257 * 257 * 20 * 4  # bytes
    assert compiled.memory_analysis().temp_size_in_bytes < full
