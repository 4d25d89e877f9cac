"""Images that are split in height over devices: the same training as on one device."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from networks import small_setup
from several import LITTLE_OPTIMISATION, free_port

from psp_jax.errors import UserError
from psp_jax.mesh import check_cut, make_mesh, rows_reached

ROOT = Path(__file__).parent.parent
# Whatever brings together what lay on several devices.
GATHERS = {'all-gather', 'all-to-all', 'collective-broadcast', 'ragged-all-to-all'}


def start_worker(*words):
    return subprocess.Popen(
        [sys.executable, ROOT / 'tests/spatial_worker.py', *map(str, words)],
        env=os.environ
        | LITTLE_OPTIMISATION
        | {'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}'},
    )


def run_worker(*words):
    assert start_worker(*words).wait(timeout=3000) == 0


def arrays_of(output, mesh):
    found = dict(np.load(output))
    return {k.removeprefix(f'{mesh}/'): v for k, v in found.items() if k.startswith(f'{mesh}/')}


def assert_equals_one_device(output, meshes):
    """Float64: losses to 1e-7, parameters, momentum and running statistics to 1e-6, as promised."""
    one = arrays_of(output, '1x1')
    assert json.loads(str(one.pop('collectives'))) == []
    assert len(one) > 80
    for mesh in meshes:
        many = arrays_of(output, mesh)
        garbage, _ = many.pop('garbage', None), many.pop('collectives')
        assert many.keys() == one.keys()
        np.testing.assert_allclose(many['losses'], one['losses'], rtol=1e-7)
        for name, value in one.items():
            scale = np.abs(value).max() or 1.0
            np.testing.assert_allclose(
                many[name], value, atol=1e-6 * scale, rtol=0, err_msg=f'{mesh} {name}'
            )
        if not mesh.endswith('x1'):  # what the host pads images with has no part in anything
            np.testing.assert_array_equal(garbage, many['losses'][:1])


def gathers(listed):
    """What a program gathers of its collectives, after a look at whether it is split at all."""
    kinds = [kind for kind, _, _ in listed]
    assert kinds.count('collective-permute') > 20  # the rows beside the cuts
    assert 'all-reduce' in kinds
    return [collective for collective in listed if collective[0] in GATHERS]


# ---- The whole step


def test_half_an_image_a_device_equals_one_device(tmp_path):
    """A step of PSPNet-10 at crop 65."""
    output = tmp_path / 'steps.npz'
    run_worker('steps', output, 65, 2, 1, '1x1', '1x2', 'native', 'quick')
    assert_equals_one_device(output, ['1x2'])
    listed = json.loads(str(arrays_of(output, '1x2')['collectives']))
    # The one thing that is gathered in float64, and in no precision that one trains with: the
    # compiler does not divide the gradient of max pooling there (the second and third name of jax
    # 0.12: what goes into it).
    of_pooling = r'select_and_scatter$|/backbone/pad$|/backbone/layer1_block0/conv1/add_any$'
    assert all(re.search(of_pooling, op_name) for _, _, op_name in gathers(listed))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('stem', 'meshes'), [('deep_small', ['4x2', '2x4', '1x2']), ('deep', ['4x2'])]
)
def test_every_mesh_equals_one_device(tmp_path, stem, meshes):
    """Three steps of the real PSPNet-18 at crop 97."""
    output = tmp_path / 'steps.npz'
    run_worker(
        'steps',
        output,
        97,
        8,
        3,
        '1x1',
        *meshes,
        '--config.model.depth=18',
        f'--config.model.stem={stem}',
    )
    assert_equals_one_device(output, meshes)
    losses = arrays_of(output, '1x1')['losses']
    assert abs(losses[0, 0] - losses[-1, 0]) > 1e-3  # the comparison could have failed


@pytest.mark.slow
@pytest.mark.parametrize(
    'variant',
    [
        ('align_corners=false', 'stem=conv7', 'dilation=contract'),
        ('bins=()', 'dilation=contract_first'),
        ('pool=max', 'reduce=false'),
    ],
)
def test_variants_of_the_network_equal_one_device(tmp_path, variant):
    output = tmp_path / 'steps.npz'
    overrides = [f'--config.model.{word}' for word in variant]
    run_worker('steps', output, 97, 2, 1, '1x1', '1x4', *overrides)
    assert_equals_one_device(output, ['1x4'])


@pytest.mark.slow
def test_crop_473_equals_one_device(tmp_path):
    """One step of PSPNet-10 with narrow heads: 60 rows of features on 2 and 4 devices."""
    output = tmp_path / 'steps.npz'
    run_worker('steps', output, 473, 2, 1, '1x1', '1x2', '1x4')
    assert_equals_one_device(output, ['1x2', '1x4'])


@pytest.mark.slow
@pytest.mark.parametrize(
    'words',
    [
        ('depth=18', 'stem=deep_small'),
        ('depth=50', 'stem=deep'),
        ('native', 'depth=50', 'stem=deep'),
    ],
    ids=' '.join,
)
def test_real_networks_gather_no_activations(tmp_path, words):
    """In float32, with the kernel gradients of CPUs and with those of accelerators."""
    output = tmp_path / 'collectives.json'
    words = [f'--config.model.{word}' if '=' in word else word for word in words]
    run_worker('collectives', output, 97, 8, '4x2', '2x4', *words)
    found = json.loads(output.read_text())
    assert {mesh: gathers(listed) for mesh, listed in found.items()} == {'4x2': [], '2x4': []}


# ---- Processes


def test_each_of_two_processes_reads_its_own_whole_images():
    """Real processes of four devices each, mesh 4 x 2: rows as without 'space'."""
    port = free_port()
    workers = [start_worker('process', port, index) for index in (0, 1)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]


# ---- The mesh


@dataclass(frozen=True)
class Device:
    id: int
    process_index: int


def devices_of(*processes):
    return [Device(i, process) for i, process in enumerate(processes)]


def test_space_joins_neighbours_of_one_process():
    """As on a TPU slice, whose hosts' devices are not numbered one after the other."""
    mesh = make_mesh(-1, 8, 2, devices_of(0, 0, 1, 1, 0, 0, 1, 1))
    assert dict(mesh.shape) == {'data': 4, 'space': 2}
    assert [[d.process_index for d in row] for row in mesh.devices] == [[0] * 2] * 2 + [[1] * 2] * 2
    assert [[d.id for d in row] for row in mesh.devices] == [[0, 1], [4, 5], [2, 3], [6, 7]]


@pytest.mark.parametrize(
    ('data', 'space', 'batch_size', 'processes', 'message'),
    [
        (-1, 2, 8, (0,), r'mesh.space=2: process 0 has 1 device\(s\), which do not divide by 2'),
        (-1, 4, 8, (0, 0, 1, 1), r'mesh.space=4: process 0 has 2 device\(s\)'),
        (4, 2, 8, (0,) * 4, 'mesh.data=4 with mesh.space=2: this run has 4 devices'),
        (1, 2, 8, (0, 0, 1, 1), 'mesh.data=1 with mesh.space=2: this run has 4 devices'),
        (-1, 2, 3, (0,) * 4, 'batch_size=3 does not divide over mesh.data=2: set batch_size=4'),
    ],
)
def test_meshes_that_cannot_be_are_refused(data, space, batch_size, processes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(data, batch_size, space, devices_of(*processes))


@pytest.mark.parametrize(
    ('height', 'space', 'most'), [(9, 2, 1), (33, 2, 1), (65, 4, 2), (97, 5, 3), (473, 20, 15)]
)
def test_images_too_low_for_their_devices_are_refused(height, space, most):
    run = small_setup(data={'crop': height})
    size = height, height
    with pytest.raises(UserError, match=f'images of height {height} .*: take mesh.space={most}'):
        check_cut(make_mesh(1, 1, space, devices_of(*(0,) * space)), run.model, run.variables, size)
    check_cut(make_mesh(1, 1, most, devices_of(*(0,) * most)), run.model, run.variables, size)


@pytest.mark.parametrize(('dilation', 'reach'), [('full', 4), ('contract', 2)])
def test_what_devices_exchange_follows_from_the_modules(dilation, reach):
    run = small_setup(model={'dilation': dilation})
    assert rows_reached(run.model, run.variables, (97, 97)) == reach


def test_half_an_image_a_device_is_legal():
    """Two images on four devices: the batch divides over 'data' alone."""
    assert dict(make_mesh(-1, 2, 2, devices_of(0, 0, 0, 0)).shape) == {'data': 2, 'space': 2}
