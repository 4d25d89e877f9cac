import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psp_jax.data import scenes
from psp_jax.data.labels import label_space, label_table
from psp_jax.errors import UserError

# Names and colours of mmsegmentation and semseg, ids of cityscapesScripts.
TABLES = json.loads(Path(__file__).with_name('labels.json').read_text())


def colors_of(classes):
    space = label_space(classes)
    return {name: tuple(color) for name, color in zip(space.names, space.colors, strict=True)}


@pytest.mark.parametrize(
    ('classes', 'count', 'first', 'last'),
    [
        ('ade20k', 150, 'wall', 'flag'),
        ('voc2012', 21, 'background', 'tvmonitor'),
        ('cityscapes', 19, 'road', 'bicycle'),
        ('camvid', 11, 'Sky', 'Bicyclist'),
    ],
)
def test_known_label_spaces_are_complete(classes, count, first, last):
    space = label_space(classes)
    assert (space.names[0], space.names[-1]) == (first, last)
    assert len(set(space.names)) == count
    assert all(name == name.strip() for name in space.names)
    assert (space.colors.shape, space.colors.dtype) == ((count, 3), np.uint8)


@pytest.mark.parametrize('classes', TABLES)
def test_names_and_colours_are_those_of_an_independent_table(classes):
    space, table = label_space(classes), TABLES[classes]
    assert list(space.names) == table['names']
    np.testing.assert_array_equal(space.colors, table['colors'])


def test_ade20k_gives_road_and_skyscraper_one_colour():
    for colors in (colors_of('ade20k'), dict(zip(*TABLES['ade20k'].values(), strict=True))):
        assert tuple(colors['road']) == tuple(colors['skyscraper']) == (140, 140, 140)


def test_ids_of_cityscapes_become_the_train_ids_of_an_independent_table():
    np.testing.assert_array_equal(
        label_table('cityscapes_ids')[:34], TABLES['cityscapes']['train_ids']
    )


def test_colours_of_camvid_are_segnets():
    camvid = colors_of('camvid')
    assert camvid['Pavement'] == (60, 40, 222) and camvid['Bicyclist'] == (0, 128, 192)


def test_scenes_names_are_in_the_order_of_their_constants():
    names = label_space('scenes').names
    assert [names[getattr(scenes, name.upper())] for name in names] == list(names)


def test_colours_of_unnamed_classes_follow_pascal_vocs_formula():
    """VOC's table is published as numbers; those of a plain count come from the formula."""
    assert label_space('21').names[:2] == ('class 0', 'class 1')
    np.testing.assert_array_equal(label_space('21').colors, label_space('voc2012').colors)
    assert len({tuple(color) for color in label_space('255').colors}) == 255


def test_plain_names_are_taken_as_they_are():
    space = label_space(' road, traffic light ,car')
    assert space.names == ('road', 'traffic light', 'car')
    assert [tuple(color) for color in space.colors] == [(0, 0, 0), (128, 0, 0), (0, 128, 0)]


@pytest.mark.parametrize(
    'classes', ['', 'ADE20K', 'ade', '0', '256', '9' * 5000, '-3', '2.5', 'road,,car', 'road,road']
)
def test_a_wrong_label_space_is_refused_with_what_is_allowed(classes):
    with pytest.raises(UserError, match='data.classes') as caught:
        label_space(classes)
    if classes != 'road,road':
        assert 'ade20k, voc2012, cityscapes, camvid, scenes' in str(caught.value)


def test_label_tables_say_what_a_stored_value_becomes():
    np.testing.assert_array_equal(label_table(''), np.arange(256))
    minus_one = label_table('minus_one')
    assert [minus_one[v] for v in (0, 1, 2, 150, 254, 255)] == [255, 0, 1, 149, 253, 255]
    literal = label_table(' {11: 255, 3: 0} ')
    changed = np.flatnonzero(literal != np.arange(256))
    assert changed.tolist() == [3, 11] and literal[3] == 0 and literal[11] == 255
    assert minus_one.dtype == literal.dtype == np.uint8


def test_cityscapes_ids_become_train_ids():
    # cityscapesScripts, helpers/labels.py: name, id, trainId
    published = {
        'unlabeled': (0, 255), 'road': (7, 0), 'sidewalk': (8, 1), 'parking': (9, 255),
        'building': (11, 2), 'wall': (12, 3), 'fence': (13, 4), 'guard rail': (14, 255),
        'pole': (17, 5), 'polegroup': (18, 255), 'traffic light': (19, 6),
        'traffic sign': (20, 7), 'vegetation': (21, 8), 'terrain': (22, 9), 'sky': (23, 10),
        'person': (24, 11), 'rider': (25, 12), 'car': (26, 13), 'truck': (27, 14),
        'bus': (28, 15), 'caravan': (29, 255), 'trailer': (30, 255), 'train': (31, 16),
        'motorcycle': (32, 17), 'bicycle': (33, 18),
    }  # fmt: skip
    table, names = label_table('cityscapes_ids'), label_space('cityscapes').names
    for name, (stored, train_id) in published.items():
        assert table[stored] == train_id
        assert train_id == 255 or names[train_id] == name
    assert (table[34:] == 255).all() and (table != 255).sum() == 19


@pytest.mark.parametrize(
    'label_map',
    ['plus_one', '{11: 255', '[1, 2]', '{11: 256}', '{-1: 0}', "{'a': 0}", '{True: 1}', '{[1]: 2}'],
)
def test_a_wrong_label_map_is_refused_with_what_is_allowed(label_map):
    with pytest.raises(UserError, match='data.label_map.*minus_one'):
        label_table(label_map)


def test_colours_equal_those_that_come_with_the_data():
    folder = os.environ.get('PSP_JAX_SAMPLES')
    if not folder:
        pytest.skip('PSP_JAX_SAMPLES is not set')
    ade = json.loads(Path(folder, 'ade20k/palette.json').read_text())
    np.testing.assert_array_equal(label_space('ade20k').colors, ade[1:151])  # 0 is "other"
    voc = Image.open(next(Path(folder, 'voc2012').rglob('*.png'))).getpalette()
    np.testing.assert_array_equal(label_space('voc2012').colors.ravel(), voc[: 3 * 21])


def test_camvids_colours_equal_those_that_come_with_the_data():
    folder = os.environ.get('PSP_JAX_CAMVID')
    if not folder:
        pytest.skip('PSP_JAX_CAMVID is not set')
    colors = json.loads(Path(folder, 'palette.json').read_text())
    np.testing.assert_array_equal(label_space('camvid').colors, colors[:11])
