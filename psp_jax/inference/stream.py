"""What evaluation and prediction share: blocks -> batches -> canvases -> tiles -> results.

The devices get the next batch before the results of the last one are read, so that they never
wait for the host.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from psp_jax.data.labels import IGNORE
from psp_jax.inference.blocks import Block, blocks
from psp_jax.inference.programs import Programs, TapsOnDevice, Variables, tile_program
from psp_jax.inference.protocols import protocol_of
from psp_jax.mesh import put_batch
from psp_jax.model.geometry import Size

TILE = (128, 1024)  # pixels of an image whose probabilities a device computes at a time
Pixels = tuple[slice, slice]  # a rectangle of rows and columns


@dataclass
class Job:
    """An image on its way through the programs. Subclasses collect its results."""

    image: np.ndarray  # uint8 [H, W, 3]
    label: np.ndarray | None  # uint8 [H, W]; None if the programs do not need it
    blocks_left: int = field(default=0, init=False)  # whose results are still to come

    def add(self, pixels: Pixels, within: Pixels, result: Any) -> None:
        """Takes the result of a tile; pixels: its place in the image.

        within: the part of the tile with those pixels; the rest of the tile is meaningless.
        """
        raise NotImplementedError


J = TypeVar('J', bound=Job)


class Example(NamedTuple, Generic[J]):
    """A block of an image."""

    job: J
    block: Block


class Tile(NamedTuple):
    """A tile of each block of a batch: its place there, and the taps that resize canvases to it.

    Taps are (cells, weight), each [B, pixels of TILE, taps], for each view.
    """

    place: Size
    rows: tuple[TapsOnDevice, ...]
    columns: tuple[TapsOnDevice, ...]
    last: bool  # of the batch


@dataclass(frozen=True)
class Stream:
    """Runs images through the programs of one or more protocols.

    on_tile: a pure function (probabilities [rows, columns, classes] of a tile) -> tree, or of
    (probabilities, labels uint8 [rows, columns]) if the jobs have labels.
    """

    programs: Mapping[str, Programs]  # by the protocol's name
    on_tile: Callable[..., Any]
    unread: int = 2**20  # tiles of a batch whose results may wait on the devices

    @cached_property
    def tile_programs(self) -> dict[str, jax.stages.Wrapped]:
        return {
            name: tile_program(self.on_tile, protocol_of(made.run.config), made.mesh)
            for name, made in self.programs.items()
        }

    def blocks(self, job: J, protocol: str) -> list[Example[J]]:
        """The blocks of an image; may run in a thread of its own."""
        found = blocks(job.image, self.programs[protocol].run.config)
        job.blocks_left = len(found)
        return [Example(job, block) for block in found]

    def run(self, variables: Variables, examples: Iterable[list[Example[J]]]) -> Iterator[J]:
        """Yields each image's job once all its results are in, in an order that depends on sizes.

        variables: on the devices of the programs' mesh (`on_local_devices`).
        """
        waiting: deque[tuple[list[Example[J]], Tile, Any]] = deque()
        size = min(made.batch for made in self.programs.values())
        for batch in make_batches(examples, size):
            earlier = len(waiting)  # tiles of the last batch
            for tile, results in self._dispatch(variables, batch):
                waiting.append((batch, tile, results))
                if len(waiting) > self.unread:
                    yield from collect(*waiting.popleft())
                    earlier -= 1
            for _ in range(earlier):
                yield from collect(*waiting.popleft())
        while waiting:
            yield from collect(*waiting.popleft())
        for made in self.programs.values():
            made.release()

    def _dispatch(
        self, variables: Variables, batch: list[Example[J]]
    ) -> Iterator[tuple[Tile, Any]]:
        """Starts the programs of a batch; yields each tile with its results, not yet ready."""
        blocks = [example.block for example in batch]
        protocol = blocks[0].protocol
        programs, program = self.programs[protocol], self.tile_programs[protocol]
        canvases = programs.canvases(variables, blocks)
        for tile in tiles(blocks, programs):
            labels = put_batch(labels_of_tile(batch, tile.place, programs.batch), programs.mesh)
            yield tile, program(canvases, tile.rows, tile.columns, labels)


def make_batches(examples: Iterable[list[Example[J]]], size: int) -> Iterator[list[Example[J]]]:
    """Groups blocks of one kind, at most `size` at a time, each exactly once.

    At most 4 * `size` wait for others of their kind.
    """
    waiting: dict[Any, list[Example[J]]] = {}
    for example in chain.from_iterable(examples):
        if sum(map(len, waiting.values())) >= 4 * size:
            yield waiting.pop(max(waiting, key=lambda kind: len(waiting[kind])))
        kind = example.block.kind
        group = waiting.setdefault(kind, [])
        group.append(example)
        if len(group) == size:
            yield waiting.pop(kind)
    yield from waiting.values()


def collect(batch: list[Example[J]], tile: Tile, results: Any) -> Iterator[J]:
    """Waits for the results of a tile, adds them to their images, and yields the finished ones.

    results: a tree of arrays [B, ...].
    """
    results = jax.device_get(results)
    for row, (job, block) in enumerate(batch):
        within, pixels = overlap(block, tile.place)
        job.add(pixels, within, jax.tree.map(lambda x, row=row: x[row], results))
        if tile.last:
            job.blocks_left -= 1
            if not job.blocks_left:
                yield job


# ---- Tiles


def tiles(blocks: Sequence[Block], programs: Programs) -> Iterator[Tile]:
    """The tiles that cover the blocks of a batch, with their taps on the devices."""
    height, width = np.max([block.size for block in blocks], 0).tolist()
    tops, lefts = range(0, height, TILE[0]), range(0, width, TILE[1])
    for left in lefts:
        columns = taps_of_tile(blocks, left, 1, programs)
        for top in tops:
            rows = taps_of_tile(blocks, top, 0, programs)
            last = (top, left) == (tops[-1], lefts[-1])
            yield Tile((top, left), rows, columns, last)


def taps_of_tile(
    blocks: Sequence[Block], start: int, axis: int, programs: Programs
) -> tuple[TapsOnDevice, ...]:
    """For each view the taps of a tile's rows (axis 0) or columns (1), from pixel `start` on."""
    length = TILE[axis]
    stacked = []
    for parts in zip(*(block.parts for block in blocks), strict=True):
        view = [(part.view.rows, part.view.columns)[axis].taps for part in parts]
        # Powers of two, since the number of taps is a shape.
        count = 1 << (max(own.cells.shape[1] for own in view) - 1).bit_length()
        cells = np.zeros((programs.batch, length, count), np.int32)
        weight = np.zeros((programs.batch, length, count), jnp.result_type(float))
        for row, own in enumerate(view):
            found, share = (x[start : start + length] for x in own)
            cells[row, : len(found), : found.shape[1]] = found
            weight[row, : len(share), : share.shape[1]] = share
        stacked.append(put_batch((cells, weight), programs.mesh))
    return tuple(stacked)


def labels_of_tile(batch: Sequence[Example[J]], place: Size, rows: int) -> tuple[np.ndarray, ...]:
    """The labels uint8 [rows, *TILE] of a tile of each block, 255 outside the image.

    () if the images have no labels.
    """
    labels = np.full((rows, *TILE), IGNORE, np.uint8)
    for row, (job, block) in enumerate(batch):
        if job.label is None:
            return ()
        within, pixels = overlap(block, place)
        labels[row][within] = job.label[pixels]
    return (labels,)


def overlap(block: Block, place: Size) -> tuple[Pixels, Pixels]:
    """The pixels that a tile at `place` of a block shares with the image: (in tile, in image).

    Both are empty if the tile is outside the block.
    """
    within, pixels = [], []
    for axis in (0, 1):
        length = max(min(block.size[axis] - place[axis], TILE[axis]), 0)
        start = block.place[axis] + place[axis]
        within.append(slice(0, length))
        pixels.append(slice(start, start + length))
    return (within[0], within[1]), (pixels[0], pixels[1])
