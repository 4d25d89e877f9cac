"""Machines that are not there: devices that programs can be compiled for, by name.

The compilers come with optional packages: libtpu for TPUs, jax's CUDA plugin for NVIDIA's cards
(requirements-topology.txt).
"""

import contextlib
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from psp_jax.errors import UserError

GIB = 2**30


class Machine(NamedTuple):
    """Devices to compile for, and what is known of one of them."""

    devices: Sequence[jax.Device]
    memory: float  # bytes of a device that a program can have
    peak: float | None = None  # FLOP/s in bfloat16
    clock: float | None = None  # Hz
    options: dict[str, Any] | None = None  # for the compiler
    remark: str = ''  # what the figures leave out


class Tpu(NamedTuple):
    peak: float  # FLOP/s of a chip in bfloat16, as Google Cloud publishes it
    per_cycle: int  # FLOPs: matrix units x size^2 x 2, so the clock is peak / per_cycle
    memory: float  # bytes that programs can have, as the compiler says where they do not suffice
    cores: int


# Peaks: Google Cloud's pages on each generation. Matrix units: those pages and JAX's own table
# (jax/_src/pallas/mosaic/tpu_info.py); of v6e both say two, with which the compiler's cycles for a
# large matrix product would be 1.4 times faster than the peak, so here they are four.
TPUS = {
    'v4': Tpu(275e12, 8 * 128**2 * 2, 30.75 * GIB, 2),
    'v5e': Tpu(197e12, 4 * 128**2 * 2, 15.75 * GIB, 1),
    'v5p': Tpu(459e12, 8 * 128**2 * 2, 95.74 * GIB, 2),
    'v6e': Tpu(918e12, 4 * 256**2 * 2, 31.25 * GIB, 1),
}


class Card(NamedTuple):
    name: str
    capability: int
    cores: int  # streaming multiprocessors
    units: int  # of float32 in each
    shared_memory: int  # bytes in each
    bandwidth: int  # bytes a second
    cache: int  # bytes, second level
    clock: float  # GHz
    memory: int  # bytes


# From the specifications that the compiler itself is tested with: xla/backends/gpu/target_config/
# specs/{a100_sxm_40,a100_sxm_80,h100_sxm,h200,b200}.txtpb of github.com/openxla/xla.
CARDS = {
    'a100-40gb': Card(
        'NVIDIA A100-SXM4-40GB', 8, 108, 64, 167936, 1555200000000, 41943040, 1.41, 42331013120
    ),
    'a100': Card(
        'NVIDIA A100-SXM4-80GB', 8, 108, 64, 167936, 2039040000000, 41943040, 1.41, 85100068864
    ),
    'h100': Card(
        'NVIDIA H100 80GB HBM3', 9, 132, 128, 233472, 3352320000000, 52428800, 1.98, 84942979072
    ),
    'h200': Card(
        'NVIDIA H200 141GB HBM3e', 9, 132, 128, 233472, 4800000000000, 52428800, 1.98, 151397597184
    ),
    'b200': Card(
        'NVIDIA B200', 10, 148, 128, 233472, 7672320000000, 132644864, 1.965, 191514411008
    ),
}
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_memory}
  shared_memory_per_block_optin: {shared_memory_of_block}
  core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} device_memory_size: {memory} l2_cache_size: {cache}
  cuda_compute_capability {{ major: {capability} minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 patch: 1 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""


def machine(name: str | None) -> Machine:
    """The devices of a topology such as 'v5e:2x4' or 'h100:8'; None = those of this machine.

    A topology has to be the first thing that uses JAX, which then sees CPUs only. Raises UserError
    for a name that is not known, a shape that does not exist and a compiler that is not installed.
    """
    if name is None:
        return _this_machine()
    kind, _, shape = name.lower().partition(':')
    if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape) or kind not in {**TPUS, **CARDS}:
        raise UserError(
            f'--topology={name} is not known; there are {", ".join(TPUS)} by the shape of their '
            f'slices (v5e:2x4, v4:2x2x4) and {", ".join(CARDS)} by cards (h100:8) or hosts x cards '
            '(h100:2x8)'
        )
    sides = [int(side) for side in shape.split('x')]
    jax.config.update('jax_platforms', 'cpu')  # nothing is run, and no accelerator here is touched
    return _tpus(name, kind, sides) if kind in TPUS else _cards(name, kind, sides)


def _this_machine() -> Machine:
    devices = jax.local_devices()
    stats = devices[0].memory_stats() if devices[0].platform != 'cpu' else None
    if stats and 'bytes_limit' in stats:
        return Machine(devices, stats['bytes_limit'])
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    with contextlib.suppress(OSError, ValueError):  # a container's, if it has one
        memory = min(memory, int(Path('/sys/fs/cgroup/memory.max').read_text()))
    remark = f"memory: this machine's, divided by {len(devices)} devices" if devices[1:] else ''
    return Machine(devices, memory / len(devices), remark=remark)


def _tpus(name: str, kind: str, sides: list[int]) -> Machine:
    if importlib.util.find_spec('libtpu') is None:
        raise UserError(f"--topology={name} needs the TPU compiler: pip install 'jax[tpu]'")
    # libtpu looks for a TPU, and for what Google Cloud knows of this machine, unless it is told.
    os.environ['TPU_SKIP_MDS_QUERY'] = '1'
    os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
    os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-8')
    tpu = TPUS[kind]
    options: dict[str, Any] = {'chips_per_host_bounds': [min(s, 2) for s in (*sides, 1)[:2]] + [1]}
    if tpu.cores > 1:
        options['chip_config_name'] = 'megacore'  # the cores of a chip work as one device
    devices = _devices(name, 'tpu', topology_name=f'{kind}:{"x".join(map(str, sides))}', **options)
    return Machine(
        devices,
        tpu.memory,
        tpu.peak,
        tpu.peak / tpu.per_cycle,
        remark="times are the compiler's estimate, without communication",
    )


def _cards(name: str, kind: str, sides: list[int]) -> Machine:
    if importlib.util.find_spec('jax_cuda13_plugin') is None:
        raise UserError(
            f"--topology={name} needs the compiler for cards: pip install 'jax[cuda13]'"
        )
    if len(sides) > 2:
        raise UserError(f'--topology={name}: cards are counted as {kind}:8, or {kind}:2x8 (hosts)')
    card = CARDS[kind]
    text = _TARGET.format(shared_memory_of_block=card.shared_memory - 1024, **card._asdict())
    hosts, cards = (1, *sides)[-2:]
    devices = _devices(name, 'cuda', target_config=text, topology=f'{hosts}x1x{cards}')
    share = _share_of_card()
    return Machine(
        devices,
        share * card.memory,
        # there is no card to time alternatives on
        options={'xla_gpu_autotune_level': 0, 'xla_gpu_enable_triton_gemm': False},
        remark=f'memory: the {share:.0%} of a card that JAX takes (XLA_CLIENT_MEM_FRACTION '
        'sets it); the workspace of cuDNN is not counted, and no time is estimated',
    )


def _share_of_card() -> float:
    for name in ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'):
        text = os.environ.get(name)
        if text:
            try:
                return float(text)
            except ValueError:
                raise UserError(f'{name}={text}: must be a number') from None
    return 0.75


def _devices(name: str, platform: str, **options: Any) -> list[jax.Device]:
    try:
        devices = topologies.get_topology_desc(platform=platform, **options).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).partition('\n')[0].partition(': ')[2] or str(error)
        raise UserError(f'--topology={name}: the compiler does not take it ({reason})') from error
    return list(devices)


def of_one_host(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """The devices of the first process."""
    return [d for d in devices if d.process_index == devices[0].process_index]
