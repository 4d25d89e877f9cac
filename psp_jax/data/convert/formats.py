"""The formats of annotations: where their files are, and what their classes are.

annotations.py makes class ids from the content of the files.
"""

import argparse
import contextlib
import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from psp_jax.data.convert import annotations
from psp_jax.data.convert.annotations import IGNORED, Shape, Size
from psp_jax.data.decode import exists, read_bytes, read_image
from psp_jax.data.labels import IGNORE, label_space
from psp_jax.data.sources import PICTURES, first_few
from psp_jax.errors import UserError

T = TypeVar('T')


class Made(NamedTuple):
    """A label map: its image's path, ids uint8 [H, W], and its labels that are not classes."""

    image: str
    ids: np.ndarray
    others: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Plan:
    """What there is to convert.

    classes: for data.classes. lists: name of a list -> names of its label maps, which are relative
    paths without suffix. make: makes the label map of a name; raises UserError for a bad file.
    """

    classes: str
    lists: Mapping[str, Sequence[str]]
    make: Callable[[str], Made]


Ids = Mapping[str, int]  # label -> class id; 255 for labels to ignore


# ---- labelme


def plan_labelme(folder: str, flags: argparse.Namespace) -> Plan:
    """Plans the conversion of the JSON files under a folder.

    Without --classes the classes are _background_ and then all labels found, sorted.
    """
    files = {os.path.splitext(n)[0]: os.path.join(folder, n) for n in _find(folder, '**/*.json')}
    if not files:
        raise UserError(f'{folder}: holds no JSON file of labelme')
    found: set[str] = set()
    for path in () if flags.classes else files.values():
        with contextlib.suppress(UserError):  # making its label map will raise it again
            found |= {shape.label for shape in _parsed(path, annotations.labelme)[2]}
    if not (found or flags.classes):
        raise UserError(f'{folder}: no labelled shape can be read from its JSON files')
    labels = ['_background_', *sorted(found - {'_background_'})] if found else []
    classes, ids = _classes(flags, labels, folder)
    return Plan(classes, _lists(files), partial(_make_labelme, files, ids, flags.images))


def _make_labelme(files: Mapping[str, str], ids: Ids, images: str, name: str) -> Made:
    path = files[name]
    written, size, shapes = _parsed(path, annotations.labelme)
    for shape in shapes:
        if shape.label not in ids:
            known = first_few([label for label, value in ids.items() if value != IGNORE])
            raise UserError(
                f'{path}: label {shape.label!r} is none of the classes {known}: correct it, '
                'or name it in --classes or --ignore'
            )
    image = os.path.join(os.path.dirname(path), written)
    if images:
        image = os.path.join(images, os.path.basename(written))
    return Made(image, _drawn(path, shapes, ids, size, image))


# ---- voc


def plan_voc(folder: str, flags: argparse.Namespace) -> Plan:
    """Plans the conversion of colour masks as of PASCAL VOC, or of CVAT's 'Segmentation mask'.

    labelmap.txt has the labels and their colours. Without it the labels are those of --classes, by
    default VOC's own 21. Lists are ImageSets/Segmentation/*.txt, or `all`.
    """
    masks, sets = (os.path.join(folder, n) for n in ('SegmentationClass', 'ImageSets/Segmentation'))
    labelmap = os.path.join(folder, 'labelmap.txt')
    if os.path.exists(labelmap):
        labels = _parsed(labelmap, annotations.labelmap, _text)
        classes, ids = _classes(flags, list(labels.values()), labelmap)
    else:
        classes, ids = _classes(flags, (), '--classes', 'voc2012')
        labels = _colors_of(flags.classes or 'voc2012', labelmap)
    labels[annotations.VOID] = IGNORED
    lists = {
        file.removesuffix('.txt'): names
        for file in _find(sets, '*.txt')
        if (names := _parsed(os.path.join(sets, file), annotations.image_set, _text))
    } or _lists(name.removesuffix('.png') for name in _find(masks, '**/*.png'))
    if not lists:
        raise UserError(f'{masks}: holds no PNG')
    images = flags.images or os.path.join(folder, 'JPEGImages')
    return Plan(classes, lists, partial(_make_voc, masks, images, labels, ids))


def _colors_of(classes: str, labelmap: str) -> dict[int, str]:
    """Returns packed colour -> class of a label space; raises UserError if two share a colour."""
    space = label_space(classes)
    labels: dict[int, str] = {}
    for name, color in zip(space.names, annotations.packed(space.colors).tolist(), strict=True):
        if color in labels:
            raise UserError(
                f'--classes={classes}: {name} has the colour of {labels[color]}, so that masks '
                f'cannot tell them apart: write {labelmap} with the labels that the masks have'
            )
        labels[color] = name
    return labels


def _make_voc(masks: str, images: str, labels: Mapping[int, str], ids: Ids, name: str) -> Made:
    return _colored(os.path.join(masks, f'{name}.png'), _image_of(images, name), labels, ids)


# ---- cityscapes

_POLYGONS = '_gtFine_polygons.json'


def plan_cityscapes(folder: str, flags: argparse.Namespace) -> Plan:
    """Plans the conversion of gtFine/SPLIT/CITY/*_gtFine_polygons.json.

    Labels that are not classes become 255.
    """
    classes, ids = _classes(flags, (), '--classes', 'cityscapes')
    fine = os.path.join(folder, 'gtFine')
    names = [name.removesuffix(_POLYGONS) for name in _find(fine, f'**/*{_POLYGONS}')]
    if not names:
        raise UserError(f'{folder}: holds no gtFine/SPLIT/CITY/*{_POLYGONS}')
    images = flags.images or os.path.join(folder, 'leftImg8bit')
    return Plan(classes, _lists(names), partial(_make_cityscapes, fine, images, ids))


def _make_cityscapes(fine: str, images: str, ids: Ids, name: str) -> Made:
    path = os.path.join(fine, name + _POLYGONS)
    size, shapes = _parsed(path, partial(annotations.cityscapes, classes=ids))
    image = _image_of(images, f'{name}_leftImg8bit')
    others = frozenset(shape.label for shape in shapes) - ids.keys()
    return Made(image, _drawn(path, shapes, ids, size, image), others)


# ---- coco_panoptic


def plan_coco_panoptic(path: str, flags: argparse.Namespace) -> Plan:
    """Plans the conversion of a panoptic JSON, or of those in a folder's `annotations`.

    The PNGs of A/panoptic_val2017.json are in A/panoptic_val2017, the images in A/../val2017.
    """
    jsons = [path]
    if os.path.isdir(path):
        jsons = [os.path.join(path, n) for n in _find(path, 'annotations/panoptic_*.json')]
    if not jsons:
        raise UserError(f'{path}: holds no annotations/panoptic_*.json')
    known: list[str] = []
    found: dict[str, tuple[str, str, dict[int, str]]] = {}  # name: image, mask, segments
    for file in jsons:
        categories, pngs = _parsed(file, annotations.panoptic)
        known += categories
        base = os.path.splitext(file)[0]
        split = os.path.basename(base).removeprefix('panoptic_')
        images = flags.images or os.path.join(os.path.dirname(os.path.dirname(base)), split)
        for png, (image, segments) in pngs.items():
            name = os.path.join(split, os.path.splitext(png)[0])
            found[name] = os.path.join(images, image), os.path.join(base, png), segments
    classes, ids = _classes(flags, known, path)
    return Plan(classes, _lists(found), partial(_make_panoptic, found, ids))


def _make_panoptic(
    files: Mapping[str, tuple[str, str, dict[int, str]]], ids: Ids, name: str
) -> Made:
    image, mask, segments = files[name]
    return _colored(mask, image, segments, ids)


FORMATS: dict[str, Callable[[str, argparse.Namespace], Plan]] = {
    'labelme': plan_labelme,
    'voc': plan_voc,
    'cityscapes': plan_cityscapes,
    'coco_panoptic': plan_coco_panoptic,
}


# ---- What the formats share


def _classes(
    flags: argparse.Namespace, labels: Sequence[str], source: str, default: str = ''
) -> tuple[str, dict[str, int]]:
    """Returns the text for data.classes, and class -> id with 255 for labels to ignore.

    labels: all labels of `source`; () if it does not list them. Then the classes are those of
        --classes or else `default`.
    Raises UserError if `source` lacks a class of --classes, and for too few or too many classes.
    """
    known = tuple(dict.fromkeys(labels))
    text = flags.classes or default
    names = label_space(text).names if text else known
    for name in names if known else ():
        if name not in known:
            raise UserError(f'--classes: {source} has no {name!r}; it has {first_few(known)}')
    ignored = {IGNORED, *(label.strip() for label in flags.ignore.split(',') if label.strip())}
    left = [name for name in names if name not in ignored]
    if not 2 <= len(left) <= IGNORE:
        raise UserError(
            f'{source}: {len(left)} classes: at least 2 are needed (the background is one too), '
            f'and at most {IGNORE}; --classes chooses some, --ignore takes some off'
        )
    if not text or len(left) < len(names):
        text = ','.join(left)
    return text, dict.fromkeys(ignored, IGNORE) | {name: i for i, name in enumerate(left)}


def _lists(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups names by their first folder if it is train, val2017 or the like, otherwise `all`."""
    lists: dict[str, list[str]] = {}
    for name in names:
        split = re.match(r'(train|val|test)\d*/', name)
        lists.setdefault(split[0][:-1] if split else 'all', []).append(name)
    return lists


def _find(folder: str, pattern: str) -> list[str]:
    """Returns the sorted relative paths of the files under a folder that are not hidden."""
    return sorted(glob.glob(pattern, root_dir=folder, recursive=True))


def _image_of(folder: str, name: str) -> str:
    """Returns the path of the image of this name, with its suffix; .jpg if there is none."""
    stem = os.path.join(folder, name)
    suffixes = (case for suffix in PICTURES for case in (suffix, suffix.upper()))
    return next((stem + suffix for suffix in suffixes if exists(stem + suffix)), f'{stem}.jpg')


def _json(path: str) -> Any:
    return json.loads(read_bytes(path))


def _text(path: str) -> str:
    return read_bytes(path).decode('utf-8-sig')


def _parsed(path: str, parse: Callable[[Any], T], read: Callable[[str], Any] = _json) -> T:
    """Reads and parses a file; raises UserError, naming the file, if its content is wrong."""
    with _naming(path):
        return parse(read(path))


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as error:
        raise UserError(f'{path} is not JSON ({error})') from None
    except ValueError as error:
        raise UserError(f'{path}: {error}') from error
    except (KeyError, TypeError, AttributeError, OSError) as error:
        reason = f'no {error}' if isinstance(error, KeyError) else error
        raise UserError(f'{path} is not as its tool writes it ({reason})') from error


def _drawn(path: str, shapes: Sequence[Shape], ids: Ids, size: Size, image: str) -> np.ndarray:
    """Draws the shapes of a file, if its image is of the same size."""
    _check_size(image, size)
    with _naming(path):
        return annotations.draw(shapes, ids, size)


def _colored(mask: str, image: str, labels: Mapping[int, str], ids: Ids) -> Made:
    """Makes the label map of a mask in colours, if its image is of the same size."""
    made, others = _parsed(mask, partial(annotations.color_ids, labels=labels, ids=ids), read_image)
    _check_size(image, (made.shape[0], made.shape[1]))
    return Made(image, made, others)


def _check_size(path: str, size: Size) -> None:
    """Raises UserError if an image cannot be read or is not of this (height, width)."""
    if not exists(path):
        raise UserError(f'{path} does not exist; --images DIR says where images are')
    try:
        with Image.open(path) as image:  # reads only the header of the file
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientation
    except Exception as error:  # Pillow raises nearly anything on broken files
        raise UserError(f'{path} cannot be read as an image ({type(error).__name__})') from error
    if turned:
        width, height = height, width
    if (height, width) != size:
        raise UserError(f'{path} is {width}x{height}, its annotation for {size[1]}x{size[0]}')
