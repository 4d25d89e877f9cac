"""Machines to compile for: this machine, or TPUs and GPUs that it does not have.

The compilers for other machines are in optional packages (requirements-topology.txt): libtpu for
TPUs, JAX's CUDA plugin for NVIDIA's GPUs.
"""

import contextlib
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from psp_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """Devices to compile for, and what is known about one of them."""

    devices: Sequence[jax.Device]
    memory: float  # bytes of a device that programs can use
    peak: float | None = None  # FLOP/s of a device in bfloat16
    clock: float | None = None  # Hz
    options: dict[str, Any] | None = None  # for the compiler
    remark: str = ''  # what the figures leave out


@dataclass(frozen=True)
class Tpu:
    peak: float  # FLOP/s of a chip in bfloat16
    per_cycle: int  # FLOPs: matrix units x size^2 x 2; the clock is peak / per_cycle
    memory: float  # bytes that programs can use, as the compiler's out-of-memory error states them
    cores: int


# Peaks: Google Cloud's pages on each generation. Matrix units: those pages and JAX's own table
# (jax/_src/pallas/mosaic/tpu_info.py). Both say that v6e has two units, but then the compiler's
# cycles for a large matrix product would be 1.4 times faster than the peak; so v6e has four here.
TPUS = {
    'v4': Tpu(275e12, 8 * 128**2 * 2, 30.75 * GIB, 2),
    'v5e': Tpu(197e12, 4 * 128**2 * 2, 15.75 * GIB, 1),
    'v5p': Tpu(459e12, 8 * 128**2 * 2, 95.74 * GIB, 2),
    'v6e': Tpu(918e12, 4 * 256**2 * 2, 31.25 * GIB, 1),
}


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: int
    cores: int  # streaming multiprocessors
    units: int  # float32 units of each core
    shared_memory: int  # bytes of each core
    bandwidth: int  # bytes a second
    cache: int  # bytes, second level
    clock: float  # GHz
    memory: int  # bytes


# From the specifications that the compiler itself is tested with: xla/backends/gpu/target_config/
# specs/{a100_sxm_40,a100_sxm_80,h100_sxm,h200,b200}.txtpb of github.com/openxla/xla.
GPUS = {
    'a100-40gb': Gpu(
        'NVIDIA A100-SXM4-40GB', 8, 108, 64, 167936, 1555200000000, 41943040, 1.41, 42331013120
    ),
    'a100': Gpu(
        'NVIDIA A100-SXM4-80GB', 8, 108, 64, 167936, 2039040000000, 41943040, 1.41, 85100068864
    ),
    'h100': Gpu(
        'NVIDIA H100 80GB HBM3', 9, 132, 128, 233472, 3352320000000, 52428800, 1.98, 84942979072
    ),
    'h200': Gpu(
        'NVIDIA H200 141GB HBM3e', 9, 132, 128, 233472, 4800000000000, 52428800, 1.98, 151397597184
    ),
    'b200': Gpu('NVIDIA B200', 10, 148, 128, 233472, 7672320000000, 132644864, 1.965, 191514411008),
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


def find_machine(name: str | None) -> Machine:
    """The machine with a name such as 'v5e:2x4' or 'h100:8'; None = this machine.

    With a name, call this before anything else uses JAX; JAX then sees only CPUs. Raises UserError
    if the name is unknown, no slice has the shape, or the compiler is not installed.
    """
    if name is None:
        return _this_machine()
    kind, _, shape = name.lower().partition(':')
    if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape) or kind not in {**TPUS, **GPUS}:
        raise UserError(
            f'--topology={name} is unknown: write a TPU ({", ".join(TPUS)}) with the shape of its '
            f'slice (v5e:2x4, v4:2x2x4), or a GPU ({", ".join(GPUS)}) with the number of GPUs '
            '(h100:8) or hosts x GPUs (h100:2x8)'
        )
    sides = [int(side) for side in shape.split('x')]
    jax.config.update('jax_platforms', 'cpu')  # nothing runs: do not start this host's accelerators
    return _tpus(name, kind, sides) if kind in TPUS else _gpus(name, kind, sides)


def _this_machine() -> Machine:
    devices = jax.local_devices()
    stats = devices[0].memory_stats() if devices[0].platform != 'cpu' else None
    if stats and 'bytes_limit' in stats:
        return Machine(devices, stats['bytes_limit'])
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    with contextlib.suppress(OSError, ValueError):  # the limit of a container, if there is one
        memory = min(memory, int(Path('/sys/fs/cgroup/memory.max').read_text()))
    remark = f"memory: this machine's, divided by {len(devices)} devices" if devices[1:] else ''
    return Machine(devices, memory / len(devices), remark=remark)


def _tpus(name: str, kind: str, sides: list[int]) -> Machine:
    if importlib.util.find_spec('libtpu') is None:
        raise UserError(f"--topology={name} needs the TPU compiler: pip install 'jax[tpu]'")
    # Without these libtpu looks for a TPU and asks Google Cloud about this machine.
    os.environ['TPU_SKIP_MDS_QUERY'] = '1'
    os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
    os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-8')
    tpu = TPUS[kind]
    options: dict[str, Any] = {'chips_per_host_bounds': [min(s, 2) for s in (*sides, 1)[:2]] + [1]}
    if tpu.cores > 1:
        options['chip_config_name'] = 'megacore'  # the cores of a chip are one device
    return Machine(
        _devices(name, 'tpu', topology_name=f'{kind}:{"x".join(map(str, sides))}', **options),
        tpu.memory,
        tpu.peak,
        tpu.peak / tpu.per_cycle,
        remark="times are the compiler's estimate, without communication",
    )


def _gpus(name: str, kind: str, sides: list[int]) -> Machine:
    if importlib.util.find_spec('jax_cuda13_plugin') is None:
        raise UserError(f"--topology={name} needs the GPU compiler: pip install 'jax[cuda13]'")
    if len(sides) > 2:
        raise UserError(f'--topology={name}: write {kind}:8 (GPUs) or {kind}:2x8 (hosts x GPUs)')
    gpu = GPUS[kind]
    target = _TARGET.format(shared_memory_of_block=gpu.shared_memory - 1024, **asdict(gpu))
    hosts, each = (1, *sides)[-2:]
    share = float(
        os.environ.get('XLA_CLIENT_MEM_FRACTION')
        or os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION')
        or 0.75
    )
    return Machine(
        _devices(name, 'cuda', target_config=target, topology=f'{hosts}x1x{each}'),
        share * gpu.memory,
        # Autotuning would time alternatives on a GPU.
        options={'xla_gpu_autotune_level': 0, 'xla_gpu_enable_triton_gemm': False},
        remark=f'memory: the {share:.0%} of a GPU that JAX takes (XLA_CLIENT_MEM_FRACTION changes '
        'it); the workspace of cuDNN is not counted, and no time is estimated',
    )


def _devices(name: str, platform: str, **options: Any) -> list[jax.Device]:
    try:
        return list(topologies.get_topology_desc(platform=platform, **options).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).partition('\n')[0].partition(': ')[2] or str(error)
        raise UserError(f'--topology={name}: the compiler rejects it ({reason})') from error


def devices_of_first_host(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """The devices that belong to the process of the first device."""
    return [d for d in devices if d.process_index == devices[0].process_index]
