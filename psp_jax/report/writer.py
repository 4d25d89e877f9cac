"""What a training run writes to its working directory and prints."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from psp_jax.report import console


class RunLog:
    """Progress on the terminal, `metrics.jsonl`, TensorBoard, and the list of skipped examples.

    A run that continues from step `first` deletes the lines of steps that will run again, so that
    each step is listed once. If `first` will be evaluated again, its old scores are deleted too.
    """

    def __init__(self, workdir: str, config: ConfigDict, first: int, evaluated: bool):
        self.workdir, self.config = workdir, config
        self._writer = Writer(workdir, first, evaluated)
        self._skips = Skips(workdir, first * config.batch_size)
        self._interval: list[dict[str, float]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Starts a new interval of timing: saves and evaluations do not count as training time."""
        self._start, self._waited, self._timed = time.perf_counter(), 0.0, 0

    @contextmanager
    def reading(self, scalars: dict[str, jax.Array]) -> Iterator[None]:
        """Times the reading of a batch.

        The time counts only if the step of `scalars` is done at the end of it; otherwise the
        devices did not wait.
        """
        start = time.perf_counter()
        yield
        if scalars['loss'].is_ready():  # type: ignore[attr-defined]
            self._waited += time.perf_counter() - start

    def step(self, step: int, values: dict[str, float]) -> None:
        """Takes the scalars of a step; every `log_every` steps their means are written."""
        self._timed += 1
        self._interval.append(values)
        if step % self.config.log_every and step != self.config.total_steps:
            return
        seconds = time.perf_counter() - self._start
        per_step = seconds / max(self._timed, 1)
        means = {name: float(np.mean([v[name] for v in self._interval])) for name in values}
        means |= {
            'learning_rate': values['learning_rate'],
            'seconds_per_step': per_step,
            'images_per_second': self.config.batch_size / per_step,
            'data_wait': self._waited / max(seconds, 1e-9),
        }
        self._interval.clear()
        self.restart_clock()
        self._writer.scalars(step, means)
        console.say(console.step_line(step, self.config.total_steps, means))

    def skipped(self, examples: Sequence[tuple[int, str]]) -> None:
        """Lists training examples (position, message) that could not be read."""
        for position, text in examples:
            self._skips.add(position, text)

    def evaluation(self, scores: dict[str, Any], panels: np.ndarray | None) -> None:
        """Takes the scores of an evaluation and its panels, uint8 [H, W, 3]."""
        step = scores['step']
        console.say(console.class_table(scores))
        console.say(f'step {step}  {console.headline(scores)}')
        names = ('mIoU', 'mIoU_all', 'mAcc', 'allAcc', 'loss')
        values = {f'{scores["split"]}/{name}': scores[name] for name in names}
        self._writer.scalars(step, values)
        if panels is not None:
            self._writer.image(step, 'panels', panels)

    def close(self) -> None:
        """Closes the files, and says how many examples were skipped, if any."""
        self._writer.close()
        summary = self._skips.summary()
        if summary:
            console.say(summary)


class Writer:
    """Scalars to `WORKDIR/metrics.jsonl` and TensorBoard, from process 0 only."""

    def __init__(self, workdir: str, first: int, evaluated: bool = True):
        self.active = jax.process_index() == 0
        if not self.active:
            return
        tf.io.gfile.makedirs(workdir)
        path = f'{workdir}/metrics.jsonl'

        def stays(values: dict[str, Any]) -> bool:
            return values['step'] < first + (evaluated or 'loss' in values)

        _delete_lines(path, stays)
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
        """Adds an image uint8 [H, W, 3] to TensorBoard."""
        if self.active:
            with self.events.as_default():
                tf.summary.image(name, picture[None], step)

    def close(self) -> None:
        if self.active:
            self.lines.close()
            self.events.close()


class Skips:
    """Training examples that could not be read: a line each, on stderr and in a file.

    The file is `WORKDIR/skipped.jsonl`, or `skipped-I.jsonl` of process I > 0, which reads other
    examples. A run that continues at example number `first` deletes the later lines.
    """

    def __init__(self, workdir: str, first: int):
        index, self.workdir = jax.process_index(), workdir
        self.path = f'{workdir}/skipped{f"-{index}" if index else ""}.jsonl'
        if index == 0:  # for all processes, because there may have been more of them before
            for path in _lists_of_skips(workdir):
                _delete_lines(path, lambda values: values['position'] < first)
        multihost_utils.sync_global_devices('skipped examples')
        self.count = 0
        if tf.io.gfile.exists(self.path):
            with tf.io.gfile.GFile(self.path) as file:
                self.count = len(file.read().splitlines())

    def add(self, position: int, text: str) -> None:
        self.count += 1
        with tf.io.gfile.GFile(self.path, 'a') as file:
            file.write(json.dumps({'position': position, 'error': text}) + '\n')
        print(f'skipped example {self.count} of this process: {text}', file=sys.stderr, flush=True)

    def summary(self) -> str:
        """A line about the skipped examples of all processes, '' if there are none."""
        count = 0
        with suppress(tf.errors.OpError):  # the run does not need this line
            for path in _lists_of_skips(self.workdir) if jax.process_index() == 0 else ():
                with tf.io.gfile.GFile(path) as file:
                    count += len(file.read().splitlines())
        return f'skipped {count} training example(s): {self.workdir}/skipped*.jsonl' * bool(count)


def _lists_of_skips(workdir: str) -> list[str]:
    names = tf.io.gfile.listdir(workdir)
    return [f'{workdir}/{name}' for name in names if re.fullmatch(r'skipped(-\d+)?\.jsonl', name)]


def _delete_lines(path: str, stays: Callable[[dict[str, Any]], bool]) -> None:
    """Deletes the lines of a file of JSON lines, if it is there, for which stays(line) is false."""
    if not tf.io.gfile.exists(path):
        return
    with tf.io.gfile.GFile(path) as file:
        lines = file.read().splitlines()
    kept = []
    for line in lines:
        with suppress(ValueError, KeyError):  # a line that was cut off
            if stays(json.loads(line)):
                kept.append(f'{line}\n')
    with tf.io.gfile.GFile(f'{path}.new', 'w') as file:
        file.write(''.join(kept))
    tf.io.gfile.rename(f'{path}.new', path, overwrite=True)
