"""Window grids, canvases and interpolation of views against known values."""

import numpy as np
import pytest
from plain_loops import config_of

from psp_jax.inference.views import chained, view
from psp_jax.model.resample import resize_taps

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@pytest.mark.parametrize(
    ('crop', 'size', 'windows', 'starts'),
    [
        (473, (384, 512), (1, 1, 2, 4, 4, 6), ((0,), (0, 39))),  # ADE20K
        (713, (1024, 2048), (2, 6, 8, 15, 18, 32), ((0, 311), (0, 476, 952, 1335))),  # Cityscapes
    ],
)
def test_window_grids_are_the_references(crop, size, windows, starts):
    config = config_of('semseg', **{'data.crop': crop, 'eval.base_size': max(size)})
    found = [view((3 * size[0], 3 * size[1]), scale, False, config) for scale in SCALES]
    assert tuple(len(view.sources) for view in found) == windows
    assert (found[2].seen, found[2].rows.starts, found[2].columns.starts) == (size, *starts)


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
