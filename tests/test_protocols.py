"""The table of protocols: sizes, MATLAB's interpolation, and a protocol from outside."""

import dataclasses

import numpy as np
import pytest
from plain_loops import Loop, config_of, imresize, picture, setup_and_variables

from psp_jax.config_check import resolve
from psp_jax.data.sources import Source
from psp_jax.errors import UserError
from psp_jax.evaluate import Evaluator
from psp_jax.inference import protocols
from psp_jax.inference.protocols import PROTOCOLS
from psp_jax.predict import Predictor


@pytest.mark.parametrize(
    ('protocol', 'size', 'base', 'scale', 'expected'),
    [
        ('whole', (360, 480), 481, 1.0, (361, 481)),
        ('whole', (1024, 2048), 2048, 1.0, (1025, 2049)),
        ('whole', (473, 473), 0, 1.0, (473, 473)),
        ('whole', (512, 683), 512, 1.0, (385, 513)),
        ('whole', (5, 5), 0, 1.0, (9, 9)),
        ('whole', (360, 480), 481, 0.5, (177, 241)),
        ('caffe', (512, 683), 512, 1.0, (385, 513)),
        ('caffe', (1024, 2048), 2048, 1.0, (1025, 2049)),
        ('mmseg', (512, 683), 512, 1.0, (512, 683)),
        ('mmseg', (300, 3000), 512, 1.0, (205, 2048)),
        ('mmseg', (1024, 2048), 1024, 1.75, (1792, 3584)),
        ('mmseg', (1024, 2048), 1025, 1.0, (1025, 2049)),
        ('semseg', (512, 683), 512, 1.0, (384, 512)),
        ('semseg', (1, 1), 1, 0.5, (1, 1)),
        ('semseg', (5, 5), 7, 0.5, (4, 4)),
        ('semseg', (5, 5), 5, 0.5, (2, 2)),
    ],
)
def test_sizes_that_the_network_sees(protocol, size, base, scale, expected):
    config = config_of(protocol, **{'eval.base_size': base})
    assert PROTOCOLS[protocol].seen_size(size, scale, config) == expected


def test_without_aligned_corners_sides_are_multiples_of_the_stride():
    config = config_of('whole', **{'eval.base_size': 512, 'model.align_corners': False})
    assert PROTOCOLS['whole'].seen_size((512, 683), 1.0, config) == (384, 512)


@pytest.mark.parametrize('size', [(20, 31), (57, 90), (45, 33)])
def test_caffe_resizes_as_matlab(size):
    image = picture((45, 60))
    expected = np.floor(imresize(image.astype(float), size) + 0.5 + 1e-9)
    np.testing.assert_array_equal(protocols.by_matlab(image, size), expected)


@pytest.mark.slow
def test_a_protocol_from_outside_is_one_more_entry(monkeypatch):
    mine = dataclasses.replace(
        PROTOCOLS['semseg'], window_scores=protocols.probabilities_of_summed_logits
    )
    with pytest.raises(UserError, match='must be one of whole, semseg'):
        config_of('mine')
    monkeypatch.setitem(PROTOCOLS, 'mine', mine)
    run, variables = setup_and_variables('mine')
    image, label = picture((40, 50)), np.zeros((40, 50), np.uint8)

    class Mine(Loop):
        """semseg's sizes, with probabilities of the summed logits as caffe has them."""

        def mine(self, image, scale):
            return self.semseg(image, scale)

        def logits(self, window):
            both = (super(Mine, self).logits(window[:, ::s])[:, ::s] for s in (1, -1))
            return sum(both)

    expected = Mine(run, variables).probabilities(image)
    found = Predictor(run, variables).probabilities(image)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    result = Evaluator(run, Source(1, str, lambda i: (image, label))).evaluate(variables, 3)
    assert result.scores['protocol'] == 'mine' and result.scores['flip']
    np.testing.assert_array_equal(
        result.confusion[0], np.bincount(found.argmax(-1).ravel(), minlength=5)
    )
    assert resolve({'eval.protocol': 'mine', 'data.classes': '5'}).eval.protocol == 'mine'
