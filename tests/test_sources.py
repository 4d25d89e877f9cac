import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from psp_jax.data import scenes
from psp_jax.data.examples import Source
from psp_jax.data.labels import label_space
from psp_jax.data.sources import check_source, make_source
from psp_jax.errors import UserError

CLASSES = 5


def data_of(root, **changes):
    plain = {'source': 'list', 'root': str(root), 'train': 'train.txt', 'val': '', 'test': ''}
    return ConfigDict({**plain, 'classes': str(CLASSES), 'label_map': '', **changes})


def a_label(height=12, width=16):
    return np.random.default_rng(0).integers(0, CLASSES, (height, width), np.uint8)


def an_image(height=12, width=16):
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """One good pair, image.png and label.png, listed in train.txt."""
    Image.fromarray(an_image()).save(tmp_path / 'image.png')
    Image.fromarray(a_label()).save(tmp_path / 'label.png')
    (tmp_path / 'train.txt').write_text('image.png label.png\n')
    return tmp_path


def read(folder, **changes):
    return make_source(data_of(folder, **changes), 'train').read(0)


# ---- lists


def test_a_pair_is_read_as_it_was_stored(folder):
    source = make_source(data_of(folder), 'train')
    image, label = source.read(0)
    np.testing.assert_array_equal(image, an_image())
    np.testing.assert_array_equal(label, a_label())
    assert image.dtype == label.dtype == np.uint8
    assert (source.length, source.name(0)) == (1, f'{folder}/image.png {folder}/label.png')


@pytest.mark.parametrize(
    'text',
    [
        'a b/i m.png a b/l m.png\r\n',  # cannot be told: four fields, no tab
        'a b/i m.png\ta b/l m.png\r\n',
        '\ufeff\r\n\r\n  a b/i m.png \t a b/l m.png  \r\n\r\n',
        '/a b/i m.png\t/a b/l m.png',
        '{root}/a b/i m.png\t{root}/a b/l m.png',
    ],
    ids=['spaces', 'tab', 'blank lines', 'leading slash', 'absolute'],
)
def test_list_lines_may_hold_spaces_tabs_and_windows_line_ends(tmp_path, text):
    (tmp_path / 'a b').mkdir()
    Image.fromarray(an_image()).save(tmp_path / 'a b/i m.png')
    Image.fromarray(a_label()).save(tmp_path / 'a b/l m.png')
    (tmp_path / 'train.txt').write_bytes(text.format(root=tmp_path).encode())
    source = make_source(data_of(tmp_path), 'train')
    if '\t' in text:
        np.testing.assert_array_equal(source.read(0)[1], a_label())
    else:
        with pytest.raises(UserError, match='a b/i m.png a b/l does not exist'):
            source.read(0)


def test_without_a_tab_the_last_space_divides_a_line(folder):
    (folder / 'image.png').rename(folder / 'my image  1.png')
    (folder / 'train.txt').write_text('my image  1.png label.png')
    np.testing.assert_array_equal(read(folder)[0], an_image())


def test_a_file_scheme_is_read_through_tensorflow(folder):
    assert read(f'file://{folder}')[0].shape == (12, 16, 3)
    (folder / 'label.png').unlink()
    with pytest.raises(UserError, match=r'file://.*/label.png'):
        read(f'file://{folder}')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('image.png label.png\nimage.png\n', r"train.txt:2: 'image.png' is not"),
        ('\nimage.png\t\n', 'train.txt:2'),
        ('a.png\tb.png\tc.png', 'train.txt:1'),
        ('\n \r\n', 'train.txt lists no example'),
        (None, 'train.txt does not exist'),
        (b'\xff\xfe\x00', 'train.txt is not a text file'),
    ],
)
def test_a_bad_list_is_named_with_its_line(folder, text, message):
    (folder / 'train.txt').unlink()
    if text is not None:
        content = text if isinstance(text, bytes) else text.encode()
        (folder / 'train.txt').write_bytes(content)
    with pytest.raises(UserError, match=message):
        make_source(data_of(folder), 'train')


def test_an_unset_split_or_source_is_named(folder):
    with pytest.raises(UserError, match='data.val is empty'):
        make_source(data_of(folder), 'val')
    with pytest.raises(UserError, match="data.source = 'lists'.*'list', 'dirs', 'tfds:NAME' or"):
        make_source(data_of(folder, source='lists'), 'train')


# ---- folders


@pytest.fixture
def folders(tmp_path):
    for name in ('one', 'two', 'sub/three'):
        for kind, picture, suffix in (('x', an_image(), 'jpg'), ('y', a_label(), 'png')):
            path = tmp_path / kind / f'{name}.{suffix}'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    (tmp_path / 'x/Thumbs.db').write_text('not a picture')
    (tmp_path / 'y/.hidden.png').write_text('not a picture')
    return data_of(tmp_path, source='dirs', train='x, y')


def test_folders_are_paired_by_name_in_sorted_order(folders):
    source = make_source(folders, 'train')
    root = folders.root
    stems = ('one', 'sub/three', 'two')
    assert source.files == [(f'{root}/x/{s}.jpg', f'{root}/y/{s}.png') for s in stems]
    np.testing.assert_array_equal(source.read(1)[1], a_label())


def test_images_without_a_partner_are_named(folders):
    root = Path(folders.root)
    (root / 'y/two.png').unlink()
    with pytest.raises(UserError, match=r'x/two.jpg has no partner of the same name in .*/y'):
        make_source(folders, 'train')
    (root / 'x/two.jpg').unlink()
    (root / 'x/one.jpg').unlink()
    (root / 'x/sub/three.jpg').unlink()
    with pytest.raises(UserError, match=r'y/one.png has no partner .* \(and 1 more\)'):
        make_source(folders, 'train')
    shutil.rmtree(root / 'y')
    (root / 'y').mkdir()
    with pytest.raises(UserError, match='holds no image'):
        make_source(folders, 'train')


def test_wrong_folders_are_named(folders):
    with folders.unlocked():
        folders.train = 'x'
        with pytest.raises(UserError, match="data.train = 'x': use 'IMAGES_DIR,LABELS_DIR'"):
            make_source(folders, 'train')
        folders.train = 'x,z'
        with pytest.raises(UserError, match='/z is not a folder'):
            make_source(folders, 'train')
        folders.train = 'x,y'
    Image.fromarray(an_image()).save(Path(folders.root, 'x/one.png'))
    with pytest.raises(UserError, match=r'one.jpg and .*one.png have the same name'):
        make_source(folders, 'train')


# ---- scenes


def test_scenes_are_a_range_of_indices():
    data = data_of('', source='scenes', train='10:13', classes='scenes')
    source = make_source(data, 'train')
    assert (source.length, source.name(2)) == (3, 'scene 12')
    for got, want in zip(source.read(2), scenes.draw(12), strict=True):
        np.testing.assert_array_equal(got, want)
    check_source(source)


@pytest.mark.parametrize('spec', ['5', '5:5', '7:5', 'a:b', '-1:5', ':5'])
def test_a_wrong_range_of_scenes_is_refused(spec):
    with pytest.raises(UserError, match='data.train'):
        make_source(data_of('', source='scenes', train=spec, classes='scenes'), 'train')


def test_image_and_label_of_different_size_are_named_with_their_sizes(folder):
    Image.fromarray(a_label(16, 12)).save(folder / 'label.png')
    with pytest.raises(UserError, match=r'image.png is 16x12 but .*label.png is 12x16'):
        read(folder)


# ---- checking


def test_a_missing_file_anywhere_in_the_set_is_found(folder):
    lines = ['image.png label.png'] * 1000
    lines[501] = 'image.png gone.png'
    lines[777] = 'lost.png label.png'
    (folder / 'train.txt').write_text('\n'.join(lines))
    source = make_source(data_of(folder), 'train')
    with pytest.raises(UserError, match=r'/gone.png does not exist \(and 1 more of 2000 files\)'):
        check_source(source)


def test_the_check_reports_the_first_bad_example(folder):
    def broken(index):
        if index >= 10:
            raise UserError(f'example {index} is bad')
        return an_image(), a_label()

    with pytest.raises(UserError, match='^example 10 is bad$'):
        check_source(Source(20, str, broken))


def test_if_bad_examples_are_skipped_the_check_lets_some_pass(folder):
    lines = ['image.png label.png'] * 100
    lines[50] = 'gone.png label.png'
    (folder / 'train.txt').write_text('\n'.join(lines))
    said = check_source(make_source(data_of(folder), 'train'), 100, skip=True)
    assert said == '; 1 of 100 examples that were tried cannot be read'
    assert check_source(Source(3, str, lambda i: (i, i)), skip=True) == ''
    (folder / 'train.txt').write_text('\n'.join(['gone.png lost.png', *lines[:1]]))
    check_source(make_source(data_of(folder), 'train'), skip=True)
    (folder / 'train.txt').write_text('\n'.join(['gone.png lost.png', 'gone.png label.png']))
    with pytest.raises(UserError, match=r'/gone.png does not exist \(and 2 more of 4 files\)'):
        check_source(make_source(data_of(folder), 'train'), skip=True)


def test_an_address_that_tensorflow_does_not_know_needs_a_mount(folder):
    advice = r'TensorFlow cannot read s3://; mount the bucket \(mountpoint-s3, gcsfuse\)'
    for changes in ({}, {'source': 'dirs', 'train': 'x,y'}, {'source': 'tfds:camvid'}):
        with pytest.raises(UserError, match=f's3://bucket/.*{advice}'):
            make_source(data_of('s3://bucket/data', **changes), 'train')
    (folder / 'train.txt').write_text('s3://bucket/image.png label.png')
    with pytest.raises(UserError, match=f's3://bucket/image.png: {advice}'):
        check_source(make_source(data_of(folder), 'train'))


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv('HOME', str(folder))
    for root, train in (('~', 'train.txt'), (str(folder), '~/train.txt')):
        np.testing.assert_array_equal(read(root, train=train)[1], a_label())


# ---- real files


def test_voc_labels_hold_the_classes_whose_colours_they_show():
    folder = os.environ.get('PSP_JAX_SAMPLES')
    if not folder:
        pytest.skip('PSP_JAX_SAMPLES is not set')
    data = data_of(f'{folder}/voc2012', source='dirs', train='images,masks', classes='voc2012')
    source = make_source(data, 'train')
    assert source.length == 3
    for index in range(3):
        image, label = source.read(index)
        assert image.shape[:2] == label.shape and 1 < len(np.unique(label)) < 8
        known = label != 255
        drawn = np.asarray(Image.open(source.files[index][1]).convert('RGB'))
        np.testing.assert_array_equal(label_space('voc2012').colors[label[known]], drawn[known])
        assert known.mean() > 0.8
