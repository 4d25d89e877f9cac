"""The experiment's receptive field against the real network and against hand-made sums."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.context import layers_of, measure, receptive_field, summary
from psp_jax.config_check import resolve
from psp_jax.data import scenes
from psp_jax.model.pspnet import build


def averaging_weights(model):
    """Every kernel averages, every batch norm is the identity: what is lit stays positive."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 33, 33, 3)), False))

    def fill(path, leaf):
        kind = path[-1].key
        value = {'kernel': 1 / np.prod(leaf.shape[:-1]), 'scale': 1, 'var': 1, 'bias': 0, 'mean': 0}
        return np.full(leaf.shape, value[kind], np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def lit_cells(bins, dilation):
    """Distances, in pixels, from a bright column in black pictures to the cells it reaches.

    Eight pictures, with the column at each of eight neighbouring places, since cells lie 8 apart.
    """
    model = build(
        resolve(
            {
                'data.classes': '2',
                'loss.aux_weight': 0.0,
                'model.depth': 18,
                'model.stem': 'deep_small',
                'model.dilation': dilation,
                'model.bins': bins,
                'model.head_width': 16,
            }
        )
    )
    columns = 320 + np.arange(8)
    images = np.zeros((8, 9, 641, 3), np.float32)
    images[np.arange(8), :, columns] = 1
    logits, _ = jax.jit(lambda v, x: model.apply(v, x, False))(averaging_weights(model), images)
    distances = np.abs(8 * np.arange(81) - columns[:, None])
    return distances[np.asarray(logits[:, 0, :, 0]) > 0]


@pytest.mark.parametrize('dilation', ['full', 'contract'])
def test_receptive_field_is_what_lights_a_cell_of_the_real_network(dilation):
    reached = lit_cells((), dilation)
    assert 2 * reached.max() + 1 == receptive_field(layers_of(18, 'deep_small', dilation))


def test_the_pyramid_sees_the_whole_picture():
    assert lit_cells((1, 2, 3, 6), 'full').max() == 327  # from column 327 to the cell at 0


@pytest.mark.parametrize(
    ('depth', 'stem', 'dilation', 'side'),
    [
        # stem 3 + 4 + 4, pooling 4, then layer1, layer2, layer3, layer4 and the head
        (18, 'deep_small', 'full', 15 + 32 + 56 + 128 + 256 + 16),
        (18, 'deep_small', 'contract', 15 + 32 + 56 + 96 + 192 + 16),
        (50, 'deep', 'full', 15 + 24 + 56 + 192 + 192 + 16),
        (50, 'conv7', 'full', 11 + 24 + 56 + 192 + 192 + 16),
    ],
)
def test_receptive_field_equals_sums_made_by_hand(depth, stem, dilation, side):
    assert receptive_field(layers_of(depth, stem, dilation)) == side


def test_confusion_counts_cars_as_boats_and_boats_as_cars(tmp_path):
    confusion = np.zeros((10, 10), np.int64)
    confusion[scenes.CAR] = [0, 5, 0, 0, 0, 0, 0, 0, 60, 15]  # 80 pixels, 15 of them as boats
    confusion[scenes.BOAT] = [0, 0, 0, 0, 0, 0, 0, 0, 5, 15]  # 20 pixels, 5 of them as cars
    np.save(tmp_path / 'confusion.npy', confusion)
    classes = [{'name': 'car', 'iou': 0.7}, {'name': 'boat', 'iou': 0.6}]
    (tmp_path / 'metrics.json').write_text(json.dumps({'mIoU': 0.5, 'classes': classes}))
    expected = {'mIoU': 0.5, 'car IoU': 0.7, 'boat IoU': 0.6, 'confused': 0.2}
    assert measure(tmp_path) == expected


def test_spread_is_the_sample_standard_deviation():
    runs = [dict.fromkeys(('mIoU', 'car IoU', 'boat IoU', 'confused'), v) for v in (0.1, 0.2, 0.6)]
    found = summary(runs)['confused']
    assert found['mean'] == pytest.approx(0.3)
    assert found['std'] == pytest.approx(0.07**0.5)  # (0.04 + 0.01 + 0.09) / 2
    assert summary(runs[:1])['mIoU'] == {'mean': 0.1, 'std': None}
