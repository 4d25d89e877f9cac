import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from psp_jax.data.augment import augment

MEAN = (123.675, 116.28, 103.53)
FILL = np.array([124, 116, 104])


def settings_of(**changes):
    plain = {'crop': 32, 'mean': MEAN, 'scale': (1.0, 1.0), 'rotate': 0.0, 'blur': 0.0}
    return ConfigDict({**plain, 'mirror': 0.0, **changes})


def everything(**changes):
    recipe = {'scale': (0.5, 2.0), 'rotate': 10.0, 'blur': 0.5, 'mirror': 0.5}
    return settings_of(**{**recipe, **changes})


def smooth_image(rng, height, width):
    waves = cv2.GaussianBlur(rng.random((height, width, 3)), (0, 0), 4)
    return np.rint(cv2.normalize(waves, None, 0, 255, cv2.NORM_MINMAX)).astype(np.uint8)


def blobs(rng, height, width, classes=4):
    fields = [cv2.GaussianBlur(rng.random((height, width)), (0, 0), 8) for _ in range(classes)]
    return np.argmax(fields, 0).astype(np.uint8)


def steps_of_opencv(image, label, scale, angle, blur, mirror):
    """semseg's transforms of the whole picture in float32 before the crop; angle None = unturned.

    Also which pixels the picture covers after the rotation.
    """
    image = cv2.resize(
        image.astype(np.float32), None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR
    )
    label = cv2.resize(label, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    height, width = label.shape
    inside = np.ones_like(label)
    if angle is not None:
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1)
        image = cv2.warpAffine(image, matrix, (width, height), borderValue=FILL.tolist())
        nearest = {'flags': cv2.INTER_NEAREST, 'borderMode': cv2.BORDER_CONSTANT}
        label = cv2.warpAffine(label, matrix, (width, height), borderValue=255, **nearest)
        inside = cv2.warpAffine(inside, matrix, (width, height), borderValue=0, **nearest)
    if blur:
        image = cv2.GaussianBlur(image, (5, 5), 0)
    if mirror:
        image, label, inside = image[:, ::-1], label[:, ::-1], inside[:, ::-1]
    return image, label, inside


def one_after_the_other(image, label, seed, data):
    """The recipe step by step on the whole picture, in float32, from the documented draws."""
    draws = np.random.default_rng(seed).random(7)
    image, label, inside = steps_of_opencv(
        image,
        label,
        scale=data.scale[0] + (data.scale[1] - data.scale[0]) * draws[0],
        angle=-data.rotate + 2 * data.rotate * draws[2] if draws[1] < 0.5 and data.rotate else None,
        blur=draws[3] < data.blur,
        mirror=draws[4] < data.mirror,
    )
    height, width = label.shape
    crop_h, crop_w = data.crop
    pad_h, pad_w = max(crop_h - height, 0), max(crop_w - width, 0)
    top, left = int(pad_h / 2), int(pad_w / 2)
    pads = ((top, pad_h - top), (left, pad_w - left))
    image = np.stack(
        [np.pad(image[..., c], pads, constant_values=FILL[c]) for c in range(3)], axis=-1
    )
    label = np.pad(label, pads, constant_values=255)
    inside = np.pad(inside, pads)
    row = int(draws[5] * (label.shape[0] - crop_h + 1))
    column = int(draws[6] * (label.shape[1] - crop_w + 1))
    window = (slice(row, row + crop_h), slice(column, column + crop_w))
    return image[window], label[window], inside[window]


sizes = st.integers(4, 70)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32), sizes, sizes, st.tuples(sizes, sizes), st.floats(0.3, 2.5))
def test_without_rotation_it_equals_the_steps_done_one_after_the_other(seed, h, w, crop, scale):
    # OpenCV copies, whatever the scale, if the size does not change.
    assume((round(h * scale), round(w * scale)) != (h, w))
    rng = np.random.default_rng(seed)
    image, label = smooth_image(rng, h, w), rng.integers(0, 20, (h, w), np.uint8)
    data = settings_of(crop=crop, scale=(scale, scale), blur=0.5, mirror=0.5)
    want_image, want_label, _ = one_after_the_other(image, label, seed, data)
    got_image, got_label = augment(image, label, np.random.default_rng(seed), data)
    np.testing.assert_array_equal(got_label, want_label)
    assert np.abs(got_image - want_image).max() <= 2


def test_the_label_is_resized_as_opencv_does_and_the_image_at_pixel_centres():
    columns = np.arange(10, dtype=np.uint8)
    label = np.broadcast_to(columns, (10, 10))
    image = np.broadcast_to((20 * columns)[:, None], (10, 10, 3)).copy()
    rng = np.random.default_rng(0)
    _, got = augment(image, label, rng, settings_of(crop=4, scale=(0.4, 0.4)))
    assert got[0].tolist() == [0, 2, 5, 7]  # floor(i * 10 / 4)
    half, _ = augment(image[:8, :8], label[:8, :8], rng, settings_of(crop=4, scale=(0.5, 0.5)))
    assert half[0, :, 0].tolist() == [10, 50, 90, 130]  # 20 * (2 i + 0.5)
    double, _ = augment(image[:2, :2], label[:2, :2], rng, settings_of(crop=4, scale=(2.0, 2.0)))
    assert double[0, :, 0].tolist() == [0, 5, 15, 20]


def test_the_blur_is_the_binomial_one_and_sees_past_the_crop():
    image = np.zeros((64, 64, 3), np.uint8)
    image[::8, ::8] = 255
    label = np.zeros((64, 64), np.uint8)
    spot = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    spots = np.zeros((72, 72))
    for y in range(0, 64, 8):
        for x in range(0, 64, 8):
            spots[y : y + 5, x : x + 5] += 255 * spot
    spots = spots[2:66, 2:66]
    for seed in range(20):
        draws = np.random.default_rng(seed).random(7)
        y, x = int(draws[5] * 53), int(draws[6] * 53)
        got, _ = augment(image, label, np.random.default_rng(seed), settings_of(crop=12, blur=1.0))
        inner = slice(3, 61)
        want = np.full((64, 64), np.nan)
        want[inner, inner] = spots[inner, inner]
        window = want[y : y + 12, x : x + 12]
        known = ~np.isnan(window)
        assert np.abs(got[..., 0] - window)[known].max() <= 0.51


def test_with_everything_off_the_crop_is_any_part_of_the_image():
    rows, columns = np.mgrid[0:40, 0:50].astype(np.uint8)
    image = np.stack([rows, columns, rows + columns], -1)
    label = (rows + 2 * columns) % 19
    corners = set()
    for seed in range(300):
        rng = np.random.default_rng(seed)
        got, got_label = augment(image, label, rng, settings_of(crop=(37, 48)))
        y, x = map(int, got[0, 0, :2])
        np.testing.assert_array_equal(got, image[y : y + 37, x : x + 48])
        np.testing.assert_array_equal(got_label, label[y : y + 37, x : x + 48])
        corners.add((y, x))
    assert corners == {(y, x) for y in range(4) for x in range(3)}  # both ends included


@pytest.mark.parametrize(
    'changes',
    [
        {'scale': (0.5, 2.0)},
        {'rotate': 10.0},
        {'rotate': 180.0},
        {'blur': 1.0},
        {'mirror': 1.0},
        {'crop': 200},
        {'scale': (0.5, 2.0), 'rotate': 10.0, 'blur': 0.5, 'mirror': 0.5},
    ],
    ids=lambda changes: '+'.join(changes),
)
def test_image_and_label_stay_aligned(changes):
    colors = np.array([[0, 0, 255], [255, 0, 0], [0, 255, 0], [255, 255, 0]], np.uint8)
    compared = 0
    for seed in range(40):
        label = blobs(np.random.default_rng(seed), 90, 110)
        data = settings_of(**{'crop': (73, 65), **changes})
        image, got = augment(colors[label], label, np.random.default_rng(seed), data)
        # Away from the borders between classes each pixel has the colour of its label.
        ends = {'kernel': np.ones((9, 9)), 'borderType': cv2.BORDER_CONSTANT, 'borderValue': 255}
        flat = (cv2.erode(got, **ends) == cv2.dilate(got, **ends)) & (got != 255)
        compared += flat.sum()
        assert np.abs(image[flat].astype(int) - colors[got[flat]]).max(initial=0) <= 1
    assert compared > 20_000


def test_padding_is_centred_and_exactly_the_mean_and_ignore():
    image = np.random.default_rng(0).integers(0, 256, (10, 13, 3), np.uint8)
    label = np.zeros((10, 13), np.uint8)
    for seed in range(5):  # there is one place only
        data = settings_of(crop=(21, 20))
        got, got_label = augment(image, label, np.random.default_rng(seed), data)
        want, want_label = np.tile(FILL, (21, 20, 1)), np.full((21, 20), 255)
        want[5:15, 3:16], want_label[5:15, 3:16] = image, 0  # int(11 / 2), int(7 / 2)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(got_label, want_label)


def test_the_draws_are_distributed_as_the_recipe_says():
    image = np.full((40, 40, 3), 200, np.uint8)
    image[:, :20] = 20
    label = np.zeros((40, 40), np.uint8)
    data = everything(crop=(201, 201), blur=0.0)
    scales, tilted, mirrored = [], 0, 0
    for seed in range(1000):
        got, got_label = augment(image, label, np.random.default_rng(seed), data)
        valid = got_label == 0
        heights = valid.any(1).sum()
        scales.append(heights / 40)
        tilted += valid.sum() != heights * valid.any(0).sum()
        mirrored += got[100, 95, 0] > 100
    assert 0.5 <= min(scales) < 0.52 and 1.98 < max(scales) <= 2.0
    assert np.mean(scales) == pytest.approx(1.25, abs=0.05)  # 4 standard errors
    assert np.var(scales) == pytest.approx(1.5**2 / 12, abs=0.03)
    assert 410 < tilted < 565  # half, less the angles too small to see
    assert 435 < mirrored < 565


def test_switching_one_augmentation_off_leaves_the_other_draws_alone():
    rng = np.random.default_rng(0)
    image, label = smooth_image(rng, 70, 80), blobs(rng, 70, 80)
    for seed in range(20):
        rngs = [np.random.default_rng(seed) for _ in range(2)]
        blurred = augment(image, label, rngs[0], everything(blur=1.0))
        sharp = augment(image, label, rngs[1], everything(blur=0.0))
        np.testing.assert_array_equal(blurred[1], sharp[1])
        assert (blurred[0] != sharp[0]).any()
        assert rngs[0].random() == rngs[1].random()


def test_the_inputs_are_left_as_they_were():
    rng = np.random.default_rng(0)
    image, label = smooth_image(rng, 40, 40), blobs(rng, 40, 40)
    image.flags.writeable = label.flags.writeable = False
    before = image.copy(), label.copy()
    got_image, got_label = augment(image, label, rng, everything(crop=(33, 57)))
    assert (got_image.shape, got_image.dtype) == ((33, 57, 3), np.uint8)
    assert (got_label.shape, got_label.dtype) == ((33, 57), np.uint8)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(label, before[1])
