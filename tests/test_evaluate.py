"""Evaluation against a naive loop over images, whatever the batch size and number of devices."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from several import LITTLE_OPTIMISATION, free_port

from psp_jax.config import default_config
from psp_jax.data.pipeline import holds_classes
from psp_jax.data.sources import Source
from psp_jax.inference import protocols
from psp_jax.inference.programs import Example, make_batches
from psp_jax.model import pspnet
from psp_jax.state import enable_float64, init_variables, jit_for_one_call

ROOT = Path(__file__).parent.parent
SIZES = [(40, 57), (33, 33), (64, 48)]
CLASSES = 5


def config_of_test(batch_size=4, base_size=49, protocol='whole'):
    config = default_config()
    config.eval.protocol, config.data.crop = protocol, 33
    batch_size = batch_size or 1
    config.eval.multiple = 48  # one canvas for all: fewer programs, and filler beyond images
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
    variables = dict(jit_for_one_call(lambda: init_variables(model, 0))())
    # The running statistics of some data, so that activations are of a natural size.
    images = np.stack([cv2.resize(read(i)[0], (49, 49)) for i in range(4)])
    updated = batch_stats_after(config, variables, images)
    variables['batch_stats'] = jax.tree.map(lambda x: x * 10, updated)
    return variables, model


def batch_stats_after(config, variables, images):
    """The running statistics after one update by a batch of uint8 images."""
    model = pspnet.build(config)
    _, updates = jit_for_one_call(
        lambda v, x: model.apply(
            v,
            pspnet.normalise(x, config),
            True,
            mutable=['batch_stats'],
            rngs={'dropout': jax.random.key(0)},
        )
    )(variables, images)
    return updates['batch_stats']


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


SCRIPT = """
import sys
import jax, numpy as np
devices, processes, process, port, path, *runs = sys.argv[1:]
jax.config.update('jax_num_cpu_devices', int(devices))
if processes != '1':
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(f'localhost:{port}', int(processes), int(process))
import test_evaluate as t
from psp_jax.evaluate import make_evaluator
out = {}
for run in runs:
    protocol, batch_size = run.split(',')
    config = t.config_of_test(int(batch_size), protocol=protocol)
    variables, model = t.variables_and_model(config)
    if batch_size == '0':
        out[run] = t.naive_confusion(variables, model, config)
        continue
    evaluator = make_evaluator(config, model, t.SOURCE)
    result = evaluator.evaluate(variables, 7)
    assert result.scores['step'] == 7 and result.scores['images'] == 11
    out[run], out[f'each of {run}'] = result.confusion, result.each
    assert sorted(result.panels) == ([0, 10] if process == '0' else [])
if process == '0':
    np.savez(path, **out)
"""


def confusions(folder, environment, devices, runs, processes=1):
    """What `runs` ('PROTOCOL,BATCH_SIZE', 0 for the naive loop) count, on so many CPU devices."""
    port, path = free_port(), folder / f'{devices}x{processes}.npz'
    workers = [
        subprocess.Popen(
            [sys.executable, '-c', SCRIPT, *map(str, (devices, processes, i, port, path)), *runs],
            env=os.environ
            | environment
            | LITTLE_OPTIMISATION
            | {'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}'},
        )
        for i in range(processes)
    ]
    assert [worker.wait(timeout=900) for worker in workers] == [0] * processes
    return {f'{processes} x {devices}, {k}': v for k, v in np.load(path).items()}


def assert_all_equal(found):
    valid = sum(int((read(i)[1] != 255).sum()) for i in range(SOURCE.length))
    for protocol in {name.split(', ')[1].split(',')[0] for name in found if 'each' not in name}:
        of_protocol = {k: v for k, v in found.items() if protocol in k and 'each' not in k}
        first = next(iter(of_protocol.values()))
        assert first.sum() == valid and len(of_protocol) >= 2
        assert (first.sum(0) > 0).sum() >= 2  # the network does not say the same everywhere
        for name, confusion in of_protocol.items():
            assert confusion.dtype == np.int64
            np.testing.assert_array_equal(confusion, first, err_msg=name)
        each = [v for k, v in found.items() if protocol in k and 'each' in k]
        for other in each:
            np.testing.assert_array_equal(other, each[0])


def test_every_image_counts_exactly_once(tmp_path, programs):
    """Promise 6: the same counts at any batch size, on one device or eight, as a naive loop's."""
    found = confusions(tmp_path, programs, 1, ['whole,0', 'whole,4'])
    assert_all_equal(found | confusions(tmp_path, programs, 8, ['whole,3']))


@pytest.mark.slow
def test_eight_devices_and_two_processes_count_as_one(tmp_path, programs):
    found = confusions(tmp_path, programs, 1, ['whole,4', 'semseg,3'])
    found |= confusions(tmp_path, programs, 8, ['semseg,8'])
    found |= confusions(tmp_path, programs, 2, ['whole,3', 'semseg,4'], processes=2)
    assert_all_equal(found)


def examples_of(sizes, config):
    """What evaluation makes of images of these sizes."""
    for number, size in enumerate(sizes):
        image, label = np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8)
        blocks = protocols.blocks(image, config, CLASSES)
        yield [Example(number, image, label, block, len(blocks)) for block in blocks]


@pytest.mark.parametrize('protocol', ['whole', 'semseg'])
def test_batches_hold_every_example_once(protocol):
    config = config_of_test(protocol=protocol)
    rng = np.random.default_rng(0)
    sizes = [tuple(rng.integers(20, 90, 2)) for _ in range(40)]
    batches = list(make_batches(examples_of(sizes, config), 3))
    assert sorted(example.number for batch in batches for example in batch) == list(range(40))
    for batch in batches:
        assert 1 <= len(batch) <= 3
        assert len({example.block.kind for example in batch}) == 1


@pytest.mark.parametrize('protocol', ['whole', 'mmseg'])
def test_hundreds_of_image_sizes_compile_few_networks(protocol):
    config = config_of_test(base_size=512, protocol=protocol)
    config.eval.multiple = 64 if protocol == 'whole' else 256
    rng = np.random.default_rng(0)
    sizes = [tuple(rng.integers(200, 1200, 2)) for _ in range(300)]
    kinds = {e.block.kind for es in examples_of(sizes, config) for e in es}
    assert len(kinds) <= 15


def test_labels_may_hold_no_class_until_the_last():
    def ignored(index):
        image, label = read(index)
        return image, np.full_like(label, 255)

    for source in (SOURCE._replace(read=ignored), SOURCE._replace(labelled=False)):
        assert not holds_classes(source, threads=2)
    last = SOURCE._replace(read=lambda index: (read if index == 10 else ignored)(index))
    assert holds_classes(last, threads=2)
