"""`--mode dry_run`: does a configuration fit a machine, and how fast might it be?

Training and evaluation are compiled from shapes, for the devices of this machine or for a machine
that you do not have. No program runs, no array is made and no checkpoint is read. The compiled
programs are those that training and evaluation use.
"""

import importlib.metadata
import json
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from psp_jax import mesh, train
from psp_jax.command_line import whole_file
from psp_jax.config import crop_size
from psp_jax.data.labels import label_space
from psp_jax.data.pipeline import train_batches
from psp_jax.data.sources import make_source
from psp_jax.dry_run import text, topology
from psp_jax.dry_run.costs import bytes_on_device, compile_program, count_flops, estimate
from psp_jax.dry_run.topology import Machine
from psp_jax.errors import PassingError, UserError
from psp_jax.inference.blocks import CANVAS_BYTES
from psp_jax.inference.programs import make_programs
from psp_jax.inference.protocols import protocol_of
from psp_jax.inference.views import View, views
from psp_jax.model.geometry import Size
from psp_jax.report import console
from psp_jax.state import Setup, setup


@dataclass(frozen=True)
class Run:
    """A configuration on a machine."""

    setup: Setup
    machine: Machine
    mesh: jax.sharding.Mesh  # of training


def dry_run(config: ConfigDict, name: str, where: str | None, output: str | None) -> None:
    """Prints the figures of `config` on the machine `where` (None: this one).

    With `output` it also writes them to that file as JSON. A program that does not fit is a
    result, not an error. Raises UserError if the machine is unknown, its compiler is not
    installed, the batch does not divide over its devices, or `output` cannot be written.
    """
    if output:  # check it before minutes of compiling
        folder = os.path.dirname(os.path.abspath(output))
        if os.path.isdir(output) or not os.access(folder, os.W_OK):
            raise UserError(
                f'--output={output}: cannot be written; name a file in an existing folder'
            )
    machine = topology.find_machine(where)
    run = plan(config, machine)
    result = describe(run, name, where)
    console.say(text.heading(result))
    result['data'] = read_batch(config)
    console.say(text.data_line(result['data']))
    result['train'] = examine_training(run)
    result['evaluate'] = examine_evaluation(run)
    result['fits'] = result['train']['fits'] and result['evaluate']['fits']
    console.say(text.table(result))
    if output:
        with whole_file(output) as unfinished, open(unfinished, 'w') as file:
            file.write(json.dumps(result, indent=1) + '\n')
        console.say(f'written to {output}')


def plan(config: ConfigDict, machine: Machine) -> Run:
    """The network, optimizer and mesh of `config`, without any array.

    Raises UserError if the batch or the crop does not divide over the devices.
    """
    devices = list(machine.devices)
    grid = mesh.make_mesh(config.mesh.data, config.batch_size, config.mesh.space, devices)
    made = setup(config)
    mesh.check_cut(grid, made.model, made.variables, crop_size(config.data))
    return Run(made, machine, grid)


def describe(run: Run, name: str, where: str | None) -> dict[str, Any]:
    """What is compiled, and for which machine."""
    config, machine, devices = run.setup.config, run.machine, run.machine.devices
    installed = {d.metadata['Name'].lower(): d.version for d in importlib.metadata.distributions()}
    libraries = ('jax', 'jaxlib', 'libtpu', 'jax-cuda13-plugin')
    return {
        'name': name,
        'topology': where,
        'devices': len(devices),
        'device_kind': devices[0].device_kind,
        'processes': count_processes(machine),
        'mesh': dict(run.mesh.shape),
        'memory': round(machine.memory),
        'peak': machine.peak,
        'clock': machine.clock,
        'remark': machine.remark,
        'network': f'{config.model.backbone}-{config.model.depth} with {config.model.context}',
        'classes': count_classes(config),
        'dtype': config.dtype,
        'batch_size': config.batch_size,
        'crop': list(crop_size(config.data)),
        'parameters': sum(x.size for x in jax.tree.leaves(run.setup.shapes.params)),
        'versions': {lib: installed[lib] for lib in libraries if lib in installed},
    }


def count_processes(machine: Machine) -> int:
    return len({device.process_index for device in machine.devices})


def count_classes(config: ConfigDict) -> int:
    return len(label_space(config.data.classes).names)


def read_batch(config: ConfigDict) -> dict[str, Any]:
    """Reads the first training batch as a run would; if it cannot, returns the reason."""
    start = time.perf_counter()
    try:
        source = make_source(config.data, 'train')
        batches = train_batches(source, config, start_step=0, process_index=0, process_count=1)
        batch = next(batches)
        batches.close()
    except (UserError, PassingError) as error:
        return {'read': False, 'reason': str(error)}
    return {
        'read': True,
        'images': source.length,
        'shape': list(batch['image'].shape),
        'seconds': time.perf_counter() - start,
    }


# ---- Training


def examine_training(run: Run) -> dict[str, Any]:
    """The figures of the training step; see `costs.compile_program`."""
    config, grid = run.setup.config, run.mesh
    state = mesh.on_devices(run.setup.shapes, grid)
    height, width = crop_size(config.data)
    place = mesh.split_images(grid)
    shape = config.batch_size, mesh.padded_height(height, grid), width
    batch = {
        'image': jax.ShapeDtypeStruct((*shape, 3), jnp.uint8, sharding=place),
        'label': jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=place),
    }
    arguments = {
        'parameters': bytes_on_device(state.params),
        'optimizer': bytes_on_device(state.opt_state),
        'batch_statistics': bytes_on_device(state.batch_stats),
        'batch': bytes_on_device(batch),
    }
    # The loop puts the next batch on the device while a step runs.
    beside = {'next_batch': arguments['batch']}
    traced = train.compile_step(run.setup, grid).trace(state, batch)
    found = compile_program(traced, run.machine, arguments, beside)
    each = found['flops'] / grid.size  # of a device
    return {
        **found,
        'flops_per_image': round(found['flops'] / config.batch_size),
        **estimate(found['cycles'], each, config.batch_size, run.machine),
    }


# ---- Evaluation


@dataclass(frozen=True)
class Call:
    """The network's program in evaluation for one input shape."""

    traced: jax.stages.Traced
    inputs: tuple[jax.ShapeDtypeStruct, ...]  # images, or windows, and their true sizes

    @property
    def count(self) -> int:
        """Images, or windows, that one call takes on all devices together."""
        return math.prod(self.inputs[1].shape[:-1])


def trace_network(
    run: Run, local: jax.sharding.Mesh, variables: Any, shape: Size, windows: int
) -> Call:
    """The network on inputs of a (height, width), for images with this number of windows."""
    programs = make_programs(run.setup, local)
    inputs = programs.input_shapes(shape, windows)
    return Call(programs.network.trace(variables, *inputs), inputs)


def examine_evaluation(run: Run) -> dict[str, Any]:
    """The figures of the network in evaluation; see `costs.compile_program`.

    Each process evaluates its own images on its own devices, so this is the program of one process.
    If the views of an image have several input shapes, it is the program of the largest.
    """
    config, machine = run.setup.config, run.machine
    host = topology.devices_of_first_host(machine.devices)
    local = mesh.local_mesh(config.mesh.data, config.mesh.space, host)
    variables = mesh.on_devices(run.setup.variables, local)
    size, reason = image_size(config)
    seen = views(size, config)
    shapes, windows = [view.input for view in seen], [len(view.sources) for view in seen]
    calls = {s: trace_network(run, local, variables, s, sum(windows)) for s in set(shapes)}
    call = calls[max(calls, key=math.prod)]
    per_device = call.count // local.size
    arguments = {
        'parameters': bytes_on_device(variables['params']),
        'batch_statistics': bytes_on_device(variables['batch_stats']),
        'batch': bytes_on_device(call.inputs),
    }
    beside = {
        'canvases': canvas_bytes(seen, config, per_device),
        # During training the optimizer's state stays on the device.
        'optimizer': bytes_on_device(mesh.on_devices(run.setup.shapes.opt_state, local)),
    }
    found = compile_program(call.traced, machine, arguments, beside)
    flops_of = {s: count_flops(c.traced.jaxpr.jaxpr) / c.count for s, c in calls.items()}
    flops = sum(n * flops_of[shape] for n, shape in zip(windows, shapes, strict=True))
    images = found['flops'] / flops  # that one call completes
    if protocol_of(config).slides:  # the last call of an image may be half empty
        images = local.size / -(-sum(windows) // per_device)
    each = found['flops'] / local.size  # of a device
    return {
        'protocol': config.eval.protocol,
        'image': list(size),
        'image_is': reason,
        'input': list(call.inputs[0].shape),
        'windows': sum(windows),
        **found,
        'flops_per_image': round(flops),
        **estimate(found['cycles'], each, count_processes(machine) * images, machine),
    }


def image_size(config: ConfigDict) -> tuple[Size, str]:
    """The size of the image that evaluation is examined with, and the reason for it."""
    space = label_space(config.data.classes)
    if space.image_size:
        return space.image_size, "the size of the data set's images"
    side = config.eval.base_size
    if side:
        size = side, protocol_of(config).longest_side(side)
        return size, 'the largest image that the protocol makes with eval.base_size'
    return crop_size(config.data), 'the training crop, since eval.base_size is 0'


def canvas_bytes(seen: list[View], config: ConfigDict, images: int) -> int:
    """Bytes of the scores that wait on a device; images: of one call, on each device."""
    cell = count_classes(config) * jnp.promote_types(config.dtype, jnp.float32).itemsize
    cells = [math.prod(view.canvas) for view in seen]
    if protocol_of(config).slides:  # one image at a time
        return min(cell * sum(cells), CANVAS_BYTES)
    # The scores of one view are the program's output; those of the others wait.
    return cell * (sum(cells) - max(cells)) * images
