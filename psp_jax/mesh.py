"""Devices and how arrays lie on them: one path from one CPU to a pod.

The mesh has two axes. 'data' divides the batch. 'space' divides each image in height among
neighbouring devices, which exchange the few rows beside their cuts; the compiler writes that.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from psp_jax.data.labels import IGNORE
from psp_jax.errors import UserError
from psp_jax.model.geometry import STRIDE

CUT_IN_HEIGHT = ('image', 'label')  # arrays [B, H, W, ...] of a training batch
_REACH = 4  # rows that layer4's dilated convolution looks to each side: the most of the network


def make_mesh(
    data: int, batch_size: int, space: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A ('data', 'space') mesh of `data` x `space` of `devices`, by default all of this run's.

    data=-1 takes them all. Devices beside each other on 'space' are of one process, so that every
    process reads whole images. Raises UserError where the devices do not suffice or do not divide,
    or where the global batch does not divide over 'data'.
    """
    # By process: those of a TPU host are not always numbered one after the other.
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
    """How 'image' and 'label' of a training batch lie: as the rest where 'space' has one device."""
    axes = ('data', 'space') if is_cut(mesh) else ('data',)
    return NamedSharding(mesh, PartitionSpec(*axes))


def is_cut(mesh: Mesh) -> bool:
    """Whether images are split in height."""
    return mesh.shape['space'] > 1


def check_cut(height: int, mesh: Mesh) -> None:
    """Raises UserError where images of this height are too low for the mesh.

    Convolutions would reach beyond the neighbours of a device: all rows would have to be brought
    together, and XLA's partitioner gets some of the gradients wrong (seen on CPUs at height 9).
    """
    rows, space = -(-height // STRIDE), mesh.shape['space']
    if is_cut(mesh) and -(-rows // space) < _REACH:
        raise UserError(
            f'mesh.space={space}: images of height {height} have {rows} rows of features, and each '
            f'device needs {_REACH}: take mesh.space={max(rows // _REACH, 1)}'
        )


def padded_height(height: int, mesh: Mesh) -> int:
    """Rows of 'image' and 'label' on the mesh: whole rows of features for each device."""
    rows = STRIDE * mesh.shape['space'] if is_cut(mesh) else 1
    return -(-height // rows) * rows


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Each process's rows of a batch as global arrays, split over 'data'.

    Where 'space' has several devices the batch is a dict, whose 'image' and 'label' [B, H, ...] are
    split in height besides, with rows of zeros below up to `padded_height`: `cut_images` takes them
    off.
    """
    if not is_cut(mesh):
        sharding = split_batch(mesh)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
    placed = {}
    for name, x in batch.items():
        sharding = split_batch(mesh)
        if name in CUT_IN_HEIGHT:
            sharding = split_images(mesh)
            below = padded_height(x.shape[1], mesh) - x.shape[1]
            x = np.pad(x, ((0, 0), (0, below), *((0, 0),) * (x.ndim - 2)))
        placed[name] = jax.make_array_from_process_local_data(sharding, x)
    return placed


def cut_images(batch: dict[str, jax.Array], height: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Within jit: images [B, height, W, 3], split in height still, and labels [B, padded, W].

    What lies below `height` has no part in either: the labels there are 255, whatever they were.
    """
    # The slice's rows do not divide over the devices: without the constraint they might lie anyhow.
    images = jax.lax.with_sharding_constraint(batch['image'][:, :height], split_images(mesh))
    inside = jnp.arange(batch['label'].shape[1]) < height
    return images, jnp.where(inside[:, None], batch['label'], jnp.uint8(IGNORE))


def on_devices(shapes: Any, mesh: Mesh) -> Any:
    """A tree of shapes as one of arrays-to-be, replicated over the mesh."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
