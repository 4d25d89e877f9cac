"""Pictures of labels and predictions."""

from typing import Any

import cv2
import numpy as np
import tensorflow as tf

from psp_jax.data.labels import IGNORE, LabelSpace, palette

_GAP = 4  # pixels between pictures


def draw_panels(panels: list[Any], space: LabelSpace) -> np.ndarray:
    """Rows of image | label | prediction, and the colours of the classes below: uint8 [H, W, 3].

    panels: objects with `image` [H, W, 3], `label` and `prediction` [H, W], all uint8.
    """
    height = max(p.image.shape[0] for p in panels)
    width = max(p.image.shape[1] for p in panels)
    zoom = max(1, round(240 / height))  # small pictures are enlarged without smoothing
    rows, present, colors = [], set(), palette(space)
    for p in panels:
        row = []
        ignored = p.label == IGNORE
        present |= set(np.unique(p.label[~ignored])) | set(np.unique(p.prediction))
        for picture in (p.image, colors[p.label], colors[p.prediction]):
            tile = np.full((height + _GAP, width + _GAP, 3), 255, np.uint8)
            tile[: picture.shape[0], : picture.shape[1]] = picture
            row.append(tile.repeat(zoom, 0).repeat(zoom, 1))
        rows.append(np.concatenate(row, 1))
    grid = np.concatenate(rows)
    header = np.full((24, grid.shape[1], 3), 255, np.uint8)
    for i, title in enumerate(('image', 'label', 'prediction')):
        _text(header, title, (6 + i * grid.shape[1] // 3, 17))
    below = legend([*sorted(present), IGNORE], space, grid.shape[1])
    return np.concatenate([header, grid, below])


def legend(ids: list[int], space: LabelSpace, width: int) -> np.ndarray:
    """Coloured squares with the names of classes, in lines of at most `width` pixels."""
    columns = max(width // 150, 1)
    picture = np.full((24 * -(-len(ids) // columns), width, 3), 255, np.uint8)
    colors, names = palette(space), dict(enumerate(space.names)) | {IGNORE: 'unlabelled'}
    entries = [(names[i], colors[i]) for i in ids]
    for n, (name, color) in enumerate(entries):
        top, left = 24 * (n // columns), 150 * (n % columns)
        picture[top + 5 : top + 19, left + 6 : left + 20] = color
        _text(picture, name[:16], (left + 26, top + 17))
    return picture


def _text(picture: np.ndarray, text: str, place: tuple[int, int]) -> None:
    cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)


def write_png(path: str, picture: np.ndarray) -> None:
    """Writes RGB uint8 [H, W, 3], locally or to a bucket."""
    encoded = cv2.imencode('.png', np.ascontiguousarray(picture[..., ::-1]))[1]
    with tf.io.gfile.GFile(path, 'wb') as file:
        file.write(encoded.tobytes())
