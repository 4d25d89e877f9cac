"""The compiled programs that turn blocks of images into class probabilities.

Each device works on its own images. `network` runs the network on inputs of one shape. If
windows slide, `add_window` adds their scores on canvases of fixed shape. `tile_program` resizes
canvases to a tile of the image's own pixels. Sizes and places differ from image to image: they are
data, so that few programs serve all images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from psp_jax.data.labels import label_space
from psp_jax.inference.blocks import Block
from psp_jax.inference.masks import apply_to_padded
from psp_jax.inference.protocols import Protocol, flips, needs_sizes, protocol_of
from psp_jax.mesh import put_batch, replicated, split_batch
from psp_jax.model.geometry import STRIDE, Size
from psp_jax.model.pspnet import normalise
from psp_jax.model.resample import apply_taps, resize
from psp_jax.state import Setup

Variables = Any
Canvases = tuple[jax.Array, ...]  # for each view: scores [blocks, height, width, classes]
TapsOnDevice = tuple[jax.Array, jax.Array]  # cells int32 and weight, both [..., points, taps]


# ---- Pure functions, each of one device


def logits_of(
    variables: Variables, images: jax.Array, sizes: jax.Array, *, run: Setup
) -> jax.Array:
    """Logits [B, ceil(H/8), ceil(W/8), classes] of images [B, H, W, 3] of 0..255.

    sizes: int32 [B, 2], the true size of each; used if the protocol pads the network's input.
    """
    images = normalise(images, run.config)
    if needs_sizes(run.config):
        return apply_to_padded(run.model, variables, images, sizes)
    return run.model.apply(variables, images, False)[0]


def window_scores(
    variables: Variables, windows: jax.Array, sizes: jax.Array, *, run: Setup
) -> jax.Array:
    """The protocol's scores [1, K, H, W, classes] of windows [1, K, H, W, 3] of 0..255.

    sizes: int32 [1, K, 2], the true size of each.
    """
    windows, sizes = windows[0], sizes[0]
    shape = windows.shape[1], windows.shape[2]
    mirrored = flips(run.config) and protocol_of(run.config).mirrors_windows
    if mirrored:
        windows = jnp.concatenate([windows, windows[:, :, ::-1]])
    all_sizes = jnp.concatenate([sizes, sizes]) if mirrored else sizes
    logits = logits_of(variables, windows, all_sizes, run=run)
    pairs = logits.reshape(2 if mirrored else 1, -1, *logits.shape[1:]).swapaxes(0, 1)
    if mirrored:
        pairs = pairs.at[:, 1].set(pairs[:, 1, :, ::-1])
    # One window at a time: all logits at full resolution would take much memory.
    scores = lax.map(lambda window: scores_of_window(*window, shape=shape, run=run), (pairs, sizes))
    return scores[None]


def scores_of_window(logits: jax.Array, size: jax.Array, *, shape: Size, run: Setup) -> jax.Array:
    """The protocol's scores [*shape, classes] of a window.

    logits: [1 or 2, H/8, W/8, classes], of the window and its mirror image; size: int32 [2].
    """
    cells = {}
    if needs_sizes(run.config):
        size = jnp.broadcast_to(size, (len(logits), 2))
        cells = {'cells': size, 'old_cells': -(-size // STRIDE)}
    resized = resize(logits, shape, run.config.model.align_corners, **cells)
    return protocol_of(run.config).window_scores(resized)


def add_window(
    canvas: jax.Array, scores: jax.Array, slot: jax.Array, place: jax.Array, first: jax.Array
) -> jax.Array:
    """Adds the scores [1, K, h, w, C] of window `slot` to a canvas [1, H, W, C].

    place: int32 [1, 2], the window's top left cell; first: bool, whether to clear the canvas first.
    """
    canvas = lax.cond(first, jnp.zeros_like, lambda x: x, canvas[0])
    window = scores[0, slot]
    start = (place[0, 0], place[0, 1], jnp.zeros((), place.dtype))
    old = lax.dynamic_slice(canvas, start, window.shape)
    return lax.dynamic_update_slice(canvas, old + window, start)[None]


def probabilities_of(
    canvases: Canvases,
    rows: tuple[TapsOnDevice, ...],
    columns: tuple[TapsOnDevice, ...],
    protocol: Protocol,
) -> jax.Array:
    """The mean over views of one block's probabilities in a tile: [rows, columns, classes].

    For each view: a canvas [h, w, classes], and the taps that resize it to the tile.
    """
    total = jnp.zeros(())
    for view in zip(canvases, rows, columns, strict=True):
        resized = apply_taps(*view)
        total += resized if protocol.averages_probabilities else jax.nn.softmax(resized)
    return total / len(canvases)


def results_of_tile(
    canvases: Canvases, rows: Any, columns: Any, arrays: Any, *, on_tile: Any, protocol: Protocol
) -> Any:
    """on_tile(probabilities, *arrays) of a tile of each block, one block at a time."""

    def one(block: Any) -> Any:
        canvases, rows, columns, arrays = block
        return on_tile(probabilities_of(canvases, rows, columns, protocol), *arrays)

    return lax.map(one, (canvases, rows, columns, arrays))


# ---- Compiled for the devices of a mesh


def by_device(
    function: Callable[..., Any], mesh: Mesh, shared: Sequence[bool], **options: Any
) -> jax.stages.Wrapped:
    """jit of `function`; each device runs it on its own rows of the arguments.

    shared: for each argument, whether every device gets it whole.
    """
    split, everywhere = PartitionSpec('data'), PartitionSpec()
    specs = tuple(everywhere if whole else split for whole in shared)
    each = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    return jax.jit(each, **options)


def tile_program(on_tile: Callable[..., Any], protocol: Protocol, mesh: Mesh) -> jax.stages.Wrapped:
    """The program (canvases, rows, columns, arrays) -> tree [blocks, ...] of a batch's tile.

    on_tile: (probabilities [rows, columns, classes], *arrays of the block) -> tree.
    """
    one = partial(results_of_tile, on_tile=on_tile, protocol=protocol)
    return by_device(one, mesh, (False,) * 4)


def on_local_devices(tree: Any, mesh: Mesh) -> Any:
    """A tree of arrays on each device of a process's own mesh; no copy if it is there already."""

    def place(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        there = {shard.device: shard.data for shard in x.addressable_shards}
        each = [
            there[device] if device in there else jax.device_put(x.addressable_data(0), device)
            for device in mesh.devices.flat
        ]
        return jax.make_array_from_single_device_arrays(x.shape, replicated(mesh), each)

    return jax.tree.map(place, tree)


@dataclass(frozen=True)
class WholeImages:
    """The programs of a protocol that shows the network images in one piece.

    Canvases hold the network's own logits.
    """

    run: Setup
    mesh: Mesh

    @property
    def batch(self) -> int:
        """Blocks that `canvases` takes at a time: eval.batch_size, rounded up to the devices."""
        return -(-self.run.config.eval.batch_size // self.mesh.size) * self.mesh.size

    @cached_property
    def network(self) -> jax.stages.Wrapped:
        """(variables, images, sizes) -> logits."""
        return by_device(partial(logits_of, run=self.run), self.mesh, (True, False, False))

    def input_shapes(self, size: Size, windows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The images and sizes that `network` gets for inputs of a size."""
        return images_and_sizes((self.batch,), size, jnp.uint8, self.mesh)

    def canvases(self, variables: Variables, blocks: Sequence[Block]) -> Canvases:
        """The scores of at most `batch` blocks of one kind."""
        found = []
        for parts in zip(*(block.parts for block in blocks), strict=True):
            images = np.zeros((self.batch, *parts[0].view.input, 3), parts[0].image.dtype)
            sizes = np.full((self.batch, 2), STRIDE, np.int32)
            for i, (image, view) in enumerate(parts):
                sizes[i] = height, width = view.window
                images[i, :height, :width] = image
            found.append(self.network(variables, *put_batch((images, sizes), self.mesh)))
        return tuple(found)

    def release(self) -> None:
        """Does nothing: no canvas is kept."""


@dataclass(frozen=True)
class SlidingWindows:
    """The programs of a protocol whose windows slide over an image; a device has one image."""

    run: Setup
    mesh: Mesh
    # The canvases of the last call, by (number of the view, height, width).
    kept: dict[tuple[int, ...], jax.Array] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Blocks that `canvases` takes at a time: one a device."""
        return self.mesh.size

    @cached_property
    def network(self) -> jax.stages.Wrapped:
        """(variables, windows, sizes) -> scores of the windows."""
        return by_device(partial(window_scores, run=self.run), self.mesh, (True, False, False))

    @cached_property
    def add_window(self) -> jax.stages.Wrapped:
        shared = (False, False, True, False, True)
        return by_device(add_window, self.mesh, shared, donate_argnums=0)

    def windows_per_call(self, windows: int) -> int:
        """How many windows `network` takes from a block at a time; the block has `windows`.

        A power of two if the block has few windows, so that there are few programs.
        """
        most = -(-self.run.config.eval.batch_size // self.mesh.size)
        return min(most, 1 << (windows - 1).bit_length())

    def input_shapes(self, size: Size, windows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The windows and sizes that `network` gets for inputs of a size, `windows` a block."""
        lead = self.mesh.size, self.windows_per_call(windows)
        return images_and_sizes(lead, size, jnp.float32, self.mesh)

    def canvases(self, variables: Variables, blocks: Sequence[Block]) -> Canvases:
        """The scores of at most `batch` blocks of one kind. The next call overwrites them."""
        views = [part.view for part in blocks[0].parts]
        canvases = []
        for v, view in enumerate(views):
            old = self.kept.pop((v, *view.canvas), None)
            canvases.append(self._new_canvas(view.canvas) if old is None else old)
        self.kept.clear()
        slots = [(v, i) for v, view in enumerate(views) for i in range(len(view.sources))]
        count = self.windows_per_call(len(slots))
        for begin in range(0, len(slots), count):
            chunk = slots[begin : begin + count]
            windows, sizes, places = cut_windows(blocks, chunk, count, self.mesh.size)
            scores = self.network(variables, *put_batch((windows, sizes), self.mesh))
            for k, (v, i) in enumerate(chunk):
                place, first = put_batch(places[k], self.mesh), np.bool_(i == 0)
                canvases[v] = self.add_window(canvases[v], scores, np.int32(k), place, first)
        self.kept.update({(v, *view.canvas): canvases[v] for v, view in enumerate(views)})
        return tuple(canvases)

    def release(self) -> None:
        """Frees the canvases of the last call."""
        self.kept.clear()

    def _new_canvas(self, size: Size) -> jax.Array:
        config = self.run.config
        classes = len(label_space(config.data.classes).names)
        dtype = jnp.promote_types(config.dtype, jnp.float32)
        return put_batch(np.zeros((self.mesh.size, *size, classes), dtype), self.mesh)


Programs = WholeImages | SlidingWindows


def make_programs(run: Setup, mesh: Mesh) -> Programs:
    """The programs of run.config.eval.protocol on the devices of a process's own mesh."""
    return (SlidingWindows if protocol_of(run.config).slides else WholeImages)(run, mesh)


def cut_windows(
    blocks: Sequence[Block], chunk: Sequence[tuple[int, int]], count: int, devices: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows of at most `devices` blocks of one kind; each device gets one block.

    chunk: at most `count` pairs (view, number of a window in it).
    Returns windows float32 [devices, count, H, W, 3], sizes int32 [devices, count, 2] and places
    on the canvas int32 [count, devices, 2].
    """
    windows = np.zeros((devices, count, *blocks[0].parts[0].view.input, 3), np.float32)
    sizes = np.full((devices, count, 2), STRIDE, np.int32)
    places = np.zeros((count, devices, 2), np.int32)
    for device, block in enumerate(blocks):
        for k, (v, i) in enumerate(chunk):
            image, view = block.parts[v]
            (y, x), (height, width) = view.sources[i], view.window
            windows[device, k, :height, :width] = image[y : y + height, x : x + width]
            sizes[device, k] = view.window
            places[k, device] = view.targets[i]
    return windows, sizes, places


def images_and_sizes(
    lead: tuple[int, ...], size: Size, dtype: Any, mesh: Mesh
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Images [*lead, *size, 3] and their sizes int32 [*lead, 2], split over the devices."""
    sharding = split_batch(mesh)
    return (
        jax.ShapeDtypeStruct((*lead, *size, 3), dtype, sharding=sharding),
        jax.ShapeDtypeStruct((*lead, 2), jnp.int32, sharding=sharding),
    )
