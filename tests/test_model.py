"""The network against the reference's known sizes and against independent arithmetic."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from psp_jax.config_check import resolve
from psp_jax.model import layers
from psp_jax.model.layers import BatchNorm
from psp_jax.model.pspnet import Head, build
from psp_jax.model.pyramid_pooling import PyramidPooling
from psp_jax.model.resnet import ResNet
from psp_jax.state import jit_for_one_call

NARROW = {'depth': 18, 'stem': 'deep_small', 'head_width': 128, 'aux_width': 64}


def network(classes, depth=50, aux=0.4, dtype='float32', **model):
    """The network as its paper has it, with other options of config.model."""
    options = {f'model.{name}': value for name, value in model.items()}
    values = {'data.classes': str(classes), 'model.depth': depth, 'loss.aux_weight': aux}
    return build(resolve(values | {'dtype': dtype} | options))


def variables_of(model, train=True, size=33):
    """Shapes of the variables, without computing any."""
    key = jax.random.key(0)
    return jax.eval_shape(
        lambda: model.init({'params': key, 'dropout': key}, jnp.zeros((1, size, size, 3)), train)
    )


def fresh(model, images, train):
    key = jax.random.key(0)
    return jit_for_one_call(lambda: model.init({'params': key, 'dropout': key}, images, train))()


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ('depth', 'classes', 'with_aux', 'without_aux'),
    [
        (50, 150, 49_180_908, 46_782_550),
        (50, 21, 49_081_578, 46_716_373),
        (50, 19, 49_080_038, 46_715_347),
        (101, 150, 68_173_036, 65_774_678),
        (101, 19, 68_072_166, 65_707_475),
        (152, 150, 83_816_684, None),
    ],
)
def test_parameter_counts_are_the_references(depth, classes, with_aux, without_aux):
    model = network(classes, depth)
    assert count(variables_of(model)['params']) == with_aux
    if without_aux:
        assert count(variables_of(model, train=False)['params']) == without_aux


def test_parameter_count_of_the_small_network_and_its_parts():
    assert count(variables_of(network(19, **NARROW))['params']) == 12_790_086
    params = variables_of(network(150))['params']
    assert count(params['pyramid']) == 4_198_400
    assert count(params['head']) == 18_952_342
    assert count(params['aux_head']) == 2_398_358
    layer3 = {k: v for k, v in params['backbone'].items() if k.startswith('layer3')}
    assert count(layer3) == 7_098_368


@pytest.mark.parametrize(
    ('depth', 'stem', 'dilation'),
    [(50, 'deep', 'full'), (18, 'deep_small', 'contract'), (18, 'conv7', 'full')],
)
@pytest.mark.parametrize(('size', 'cells'), [(97, 13), (473, 60), (713, 90), (512, 64)])
def test_output_stride_is_eight(depth, stem, dilation, size, cells):
    backbone = ResNet(depth, stem, dilation)
    shapes = jax.eval_shape(
        lambda: backbone.init_with_output(jax.random.key(0), jnp.zeros((1, size, size, 3)), False)[
            0
        ]
    )
    times = 1 if depth == 18 else 4
    assert [s.shape for s in shapes] == [(1, cells, cells, times * c) for c in (256, 512)]


def test_depth_269_has_the_papers_blocks():
    names = variables_of(network(150, 269))['params']['backbone']
    blocks = [sum(n.startswith(f'layer{i}_block') for n in names) for i in (1, 2, 3, 4)]
    assert blocks == [3, 30, 48, 8]
    assert (
        2 + 3 * sum(blocks) == 269
    )  # convolutions on the way, the stem as one, and the classifier


@pytest.mark.parametrize(
    ('dilation', 'expected'),
    [
        ('full', {'layer3': [2, 2, 2, 2], 'layer4': [4, 4, 4, 4]}),
        ('contract', {'layer3': [1, 1, 2, 2], 'layer4': [2, 2, 4, 4]}),
    ],
)
def test_dilations_follow_their_rule(dilation, expected):
    seen = {}

    def record(call, args, kwargs, context):
        module = context.module
        if isinstance(module, layers.Conv) and module.size == 3:
            seen.setdefault(module.path[0][:6], []).append(module.dilation)
        return call(*args, **kwargs)

    backbone = ResNet(18, 'deep_small', dilation)
    with nn.intercept_methods(record):
        jax.eval_shape(lambda: backbone.init(jax.random.key(0), jnp.zeros((1, 33, 33, 3)), False))
    assert {name: seen[name] for name in ('layer3', 'layer4')} == expected
    assert set(seen['layer1'] + seen['layer2']) == {1}


@pytest.mark.parametrize('reduce', [True, False])
@pytest.mark.parametrize(('bins', 'channels'), [((1, 2, 3, 6), 16), ((1,), 16), ((2, 5), 16)])
def test_pyramid_puts_context_behind_its_input(bins, channels, reduce):
    x = jax.random.normal(jax.random.key(0), (2, 13, 13, channels))
    pyramid = PyramidPooling(bins, 'average', reduce, True)
    y, _ = pyramid.init_with_output(jax.random.key(1), x, False)
    assert y.shape[-1] == (2 * channels if reduce else (1 + len(bins)) * channels)
    np.testing.assert_array_equal(y[..., :channels], x)
    if not reduce and bins[0] == 1:  # the 1 x 1 level is the image's mean everywhere
        mean = np.broadcast_to(np.asarray(x).mean((1, 2), keepdims=True), x.shape)
        np.testing.assert_allclose(y[..., channels : 2 * channels], mean, atol=1e-6)


@pytest.mark.parametrize('options', [{'context': 'none'}, {'bins': ()}])
def test_without_context_it_is_the_plain_dilated_fcn(options):
    params = variables_of(network(150, **options))['params']
    assert 'pyramid' not in params
    assert params['head']['conv']['kernel'].shape == (3, 3, 2048, 512)


def test_auxiliary_head_is_absent_outside_training_and_at_weight_zero():
    assert 'aux_head' not in variables_of(network(5, **NARROW), train=False)['params']
    assert 'aux_head' not in variables_of(network(5, aux=0.0, **NARROW))['params']


def test_dropout_drops_whole_channels():
    head = Head(width=16, classes=3, dropout=0.5)
    key = jax.random.key(0)
    features = jax.random.normal(key, (2, 5, 5, 8))
    _, captured = head.apply(
        head.init({'params': key, 'dropout': key}, features, True),
        features,
        True,
        rngs={'dropout': key},
        mutable=['batch_stats', 'intermediates'],
        capture_intermediates=lambda module, _: type(module).__name__ == 'Dropout',
    )
    dropped = np.asarray(captured['intermediates']['Dropout_0']['__call__'][0])
    silent = (dropped == 0).all((1, 2))
    alive = (dropped != 0).any((1, 2))
    assert 0.3 < silent.mean() < 0.75 and not (silent & alive).any()
    assert not (silent[0] == silent[1]).all()  # each image drops its own


@pytest.mark.parametrize('size', [12, 13])
@pytest.mark.parametrize(
    ('kernel', 'stride', 'dilation'),
    [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 4), (7, 2, 1)],
)
def test_convolution_and_its_gradients_equal_a_loop(size, kernel, stride, dilation):
    """float64 sums, window by window, with (k - 1) / 2 * dilation zeros on every side."""
    rng = np.random.default_rng(kernel + stride)
    x, k = rng.normal(size=(2, size, size, 3)), rng.normal(size=(kernel, kernel, 3, 4))
    cells = -(-size // stride)
    dy = rng.normal(size=(2, cells, cells, 4))
    pad = dilation * (kernel - 1) // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    y, dx, dk = np.zeros(dy.shape), np.zeros(padded.shape), np.zeros(k.shape)
    for row in range(cells):
        for column in range(cells):
            top, left = row * stride, column * stride
            window = np.s_[
                :,
                top : top + dilation * (kernel - 1) + 1 : dilation,
                left : left + dilation * (kernel - 1) + 1 : dilation,
            ]
            y[:, row, column] = np.tensordot(padded[window], k, 3)
            dx[window] += np.einsum('bo,uvio->buvi', dy[:, row, column], k)
            dk += np.einsum('buvi,bo->uvio', padded[window], dy[:, row, column])
    dx = dx[:, pad : pad + size, pad : pad + size]
    got, pull = jax.vjp(
        lambda x, k: layers.conv(x, k, stride, dilation),
        jnp.asarray(x, jnp.float32),
        jnp.asarray(k, jnp.float32),
    )
    got_dx, got_dk = pull(jnp.asarray(dy, jnp.float32))
    for a, b in ((got, y), (got_dx, dx), (got_dk, dk)):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_accelerators_get_the_compilers_own_gradient():
    """On TPUs the program holds convolutions only, on CPUs a matrix product for each position."""
    x, k = jnp.zeros((1, 8, 8, 2)), jnp.zeros((3, 3, 2, 2))
    gradient = jax.jit(jax.grad(lambda k: layers.conv(x, k).sum()))
    texts = {
        platform: gradient.trace(k).lower(lowering_platforms=(platform,)).as_text()
        for platform in ('cpu', 'tpu', 'cuda')
    }
    assert texts['cpu'].count('dot_general') == 9
    assert all(texts[p].count('dot_general') == 0 for p in ('tpu', 'cuda'))


def test_batch_norm_normalises_by_biased_and_stores_unbiased_variance():
    x = np.random.default_rng(0).normal(3, 2, (2, 2, 2, 5)).astype(np.float32)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), jnp.asarray(x), True)
    np.testing.assert_array_equal(variables['batch_stats']['var'], 1)  # init counts no batch
    y, updates = norm.apply(variables, jnp.asarray(x), True, mutable=['batch_stats'])
    flat = x.reshape(-1, 5).astype(float)
    expected = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
    np.testing.assert_allclose(np.asarray(y).reshape(-1, 5), expected, atol=1e-5)
    stats = updates['batch_stats']
    np.testing.assert_allclose(stats['mean'], 0.1 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5)


def test_a_single_value_a_channel_is_no_error():
    norm = BatchNorm()
    x = jnp.ones((1, 1, 1, 3))
    y, _ = norm.init_with_output(jax.random.key(0), x, True)
    assert np.isfinite(y).all()


def test_bfloat16_computes_in_bfloat16_and_keeps_everything_else_in_float32():
    model = network(4, dtype='bfloat16', **NARROW)
    key = jax.random.key(0)
    images = jax.random.normal(key, (2, 33, 33, 3))
    variables = fresh(model, images, True)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    logits, exact = (
        jit_for_one_call(lambda v, m=m: m.apply(v, images, False)[0])(variables)
        for m in (model, network(4, **NARROW))
    )
    assert logits.dtype == jnp.float32  # of the classifier only
    scale = float(jnp.abs(exact).max())
    np.testing.assert_allclose(logits.astype(jnp.float32), exact, atol=0.1 * scale)


def test_initialisation_has_the_references_spread():
    model = network(150, 18)
    params = fresh(model, jnp.zeros((1, 33, 33, 3)), True)['params']
    kernel = params['backbone']['layer4_block1']['conv2']['kernel']
    assert float(kernel.std()) == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    kernel = params['pyramid']['level0_conv']['kernel']
    assert float(kernel.std()) == pytest.approx((2 / 128) ** 0.5, rel=0.01)
    for leaf, bound in (
        (params['head']['conv']['kernel'], 1 / 96),
        (params['head']['classifier']['kernel'], 0.0442),
        (params['head']['classifier']['bias'], 0.0442),
        (params['aux_head']['conv']['kernel'], 1 / 48),
    ):
        assert float(jnp.abs(leaf).max()) == pytest.approx(bound, rel=0.03)
        assert float(leaf.std()) == pytest.approx(bound / 3**0.5, rel=0.12)


def test_padding_is_symmetric_at_even_sizes():
    # An image and its mirror image must give mirrored features: 'SAME' would not at stride 2.
    x = jax.random.normal(jax.random.key(0), (1, 13, 13, 2))
    k = jax.random.normal(jax.random.key(1), (3, 3, 2, 2))
    flipped = layers.conv(x[:, :, ::-1], k[:, ::-1], 2)
    np.testing.assert_allclose(flipped[:, :, ::-1], layers.conv(x, k, 2), atol=1e-5)
    # At an even size the first window reaches one pixel over the edge, as the reference's does.
    ones = jnp.ones((1, 12, 12, 1))
    y = layers.conv(ones, jnp.ones((3, 3, 1, 1)), 2)
    np.testing.assert_array_equal(y[0, :, 3, 0], [6, 9, 9, 9, 9, 9])
    same = lax.conv_general_dilated(
        ones, jnp.ones((3, 3, 1, 1)), (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    assert not np.array_equal(same, y)
