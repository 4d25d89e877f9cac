"""Lines on the terminal."""

import numpy as np
import pytest

from psp_jax import metrics
from psp_jax.report import console


@pytest.mark.parametrize(
    'seconds, text',
    [(3.6, '0m04s'), (247, '4m07s'), (3900, '1h05m'), (47 * 3600, '47h00m'), (184000, '2d03h')],
)
def test_durations(seconds, text):
    assert console.duration(seconds) == text


def test_a_step_line_has_the_loss_the_speed_and_the_time_that_is_left():
    values = {
        'loss': 1.5,
        'loss_main': 1.1,
        'loss_aux': 1.0,
        'learning_rate': 0.01,
        'images_per_second': 12.34,
        'data_wait': 0.021,
        'seconds_per_step': 0.5,
    }
    assert console.step_line(400, 1000, values) == (
        'step  400/1000  loss 1.5000 (main 1.1000, aux 1.0000, lr 1.00e-02)  12.3 images/s'
        '  waiting for data 2%  ETA 5m00s'
    )


def test_a_class_table_and_a_headline():
    confusion = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    scores = metrics.scores(confusion, ('sky', 'building', 'car'))
    scores |= {'loss': 0.25, 'images': 2, 'seconds': 5.0, 'challenge_score': 0.5}
    assert console.class_table(scores).splitlines() == [
        'class          IoU     acc   pixels',
        'sky          75.00   75.00   50.00%',
        'building     80.00  100.00   50.00%',
        'car              -       -    0.00%',
    ]
    assert console.headline(scores) == (
        'mIoU 77.50  mAcc 87.50  allAcc 87.50  challenge score 50.00  loss 0.2500'
        '  (2 images, 0m05s)'
    )
