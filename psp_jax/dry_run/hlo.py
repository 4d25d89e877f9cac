"""Reads communication and cycles from the text of a compiled program ("HLO") of one device."""

import math
import re
from dataclasses import dataclass

COLLECTIVES = (
    *('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all'),
    *('collective-permute', 'collective-broadcast'),
)
_BYTES = {
    **{'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'f16': 2, 'bf16': 2, 's32': 4, 'u32': 4},
    **{'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16},
}
# `calls=%name`, `branch_computations={%name, %name}`. The conditions of loops are left out: they
# cost next to nothing.
_CALLED = r'(?:body|calls|to_apply|\w+_computations?)=\{?([^,}]+(?:, %[^,}]+)*)'


@dataclass(frozen=True)
class Instruction:
    """A line `%name = shape opcode(arguments), attributes`."""

    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r'%([\w.\-]+)', self.arguments)


Computation = dict[str, Instruction]  # by the name of the instruction


@dataclass(frozen=True)
class Collective:
    """One kind of communication in a run of a program."""

    calls: int
    bytes: int  # of one device


@dataclass(frozen=True)
class Cost:
    """What one run of a compiled program costs a device."""

    collectives: dict[str, Collective]
    cycles: int | None  # the compiler's estimate; None if it makes none
    unknown_loops: int  # loops of unknown length, which are counted as if they ran once


def read_cost(text: str) -> Cost:
    """Communication and cycles of a program, from `compiled.as_text()`.

    The body of a loop counts once a round, and every branch of a choice counts. The bytes of a
    collective are those that a device sends or those that it receives, whichever are more.
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


def _computations(text: str) -> dict[str, Computation]:
    """The computations of a program by name; a caller comes after those that it calls."""
    found: dict[str, Computation] = {}
    current: Computation = {}
    for line in text.splitlines():
        header = re.match(r'(?:ENTRY )?%?([\w.\-]+) .*\{$', line)
        if header and ' = ' not in line.partition('->')[0]:
            current = found.setdefault(header[1], {})
            continue
        match = re.match(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*)', line)
        if match:
            current[match[1]] = _instruction(match[2])
    return found


def _instruction(text: str) -> Instruction:
    shape = text[: _closing(text) + 1] if text.startswith('(') else text.partition(' ')[0]
    opcode, _, rest = text[len(shape) :].strip().partition('(')
    end = _closing(f'({rest}')
    return Instruction(shape, opcode, rest[: end - 1], rest[end:])


def _closing(text: str) -> int:
    """The place of the bracket that closes the first one of `text`."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == '(') - (letter == ')')
        if depth == 0:
            return place
    return len(text)


def _runs(computations: dict[str, Computation]) -> tuple[dict[str, int], int]:
    """(runs of each computation in one run of the program, number of loops of unknown length)."""
    runs = dict.fromkeys(computations, 0)
    unknown = 0
    runs[list(computations)[-1]] = 1  # the entry comes last
    for caller in reversed(list(computations)):
        instructions = computations[caller]
        for instruction in instructions.values():
            rounds: int | None = 1
            if instruction.opcode == 'while':
                rounds = _loop_rounds(instruction, instructions, computations)
                unknown += rounds is None
            for called in re.findall(_CALLED, instruction.attributes):
                for name in called.replace('%', '').split(', '):
                    if name in runs:
                        runs[name] += runs[caller] * (1 if rounds is None else rounds)
    return runs, unknown


def _loop_rounds(
    loop: Instruction, caller: Computation, computations: dict[str, Computation]
) -> int | None:
    """The rounds of a loop, or None if unknown.

    The compiler states them for some loops. Others compare a counter with a constant; it is taken
    to rise by 1.
    """
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


def _integer(name: str, instructions: Computation) -> int | None:
    """The value of an integer constant or of a copy of one; None for anything else."""
    instruction = instructions.get(name)
    while instruction and instruction.opcode in ('copy', 'bitcast', 'reshape'):
        instruction = instructions.get(instruction.operands[0])
    if instruction is None or instruction.opcode != 'constant':
        return None
    found = re.fullmatch(r'-?\d+', instruction.arguments)
    return int(found[0]) if found else None


def _collective_bytes(instruction: Instruction, instructions: Computation) -> int:
    given = sum(_shape_bytes(instructions[o].shape) for o in instruction.operands)
    result = _shape_bytes(instruction.shape)
    starts = instruction.opcode.endswith('-start')
    return max(given, result - given if starts else result)  # the result of a start has both


def _shape_bytes(shape: str) -> int:
    """Bytes of 'f32[2,3]{1,0}' or of a tuple; types that are not listed take one byte a value."""
    arrays = re.findall(r'(\w+)\[([\d,]*)\]', shape)
    return sum(
        _BYTES.get(kind, 1) * math.prod(int(n) for n in sizes.split(',') if n)
        for kind, sizes in arrays
    )
