import os
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict

import psp_jax
from psp_jax.data.examples import Source
from psp_jax.data.pipeline import example_index, read_ahead, train_batches
from psp_jax.errors import PassingError, UserError


def config_of(**changes):
    data = {'crop': (17, 9), 'mean': (123.675, 116.28, 103.53), 'scale': (0.5, 2.0)}
    data.update({'rotate': 10.0, 'blur': 0.5, 'mirror': 0.5, 'threads': 2, 'on_error': 'stop'})
    data.update(changes.pop('data', {}))
    return ConfigDict({'seed': 0, 'batch_size': 4, 'data': data, **changes})


def noise_source(length=7):
    def read(index):
        rng = np.random.default_rng(index)
        return rng.integers(0, 256, (20, 24, 3), np.uint8), rng.integers(0, 9, (20, 24), np.uint8)

    return Source(length, lambda i: f'noise {i}', read)


def numbered_source(length):
    """Images that hold their own number."""

    def read(index):
        return np.full((17, 9, 3), index, np.uint8), np.full((17, 9), index, np.uint8)

    return Source(length, str, read)


PLAIN = {'scale': (1.0, 1.0), 'rotate': 0.0, 'blur': 0.0, 'mirror': 0.0}


def joined(low, high):
    """The parts of a batch that two processes have, as one."""
    keys = low.keys() - {'skipped'}
    whole = {key: np.concatenate([low[key], high[key]]) for key in keys}
    return {**whole, 'skipped': low['skipped'] + high['skipped']}


def batches(source, config, steps, start_step=0, process_index=0, process_count=1):
    place = {'process_index': process_index, 'process_count': process_count}
    stream = train_batches(source, config, start_step=start_step, **place)
    got = list(islice(stream, steps))
    stream.close()
    return got


def assert_equal(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {'skipped'}:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)
        assert one['skipped'] == other['skipped']


# ---- the order


@pytest.mark.parametrize('length', [1, 2, 3, 8, 101, 1000])
def test_every_epoch_is_a_permutation_of_its_own(length):
    order = example_index(np.arange(5 * length), length, seed=3).reshape(5, length)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order, 1), np.tile(np.arange(length), (5, 1)))
    if length > 100:
        assert len({tuple(epoch) for epoch in order}) == 5
        other = example_index(np.arange(length), length, seed=4)
        assert (order[0] == other).mean() < 0.1
        assert (order[0] == np.arange(length)).mean() < 0.1


def test_the_batches_follow_the_order():
    config = config_of(seed=5, batch_size=3, data=PLAIN)
    got = batches(numbered_source(11), config, steps=9)
    positions = np.concatenate([batch['position'] for batch in got])
    labels = np.concatenate([batch['label'] for batch in got])
    images = np.concatenate([batch['image'] for batch in got])
    np.testing.assert_array_equal(positions, np.arange(27))
    want = example_index(positions, 11, seed=5)
    np.testing.assert_array_equal(labels, np.broadcast_to(want[:, None, None], (27, 17, 9)))
    np.testing.assert_array_equal(images[..., 1], labels)
    assert (images.dtype, labels.dtype, positions.dtype) == (np.uint8, np.uint8, np.int64)


# ---- pure function of (seed, position)


def test_one_process_sees_what_two_see_together():
    source, config = noise_source(), config_of()
    whole = batches(source, config, steps=6)
    halves = [batches(source, config, 6, process_index=h, process_count=2) for h in range(2)]
    assert halves[0][0]['image'].shape == (2, 17, 9, 3)
    assert_equal([joined(*parts) for parts in zip(*halves, strict=True)], whole)


@pytest.mark.parametrize('threads', [1, 3])
def test_starting_late_equals_skipping_bit_for_bit(threads):
    source = noise_source()
    whole = batches(source, config_of(), steps=9)
    late = config_of(data={'threads': threads})
    assert_equal(batches(source, late, steps=4, start_step=5), whole[5:])


def test_starting_at_a_step_far_ahead_reads_no_example_before_it():
    source, read = noise_source(), []
    counted = source._replace(read=lambda index: read.append(index) or source.read(index))
    got = batches(counted, config_of(), steps=1, start_step=149_000)
    assert got[0]['position'].tolist() == [4 * 149_000 + i for i in range(4)]
    assert len(read) < 100  # the batch and what is read ahead


def test_an_image_is_augmented_anew_in_every_epoch_and_for_every_seed():
    source = noise_source(1)
    same = [batches(source, config_of(seed=seed), steps=5) for seed in (0, 1, 0)]
    assert_equal(same[0], same[2])
    crops = {image.tobytes() for run in same[:2] for batch in run for image in batch['image']}
    assert len(crops) == 40


# ---- what goes wrong


@pytest.mark.parametrize(('batch_size', 'processes'), [(4, 3), (2, 4)])
def test_a_batch_that_does_not_divide_is_refused_at_once(batch_size, processes):
    config = config_of(batch_size=batch_size)
    place = {'start_step': 0, 'process_index': 0, 'process_count': processes}
    with pytest.raises(UserError, match=f'batch_size = {batch_size} .* {processes} processes'):
        train_batches(noise_source(), config, **place)


def spoilt(source, bad):
    def read(index):
        if index in bad:
            raise UserError(f'picture {index} cannot be decoded')
        return source.read(index)

    return source._replace(read=read)


def test_a_bad_example_is_skipped_deterministically_and_reported():
    """The next image of the source replaces it, with the random choices of the position."""
    source, bad = numbered_source(9), {3, 4, 8}
    config = config_of(batch_size=3, data={**PLAIN, 'on_error': 'skip'})
    got = batches(spoilt(source, bad), config, steps=6)
    order = example_index(np.arange(18), 9, seed=0).tolist()
    after = {3: 5, 4: 5, 8: 0}
    shown = [int(label[0, 0]) for batch in got for label in batch['label']]
    assert shown == [after.get(index, index) for index in order]
    skipped = [pair for batch in got for pair in batch['skipped']]
    assert [position for position, _ in skipped] == [p for p in range(18) if order[p] in bad]
    assert all(text == f'picture {order[p]} cannot be decoded' for p, text in skipped)
    # From any step and in any share the same.
    assert_equal(batches(spoilt(source, bad), config, steps=2, start_step=4), got[4:])
    halves = [
        batches(spoilt(source, bad), config_of(batch_size=6, data=dict(config.data)), 3, 0, h, 2)
        for h in (0, 1)
    ]
    both = [part for pair in zip(*halves, strict=True) for part in pair]
    assert_equal(both, got)


def test_skipping_gives_up_if_every_example_is_bad():
    config = config_of(data={**PLAIN, 'on_error': 'skip'})
    gives_up = r'picture . cannot be decoded \(nor can the next 7: data.on_error=skip gives up\)'
    with pytest.raises(UserError, match=gives_up):
        batches(spoilt(numbered_source(5), set(range(5))), config, steps=1)


@pytest.mark.parametrize('on_error', ['stop', 'skip'])
def test_an_example_on_a_disk_that_does_not_answer_is_not_skipped(on_error):
    def unanswered(index):
        raise PassingError(f'picture {index} did not come')

    config = config_of(data={**PLAIN, 'on_error': on_error})
    with pytest.raises(PassingError, match='picture . did not come'):
        batches(Source(5, str, unanswered), config, steps=1)


def test_a_process_ends_while_its_stream_is_open():
    code = """
import sys; sys.path[:0] = sys.argv[1:]
from test_pipeline import config_of, noise_source, train_batches
stream = train_batches(noise_source(), config_of(), start_step=0, process_index=0, process_count=1)
print(next(stream)['position'])
"""
    paths = [str(Path(__file__).parent), str(Path(psp_jax.__file__).parents[1])]
    env = {**os.environ, 'TF_CPP_MIN_LOG_LEVEL': '3'}
    command = [sys.executable, '-c', code, *paths]
    done = subprocess.run(command, timeout=300, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (0, '[0 1 2 3]\n'), done.stderr


def test_tensorflow_sees_no_accelerator():
    assert {device.device_type for device in tf.config.get_visible_devices()} == {'CPU'}


# ---- evaluation


def test_evaluation_reads_in_order_and_any_subset():
    source = noise_source(30)

    def slow_start(index):
        time.sleep(0.05 if index % 5 == 0 else 0.0)
        return index, *source.read(index)

    wanted = [*range(0, 30, 2), 5, 5, 29]
    got = list(read_ahead(slow_start, wanted, threads=4))
    assert [index for index, _, _ in got] == wanted
    for index, image, label in got:
        want_image, want_label = source.read(index)
        np.testing.assert_array_equal(image, want_image)
        np.testing.assert_array_equal(label, want_label)
    assert list(read_ahead(slow_start, [], threads=0)) == []


def test_evaluation_reads_ahead_in_parallel_but_not_without_bound():
    lock, begun, together = threading.Lock(), [], threading.Barrier(3)

    def read(index):
        with lock:
            begun.append(index)
        if index < 3:
            together.wait(timeout=30)  # passes only if three read at the same time
        return index

    stream = read_ahead(read, range(1000), threads=3)
    assert next(stream) == 0
    time.sleep(0.3)
    assert len(begun) <= 7  # two a thread, and the one that was asked for
    stream.close()
    assert len(begun) <= 7
