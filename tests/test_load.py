"""What is loaded from a file, what starts fresh, and what does not fit."""

import jax
import numpy as np
import pytest
from parity import cases, our_side
from parity.foreign import (
    MMSEG_DEEP,
    THREE_CONVS,
    assert_holds,
    classifier,
    load,
    renamed,
    save,
    semseg,
    wanted,
)

from psp_jax.errors import UserError
from psp_jax.weights.load import load_weights, names_to_skip


@pytest.fixture
def file(tmp_path):
    """Writes tensors as .safetensors; returns the path."""
    return lambda tensors: save(tensors, tmp_path / 'weights.safetensors')


def error_of(call, *args, **keys):
    with pytest.raises(UserError) as caught:
        call(*args, **keys)
    assert '\n' not in str(caught.value)
    return str(caught.value)


# ---- Parts that one side lacks


def test_an_auxiliary_head_that_the_file_lacks_starts_fresh(file):
    tensors = {n: t for n, t in semseg(cases.R18).items() if not n.startswith('aux.')}
    weights = load(file(tensors), cases.R18)
    assert_holds(weights, tensors)
    assert weights.report[1:] == ['fresh: aux_head']


def test_an_auxiliary_head_that_the_network_lacks_is_dropped(file):
    tensors = semseg(cases.R18._replace(aux_width=32))
    weights = load(file(tensors), cases.R18, **{'loss.aux_weight': 0.0})
    assert_holds(weights, tensors, ('layer', 'ppm', 'cls'))
    assert weights.report[1:] == ['dropped: aux_head, which this network lacks']


def with_other_modules(inputs):
    """Names of R18 with 'aspp' in the pyramid's place, whose output has so many channels."""
    config = our_side.config_of(cases.R18, 'float32')
    names = {n: leaf for n, leaf in wanted(config).items() if '/pyramid/' not in n}
    shapes = {
        'params/aspp/branch0/kernel': (3, 3, 512, 64),
        'batch_stats/aspp/bn/mean': (64,),
        'params/backbone/layer1_block0/attention/kernel': (1, 1, 64, 64),
        'params/head/conv/kernel': (3, 3, inputs, 128),
    }
    return config, names | {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in shapes.items()}


def test_modules_without_a_name_in_the_format_start_fresh_and_the_pyramid_is_dropped(file):
    tensors = semseg(cases.R18)
    config, names = with_other_modules(1024)
    weights = load_weights(file(tensors), config, names)
    assert_holds(weights, tensors, ('layer', 'cls', 'aux'))
    assert weights.report[1:] == [
        'fresh: aspp, backbone/layer1_block0/attention',
        'dropped: pyramid, which this network lacks',
    ]


def test_a_head_that_follows_another_context_is_to_be_skipped(file):
    path = file(semseg(cases.R18))
    config, names = with_other_modules(576)
    error = error_of(load_weights, path, config, names)
    assert 'params/head/conv/kernel [3, 3, 1024, 128], not [3, 3, 576, 128]' in error
    assert 'other inputs to its head' in error and error.endswith('--config.init_skip=head')
    config.init_skip = 'head'
    weights = load_weights(path, config, names)
    assert_holds(weights, semseg(cases.R18), ('layer', 'aux'))
    assert weights.report[1].startswith('fresh: aspp, backbone/layer1_block0/attention, head')


def test_a_file_without_any_part_of_the_network_is_an_error(file):
    config, names = with_other_modules(1024)
    names = {n: leaf for n, leaf in names.items() if '/backbone/' not in n}
    path = file(classifier(semseg(cases.R18), THREE_CONVS))
    assert 'holds nothing that this network has' in error_of(load_weights, path, config, names)


# ---- Options and shapes


def test_a_format_says_which_options_it_needs(file):
    network = cases.R18._replace(dilation='contract_first', align_corners=False)
    path = file(renamed(semseg(network), MMSEG_DEEP))
    error = error_of(load, path, cases.R50)
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
def test_options_that_shapes_do_not_tell_are_those_of_semseg(file, key, value, flag):
    error = error_of(load, file(semseg(cases.R18)), cases.R18, **{f'model.{key}': value})
    assert f'is of another network: set {flag} (or' in error


def test_a_part_that_is_skipped_may_have_any_width(file):
    path = file(semseg(cases.R18._replace(aux_width=32)))
    assert '--config.model.aux_width=32' in error_of(load, path, cases.R18)
    assert load(path, cases.R18, init_skip='aux').report[1:] == ['fresh: aux_head']


def test_one_error_lists_all_that_does_not_fit(file):
    tensors = semseg(cases.R18)
    del tensors['cls.1.running_mean']
    tensors['layer2.0.se.weight'] = np.ones(3, np.float32)
    tensors['foo'] = np.ones(3, np.float32)
    tensors['cls.1.bias'] = np.ones(5, np.float32)
    error = error_of(load, file(tensors), cases.R18)
    assert 'missing: batch_stats/head/bn/mean' in error
    assert 'left over: foo, layer2.0.se.weight' in error
    assert 'of another shape: params/head/bn/bias [5], not [128]' in error
    assert '--config.init_skip' in error


def test_another_number_of_classes_suggests_init_skip(file):
    path = file(semseg(cases.R18._replace(classes=150)))
    error = error_of(load, path, cases.R18)
    assert 'params/head/classifier/kernel [1, 1, 128, 150], not [1, 1, 128, 7]' in error
    assert 'It is for 150 classes: ' in error and '--config.init_skip=classifier' in error
    weights = load(path, cases.R18, init_skip='classifier')
    assert weights.report[1:] == ['fresh: aux_head/classifier, head/classifier']
    assert not any('classifier' in name for name in weights.arrays)


def test_values_that_are_not_finite_are_refused(file):
    tensors = semseg(cases.R18)
    tensors['cls.1.running_var'] = np.full(128, np.nan, np.float32)
    error = error_of(load, file(tensors), cases.R18)
    assert 'batch_stats/head/bn/var holds values that are not finite' in error


def test_patterns_match_from_the_beginning_of_a_modules_name():
    names = ['params/head/conv/kernel', 'params/aux_head/conv/kernel', 'params/aux_head/bn/bias']
    assert names_to_skip('head', names) == {names[0]}
    assert names_to_skip('^bad|aux, conv', names) == set(names)
    assert "'clasifier' matches no parameter" in error_of(names_to_skip, 'clasifier', names)
    assert "'*head' is not a pattern" in error_of(names_to_skip, '*head', names)
