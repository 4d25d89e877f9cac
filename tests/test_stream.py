"""Batches and tiles hold every pixel once."""

import numpy as np
import pytest
from plain_loops import config_of

from psp_jax.inference import stream
from psp_jax.inference.blocks import Block, blocks
from psp_jax.inference.stream import TILE, Example, Job, make_batches, overlap


def examples_of(sizes, config):
    """The blocks of images of these sizes."""
    for size in sizes:
        job = Job(np.zeros((*size, 3), np.uint8), None)
        yield [Example(job, block) for block in blocks(job.image, config)]


@pytest.mark.parametrize('protocol', ['whole', 'semseg'])
def test_batches_hold_every_example_once(protocol):
    config = config_of(protocol, **{'eval.multiple': 48})
    rng = np.random.default_rng(0)
    sizes = [tuple(rng.integers(20, 90, 2).tolist()) for _ in range(40)]
    batches = list(make_batches(examples_of(sizes, config), 3))
    assert sorted(e.job.image.shape[:2] for batch in batches for e in batch) == sorted(sizes)
    for batch in batches:
        assert 1 <= len(batch) <= 3
        assert len({example.block.kind for example in batch}) == 1


@pytest.mark.parametrize('protocol', ['whole', 'mmseg'])
def test_hundreds_of_image_sizes_compile_few_networks(protocol):
    multiple = 64 if protocol == 'whole' else 256
    config = config_of(protocol, **{'eval.base_size': 512, 'eval.multiple': multiple})
    rng = np.random.default_rng(0)
    sizes = [tuple(rng.integers(200, 1200, 2)) for _ in range(300)]
    kinds = {e.block.kind for examples in examples_of(sizes, config) for e in examples}
    assert len(kinds) <= 15


def test_tiles_cover_each_block_of_a_batch_once(monkeypatch):
    monkeypatch.setattr(stream, 'taps_of_tile', lambda *_: ())
    height, width = TILE[0] * 2 + 5, TILE[1] + 7
    batch = [
        Block('whole', (0, 0), (height, 50), ()),
        Block('whole', (0, 50), (30, width), ()),
    ]
    seen = np.zeros((height, 50 + width), int)
    tiles = list(stream.tiles(batch, None))
    for tile in tiles:
        for block in batch:
            within, pixels = overlap(block, tile.place)
            assert seen[pixels].shape == np.zeros(TILE)[within].shape
            seen[pixels] += 1
    assert (seen[:, :50] == 1).all() and (seen[:30, 50:] == 1).all() and seen.max() == 1
    assert [tile.last for tile in tiles] == [False] * 5 + [True]
