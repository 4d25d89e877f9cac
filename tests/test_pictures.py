"""Drawn labels, predictions and errors."""

import io

import numpy as np
import pytest
from PIL import Image

from psp_jax.data.labels import UNLABELLED, label_space
from psp_jax.report import pictures
from psp_jax.report.pictures import Panel

SPACE = label_space('camvid')


def example(height, width):
    rng = np.random.default_rng(height)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    label, prediction = rng.integers(0, 11, (2, height, width), np.uint8)
    label[0] = 255
    return Panel(image, label, prediction)


def test_panels_show_image_label_and_prediction_side_by_side():
    panels = [example(240, 100), example(200, 90)]
    drawn = pictures.draw_panels(panels, SPACE)
    colors = np.vstack([SPACE.colors, np.tile(UNLABELLED, (245, 1))])
    for row, panel in enumerate(panels):
        height, width = panel.label.shape
        tiles = panel.image, colors[panel.label], colors[panel.prediction]
        for column, tile in enumerate(tiles):
            top, left = 24 + row * 244, column * 104  # below the header, with gaps of 4 pixels
            np.testing.assert_array_equal(drawn[top : top + height, left : left + width], tile)


def test_errors_are_red_ignored_pixels_dark_and_the_rest_grey():
    panel = example(40, 50)
    drawn = pictures.draw_errors(panel)
    ignored = panel.label == 255
    wrong = ~ignored & (panel.label != panel.prediction)
    assert (drawn[wrong] == pictures.WRONG).all() and (drawn[ignored] == UNLABELLED).all()
    right = drawn[~ignored & ~wrong].astype(int)
    assert np.ptp(right, -1).max() == 0 and right.min() > max(UNLABELLED)
    grey = panel.image[~ignored & ~wrong] @ [0.299, 0.587, 0.114]
    assert np.corrcoef(right[:, 0], grey)[0, 1] > 0.99


def test_an_overlay_mixes_image_and_class_colours_and_has_a_legend():
    image, _, ids = example(60, 200)
    ids[:] = 3
    drawn = pictures.draw_overlay(image, ids, SPACE)
    mean = (image.astype(float) + SPACE.colors[3]) / 2
    np.testing.assert_allclose(drawn[:60], mean, atol=1)
    assert drawn.shape == (60 + 24, 200, 3)
    assert (drawn[60 + 12, 12] == SPACE.colors[3]).all()


def test_the_confusion_image_has_the_square_root_of_shares_as_opacity():
    shares = np.random.default_rng(0).random((30, 30))
    pixels = np.asarray(pictures.draw_confusion(shares), float)
    np.testing.assert_allclose((pixels[..., 3] / 255) ** 2, shares, atol=0.004)
    blue = pixels[..., 2] > pixels[..., 0]
    np.testing.assert_array_equal(blue, np.eye(30, dtype=bool))


@pytest.mark.parametrize('space, mode', [(SPACE, 'P'), (None, 'L')])
def test_label_maps_are_pngs_of_ids(space, mode):
    ids = example(9, 7).prediction
    image = Image.open(io.BytesIO(pictures.labels_png(ids, space)))
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(image), ids)
    if space:
        np.testing.assert_array_equal(np.asarray(image.convert('RGB')), SPACE.colors[ids])
