import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psp_jax.data import scenes
from psp_jax.data.labels import LABEL_MAPS, LABEL_SPACES, label_space, label_table, published_map
from psp_jax.errors import UserError

# Names and colours of mmsegmentation and semseg, ids of cityscapesScripts.
TABLES = json.loads(Path(__file__).with_name('labels.json').read_text())


@pytest.mark.parametrize('classes', TABLES)
def test_names_and_colours_are_those_of_an_independent_table(classes):
    space, table = label_space(classes), TABLES[classes]
    assert list(space.names) == table['names']
    np.testing.assert_array_equal(space.colors, table['colors'])


def test_ids_of_cityscapes_become_the_train_ids_of_an_independent_table():
    np.testing.assert_array_equal(
        label_table('cityscapes_ids')[:34], TABLES['cityscapes']['train_ids']
    )


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


def test_the_map_of_the_published_files_is_known_by_the_values():
    known = {name: space.label_map for name, space in LABEL_SPACES.items() if space.label_map}
    assert known == {'ade20k': 'minus_one', 'cityscapes': 'cityscapes_ids', 'camvid': '{11: 255}'}
    for name, values in {'ade20k': [150], 'cityscapes': [19, 33], 'camvid': [11]}.items():
        space = label_space(name)
        assert published_map(space, values) == known[name]
        assert published_map(space, [*values, 200]) == ''
    assert published_map(label_space('11'), [11]) == ''


def test_a_named_map_can_be_added(monkeypatch):
    monkeypatch.setitem(LABEL_MAPS, 'swap', {0: 1, 1: 0})
    assert label_table('swap')[:3].tolist() == [1, 0, 2]


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
