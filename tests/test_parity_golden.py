"""Equality with PyTorch's results on file (tests/parity/golden.py makes them)."""

import json

import numpy as np
import pytest
from parity import cases, golden, our_side


@pytest.fixture(scope='module')
def on_file():
    return dict(np.load(golden.FILE))


@pytest.mark.parametrize('name', golden.NETWORKS)
def test_reference_numerics(name, on_file, programs, measured):
    images, _ = cases.pictures(1, 97)
    logits = our_side.forward(golden.NETWORKS[name], golden.weights(on_file, name), images)
    for kind, ours in zip(('logits', 'aux_logits'), logits, strict=True):
        theirs = on_file[f'{kind}/{name}']
        span = theirs.max() - theirs.min()
        measured(f'{kind} of {name}, float32', np.abs(ours - theirs).max() / span, 1e-4)


@pytest.mark.slow
def test_gradients_and_training_steps_equal_pytorchs(python, measured):
    run = python('-m', 'parity.golden', 'train')
    assert run.returncode == 0, run.stderr
    for kind, distance in json.loads(run.stdout).items():
        measured(f'{kind} of {golden.TRAINED}, float64, {golden.STEPS} steps', distance, 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'bar'), [('R18 full', 0.01), ('R50 full', 0.01)])
def test_bfloat16_stays_near_float32(name, bar, on_file, programs, measured):
    images, _ = cases.pictures(1, 97)
    weights = golden.weights(on_file, name)
    exact = on_file[f'logits/{name}']
    rounded, _ = our_side.forward(golden.NETWORKS[name], weights, images, 'bfloat16')
    span = exact.max() - exact.min()
    measured(f'logits of {name}, bfloat16', np.abs(rounded - exact).max() / span, bar)
    differ = (rounded.argmax(-1) != exact.argmax(-1)).mean()
    measured(f'classes of {name} that bfloat16 changes', differ, 0.01)
