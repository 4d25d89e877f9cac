import errno
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from psp_jax.data import decode
from psp_jax.data.decode import decode_image, decode_label, to_classes
from psp_jax.data.labels import label_space, label_table
from psp_jax.errors import PassingError, UserError

IMAGE = np.random.default_rng(1).integers(0, 256, (12, 16, 3), np.uint8)
LABEL = np.random.default_rng(0).integers(0, 5, (12, 16), np.uint8)
RAMP = np.repeat(np.linspace(0, 255, 16).astype(np.uint8)[None], 12, 0)


def encoded(array, kind='png', mode=None, **options):
    picture = Image.fromarray(array)
    file = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(file, kind, **options)
    return file.getvalue()


# ---- images


@pytest.mark.parametrize('mode', ['L', '1', 'LA', 'RGBA', 'P', 'CMYK', 'YCbCr'])
def test_images_of_every_mode_become_rgb(mode):
    options = {'1': {'dither': 0}, 'P': {'palette': Image.Palette.ADAPTIVE}}.get(mode, {})
    picture = Image.fromarray(RAMP).convert('RGB').convert(mode, **options)
    file = io.BytesIO()
    picture.save(file, 'jpeg' if mode in ('CMYK', 'YCbCr') else 'png', quality=100)
    image = decode_image(file.getvalue(), '')
    want = np.where(RAMP >= 128, 255, 0) if mode == '1' else RAMP
    assert image.shape == (12, 16, 3) and image.dtype == np.uint8
    tolerance = 6 if mode == 'CMYK' else 2
    assert np.abs(image.astype(int) - want[..., None]).max() <= tolerance


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    ramp = np.repeat(np.linspace(0, 65535, 16).astype(np.uint16)[None], 12, 0)
    want = np.repeat((ramp // 256)[..., None], 3, -1)
    np.testing.assert_array_equal(decode_image(encoded(ramp), ''), want)


def test_the_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn to the right
    turned = encoded(np.rot90(IMAGE), exif=exif)
    np.testing.assert_array_equal(decode_image(turned, ''), IMAGE)


@pytest.mark.parametrize('decoded', [decode_image, decode_label])
@pytest.mark.parametrize('kind', ['jpeg', 'png'])
@pytest.mark.parametrize('keep', [0, 20, 0.5, 0.97])
def test_a_truncated_file_is_named(decoded, kind, keep):
    content = encoded(np.random.default_rng(1).integers(0, 256, (200, 200), np.uint8), kind)
    content = content[: keep if keep > 1 else int(len(content) * keep)]
    with pytest.raises(UserError, match='^x/a.png cannot be decoded'):
        decoded(content, 'x/a.png')


def test_a_file_of_another_kind_is_named():
    with pytest.raises(UserError, match='a.png cannot be decoded .not a known image format'):
        decode_image(b'<html>404</html>', 'a.png')


def test_a_png_whose_checksum_does_not_fit_is_named():
    content = png(LABEL, 8)
    at = content.index(b'IDAT') - 4
    torn = bytearray(content)
    torn[at + 8 + int.from_bytes(content[at : at + 4])] ^= 1  # the pixels are as they were
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(torn))), LABEL)
    with pytest.raises(UserError, match='a.png cannot be decoded'):
        decode_label(bytes(torn), 'a.png')


# ---- labels


def test_a_palette_label_gives_its_indices():
    picture = Image.fromarray(LABEL)
    picture.putpalette(np.random.default_rng(2).integers(0, 256, 768, np.uint8).tobytes())
    picture.save(file := io.BytesIO(), 'png')
    np.testing.assert_array_equal(decode_label(file.getvalue(), ''), LABEL)
    assert (np.asarray(picture.convert('L')) != LABEL).any()  # what other decoders give


def png(label, depth):
    """A grey PNG with `depth` bits a pixel; Pillow reads but does not write these."""
    bits = np.unpackbits(label[..., None], axis=-1)[..., -depth:].reshape(len(label), -1)
    rows = b''.join(b'\0' + np.packbits(row).tobytes() for row in bits)
    header = struct.pack('>IIBBBBB', label.shape[1], label.shape[0], depth, 0, 0, 0, 0)

    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', check)

    parts = (b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*part) for part in parts)


@pytest.mark.parametrize('depth', [1, 2, 4, 8])
def test_grey_labels_of_few_bits_give_the_stored_values(depth):
    label = LABEL % min(5, 2**depth)
    np.testing.assert_array_equal(decode_label(png(label, depth), ''), label)


def test_sixteen_bit_labels_give_their_values():
    label = LABEL.astype(np.uint16) + 300
    np.testing.assert_array_equal(decode_label(encoded(label), ''), label)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (encoded(IMAGE), 'a.png is a label of mode RGB: labels must be index'),
        (encoded(IMAGE, mode='RGBA'), 'a.png is a label of mode RGBA'),
        (encoded(LABEL, mode='LA'), 'a.png is a label of mode LA'),
        (encoded(LABEL, 'jpeg'), 'a.png is a JPEG.*must be PNG'),
    ],
)
def test_labels_of_colours_and_lossy_ones_are_refused(content, message):
    with pytest.raises(UserError, match=message):
        decode_label(content, 'a.png')


def classes_of(stored, classes='5', label_map=''):
    return to_classes(stored, label_table(label_map), label_space(classes), 'a.png')


def test_the_label_map_is_applied():
    for stored in (LABEL, LABEL.astype(np.int32)):
        label = classes_of(stored, label_map='{3: 255}')
        np.testing.assert_array_equal(label, np.where(LABEL == 3, 255, LABEL))
        assert label.dtype == np.uint8


@pytest.mark.parametrize(
    ('value', 'changes', 'message'),
    [
        (300, {}, 'label value 300 is outside 0..255'),
        (5, {}, r'label value 5 is outside the 5 classes 0..4 .*data.label_map=minus_one.*5: 255'),
        (254, {}, r'label value 254 is outside the 5 classes 0..4 .*check data.classes'),
        (33, {'classes': 'cityscapes'}, r"value 33 is outside the 19 .*='cityscapes_ids'"),
        (150, {'classes': 'ade20k'}, r"value 150 is outside the 150 .*='minus_one'"),
        (11, {'classes': 'camvid'}, r"value 11 is outside the 11 .*='{11: 255}'"),
        (7, {'label_map': 'minus_one'}, r'value 7 \(class 6 by data.label_map\) is outside'),
    ],
)
def test_a_value_outside_the_classes_is_named_with_its_likely_cause(value, changes, message):
    stored = LABEL.astype(np.uint16)
    stored[5, 5], stored[6, 6] = value, 255
    with pytest.raises(UserError, match=f'^a.png: .*{message}'):
        classes_of(stored, **changes)


# ---- files


def test_a_disk_that_does_not_answer_is_asked_three_times(tmp_path, monkeypatch):
    path, answers = tmp_path / 'a.png', []
    path.write_bytes(b'content')

    def answering(*args):
        if answers.pop():
            return open(*args)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(decode, 'open', answering, raising=False)
    monkeypatch.setattr(decode, '_PAUSES', (0, 0))
    answers[:] = [True, False, False]
    assert decode.read_bytes(str(path)) == b'content'
    answers[:] = [False] * 3
    with pytest.raises(PassingError, match='a.png cannot be read: Input/output error'):
        decode.read_bytes(str(path))
    with pytest.raises(UserError, match='Is a directory'):
        answers[:] = [True]
        decode.read_bytes(str(tmp_path))


def test_addresses_are_read_by_tensorflow_or_need_a_mount(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'content')
    assert decode.read_bytes(f'file://{tmp_path}/a.png') == b'content'
    assert decode.exists(f'file://{tmp_path}/a.png')
    advice = (
        r'^s3://b/a.png: TensorFlow cannot read s3://; mount the bucket \(mountpoint-s3, gcsfuse\)'
    )
    for function in (decode.read_bytes, decode.exists):
        with pytest.raises(UserError, match=advice):
            function('s3://b/a.png')
