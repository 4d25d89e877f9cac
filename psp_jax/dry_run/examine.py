"""Does a configuration fit a machine, and how fast might it be? Compiled from shapes, never run.

The programs are those that training and evaluation run themselves. They are compiled for the
devices of this machine, or for a topology that nobody has rented yet; no array is made and no
checkpoint is touched.
"""

import importlib.metadata
import json
import math
import os
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from psp_jax import mesh, train
from psp_jax.command_line import whole_file
from psp_jax.data.labels import label_space
from psp_jax.data.pipeline import train_batches
from psp_jax.data.sources import make_source
from psp_jax.dry_run import costs, text, topology
from psp_jax.dry_run.topology import GIB, Machine
from psp_jax.errors import PassingError, UserError
from psp_jax.inference import protocols
from psp_jax.inference.programs import make_programs
from psp_jax.model import pspnet
from psp_jax.model.geometry import Size, crop_size
from psp_jax.report import console
from psp_jax.state import Setup, TrainState, setup

UNITS = {'K': 2**10, 'M': 2**20, 'G': GIB, 'T': 2**40}


class Run(NamedTuple):
    """What is looked at: a configuration on a machine."""

    config: ConfigDict
    machine: Machine
    mesh: jax.sharding.Mesh  # of training
    setup: Setup
    model: pspnet.PSPNet
    state: TrainState  # as shapes


def dry_run(config: ConfigDict, name: str, where: str | None, output: str | None) -> None:
    """Prints the report on `config`, compiled for the topology `where` (None: this machine).

    With `output` the same figures are written there as JSON. A program that does not fit is a
    result, not an error. Raises UserError for a topology that is not known or whose compiler is
    not installed, and a batch that does not divide over its devices.
    """
    if output:  # minutes of compiling are not to be in vain
        folder = os.path.dirname(os.path.abspath(output))
        if os.path.isdir(output) or not os.access(folder, os.W_OK):
            raise UserError(
                f'--output={output}: cannot be written; name a file in a folder that is there'
            )
    machine = topology.machine(where)
    run = plan(config, machine)
    result = describe(run, name, where)
    console.say(text.heading(result))
    result['data'] = read_batch(config)
    console.say(text.data_line(result['data']))
    result['train'] = train_report(run)
    result['evaluate'] = evaluate_report(run)
    result['fits'] = result['train']['fits'] and result['evaluate']['fits']
    console.say(text.table(result))
    if output:
        with whole_file(output) as unfinished, open(unfinished, 'w') as file:
            file.write(json.dumps(result, indent=1) + '\n')
        console.say(f'written to {output}')


# ---- Figures


def plan(config: ConfigDict, machine: Machine) -> Run:
    """The network, optimizer and state of `config`, without any array.

    Raises UserError for a batch that does not divide over the devices.
    """
    devices = list(machine.devices)
    grid = mesh.make_mesh(config.mesh.data, config.batch_size, config.mesh.space, devices)
    made = setup(config)
    mesh.check_cut(grid, made.model, made.variables, crop_size(config))
    return Run(config, machine, grid, made, made.model, made.shapes)


def describe(run: Run, name: str, where: str | None) -> dict[str, Any]:
    """What is compiled, and for what."""
    config, machine, devices = run.config, run.machine, run.machine.devices
    installed = {d.metadata['Name'].lower(): d.version for d in importlib.metadata.distributions()}
    libraries = ('jax', 'jaxlib', 'libtpu', 'jax-cuda13-plugin')
    return {
        'name': name,
        'topology': where,
        'devices': len(devices),
        'device_kind': devices[0].device_kind,
        'processes': len({device.process_index for device in devices}),
        'mesh': dict(run.mesh.shape),
        'memory': round(machine.memory),
        'peak': machine.peak,
        'clock': machine.clock,
        'remark': machine.remark,
        'depth': config.model.depth,
        'classes': len(label_space(config.data.classes).names),
        'dtype': config.dtype,
        'batch_size': config.batch_size,
        'crop': list(crop_size(config)),
        'parameters': sum(x.size for x in jax.tree.leaves(run.state.params)),
        'versions': {lib: installed[lib] for lib in libraries if lib in installed},
    }


def train_report(run: Run) -> dict[str, Any]:
    """The training step's figures: see `examine`."""
    config, grid = run.config, run.mesh
    state = mesh.on_devices(run.state, grid)
    height, width = crop_size(config)
    place = mesh.split_images(grid)
    size = config.batch_size, mesh.padded_height(height, grid), width
    batch = {
        'image': jax.ShapeDtypeStruct((*size, 3), jnp.uint8, sharding=place),
        'label': jax.ShapeDtypeStruct(size, jnp.uint8, sharding=place),
    }
    step = train.compile_step(run.setup, grid)
    parts = {
        'parameters': bytes_on_device(state.params),
        'optimizer': bytes_on_device(state.opt_state),
        'batch_statistics': bytes_on_device(state.batch_stats),
        'batch': bytes_on_device(batch),
    }
    # while a step runs the batch of the next one is put beside it
    extra = {'next_batch': parts['batch']}
    found = examine(step.trace(state, batch), run.machine, parts, extra)
    return found | speed(found, config.batch_size, grid.size, run.machine)


def evaluate_report(run: Run) -> dict[str, Any]:
    """The figures of the network in evaluation: see `examine`.

    Of the programs that images of many sizes need it is the one with the largest input.
    """
    config, machine, model, state = run.config, run.machine, run.model, run.state
    host = topology.of_one_host(machine.devices)
    local = mesh.local_mesh(config.mesh.data, config.mesh.space, host)
    programs = make_programs(config, model, local)
    size, reason = image_size(config)
    views = protocols.views(size, config)
    shapes = {protocols.window_shape(view, config) for view in views}
    windows = [len(view.rows.starts) * len(view.columns.starts) for view in views]
    variables = mesh.on_devices({'params': state.params, 'batch_stats': state.batch_stats}, local)

    def traced(shape: Size) -> Any:
        arguments = programs.arguments(shape, sum(windows))
        return programs.network.trace(variables, *arguments)

    largest = max(shapes, key=math.prod)
    inputs = programs.arguments(largest, sum(windows))
    calls = math.prod(inputs[1].shape[:-1])  # images, or windows, of one call
    cells = [math.prod(protocols.canvas_size(view, config)) for view in views]
    classes = len(label_space(config.data.classes).names)
    scores = classes * jnp.promote_types(config.dtype, jnp.float32).itemsize  # bytes of a cell
    if config.eval.protocol in protocols.SLIDING:
        canvases = min(scores * sum(cells), protocols.CANVAS_BYTES)
    else:  # the scores of one view are the program's output, those of the others wait
        canvases = scores * (sum(cells) - max(cells)) * calls // local.size
    parts = {
        'parameters': bytes_on_device(variables['params']),
        'batch_statistics': bytes_on_device(variables['batch_stats']),
        'batch': bytes_on_device(inputs),
    }
    # in a training run the optimizer's state stays where it is
    extra = {
        'canvases': canvases,
        'optimizer': bytes_on_device(mesh.on_devices(state.opt_state, local)),
    }
    found = examine(traced(largest), machine, parts, extra)
    each = {shape: costs.flops(traced(shape).jaxpr.jaxpr) / calls for shape in shapes}
    image = sum(
        count * each[protocols.window_shape(view, config)]
        for count, view in zip(windows, views, strict=True)
    )
    images = found['flops'] / image  # that one call is worth
    if config.eval.protocol in protocols.SLIDING:  # the last call of an image may be half empty
        images = local.size / -(-sum(windows) // inputs[1].shape[1])
    hosts = len({device.process_index for device in machine.devices})
    facts = {
        'protocol': config.eval.protocol,
        'image': list(size),
        'image_is': reason,
        'input': list(inputs[0].shape),
        'windows': sum(windows),
    }
    timed = speed(
        found | {'flops': hosts * found['flops']}, hosts * images, hosts * local.size, machine
    )
    return facts | found | timed | {'flops_per_image': round(image)}


def image_size(config: ConfigDict) -> tuple[Size, str]:
    """The size of image that evaluation is looked at with, and why it is this one."""
    space = label_space(config.data.classes)
    if space.image_size:
        return space.image_size, "the size of the data set's images"
    side = config.eval.base_size
    if side and config.eval.protocol in ('mmseg', 'mmseg_slide'):
        return (
            side,
            protocols.mmseg_long_side(side),
        ), 'the longest image that the protocol has at eval.base_size'
    if side:
        return (side, side), 'a square of eval.base_size: the largest input it leads to'
    return crop_size(config), 'the training crop, since eval.base_size is 0'


def bytes_on_device(tree: Any) -> int:
    """Of a tree of arrays-to-be with shardings, without the padding that a device may add."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def examine(
    traced: Any, machine: Machine, parts: dict[str, int], extra: dict[str, int]
) -> dict[str, Any]:
    """Compiles a traced program and reads off what it takes.

    parts: bytes of its arguments on a device by what they are; extra: of what lies on the device
    besides. Gives FLOPs (of the whole program), bytes a device, collectives, cycles, seconds of
    compilation, and whether it fits; where the compiler finds that it does not, `needs` and its
    `message` are all there is.
    """
    result: dict[str, Any] = {'flops': costs.flops(traced.jaxpr.jaxpr)}
    start = time.perf_counter()
    try:
        compiled = traced.lower().compile(compiler_options=machine.options)
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        message = str(error).partition('\n')[0]
        return result | {
            'compile_seconds': time.perf_counter() - start,
            'bytes': {**parts, **extra, 'total': needed(str(error))},
            'fits': False,
            'message': message,
            'collectives': {},
            'cycles': None,
        }
    result['compile_seconds'] = time.perf_counter() - start
    memory = compiled.memory_analysis()
    parts = {
        **parts,
        # arrays of a TPU are padded to tiles; arguments that nothing uses are not among them
        'padding': max(memory.argument_size_in_bytes - sum(parts.values()), 0),
        'activations': memory.temp_size_in_bytes,
        'outputs': memory.output_size_in_bytes - memory.alias_size_in_bytes,
        'program': memory.generated_code_size_in_bytes,
        **extra,
    }
    total = sum(parts.values())
    cost = costs.cost(compiled.as_text())
    return result | {
        'bytes': {**parts, 'total': total},
        'fits': total <= machine.memory,
        'collectives': {
            kind: {'count': found.calls, 'bytes': found.bytes}
            for kind, found in cost.collectives.items()
        },
        'cycles': cost.cycles,
        'unknown_loops': cost.unknown_loops,
    }


def needed(message: str) -> int | None:
    """Bytes that a program asks for, of the compiler's message that it does not get them."""
    found = re.search(r'Used ([\d.]+)([KMGT])|required [^(]*\(([\d.]+)([KMGT])\)', message)
    if not found:
        return None
    number, unit = [group for group in found.groups() if group]
    return round(float(number) * UNITS[unit])


def speed(found: dict[str, Any], images: float, devices: int, machine: Machine) -> dict[str, Any]:
    """What the compiler's cycles of a program amount to that works on so many images at a time."""
    result: dict[str, Any] = {'flops_per_image': round(found['flops'] / images)}
    if found['cycles'] and machine.clock and machine.peak:
        seconds = found['cycles'] / machine.clock
        result['estimate'] = {
            'seconds': seconds,
            'images_per_second': images / seconds,
            'share_of_peak': found['flops'] / devices / seconds / machine.peak,
        }
    return result


def read_batch(config: ConfigDict) -> dict[str, Any]:
    """Reads the first training batch, as a run would; where it cannot, says why."""
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
