import hashlib
import subprocess
import sys

import numpy as np

from psp_jax.data import scenes
from psp_jax.data.labels import label_space
from psp_jax.data.scenes import BOAT, CAR, HARBOUR, STREET, draw, draw_kind

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
