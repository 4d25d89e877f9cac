"""Probabilities of every protocol against plain loops over windows, and few compilations."""

import jax
import numpy as np
import pytest
from jax import monitoring
from plain_loops import CLASSES, Loop, config_of, picture, setup_and_variables

from psp_jax.data.sources import Source
from psp_jax.evaluate import Evaluator
from psp_jax.inference import blocks
from psp_jax.inference.programs import make_programs
from psp_jax.mesh import local_mesh
from psp_jax.predict import Predictor
from psp_jax.state import setup

SIZES = [(45, 60), (61, 40), (20, 27), (1, 1), (9, 100), (130, 16), (150, 201)]


def assert_equal(found, expected):
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.9999


MIRRORED = {'eval.flip': 'true', 'eval.multiple': 64}
CORNERS = {'model.align_corners': False, 'eval.multiple': 64}


@pytest.mark.parametrize(
    ('protocol', 'keys', 'sizes'),
    [
        ('semseg', {'eval.scales': (0.5, 1.0, 1.75)}, SIZES),
        pytest.param('caffe', {'eval.scales': (0.5, 1.75)}, SIZES, marks=pytest.mark.slow),
        ('whole', MIRRORED, SIZES[:3]),
        ('mmseg_slide', CORNERS | {'eval.scales': (0.5, 1.25), 'eval.base_size': 40}, SIZES[1:3]),
        pytest.param('mmseg', CORNERS | MIRRORED, SIZES[1:3], marks=pytest.mark.slow),
        pytest.param('mmseg_slide', MIRRORED, SIZES[2:3], marks=pytest.mark.slow),
    ],
)
def test_protocols_equal_a_loop_over_windows(protocol, keys, sizes):
    run, variables = setup_and_variables(protocol, **keys)
    predictor, loop = Predictor(run, variables), Loop(run, variables)
    seen = set()
    for size in sizes:
        expected = loop.probabilities(picture(size))
        assert_equal(predictor.probabilities(picture(size)), expected)
        seen |= set(np.unique(expected.argmax(-1)))
    assert len(seen) >= 2  # the network does not say the same everywhere


def test_an_image_in_blocks_equals_the_image_at_once(monkeypatch):
    keys = {'eval.base_size': 0, 'eval.scales': (1.0, 1.5)}
    run, variables = setup_and_variables('semseg', **keys)
    image = picture((90, 130))
    whole = Predictor(run, variables).probabilities(image)
    monkeypatch.setattr(blocks, 'CANVAS_BYTES', 2 * 150**2 * CLASSES * 4)
    assert len(blocks.blocks(image, run.config)) > 3
    np.testing.assert_allclose(Predictor(run, variables).probabilities(image), whole, atol=1e-6)


@pytest.mark.parametrize(
    ('protocol', 'expected'),
    [('whole', (3, 33, 57, 3)), ('semseg', (1, 3, 33, 33, 3)), ('mmseg_slide', (1, 3, 33, 33, 3))],
)
def test_shapes_for_a_dry_run_are_those_of_real_images(protocol, expected):
    run = setup(config_of(protocol, **{'eval.multiple': 8}))
    programs = make_programs(run, local_mesh(1))
    found = blocks.blocks(picture((35, 57)), run.config)
    (part,) = found[0].parts
    shapes = programs.input_shapes(part.view.input, len(part.view.sources))
    assert shapes[0].shape == expected and shapes[1].shape == (*expected[:-3], 2)
    seen = []

    def network(variables, images, sizes):
        seen.extend([images, sizes])
        return np.zeros((*images.shape[:-3], *part.view.canvas, CLASSES), np.float32)

    vars(programs)['network'] = network  # a cached property
    vars(programs)['add_window'] = lambda canvas, *_: canvas
    programs.canvases({}, found)
    assert [(x.shape, x.dtype) for x in seen[:2]] == [(x.shape, x.dtype) for x in shapes]


def test_few_compilations():
    """Promise 7: six scales of 50 image sizes, by sliding windows, take at most eight programs."""
    rng = np.random.default_rng(0)
    sizes = [tuple(rng.integers(20, 150, 2)) for _ in range(50)]
    source = Source(50, str, lambda i: (picture(sizes[i]), np.zeros(sizes[i], np.uint8)))
    scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    keys = {'eval.scales': scales, 'eval.base_size': 33, 'eval.panels': 0}
    run, variables = setup_and_variables('semseg', **keys)
    variables = jax.block_until_ready(variables)
    compiled = []

    def count(event, _, **__):
        if event.endswith('backend_compile_duration'):
            compiled.append(event)

    monitoring.register_event_duration_secs_listener(count)
    result = Evaluator(run, source).evaluate(variables, 0)
    assert result.scores['images'] == 50
    assert result.confusion.sum() == sum(h * w for h, w in sizes)
    assert 1 <= len(compiled) <= 8
