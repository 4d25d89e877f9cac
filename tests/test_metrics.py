"""mIoU and its relatives against counting in plain Python."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psp_jax.data.labels import label_space
from psp_jax.metrics import confusion_matrix, extra_scores, scores


def counted(predictions, labels, classes):
    """Per class (right, labelled, predicted) by looking at one pixel after another."""
    right, labelled, predicted = [0] * classes, [0] * classes, [0] * classes
    for prediction, label in zip(predictions.ravel(), labels.ravel(), strict=True):
        if label == 255:
            continue
        labelled[label] += 1
        predicted[prediction] += 1
        right[label] += int(prediction == label)
    return right, labelled, predicted


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_scores_equal_a_plain_count(seed, classes):
    rng = np.random.default_rng(seed)
    # Some classes never occur in the labels, some never in the predictions, some in neither.
    in_labels = rng.choice(classes, rng.integers(1, classes + 1), replace=False)
    predictions = rng.choice(rng.choice(classes, rng.integers(1, classes + 1)), (3, 7, 11))
    labels = rng.choice([*in_labels, 255], (3, 7, 11))
    matrix = confusion_matrix(
        jnp.asarray(predictions, jnp.uint8), jnp.asarray(labels, jnp.uint8), classes
    )
    got = scores(np.asarray(matrix, np.int64), tuple(f'c{i}' for i in range(classes)))

    right, labelled, predicted = counted(predictions, labels, classes)
    unions = [t + p - i for i, t, p in zip(right, labelled, predicted, strict=True)]
    ious = [i / u if u else None for i, u in zip(right, unions, strict=True)]
    accs = [i / t if t else None for i, t in zip(right, labelled, strict=True)]
    present = [v for v in ious if v is not None]
    assert got['mIoU'] == pytest.approx(sum(present) / max(len(present), 1))
    assert got['mIoU_all'] == pytest.approx(sum(v or 0 for v in ious) / classes)
    assert got['mAcc_all'] == pytest.approx(sum(v or 0 for v in accs) / classes)
    assert got['allAcc'] == pytest.approx(sum(right) / max(sum(labelled), 1))
    assert [c['pixels'] for c in got['classes']] == labelled
    for c, iou, acc in zip(got['classes'], ious, accs, strict=True):
        assert c['iou'] == (None if iou is None else pytest.approx(iou))
        assert c['acc'] == (None if acc is None else pytest.approx(acc))


def test_a_class_predicted_but_absent_from_the_labels_counts_as_zero():
    # Worked by hand: four classes, the last nowhere; one pixel ignored.
    predictions = jnp.asarray([[0, 1, 1], [2, 2, 0]], jnp.uint8)
    labels = jnp.asarray([[0, 1, 2], [2, 255, 1]], jnp.uint8)
    matrix = np.asarray(confusion_matrix(predictions, labels, 4), np.int64)
    got = scores(matrix, ('a', 'b', 'c', 'd'))
    assert got['mIoU'] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert got['mIoU_all'] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert (got['mAcc'], got['mAcc_all']) == (pytest.approx(2 / 3), pytest.approx(0.5))
    assert got['allAcc'] == pytest.approx(0.6)
    # The last class predicted once where the label is another: its union is 1, its IoU 0.
    matrix[0, 0], matrix[0, 3] = 0, 1
    got = scores(matrix, ('a', 'b', 'c', 'd'))
    assert got['classes'][3]['iou'] == 0 and got['classes'][3]['acc'] is None
    assert got['mIoU'] == got['mIoU_all']


def test_the_challenge_score_is_the_mean_of_miou_and_pixel_accuracy():
    matrix = np.zeros((150, 150), np.int64)
    matrix[0, 0], matrix[1, 0], matrix[2, 2] = 3, 1, 4
    expected = ((3 / 4 + 0 + 1) / 150 + 7 / 8) / 2
    found = extra_scores(matrix, label_space('ade20k'))
    assert found == {'challenge_score': pytest.approx(expected)}
    assert extra_scores(matrix, label_space('150')) == {}


def test_categories_of_cityscapes_count_a_confusion_within_them_as_right():
    matrix = np.zeros((19, 19), np.int64)
    matrix[13, 14] = 6  # car as truck: both vehicles
    matrix[11, 13] = 2  # person as car
    found = extra_scores(matrix, label_space('cityscapes'))
    assert found['categories']['vehicle'] == pytest.approx(6 / 8)
    assert found['categories']['human'] == 0 and found['categories']['sky'] is None
    assert found['category_mIoU'] == pytest.approx((6 / 8 + 0) / 2)
