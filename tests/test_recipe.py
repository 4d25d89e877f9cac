"""The recipe compared with the reference: learning rates, and augmentation as OpenCV does it."""

import os
from pathlib import Path

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_augment import settings_of, steps_of_opencv

from psp_jax.config_check import load_config
from psp_jax.data.augment import augment
from psp_jax.optimizer import make_schedule

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize('recipe', ['paper', 'semseg'])
@pytest.mark.parametrize('name', ['ade20k', 'voc2012', 'cityscapes'])
def test_the_rate_of_every_step_is_the_formulas(name, recipe, measured):
    config = load_config(f'{ROOT}/configs/{name}.py:recipe={recipe}')
    steps = np.arange(config.total_steps)
    rates = np.asarray(make_schedule(config)(jnp.asarray(steps)), np.float64)
    # Of the first rate: optax takes 1 - n / total in float32, which has few digits in the end.
    error = np.abs(rates - 0.01 * (1 - steps / config.total_steps) ** 0.9).max() / 0.01
    measured(f'learning rate of {name}, {recipe}, over all steps', error, 1e-6)


# ---- Augmentation. `augment` draws seven numbers: scale, whether to rotate, angle, whether to
# blur, whether to mirror, row and column of the crop.


class Draws:
    """A random generator that returns the given seven numbers."""

    def __init__(self, *numbers):
        self.numbers = np.array(numbers)

    def random(self, count):
        assert count == len(self.numbers)
        return self.numbers


def photographs():
    """Yields (image, label): a drawn one with texture, and CamVid's if its folder is given."""
    rng = np.random.default_rng(0)
    fields = [cv2.GaussianBlur(rng.random((360, 480)), (0, 0), 12) for _ in range(9)]
    label = np.argmax(fields, 0).astype(np.uint8)
    texture = cv2.GaussianBlur(rng.normal(0, 60, (360, 480, 3)), (0, 0), 1.5)
    yield np.clip(label[..., None] * 25 + 20 + texture, 0, 255).astype(np.uint8), label
    root = os.environ.get('PSP_JAX_CAMVID')
    if root:
        lines = (Path(root) / 'val.txt').read_text().split('\n')
        for line in filter(None, lines[:60:20]):
            image, label = (np.asarray(Image.open(Path(root) / p)) for p in line.split(' '))
            yield image, label


def middle_of_opencvs(image, label, scale=1.0, angle=None, blur=False, mirror=False, crop=193):
    """Applies semseg's transforms to the whole image in turn, and takes the crop from its middle.

    Also returns which pixels the rotated image covers.
    """
    whole = steps_of_opencv(image, label, scale, angle, blur, mirror)
    top, left = ((side - crop) // 2 for side in whole[1].shape)
    return tuple(array[top : top + crop, left : left + crop] for array in whole)


def exact_warp(image, label, scale, angle, mirror, crop=193):
    """Does the same in float64, with a single bilinear interpolation of the image."""
    height, width = round(label.shape[0] * scale), round(label.shape[1] * scale)
    top, left = (height - crop) // 2, (width - crop) // 2
    y, x = np.mgrid[top : top + crop, left : left + crop].astype(float)
    if mirror:
        x = width - 1 - x
    turn, (cy, cx) = np.deg2rad(angle), (height / 2, width / 2)
    back_x = np.cos(turn) * (x - cx) - np.sin(turn) * (y - cy) + cx
    back_y = np.sin(turn) * (x - cx) + np.cos(turn) * (y - cy) + cy
    # The label goes to the nearest pixel of the scaled picture, and from there as OpenCV resizes.
    row, column = np.rint(back_y).astype(int), np.rint(back_x).astype(int)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    row, column = (np.clip(v, 0, n - 1) for v, n in ((row, height), (column, width)))
    label = np.where(
        inside, label[(row * (1 / scale)).astype(int), (column * (1 / scale)).astype(int)], 255
    )
    v, u = (back_y + 0.5) / scale - 0.5, (back_x + 0.5) / scale - 0.5
    v, u = np.clip(v, 0, image.shape[0] - 1.001), np.clip(u, 0, image.shape[1] - 1.001)
    i, j = v.astype(int), u.astype(int)
    a, b = (v - i)[..., None], (u - j)[..., None]
    f = image.astype(float)
    upper = f[i, j] * (1 - b) + f[i, j + 1] * b
    lower = f[i + 1, j] * (1 - b) + f[i + 1, j + 1] * b
    return upper * (1 - a) + lower * a, label, inside


ALONE = {
    'scale 0.7': {'scale': 0.7},
    'scale 1.6': {'scale': 1.6},
    'rotation 8 degrees': {'angle': 8.0},
    'rotation -3 degrees': {'angle': -3.0},
    'blur': {'blur': True},
    'mirror': {'mirror': True},
    'crop': {},
}
COMPOSED = {'scale': 1.3, 'angle': 6.0, 'blur': True, 'mirror': True}


def ours(image, label, scale=1.0, angle=0.0, blur=False, mirror=False):
    data = settings_of(
        crop=193, scale=(scale, scale), rotate=abs(angle), blur=float(blur), mirror=float(mirror)
    )
    canvas = [round(side * scale) for side in label.shape]
    # the middle crop: first = int(u * (canvas - crop + 1))
    u = [((side - 193) // 2 + 0.5) / (side - 193 + 1) for side in canvas]
    draws = Draws(0.0, 0.0, 1.0 if angle > 0 else 0.0, 0.0, 0.0, *u)
    return augment(image, label, draws, data)


def compare(got, expected):
    """Returns the mean absolute difference of the images inside, and the share of other labels."""
    image, label, inside = expected
    core = cv2.erode(inside.astype(np.uint8), np.ones((7, 7))).astype(bool)
    return np.abs(got[0] - image)[core].mean(), (got[1] != label).mean()


@pytest.mark.parametrize('name', ALONE)
def test_each_augmentation_alone_is_opencvs(name, measured):
    found = [
        compare(ours(*x, **ALONE[name]), middle_of_opencvs(*x, **ALONE[name]))
        for x in photographs()
    ]
    grey, labels = np.max(found, 0)
    measured(f'{name} against OpenCV, mean grey levels', grey, 1.5)
    measured(f'{name} against OpenCV, share of labels', labels, 0 if 'scale' in name else 0.005)


def test_all_composed_are_close_to_opencvs_sequence(measured):
    found = [
        compare(ours(*x, **COMPOSED), middle_of_opencvs(*x, **COMPOSED)) for x in photographs()
    ]
    grey, labels = np.max(found, 0)
    measured('all augmentations against OpenCV, mean grey levels', grey, 6)
    measured('all augmentations against OpenCV, share of labels', labels, 0.04)


def test_all_composed_are_one_exact_warp(measured):
    changes = {'scale': 1.3, 'angle': 6.0, 'mirror': True}
    found = [compare(ours(*x, **changes), exact_warp(*x, **changes)) for x in photographs()]
    grey, labels = np.max(found, 0)
    measured('scale, rotation, mirror and crop against one exact warp, mean grey levels', grey, 0.5)
    measured(
        'scale, rotation, mirror and crop against one exact warp, share of labels', labels, 1e-3
    )
