"""What a program costs, read from the program itself: FLOPs, communication, cycles.

FLOPs are counted before the compiler sees the program, so they are the same for every machine. The
other two are read from the text of a compiled program ("HLO"), and belong to one device.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

# ---- FLOPs


def flops(jaxpr: core.Jaxpr) -> int:
    """FLOPs of the convolutions and matrix products of a traced program, two a multiply-add.

    Products with padding are not counted, neither by zeros that a strided convolution's gradient
    puts between the cells; results that nothing uses are left out. A loop counts as often as it
    runs, a program that each device runs for itself (shard_map) once a device, and of a choice
    between programs the last branch, which is `lax.platform_dependent`'s default: that of
    accelerators.
    """
    used = {v for v in jaxpr.outvars if isinstance(v, core.Var)}
    total = 0
    for eqn in reversed(jaxpr.eqns):
        if not (used.intersection(eqn.outvars) or eqn.effects):
            continue  # such as a forward pass of which only the backward pass is wanted
        used |= {v for v in eqn.invars if isinstance(v, core.Var)}
        total += _equation_flops(eqn)
    return total


def _equation_flops(eqn: core.JaxprEqn) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == 'conv_general_dilated':
        return _convolution_flops(eqn)
    if name == 'dot_general':
        (contracted, _), _ = params['dimension_numbers']
        shared = math.prod(_shape(eqn.invars[0])[axis] for axis in contracted)
        return 2 * math.prod(_shape(eqn.outvars[0])) * shared
    if name == 'cond':
        return flops(params['branches'][-1].jaxpr)
    inner = sum(flops(jaxpr) for jaxpr in _inner_jaxprs(params.values()))
    if name == 'scan':
        return params['length'] * inner
    return params['mesh'].size * inner if name == 'shard_map' else inner


def _shape(value: Any) -> tuple[int, ...]:
    return value.aval.shape


def _inner_jaxprs(values: Any) -> Iterator[core.Jaxpr]:
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


def _convolution_flops(eqn: core.JaxprEqn) -> int:
    image, kernel = map(_shape, eqn.invars)
    params = eqn.params
    numbers = params['dimension_numbers']
    products = 1
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


# ---- The text of a compiled program

_BYTES = {
    **{'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'f16': 2, 'bf16': 2, 's32': 4, 'u32': 4},
    **{'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16},
}
COLLECTIVES = (
    *('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all'),
    *('collective-permute', 'collective-broadcast'),
)


# `calls=%name`, `branch_computations={%name, %name}`; a condition's cost is not worth a line
_CALLED = r'(?:body|calls|to_apply|\w+_computations?)=\{?([^,}]+(?:, %[^,}]+)*)'


class Instruction(NamedTuple):
    """`%name = shape opcode(operands), attributes`; `arguments` is what stands in the brackets."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r'%([\w.\-]+)', self.arguments)


class Collective(NamedTuple):
    """How often a step has a kind of communication, and the bytes of a device in it."""

    calls: int
    bytes: int


class Cost(NamedTuple):
    """One run of a compiled program on one device."""

    collectives: dict[str, Collective]
    cycles: int | None  # the compiler's estimate; None where it makes none
    unknown_loops: int  # of unknown length, counted as if they ran once


def cost(text: str) -> Cost:
    """Communication and cycles of a compiled program, `compiled.as_text()`.

    Bodies of loops count as often as they run, of a choice every branch. A collective's bytes are
    those that go in or those that come out of a device, whichever are more.
    """
    computations = _computations(text)
    runs, unknown = _runs(computations)
    found: dict[str, Collective] = {}
    cycles = 0
    for name, instructions in computations.items():
        for instruction in instructions.values():
            estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
            if estimate:
                cycles += runs[name] * int(estimate[1])
            kind = instruction.opcode.removesuffix('-start')
            if kind in COLLECTIVES:
                old = found.get(kind, Collective(0, 0))
                size = runs[name] * _collective_bytes(instruction, instructions)
                found[kind] = Collective(old.calls + runs[name], old.bytes + size)
    return Cost(dict(sorted(found.items())), cycles or None, unknown)


def _computations(text: str) -> dict[str, dict[str, Instruction]]:
    """The instructions of each computation by name; callers stand behind those that they call."""
    found: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        header = re.match(r'(?:ENTRY )?%?([\w.\-]+) .*\{$', line)
        if header and ' = ' not in line.partition('->')[0]:
            current = found.setdefault(header[1], {})
            continue
        match = re.match(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*)', line)
        if match:
            current[match[1]] = _instruction(match[1], match[2])
    return found


def _instruction(name: str, text: str) -> Instruction:
    shape = text[: _closing(text) + 1] if text.startswith('(') else text.partition(' ')[0]
    opcode, _, rest = text[len(shape) :].strip().partition('(')
    end = _closing(f'({rest}')
    return Instruction(name, shape, opcode, rest[: end - 1], rest[end:])


def _closing(text: str) -> int:
    """Where the bracket closes that `text` begins with."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == '(') - (letter == ')')
        if depth == 0:
            return place
    return len(text)


def _runs(computations: dict[str, dict[str, Instruction]]) -> tuple[dict[str, int], int]:
    """How often each computation runs in one run of the program; loops of unknown length."""
    runs = dict.fromkeys(computations, 0)
    unknown = 0
    if computations:
        runs[list(computations)[-1]] = 1  # the entry comes last
    for caller in reversed(list(computations)):
        instructions = computations[caller]
        for instruction in instructions.values():
            times: int | None = 1
            if instruction.opcode == 'while':
                times = _trip_count(instruction, instructions, computations)
                unknown += times is None
            for called in re.findall(_CALLED, instruction.attributes):
                for name in called.replace('%', '').split(', '):
                    if name in runs:
                        runs[name] += runs[caller] * (1 if times is None else times)
    return runs, unknown


def _trip_count(
    loop: Instruction,
    caller: dict[str, Instruction],
    computations: dict[str, dict[str, Instruction]],
) -> int | None:
    """As the compiler says it, or for a counter that is compared with a constant and rises by 1."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    named = re.search(r'condition=%?([\w.\-]+)', loop.attributes)
    condition = computations.get(named[1] if named else '', {})
    compare = next((i for i in condition.values() if i.opcode == 'compare'), None)
    if compare is None or 'direction=LT' not in compare.attributes:
        return None
    initial = caller.get(loop.operands[0])
    bounds: list[int] = []
    for operand in compare.operands:
        value = _integer(operand, condition)
        place = re.search(r'index=(\d+)', condition[operand].attributes)
        if value is None and place and initial is not None and initial.opcode == 'tuple':
            value = _integer(initial.operands[int(place[1])], caller)
        if value is None:
            return None
        bounds.append(value)
    return max(bounds[1] - bounds[0], 0)


def _integer(name: str, instructions: dict[str, Instruction]) -> int | None:
    """The value of an integer constant, perhaps copied; None of anything else."""
    instruction = instructions.get(name)
    while instruction and instruction.opcode in ('copy', 'bitcast', 'reshape'):
        instruction = instructions.get(instruction.operands[0])
    constant = instruction and instruction.opcode == 'constant'
    found = re.fullmatch(r'-?\d+', instruction.arguments) if instruction and constant else None
    return int(found[0]) if found else None


def _collective_bytes(instruction: Instruction, instructions: dict[str, Instruction]) -> int:
    given = sum(_shape_bytes(instructions[o].shape) for o in instruction.operands)
    result = _shape_bytes(instruction.shape)
    starts = instruction.opcode.endswith('-start')
    return max(given, result - given if starts else result)  # a start's result has both


def _shape_bytes(shape: str) -> int:
    """Bytes of 'f32[2,3]{1,0}', or of a tuple of such; those of fewer than 8 bits take a byte."""
    arrays = re.findall(r'(\w+)\[([\d,]*)\]', shape)
    return sum(
        _BYTES.get(kind, 1) * math.prod(int(n) for n in sizes.split(',') if n)
        for kind, sizes in arrays
    )
