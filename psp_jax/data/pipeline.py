"""The order of training examples, and the parallel reading of examples into batches.

Training example number p of a run (p = step * batch_size + row) is a pure function of (seed, p):
which image it is, and every random choice made for it. So a run resumes at any step at once, bit
for bit, on any number of processes.
"""

import atexit
import contextlib
import os
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from psp_jax.config import crop_size
from psp_jax.data.augment import augment
from psp_jax.data.examples import Source
from psp_jax.data.labels import IGNORE
from psp_jax.errors import PassingError, UserError

K = TypeVar('K')
T = TypeVar('T')

cv2.setNumThreads(0)  # examples are processed in parallel, one thread each
for _kind in ('GPU', 'TPU'):
    with contextlib.suppress(RuntimeError):  # if TensorFlow has started, they cannot be hidden
        tf.config.set_visible_devices([], _kind)

_PREFETCH = 2  # batches ready ahead of the training step
_TRIES = 8  # with data.on_error=skip the run ends after this many bad examples in a row
# First byte of the message of a bad example that no other example replaces -> error to raise.
_ERRORS = {b'\0': UserError, b'\1': PassingError}


def example_index(positions: np.ndarray, length: int, seed: int) -> np.ndarray:
    """Returns the index in the source of training example number `positions`.

    positions: int64 [n], >= 0; length: examples in the source; seed: the run's.
    Returns int64 [n] in 0..length-1. Each epoch, `length` positions from a multiple of `length` on,
    has its own permutation, which also depends on the seed.
    """
    positions = np.asarray(positions, np.int64)
    epochs = positions // length
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        where = epochs == epoch
        indices[where] = _shuffled(positions[where] % length, epoch, length, seed).numpy()
    return indices


@dataclass(frozen=True)
class _Loader:
    """Reads and augments training examples; data, seed: config.data and config.seed."""

    source: Source
    data: ConfigDict
    seed: int

    def load(self, position: np.int64, index: np.int64) -> tuple[np.ndarray, np.ndarray, bytes]:
        """Returns image, label and error message of one training example.

        TensorFlow would wrap an exception, so the batch has the message instead. b'': the example
        is good. A message that starts with a key of _ERRORS: it is bad, and image and label are
        blank. Other messages: it is bad, and image and label are those of the next good example.
        """
        first, skips = b'', self.data.on_error == 'skip'
        for other in range(_TRIES if skips else 1):
            rng = np.random.Generator(np.random.Philox(key=_key(self.seed, int(position))))
            try:
                decoded = self.source.read((int(index) + other) % self.source.length)
                return (*augment(*decoded, rng, self.data), first)
            except UserError as error:
                first = first or str(error).encode()
            except PassingError as error:  # not skipped: the run would not be reproducible
                return (*self._blank(), b'\1' + str(error).encode())
        if skips:
            first += f' (nor can the next {_TRIES - 1}: data.on_error=skip gives up)'.encode()
        return (*self._blank(), b'\0' + first)

    def _blank(self) -> tuple[np.ndarray, np.ndarray]:
        crop = crop_size(self.data)
        return np.zeros((*crop, 3), np.uint8), np.zeros(crop, np.uint8)


def train_batches(
    source: Source,
    config: ConfigDict,
    *,
    start_step: int,
    process_index: int,
    process_count: int,
) -> Generator[dict[str, Any], None, None]:
    """Returns this process's part of the training batches from `start_step` on, without end.

    Of each global batch of config.batch_size (B) examples, process h of P gets the rows
    [h * B/P : (h + 1) * B/P]. A batch holds, with n = B/P: 'image' uint8 [n, height, width, 3] RGB,
    'label' uint8 [n, height, width] (255 = ignore), 'position' int64 [n] (the example numbers),
    'skipped' [(position, message), ...]: with data.on_error=skip the examples that could not be
    read; each is replaced by the next example of the source that can be read.
    Raises UserError at once if B does not divide, and from `next` if an example is bad, or
    PassingError if a disk or a bucket does not answer.
    """
    rows, rest = divmod(config.batch_size, process_count)
    if rest or not rows:
        raise UserError(
            f'batch_size = {config.batch_size} does not divide over {process_count} processes: '
            'make it a multiple of their number'
        )
    loader = _Loader(source, config.data, config.seed)

    def example(n: tf.Tensor) -> dict[str, tf.Tensor]:
        position = n // rows * config.batch_size + process_index * rows + n % rows
        slot, epoch = position % source.length, position // source.length
        image, label, error = tf.numpy_function(
            loader.load,
            [position, _shuffled(slot, epoch, source.length, config.seed)],
            (tf.uint8, tf.uint8, tf.string),
            stateful=False,
        )
        return {
            'image': tf.ensure_shape(image, (*crop_size(config.data), 3)),
            'label': tf.ensure_shape(label, crop_size(config.data)),
            'position': position,
            'error': tf.ensure_shape(error, ()),
        }

    threads = config.data.threads or os.cpu_count() or 1
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    batches = (
        tf.data.Dataset.range(start_step * rows, np.iinfo(np.int64).max)
        .map(example, num_parallel_calls=threads, deterministic=True)
        .batch(rows, drop_remainder=True)
        .prefetch(_PREFETCH)
        .with_options(options)
    )
    return _closed_at_exit(_checked(batches))


def _checked(batches: tf.data.Dataset) -> Generator[dict[str, Any], None, None]:
    """Yields the batches as arrays, with error messages raised or listed as 'skipped'."""
    for batch in batches.as_numpy_iterator():
        errors = batch.pop('error')
        for error in errors:
            if error[:1] in _ERRORS:
                raise _ERRORS[error[:1]](error[1:].decode())
        skipped = zip(batch['position'].tolist(), errors, strict=True)
        yield {**batch, 'skipped': [(p, error.decode()) for p, error in skipped if error]}


def _closed_at_exit(iterator: Generator[T, None, None]) -> Generator[T, None, None]:
    """Closes a TensorFlow iterator before Python shuts down.

    Otherwise it waits for threads that wait for Python, and the process never ends.
    """
    alive = weakref.ref(iterator)

    @atexit.register
    def close() -> None:
        if (left := alive()) is not None:
            left.close()

    return iterator


def read_ahead(read: Callable[[K], T], keys: Iterable[K], threads: int) -> Iterator[T]:
    """Yields read(key) for all `keys`, in their order.

    threads: how many read at the same time (0 = all cores); twice as many results are read ahead.
    An error of `read` is raised when its result is due.
    """
    threads = threads or os.cpu_count() or 1
    pool = ThreadPoolExecutor(threads)
    pending: deque = deque()
    try:
        for key in keys:
            pending.append(pool.submit(read, key))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _shuffled(
    slot: tf.Tensor | np.ndarray, epoch: tf.Tensor | np.int64, length: int, seed: int
) -> tf.Tensor:
    """Returns the example at place `slot` (scalar or vector, int64) of the epoch's permutation."""
    words = tf.stack([tf.constant(seed & 0xFFFFFFFF, tf.int64), tf.cast(epoch, tf.int64)])
    return tf.random.experimental.index_shuffle(slot, seed=words, max_index=length - 1)


def _key(seed: int, position: int) -> np.ndarray:
    """Returns Philox's 128-bit key; every pair of seed and example number has its own stream."""
    return np.array([seed & 0xFFFFFFFFFFFFFFFF, position], np.uint64)


def holds_classes(source: Source, threads: int) -> bool:
    """Returns whether any label of `source` has a pixel that counts; test sets may have none.

    Reads until there is one, `threads` examples at a time (0 = all cores).
    """
    if not source.labelled:
        return False
    examples = read_ahead(source.read, range(source.length), threads)
    return any((label != IGNORE).any() for _, label in examples)
