"""Devices and how arrays are placed on them: the same code for one CPU and for a pod.

The mesh has two axes. 'data' divides the batch. 'space' divides each image in height among
neighbouring devices. These exchange the few rows beside their cuts; the compiler adds this.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from psp_jax.data.labels import IGNORE
from psp_jax.errors import UserError
from psp_jax.model.geometry import STRIDE, Size, cells
from psp_jax.model.layers import reach_of


def make_mesh(
    data: int, batch_size: int, space: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A ('data', 'space') mesh of `data` x `space` of `devices`, by default all of this run's.

    data=-1 takes them all. Devices beside each other on 'space' are of one process, so that every
    process reads whole images. Raises UserError if there are too few devices or `space` does not
    divide them, or if the global batch does not divide over 'data'.
    """
    # Sorted by process, because the devices of a TPU host do not always have consecutive numbers.
    devices = sorted(
        jax.devices() if devices is None else devices, key=lambda device: device.process_index
    )
    each = Counter(device.process_index for device in devices)
    for process, own in each.items():
        if own % space:
            raise UserError(
                f'mesh.space={space}: process {process} has {own} device(s), which do not divide '
                f'by {space}; every process reads whole images'
            )
    available = len(devices) // space
    data = available if data == -1 else data
    if data > available or (len(each) > 1 and data != available):
        beside = f' with mesh.space={space}' if space > 1 else ''
        raise UserError(
            f'mesh.data={data}{beside}: this run has {len(devices)} devices; -1 takes them all'
        )
    if batch_size % data:
        raise UserError(
            f'batch_size={batch_size} does not divide over mesh.data={data}: '
            f'set batch_size={-(-batch_size // data) * data}, or mesh.data'
        )
    return _mesh(devices[: data * space], space)


def local_mesh(data: int, space: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The `devices` of a process as a ('data', 'space') mesh for evaluation, of whole images.

    By default this process's own. At most data * space of them, all on 'data'; data=-1 = all.
    """
    devices = jax.local_devices() if devices is None else devices
    return _mesh(devices[: data * space if data > 0 else None], 1)


def _mesh(devices: Sequence[jax.Device], space: int) -> Mesh:
    return Mesh(
        np.array(devices).reshape(-1, space), ('data', 'space'), axis_types=(AxisType.Auto,) * 2
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec('data'))


def split_images(mesh: Mesh) -> NamedSharding:
    """The sharding of 'image' and 'label' of a training batch, which are also split in height."""
    return NamedSharding(mesh, PartitionSpec('data', 'space'))


def rows_reached(model: nn.Module, variables: Any, size: Size) -> int:
    """The largest reach of the network's modules to one side, in rows of features.

    variables: arrays or shapes; size: of the images. Modules state their `reach` in rows of their
    own input (model/layers.py).
    """
    reached = 0

    def look(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal reached
        reach = reach_of(context.module) if context.method_name == '__call__' else 0
        if reach:
            reached = max(reached, math.ceil(reach * cells(size[0]) / args[0].shape[1]))
        return call(*args, **kwargs)

    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    with nn.intercept_methods(look):
        jax.eval_shape(lambda v, x: model.apply(v, x, False), variables, images)
    return reached


def check_cut(mesh: Mesh, model: nn.Module, variables: Any, size: Size) -> None:
    """Raises UserError if images of this (height, width) are too low for the mesh.

    Convolutions would reach beyond a device's neighbours: all rows would have to be brought
    together, and XLA's partitioner gets some of the gradients wrong (seen on CPUs at height 9).
    """
    space = mesh.shape['space']
    if space == 1:
        return
    rows, reached = cells(size[0]), rows_reached(model, variables, size)
    if -(-rows // space) < reached:
        raise UserError(
            f'mesh.space={space}: images of height {size[0]} have {rows} rows of features, and '
            f'each device needs {reached}: take mesh.space={max(rows // reached, 1)}'
        )


def padded_height(height: int, mesh: Mesh) -> int:
    """Rows of 'image' and 'label' on the mesh: a whole number of cells for each device."""
    space = mesh.shape['space']
    rows = STRIDE * space if space > 1 else 1
    return -(-height // rows) * rows


def put_batch(tree: Any, mesh: Mesh) -> Any:
    """Each process's rows of a tree of arrays [B, ...] as global arrays, split over 'data'."""
    sharding = split_batch(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def put_images(image: np.ndarray, label: np.ndarray, mesh: Mesh) -> dict[str, jax.Array]:
    """A training batch {'image', 'label'} from each process's rows, split over 'data' and 'space'.

    image uint8 [B, H, W, 3], label uint8 [B, H, W]. Both get rows below up to `padded_height`, of
    zeros and of 255; `cut_images` removes those of the images.
    """
    below = padded_height(label.shape[1], mesh) - label.shape[1]
    if below:
        image = np.pad(image, ((0, 0), (0, below), (0, 0), (0, 0)))
        label = np.pad(label, ((0, 0), (0, below), (0, 0)), constant_values=IGNORE)
    sharding = split_images(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, x)
        for name, x in (('image', image), ('label', label))
    }


def cut_images(batch: dict[str, jax.Array], height: int, mesh: Mesh) -> dict[str, jax.Array]:
    """For use within jit: a batch of `put_images` without the added rows of the images."""
    # The slice's rows may not divide over the devices: without the constraint the compiler might
    # gather them.
    sharding = split_images(mesh)
    images = jax.lax.with_sharding_constraint(batch['image'][:, :height], sharding)
    return {'image': images, 'label': batch['label']}


def on_devices(shapes: Any, mesh: Mesh) -> Any:
    """A tree of shapes as one of arrays-to-be, replicated over the mesh."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
