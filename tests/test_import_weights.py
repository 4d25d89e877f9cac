"""The command line of the import, end to end: files, checkpoints, and export and back."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy
from parity import cases
from parity.foreign import save, semseg

from psp_jax import import_weights
from psp_jax import main as command_line
from psp_jax.command_line import exit_code
from psp_jax.runtime import checkpoint

pytestmark = pytest.mark.usefixtures('programs')


def semseg_small(classes):
    """Weights for the network of `small_config`, PSPNet-10, under semseg's names."""
    tensors = semseg(cases.R18._replace(classes=classes, head_width=16, aux_width=8))
    return {n: t for n, t in tensors.items() if not re.match(r'layer[1-4]\.1\.', n)}


@pytest.fixture
def file(tmp_path):
    """Writes weights of the network of `small_config` for so many classes; returns the path."""
    return lambda classes=10: save(semseg_small(classes), tmp_path / f'{classes}.safetensors')


def metrics_of(workdir):
    return json.loads((workdir / 'eval' / 'metrics.json').read_text())


def variables_in(workdir):
    path, step = checkpoint.find_in(str(workdir))
    names = checkpoint.shapes(path, step, ('params', 'batch_stats'))
    return checkpoint.read_arrays(path, step, names)


def succeeds(capsys, run, *words):
    """Runs a command line; returns what it prints."""
    assert exit_code(run, [str(word) for word in words]) == 0
    return capsys.readouterr().out


def error_of(capsys, run, *words):
    """Runs a command line that fails for a mistake of the user's; returns its line."""
    capsys.readouterr()
    assert exit_code(run, [str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith('psp_jax: error: ') and error.count('\n') == 1
    return error


def test_export_and_import_return_every_bit(trained, small_config, tmp_path, capsys):
    output, imported = tmp_path / 'x.safetensors', tmp_path / 'imported'
    words = ['--mode', 'export', '--workdir', trained.workdir, '--output', output]
    succeeds(capsys, command_line.run, *words)
    assert safetensors.numpy.load_file(output).keys() == semseg_small(10).keys()
    with safetensors.safe_open(output, 'numpy') as handle:
        options = json.loads(handle.metadata()['psp_jax'])
    assert (options['model.dilation'], options['model.pool']) == ('full', 'average')
    words = [output, '--config', small_config, '--output', imported]
    assert f'arrays from {output} (semseg)' in succeeds(capsys, import_weights.run, *words)
    before, after = variables_in(trained.workdir), variables_in(imported)
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.tobytes() == after[name].tobytes()
    succeeds(capsys, command_line.run, '--mode', 'eval', '--workdir', imported)
    metrics = metrics_of(imported)
    assert (metrics['step'], metrics['mIoU']) == (0, metrics_of(trained.workdir)['mIoU'])


@pytest.mark.slow
def test_fine_tuning_150_classes_to_11(small_config, tmp_path, python, file):
    imported = tmp_path / 'imported'
    flags = ['--config', small_config]
    run = python(
        '-m', 'psp_jax.import_weights', file(150), *flags, '--config.data.classes=150',
        '--output', imported,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    flags += ['--config.data.classes=11', '--config.total_steps=2', '--workdir', tmp_path / 'run']
    flags += ['--config.eval_every=2', '--config.optimizer.learning_rate=1e-9']
    run = python('-m', 'psp_jax.main', *flags, f'--config.init_from={imported}')
    assert run.returncode == 2 and '--config.init_skip=classifier' in run.stderr
    flags += [f'--config.init_from={imported}', '--config.init_skip=classifier']
    run = python('-m', 'psp_jax.main', *flags)
    assert run.returncode == 0, run.stderr
    assert 'fresh: aux_head/classifier, head/classifier' in run.stdout
    start, end = variables_in(imported), variables_in(tmp_path / 'run')
    kernel = 'params/backbone/layer4_block0/conv2/kernel'
    np.testing.assert_allclose(end[kernel], start[kernel], atol=1e-6)  # the rate is next to 0
    assert end['params/head/classifier/kernel'].shape[-1] == 11
    assert len(metrics_of(tmp_path / 'run')['classes']) == 11


def test_weights_that_do_not_fit_are_one_line_and_leave_no_output(
    small_config, tmp_path, file, capsys
):
    path, output = file(12), tmp_path / 'out'
    words = [path, '--config', small_config, '--output', output]
    assert 'It is for 12 classes' in error_of(capsys, import_weights.run, *words)
    assert '--output' in error_of(capsys, import_weights.run, *words[:-2])
    assert not output.exists()
    words = ['--config', small_config, f'--config.init_from={path}', '--workdir', output]
    assert 'It is for 12 classes' in error_of(capsys, command_line.run, *words)
    assert not any(path.is_file() for path in output.rglob('*'))


def test_a_folder_with_imported_weights_is_a_source_and_no_output(
    small_config, tmp_path, file, capsys
):
    imported = tmp_path / 'imported'
    config = ['--config', small_config]
    words = [file(), *config, '--output', imported]
    succeeds(capsys, import_weights.run, *words)
    assert 'holds checkpoints already' in error_of(capsys, import_weights.run, *words)
    error = error_of(capsys, command_line.run, *config, '--workdir', imported)
    assert f'--config.init_from={imported}' in error
    words = [imported, *config, '--config.model.pool=max', '--output', tmp_path / 'again']
    error = error_of(capsys, import_weights.run, *words)
    assert 'is of another network: set --config.model.pool=average' in error
    words = [imported, *config, '--config.model.context=none', '--output', tmp_path / 'again']
    error = error_of(capsys, import_weights.run, *words)
    assert 'other inputs to its head' in error and error.endswith('--config.init_skip=head\n')
    output = succeeds(capsys, import_weights.run, *words, '--config.init_skip=head')
    assert 'fresh: head\ndropped: pyramid, which this network lacks\n' in output
