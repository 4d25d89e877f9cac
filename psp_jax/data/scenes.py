"""Small images of streets and harbours, drawn when they are read: nothing to download.

They need context, as in section 3.1 of the PSPNet paper: the same pixels on the same surroundings
are a `car` in a street and a `boat` in a harbour. A street has buildings, a harbour has water and a
crane. Buildings, water and crane are on the other side of the image, at least `CUE_DISTANCE`
pixels from every car or boat. Everything nearer (sky, ground, trees, persons, lamps) is equal,
pixel for pixel, in both kinds of scene.

Scene number `index` is a pure function of `index`. It uses only Philox's raw words and integer
arithmetic, so every machine and every version of NumPy draws the same pixels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

HEIGHT, WIDTH = 65, 129
SKY, GROUND, BUILDING, WATER, TREE, PERSON, LAMP, CRANE, CAR, BOAT = range(10)

STREET, HARBOUR = 0, 1  # the two kinds of scene
CUE_DISTANCE = 40  # pixels nearer to a car or boat are equal in a street and a harbour

# Columns before half of the images are mirrored: vehicles on [1, 40], kind of scene from 82 on.
_VEHICLE_END, _CUE_START = 41, 82

# Walls, cranes, lamps, clothes and vehicles share these paints: colour alone shows no class.
_PAINTS = (
    (196, 70, 58), (66, 104, 172), (218, 178, 70), (84, 136, 98), (212, 210, 204),
    (156, 104, 76), (120, 126, 138), (224, 136, 66), (112, 172, 196),
)  # fmt: skip
_SKIES = (  # at the top, at the horizon
    ((104, 156, 214), (190, 214, 232)), ((150, 160, 172), (196, 198, 198)),
    ((124, 140, 190), (236, 190, 156)), ((120, 172, 190), (214, 216, 196)),
    ((128, 132, 142), (178, 172, 166)), ((196, 160, 140), (226, 206, 160)),
)  # fmt: skip
_STONES = ((150, 150, 152), (176, 156, 130), (124, 138, 156), (156, 130, 120), (186, 188, 186))
_LEAVES = (
    (74, 122, 62), (104, 138, 58), (84, 136, 98), (184, 132, 60), (156, 84, 62), (126, 132, 120),
)  # fmt: skip
_LIGHTS = ((250, 238, 190), (206, 212, 214), (216, 170, 84), (150, 176, 190))
_DARK, _GLASS = (46, 48, 56), (62, 78, 98)

# The strength of two textures in each class: blotches of 3x3 pixels, and courses (bricks, slabs,
# ripples) of 2x8. A car and a boat have the same.
_BLOTCH = np.array([9, 9, 8, 8, 20, 10, 9, 9, 9, 9], np.int16)
_COURSE = np.array([6, 16, 12, 18, 6, 6, 6, 9, 6, 6], np.int16)

Color = Sequence[int]
Span = tuple[int, int]  # first and one past the last
Dice = Callable[[int, int], int]


class _Canvas(NamedTuple):
    image: np.ndarray  # int16[HEIGHT, WIDTH, 3]
    label: np.ndarray  # uint8[HEIGHT, WIDTH]


def draw(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws scene number `index` (0 or more): image uint8 [65, 129, 3] RGB, label uint8 [65, 129].

    Half of the scenes are streets, half harbours (`scene_kind`). Labels are classes of the label
    space 'scenes'.
    """
    return draw_kind(index, scene_kind(index))


def scene_kind(index: int) -> int:
    """Returns `STREET` or `HARBOUR`, each for half of the indices."""
    return _dice(index, 'kind')(STREET, HARBOUR)


def draw_kind(index: int, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws scene `index` as a street or as a harbour; the parts that both have are equal."""
    dice = _dice(index, 'scene')
    canvas = _Canvas(np.empty((HEIGHT, WIDTH, 3), np.int16), np.empty((HEIGHT, WIDTH), np.uint8))
    horizon, front = dice(25, 30), dice(55, 58)  # from row `front` on, the ground is free again
    sky = _SKIES[dice(0, len(_SKIES) - 1)]
    _sky_and_ground(canvas, dice, sky, horizon)
    if kind == STREET:
        _street(canvas, _dice(index, 'street'), (horizon, front))
    else:
        _harbour(canvas, _dice(index, 'harbour'), (horizon, front), sky)
    _things(canvas, dice, horizon, CAR if kind == STREET else BOAT)
    bright = dice(190, 290)  # the light in 1/256: bright or dull, and warm or cold
    light = np.array([bright + dice(-36, 36) for _ in range(3)], np.int32)
    image = np.clip(_textured(canvas, index) * light >> 8, 0, 255).astype(np.uint8)
    step = 1 - 2 * dice(0, 1)  # -1 mirrors
    return np.ascontiguousarray(image[:, ::step]), np.ascontiguousarray(canvas.label[:, ::step])


def cue_distance(index: int) -> float:
    """Returns the distance in pixels from the cars or boats of scene `index` to its nearest cue.

    That is the smallest Euclidean distance between a pixel labelled `car` or `boat` and another
    pixel whose colour or label differs between the street and the harbour of this index.
    """
    street, street_label = draw_kind(index, STREET)
    harbour, harbour_label = draw_kind(index, HARBOUR)
    vehicle = street_label == CAR
    differs = (street != harbour).any(-1) | (street_label != harbour_label) & ~vehicle
    vehicle_N2, cue_M2 = np.argwhere(vehicle), np.argwhere(differs)
    squares_NM = ((vehicle_N2[:, None] - cue_M2[None]) ** 2).sum(-1)
    return float(np.sqrt(squares_NM.min()))


def _words(index: int, stream: str, count: int) -> np.ndarray:
    streams = ('kind', 'scene', 'street', 'harbour', 'texture')
    # the stream is in the upper half of the 128 bits of the key, so no two streams are equal
    return np.random.Philox(key=index + (streams.index(stream) << 64)).random_raw(count)


def _dice(index: int, stream: str) -> Dice:
    """Returns a function of (low, high) that returns the next integer in [low, high]."""
    # raw words, since the methods of np.random.Generator may change from version to version
    words = iter(_words(index, stream, 192).tolist())
    return lambda low, high: low + next(words) % (high - low + 1)


def _pick(dice: Dice, colors: Sequence[Color]) -> Color:
    """Returns one of the colours with each channel changed by up to 18 of 255."""
    return [value + dice(-18, 18) for value in colors[dice(0, len(colors) - 1)]]


def _mix(a: Color, b: Color, share: int) -> Color:
    """Mixes `share` quarters of b into a."""
    return [((4 - share) * x + share * y) // 4 for x, y in zip(a, b, strict=True)]


def _rectangle(canvas: _Canvas, label: int, color: Color, rows: Span, columns: Span) -> None:
    (top, bottom), (left, right) = rows, columns
    where = slice(max(top, 0), max(bottom, 0)), slice(max(left, 0), max(right, 0))
    canvas.image[where] = color
    canvas.label[where] = label


def _paint(
    canvas: _Canvas, label: int, color: Color, top: int, left: int, mask: np.ndarray
) -> None:
    """Colours the pixels of `mask`, whose first pixel is at (top, left), inside the canvas."""
    mask = mask[max(-top, 0) :, max(-left, 0) :]
    top, left = max(top, 0), max(left, 0)
    mask = mask[: max(HEIGHT - top, 0), : max(WIDTH - left, 0)]
    where = slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1])
    canvas.image[where][mask] = color
    canvas.label[where][mask] = label


@functools.cache
def _ellipse_mask(ry: int, rx: int) -> np.ndarray:
    dy, dx = np.ogrid[-ry : ry + 1, -rx : rx + 1]
    return (dy * rx) ** 2 + (dx * ry) ** 2 <= (rx * ry) ** 2 + rx * ry


def _ellipse(canvas: _Canvas, label: int, color: Color, y: int, x: int, ry: int, rx: int) -> None:
    _paint(canvas, label, color, y - ry, x - rx, _ellipse_mask(ry, rx))


@functools.lru_cache(maxsize=4096)
def _trapezoid_mask(height: int, upper: Span, lower: Span) -> np.ndarray:
    y, x = np.ogrid[:height, : max(upper[1], lower[1])]
    start, end = (u + (w - u) * y // (height - 1) for u, w in zip(upper, lower, strict=True))
    return (x >= start) & (x < end)


def _trapezoid(
    canvas: _Canvas, label: int, color: Color, rows: Span, upper: Span, lower: Span
) -> None:
    """Draws columns `upper` in the first row, `lower` in the last, and straight sides between."""
    left = min(upper[0], lower[0])
    mask = _trapezoid_mask(
        rows[1] - rows[0], (upper[0] - left, upper[1] - left), (lower[0] - left, lower[1] - left)
    )
    _paint(canvas, label, color, rows[0], left, mask)


def _sky_and_ground(canvas: _Canvas, dice: Dice, sky: tuple[Color, Color], horizon: int) -> None:
    ramp = np.arange(horizon, dtype=np.int16)[:, None, None]
    top, low = np.array(sky, np.int16) + dice(-12, 12)
    canvas.image[:horizon] = top + (low - top) * ramp // horizon
    canvas.label[:horizon] = SKY
    for _ in range(dice(1, 3)):
        y, x = dice(3, horizon - 8), dice(0, WIDTH)
        white = _mix(sky[1], (250, 250, 250), dice(1, 2))
        _ellipse(canvas, SKY, white, y, x, 3, dice(7, 13))
        _ellipse(canvas, SKY, white, y + 2, x + dice(5, 9), 3, dice(7, 13))
    color = _pick(dice, _STONES)
    _rectangle(canvas, GROUND, color, (horizon, HEIGHT), (0, WIDTH))
    for step in (3, 9, 18, 29):  # joints between slabs, further apart towards the viewer
        row = horizon + step
        _rectangle(canvas, GROUND, _mix(color, _DARK, 1), (row, row + 1), (0, WIDTH))


def _things(canvas: _Canvas, dice: Dice, horizon: int, vehicle: int) -> None:
    """Draws trees, lamps and persons before the cue, and vehicles at the far end."""
    for x in range(dice(4, 14), _VEHICLE_END, dice(23, 28)):
        _tree(canvas, dice, horizon + dice(2, 6), x)
    slots = [49, 62, 75]  # apart from each other, so that most things stay in sight
    places = [slots.pop(dice(0, len(slots) - 1)) + dice(-1, 1) for _ in range(dice(2, 3))]
    _lamp(canvas, dice, horizon + dice(10, 20), places[0])
    for foot, x in sorted((dice(horizon + 14, HEIGHT - 4), x) for x in places[1:]):
        _person(canvas, dice, foot, x)
    if dice(0, 1):
        _vehicle(canvas, dice, vehicle, horizon + dice(11, 14), dice(22, 26))
    _vehicle(canvas, dice, vehicle, HEIGHT - dice(4, 8), dice(27, 34))


def _tree(canvas: _Canvas, dice: Dice, foot: int, x: int) -> None:
    radius = dice(9, 12)
    middle = foot - radius - dice(5, 9)
    _rectangle(canvas, TREE, (98, 76, 60), (middle, foot), (x - 3, x + 4))
    leaves = _pick(dice, _LEAVES)
    _ellipse(canvas, TREE, leaves, middle, x, radius, radius)
    _ellipse(canvas, TREE, _mix(leaves, (240, 240, 170), 1), middle - 3, x - 3, radius // 2, 5)


def _lamp(canvas: _Canvas, dice: Dice, foot: int, x: int) -> None:
    top, metal = dice(6, 11), _mix(_pick(dice, _PAINTS), _DARK, dice(1, 3))
    light = _pick(dice, _LIGHTS)
    _rectangle(canvas, LAMP, metal, (top + 6, foot), (x - 4, x + 5))
    _rectangle(canvas, LAMP, metal, (foot - 5, foot), (x - 6, x + 7))
    _ellipse(canvas, LAMP, metal, top + 4, x, 8, 8)
    _ellipse(canvas, LAMP, light, top + 4, x, 6, 6)


def _person(canvas: _Canvas, dice: Dice, foot: int, x: int) -> None:
    skin = _pick(dice, ((226, 182, 152), (150, 104, 78), (96, 66, 52)))
    coat, trousers = _pick(dice, _PAINTS), _mix(_pick(dice, _PAINTS), _DARK, 2)
    _rectangle(canvas, PERSON, trousers, (foot - 9, foot), (x - 6, x + 7))
    _rectangle(canvas, PERSON, _DARK, (foot - 8, foot), (x, x + 1))
    _rectangle(canvas, PERSON, coat, (foot - 21, foot - 9), (x - 6, x + 7))
    shade = _mix(coat, _DARK, 1)
    for sleeve in (x - 6, x + 5):
        _rectangle(canvas, PERSON, shade, (foot - 18, foot - 9), (sleeve, sleeve + 2))
    _ellipse(canvas, PERSON, skin, foot - 25, x, 6, 5)


def _vehicle(canvas: _Canvas, dice: Dice, label: int, foot: int, length: int) -> None:
    """Draws a car or a boat: a cabin on a hull with a raised bow, on two wheels or fenders."""
    left, forward = dice(1, _VEHICLE_END - length), dice(0, 1)

    def at(start: int, end: int) -> Span:
        ends = (start, end) if forward else (length - end, length - start)
        return left + ends[0], left + ends[1]

    paint = _pick(dice, _PAINTS)
    trim = _mix(paint, (255, 255, 255) if dice(0, 1) else _DARK, 2)
    height, stern = length // 4 + 2, dice(2, 3)
    deck = foot - height - 1
    roof, pillar, wheel = deck - height + 1, length // 2 + 3, length // 4
    _rectangle(canvas, GROUND, (84, 84, 90), (foot - 1, foot + 1), at(1, length - 2))  # shadow
    upper, lower = at(stern + 3, pillar), at(stern, length - 6)
    _trapezoid(canvas, label, trim, (roof, deck), upper, lower)
    wide = (pillar - stern - 4) // 2
    for window in (at(stern + 3, stern + 3 + wide), at(pillar - wide, pillar)):
        _rectangle(canvas, label, _GLASS, (roof + 2, deck - 1), window)
    _trapezoid(canvas, label, paint, (deck, foot - 1), at(0, length), at(2, length - 5))
    _rectangle(canvas, label, trim, (deck + 2, deck + 4), at(1, length - 3))
    for x in (at(wheel, wheel + 1)[0], at(length - 4 - wheel, length - 3 - wheel)[0]):
        _ellipse(canvas, label, _DARK, foot - 3, x, 3, 3)
        _ellipse(canvas, label, (176, 176, 180), foot - 3, x, 1, 1)


def _bed(canvas: _Canvas, dice: Dice, rows: Span, label: int, color: Color) -> None:
    """Draws a road or a harbour basin, wider towards the viewer, behind a kerb of pale stone."""
    near, far = _CUE_START + dice(0, 3), _CUE_START + dice(5, 12)
    stone = (196, 192, 184)
    kerb = rows[0], rows[1] + 2
    _trapezoid(canvas, GROUND, stone, kerb, (far - 2, WIDTH), (near - 2, WIDTH))
    _trapezoid(canvas, label, color, rows, (far, WIDTH), (near, WIDTH))


def _street(canvas: _Canvas, dice: Dice, rows: Span) -> None:
    _bed(canvas, dice, rows, GROUND, _mix(_DARK, (140, 140, 146), dice(2, 3)))
    dash = rows[0] + 18
    for x in range(_CUE_START + 8 + dice(0, 6), WIDTH, 14):
        _rectangle(canvas, GROUND, (214, 210, 196), (dash, dash + 2), (x, x + 7))
    left = _CUE_START + dice(2, 5)
    while left < WIDTH - 6:
        right = left + dice(17, 26)
        _building(canvas, dice, (dice(2, 13), rows[0] + 10), (left, right))
        left = right


def _building(canvas: _Canvas, dice: Dice, rows: Span, columns: Span) -> None:
    (top, foot), (left, right) = rows, columns
    wall = _pick(dice, _PAINTS)
    pane = _mix(_GLASS, _pick(dice, _LIGHTS), dice(0, 4))
    _rectangle(canvas, BUILDING, wall, rows, columns)
    _rectangle(canvas, BUILDING, _mix(wall, _DARK, 2), (top, top + 3), columns)
    for y in range(top + 6, foot - 9, 9):
        for x in range(left + 2, right - 4, 8):
            _rectangle(canvas, BUILDING, pane, (y, y + 5), (x, x + 5))
    door = left + dice(3, right - left - 8)
    _rectangle(canvas, BUILDING, _mix(wall, _DARK, 3), (foot - 7, foot), (door, door + 6))


def _harbour(canvas: _Canvas, dice: Dice, rows: Span, sky: tuple[Color, Color]) -> None:
    color = _mix(sky[dice(0, 1)], (52, 96, 116), dice(1, 3))
    _bed(canvas, dice, rows, WATER, color)
    _crane(canvas, dice, rows[1] + dice(0, 3), _CUE_START + dice(16, 34))


def _crane(canvas: _Canvas, dice: Dice, foot: int, x: int) -> None:
    paint, top = _pick(dice, _PAINTS), dice(5, 11)
    brace = _mix(paint, _DARK, 2)
    left, right = (x - 8, x + 26) if dice(0, 1) else (x - 26, x + 8)
    left = max(left, _CUE_START)
    _trapezoid(canvas, CRANE, paint, (top, foot), (x - 4, x + 5), (x - 6, x + 7))
    for y in range(top + 15, foot - 4, 7):
        _rectangle(canvas, CRANE, brace, (y, y + 2), (x - 4, x + 5))
    _rectangle(canvas, CRANE, paint, (top, top + 8), (left, right))
    for start in range(left, right - 6, 8):
        ends = (start, start + 2), (start + 5, start + 7)
        _trapezoid(canvas, CRANE, brace, (top + 1, top + 7), *ends)
    _rectangle(canvas, CRANE, _GLASS, (top + 9, top + 14), (x - 3, x + 4))  # the driver's cab


def _textured(canvas: _Canvas, index: int) -> np.ndarray:
    """Returns the image with the textures of its classes and the camera's noise, int32."""
    blocks = [((HEIGHT + 2) // 3, (WIDTH + 2) // 3), ((HEIGHT + 1) // 2, (WIDTH + 7) // 8)]
    sizes = [rows * columns for rows, columns in blocks] + [HEIGHT * WIDTH * 3]
    words = _words(index, 'texture', sum(sizes) // 8 + 1)
    chance = words.astype('<u8').view(np.uint8).astype(np.int16) - 128
    blotch, course, noise = np.split(chance[: sum(sizes)], np.cumsum(sizes[:2]))
    blotch = blotch.reshape(blocks[0]).repeat(3, 0).repeat(3, 1)[:HEIGHT, :WIDTH]
    course = course.reshape(blocks[1]).repeat(2, 0).repeat(8, 1)[:HEIGHT, :WIDTH]
    shade = blotch * _BLOTCH[canvas.label] + course * _COURSE[canvas.label] >> 7
    noise = noise.reshape(HEIGHT, WIDTH, 3) * 3 >> 5
    return (canvas.image + shade[..., None] + noise).astype(np.int32)
