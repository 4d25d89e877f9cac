"""The network and its training beside an independent model in PyTorch (tests/parity)."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from parity import cases

torch = pytest.importorskip('torch', reason='PyTorch is not installed; make test-torch installs it')
pytestmark = pytest.mark.torch

from parity import our_side, torch_side  # noqa: E402  (needs torch)

from psp_jax.import_weights import semseg_name  # noqa: E402

ROOT = Path(__file__).parents[1]
VARIANTS = list(
    itertools.product((18, 50), ('full', 'contract'), (True, False), ('average', 'max'))
)


@pytest.mark.parametrize('size', [97, 473])
@pytest.mark.parametrize(('depth', 'dilation', 'align_corners', 'pool'), VARIANTS)
def test_logits_equal_pytorchs(size, depth, dilation, align_corners, pool, measured):
    network = (cases.R18 if depth == 18 else cases.R50)._replace(
        dilation=dilation, align_corners=align_corners, pool=pool
    )
    weights = cases.made_up(torch_side.shapes(network))
    images, _ = cases.pictures(1, size)
    theirs = torch_side.forward(network, weights, images)
    ours = our_side.forward(network, weights, images)
    name = f'R{depth} {dilation} align_corners={align_corners} {pool}, crop {size}'
    for kind, a, b in zip(('logits', 'aux_logits'), ours, theirs, strict=True):
        measured(f'{kind} of {name}', np.abs(a - b).max() / (b.max() - b.min()), 1e-4)


def report_of(*words: object) -> dict:
    command = [sys.executable, '-m', 'parity.training', *map(str, words)]
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(('.', 'tests'))}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize('depth', [18, 50])
def test_gradients_and_ten_training_steps_equal_pytorchs(depth, measured):
    report = report_of('--depth', depth, '--size', 97, '--steps', 10)
    for kind in ('losses', 'gradient', 'end'):
        measured(f'{kind} of R{depth}, crop 97, ten steps, float64', report[kind], 1e-7)


def test_gradients_in_float32_are_as_far_from_float64_as_pytorchs(measured):
    report = report_of('--depth', 50, '--size', 97, '--float32')
    for side in ('torch', 'ours'):
        line = f'of {report["gradients"]} gradients of R50 in float32 off by more than 1e-4, {side}'
        measured(line, report[side]['above 1e-4'], report['gradients'])
        measured(f'median distance of a gradient, {side}', report[side]['median'], 1)
    measured(
        'median distance, ours by theirs', report['ours']['median'] / report['torch']['median'], 3
    )


def test_every_name_of_semsegs_files_is_ours_and_back():
    for network in (cases.R18, cases.R50):
        config = our_side.config_of(network, 'float32')
        weights = cases.made_up(torch_side.shapes(network))
        variables = our_side.variables_of(config, weights)  # asserts that the names are the same
        head = variables['params']['head']['conv']['kernel']
        assert semseg_name('params/head/conv/kernel') == 'cls.0.weight'
        np.testing.assert_array_equal(head[2, 0, 5, 7], weights['cls.0.weight'][7, 5, 2, 0])
