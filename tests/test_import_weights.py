"""Names and shapes of other code bases -> this network; errors; export and back."""

import errno
import json
import os
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from parity import cases, golden, our_side

from psp_jax import import_weights
from psp_jax.command_line import exit_code
from psp_jax.errors import UserError
from psp_jax.main import main
from psp_jax.main import run as main_run
from psp_jax.model import pspnet
from psp_jax.runtime import checkpoint
from psp_jax.state import init_variables

# ---- Names, written down from the other code bases' files and independent of weight_formats.py

STEM = {'0': 'conv1', '1': 'bn1', '3': 'conv2', '4': 'bn2', '6': 'conv3', '7': 'bn3'}
MMSEG_HEADS = {
    'ppm.features.{}.1.': 'decode_head.psp_modules.{}.1.conv.',
    'ppm.features.{}.2.': 'decode_head.psp_modules.{}.1.bn.',
    'cls.0.': 'decode_head.bottleneck.conv.',
    'cls.1.': 'decode_head.bottleneck.bn.',
    'cls.4.': 'decode_head.conv_seg.',
    'aux.0.': 'auxiliary_head.convs.0.conv.',
    'aux.1.': 'auxiliary_head.convs.0.bn.',
    'aux.4.': 'auxiliary_head.conv_seg.',
}
CSAIL_HEADS = {
    'ppm.features.{}.1.': 'ppm.{}.1.',
    'ppm.features.{}.2.': 'ppm.{}.2.',
    'cls.0.': 'conv_last.0.',
    'cls.1.': 'conv_last.1.',
    'cls.4.': 'conv_last.4.',
    'aux.0.': 'cbr_deepsup.0.',
    'aux.1.': 'cbr_deepsup.1.',
    'aux.4.': 'conv_last_deepsup.',
}


def renamed(tensors, table):
    """The tensors with the beginnings of their names changed as the table says."""
    full = {}
    for old, new in table.items():
        full |= {old.format(i): new.format(i) for i in range(4)} if '{}' in old else {old: new}
    result = {}
    for name, value in tensors.items():
        old = next((o for o in full if name.startswith(o)), None)
        result[full[old] + name[len(old) :] if old else name] = value
    return result


def backbone_of(tensors):
    return {name: value for name, value in tensors.items() if name.startswith('layer')}


def classifier():
    return {'fc.weight': np.ones((1000, 512), np.float32), 'fc.bias': np.ones(1000, np.float32)}


# ---- Fixtures


def semseg(network):
    """Made-up tensors of a network under semseg's names, whose shapes PyTorch's model gave."""
    name = 'shapes/R18 full' if network.depth == 18 else 'shapes/R50 full'
    shapes = json.loads(str(np.load(golden.FILE)[name]))
    shapes |= {name: [network.aux_width] for name in shapes if name.startswith('aux.1.')}
    shapes['aux.0.weight'][0] = shapes['aux.4.weight'][1] = network.aux_width
    for name in ('cls.4.weight', 'cls.4.bias', 'aux.4.weight', 'aux.4.bias'):
        shapes[name][0] = network.classes
    if network.stem == 'conv7':
        shapes = {n: s for n, s in shapes.items() if not re.match(r'layer0\.[3467]\.', n)}
        shapes |= {name: [64] for name in shapes if name.startswith('layer0.1.')}
        shapes['layer0.0.weight'] = [64, 3, 7, 7]
    return cases.made_up({name: tuple(shape) for name, shape in shapes.items()})


def wanted(config):
    model = pspnet.build(config)
    return checkpoint.named_leaves(jax.eval_shape(lambda: init_variables(model, 0)))


@pytest.fixture
def file(tmp_path):
    """Writes tensors as .safetensors; returns the path."""

    def write(tensors, name='weights'):
        path = tmp_path / f'{name}.safetensors'
        safetensors.numpy.save_file(tensors, path)
        return str(path)

    return write


def load(source, network, **keys):
    config = our_side.config_of(network, 'float32')
    for key, value in keys.items():
        config[key] = value
    return import_weights.load(source, config, wanted(config))


def assert_holds(weights, tensors, parts=None):
    """Every parameter has the tensor of its name, kernels as [H, W, in, out], bit for bit."""
    expected = {n: t for n, t in tensors.items() if parts is None or n.split('.')[0] in parts}
    found = {import_weights.semseg_name(name): a for name, a in weights.arrays.items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        array = found[name]
        if tensor.ndim == 4:
            out, inside, height, width = tensor.shape
            assert array.shape == (height, width, inside, out)
            assert array[0, -1, 1, 2] == tensor[2, 1, 0, -1]
            array = np.moveaxis(array, (3, 2), (0, 1))
        np.testing.assert_array_equal(array, tensor)


BACKBONE = {f'layer{i}' for i in range(5)}
MMSEG = cases.R18._replace(dilation='contract_first', align_corners=False)


# ---- Formats


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_semseg(file, prefix):
    tensors = semseg(cases.R18)
    counters = {'layer0.1.num_batches_tracked': np.array(7)}
    path = file({prefix + name: value for name, value in (tensors | counters).items()})
    weights = load(path, cases.R18)
    assert_holds(weights, tensors)
    assert weights.report == [f'{len(tensors)} arrays from {path} (semseg), 1 dropped by rule']


def test_semseg_without_an_auxiliary_head_leaves_ours_fresh(file):
    tensors = {n: t for n, t in semseg(cases.R18).items() if not n.startswith('aux.')}
    weights = load(file(tensors), cases.R18)
    assert_holds(weights, tensors)
    assert weights.report[1] == 'fresh: aux_head'


def test_an_auxiliary_head_that_the_network_lacks_is_dropped(file):
    tensors = semseg(cases.R18)
    config = our_side.config_of(cases.R18, 'float32')
    config.loss.aux_weight = 0.0
    weights = import_weights.load(file(tensors), config, wanted(config))
    assert_holds(weights, tensors, BACKBONE | {'ppm', 'cls'})


def test_semsegs_imagenet_resnet_fills_the_backbone(file):
    tensors = semseg(cases.R18)
    theirs = renamed(backbone_of(tensors), {f'layer0.{i}.': f'{n}.' for i, n in STEM.items()})
    weights = load(file(theirs | classifier()), cases.R18)
    assert_holds(weights, tensors, BACKBONE)
    assert weights.report[1] == 'fresh: aux_head, head, pyramid'


def test_timms_deep_stem_resnet_fills_the_backbone(file):
    tensors = semseg(cases.R18)
    theirs = renamed(backbone_of(tensors), {'layer0.7.': 'bn1.', 'layer0.': 'conv1.'})
    assert_holds(load(file(theirs | classifier()), cases.R18), tensors, BACKBONE)


def test_torchvisions_resnet_fills_the_backbone(file):
    network = cases.R18._replace(stem='conv7')
    tensors = semseg(network)
    # the first block of layer1 would have no downsample behind 64 channels in either stem
    theirs = renamed(backbone_of(tensors), {'layer0.0.': 'conv1.', 'layer0.1.': 'bn1.'})
    assert_holds(load(file(theirs | classifier()), network), tensors, BACKBONE)


@pytest.mark.parametrize('stem', ['deep_small', 'conv7'])
def test_mmsegmentation(file, stem):
    network = MMSEG._replace(stem=stem)
    tensors = semseg(network)
    stems = (
        {'layer0.': 'backbone.stem.'}
        if stem == 'deep_small'
        else {'layer0.0.': 'backbone.conv1.', 'layer0.1.': 'backbone.bn1.'}
    )
    theirs = renamed(tensors, {**stems, 'layer': 'backbone.layer', **MMSEG_HEADS})
    assert_holds(load(file(theirs), network), tensors)


def test_csail_in_two_files(file):
    network = cases.R50._replace(dilation='contract', align_corners=False, aux_width=512)
    tensors = semseg(network)
    theirs = renamed(tensors, {f'layer0.{i}.': f'{n}.' for i, n in STEM.items()} | CSAIL_HEADS)
    extra = {'bn1._tmp_running_mean': np.ones(64), 'bn1._running_iter': np.ones(1)}
    encoder = {n: t for n, t in theirs.items() if re.match(r'(conv|bn)\d\.|layer', n)} | extra
    decoder = {n: t for n, t in theirs.items() if n not in encoder}
    source = f'{file(encoder, "encoder")},{file(decoder, "decoder")}'
    assert_holds(load(source, network), tensors)
    with pytest.raises(UserError, match=r'set --config.model.aux_width=512 '):
        load(source, network._replace(aux_width=256))


# ---- What does not fit


def error_of_load(*args, **keys):
    with pytest.raises(UserError) as caught:
        load(*args, **keys)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_a_format_says_which_options_it_needs(file):
    path = file(
        renamed(
            semseg(MMSEG), {'layer0.': 'backbone.stem.', 'layer': 'backbone.layer', **MMSEG_HEADS}
        )
    )
    error = error_of_load(path, cases.R50)
    flags = [
        '--config.model.depth=18',
        '--config.model.stem=deep_small',
        '--config.model.dilation=contract_first',
        '--config.model.align_corners=false',
        '--config.model.head_width=128',
        '--config.model.aux_width=64',
    ]
    assert error.startswith(f'{path} (mmsegmentation) is of another network: set ')
    assert set(error.partition(': set ')[2].partition(' (or')[0].split()) == set(flags)


@pytest.mark.parametrize(
    ('key', 'value', 'flag'),
    [
        ('dilation', 'contract', '--config.model.dilation=full'),
        ('align_corners', False, '--config.model.align_corners=true'),
        ('pool', 'max', '--config.model.pool=average'),
        ('bins', (1, 2, 4, 8), "--config.model.bins='(1, 2, 3, 6)'"),
    ],
)
def test_options_that_no_shape_tells_are_those_of_semseg(file, key, value, flag):
    config = our_side.config_of(cases.R18, 'float32')
    config.model[key] = value
    with pytest.raises(UserError, match=r'is of another network: set ') as caught:
        import_weights.load(file(semseg(cases.R18)), config, wanted(config))
    assert f': set {flag} (or' in str(caught.value)


def test_two_arrays_for_one_place_are_an_error(file):
    tensors = semseg(cases.R18)
    tensors['module.cls.1.bias'] = tensors['cls.1.bias'] + 1
    assert 'two arrays for cls.1.bias' in error_of_load(file(tensors), cases.R18)


def test_a_head_that_is_skipped_may_have_any_width(file):
    tensors = semseg(cases.R18._replace(aux_width=32))
    path = file(tensors)
    assert '--config.model.aux_width=32' in error_of_load(path, cases.R18)
    weights = load(path, cases.R18, init_skip='^aux_head/')
    assert weights.report[1] == 'fresh: aux_head'


def test_everything_that_does_not_fit_is_in_one_error(file):
    tensors = semseg(cases.R18)
    del tensors['cls.1.running_mean']
    tensors['layer2.0.se.weight'] = np.ones(3, np.float32)
    tensors['cls.1.bias'] = np.ones(5, np.float32)
    error = error_of_load(file(tensors), cases.R18)
    assert 'missing: batch_stats/head/bn/mean' in error
    assert 'left over: layer2.0.se.weight' in error
    assert 'of another shape: params/head/bn/bias [5], not [128]' in error


def test_another_number_of_classes_suggests_init_skip(file):
    path = file(semseg(cases.R18._replace(classes=150)))
    error = error_of_load(path, cases.R18)
    assert 'params/head/classifier/kernel [1, 1, 128, 150], not [1, 1, 128, 7]' in error
    assert 'It is for 150 classes' in error and '--config.init_skip=classifier' in error
    weights = load(path, cases.R18, init_skip='classifier')
    assert weights.report[1] == 'fresh: aux_head/classifier, head/classifier'
    assert not any('classifier' in name for name in weights.arrays)


def test_a_pattern_that_skips_nothing_is_an_error(file):
    path = file(semseg(cases.R18))
    assert "'clasifier' matches no parameter" in error_of_load(
        path, cases.R18, init_skip='clasifier'
    )
    assert "'*classifier' is not a pattern" in error_of_load(
        path, cases.R18, init_skip='*classifier'
    )


def test_values_that_are_not_finite_are_refused(file):
    tensors = semseg(cases.R18)
    tensors['cls.1.running_var'][3] = np.nan
    assert 'batch_stats/head/bn/var holds values that are not' in error_of_load(
        file(tensors), cases.R18
    )


def test_unknown_names_list_the_formats(file):
    error = error_of_load(file({'a.weight': np.ones(3, np.float32)}), cases.R18)
    assert 'a.weight' in error and 'mmsegmentation' in error and 'CSAIL' in error


def test_sources_that_cannot_be_read(file, tmp_path):
    assert f'{tmp_path}/no.safetensors: there is no' in error_of_load(
        f'{tmp_path}/no.safetensors', cases.R18
    )
    whole = file(semseg(cases.R18))
    cut = tmp_path / 'cut.safetensors'
    cut.write_bytes(open(whole, 'rb').read()[:-100])
    assert f'{cut}: cannot be read as safetensors' in error_of_load(str(cut), cases.R18)
    (tmp_path / 'x.npz').write_bytes(b'')
    assert 'are read from .pth' in error_of_load(str(tmp_path / 'x.npz'), cases.R18)
    assert 'expected hf://OWNER/NAME' in error_of_load('hf://timm', cases.R18)


def test_a_hub_that_cannot_be_reached_is_one_line_with_the_remedy(monkeypatch):
    import huggingface_hub

    def fails(repository, file):
        assert (repository, file) == ('timm/resnet50s.gluon_in1k', 'model.safetensors')
        raise huggingface_hub.errors.LocalEntryNotFoundError('no network\nmore')

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', fails)
    error = error_of_load('hf://timm/resnet50s.gluon_in1k', cases.R50)
    assert 'no network' in error and '--config.init_from=FILE' in error and "init_from=''" in error


def test_a_file_from_the_hub(monkeypatch, file):
    import huggingface_hub

    tensors = semseg(cases.R18)
    path = file(tensors)
    monkeypatch.setattr(
        huggingface_hub, 'hf_hub_download', lambda *args: path if args == ('o/n', 'a/b.st') else 1
    )
    assert_holds(load('hf://o/n/a/b.st', cases.R18), tensors)


# ---- The command line, end to end


def semseg_small(classes):
    """Weights for the network of `small_config` under semseg's names."""
    tensors = semseg(cases.R18._replace(classes=classes, aux_width=8))
    for name in [n for n in tensors if n.startswith('cls.')]:
        shape = [{128: 16}.get(side, side) for side in tensors[name].shape]
        tensors |= cases.made_up({name: tuple(shape)})
    return tensors


def metrics_of(workdir):
    return json.loads((workdir / 'eval' / 'metrics.json').read_text())


def variables_in(workdir):
    path, step = checkpoint.find_in(str(workdir))
    names = checkpoint.shapes(path, step, ('params', 'batch_stats'))
    return checkpoint.read_arrays(path, step, names)


def test_export_and_import_return_every_bit(trained, small_config, tmp_path, capsys):
    output = tmp_path / 'x.safetensors'
    words = ['--mode', 'export', '--workdir', str(trained.workdir), '--output', str(output)]
    assert main(words) == 0
    exported = safetensors.numpy.load_file(output)
    assert exported.keys() == semseg_small(10).keys()
    imported = tmp_path / 'imported'
    words = [str(output), '--config', str(small_config), '--output', str(imported)]
    assert exit_code(import_weights.run, words) == 0
    assert f'arrays from {output} (semseg)' in capsys.readouterr().out
    with safetensors.safe_open(output, 'numpy') as handle:
        options = json.loads(handle.metadata()['psp_jax'])
    assert (options['model.dilation'], options['model.pool']) == ('full', 'average')
    before, after = variables_in(trained.workdir), variables_in(imported)
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.tobytes() == after[name].tobytes()
    assert main(['--mode', 'eval', '--workdir', str(imported)]) == 0
    scores = metrics_of(imported)
    assert (scores['step'], scores['mIoU']) == (0, metrics_of(trained.workdir)['mIoU'])


@pytest.mark.slow
def test_fine_tuning_150_classes_to_11(small_config, tmp_path, python, file):
    source, imported = file(semseg_small(150)), tmp_path / 'imported'
    flags = ['--config', small_config]
    run = python(
        '-m', 'psp_jax.import_weights', source, *flags, '--config.data.classes=150',
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
    kernel = 'params/backbone/layer4_block1/conv2/kernel'
    np.testing.assert_allclose(end[kernel], start[kernel], atol=1e-6)  # the rate is next to 0
    assert end['params/head/classifier/kernel'].shape[-1] == 11
    assert len(metrics_of(tmp_path / 'run')['classes']) == 11


def one_line_error(capsys, run, *words):
    capsys.readouterr()
    assert exit_code(run, [str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith('psp_jax: error: ') and error.count('\n') == 1
    return error


BAD = {
    'truncated': 'cannot be read as safetensors',
    'missing key': 'missing: batch_stats/head/bn/mean',
    'architecture': 'set --config.model.stem=deep_small',
    'classes': 'It is for 12 classes',
    'absent': 'there is no such file',
}


@pytest.mark.parametrize('kind', BAD)
def test_a_bad_source_is_one_line_and_leaves_no_output(kind, small_config, tmp_path, file, capsys):
    tensors = semseg_small(12 if kind == 'classes' else 10)
    if kind == 'missing key':
        del tensors['cls.1.running_mean']
    path = file(tensors)
    if kind == 'truncated':
        with open(path, 'r+b') as handle:
            handle.truncate(10_000_000)
    if kind == 'absent':
        path += '.safetensors'
    flags = ['--config', small_config]
    if kind == 'architecture':
        flags.append('--config.model.stem=conv7')
    output = tmp_path / 'out'
    words = [path, *flags, '--output', output]
    assert BAD[kind] in one_line_error(capsys, import_weights.run, *words)
    assert not output.exists()
    words = [*flags, f'--config.init_from={path}', '--workdir', output]
    assert BAD[kind] in one_line_error(capsys, main_run, *words)
    assert not any(path.is_file() for path in output.rglob('*'))


def test_a_full_disk_leaves_no_output(small_config, tmp_path, file, capsys, monkeypatch):
    def fails(workdir, variables, meta):
        (tmp_path / 'out' / 'checkpoints').mkdir(parents=True)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, 'save_variables', fails)
    words = [file(semseg_small(10)), '--config', small_config, '--output', tmp_path / 'out']
    assert 'no space left' in one_line_error(capsys, import_weights.run, *words)
    assert not (tmp_path / 'out').exists()


def test_a_checkpoint_of_another_network_says_which_options_differ(
    trained, small_config, tmp_path, capsys
):
    flags = ['--config', small_config, f'--config.init_from={trained.workdir}']
    flags += ['--workdir', tmp_path / 'run', '--config.model.pool=max']
    error = one_line_error(capsys, main_run, *flags)
    assert 'is of another network: set --config.model.pool=average' in error


def test_bad_imports_leave_nothing_behind(small_config, tmp_path, file, capsys):
    output = tmp_path / 'out'
    flags = ['--config', small_config, '--output', output]
    wrong = file(semseg_small(12))
    assert 'It is for 12 classes' in one_line_error(capsys, import_weights.run, wrong, *flags)
    assert '--output' in one_line_error(capsys, import_weights.run, wrong, *flags[:2])
    assert not output.exists()
    right = file(semseg_small(10), 'right')
    assert exit_code(import_weights.run, [right, *map(str, flags)]) == 0
    error = one_line_error(capsys, import_weights.run, right, *flags)
    assert 'holds checkpoints already' in error


def test_training_in_a_folder_of_imported_weights_is_refused(small_config, tmp_path, file, capsys):
    imported = tmp_path / 'imported'
    words = [file(semseg_small(10)), '--config', str(small_config), '--output', str(imported)]
    assert exit_code(import_weights.run, words) == 0
    assert main(['--config', str(small_config), '--workdir', str(imported)]) == 2
    assert f'--config.init_from={imported}' in capsys.readouterr().err


def test_exports_that_fail_leave_nothing_behind(trained, tmp_path, capsys):
    flags = ['--mode', 'export', '--workdir', str(trained.workdir), '--output']
    assert 'must end in .safetensors' in one_line_error(
        capsys, main_run, *flags, tmp_path / 'x.pth'
    )
    missing = tmp_path / 'no folder' / 'x.safetensors'
    assert f'--output={missing}: cannot be written' in one_line_error(
        capsys, main_run, *flags, missing
    )
    assert list(tmp_path.iterdir()) == []
    assert '--output' in one_line_error(capsys, main_run, *flags[:-1])
