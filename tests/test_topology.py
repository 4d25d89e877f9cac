"""Machines by name. Tests with the mark `topology` need the compilers for TPUs and GPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from psp_jax.dry_run import topology
from psp_jax.errors import UserError
from psp_jax.main import main

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize('name', ['v9:2x2', 'v5e', 'h100:x', 'v5e:2x', 'cpu:8', 'h100:0'])
def test_the_error_about_an_unknown_topology_lists_the_known_ones(name):
    with pytest.raises(UserError) as error:
        topology.find_machine(name)
    assert str(error.value) == (
        f'--topology={name} is unknown: write a TPU (v4, v5e, v5p, v6e) with the shape of its '
        'slice (v5e:2x4, v4:2x2x4), or a GPU (a100-40gb, a100, h100, h200, b200) with the number '
        'of GPUs (h100:8) or hosts x GPUs (h100:2x8)'
    )


@pytest.mark.parametrize('name, extra', [('v5e:2x4', 'jax[tpu]'), ('h100:8', 'jax[cuda13]')])
def test_the_error_about_a_missing_compiler_says_how_to_install_it(
    name, extra, monkeypatch, capsys
):
    monkeypatch.setattr(topology.importlib.util, 'find_spec', lambda name: None)
    config = str(ROOT / 'configs' / 'scenes.py')
    assert main(['--mode', 'dry_run', '--config', config, '--topology', name]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'psp_jax: error: --topology={name} needs the ')
    assert error.endswith(f"pip install '{extra}'\n") and error.count('\n') == 1


# ---- With the compilers, each in a process of its own, since libtpu allows one at a time

PRODUCT = """
import json, sys
import jax, jax.numpy as jnp
from psp_jax.dry_run import costs, topology
from psp_jax.mesh import make_mesh, on_devices

name, size = sys.argv[1], int(sys.argv[2])
machine = topology.find_machine(name)
mesh = make_mesh(1, 1, devices=machine.devices[:1])
x = on_devices(jax.ShapeDtypeStruct((size, size), jnp.bfloat16), mesh)
product = jax.jit(lambda x: jnp.sort(x @ x) if size > 10**5 else x @ x)
found = costs.compile_program(product.trace(x), machine, {}, {})
found['per_cycle'] = machine.peak / machine.clock if machine.peak else None
print(json.dumps(found))
"""


@pytest.fixture
def tpu_compiler():
    pytest.importorskip('libtpu', reason='libtpu is not installed; make test-topology installs it')


@pytest.fixture
def gpu_compiler():
    reason = 'jax[cuda13] is not installed; make test-topology installs it'
    pytest.importorskip('jax_cuda13_plugin', reason=reason)


def product(name, size):
    words = [sys.executable, '-c', PRODUCT, name, str(size)]
    process = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.topology
@pytest.mark.parametrize('name', ['v4:2x2x1', 'v5e:1x1', 'v5p:2x2x1', 'v6e:2x2'])
def test_a_large_matrix_product_comes_near_the_peak_of_each_tpu(name, tpu_compiler):
    found = product(name, 8192)
    assert found['flops'] == 2 * 8192**3
    assert 0.6 < found['flops'] / found['cycles'] / found['per_cycle'] <= 1


@pytest.mark.topology
def test_a_program_that_the_tpu_compiler_rejects_as_too_large_does_not_fit(tpu_compiler):
    found = product('v5e:1x1', 400_000)
    assert not found['fits'] and found['bytes']['total'] > 2 * 400_000**2


@pytest.mark.topology
@pytest.mark.parametrize('name', ['a100-40gb:1', 'a100:8', 'h200:8', 'b200:2x8'])
def test_programs_compile_for_each_gpu(name, gpu_compiler):
    assert product(name, 512)['fits']


@pytest.mark.topology
def test_a_shape_that_no_slice_has_is_a_user_error(tpu_compiler):
    words = ['-m', 'psp_jax.main', '--mode', 'dry_run', '--config', 'configs/scenes.py']
    words = [sys.executable, *words, '--topology', 'v5e:3x3']
    process = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 2
    assert process.stderr.startswith('psp_jax: error: --topology=v5e:3x3: the compiler rejects it ')
