"""What a person sees of a run: log lines, tables, TensorBoard, pictures. Effects only."""

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import cv2
import jax
import numpy as np
import tensorflow as tf
from jax.experimental import multihost_utils

from psp_jax.data.labels import IGNORE, LabelSpace, palette

_GAP = 4  # pixels between pictures


def say(text: str) -> None:
    """Prints from the first process of a run only."""
    if jax.process_index() == 0:
        print(text, flush=True)


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


class Speed:
    """Steps a second and the share of time spent waiting for data, without pauses."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts a new interval, as after an evaluation, which is not the training's time."""
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def read(self) -> tuple[float, float]:
        """(seconds a step, share of waiting) since the last call; starts a new interval."""
        seconds = time.perf_counter() - self.start
        result = seconds / max(self.steps, 1), self.waited / max(seconds, 1e-9)
        self.reset()
        return result


def duration(seconds: float) -> str:
    """'2d03h', '1h05m' or '4m07s'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f'{hours // 24}d{hours % 24:02}h'
    return f'{hours}h{minutes:02}m' if hours else f'{minutes}m{seconds:02}s'


def step_line(step: int, total: int, values: dict[str, float]) -> str:
    """One line of training progress from the scalars of `Writer`."""
    aux = f' aux {values["loss_aux"]:.4f},' if 'loss_aux' in values else ''
    left = (total - step) * values['seconds_per_step']
    return (
        f'step {step:>{len(str(total))}}/{total}  loss {values["loss"]:.4f}'
        f' (main {values["loss_main"]:.4f},{aux} lr {values["learning_rate"]:.2e})'
        f'  {values["images_per_second"]:.1f} images/s'
        f'  waiting for data {values["data_wait"]:.0%}  ETA {duration(left)}'
    )


def class_table(scores: dict[str, Any]) -> str:
    """IoU, accuracy and share of pixels of each class, and the means, as lines."""
    width = max(len(c['name']) for c in scores['classes']) + 2
    total = max(sum(c['pixels'] for c in scores['classes']), 1)

    def percent(value: float | None) -> str:
        return '-' if value is None else f'{100 * value:.2f}'

    lines = [f'{"class":<{width}}{"IoU":>8}{"acc":>8}{"pixels":>9}']
    for c in scores['classes']:
        share = f'{100 * c["pixels"] / total:.2f}%'
        lines.append(f'{c["name"]:<{width}}{percent(c["iou"]):>8}{percent(c["acc"]):>8}{share:>9}')
    return '\n'.join(lines)


def headline(scores: dict[str, Any]) -> str:
    extra = ''
    for name in ('challenge_score', 'category_mIoU'):
        if name in scores:
            extra += f'  {name.replace("_", " ")} {100 * scores[name]:.2f}'
    return (
        f'mIoU {100 * scores["mIoU"]:.2f}  mAcc {100 * scores["mAcc"]:.2f}'
        f'  allAcc {100 * scores["allAcc"]:.2f}{extra}  loss {scores["loss"]:.4f}'
        f'  ({scores["images"]} images, {duration(scores["seconds"])})'
    )


def draw_panels(panels: list[Any], space: LabelSpace) -> np.ndarray:
    """Rows of image | label | prediction, and the colours of the classes below: uint8 [H, W, 3].

    panels: objects with `image` [H, W, 3], `label` and `prediction` [H, W], all uint8.
    """
    height = max(p.image.shape[0] for p in panels)
    width = max(p.image.shape[1] for p in panels)
    zoom = max(1, round(240 / height))  # small pictures are enlarged without smoothing
    rows, present, colors = [], set(), palette(space)
    for p in panels:
        row = []
        ignored = p.label == IGNORE
        present |= set(np.unique(p.label[~ignored])) | set(np.unique(p.prediction))
        for picture in (p.image, colors[p.label], colors[p.prediction]):
            tile = np.full((height + _GAP, width + _GAP, 3), 255, np.uint8)
            tile[: picture.shape[0], : picture.shape[1]] = picture
            row.append(tile.repeat(zoom, 0).repeat(zoom, 1))
        rows.append(np.concatenate(row, 1))
    grid = np.concatenate(rows)
    header = np.full((24, grid.shape[1], 3), 255, np.uint8)
    for i, title in enumerate(('image', 'label', 'prediction')):
        _text(header, title, (6 + i * grid.shape[1] // 3, 17))
    below = legend([*sorted(present), IGNORE], space, grid.shape[1])
    return np.concatenate([header, grid, below])


def legend(ids: list[int], space: LabelSpace, width: int) -> np.ndarray:
    """Coloured squares with the names of classes, in lines of at most `width` pixels."""
    columns = max(width // 150, 1)
    picture = np.full((24 * -(-len(ids) // columns), width, 3), 255, np.uint8)
    colors, names = palette(space), dict(enumerate(space.names)) | {IGNORE: 'unlabelled'}
    entries = [(names[i], colors[i]) for i in ids]
    for n, (name, color) in enumerate(entries):
        top, left = 24 * (n // columns), 150 * (n % columns)
        picture[top + 5 : top + 19, left + 6 : left + 20] = color
        _text(picture, name[:16], (left + 26, top + 17))
    return picture


def _text(picture: np.ndarray, text: str, place: tuple[int, int]) -> None:
    cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)


def write_png(path: str, picture: np.ndarray) -> None:
    """Writes RGB uint8 [H, W, 3], locally or to a bucket."""
    encoded = cv2.imencode('.png', np.ascontiguousarray(picture[..., ::-1]))[1]
    with tf.io.gfile.GFile(path, 'wb') as file:
        file.write(encoded.tobytes())


def on_terminal() -> bool:
    return sys.stderr.isatty() and jax.process_index() == 0
