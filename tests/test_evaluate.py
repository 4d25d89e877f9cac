"""Evaluation against a naive loop over images, whatever the batch size and number of devices."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from psp_jax.config import default_config
from psp_jax.data.sources import Source
from psp_jax.evaluate import full_matrix, make_batches, network_size
from psp_jax.model import pspnet
from psp_jax.state import enable_float64, init_variables

ROOT = Path(__file__).parent.parent
SIZES = [(40, 57), (33, 33), (64, 48)]
CLASSES = 5


def config_of_test(batch_size=4, base_size=49):
    config = default_config()
    config.dtype = 'float64'
    config.data.classes = str(CLASSES)
    config.data.threads = 2
    config.model.depth, config.model.stem = 18, 'deep_small'
    config.model.head_width = config.model.aux_width = 8
    config.eval.batch_size, config.eval.base_size, config.eval.panels = batch_size, base_size, 2
    return config


def read(index):
    """Example `index` of eleven, of three sizes, with ignored pixels."""
    rng = np.random.default_rng(index)
    size = SIZES[index % 3]
    image = cv2.resize(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8), size[::-1])
    label = rng.integers(0, CLASSES, size).astype(np.uint8)
    label[rng.random(size) < 0.2] = 255
    return image, label


SOURCE = Source(length=11, name=lambda index: f'example {index}', read=read)


def variables_and_model(config):
    enable_float64(config)
    model = pspnet.build(config)
    variables = dict(jax.jit(lambda: init_variables(model, 0))())
    # The running statistics of some data, so that activations are of a natural size.
    images = np.stack([cv2.resize(read(i)[0], (49, 49)) for i in range(4)])
    _, updates = jax.jit(
        lambda v, x: model.apply(
            v,
            pspnet.normalise(x, config),
            True,
            mutable=['batch_stats'],
            rngs={'dropout': jax.random.key(0)},
        )
    )(variables, images)
    variables['batch_stats'] = jax.tree.map(lambda x: x * 10, updates['batch_stats'])
    return variables, model


def naive_confusion(variables, model, config):
    """One image at a time: cv2.resize, the network, np.interp per axis, argmax, np.add.at."""
    confusion = np.zeros((CLASSES, CLASSES), np.int64)
    forward = jax.jit(lambda x: model.apply(variables, pspnet.normalise(x, config), False)[0])
    for index in range(SOURCE.length):
        image, label = read(index)
        scale = 49 / max(label.shape)
        height, width = (8 * round((side * scale - 1) / 8) + 1 for side in label.shape)
        seen = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        scores = np.asarray(forward(seen[None])[0])
        for axis, sizes in ((0, (height, label.shape[0])), (1, (width, label.shape[1]))):
            for size in sizes:
                old = scores.shape[axis]
                points = np.linspace(0, old - 1, size)
                scores = np.apply_along_axis(
                    lambda line, p=points, n=old: np.interp(p, np.arange(n), line), axis, scores
                )
        valid = label != 255
        np.add.at(confusion, (label[valid], scores.argmax(-1)[valid]), 1)
    return confusion


def test_every_image_counts_exactly_once(tmp_path):
    """Promise 6: the same counts at any batch size, on one device or eight, as a naive loop's."""
    script = (
        'import jax, sys, numpy as np\n'
        'jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))\n'
        'import test_evaluate as t\n'
        'from psp_jax.evaluate import make_evaluator\n'
        'config = t.config_of_test()\n'
        'variables, model = t.variables_and_model(config)\n'
        'out = {}\n'
        'for batch_size in map(int, sys.argv[3:]):\n'
        '    config = t.config_of_test(batch_size)\n'
        '    result = make_evaluator(config, model, t.SOURCE)(variables, 7)\n'
        '    assert result.scores["step"] == 7 and result.scores["images"] == 11\n'
        '    out[f"b{batch_size}"] = result.confusion\n'
        'if sys.argv[1] == "1":\n'
        '    out["naive"] = t.naive_confusion(variables, model, config)\n'
        'np.savez(sys.argv[2], **out)\n'
    )
    found = {}
    for devices, batch_sizes in ((1, ('1', '4', '16')), (8, ('3',))):
        path = tmp_path / f'{devices}.npz'
        subprocess.run(
            [sys.executable, '-c', script, str(devices), str(path), *batch_sizes],
            check=True,
            timeout=900,
            env={**os.environ, 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}'},
        )
        found |= {f'{devices} devices, {k}': v for k, v in np.load(path).items()}
    valid = sum(int((read(i)[1] != 255).sum()) for i in range(SOURCE.length))
    naive = found['1 devices, naive']
    assert naive.sum() == valid
    assert (naive.sum(0) > 0).sum() >= 2  # the network does not say the same everywhere
    for name, confusion in found.items():
        assert confusion.dtype == np.int64
        np.testing.assert_array_equal(confusion, naive, err_msg=name)


def test_batches_hold_every_example_once():
    config = config_of_test()
    seen = []
    for batch in make_batches(((i, *read(i)) for i in range(11)), 4, config):
        assert len(batch.images) == len(batch.labels) == len(batch.rows) == 4
        assert (batch.labels[len(batch.indices) :] == 255).all()
        for row, index in enumerate(batch.indices):
            image, label = read(index)
            np.testing.assert_array_equal(batch.originals[row][0], image)
            height, width = label.shape
            np.testing.assert_array_equal(batch.labels[row, :height, :width], label)
            # Nothing else on the canvas counts.
            assert (batch.labels[row] != 255).sum() == (label != 255).sum()
        seen += batch.indices
    assert sorted(seen) == list(range(11))


def test_hundreds_of_image_sizes_compile_few_networks():
    config = config_of_test(base_size=512)
    config.eval.multiple = 64
    rng = np.random.default_rng(0)
    sizes = [tuple(rng.integers(200, 1200, 2)) for _ in range(300)]
    examples = (
        (i, np.zeros((*s, 3), np.uint8), np.zeros(s, np.uint8)) for i, s in enumerate(sizes)
    )
    batches = [(b.images.shape, len(b.indices)) for b in make_batches(examples, 4, config)]
    assert sum(count for _, count in batches) == 300
    assert len({shape for shape, _ in batches}) <= 15


@pytest.mark.parametrize(
    ('size', 'base', 'multiple', 'align_corners', 'expected'),
    [
        ((360, 480), 481, 8, True, (361, 481)),
        ((1024, 2048), 2048, 8, True, (1025, 2049)),
        ((473, 473), 0, 8, True, (473, 473)),
        ((512, 683), 512, 8, True, (385, 513)),
        ((512, 683), 512, 8, False, (384, 512)),
        ((512, 700), 512, 64, True, (385, 513)),
        ((5, 5), 0, 8, True, (9, 9)),
    ],
)
def test_network_sees_sizes_that_fit_its_stride(size, base, multiple, align_corners, expected):
    assert network_size(size, base, multiple, align_corners) == expected


def test_logits_are_resized_in_the_references_two_steps():
    line = np.random.default_rng(0).normal(size=61)
    once = np.interp(np.linspace(0, 60, 481), np.arange(61), line)
    twice = np.interp(np.linspace(0, 480, 480), np.arange(481), once)
    np.testing.assert_allclose(full_matrix(61, 481, 480, True) @ line, twice, atol=1e-12)
