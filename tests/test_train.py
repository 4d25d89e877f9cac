"""The training step: global-batch semantics, loss arithmetic, its single path."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import small_config, small_setup
from several import LITTLE_OPTIMISATION

from psp_jax import train
from psp_jax.model import pspnet
from psp_jax.state import jit_for_one_call, new_state

ROOT = Path(__file__).parent.parent


def run_worker(devices, output):
    subprocess.run(
        [sys.executable, ROOT / 'tests/global_batch_worker.py', str(devices), str(output)],
        check=True,
        timeout=900,
        env=os.environ
        | LITTLE_OPTIMISATION
        | {'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}'},
    )
    return dict(np.load(output))


@pytest.fixture(scope='module')
def steps(tmp_path_factory):
    """What three steps gave on one device and on eight."""
    folder = tmp_path_factory.mktemp('steps')
    return {n: run_worker(n, folder / f'{n}.npz') for n in (1, 8)}


def test_global_batch_semantics_one_device_equals_eight(steps):
    """Promise 2, float64: losses to 1e-7, parameters and running statistics to 1e-6.

    PSPNet-10 with auxiliary head and dropout, one device's whole share ignored and the
    other shares with unequal numbers of valid pixels.
    """
    one, eight = (dict(found) for found in steps.values())
    for found in (one, eight):
        del found['shardings']
    assert one.keys() == eight.keys() and len(one) > 80
    assert one['params/head/conv/kernel'].dtype == np.float64
    np.testing.assert_allclose(eight['losses'], one['losses'], rtol=1e-7)
    for name, value in one.items():
        scale = np.abs(value).max() or 1.0
        np.testing.assert_allclose(eight[name], value, atol=1e-6 * scale, rtol=0, err_msg=name)
    # The comparison could have failed: three steps have changed everything.
    first_loss, last_loss = one['losses'][0][0], one['losses'][-1][0]
    assert abs(first_loss - last_loss) > 1e-3


def test_one_path_of_jit_and_named_sharding(steps):
    """Promise 1: the same step on one device and on eight; the mesh's axes say what lies where."""
    for devices, found in steps.items():
        mesh = {'data': devices, 'space': 1}
        assert str(found['shardings']) == str([(mesh, ('data', 'space')), (mesh, ())])


@pytest.fixture(scope='module')
def compiled():
    """(state, step function) of a small network; the state may be used again and again."""
    run = small_setup()
    step = jit_for_one_call(lambda state, batch: train.train_step(state, batch, run=run))
    return jit_for_one_call(lambda: new_state(run))(), step


def a_batch(labels):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 33, 33, 3)).astype(np.uint8)
    return {'image': images, 'label': labels}


def test_loss_is_main_plus_0_4_auxiliary(compiled):
    state, step = compiled
    labels = np.random.default_rng(1).integers(0, 3, (2, 33, 33)).astype(np.uint8)
    after, scalars = step(state, a_batch(labels))
    assert float(scalars['loss']) == pytest.approx(
        float(scalars['loss_main'] + 0.4 * scalars['loss_aux']), rel=1e-6
    )
    assert bool(scalars['finite'])
    assert int(after.step) == 1
    assert float(scalars['learning_rate']) == pytest.approx(0.01)
    changed = jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), state.params, after.params)
    assert all(jax.tree.leaves(changed))


def test_a_batch_without_valid_pixels_has_loss_zero_and_only_decays(compiled):
    state, step = compiled
    after, scalars = step(state, a_batch(np.full((2, 33, 33), 255, np.uint8)))
    assert float(scalars['loss']) == 0 and bool(scalars['finite'])
    before, now = (s.params['backbone']['stem_conv1']['kernel'] for s in (state, after))
    np.testing.assert_allclose(now, before * (1 - 0.01 * 1e-4), rtol=1e-6)


def test_what_is_not_finite_is_noticed(compiled):
    state, step = compiled
    labels = np.zeros((2, 33, 33), np.uint8)
    bias = state.params['backbone']['layer1_block0']['bn1']['bias']
    params = jax.tree.map(lambda x: x, state.params)
    params['backbone']['layer1_block0']['bn1']['bias'] = bias.at[0].set(jnp.nan)
    _, scalars = step(state.replace(params=params), a_batch(labels))
    assert not bool(scalars['finite'])


def test_step_compiles_once_and_takes_its_images_as_bytes(compiled):
    state, step = compiled
    before = step._cache_size()
    for value in (0, 1, 2):
        labels = np.full((2, 33, 33), value, np.uint8)
        state, _ = step(state, a_batch(labels))
    assert step._cache_size() <= max(before, 1)


def test_normalisation_is_the_references():
    config = small_config()
    pixel = np.array([[[[255, 0, 128]]]], np.uint8)
    expected = (np.array([255, 0, 128]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pspnet.normalise(pixel, config)[0, 0, 0], expected, rtol=1e-5)
