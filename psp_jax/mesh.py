"""Devices and how arrays lie on them: one path from one CPU to a pod."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from psp_jax.errors import UserError


def make_mesh(data: int, batch_size: int) -> Mesh:
    """A ('data', 'space') mesh of `data` x 1 devices; -1 takes them all.

    Raises UserError where there are not as many devices or the global batch does not divide.
    """
    available = jax.device_count()
    data = available if data == -1 else data
    if data > available or (jax.process_count() > 1 and data != available):
        raise UserError(f'mesh.data={data}: this run has {available} devices; -1 takes them all')
    if batch_size % data:
        raise UserError(
            f'batch_size={batch_size} does not divide over {data} devices: '
            f'set batch_size={-(-batch_size // data) * data}, or mesh.data'
        )
    devices = np.array(jax.devices()[:data]).reshape(data, 1)
    return Mesh(devices, ('data', 'space'), axis_types=(AxisType.Auto,) * 2)


def local_mesh(data: int) -> Mesh:
    """This process's own devices as a ('data', 'space') mesh, at most `data` of them; -1 = all."""
    devices = np.array(jax.local_devices()[: data if data > 0 else None]).reshape(-1, 1)
    return Mesh(devices, ('data', 'space'), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec('data'))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Each process's rows of a batch as global arrays, split over 'data'."""
    sharding = split_batch(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def on_devices(shapes: Any, mesh: Mesh) -> Any:
    """A tree of shapes as one of arrays-to-be, replicated over the mesh."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
