import hashlib
import subprocess
import sys

import numpy as np
import pytest

from psp_jax.data import scenes
from psp_jax.data.labels import label_space
from psp_jax.data.scenes import BOAT, CAR, HARBOUR, STREET, draw, draw_kind, scene_kind

NAMES = label_space('scenes').names
BOTH_KINDS = [(draw_kind(i, STREET), draw_kind(i, HARBOUR)) for i in range(60)]


def digest(indices) -> str:
    """One hash of many pictures and labels."""
    return hashlib.sha256(b''.join(a.tobytes() for i in indices for a in draw(i))).hexdigest()


def test_a_scene_is_a_colour_picture_with_a_label_for_each_pixel():
    assert scenes.HEIGHT % 8 == scenes.WIDTH % 8 == 1
    for index in (0, 1, 2, 12345, 10**9):
        image, label = draw(index)
        assert image.dtype == np.uint8 and image.shape == (scenes.HEIGHT, scenes.WIDTH, 3)
        assert label.dtype == np.uint8 and label.shape == (scenes.HEIGHT, scenes.WIDTH)
        assert label.max() < len(NAMES)
        assert image.std() > 20  # neither blank nor flat


def test_a_fresh_process_draws_the_same_bytes():
    code = (
        'import hashlib\nfrom psp_jax.data.scenes import draw\n'
        'parts = [a.tobytes() for i in range(30) for a in draw(i)]\n'
        'print(hashlib.sha256(b"".join(parts)).hexdigest())'
    )
    fresh = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    assert fresh.stdout.strip() == digest(range(30))
    assert fresh.stdout.strip() != digest(range(1, 31))


def test_half_of_the_scenes_are_streets_and_half_are_mirrored():
    count = 600
    assert abs(sum(scene_kind(i) == STREET for i in range(count)) / count - 0.5) < 0.07
    right = sum(np.argwhere(draw(i)[1] >= CAR)[:, 1].mean() > scenes.WIDTH / 2 for i in range(200))
    assert 70 < right < 130


def test_a_street_has_cars_and_buildings_and_a_harbour_boats_water_and_a_crane():
    cues = {'street': {'building'}, 'harbour': {'water', 'crane'}}
    for (_, street), (_, harbour) in BOTH_KINDS:
        in_street = {NAMES[i] for i in np.unique(street)}
        in_harbour = {NAMES[i] for i in np.unique(harbour)}
        assert in_street >= cues['street'] | {'car'}
        assert not in_street & (cues['harbour'] | {'boat'})
        assert in_harbour >= cues['harbour'] | {'boat'}
        assert not in_harbour & (cues['street'] | {'car'})


def test_a_car_and_a_boat_are_the_same_pixels_on_the_same_surroundings():
    for (street, street_label), (harbour, harbour_label) in BOTH_KINDS:
        np.testing.assert_array_equal(street_label == CAR, harbour_label == BOAT)
        rows, columns = np.nonzero(street_label == CAR)
        box = (
            slice(max(rows.min() - 8, 0), rows.max() + 9),
            slice(max(columns.min() - 8, 0), columns.max() + 9),
        )
        np.testing.assert_array_equal(street[box], harbour[box])
        np.testing.assert_array_equal(
            np.where(street_label == CAR, BOAT, street_label)[box], harbour_label[box]
        )


def test_nothing_within_the_cue_distance_tells_the_kind():
    for index, ((street, street_label), (harbour, harbour_label)) in enumerate(BOTH_KINDS):
        vehicle = street_label == CAR
        differs = (street != harbour).any(-1) | ((street_label != harbour_label) & ~vehicle)
        columns, cues = np.nonzero(vehicle.any(0))[0], np.nonzero(differs.any(0))[0]
        gap = max(cues.min() - columns.max(), columns.min() - cues.max())  # along the row alone
        assert gap >= scenes.CUE_DISTANCE
        assert gap <= scenes.cue_distance(index) < scenes.WIDTH


def test_the_cue_distance_is_that_of_a_plain_loop_over_pixels(monkeypatch):
    def two_pictures(index, kind):
        image, label = np.zeros((12, 20, 3), np.uint8), np.zeros((12, 20), np.uint8)
        label[3:5, 2:5] = CAR if kind == STREET else BOAT
        image[8:10, 10:14] = kind  # differs in colour
        label[11, 9] = kind  # differs in label
        return image, label

    monkeypatch.setattr(scenes, 'draw_kind', two_pictures)
    cues = [(y, x) for y in (8, 9) for x in range(10, 14)] + [(11, 9)]
    expected = min(
        ((y - v) ** 2 + (x - u) ** 2) ** 0.5
        for y, x in cues for v in (3, 4) for u in (2, 3, 4)
    )  # fmt: skip
    assert scenes.cue_distance(0) == pytest.approx(expected)


def patches(indices, step: int) -> tuple[np.ndarray, np.ndarray]:
    """5x5 colour patches `float32[N, 3, 5, 5]` and the class of their middles `uint8[N]`."""
    pixels, classes = [], []
    for index in indices:
        image, label = draw(index)
        first = index % step
        windows = np.lib.stride_tricks.sliding_window_view(image, (5, 5), (0, 1))
        pixels.append(windows[first::step, first::step].reshape(-1, 3, 5, 5))
        classes.append(label[2:-2, 2:-2][first::step, first::step].ravel())
    return np.concatenate(pixels).astype(np.float32), np.concatenate(classes)


def descriptor(patch: np.ndarray) -> np.ndarray:
    """What one would measure by hand: colour, hue, extremes and the texture in both directions."""
    mean, grey = patch.mean((2, 3)), patch.mean(1)
    across = np.abs(np.diff(patch, axis=3)).mean((2, 3))
    down = np.abs(np.diff(patch, axis=2)).mean((2, 3))
    rows, columns = grey.mean(2).std(1), grey.mean(1).std(1)
    extremes = [patch.min((2, 3)), patch.max((2, 3)), patch[:, :, 2, 2], patch.std((2, 3))]
    hue = [np.sort(mean, 1), mean / (mean.sum(1, keepdims=True) + 1)]
    return np.concatenate([mean, *hue, across, down, *extremes, np.stack([rows, columns], 1)], 1)


def test_five_by_five_colour_patches_do_not_tell_the_classes():
    # 600 random rectified features of the whitened descriptor, ridge regression on the classes, the
    # rare ones weighted up: better than the same on the 75 numbers of the patch
    seen, seen_class = patches(range(1000, 1200), 5)
    unseen, unseen_class = patches(range(60), 5)
    seen, unseen = descriptor(seen), descriptor(unseen)
    mean, deviation = seen.mean(0), seen.std(0)
    variance, axes = np.linalg.eigh(np.corrcoef(seen.T))
    rng = np.random.default_rng(0)
    weights = axes / np.sqrt(variance + 0.2) @ rng.normal(size=(len(axes), 600)) / len(axes) ** 0.5
    bias = rng.uniform(-1, 1, 600)

    def hidden(x: np.ndarray) -> np.ndarray:
        return np.maximum((x - mean) / deviation @ weights + bias, 0)

    importance = (np.bincount(seen_class) ** -0.5)[seen_class]
    importance /= importance.mean()
    features = hidden(seen)
    weighted = features.T * importance
    solution = np.linalg.solve(weighted @ features + np.eye(600), weighted @ np.eye(10)[seen_class])
    predicted = (hidden(unseen) @ solution).argmax(1)

    both = np.array([np.sum((predicted == c) & (unseen_class == c)) for c in range(10)])
    either = np.array([np.sum((predicted == c) | (unseen_class == c)) for c in range(10)])
    iou = both / either
    print('patch classifier:', dict(zip(NAMES, iou.round(3).tolist(), strict=True)), iou.mean())
    # it did learn: the most frequent class everywhere would score below 0.04
    assert iou[NAMES.index('sky')] > 0.5 and iou.mean() > 0.28
    assert iou.mean() <= 0.45
