"""Promise 11: whatever is registered from outside the package works everywhere.

The small module EXTENSIONS is what a user would write; `custom_imports` names it.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from networks import SMALL

from psp_jax import evaluate, export, train
from psp_jax.config_check import resolve
from psp_jax.data.labels import LABEL_SPACES
from psp_jax.dry_run import examine
from psp_jax.errors import UserError
from psp_jax.inference.protocols import PROTOCOLS
from psp_jax.losses import LOSSES
from psp_jax.model.backbones import BACKBONES
from psp_jax.model.contexts import CONTEXTS
from psp_jax.optimizer import OPTIMIZERS
from psp_jax.runtime import checkpoint
from psp_jax.state import setup
from psp_jax.weights.names import semseg_name, to_torch

EXTENSIONS = '''
"""Entries for every table of psp_jax, from outside the package."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

from psp_jax.data.labels import LABEL_SPACES, LabelSpace
from psp_jax.inference.protocols import PROTOCOLS
from psp_jax.losses import LOSSES, cross_entropy
from psp_jax.model.backbones import BACKBONES
from psp_jax.model.contexts import CONTEXTS
from psp_jax.model.layers import BatchNorm, Conv
from psp_jax.optimizer import OPTIMIZERS


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al. 2017): parallel convolutions of several rates."""

    rates: tuple = (1, 2)
    dtype: object = jnp.float32
    param_dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        kinds = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
        branches = []
        for i, rate in enumerate(self.rates):
            y = Conv(16, 3, dilation=rate, name=f'branch{i}_conv', **kinds)(x)
            branches.append(nn.relu(BatchNorm(name=f'branch{i}_bn', **kinds)(y, train)))
        return jnp.concatenate([x, *branches], -1)


class TwoConvs(nn.Module):
    """A backbone of stride 8 that is quick to compile."""

    dtype: object = jnp.float32
    param_dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        kinds = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
        for i, width in enumerate((8, 16, 32)):
            x = Conv(width, 3, stride=2, name=f'conv{i}', **kinds)(x)
            x = nn.relu(BatchNorm(name=f'bn{i}', **kinds)(x, train))
        return x, x


def half_cross_entropy(logits, labels):
    total, count = cross_entropy(logits, labels)
    return total / 2, count


CONTEXTS['aspp'] = lambda model, **kinds: ASPP(**kinds)
BACKBONES['two_convs'] = lambda model, **kinds: TwoConvs(**kinds)
LOSSES['half'] = half_cross_entropy
OPTIMIZERS['sign'] = lambda optimizer, rate, decays: optax.sign_sgd(rate)
LABEL_SPACES['fruit'] = LabelSpace(
    ('apple', 'pear', 'plum'),
    np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8),
    server_ids=(7, 8, 9),
    categories=('round', 'long', 'round'),
)
PROTOCOLS['plain_windows'] = dataclasses.replace(PROTOCOLS['semseg'], mirrors_windows=False)
'''
ALL = {
    'backbone': {'model.backbone': 'two_convs'},
    'context': {'model.context': 'aspp'},
    'loss': {'loss.name': 'half'},
    'optimizer': {'optimizer.name': 'sign'},
    'label space': {'data.classes': 'fruit'},
    'protocol': {'eval.protocol': 'plain_windows', 'eval.scales': (0.5, 1.0)},
}


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    """The folder of a user's module, which is forgotten after the test."""
    tables = (BACKBONES, CONTEXTS, LOSSES, OPTIMIZERS, LABEL_SPACES, PROTOCOLS)
    before = [dict(table) for table in tables]
    (tmp_path / 'my_extensions.py').write_text(EXTENSIONS)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop('my_extensions', None)
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def config_of(photographs: Path, **values):
    """Two steps on photographs of three classes; the others are ignored."""
    shared = {
        'custom_imports': 'my_extensions',
        'data.root': str(photographs),
        'data.train': 'train.txt',
        'data.val': 'val.txt',
        'data.label_map': str({v: 255 for v in range(3, 10)}),
        'total_steps': 2,
        'log_every': 1,
        'eval.batch_size': 2,
    }
    return resolve(SMALL | shared | values)


def lines_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def run_everywhere(config, folder: Path, capsys) -> Path:
    """Trains two steps, evaluates again, exports a program and dry-runs; the working directory."""
    workdir = folder / 'run'
    state = train.train_and_evaluate(config, str(workdir), 'extended')
    losses = [row['loss'] for row in lines_of(workdir) if 'loss' in row]
    assert int(state.step) == 2 and len(losses) == 2 and np.isfinite(losses).all()
    evaluate.evaluate_checkpoint(None, str(workdir), 'latest', [])
    scores = json.loads((workdir / 'eval' / 'metrics.json').read_text())
    assert scores['images'] == 3 and scores['protocol'] == config.eval.protocol
    program = folder / 'network.jaxexport'
    export.export_checkpoint(None, str(workdir), 'latest', [], str(program))
    call = jax.export.deserialize(bytearray(program.read_bytes())).call
    assert call(np.zeros((1, 33, 33, 3), np.uint8)).shape == (1, 33, 33, 3)
    examine.dry_run(config, 'extended', None, None)
    assert 'fits' in capsys.readouterr().out
    return workdir


def semseg_file(path: Path) -> dict[str, np.ndarray]:
    """Writes random weights of PSPNet-10 under semseg's names; returns them by our names."""
    shapes = checkpoint.named_leaves(setup(resolve(SMALL)).variables)
    rng = np.random.default_rng(0)
    arrays = {n: rng.uniform(0.1, 0.2, x.shape).astype(np.float32) for n, x in shapes.items()}
    tensors = {semseg_name(name): to_torch(array) for name, array in arrays.items()}
    safetensors.numpy.save_file(tensors, path)
    return arrays


def test_everything_is_one_entry_in_one_place(extensions, photographs, capsys):
    """Promise 11: a backbone, a context, a loss, an optimizer, a label space and a protocol."""
    values = {key: value for chosen in ALL.values() for key, value in chosen.items()}
    config = config_of(photographs, **values)
    workdir = run_everywhere(config, extensions, capsys)
    scores = json.loads((workdir / 'eval' / 'metrics.json').read_text())
    assert [c['name'] for c in scores['classes']] == ['apple', 'pear', 'plum']
    assert set(scores['categories']) == {'round', 'long'}
    with pytest.raises(UserError, match='aspp'):
        output = str(extensions / 'x.safetensors')
        export.export_checkpoint(None, str(workdir), 'latest', [], output)
    assert not (extensions / 'x.safetensors').exists()


@pytest.mark.slow
@pytest.mark.parametrize('point', ALL)
def test_each_extension_point_works_alone(extensions, photographs, capsys, point):
    run_everywhere(config_of(photographs, **ALL[point]), extensions, capsys)


def test_a_context_from_outside_learns_at_the_heads_rate(extensions, photographs):
    """One step of SGD without momentum moves a parameter by rate times gradient."""
    config = config_of(photographs, **ALL['context'], **{'optimizer.momentum': 0.0})
    run = setup(config)
    gradients = jax.tree.map(lambda x: np.ones(x.shape, np.float32), run.shapes.params)
    zeros = jax.tree.map(np.zeros_like, gradients)
    updates, _ = run.tx.update(gradients, run.tx.init(zeros), zeros)
    for name, update in checkpoint.named_leaves(updates).items():
        rate = 0.01 if name.startswith('backbone/') else 0.1
        np.testing.assert_allclose(update, -rate, rtol=1e-6, err_msg=name)
    assert {name.split('/')[0] for name in checkpoint.named_leaves(updates)} == {
        'backbone', 'aspp', 'head', 'aux_head',
    }  # fmt: skip


def test_a_context_from_outside_starts_around_a_semseg_file(extensions, photographs, capsys):
    arrays = semseg_file(extensions / 'semseg.safetensors')
    values = {'init_from': str(extensions / 'semseg.safetensors'), 'init_skip': 'head/conv'}
    config = config_of(photographs, **ALL['context'], **values, **{'model.backbone': 'resnet'})
    run = setup(config)
    with checkpoint.open_manager(str(extensions / 'run'), 1) as manager:
        from psp_jax.mesh import make_mesh

        _, state = train.starting_state(run, manager, None, make_mesh(-1, 2))
    found = checkpoint.named_leaves(state.variables)
    for name in ('params/backbone/stem_conv1/kernel', 'params/aux_head/conv/kernel'):
        np.testing.assert_array_equal(found[name], arrays[name])
    assert 'aspp' in capsys.readouterr().out
