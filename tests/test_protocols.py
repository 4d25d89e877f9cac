"""Protocols against plain loops over windows in numpy and OpenCV, and known window grids."""

import math

import cv2
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import monitoring
from test_evaluate import batch_stats_after

from psp_jax.config_check import resolve
from psp_jax.data.sources import Source
from psp_jax.evaluate import make_evaluator
from psp_jax.inference import protocols
from psp_jax.model import pspnet
from psp_jax.predict import Predictor
from psp_jax.state import init_variables, jit_for_one_call

CLASSES = 5
MULTI = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
SMALL = {
    'data.classes': str(CLASSES),
    'data.crop': 33,
    'data.threads': 2,
    'model.depth': 18,
    'model.stem': 'deep_small',
    'model.head_width': 32,
    'model.aux_width': 16,
    'eval.base_size': 60,
    'eval.scales': (0.5, 1.0, 1.75),
    'eval.batch_size': 3,
}


def config_of(protocol, **keys):
    return resolve(SMALL | {'eval.protocol': protocol} | keys)


@pytest.fixture(scope='module')
def variables():
    """Made-up weights by which every class is predicted somewhere."""
    config = config_of('whole')
    made = jit_for_one_call(lambda: init_variables(pspnet.build(config), 3))()
    images = np.stack([picture((33, 33), seed) for seed in range(8)])
    updated = batch_stats_after(config, made, images)
    # One update goes a tenth of the way to the images' own statistics.
    stats = jax.tree.map(lambda new, old: old + 10 * (new - old), updated, made['batch_stats'])
    head = made['params']['head']
    classifier = jax.tree.map(lambda x: 8 * x, head['classifier'])
    params = made['params'] | {'head': head | {'classifier': classifier}}
    return {'params': params, 'batch_stats': stats}


def picture(size, seed=0):
    rng = np.random.default_rng([*size, seed])
    coarse = rng.integers(0, 256, (size[0] // 6 + 2, size[1] // 6 + 2, 3)).astype(np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


# ---- The plain loops


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def aligned(x, size):
    """Bilinear with aligned corners, float64."""
    for axis in (0, 1):
        old = x.shape[axis]
        at = np.linspace(0, old - 1, size[axis]) if size[axis] > 1 else np.zeros(1)
        x = np.apply_along_axis(lambda line, a=at, n=old: np.interp(a, np.arange(n), line), axis, x)
    return x


def by_opencv(x, size):
    channels = [
        cv2.resize(np.ascontiguousarray(x[..., c]), size[::-1], interpolation=cv2.INTER_LINEAR)
        for c in range(x.shape[-1])
    ]
    return np.stack(channels, -1)


def imresize(x, size):
    """MATLAB's, bilinear, from its documentation: pixel by pixel of an axis."""
    for axis in (0, 1):
        old, new = x.shape[axis], size[axis]
        scale = new / old
        stretch = min(scale, 1)
        width = 2 / stretch
        lines = np.moveaxis(x, axis, 0)
        out = []
        for i in range(1, new + 1):
            u = i / scale + 0.5 * (1 - 1 / scale)
            left = math.floor(u - width / 2)
            total, weight = 0, 0
            for j in range(left, left + math.ceil(width) + 2):
                w = stretch * max(0, 1 - abs(stretch * (u - j)))
                mirrored = [*range(old), *range(old - 1, -1, -1)][(j - 1) % (2 * old)]
                total, weight = total + w * lines[mirrored], weight + w
            out.append(total / weight)
        x = np.moveaxis(np.stack(out), 0, axis)
    return x


class Loop:
    """One image, one window at a time; `logits` runs the network on it alone."""

    def __init__(self, config, variables):
        self.config, model = config, pspnet.build(config)
        self.mean, self.std = np.array(config.data.mean), np.array(config.data.std)
        self.crop = config.data.crop
        self.forward = jax.jit(lambda x: model.apply(variables, x, False)[0])

    def logits(self, window):
        """Float RGB [h, w, 3] -> [h, w, classes]."""
        x = ((window - self.mean) / self.std)[None].astype(np.float32)
        found = np.asarray(self.forward(x)[0], np.float64)
        resize = aligned if self.config.model.align_corners else by_opencv
        return resize(found, window.shape[:2])

    def grid(self, picture, score):
        h, w = picture.shape[:2]
        stride = math.ceil(self.crop * 2 / 3)
        total, count = np.zeros((h, w, CLASSES)), np.zeros((h, w, 1))
        for i in range(math.ceil(max(h - self.crop, 0) / stride) + 1):
            for j in range(math.ceil(max(w - self.crop, 0) / stride) + 1):
                y2, x2 = min(i * stride + self.crop, h), min(j * stride + self.crop, w)
                y, x = max(y2 - self.crop, 0), max(x2 - self.crop, 0)
                total[y:y2, x:x2] += score(picture[y:y2, x:x2])
                count[y:y2, x:x2] += 1
        return total / count

    def semseg(self, image, base, scales):
        total = 0
        h, w = image.shape[:2]
        for scale in scales:
            long = max(round(scale * base), 1)
            nh, nw = (long, round(long / h * w)) if h > w else (round(long / w * h), long)
            nh, nw = max(nh, 1), max(nw, 1)  # where the reference fails
            seen = cv2.resize(image.astype(np.float32), (nw, nh), interpolation=cv2.INTER_LINEAR)
            top, left = max(self.crop - nh, 0) // 2, max(self.crop - nw, 0) // 2
            bottom, right = max(self.crop - nh, 0) - top, max(self.crop - nw, 0) - left
            border = (seen, top, bottom, left, right, cv2.BORDER_CONSTANT)
            padded = cv2.copyMakeBorder(*border, value=self.mean.tolist())

            def score(window):
                mirrored = self.logits(window[:, ::-1])[:, ::-1]
                return (softmax(self.logits(window)) + softmax(mirrored)) / 2

            found = self.grid(padded, score)[top : top + nh, left : left + nw]
            total += by_opencv(found, (h, w))
        return total / len(scales)

    def caffe(self, image, base, scales):
        total = 0
        h, w = image.shape[:2]
        for scale in scales:
            long = round(base * scale) + 1
            half_up = lambda x: math.floor(x + 0.5)  # noqa: E731
            nh, nw = (long, half_up(long / h * w)) if h > w else (half_up(long / w * h), long)
            seen = np.floor(imresize(image.astype(float), (nh, nw)) + 0.5 + 1e-9)
            padded = np.tile(self.mean, (max(nh, self.crop), max(nw, self.crop), 1))
            padded[:nh, :nw] = seen

            def score(window):
                return softmax(self.logits(window) + self.logits(window[:, ::-1])[:, ::-1])

            found = imresize(self.grid(padded, score)[:nh, :nw], (h, w))
            total += found / found.sum(-1, keepdims=True)
        return total / len(scales)

    def _mmseg(self, image, base, scales, mirror, score):
        total, views = 0, 0
        h, w = image.shape[:2]
        resize = aligned if self.config.model.align_corners else by_opencv
        for scale in scales:
            factor = min(2048 * scale / max(h, w), base * scale / min(h, w))
            size = int(w * factor + 0.5), int(h * factor + 0.5)
            seen = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
            for step in (1, -1) if mirror else (1,):
                found = resize(score(seen[:, ::step].astype(float)), (h, w))
                total, views = total + softmax(found[:, ::step]), views + 1
        return total / views

    def mmseg(self, image, base, scales, mirror=False):
        return self._mmseg(image, base, scales, mirror, self.logits)

    def mmseg_slide(self, image, base, scales, mirror=False):
        return self._mmseg(image, base, scales, mirror, lambda seen: self.grid(seen, self.logits))


def assert_equal(found, expected):
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    same = found.argmax(-1) == expected.argmax(-1)
    assert same.mean() >= 0.9999
    return expected.argmax(-1)


SIZES = [(45, 60), (61, 40), (20, 27), (33, 33), (9, 100), (130, 16), (16, 16), (150, 201)]


@pytest.mark.parametrize('protocol', ['semseg', pytest.param('caffe', marks=pytest.mark.slow)])
def test_sliding_protocols_equal_a_loop_over_windows(protocol, variables):
    config = config_of(protocol)
    predictor, loop = Predictor(config, variables), Loop(config, variables)
    seen = set()
    for size in SIZES:
        image = picture(size)
        expected = getattr(loop, protocol)(image, 60, config.eval.scales)
        seen |= set(np.unique(assert_equal(predictor.probabilities(image), expected)))
        np.testing.assert_array_equal(predictor(image), predictor.probabilities(image).argmax(-1))
    assert len(seen) >= 3  # the network does not say the same everywhere


@pytest.mark.parametrize(
    ('align_corners', 'flip'),
    [(False, 'auto'), pytest.param(True, 'true', marks=pytest.mark.slow)],
)
@pytest.mark.parametrize('protocol', ['mmseg_slide', pytest.param('mmseg', marks=pytest.mark.slow)])
def test_mmsegmentations_protocols_equal_a_loop(protocol, align_corners, flip, variables):
    keys = {'model.align_corners': align_corners, 'eval.flip': flip, 'eval.multiple': 64}
    config = config_of(protocol, **keys, **{'eval.base_size': 40, 'eval.scales': (0.5, 1.25)})
    predictor, loop = Predictor(config, variables), Loop(config, variables)
    for size in SIZES[1:2] if flip == 'auto' else SIZES[2:3]:
        image = picture(size)
        expected = getattr(loop, protocol)(image, 40, (0.5, 1.25), flip == 'true')
        assert_equal(predictor.probabilities(image), expected)


@pytest.fixture(scope='module')
def semseg(variables):
    config = config_of('semseg', **{'eval.scales': (0.75, 1.5)})
    return Predictor(config, variables), Loop(config, variables)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(height=st.integers(1, 140), width=st.integers(1, 140))
def test_any_size_equals_a_loop_over_windows(semseg, height, width):
    predictor, loop = semseg
    image = picture((height, width))
    found = predictor.probabilities(image)
    np.testing.assert_allclose(found, loop.semseg(image, 60, (0.75, 1.5)), atol=1e-4)


def test_an_image_in_blocks_equals_the_image_at_once(variables, monkeypatch):
    config = config_of('semseg', **{'eval.base_size': 0, 'eval.scales': (1.0, 1.5)})
    image = picture((90, 130))
    whole = Predictor(config, variables).probabilities(image)
    monkeypatch.setattr(protocols, 'CANVAS_BYTES', 2 * 150**2 * CLASSES * 4)
    assert len(protocols.blocks(image, config, CLASSES)) > 3
    np.testing.assert_allclose(Predictor(config, variables).probabilities(image), whole, atol=1e-6)


# ---- Known values


def starts(size, config, scale):
    view = protocols.view(size, scale, False, config)
    return view.size, view.rows.starts, view.columns.starts


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
    seen, rows, columns = starts((512, 683), config, scale)
    assert seen == size and len(rows) * len(columns) == windows
    if scale == 1.0:
        assert (rows, columns) == ((0,), (0, 39))


@pytest.mark.parametrize(
    ('scale', 'windows'), [(0.5, 2), (0.75, 6), (1.0, 8), (1.25, 15), (1.5, 18), (1.75, 32)]
)
def test_window_grids_of_cityscapes_are_the_references(scale, windows):
    config = config_of('semseg', **{'data.crop': 713, 'eval.base_size': 2048})
    _, rows, columns = starts((1024, 2048), config, scale)
    assert len(rows) * len(columns) == windows
    if scale == 1.0:
        assert (rows, columns) == ((0, 311), (0, 476, 952, 1335))


@pytest.mark.parametrize(
    ('protocol', 'size', 'base', 'scale', 'expected'),
    [
        ('whole', (360, 480), 481, 1.0, (361, 481)),
        ('whole', (1024, 2048), 2048, 1.0, (1025, 2049)),
        ('whole', (473, 473), 0, 1.0, (473, 473)),
        ('whole', (512, 683), 512, 1.0, (385, 513)),
        ('whole', (5, 5), 0, 1.0, (9, 9)),
        ('whole', (360, 480), 481, 0.5, (177, 241)),
        ('caffe', (512, 683), 512, 1.0, (385, 513)),
        ('caffe', (1024, 2048), 2048, 1.0, (1025, 2049)),
        ('mmseg', (512, 683), 512, 1.0, (512, 683)),
        ('mmseg', (300, 3000), 512, 1.0, (205, 2048)),
        ('mmseg', (1024, 2048), 1024, 1.75, (1792, 3584)),
        ('mmseg', (1024, 2048), 1025, 1.0, (1025, 2049)),
        ('semseg', (1, 1), 1, 0.5, (1, 1)),
        ('semseg', (5, 5), 7, 0.5, (4, 4)),
        ('semseg', (5, 5), 5, 0.5, (2, 2)),
    ],
)
def test_sizes_that_the_network_sees(protocol, size, base, scale, expected):
    config = config_of(protocol, **{'eval.base_size': base})
    assert protocols.seen_size(size, scale, config) == expected


def test_without_aligned_corners_sides_are_multiples_of_the_stride():
    config = config_of('whole', **{'eval.base_size': 512, 'model.align_corners': False})
    assert protocols.seen_size((512, 683), 1.0, config) == (384, 512)


def test_canvases_of_whole_images_are_multiples():
    config = config_of('whole', **{'eval.base_size': 512, 'eval.multiple': 64})
    view = protocols.view((512, 700), 1.0, False, config)
    assert (view.size, protocols.window_shape(view, config)) == ((377, 513), (385, 513))


def test_logits_are_resized_in_the_references_two_steps():
    line = np.random.default_rng(0).normal(size=61)
    once = np.interp(np.linspace(0, 60, 481), np.arange(61), line)
    twice = np.interp(np.linspace(0, 480, 480), np.arange(481), once)
    index, weight = protocols.full_taps(61, 481, 480, True)
    np.testing.assert_allclose((line[index] * weight).sum(1), twice, atol=1e-12)


# ---- Compilations


def test_few_compilations(variables):
    """Promise 7: six scales of 50 image sizes, by sliding windows, take at most eight programs."""
    rng = np.random.default_rng(0)
    sizes = [tuple(rng.integers(20, 150, 2)) for _ in range(50)]
    source = Source(50, str, lambda i: (picture(sizes[i]), np.zeros(sizes[i], np.uint8)))
    keys = {'eval.scales': MULTI, 'eval.base_size': 33, 'eval.panels': 0}
    config = config_of('semseg', **keys)
    evaluate = make_evaluator(config, pspnet.build(config), source).evaluate
    compiled = []

    def count(event, _, **__):
        if event.endswith('backend_compile_duration'):
            compiled.append(event)

    monitoring.register_event_duration_secs_listener(count)
    result = evaluate(variables, 0)
    assert result.scores['images'] == 50
    assert result.confusion.sum() == sum(h * w for h, w in sizes)
    assert 1 <= len(compiled) <= 8
