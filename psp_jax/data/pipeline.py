"""Examples in, batches out: the order of training examples and the parallel reading of them.

Training example number p of a run (p = step * batch_size + row) is a pure function of (seed, p):
which image, and every random choice made on it. So a run resumes at any step at no cost, bit for
bit, and on another number of processes.
"""

import atexit
import contextlib
import os
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import cv2
import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from psp_jax.data.augment import augment
from psp_jax.data.labels import IGNORE
from psp_jax.data.sources import Source
from psp_jax.errors import PassingError, UserError

K = TypeVar('K')
T = TypeVar('T')

cv2.setNumThreads(0)  # examples are worked on in parallel, one thread each
for _kind in ('GPU', 'TPU'):
    with contextlib.suppress(RuntimeError):  # TensorFlow is already up: nothing left to hide
        tf.config.set_visible_devices([], _kind)

_PREFETCH = 2  # batches ready ahead of the training step
_TRIES = 8  # examples that may be bad in a row where they are skipped
# Before the message of an example that has nothing in its place.
_BAD, _NOT_THERE = b'\0', b'\1'


def example_index(positions: np.ndarray, length: int, seed: int) -> np.ndarray:
    """Returns which example of the source is training example number `positions`.

    positions: int64 [n], >= 0; length: examples in the source; seed: the run's.
    Returns int64 [n] in 0..length-1. Every stretch of `length` positions that begins at a multiple
    of `length` (an epoch) is a permutation, another one for each epoch and seed.
    """
    positions = np.asarray(positions, np.int64)
    epochs = positions // length
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        where = epochs == epoch
        indices[where] = _shuffled(positions[where] % length, epoch, length, seed).numpy()
    return indices


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
    'skipped' [(position, message), ...]: where data.on_error is 'skip', examples that could not be
    read, in whose place the next one of the source is that can be.
    Raises UserError at once where B does not divide, and from `next` where an example is bad, or
    PassingError where a disk or a bucket does not answer.
    """
    data, seed = config.data, config.seed
    rows, rest = divmod(config.batch_size, process_count)
    if rest or not rows:
        raise UserError(
            f'batch_size = {config.batch_size} does not divide over {process_count} processes: '
            'make it a multiple of their number'
        )
    crop = (data.crop, data.crop) if isinstance(data.crop, int) else tuple(data.crop)
    blank = np.zeros((*crop, 3), np.uint8), np.zeros(crop, np.uint8)

    def load(position: np.int64, index: np.int64) -> tuple[np.ndarray, np.ndarray, bytes]:
        # TensorFlow would wrap an exception: its text travels with the batch instead.
        first = b''
        for other in range(_TRIES if data.on_error == 'skip' else 1):
            rng = np.random.Generator(np.random.Philox(key=_key(seed, int(position))))
            try:
                decoded = source.read((int(index) + other) % source.length)
                return (*augment(*decoded, rng, data), first)
            except UserError as error:
                first = first or str(error).encode()
            except PassingError as error:  # another one in its place would be another training
                return (*blank, _NOT_THERE + str(error).encode())
        if data.on_error == 'skip':
            first += f' (nor can the next {_TRIES - 1}: data.on_error=skip gives up)'.encode()
        return (*blank, _BAD + first)

    def example(n: tf.Tensor) -> dict[str, tf.Tensor]:
        position = n // rows * config.batch_size + process_index * rows + n % rows
        index = _shuffled(position % source.length, position // source.length, source.length, seed)
        image, label, error = tf.numpy_function(
            load, [position, index], (tf.uint8, tf.uint8, tf.string), stateful=False
        )
        return {
            'image': tf.ensure_shape(image, (*crop, 3)),
            'label': tf.ensure_shape(label, crop),
            'position': position,
            'error': tf.ensure_shape(error, ()),
        }

    threads = data.threads or os.cpu_count() or 1
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
    iterator = _checked(batches)
    # A TensorFlow iterator that is still alive when Python shuts down waits for threads that wait
    # for Python: the process would never end.
    alive = weakref.ref(iterator)

    @atexit.register
    def close() -> None:
        if (left := alive()) is not None:
            left.close()

    return iterator


def read_ahead(read: Callable[[K], T], keys: Iterable[K], threads: int) -> Iterator[T]:
    """Yields read(key) for all `keys`, in their order.

    threads: how many read at the same time (0 = all cores); twice as many are read ahead. What
    `read` raises comes out where its result would have.
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
    """Example at place `slot` (scalar or vector, int64) of the epoch's permutation."""
    words = tf.stack([tf.constant(seed & 0xFFFFFFFF, tf.int64), tf.cast(epoch, tf.int64)])
    return tf.random.experimental.index_shuffle(slot, seed=words, max_index=length - 1)


def _key(seed: int, position: int) -> np.ndarray:
    """Philox's 128-bit key: another stream for every pair of seed and example number."""
    return np.array([seed & 0xFFFFFFFFFFFFFFFF, position], np.uint64)


def _checked(batches: tf.data.Dataset) -> Generator[dict[str, Any], None, None]:
    for batch in batches.as_numpy_iterator():
        errors = batch.pop('error')
        for error in errors:
            for start, kind in ((_BAD, UserError), (_NOT_THERE, PassingError)):
                if error.startswith(start):
                    raise kind(error.removeprefix(start).decode())
        skipped = zip(batch['position'].tolist(), errors, strict=True)
        yield {**batch, 'skipped': [(p, error.decode()) for p, error in skipped if error]}


def holds_classes(source: Source, threads: int) -> bool:
    """Whether any label of `source` has a pixel that counts; test sets may be all ignored.

    Reads until there is one, `threads` examples at a time (0 = all cores).
    """
    if not source.labelled:
        return False
    examples = read_ahead(source.read, range(source.length), threads)
    return any((label != IGNORE).any() for _, label in examples)
