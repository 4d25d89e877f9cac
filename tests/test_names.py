"""Each known format's names become ours."""

import re

import numpy as np
import pytest
from parity import cases
from parity.foreign import (
    CONV7,
    CSAIL,
    MMSEG_CONV7,
    MMSEG_DEEP,
    THREE_CONVS,
    TIMM_DEEP,
    assert_holds,
    classifier,
    load,
    renamed,
    save,
    semseg,
)

from psp_jax.errors import UserError
from psp_jax.weights.names import modules, semseg_name


def test_names_of_modules_that_semseg_has_and_of_one_that_it_lacks():
    assert semseg_name('params/head/conv/kernel') == 'cls.0.weight'
    assert semseg_name('batch_stats/backbone/layer3_block12/bn2/var') == 'layer3.12.bn2.running_var'
    assert semseg_name('params/aspp/branch0_conv/kernel') is None


def test_modules_are_shown_by_the_name_of_their_part_if_all_of_it_is_meant():
    names = ['params/aspp/a/kernel', 'params/aspp/b/bias', 'params/head/classifier/bias']
    assert modules(names, [*names, 'params/head/conv/kernel']) == ['aspp', 'head/classifier']


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_semseg(tmp_path, prefix):
    tensors = semseg(cases.R18)
    theirs = tensors | {'layer0.1.num_batches_tracked': np.array(7)}
    path = save({prefix + n: t for n, t in theirs.items()}, tmp_path / 'x.safetensors')
    weights = load(path, cases.R18)
    assert_holds(weights, tensors)
    kernel, tensor = weights.arrays['params/head/conv/kernel'], tensors['cls.0.weight']
    assert kernel.shape == (3, 3, 1024, 128) and kernel[0, 2, 5, 7] == tensor[7, 5, 0, 2]
    assert weights.report == [f'{len(tensors)} arrays from {path} (semseg), 1 dropped by rule']


@pytest.mark.parametrize(
    ('stem', 'table'),
    [('deep_small', THREE_CONVS), ('deep_small', TIMM_DEEP), ('conv7', CONV7)],
    ids=['semseg', 'timm deep', 'torchvision'],
)
def test_a_classifiers_resnet_fills_the_backbone(tmp_path, stem, table):
    network = cases.R18._replace(stem=stem)
    tensors = semseg(network)
    path = save(classifier(tensors, table), tmp_path / 'x.safetensors')
    weights = load(path, network)
    assert_holds(weights, tensors, ('layer',))
    assert weights.report[1:] == ['fresh: aux_head, head, pyramid']


@pytest.mark.parametrize(('stem', 'table'), [('deep_small', MMSEG_DEEP), ('conv7', MMSEG_CONV7)])
def test_mmsegmentation(tmp_path, stem, table):
    network = cases.R18._replace(stem=stem, dilation='contract_first', align_corners=False)
    tensors = semseg(network)
    path = save(renamed(tensors, table), tmp_path / 'x.safetensors')
    assert_holds(load(path, network), tensors)


def test_csail_in_two_files(tmp_path):
    network = cases.R18._replace(dilation='contract', align_corners=False, aux_width=32)
    tensors = semseg(network)
    theirs = renamed(tensors, CSAIL)
    extra = {'bn1._tmp_running_mean': np.ones(64), 'bn1._running_iter': np.ones(1)}
    encoder = {n: t for n, t in theirs.items() if re.match(r'(conv|bn)\d\.|layer', n)} | extra
    decoder = {n: t for n, t in theirs.items() if n not in encoder}
    files = (save(encoder, tmp_path / 'a.safetensors'), save(decoder, tmp_path / 'b.safetensors'))
    assert_holds(load(','.join(files), network), tensors)
    with pytest.raises(UserError, match=r'set --config.model.aux_width=32 '):
        load(','.join(files), network._replace(aux_width=64))


def test_the_error_for_unknown_names_lists_the_formats(tmp_path):
    path = save({'a.weight': np.ones(3, np.float32)}, tmp_path / 'x.safetensors')
    with pytest.raises(UserError, match=r'a\.weight.* is not known; .*mmsegmentation, CSAIL'):
        load(path, cases.R18)


def test_two_arrays_with_one_name_are_an_error(tmp_path):
    tensors = renamed(semseg(cases.R18), THREE_CONVS)
    tensors['layer0.0.weight'] = tensors['conv1.weight']
    tensors = {n: t for n, t in tensors.items() if not n.startswith(('ppm', 'cls', 'aux'))}
    with pytest.raises(UserError, match=r'holds two arrays for layer0\.0\.weight'):
        load(save(tensors, tmp_path / 'x.safetensors'), cases.R18)
