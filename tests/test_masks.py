"""Padding changes no logit of an image, whatever the network is made of."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_loops import config_of, picture

from psp_jax.inference.masks import apply_to_padded, stride_of
from psp_jax.model import layers
from psp_jax.model.contexts import CONTEXTS
from psp_jax.model.layers import Conv
from psp_jax.model.pspnet import normalise
from psp_jax.state import jit_for_one_call, setup

SIZES = [(33, 41), (40, 24)]


def made_up(run):
    """Random weights; means and biases make the padding non-zero."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        values = rng.normal(size=x.shape)
        name = path[-1].key
        if name == 'kernel':
            values *= (2 / x.size * x.shape[-1]) ** 0.5
        return np.float32(1 + 0.1 * values if name in ('scale', 'var') else values)

    return jax.tree.map_with_path(leaf, run.variables)


def assert_padding_changes_nothing(**keys):
    run = setup(config_of('mmseg', **{f'model.{name}': value for name, value in keys.items()}))
    variables = made_up(run)
    images = np.full((2, 49, 57, 3), 200, np.uint8)
    for padded, size in zip(images, SIZES, strict=True):
        padded[: size[0], : size[1]] = picture(size)
    images = normalise(jnp.asarray(images), run.config)

    @jit_for_one_call
    def together(variables, images):
        return apply_to_padded(run.model, variables, images, jnp.asarray(SIZES))

    @jit_for_one_call
    def by_itself(variables, image):
        return run.model.apply(variables, image[None], False)[0][0]

    padded = together(variables, images)
    for logits, image, (height, width) in zip(padded, images, SIZES, strict=True):
        alone = by_itself(variables, image[:height, :width])
        assert alone.std() > 0.01
        found = logits[: alone.shape[0], : alone.shape[1]]
        np.testing.assert_allclose(found, alone, atol=1e-4 * np.abs(alone).max())


@pytest.mark.parametrize(
    'keys',
    [
        {'stem': 'deep_small', 'dilation': 'full', 'pool': 'max', 'align_corners': True},
        {'stem': 'conv7', 'dilation': 'contract', 'pool': 'average', 'align_corners': False},
        {'stem': 'deep', 'dilation': 'contract_first', 'pool': 'average', 'align_corners': True},
        pytest.param({'depth': 50, 'stem': 'deep'}, marks=pytest.mark.slow),
    ],
    ids=lambda keys: ' '.join(map(str, keys.values())),
)
def test_logits_of_padded_images_are_those_of_the_images_alone(keys):
    assert_padding_changes_nothing(**keys)


class Dilated(nn.Module):
    """A context from outside: a wide convolution of the package, and one of its own."""

    @nn.compact
    def __call__(self, x, train):
        y = Conv(8, 3, dilation=3, bias=True, name='wide')(x)
        return jnp.concatenate([y, Own(name='own')(x)], -1)


class Own(nn.Module):
    reach = 2

    @nn.compact
    def __call__(self, x):
        return nn.Conv(8, (5, 5), padding='SAME')(x)


def test_a_module_from_outside_says_its_reach(monkeypatch):
    monkeypatch.setitem(CONTEXTS, 'dilated', lambda model, name, **kinds: Dilated(name=name))
    assert_padding_changes_nothing(context='dilated')


@pytest.mark.parametrize(
    ('module', 'reach'),
    [
        (nn.Conv(8, (3, 3)), 1),
        (nn.Conv(8, (3, 3), kernel_dilation=4), 4),
        (nn.Conv(8, (1, 5)), 2),
        (nn.Dense(8), 0),
        (layers.Conv(8, 3, dilation=2), 2),
    ],
)
def test_reach_of_modules(module, reach):
    assert layers.reach_of(module) == reach


def test_pooled_maps_have_no_padding():
    assert stride_of((1, 5, 9, 3), (33, 65)) == 8
    assert stride_of((1, 1, 1, 3), (33, 65)) is None
