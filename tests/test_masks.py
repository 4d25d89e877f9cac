"""Padding changes no logit of an image, whatever the network is made of."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_loops import picture, setup_and_variables

from psp_jax.inference.masks import apply_to_padded
from psp_jax.model.contexts import CONTEXTS
from psp_jax.model.layers import Conv
from psp_jax.model.pspnet import normalise

SIZES = [(33, 41), (40, 24), (49, 57)]


def assert_padding_changes_nothing(run, variables):
    images = np.full((3, 57, 65, 3), 200, np.uint8)
    for padded, size in zip(images, SIZES, strict=True):
        padded[: size[0], : size[1]] = picture(size)
    images = normalise(jnp.asarray(images), run.config)

    @jax.jit
    def together(variables, images):
        return apply_to_padded(run.model, variables, images, jnp.asarray(SIZES))

    found = together(variables, images)
    for logits, image, (height, width) in zip(found, images, SIZES, strict=True):
        alone = run.model.apply(variables, image[None, :height, :width], False)[0][0]
        assert alone.std() > 0.01
        np.testing.assert_allclose(
            logits[: alone.shape[0], : alone.shape[1]], alone, atol=2e-4, rtol=2e-4
        )


@pytest.mark.parametrize(
    'keys',
    [
        {'stem': 'deep_small', 'dilation': 'full', 'pool': 'average', 'align_corners': True},
        {'stem': 'conv7', 'dilation': 'contract', 'pool': 'max', 'align_corners': False},
        {'stem': 'deep', 'dilation': 'contract_first', 'pool': 'average', 'align_corners': False},
        {'stem': 'deep_small', 'dilation': 'full', 'pool': 'max', 'align_corners': True},
        {'context': 'none'},
        pytest.param({'depth': 50, 'stem': 'deep'}, marks=pytest.mark.slow),
    ],
    ids=lambda keys: ' '.join(map(str, keys.values())),
)
def test_logits_of_padded_images_are_those_of_the_images_alone(keys):
    keys = {f'model.{name}': value for name, value in keys.items()}
    assert_padding_changes_nothing(*setup_and_variables('mmseg', **keys))


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
    assert_padding_changes_nothing(*setup_and_variables('mmseg', **{'model.context': 'dilated'}))
