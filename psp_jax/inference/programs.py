"""Class probabilities of images of any size, by any protocol, from a few compiled programs.

Each device works on an image of its own. One program runs the network on windows of one shape; one
for each scale adds their scores on a canvas of fixed shape; one resizes the canvases to a tile of
the image's own pixels. What differs from image to image, true sizes and places, is data.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from psp_jax.data.labels import label_space
from psp_jax.inference.masks import apply_to_padded
from psp_jax.inference.protocols import (
    AVERAGES_PROBABILITIES,
    MIRRORS,
    SLIDING,
    Block,
    flips,
    needs_sizes,
)
from psp_jax.mesh import put_batch, split_batch
from psp_jax.model import pspnet
from psp_jax.model.geometry import STRIDE, Size
from psp_jax.model.resample import apply_taps, resize

TILE = (128, 1024)  # pixels of an image whose probabilities a device computes at a time
Variables = Any


class Tile(NamedTuple):
    """A tile of each block of a batch: its place there, and the taps that lead to it."""

    place: Size
    # (cells, weight), each [B, TILE, taps], for each view; from the canvases' rows and columns
    rows: tuple[tuple[jax.Array, jax.Array], ...]
    columns: tuple[tuple[jax.Array, jax.Array], ...]


class Programs(NamedTuple):
    """The compiled side of a protocol; see `make_programs`."""

    fields: Callable[[Variables, Sequence[Block]], tuple[jax.Array, ...]]
    on_tile: Callable[..., Any]
    mesh: Mesh
    release: Callable[[], None]  # frees what `fields` keeps on the devices
    batch: int  # blocks that `fields` takes at a time
    # The program with the network, and its arguments (behind the variables) as shapes: of an input
    # size, and of images that have so many windows. For those who compile it without running it.
    network: jax.stages.Wrapped
    arguments: Callable[[Size, int], tuple[jax.ShapeDtypeStruct, ...]]


def make_programs(config: ConfigDict, model: pspnet.PSPNet, mesh: Mesh) -> Programs:
    """The programs of `config.eval` on the devices of `mesh`.

    `fields(variables, blocks)` gives the scores of at most `batch` blocks of one kind: for each
    view [batch, canvas height, canvas width, classes]. They live until the next call.
    `on_tile(fn)` compiles fn(probabilities [rows, columns, classes], *arrays) -> tree as a program
    (fields, tile, *arrays [B, ...]) -> tree [B, ...] for `tiles`.
    """
    protocol, mirrored = config.eval.protocol, flips(config)
    devices = mesh.size
    classes = len(label_space(config.data.classes).names)
    slides = protocol in SLIDING
    per_device = -(-config.eval.batch_size // devices)  # windows, or whole images
    split, everywhere = PartitionSpec('data'), PartitionSpec()

    def sharded(fn: Callable[..., Any], *whole: bool, **keys: Any) -> jax.stages.Wrapped:
        """jit of `fn`, run by each device on its own rows; arguments marked whole are shared."""
        specs = tuple(everywhere if w else split for w in whole)
        return jax.jit(
            jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False), **keys
        )

    def network(variables: Variables, windows: jax.Array, sizes: jax.Array) -> jax.Array:
        images = pspnet.normalise(windows, config)
        if needs_sizes(config):
            return apply_to_padded(model, variables, images, sizes)
        return model.apply(variables, images, False)[0]

    def window_scores(variables: Variables, windows: jax.Array, sizes: jax.Array) -> jax.Array:
        """[1, K, h, w, 3] -> [1, K, h, w, classes]: probabilities, or logits in mmseg_slide."""
        windows, sizes = windows[0], sizes[0]
        shape = windows.shape[1], windows.shape[2]
        both = mirrored and protocol in MIRRORS
        if both:
            windows = jnp.concatenate([windows, windows[:, :, ::-1]])
        logits = network(variables, windows, jnp.concatenate([sizes, sizes]) if both else sizes)
        pairs = logits.reshape(2 if both else 1, -1, *logits.shape[1:]).swapaxes(0, 1)
        if both:
            pairs = pairs.at[:, 1].set(pairs[:, 1, :, ::-1])

        def one(args: tuple[jax.Array, jax.Array]) -> jax.Array:
            logits, size = args
            cells = {}
            if needs_sizes(config):
                size = jnp.broadcast_to(size, (len(logits), 2))
                cells = {'cells': size, 'old_cells': -(-size // STRIDE)}
            scores = resize(logits, shape, config.model.align_corners, **cells)
            if protocol == 'caffe':  # the softmax of the sum
                return jax.nn.softmax(scores.sum(0))
            return jax.nn.softmax(scores).mean(0) if protocol == 'semseg' else scores[0]

        return lax.map(one, (pairs, sizes))[None]

    def add(
        canvas: jax.Array, scores: jax.Array, slot: jax.Array, place: jax.Array, first: jax.Array
    ) -> jax.Array:
        """Adds the scores of window `slot` to a canvas [1, H, W, C], which `first` clears."""
        canvas = lax.cond(first, jnp.zeros_like, lambda x: x, canvas[0])
        window = scores[0, slot]
        start = (place[0, 0], place[0, 1], jnp.zeros((), place.dtype))
        old = lax.dynamic_slice(canvas, start, window.shape)
        return lax.dynamic_update_slice(canvas, old + window, start)[None]

    def windows_of_call(windows: int) -> int:
        """Few windows do not fill a call; powers of two, for few programs."""
        return min(per_device, 1 << (windows - 1).bit_length())

    def arguments(shape: Size, windows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        lead = (devices, windows_of_call(windows)) if slides else (per_device * devices,)
        images = (*lead, *shape, 3), jnp.float32 if slides else jnp.uint8
        sizes = (*lead, 2), jnp.int32
        place = split_batch(mesh)
        return tuple(jax.ShapeDtypeStruct(*made, sharding=place) for made in (images, sizes))

    whole_scores = sharded(network, True, False, False)
    sliding_scores = sharded(window_scores, True, False, False)
    add_window = sharded(add, False, False, True, False, True, donate_argnums=0)
    kept: dict[tuple[int, ...], jax.Array] = {}  # canvases, used again for the next image

    def whole_fields(variables: Variables, blocks: Sequence[Block]) -> tuple[jax.Array, ...]:
        fields = []
        for parts in zip(*(block.parts for block in blocks), strict=True):
            images = np.zeros((batch, *parts[0].shape, 3), parts[0].picture.dtype)
            sizes = np.full((batch, 2), 8, np.int32)
            for i, part in enumerate(parts):
                sizes[i] = height, width = part.window
                images[i, :height, :width] = part.picture
            fields.append(whole_scores(variables, *put_batch((images, sizes), mesh)))
        return tuple(fields)

    def sliding_fields(variables: Variables, blocks: Sequence[Block]) -> tuple[jax.Array, ...]:
        parts = blocks[0].parts
        slots = [(v, i) for v, part in enumerate(parts) for i in range(len(part.sources))]
        exact = jnp.promote_types(config.dtype, jnp.float32)
        canvases: list[jax.Array] = []
        for v, part in enumerate(parts):
            shape = (devices, *part.canvas, classes)
            found = kept.pop((v, *shape), None)
            canvases.append(put_batch(np.zeros(shape, exact), mesh) if found is None else found)
        kept.clear()
        count = windows_of_call(len(slots))
        for begin in range(0, len(slots), count):
            chunk = slots[begin : begin + count]
            windows = np.zeros((devices, count, *parts[0].shape, 3), np.float32)
            sizes = np.full((devices, count, 2), 8, np.int32)
            places = np.zeros((count, devices, 2), np.int32)
            for device, block in enumerate(blocks):
                for k, (v, i) in enumerate(chunk):
                    part = block.parts[v]
                    (y, x), (height, width) = part.sources[i], part.window
                    windows[device, k, :height, :width] = part.picture[
                        y : y + height, x : x + width
                    ]
                    sizes[device, k] = part.window
                    places[k, device] = part.targets[i]
            scores = sliding_scores(variables, *put_batch((windows, sizes), mesh))
            for k, (v, i) in enumerate(chunk):
                canvases[v] = add_window(
                    canvases[v], scores, np.int32(k), put_batch(places[k], mesh), np.bool_(i == 0)
                )
        kept.update({(v, *canvas.shape): canvas for v, canvas in enumerate(canvases)})
        return tuple(canvases)

    def probabilities(fields: Any, rows: Any, columns: Any) -> jax.Array:
        """One block's: for each view [h, w, C] -> [*TILE, C], the mean over views."""
        total = jnp.zeros(())
        for view in zip(fields, rows, columns, strict=True):
            resized = apply_taps(*view)
            averaged = protocol in AVERAGES_PROBABILITIES
            total += resized if averaged else jax.nn.softmax(resized)
        return total / len(fields)

    def on_tile(fn: Callable[..., Any]) -> Callable[..., Any]:
        def on_device(fields, tile, arrays):
            def one(args):
                fields, rows, columns, arrays = args
                return fn(probabilities(fields, rows, columns), *arrays)

            return lax.map(one, (fields, *tile, arrays))

        run = sharded(on_device, False, False, False)
        return lambda fields, tile, *arrays: run(fields, (tile.rows, tile.columns), arrays)

    batch = devices if slides else per_device * devices
    fields = sliding_fields if slides else whole_fields
    scores = sliding_scores if slides else whole_scores
    return Programs(fields, on_tile, mesh, kept.clear, batch, scores, arguments)


def tiles(blocks: Sequence[Block], programs: Programs) -> Iterator[Tile]:
    """The tiles that cover the blocks of a batch, with their taps on the devices."""
    largest = np.max([block.size for block in blocks], 0)
    exact = jnp.result_type(float)  # float64 where that is enabled

    def taps(axis: int, start: int) -> tuple[tuple[jax.Array, jax.Array], ...]:
        stacked = []
        for parts in zip(*(block.parts for block in blocks), strict=True):
            own = [(part.rows, part.columns)[axis] for part in parts]
            # Powers of two, since the number of taps is a shape.
            count = 1 << (max(t.cells.shape[1] for t in own) - 1).bit_length()
            cells = np.zeros((programs.batch, TILE[axis], count), np.int32)
            weight = np.zeros((programs.batch, TILE[axis], count), exact)
            for array, values in (
                (cells, [t.cells for t in own]),
                (weight, [t.weight for t in own]),
            ):
                for i, value in enumerate(values):
                    cut = value[start : start + TILE[axis]]
                    array[i, : len(cut), : cut.shape[1]] = cut
            stacked.append(put_batch((cells, weight), programs.mesh))
        return tuple(stacked)

    for left in range(0, largest[1], TILE[1]):
        columns = taps(1, left)
        for top in range(0, largest[0], TILE[0]):
            yield Tile((top, left), taps(0, top), columns)


def overlap(block: Block, place: Size) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a tile at `place` of a block shares pixels with the image: in the tile, in the image.

    Both are empty where the tile lies beyond the block.
    """
    inside, outside = [], []
    for axis in (0, 1):
        length = max(min(block.size[axis] - place[axis], TILE[axis]), 0)
        start = block.place[axis] + place[axis]
        inside.append(slice(0, length))
        outside.append(slice(start, start + length))
    return (inside[0], inside[1]), (outside[0], outside[1])


class Example(NamedTuple):
    """One block of an image, with what is needed of the image itself."""

    number: int  # of the image in its source
    image: np.ndarray  # uint8 [H, W, 3], as it was read
    label: Any  # uint8 [H, W]; None where nothing is scored
    block: Block
    blocks: int  # that the image has


def make_batches(examples: Iterable[list[Example]], size: int) -> Iterator[list[Example]]:
    """Groups blocks of one kind, at most `size` at a time, each exactly once.

    At most 4 * `size` wait for others of their kind.
    """
    waiting: dict[Any, list[Example]] = {}
    for example in chain.from_iterable(examples):
        if sum(map(len, waiting.values())) >= 4 * size:
            yield waiting.pop(max(waiting, key=lambda kind: len(waiting[kind])))
        kind = example.block.kind
        group = waiting.setdefault(kind, [])
        group.append(example)
        if len(group) == size:
            yield waiting.pop(kind)
    yield from waiting.values()
