import errno
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from psp_jax.data import decode, scenes
from psp_jax.data.examples import Source
from psp_jax.data.labels import label_space
from psp_jax.data.sources import check_source, make_source
from psp_jax.errors import PassingError, UserError

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


def save_palette(path, label):
    picture = Image.fromarray(label)
    picture.putpalette(np.random.default_rng(2).integers(0, 256, 768, np.uint8).tobytes())
    assert picture.mode == 'P'
    picture.save(path)


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


# ---- images


@pytest.mark.parametrize('mode', ['L', '1', 'LA', 'RGBA', 'P', 'CMYK', 'YCbCr'])
def test_images_of_every_mode_become_rgb(folder, mode):
    ramp = np.repeat(np.linspace(0, 255, 16).astype(np.uint8)[None], 12, 0)
    grey = Image.fromarray(ramp).convert('RGB')
    suffix = 'jpg' if mode in ('CMYK', 'YCbCr') else 'png'
    options = {'1': {'dither': 0}, 'P': {'palette': Image.Palette.ADAPTIVE}}.get(mode, {})
    converted = grey.convert(mode, **options)
    options = {'quality': 100} if suffix == 'jpg' else {}
    converted.save(folder / f'image.{suffix}', **options)
    (folder / 'train.txt').write_text(f'image.{suffix} label.png')
    image, _ = read(folder)
    want = np.where(ramp >= 128, 255, 0) if mode == '1' else ramp
    assert image.shape == (12, 16, 3) and image.dtype == np.uint8
    tolerance = 6 if mode == 'CMYK' else 2
    assert np.abs(image.astype(int) - want[..., None]).max() <= tolerance


def test_sixteen_bit_grey_is_scaled_and_not_clipped(folder):
    ramp = np.repeat(np.linspace(0, 65535, 16).astype(np.uint16)[None], 12, 0)
    Image.fromarray(ramp).save(folder / 'image.png')
    image, _ = read(folder)
    np.testing.assert_array_equal(image, np.repeat((ramp // 256)[..., None], 3, -1))


def test_the_exif_orientation_is_applied(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn to the right
    upright = an_image()
    Image.fromarray(np.rot90(upright)).save(folder / 'image.png', exif=exif)
    np.testing.assert_array_equal(read(folder)[0], upright)


@pytest.mark.parametrize('suffix', ['jpg', 'png'])
@pytest.mark.parametrize('keep', [0, 20, 0.5, 0.97])
def test_a_truncated_file_is_named(folder, suffix, keep):
    path = folder / f'image.{suffix}'
    Image.fromarray(an_image(200, 200)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep > 1 else int(len(content) * keep)])
    (folder / 'train.txt').write_text(f'{path.name} label.png')
    with pytest.raises(UserError, match=f'{path} cannot be decoded'):
        read(folder)
    (folder / 'train.txt').write_text(f'label.png {path.name}')
    with pytest.raises(UserError, match=f'{path} cannot be decoded'):
        read(folder)


def test_a_png_whose_checksum_does_not_fit_is_named(folder):
    content = png(a_label(), 8)
    at = content.index(b'IDAT') - 4
    size = int.from_bytes(content[at : at + 4])
    torn = bytearray(content)
    torn[at + 8 + size] ^= 1  # of the checksum alone: the pixels are as they were
    (folder / 'label.png').write_bytes(torn)
    np.testing.assert_array_equal(np.asarray(Image.open(folder / 'label.png')), a_label())
    with pytest.raises(UserError, match='label.png cannot be decoded'):
        read(folder)


# ---- labels


def test_a_palette_label_gives_its_indices(folder):
    save_palette(folder / 'label.png', a_label())
    np.testing.assert_array_equal(read(folder)[1], a_label())
    luminance = np.asarray(Image.open(folder / 'label.png').convert('L'))
    assert (luminance != a_label()).any()  # what other decoders would give


def png(label, depth, color_type=0):
    """A grey PNG with `depth` bits a pixel; Pillow reads but does not write these."""
    bits = np.unpackbits(label[..., None], axis=-1)[..., -depth:].reshape(len(label), -1)
    rows = b''.join(b'\0' + np.packbits(row).tobytes() for row in bits)
    header = struct.pack('>IIBBBBB', label.shape[1], label.shape[0], depth, color_type, 0, 0, 0)

    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', check)

    parts = (b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*part) for part in parts)


@pytest.mark.parametrize('depth', [1, 2, 4, 8])
def test_grey_labels_of_few_bits_give_the_stored_values(folder, depth):
    label = a_label() % min(CLASSES, 2**depth)
    (folder / 'label.png').write_bytes(png(label, depth))
    np.testing.assert_array_equal(read(folder)[1], label)


def test_sixteen_bit_labels_give_their_values(folder):
    Image.fromarray(a_label().astype(np.uint16)).save(folder / 'label.png')
    got = read(folder)[1]
    np.testing.assert_array_equal(got, a_label())
    assert got.dtype == np.uint8
    Image.fromarray(a_label().astype(np.uint16) + 300).save(folder / 'label.png')
    with pytest.raises(UserError, match=r'label.png: label value 30\d is outside 0..255'):
        read(folder)


def test_the_label_map_is_applied(folder):
    want = np.where(a_label() == 3, 255, a_label())
    np.testing.assert_array_equal(read(folder, label_map='{3: 255}')[1], want)


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA'])
def test_a_label_of_colours_is_refused(folder, mode):
    Image.fromarray(an_image()).convert(mode).save(folder / 'label.png')
    message = f'label.png is a label of mode {mode}: labels must be index'
    with pytest.raises(UserError, match=message):
        read(folder)


def test_a_lossy_label_is_refused(folder):
    Image.fromarray(a_label()).save(folder / 'label.jpg')
    (folder / 'train.txt').write_text('image.png label.jpg')
    with pytest.raises(UserError, match='label.jpg is a JPEG.*must be PNG'):
        read(folder)


@pytest.mark.parametrize(
    ('value', 'changes', 'message'),
    [
        (5, {}, r'label value 5 is outside the 5 classes 0..4 .*data.label_map=minus_one.*5: 255'),
        (254, {}, r'label value 254 is outside the 5 classes 0..4 .*check data.classes'),
        (33, {'classes': 'cityscapes'}, r"value 33 is outside the 19 .*='cityscapes_ids'"),
        (150, {'classes': 'ade20k'}, r"value 150 is outside the 150 .*='minus_one'"),
        (11, {'classes': 'camvid'}, r"value 11 is outside the 11 .*='{11: 255}'"),
        (7, {'label_map': 'minus_one'}, r'value 7 \(class 6 by data.label_map\) is outside'),
    ],
)
def test_a_value_outside_the_classes_is_named_with_its_likely_cause(
    folder, value, changes, message
):
    label = a_label()
    label[5, 5], label[6, 6] = value, 255
    Image.fromarray(label).save(folder / 'label.png')
    with pytest.raises(UserError, match=f'{folder}/label.png: .*{message}'):
        read(folder, **changes)


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
    assert said == '; of 100 that were tried 1 cannot be read'
    assert check_source(Source(3, str, lambda i: (i, i)), skip=True) == ''
    (folder / 'train.txt').write_text('\n'.join(['gone.png lost.png', *lines[:1]]))
    check_source(make_source(data_of(folder), 'train'), skip=True)
    (folder / 'train.txt').write_text('\n'.join(['gone.png lost.png', 'gone.png label.png']))
    with pytest.raises(UserError, match=r'/gone.png does not exist \(and 2 more of 4 files\)'):
        check_source(make_source(data_of(folder), 'train'), skip=True)


def test_a_disk_that_does_not_answer_is_asked_again(folder, monkeypatch):
    content, answers = (folder / 'image.png').read_bytes(), []

    def answering(*args):
        if answers.pop():
            return open(*args)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(decode, 'open', answering, raising=False)
    monkeypatch.setattr(decode, '_PAUSES', (0, 0))
    answers[:] = [True, False, False]
    assert decode.read_bytes(str(folder / 'image.png')) == content
    answers[:] = [False] * 3
    with pytest.raises(PassingError, match='image.png cannot be read: Input/output error'):
        decode.read_bytes(str(folder / 'image.png'))
    with pytest.raises(UserError, match='Is a directory'):
        answers[:] = [True]
        decode.read_bytes(str(folder))


def test_an_address_that_tensorflow_does_not_know_needs_a_mount(folder):
    advice = r'TensorFlow knows no s3://; mount the bucket \(mountpoint-s3, gcsfuse\)'
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


def test_ade_labels_are_read_with_the_map_minus_one():
    folder = os.environ.get('PSP_JAX_SAMPLES')
    if not folder:
        pytest.skip('PSP_JAX_SAMPLES is not set')
    changes = {'source': 'dirs', 'train': 'images,masks', 'classes': 'ade20k'}
    data = data_of(f'{folder}/ade20k', label_map='minus_one', **changes)
    source = make_source(data, 'train')
    for index in range(source.length):
        stored = np.asarray(Image.open(source.files[index][1])).astype(int)
        want = np.where(stored == 0, 255, stored - 1)
        np.testing.assert_array_equal(source.read(index)[1], want)
