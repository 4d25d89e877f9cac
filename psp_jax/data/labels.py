"""Label spaces: the classes of a data set, their colours, and how stored values become classes.

Colours are RGB. Sources: the class tables of the data sets' own tools (ADE20K's objectInfo150 and
colour coding, PASCAL VOC's colour map, cityscapesScripts, SegNet's CamVid).
"""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psp_jax.errors import UserError

IGNORE = 255  # pixels with this label count neither in the loss nor in a metric
UNLABELLED = (32, 32, 32)  # the colour of such pixels in pictures


@dataclass(frozen=True)
class LabelSpace:
    """The classes 0..N-1 of a data set, and what else its files and benchmark need."""

    names: tuple[str, ...]
    colors: np.ndarray  # uint8 [N, 3] RGB
    # The value of data.label_map that reads the published files.
    label_map: str = ''
    # The id of each class in the files that the benchmark's server accepts; () = the class ids
    # themselves, in PNGs with a palette.
    server_ids: tuple[int, ...] = ()
    # The category of each class; the mean IoU of the categories is reported too. () = none.
    categories: tuple[str, ...] = ()
    # Whether to report the mean of mIoU (an absent class counts as 0) and pixel accuracy.
    challenge_score: bool = False
    image_size: tuple[int, int] | None = None  # (height, width), if all images have the same


# ADE20K scene parsing, 150 classes, stored as 1..150 with 0 = other (data.label_map = minus_one).
_ADE20K = """
wall 787878, building b47878, sky 06e6e6, floor 503232, tree 04c803, ceiling 787850,
road 8c8c8c, bed cc05ff, windowpane e6e6e6, grass 04fa07, cabinet e005ff, sidewalk ebff07,
person 96053d, earth 787846, door 08ff33, table ff0652, mountain 8fff8c, plant ccff04,
curtain ff3307, chair cc4603, car 0066c8, water 3de6fa, painting ff0633, sofa 0b66ff,
shelf ff0747, house ff09e0, sea 0907e6, mirror dcdcdc, rug ff095c, field 7009ff,
armchair 08ffd6, seat 07ffe0, fence ffb806, desk 0aff47, rock ff290a, wardrobe 07ffff,
lamp e0ff08, bathtub 6608ff, railing ff3d06, cushion ffc207, base ff7a08, box 00ff14,
column ff0829, signboard ff0599, chest of drawers 0633ff, counter eb0cff, sand a09614,
sink 00a3ff, skyscraper 8c8c8c, fireplace fa0a0f, refrigerator 14ff00, grandstand 1fff00,
path ff1f00, stairs ffe000, runway 99ff00, case 0000ff, pool table ff4700, pillow 00ebff,
screen door 00adff, stairway 1f00ff, river 0bc8c8, bridge ff5200, bookcase 00fff5, blind 003dff,
coffee table 00ff70, toilet 00ff85, flower ff0000, book ffa300, hill ff6600, bench c2ff00,
countertop 008fff, stove 33ff00, palm 0052ff, kitchen island 00ff29, computer 00ffad,
swivel chair 0a00ff, boat adff00, bar 00ff99, arcade machine ff5c00, hovel ff00ff, bus ff00f5,
towel ff0066, light ffad00, truck ff0014, tower ffb8b8, chandelier 001fff, awning 00ff3d,
streetlight 0047ff, booth ff00cc, television receiver 00ffc2, airplane 00ff52,
dirt track 000aff, apparel 0070ff, pole 3300ff, land 00c2ff, bannister 007aff, escalator 00ffa3,
ottoman ff9900, bottle 00ff0a, buffet ff7000, poster 8fff00, stage 5200ff, van a3ff00,
ship ffeb00, fountain 08b8aa, conveyer belt 8500ff, canopy 00ff5c, washer b800ff,
plaything ff001f, swimming pool 00b8ff, stool 00d6ff, barrel ff0070, basket 5cff00,
waterfall 00e0ff, tent 70e0ff, bag 46b8a0, minibike a300ff, cradle 9900ff, oven 47ff00,
ball ff00a3, food ffcc00, step ff008f, tank 00ffeb, trade name 85ff00, microwave ff00eb,
pot f500ff, animal ff007a, bicycle fff500, lake 0abed4, dishwasher d6ff00, screen 00ccff,
blanket 1400ff, sculpture ffff00, hood 0099ff, sconce 0029ff, vase 00ffcc, traffic light 2900ff,
tray 29ff00, ashcan ad00ff, fan 00f5ff, pier 4700ff, crt screen 7a00ff, plate 00ffb8,
monitor 005cff, bulletin board b8ff00, shower 0085ff, radiator ffd600, glass 19c2c2,
clock 66ff00, flag 5c00ff"""

# PASCAL VOC 2012, background and 20 objects, stored as palette PNG, 255 = void.
_VOC2012 = """
background 000000, aeroplane 800000, bicycle 008000, bird 808000, boat 000080, bottle 800080,
bus 008080, car 808080, cat 400000, chair c00000, cow 408000, diningtable c08000, dog 400080,
horse c00080, motorbike 408080, person c08080, pottedplant 004000, sheep 804000, sofa 00c000,
train 80c000, tvmonitor 004080"""

# Cityscapes, 19 train ids.
_CITYSCAPES = """
road 804080, sidewalk f423e8, building 464646, wall 66669c, fence be9999, pole 999999,
traffic light faaa1e, traffic sign dcdc00, vegetation 6b8e23, terrain 98fb98, sky 4682b4,
person dc143c, rider ff0000, car 00008e, truck 000046, bus 003c64, train 005064,
motorcycle 0000e6, bicycle 770b20"""

# CamVid, the 11 classes of SegNet in its order, stored with 11 = void.
_CAMVID = """
Sky 808080, Building 800000, Pole c0c080, Road 804080, Pavement 3c28de, Tree 808000,
SignSymbol c08080, Fence 404080, Car 400080, Pedestrian 404000, Bicyclist 0080c0"""

# The built-in scenes (data/scenes.py).
_SCENES = """
sky 4682b4, ground 804080, building 6e463c, water 00c8c8, tree 6b8e23, person dc143c, lamp fadc00,
crane fa821e, car 00008e, boat f0f0fa"""

# Cityscapes' label ids of the 19 classes, in the order of their train ids.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES_CATEGORIES = (
    *('flat',) * 2,
    *('construction',) * 3,
    *('object',) * 3,
    *('nature',) * 2,
    'sky',
    *('human',) * 2,
    *('vehicle',) * 6,
)


def _named(table: str, **fields: Any) -> LabelSpace:
    """Parses a label space from 'name RRGGBB, name RRGGBB, ...'."""
    rows = [row.strip().rpartition(' ') for row in table.split(',')]
    colors = np.array([tuple(bytes.fromhex(color)) for _, _, color in rows], np.uint8)
    return LabelSpace(tuple(name for name, _, _ in rows), colors, **fields)


# The label spaces that data.classes can name. To add a data set, add an entry.
LABEL_SPACES: dict[str, LabelSpace] = {
    'ade20k': _named(
        _ADE20K, label_map='minus_one', server_ids=tuple(range(1, 151)), challenge_score=True
    ),
    'voc2012': _named(_VOC2012),
    'cityscapes': _named(
        _CITYSCAPES,
        label_map='cityscapes_ids',
        server_ids=_CITYSCAPES_IDS,
        categories=_CITYSCAPES_CATEGORIES,
        image_size=(1024, 2048),
    ),
    'camvid': _named(_CAMVID, label_map='{11: 255}'),
    'scenes': _named(_SCENES),
}


# The maps that data.label_map can name: stored value -> class.
LABEL_MAPS: dict[str, dict[int, int]] = {
    # 0 = other, then the classes from 1 (ADE20K)
    'minus_one': {0: IGNORE} | {value: value - 1 for value in range(1, IGNORE)},
    # the 34 label ids of Cityscapes -> its 19 train ids
    'cityscapes_ids': dict.fromkeys(range(256), IGNORE)
    | {label_id: train_id for train_id, label_id in enumerate(_CITYSCAPES_IDS)},
}


def label_space(classes: str) -> LabelSpace:
    """Returns the label space that `data.classes` describes.

    classes: a key of LABEL_SPACES ('ade20k'), comma-separated class names ('road, tree, car'), or a
        number of classes ('4', at most 255, since 255 is the ignore label).
    Raises UserError if it is none of these.
    """
    spec = classes.strip()
    if spec in LABEL_SPACES:
        return LABEL_SPACES[spec]
    allowed = (
        f'use one of {", ".join(LABEL_SPACES)}, two or more comma-separated names, '
        'or a number of classes from 1 to 255'
    )
    if spec.isascii() and spec.isdigit():
        count = int(spec[:4])  # enough digits to see that there are too many
        names = tuple(f'class {i}' for i in range(count))
    else:
        names = tuple(name.strip() for name in spec.split(','))
        if len(names) < 2 or not all(names):
            raise UserError(f'data.classes = {classes!r} is not a label space: {allowed}')
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f'data.classes names {twice!r} twice: give each class its own name')
    if not 1 <= len(names) <= IGNORE:
        raise UserError(f'data.classes = {classes!r} has {len(names)} classes: {allowed}')
    return LabelSpace(names, _distinct_colors(len(names)))


def palette(space: LabelSpace) -> np.ndarray:
    """Returns the RGB colour of each label value, uint8 [256, 3]; UNLABELLED for other values."""
    table = np.full((256, 3), UNLABELLED, np.uint8)
    table[: len(space.colors)] = space.colors
    return table


def server_ids(ids: np.ndarray, space: LabelSpace) -> np.ndarray:
    """Returns class ids uint8 [H, W] as the values that the benchmark's server expects."""
    return np.array(space.server_ids, np.uint8)[ids] if space.server_ids else ids


def label_table(label_map: str) -> np.ndarray:
    """Returns the look-up table uint8 [256] from a stored label value to a class (255 = ignore).

    label_map: '' (values are classes), a key of LABEL_MAPS, or the values that change as a dict
        literal ('{11: 255}'). A stored 255 stays 255 unless the map says otherwise.
    Raises UserError if it is none of these.
    """
    spec = label_map.strip()
    changes = LABEL_MAPS[spec] if spec in LABEL_MAPS else _parse_map(spec) if spec else {}
    table = np.arange(256, dtype=np.uint8)
    table[list(changes.keys())] = list(changes.values())
    return table


def published_map(space: LabelSpace, values: Sequence[int]) -> str:
    """Returns the map of the published files of `space` if `values` can be theirs, otherwise ''.

    values: stored label values that are not classes of `space`.
    """
    if not space.label_map:
        return ''
    mapped = label_table(space.label_map)
    last = np.flatnonzero(mapped < len(space.names))[-1]  # the last class as it is stored
    return space.label_map if max(values) <= last + 1 else ''  # a void label may follow it


def _parse_map(label_map: str) -> dict[int, int]:
    allowed = f"use '', {', '.join(map(repr, LABEL_MAPS))} or a dict of values 0..255 such as"
    allowed += " '{11: 255}'"
    try:
        parsed = ast.literal_eval(label_map)
    except (ValueError, SyntaxError, TypeError):
        raise UserError(f'data.label_map = {label_map!r} is not a label map: {allowed}') from None
    if not isinstance(parsed, dict):
        raise UserError(f'data.label_map = {label_map!r} is not a dict: {allowed}')
    for number in [*parsed.keys(), *parsed.values()]:
        if type(number) is not int or not 0 <= number <= 255:
            raise UserError(f'data.label_map contains {number!r}: {allowed}')
    return parsed


def _distinct_colors(count: int) -> np.ndarray:
    """Returns PASCAL VOC's colours uint8 [count, 3], which are distinct for all 256 values.

    Bits 0, 1, 2 of the class become the highest bits of R, G, B; bits 3, 4, 5 the next ones, and
    so on. Source: VOCdevkit, VOClabelcolormap.m.
    """
    classes = np.arange(count)
    colors = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        channel, shift = bit % 3, 7 - bit // 3
        colors[:, channel] |= ((classes >> bit & 1) << shift).astype(np.uint8)
    return colors
