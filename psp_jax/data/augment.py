"""The augmentation of the reference recipe (semseg), one resampling per image.

In order: scale, rotation, blur, mirror, random crop with centred padding. semseg does them one
after the other on the whole image; here scale, rotation and crop are one affine map, evaluated
only at the pixels of the crop. The canvas is the image after scaling, before padding.
"""

import cv2
import numpy as np
from ml_collections import ConfigDict

from psp_jax.config import crop_size
from psp_jax.data.labels import IGNORE

_BLUR_SIZE = 5  # at this size OpenCV's kernel is [1, 4, 6, 4, 1] / 16, not a sampled Gaussian


def augment(
    image: np.ndarray, label: np.ndarray, rng: np.random.Generator, data: ConfigDict
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a random crop of one example, randomly scaled, rotated, blurred and mirrored.

    image: uint8 [H, W, 3] RGB; label: uint8 [H, W], 255 = ignore.
    rng: source of all randomness. It always draws seven numbers in this order: scale, whether to
        rotate, angle, whether to blur, whether to mirror, row and column of the crop. So switching
        one augmentation off does not change the draws of the others.
    data: crop (int or (height, width)), scale (low, high), rotate (degrees, with probability
        0.5; 0 = off), blur and mirror (probabilities), mean (RGB, 0..255).
    Returns uint8 [crop height, crop width, 3] and uint8 [crop height, crop width]. Pixels outside
    the canvas are the rounded mean in the image, and 255 in the label.
    """
    u_scale, u_rotate, u_angle, u_blur, u_mirror, u_row, u_column = rng.random(7)
    low, high = data.scale
    scale = low + (high - low) * u_scale
    angle = data.rotate * (2 * u_angle - 1) if u_rotate < 0.5 else 0.0
    fill = np.rint(data.mean).astype(np.uint8)
    crop_h, crop_w = crop_size(data)

    # OpenCV's size of a resized image; Python's round is half to even, as cvRound is.
    canvas_h = max(1, round(label.shape[0] * scale))
    canvas_w = max(1, round(label.shape[1] * scale))
    rows, above, below = _visible(canvas_h, crop_h, u_row)
    columns, before, after = _visible(canvas_w, crop_w, u_column)
    mirror = u_mirror < data.mirror
    if mirror:
        columns = slice(canvas_w - columns.stop, canvas_w - columns.start)

    to_canvas = _inverse_rotation(angle, canvas_h, canvas_w)
    blur = u_blur < data.blur
    part = _warp_image(image, scale, to_canvas, (canvas_h, canvas_w), (rows, columns), fill, blur)
    label_part = _warp_label(label, scale, to_canvas, (canvas_h, canvas_w), (rows, columns))
    if mirror:
        part, label_part = cv2.flip(part, 1), cv2.flip(label_part, 1)
    border = (above, below, before, after, cv2.BORDER_CONSTANT)
    return (
        cv2.copyMakeBorder(part, *border, value=fill.tolist()),
        cv2.copyMakeBorder(label_part, *border, value=IGNORE),
    )


def _visible(canvas: int, crop: int, u: float) -> tuple[slice, int, int]:
    """Returns, for one axis, the part of the canvas in the crop, and the padding before and after.

    The canvas is padded to the crop's size, half of it (rounded down) before the canvas; the crop
    begins at a uniform offset, both ends included.
    """
    padded = max(canvas, crop)
    first = int(u * (padded - crop + 1)) - (padded - canvas) // 2
    start, stop = max(first, 0), min(first + crop, canvas)
    return slice(start, stop), start - first, first + crop - stop


def _inverse_rotation(angle: float, height: int, width: int) -> np.ndarray:
    """Returns the matrix [2, 3] from a pixel (x, y) of the rotated canvas to the unrotated one."""
    rotation = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1.0)
    return cv2.invertAffineTransform(rotation)


def _warp_image(
    image: np.ndarray,
    scale: float,
    to_canvas: np.ndarray,
    canvas: tuple[int, int],
    window: tuple[slice, slice],
    fill: np.ndarray,
    blur: bool,
) -> np.ndarray:
    """Returns a window (rows, columns) of the scaled, rotated, blurred canvas: uint8 [h, w, 3]."""
    rows, columns = window
    margin = _BLUR_SIZE // 2 if blur else 0
    # No margin beyond the canvas: the blur reflects at its edge, as on the whole canvas.
    top, bottom = max(rows.start - margin, 0), min(rows.stop + margin, canvas[0])
    left, right = max(columns.start - margin, 0), min(columns.stop + margin, canvas[1])
    # Pixel centres: source = (canvas + 0.5) / scale - 0.5.
    to_source = to_canvas / scale
    to_source[:, 2] += 0.5 / scale - 0.5
    to_source[:, 2] += to_source[:, :2] @ (left, top)
    rotated = to_canvas[0, 1] != 0
    part = cv2.warpAffine(
        image,
        to_source,
        (right - left, bottom - top),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT if rotated else cv2.BORDER_REPLICATE,
        borderValue=fill.tolist(),
    )
    if blur:
        part = cv2.GaussianBlur(part, (_BLUR_SIZE, _BLUR_SIZE), 0)
    return part[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]


def _warp_label(
    label: np.ndarray,
    scale: float,
    to_canvas: np.ndarray,
    canvas: tuple[int, int],
    window: tuple[slice, slice],
) -> np.ndarray:
    """Returns a window (rows, columns) of the scaled, rotated label: uint8 [h, w].

    In two nearest-neighbour steps, as in the reference: OpenCV's resize takes floor(i / scale),
    which differs from the image's map, so one rounded affine map cannot equal the two steps.
    """
    rows, columns = window
    if to_canvas[0, 1] == 0:
        return _resize_nearest(label, scale, rows, columns)
    # The part of the canvas under the rotated window, and one pixel around it.
    corners = np.array(
        [(x, y, 1) for x in (columns.start, columns.stop) for y in (rows.start, rows.stop)]
    )
    low = np.floor((corners @ to_canvas.T).min(0)).astype(int) - 1
    high = np.ceil((corners @ to_canvas.T).max(0)).astype(int) + 2
    low, high = np.clip(low, 0, canvas[::-1]), np.clip(high, 0, canvas[::-1])
    if (low >= high).any():
        return np.full((rows.stop - rows.start, columns.stop - columns.start), IGNORE, np.uint8)
    part = _resize_nearest(label, scale, slice(low[1], high[1]), slice(low[0], high[0]))
    to_part = to_canvas.copy()
    to_part[:, 2] += to_canvas[:, :2] @ (columns.start, rows.start) - low
    return cv2.warpAffine(
        part,
        to_part,
        (columns.stop - columns.start, rows.stop - rows.start),
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=IGNORE,
    )


def _resize_nearest(label: np.ndarray, scale: float, rows: slice, columns: slice) -> np.ndarray:
    """Returns a part of a label resized as OpenCV's INTER_NEAREST does: floor(i / scale)."""
    # No index is past the end: i <= round(size * scale) - 1 <= size * scale - 0.5.
    y = (np.arange(rows.start, rows.stop) * (1 / scale)).astype(np.intp)
    x = (np.arange(columns.start, columns.stop) * (1 / scale)).astype(np.intp)
    return label.take(y, axis=0).take(x, axis=1)
