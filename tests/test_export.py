"""The exported program beside the model it was made from, and in a process that has jax alone."""

import errno
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import unflatten_dict
from parity import cases, our_side

from psp_jax import export
from psp_jax.command_line import whole_file
from psp_jax.config import to_json
from psp_jax.config_check import resolve
from psp_jax.errors import UserError
from psp_jax.import_weights import semseg_name, to_torch
from psp_jax.model import pspnet
from psp_jax.runtime import checkpoint
from psp_jax.state import init_variables

CROP = (65, 97)
NETWORK = {
    'data.classes': '10',
    'data.crop': CROP,
    'model.depth': 18,
    'model.stem': 'deep_small',
    'model.head_width': 16,
    'model.aux_width': 8,
}
# README's three lines, with what they get and what becomes of it as files.
THREE_LINES = """\
import sys
for name in ('psp_jax', 'flax', 'orbax', 'ml_collections', 'tensorflow'):
    sys.modules[name] = None  # so that importing it is an error

import jax
from jax import export
call = export.deserialize(open('model.jaxexport', 'rb').read()).call

import numpy as np
np.save('logits.npy', call(np.load('images.npy')))
"""


def make_run(workdir, dtype):
    """A working directory whose checkpoint holds made-up values, the same in each precision."""
    network = resolve(NETWORK)
    shapes = jax.eval_shape(lambda: init_variables(pspnet.build(network), 0))
    empty = {n: np.empty(leaf.shape) for n, leaf in checkpoint.named_leaves(shapes).items()}
    weights = cases.made_up({semseg_name(n): to_torch(x).shape for n, x in empty.items()})
    variables = our_side.variables_of(network, weights)
    variables = jax.tree.map(lambda x: np.asarray(x).astype(dtype), variables)
    config = to_json(resolve(NETWORK | {'dtype': dtype}))
    checkpoint.save_variables(str(workdir), variables, {'config': config})
    return str(workdir)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, programs):
    return make_run(tmp_path_factory.mktemp('runs') / 'run 1', 'float32')


@pytest.fixture(scope='module')
def program_file(workdir, tmp_path_factory):
    path = tmp_path_factory.mktemp('exported') / 'model.jaxexport'
    export.export_checkpoint(None, workdir, 'latest', [], str(path))
    return path


def deserialized(path):
    return jax.export.deserialize(path.read_bytes())


def pictures(batch, size=CROP):
    return cases.pictures(batch, max(size))[0][:, : size[0], : size[1]]


def arrays_of(workdir):
    path, step = checkpoint.find(workdir, 'latest')
    return checkpoint.read_arrays(
        path, step, checkpoint.shapes(path, step, ('params', 'batch_stats'))
    )


def upsampled(x, size, align_corners):
    """[B, h, w, C] -> [B, *size, C] by numpy's interpolation, in float64."""
    for axis, new in ((1, size[0]), (2, size[1])):
        old = x.shape[axis]
        points = np.linspace(0, old - 1, new)
        if not align_corners:
            points = (np.arange(new) + 0.5) * old / new - 0.5
        x = np.apply_along_axis(lambda v, p=points: np.interp(p, np.arange(len(v)), v), axis, x)
    return x


def expected(workdir, images, **options):
    """Logits of the model itself, at the images' size."""
    path, step = checkpoint.find(workdir, 'latest')
    config = checkpoint.config_of(path, step)
    config.update_from_flattened_dict(options)
    model = pspnet.build(config)
    forward = jax.jit(lambda v, x: model.apply(v, pspnet.normalise(x, config), False)[0])
    logits = forward(unflatten_dict(arrays_of(workdir), sep='/'), images)
    return upsampled(np.asarray(logits), images.shape[1:3], config.model.align_corners)


def assert_equal_logits(logits, wanted):
    assert logits.dtype == np.float32 and logits.shape == wanted.shape
    assert wanted.std() > 0.1  # not merely the biases of a network whose units are dead
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    np.testing.assert_array_equal(logits.argmax(-1), wanted.argmax(-1))


# ---- The program


@pytest.mark.parametrize('batch', [1, 3])
def test_a_program_equals_the_model_at_every_batch_size(batch, workdir, program_file):
    images = pictures(batch)
    logits = np.asarray(deserialized(program_file).call(images))
    assert_equal_logits(logits, expected(workdir, images))


def test_one_file_is_for_all_platforms_and_names_its_shapes(program_file):
    program = deserialized(program_file)
    assert program.platforms == ('cpu', 'cuda', 'tpu')
    assert [x.str_short() for x in program.in_avals] == ['uint8[batch,65,97,3]']
    assert [x.str_short() for x in program.out_avals] == ['float32[batch,65,97,10]']
    assert program.nr_devices == 1  # so that callers may split the batch as they like


def test_the_weights_are_in_the_file_once_without_the_auxiliary_head(workdir, program_file):
    used = {name: a for name, a in arrays_of(workdir).items() if 'aux_head' not in name}
    weights = sum(array.nbytes for array in used.values())
    assert weights < program_file.stat().st_size < 1.01 * weights


def test_the_file_tells_no_folder_of_this_computer(program_file):
    sources = re.findall(rb'[ -~]*\.py\b', program_file.read_bytes())
    assert any(b'pspnet.py' in name for name in sources)
    assert not any(b'/' in name for name in sources)


@pytest.mark.slow
def test_overrides_set_size_resizing_and_precision(workdir, program_file, tmp_path):
    output = tmp_path / 'model.jaxexport'
    options = {
        'data.crop': 64,
        'dtype': 'bfloat16',
        'model.align_corners': False,
        'model.pool': 'max',
    }
    words = [f'--config.{key}={str(value).lower()}' for key, value in options.items()]
    export.export_checkpoint(None, workdir, 'latest', list(words), str(output))
    images = pictures(2, (64, 64))
    logits = np.asarray(deserialized(output).call(images))
    assert logits.dtype == np.float32 and logits.shape == (2, 64, 64, 10)
    # Roundings depend on what the compiler fuses: as near to float32 as the model itself is.
    exact = expected(workdir, images, **options | {'dtype': 'float32'})
    ours, models = (
        np.sqrt(np.mean((x - exact) ** 2)) for x in (logits, expected(workdir, images, **options))
    )
    assert 0 < ours < 1.5 * models < 0.1 * exact.std()
    assert output.stat().st_size < 0.55 * program_file.stat().st_size


@pytest.mark.parametrize('dtype', ['float32', pytest.param('float64', marks=pytest.mark.slow)])
def test_three_lines_and_jax_alone_run_the_program(
    dtype, workdir, program_file, python, tmp_path, programs
):
    path = tmp_path / 'model.jaxexport'
    if dtype == 'float32':
        path.symlink_to(program_file)
    else:  # enabled for a whole process; the one that runs the program does without
        words = '--mode', 'export', '--workdir', make_run(tmp_path / 'run', dtype), '--output', path
        run = python('-m', 'psp_jax.main', *words)
        assert run.returncode == 0, run.stderr
    images = pictures(2)
    np.save(tmp_path / 'images.npy', images)
    run = subprocess.run(
        [sys.executable, '-c', THREE_LINES],
        cwd=tmp_path,
        env=os.environ | programs | {'PYTHONPATH': ''},
        text=True,
        capture_output=True,
    )
    assert run.returncode == 0, run.stderr
    assert_equal_logits(np.load(tmp_path / 'logits.npy'), expected(workdir, images))


# ---- The file


def test_the_suffix_chooses_the_form(workdir, tmp_path):
    output = tmp_path / 'x.safetensors'
    export.export_checkpoint(None, workdir, 'latest', [], str(output))
    assert len(safetensors.numpy.load_file(output)) == len(arrays_of(workdir))
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ('output', 'override', 'message'),
    [
        ('x.onnx', '', r'x\.onnx: must end in \.safetensors, .* or in \.jaxexport'),
        ('no folder/x.jaxexport', '', r'no folder/x\.jaxexport: cannot be written'),
        ('folder.jaxexport', '', r'folder\.jaxexport: cannot be written'),
        ('x.jaxexport', '--config.data.crop=100', 'a crop must be 8n'),
        ('x.jaxexport', '--config.model.head_width=17', 'is of another architecture'),
    ],
)
def test_exports_that_fail_leave_nothing_behind(workdir, tmp_path, output, override, message):
    (tmp_path / 'folder.jaxexport').mkdir()
    with pytest.raises(UserError, match=message):
        export.export_checkpoint(
            None, workdir, 'latest', [override] if override else [], str(tmp_path / output)
        )
    assert [path.name for path in tmp_path.rglob('*')] == ['folder.jaxexport']


@pytest.mark.parametrize(
    ('raised', 'seen'),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_file_that_was_cut_off_leaves_the_old_one_as_it_was(tmp_path, raised, seen):
    output = tmp_path / 'x.jaxexport'
    output.write_bytes(b'old')
    with pytest.raises(seen), whole_file(str(output)) as unfinished:
        with open(unfinished, 'wb') as file:
            file.write(b'ne')
        raise raised
    assert output.read_bytes() == b'old' and list(tmp_path.iterdir()) == [output]
