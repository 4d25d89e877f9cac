"""What a run leaves in its working directory: metrics, TensorBoard, skipped examples."""

import contextlib
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from jax.experimental import multihost_utils


class Writer:
    """Scalars to `WORKDIR/metrics.jsonl` and TensorBoard, from the first process only.

    A run that continues from step `first` takes back the lines of later steps, which it will write
    again, so that every step stands there once; where `first` is still to be `evaluated`, that line
    too.
    """

    def __init__(self, workdir: str, first: int, evaluated: bool = True):
        self.active = jax.process_index() == 0
        if self.active:
            tf.io.gfile.makedirs(workdir)
            path = f'{workdir}/metrics.jsonl'

            def stays(values: dict[str, Any]) -> bool:
                return values['step'] < first + (evaluated or 'loss' in values)

            _take_back(path, stays)
            self.lines = tf.io.gfile.GFile(path, 'a')
            self.events = tf.summary.create_file_writer(f'{workdir}/tensorboard')

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self.active:
            self.lines.write(json.dumps({'step': step, **values}) + '\n')
            self.lines.flush()
            with self.events.as_default():
                for name, value in values.items():
                    tf.summary.scalar(name, value, step)
                self.events.flush()

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Adds a uint8 [H, W, 3] picture to TensorBoard."""
        if self.active:
            with self.events.as_default():
                tf.summary.image(name, picture[None], step)

    def close(self) -> None:
        if self.active:
            self.lines.close()
            self.events.close()


class Skips:
    """Training examples that could not be read: a line each, on stderr and in a file.

    That is `WORKDIR/skipped.jsonl`, and `skipped-I.jsonl` of process I > 0, which each has examples
    of its own. A run that continues at example number `first` takes back the later lines.
    """

    def __init__(self, workdir: str, first: int):
        index, self.workdir = jax.process_index(), workdir
        self.path = f'{workdir}/skipped{f"-{index}" if index else ""}.jsonl'
        if index == 0:  # of all, for there may have been more processes
            for path in _lists_of_skips(workdir):
                _take_back(path, lambda values: values['position'] < first)
        multihost_utils.sync_global_devices('skipped examples')
        self.count = 0
        if tf.io.gfile.exists(self.path):
            with tf.io.gfile.GFile(self.path) as file:
                self.count = len(file.read().splitlines())

    def add(self, position: int, text: str) -> None:
        self.count += 1
        with tf.io.gfile.GFile(self.path, 'a') as file:
            file.write(json.dumps({'position': position, 'error': text}) + '\n')
        print(f'skipped, the {self.count}. of this process: {text}', file=sys.stderr, flush=True)

    def summary(self) -> str:
        """A line about those of all processes so far, if there are any."""
        count = 0
        with contextlib.suppress(tf.errors.OpError):  # nothing is lost with the line
            for path in _lists_of_skips(self.workdir) if jax.process_index() == 0 else ():
                with tf.io.gfile.GFile(path) as file:
                    count += len(file.read().splitlines())
        return f'skipped {count} training example(s): {self.workdir}/skipped*.jsonl' * bool(count)


def _lists_of_skips(workdir: str) -> list[str]:
    names = tf.io.gfile.listdir(workdir)
    return [f'{workdir}/{name}' for name in names if re.fullmatch(r'skipped(-\d+)?\.jsonl', name)]


def _take_back(path: str, stays: Callable[[dict[str, Any]], bool]) -> None:
    """Removes the other lines of a file of JSON lines, if it is there."""
    if not tf.io.gfile.exists(path):
        return
    with tf.io.gfile.GFile(path) as file:
        lines = file.read().splitlines()
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError):  # a line that was cut off
            if stays(json.loads(line)):
                kept.append(f'{line}\n')
    with tf.io.gfile.GFile(f'{path}.new', 'w') as file:
        file.write(''.join(kept))
    tf.io.gfile.rename(f'{path}.new', path, overwrite=True)
