"""The dry run: what is compiled, for which image, and the command line."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psp_jax.config_check import resolve
from psp_jax.dry_run import examine
from psp_jax.dry_run.topology import GIB, Machine
from psp_jax.errors import UserError
from psp_jax.inference.blocks import blocks
from psp_jax.inference.programs import make_programs
from psp_jax.inference.views import views
from psp_jax.mesh import local_mesh
from psp_jax.state import new_state, setup

SMALL = {
    'batch_size': 8,
    'data.classes': '10',
    'data.crop': 65,
    'model.depth': 10,
    'model.stem': 'deep_small',
    'model.head_width': 16,
    'model.aux_width': 8,
    'eval.batch_size': 2,
}
HERE = Machine(jax.local_devices(), 4 * GIB)


def test_parameters_are_counted_as_the_network_has_them():
    config = resolve(SMALL)
    run = examine.plan(config, HERE)
    found = examine.describe(run, 'small', None)
    params = jax.eval_shape(lambda: new_state(setup(config))).params
    assert found['parameters'] == sum(x.size for x in jax.tree.leaves(params))
    assert found['network'] == 'resnet-10 with pyramid'


def test_a_batch_that_does_not_divide_over_the_devices_is_a_user_error():
    devices = [SimpleNamespace(process_index=i // 4, device_kind='a') for i in range(12)]
    with pytest.raises(UserError, match='batch_size=8 does not divide over mesh.data=12'):
        examine.plan(resolve(SMALL), replace(HERE, devices=devices))


@pytest.mark.parametrize('protocol', ['whole', 'semseg', 'mmseg_slide'])
def test_the_network_is_examined_on_the_inputs_that_real_images_have(protocol):
    config = resolve(
        SMALL | {'eval.protocol': protocol, 'eval.base_size': 130, 'eval.batch_size': 3}
    )
    seen = []

    def apply(variables, images, train):
        seen.append(images.shape)
        return jnp.zeros((len(images), *(-(-n // 8) for n in images.shape[1:3]), 10)), None

    made = SimpleNamespace(config=config, model=SimpleNamespace(apply=apply))
    local, found = local_mesh(1), blocks(np.zeros((80, 130, 3), np.uint8), config)
    make_programs(made, local).canvases({}, found)
    real = seen.copy()
    ((_, view),) = found[0].parts
    run = SimpleNamespace(setup=made)
    call = examine.trace_network(run, local, {}, view.input, len(view.sources))
    assert seen == 2 * real
    assert call.count == 3
    if protocol == 'semseg':  # 2 x 3 windows, 3 a call, each with its mirror image
        assert real[0] == (6, 65, 65, 3)


@pytest.mark.parametrize(
    'changes, size',
    [
        ({'data.classes': 'cityscapes', 'eval.base_size': 2048}, (1024, 2048)),
        ({'eval.base_size': 512}, (512, 512)),
        ({'data.crop': (65, 97)}, (65, 97)),
    ],
)
def test_the_size_of_the_image_in_evaluation(changes, size):
    assert examine.image_size(resolve(SMALL | changes))[0] == size


@pytest.mark.parametrize('protocol', ['whole', 'mmseg', 'mmseg_slide'])
@settings(max_examples=25, deadline=None)  # the machine may be busy
@given(height=st.integers(60, 1500), ratio=st.floats(0.25, 4))
def test_no_image_has_a_larger_input_than_the_one_that_is_examined(protocol, height, ratio):
    config = resolve(SMALL | {'eval.protocol': protocol, 'eval.base_size': 512})

    def area(size):
        return max(math.prod(view.input) for view in views(size, config))

    assert area((height, round(height * ratio))) <= area(examine.image_size(config)[0])


def test_the_first_batch_is_read_if_the_data_are_there(photographs):
    data = {'data.root': str(photographs), 'data.train': 'train.txt'}
    found = examine.read_batch(resolve(SMALL | data))
    assert found['read'] and found['images'] == 5 and found['shape'] == [8, 65, 65, 3]


def test_missing_data_are_no_error():
    found = examine.read_batch(resolve(SMALL | {'data.root': 'nowhere', 'data.train': 'train.txt'}))
    assert found == {'read': False, 'reason': 'nowhere/train.txt does not exist'}


def test_an_output_that_cannot_be_written_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match='cannot be written'):
        examine.dry_run(resolve(SMALL), 'small', None, str(tmp_path / 'no' / 'figures.json'))


# ---- The whole command


def run(python, words, folder):
    """Runs the dry run with --output; returns its figures and its lines."""
    output = folder / 'figures.json'
    process = python('-m', 'psp_jax.main', '--mode', 'dry_run', *words, '--output', output)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[-1] == f'written to {output}'
    return json.loads(output.read_text()), lines


@pytest.mark.slow
def test_the_command_prints_what_a_run_needs_and_touches_nothing(small_config, python, tmp_path):
    workdir = tmp_path / 'run'
    found, lines = run(python, ['--config', small_config, '--workdir', workdir], tmp_path)
    assert found['fits'] and lines[-2].startswith('fits: ')
    assert f'{found["parameters"]:,} parameters' in lines[0]
    assert found['data']['read'] and found['data']['images'] == 5
    for name in ('train', 'evaluate'):
        program = found[name]
        total = program['bytes'].pop('total')
        assert total == sum(program['bytes'].values()) and total < found['memory']
        assert program['flops_per_image'] > 1e8 and program['compile_seconds'] > 0
    sizes = found['train']['bytes']
    assert sizes['parameters'] == 4 * found['parameters']
    assert sizes['parameters'] <= sizes['optimizer'] < sizes['parameters'] + 100
    assert not workdir.exists()


def run_for_topology(python, config, name, folder, *more):
    words = ['--config', config, '--topology', name, '--config.batch_size=8', *more]
    found, lines = run(python, [*words, '--config.dtype=bfloat16'], folder)
    assert found['fits'] and found['topology'] == name
    assert (found['devices'], found['processes']) == (8, 2)
    # gradients (in bfloat16 if the kernels are), loss and statistics are summed over all devices
    exchanged = found['train']['collectives']['all-reduce']['bytes']
    assert 2 * found['parameters'] <= exchanged < 4.1 * found['parameters'] + 2**20
    assert found['evaluate']['collectives'] == {}
    return found, lines


@pytest.mark.topology
def test_a_tpu_slice_without_a_tpu(small_config, python, tmp_path):
    pytest.importorskip('libtpu', reason='libtpu is not installed; make test-topology installs it')
    found, _ = run_for_topology(python, small_config, 'v5e:2x4', tmp_path)
    assert set(found['train']['collectives']) == {'all-reduce'}
    assert found['train']['unknown_loops'] == 0
    for program in (found['train'], found['evaluate']):
        assert 0 < program['estimate']['share_of_peak'] < 1


@pytest.mark.topology
def test_gpus_without_a_gpu(small_config, python, tmp_path):
    reason = 'jax[cuda13] is not installed; make test-topology installs it'
    pytest.importorskip('jax_cuda13_plugin', reason=reason)
    words = ('--config.mesh.space=2', '--config.data.crop=65')
    found, lines = run_for_topology(python, small_config, 'h100:2x4', tmp_path, *words)
    assert found['mesh'] == {'data': 4, 'space': 2}
    # rows beside a cut go to the neighbour
    assert 'collective-permute' in found['train']['collectives']
    assert 'all-gather' not in found['train']['collectives']
    assert found['train']['cycles'] is None and 'estimate' not in found['train']
    assert any('the workspace of cuDNN is not counted' in line for line in lines)
