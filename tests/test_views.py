"""Window grids, canvases and interpolation of views against known values."""

import numpy as np
import pytest
from plain_loops import config_of

from psp_jax.inference.views import chained, view
from psp_jax.model.resample import resize_taps


@pytest.mark.parametrize(
    ('scale', 'size', 'windows'),
    [
        (0.5, (192, 256), 1),
        (0.75, (288, 384), 1),
        (1.0, (384, 512), 2),
        (1.25, (480, 640), 4),
        (1.5, (576, 768), 4),
        (1.75, (672, 896), 6),
    ],
)
def test_window_grids_of_ade20k_are_the_references(scale, size, windows):
    config = config_of('semseg', **{'data.crop': 473, 'eval.base_size': 512})
    found = view((512, 683), scale, False, config)
    assert (found.seen, found.windows) == (size, windows)
    if scale == 1.0:
        assert (found.rows.starts, found.columns.starts) == ((0,), (0, 39))


@pytest.mark.parametrize(
    ('scale', 'windows'), [(0.5, 2), (0.75, 6), (1.0, 8), (1.25, 15), (1.5, 18), (1.75, 32)]
)
def test_window_grids_of_cityscapes_are_the_references(scale, windows):
    config = config_of('semseg', **{'data.crop': 713, 'eval.base_size': 2048})
    found = view((1024, 2048), scale, False, config)
    assert found.windows == windows
    if scale == 1.0:
        assert (found.rows.starts, found.columns.starts) == ((0, 311), (0, 476, 952, 1335))


def test_inputs_of_whole_images_are_multiples():
    config = config_of('whole', **{'eval.base_size': 512, 'eval.multiple': 64})
    found = view((512, 700), 1.0, False, config)
    assert (found.seen, found.input, found.canvas) == ((377, 513), (385, 513), (49, 65))


def test_images_of_one_long_side_share_a_canvas():
    config = config_of('semseg', **{'data.crop': 473, 'eval.base_size': 512})
    sizes = [(512, 683), (683, 512), (300, 900)]
    assert {view(size, 1.5, False, config).canvas for size in sizes} == {(768, 768)}
    config = config_of('mmseg_slide', **{'data.crop': 473, 'eval.base_size': 512})
    assert view((512, 683), 1.0, False, config).canvas == (512, 768)


def test_logits_are_resized_in_the_references_two_steps():
    line = np.random.default_rng(0).normal(size=61)
    once = np.interp(np.linspace(0, 60, 481), np.arange(61), line)
    twice = np.interp(np.linspace(0, 480, 480), np.arange(481), once)
    places, weight = chained(resize_taps(61, 481, True), resize_taps(481, 480, True))
    np.testing.assert_allclose((line[places] * weight).sum(1), twice, atol=1e-12)
