"""Draws labels and predictions as images."""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import tensorflow as tf
from PIL import Image

from psp_jax.data.labels import IGNORE, UNLABELLED, LabelSpace, palette

RIGHT, WRONG = (31, 95, 191), (200, 50, 30)  # RGB colours of right and wrong predictions
OVERLAY_SIDE = 8192  # pixels; larger overlays are reduced to it. JPEG allows at most 65,500.
_GAP = 4  # pixels between the images of a panel


class Panel(NamedTuple):
    """An image with its label and prediction."""

    image: np.ndarray  # uint8 [H, W, 3] RGB
    label: np.ndarray  # uint8 [H, W] of class ids; 255 is ignored
    prediction: np.ndarray  # uint8 [H, W] of class ids


def draw_panels(panels: Sequence[Panel], space: LabelSpace) -> np.ndarray:
    """A row of image, label and prediction for each panel, and a legend below: uint8 [H, W, 3]."""
    height = max(p.image.shape[0] for p in panels)
    width = max(p.image.shape[1] for p in panels)
    zoom = max(1, round(240 / height))  # small images are enlarged without smoothing
    colors = palette(space)

    def tile(image: np.ndarray) -> np.ndarray:
        background = np.full((height + _GAP, width + _GAP, 3), 255, np.uint8)
        background[: image.shape[0], : image.shape[1]] = image
        return background.repeat(zoom, 0).repeat(zoom, 1)

    rows = [
        np.concatenate([tile(p.image), tile(colors[p.label]), tile(colors[p.prediction])], 1)
        for p in panels
    ]
    grid = np.concatenate(rows)
    header = np.full((24, grid.shape[1], 3), 255, np.uint8)
    for i, title in enumerate(('image', 'label', 'prediction')):
        _write_text(header, title, (6 + i * grid.shape[1] // 3, 17))
    ids = classes_in(ids for p in panels for ids in (p.label, p.prediction))
    return np.concatenate([header, grid, legend([*ids, IGNORE], space, grid.shape[1])])


def draw_overlay(image: np.ndarray, ids: np.ndarray, space: LabelSpace) -> np.ndarray:
    """The image under half-transparent class colours, with a legend below: uint8 [H, W, 3].

    image: uint8 [H, W, 3]; ids: uint8 [H, W]. Larger ones are reduced to OVERLAY_SIDE pixels.
    """
    image, ids = shrink(image, OVERLAY_SIDE), shrink(ids, OVERLAY_SIDE)
    blended = cv2.addWeighted(image, 0.5, space.colors[ids], 0.5, 0)
    width = max(blended.shape[1], 160)  # room for one entry of the legend
    blended = np.pad(blended, ((0, 0), (0, width - blended.shape[1]), (0, 0)), constant_values=255)
    return np.concatenate([blended, legend(classes_in([ids]), space, width)])


def draw_errors(panel: Panel) -> np.ndarray:
    """The image in grey with wrong pixels in red and ignored ones nearly black: uint8 [H, W, 3]."""
    image, label, prediction = panel
    grey = 102 + cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) * 0.6  # lighter than ignored pixels
    errors = np.repeat(grey.astype(np.uint8)[..., None], 3, 2)
    errors[label != prediction] = WRONG
    errors[label == IGNORE] = UNLABELLED
    return errors


def draw_confusion(shares: np.ndarray) -> Image.Image:
    """One pixel a cell of a confusion matrix of shares 0 to 1, [classes, classes].

    The colour says right or wrong; the opacity is the square root of the share.
    """
    pixels = np.empty((*shares.shape, 4), np.uint8)
    pixels[..., :3] = WRONG
    pixels[np.diag_indices(len(shares))] = (*RIGHT, 0)
    pixels[..., 3] = np.round(255 * np.sqrt(shares))
    return Image.fromarray(pixels)


def legend(ids: Sequence[int], space: LabelSpace, width: int) -> np.ndarray:
    """Coloured squares with the names of classes, in lines of at most `width` pixels.

    ids: class ids, and IGNORE for unlabelled pixels. Returns uint8 [H, width, 3].
    """
    columns = max(width // 150, 1)
    image = np.full((24 * -(-len(ids) // columns), width, 3), 255, np.uint8)
    colors, names = palette(space), dict(enumerate(space.names)) | {IGNORE: 'unlabelled'}
    for n, i in enumerate(ids):
        top, left = 24 * (n // columns), 150 * (n % columns)
        image[top + 5 : top + 19, left + 6 : left + 20] = colors[i]
        _write_text(image, names[i][:16], (left + 26, top + 17))
    return image


def _write_text(image: np.ndarray, text: str, place: tuple[int, int]) -> None:
    cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)


def classes_in(maps: Iterable[np.ndarray]) -> list[int]:
    """The class ids that occur in label maps, in order, without IGNORE."""
    return sorted({int(i) for ids in maps for i in np.unique(ids)} - {IGNORE})


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """Reduces an RGB image or a label map [H, W] to at most `side` pixels for its longer side."""
    height, width = image.shape[:2]
    scale = min(1, side / max(height, width))
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    interpolation = cv2.INTER_NEAREST if image.ndim == 2 else cv2.INTER_AREA
    return cv2.resize(image, size, interpolation=interpolation)


# ---- Files


def labels_image(ids: np.ndarray, space: LabelSpace | None) -> Image.Image:
    """Ids uint8 [H, W] as an image with the classes' colours as its palette; grey without space."""
    image = Image.fromarray(ids)
    if space:
        image.putpalette(palette(space).tobytes())
    return image


def labels_png(ids: np.ndarray, space: LabelSpace | None) -> bytes:
    """The PNG file of `labels_image`."""
    file = io.BytesIO()
    labels_image(ids, space).save(file, 'PNG')
    return file.getvalue()


def data_url(image: Image.Image, lossless: bool) -> str:
    """The image as a data URL for HTML: a PNG if `lossless`, otherwise a JPEG."""
    file = io.BytesIO()
    if lossless:
        image.save(file, 'PNG', optimize=True)
    else:
        # Without chroma subsampling, which would blur the edges of errors.
        image.save(file, 'JPEG', optimize=True, quality=78, subsampling=0)
    kind = 'png' if lossless else 'jpeg'
    return f'data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}'


def write_png(path: str, image: np.ndarray) -> None:
    """Writes RGB uint8 [H, W, 3] to a local path or a bucket."""
    encoded = cv2.imencode('.png', np.ascontiguousarray(image[..., ::-1]))[1]
    with tf.io.gfile.GFile(path, 'wb') as file:
        file.write(encoded.tobytes())
