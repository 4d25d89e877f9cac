"""What a traced program costs: FLOPs, memory, communication and the compiler's estimate of time."""

import math
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

from psp_jax.dry_run import hlo
from psp_jax.dry_run.topology import GIB, Machine

UNITS = {'K': 2**10, 'M': 2**20, 'G': GIB, 'T': 2**40}

# ---- FLOPs


def count_flops(jaxpr: core.Jaxpr) -> int:
    """FLOPs of the convolutions and matrix products of a traced program; a multiply-add is two.

    The count is of all devices, and the same for every machine. These are not counted: products
    with padding, products with the zeros between the cells in a strided convolution's gradient,
    and results that nothing uses. The body of a loop counts once a round, the body of a shard_map
    once a device. Of the branches of a choice the last one counts: for `lax.platform_dependent`
    that is the default, which accelerators use.
    """
    used = {v for v in jaxpr.outvars if isinstance(v, core.Var)}
    total = 0
    for eqn in reversed(jaxpr.eqns):
        if not (used.intersection(eqn.outvars) or eqn.effects):
            continue  # such as a forward pass if only the backward pass is wanted
        used |= {v for v in eqn.invars if isinstance(v, core.Var)}
        total += _equation_flops(eqn)
    return total


def _equation_flops(eqn: core.JaxprEqn) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == 'conv_general_dilated':
        return _convolution_flops(eqn)
    if name == 'dot_general':
        (contracted, _), _ = params['dimension_numbers']
        summed = math.prod(_shape(eqn.invars[0])[axis] for axis in contracted)
        return 2 * math.prod(_shape(eqn.outvars[0])) * summed
    if name == 'cond':
        return count_flops(params['branches'][-1].jaxpr)
    inner = sum(count_flops(jaxpr) for jaxpr in _inner_jaxprs(params.values()))
    if name == 'scan':
        return params['length'] * inner
    return params['mesh'].size * inner if name == 'shard_map' else inner


def _shape(value: Any) -> tuple[int, ...]:
    return value.aval.shape


def _inner_jaxprs(values: Iterable[Any]) -> Iterator[core.Jaxpr]:
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


def _convolution_flops(eqn: core.JaxprEqn) -> int:
    image, kernel = map(_shape, eqn.invars)
    params = eqn.params
    numbers = params['dimension_numbers']
    products = 1  # of one input channel with one output channel
    for axis, (i, k, o) in enumerate(
        zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    ):
        spread = params['lhs_dilation'][axis]
        outputs = np.arange(_shape(eqn.outvars[0])[o])[:, None] * params['window_strides'][axis]
        inputs = outputs + np.arange(kernel[k]) * params['rhs_dilation'][axis]
        inputs = inputs - params['padding'][axis][0]
        last = (image[i] - 1) * spread
        products *= int(np.sum((inputs >= 0) & (inputs <= last) & (inputs % spread == 0)))
    batch = image[numbers.lhs_spec[0]] // params['batch_group_count']
    return 2 * batch * kernel[numbers.rhs_spec[0]] * kernel[numbers.rhs_spec[1]] * products


# ---- Memory and time


def bytes_on_device(tree: Any) -> int:
    """Bytes of a tree of arrays on one device, by their shardings, without padding.

    tree: of ShapeDtypeStructs with shardings.
    """
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def compile_program(
    traced: jax.stages.Traced, machine: Machine, arguments: dict[str, int], beside: dict[str, int]
) -> dict[str, Any]:
    """Compiles a traced program and returns what it needs.

    arguments: bytes of its arguments on a device, by name; beside: bytes of the other arrays on
    the device at that time, by name. Returns `flops` (of all devices), `bytes` (of a device, by
    name, and their `total`), `fits`, `collectives`, `cycles`, `unknown_loops` and
    `compile_seconds`. If the compiler itself finds the program too large, `total` is what its error
    says (or None), and `message` is the first line of that error.
    """
    result: dict[str, Any] = {'flops': count_flops(traced.jaxpr.jaxpr)}
    start = time.perf_counter()
    try:
        compiled = traced.lower().compile(compiler_options=machine.options)
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return result | {
            'compile_seconds': time.perf_counter() - start,
            'bytes': {**arguments, **beside, 'total': needed_bytes(str(error))},
            'fits': False,
            'message': str(error).partition('\n')[0],
            'collectives': {},
            'cycles': None,
            'unknown_loops': 0,
        }
    memory = compiled.memory_analysis()
    sizes = {
        **arguments,
        # TPUs pad arrays to tiles. The compiler does not count unused arguments.
        'padding': max(memory.argument_size_in_bytes - sum(arguments.values()), 0),
        'activations': memory.temp_size_in_bytes,
        'outputs': memory.output_size_in_bytes - memory.alias_size_in_bytes,
        'program': memory.generated_code_size_in_bytes,
        **beside,
    }
    total = sum(sizes.values())
    cost = hlo.read_cost(compiled.as_text())
    return result | {
        'compile_seconds': time.perf_counter() - start,
        'bytes': {**sizes, 'total': total},
        'fits': total <= machine.memory,
        'collectives': {
            kind: {'count': found.calls, 'bytes': found.bytes}
            for kind, found in cost.collectives.items()
        },
        'cycles': cost.cycles,
        'unknown_loops': cost.unknown_loops,
    }


def needed_bytes(message: str) -> int | None:
    """The bytes that the compiler's out-of-memory error says a program needs."""
    found = re.search(r'Used ([\d.]+)([KMGT])|required [^(]*\(([\d.]+)([KMGT])\)', message)
    if not found:
        return None
    number, unit = [group for group in found.groups() if group]
    return round(float(number) * UNITS[unit])


def estimate(cycles: int | None, flops: float, images: float, machine: Machine) -> dict[str, Any]:
    """{'estimate': {seconds, images_per_second, share_of_peak}} of one call of a program.

    flops: of one device; images: of all devices. Returns {} if the compiler estimates no cycles.
    """
    if not (cycles and machine.clock and machine.peak):
        return {}
    seconds = cycles / machine.clock
    found = {
        'seconds': seconds,
        'images_per_second': images / seconds,
        'share_of_peak': flops / seconds / machine.peak,
    }
    return {'estimate': found}
