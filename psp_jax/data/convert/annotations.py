"""Makes class ids from annotations: pure functions of parsed JSON and decoded masks.

They raise ValueError if the content of a file is wrong, and KeyError, TypeError, AttributeError or
OSError if the file has another structure. The caller adds the file's name.
"""

import base64
import io
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from psp_jax.data.labels import IGNORE

Size = tuple[int, int]  # height, width
Points = list[tuple[float, float]]  # x, y

IGNORED = '__ignore__'  # labelme's label of ignored pixels; here also of pixels without a label
BACKGROUND = ('_background_', 'background', 'unlabeled')  # the labels of pixels without a shape


# The kinds of shapes that have an area.
KINDS = ('polygon', 'rectangle', 'oriented_rectangle', 'circle', 'mask')


class Shape(NamedTuple):
    """A labelled region. kind: of KINDS. mask: of mode '1', its upper left corner at points[0]."""

    label: str
    kind: str
    points: Points
    mask: Image.Image | None = None


def class_name(label: str) -> str:
    """Returns a label without commas, which separate names in data.classes: 'a, b' -> 'a/b'."""
    return re.sub(r'\s*,\s*', '/', label.strip())


def draw(shapes: Iterable[Shape], ids: Mapping[str, int], size: Size) -> np.ndarray:
    """Draws shapes as class ids uint8 [H, W], later over earlier, on the background's id.

    ids: label -> value. A label that is not in it, or a missing background, becomes 255.
    Pillow draws, as for labelme and Cityscapes: corners are cut to whole pixels towards 0, and the
    outline is part of a shape. So a rectangle from (1, 1) to (3, 2) covers 3 x 2 pixels.
    """
    background = next((ids[label] for label in BACKGROUND if label in ids), IGNORE)
    picture = Image.new('L', (size[1], size[0]), background)
    pen = ImageDraw.Draw(picture)
    for label, kind, points, mask in shapes:
        value = ids.get(label, IGNORE)
        if kind == 'rectangle':
            xs, ys = zip(*points, strict=True)
            pen.rectangle((min(xs), min(ys), max(xs), max(ys)), value)
        elif kind == 'circle':
            (x, y), rim = points[:2]
            radius = math.dist((x, y), rim)
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), value)
        elif mask:
            pen.bitmap((int(points[0][0]), int(points[0][1])), mask, value)
        else:
            pen.polygon(points, value)
    return np.asarray(picture)


def labelme(document: Any) -> tuple[str, Size, list[Shape]]:
    """Returns the image's path relative to the JSON file, its size, and the shapes."""
    shapes = []
    for number, item in enumerate(document['shapes'], 1):
        label, kind = class_name(item['label']), item.get('shape_type') or 'polygon'
        if kind not in KINDS:
            raise ValueError(
                f'shape {number} ({label}) is a {kind}, which has no area: delete it, or redraw it '
                f'as {", ".join(KINDS)}'
            )
        mask = None
        if kind == 'mask':
            with Image.open(io.BytesIO(base64.b64decode(item['mask']))) as stored:
                mask = Image.fromarray(np.asarray(stored.convert('L')) > 0)
        shapes.append(Shape(label, kind, _points(item['points']), mask))
    size = int(document['imageHeight']), int(document['imageWidth'])
    return document['imagePath'].replace('\\', '/'), size, shapes  # \: labelme on Windows


def cityscapes(document: Any, classes: Collection[str]) -> tuple[Size, list[Shape]]:
    """Returns the image's size and the polygons to draw, as cityscapesscripts does.

    Leaves out deleted objects, and license plates, whose pixels keep what lies under them. A group
    (cargroup) counts as one of its members, except polegroup, which is a label of its own. A label
    among `classes` is always drawn as it is.
    """
    shapes = []
    for item in document['objects']:
        label = class_name(item['label'])
        if label not in {*classes, 'polegroup'}:
            label = label.removesuffix('group')
        if item.get('deleted') or (label == 'license plate' and label not in classes):
            continue
        shapes.append(Shape(label, 'polygon', _points(item['polygon'])))
    return (int(document['imgHeight']), int(document['imgWidth'])), shapes


def _points(points: Any) -> Points:
    return [(float(x), float(y)) for x, y in points]


def packed(color: np.ndarray | Iterable[int]) -> Any:
    """Returns R + 256 G + 65536 B of colours [..., 3], int64 [...]: COCO's number of a colour."""
    return np.asarray(color) @ np.array([1, 256, 65536])


def color_ids(
    rgb: np.ndarray, labels: Mapping[int, str], ids: Mapping[str, int]
) -> tuple[np.ndarray, frozenset[str]]:
    """Returns class ids uint8 [H, W] of an image whose colours stand for labels.

    rgb: uint8 [H, W, 3]. labels: packed colour -> label. ids: label -> value; a label that is not
    in it becomes 255 and is in the second result. Raises ValueError for a colour that is not in
    `labels`.
    """
    numbers, keys = packed(rgb), sorted(labels)
    places = np.searchsorted(keys, numbers).clip(max=len(keys) - 1)
    unknown = np.array(keys)[places] != numbers
    if unknown.any():
        color = tuple(rgb[unknown][0].tolist())
        remedy = 'add it to labelmap.txt or to the JSON file'
        if (rgb == rgb[..., :1]).all():
            remedy = f'grey masks of class ids need no conversion; if it is a colour, {remedy}'
        raise ValueError(f'colour {color}, as a number {packed(color)}, has no label: {remedy}')
    table = np.array([ids.get(labels[key], IGNORE) for key in keys], np.uint8)
    found = {labels[keys[place]] for place in np.unique(places)}
    return table[places], frozenset(found - ids.keys())


VOID = int(packed((224, 224, 192)))  # PASCAL VOC's colour of pixels that do not count


def labelmap(text: str) -> dict[int, str]:
    """Returns packed colour -> label of CVAT's lines 'label:r,g,b:parts:actions', without VOID.

    A line that begins with # is a comment. Several colours may have the same label.
    """
    labels: dict[int, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith('#'):
            continue
        label, _, rest = line.partition(':')
        values = [value.strip() for value in rest.split(':')[0].split(',')]
        if len(values) != 3 or not all(v.isdecimal() and int(v) < 256 for v in values):
            raise ValueError(f'line {number}: {line.strip()!r} is not label:red,green,blue::')
        color = int(packed([int(value) for value in values]))
        if color in labels:
            raise ValueError(f'line {number}: {label} has the colour of {labels[color]}')
        labels[color] = class_name(label)
    labels.pop(VOID, None)
    return labels


def image_set(text: str) -> list[str]:
    """Returns the names in a list of PASCAL VOC, one a line; CVAT puts some in quotes."""
    return [line.strip().strip('"') for line in text.splitlines() if line.strip()]


def panoptic(document: Any) -> tuple[list[str], dict[str, tuple[str, dict[int, str]]]]:
    """Returns the category names of a COCO panoptic JSON, and for each PNG its image and segments.

    The segments are packed colour -> category; black is IGNORED.
    """
    names = {item['id']: class_name(item['name']) for item in document['categories']}
    images = {item['id']: item['file_name'] for item in document['images']}
    files = {}
    for item in document['annotations']:
        segments = {int(s['id']): names[s['category_id']] for s in item['segments_info']}
        files[item['file_name']] = images[item['image_id']], {0: IGNORED} | segments
    return list(names.values()), files
