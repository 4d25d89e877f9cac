"""FLOPs, memory and estimates of programs, against XLA's own numbers and counts by hand."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from psp_jax.dry_run import costs
from psp_jax.dry_run.topology import GIB, Machine
from psp_jax.mesh import local_mesh, make_mesh, on_devices, replicated, split_batch
from psp_jax.model.layers import conv

HERE = Machine(jax.local_devices(), 4 * GIB)


def shaped(*shape, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def flops_of(fn, *arguments):
    return costs.count_flops(jax.jit(fn).trace(*arguments).jaxpr.jaxpr)


@pytest.mark.parametrize('stride, dilation', [(1, 1), (1, 4), (2, 1), (2, 2)])
def test_flops_of_a_convolution_are_those_that_xla_counts(stride, dilation):
    def convolve(x, kernel):
        return conv(x, kernel, stride, dilation)

    arguments = shaped(2, 12, 9, 4), shaped(3, 3, 4, 8)
    xla = jax.jit(convolve).lower(*arguments).cost_analysis()['flops']
    assert flops_of(convolve, *arguments) == xla


def test_flops_leave_padding_out():
    # of the 3 x 9 products along an axis of 9 cells, dilation 2 has 2 in the padding at each end
    counted = flops_of(lambda x, k: conv(x, k, 1, 2), shaped(2, 9, 9, 4), shaped(3, 3, 4, 8))
    assert counted == 2 * (2 * 4 * 8) * (27 - 4) ** 2


@pytest.mark.parametrize('stride, size', [(1, 3), (2, 3), (2, 1)])
def test_each_gradient_of_a_convolution_costs_as_much_as_the_convolution(stride, size):
    def loss(x, kernel):
        return jnp.sum(conv(x, kernel, stride) ** 2)

    arguments = shaped(2, 9, 9, 4), shaped(size, size, 4, 8)
    forward = flops_of(loss, *arguments)
    assert flops_of(jax.grad(loss, (0, 1)), *arguments) == 3 * forward
    assert flops_of(jax.grad(loss, 1), *arguments) == 2 * forward


def test_a_loop_counts_once_a_round_and_unused_results_do_not_count():
    def fn(x, w):
        jnp.sin(x) @ w
        return jax.lax.map(lambda row: row[None] @ w, x)

    assert flops_of(fn, shaped(5, 7), shaped(7, 3)) == 5 * 2 * 7 * 3


def test_the_body_of_a_shard_map_counts_once_a_device():
    mesh = make_mesh(-1, jax.device_count())
    spec = jax.sharding.PartitionSpec('data')
    fn = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    rows = 4 * jax.device_count()
    assert flops_of(fn, shaped(rows, 7)) == jax.device_count() * 2 * 4 * 4 * 7


def test_the_bytes_of_a_device_add_up_and_decide_whether_a_program_fits():
    def fn(x, y):
        return {'sum': jnp.sort(x + y), 'rows': x[:7]}

    arguments = on_devices((shaped(1000), shaped(1000)), local_mesh(1))
    traced = jax.jit(fn, donate_argnums=0).trace(*arguments)
    parts = {'parameters': costs.bytes_on_device(arguments)}
    assert parts == {'parameters': 2 * 4 * 1000}
    found = costs.compile_program(traced, HERE, parts, {'next_batch': 12})
    memory = traced.lower().compile().memory_analysis()
    expected = memory.argument_size_in_bytes + memory.output_size_in_bytes
    expected += memory.temp_size_in_bytes - memory.alias_size_in_bytes + 12
    expected += memory.generated_code_size_in_bytes
    total = found['bytes'].pop('total')
    assert total == expected == sum(found['bytes'].values())
    for memory, fits in ((total, True), (total - 1, False)):
        small = replace(HERE, memory=memory)
        assert costs.compile_program(traced, small, parts, {'next_batch': 12})['fits'] == fits


@pytest.mark.parametrize(
    'message, expected',
    [
        (
            'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
            'temporaries (1.75T) exceeds available HBM (15.75G).',
            1.75 * 2**40,
        ),
        (
            'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory '
            'space hbm. Used 18.31G of 15.75G hbm. Exceeded hbm capacity by 2.56G.\n\nTotal hbm',
            18.31 * 2**30,
        ),
        ('RESOURCE_EXHAUSTED: something else', None),
    ],
)
def test_a_program_that_the_compiler_finds_too_large_does_not_fit(message, expected):
    def compile(**options):
        raise jax.errors.JaxRuntimeError(message)

    traced = SimpleNamespace(
        jaxpr=jax.make_jaxpr(lambda x: x @ x)(shaped(3, 3)),
        lower=lambda: SimpleNamespace(compile=compile),
    )
    found = costs.compile_program(traced, HERE, {'parameters': 5}, {})
    assert not found['fits'] and found['flops'] == 54
    assert found['bytes']['total'] == (expected and round(expected))
    assert found['message'] == message.partition('\n')[0]


def test_a_split_array_counts_the_part_on_one_device():
    mesh = make_mesh(-1, jax.device_count())
    rows = 4 * jax.device_count()
    whole = shaped(rows, 3, sharding=replicated(mesh))
    split = shaped(rows, 3, dtype=jnp.uint8, sharding=split_batch(mesh))
    assert costs.bytes_on_device([whole, split]) == rows * 3 * 4 + 4 * 3


def test_the_estimate_is_cycles_over_clock():
    machine = replace(HERE, peak=2e12, clock=1e9)
    # 5 ms; 2 GFLOP in 5 ms are 0.4 TFLOP/s of 2
    assert costs.estimate(5_000_000, 2e9, 16, machine) == {
        'estimate': {
            'seconds': pytest.approx(5e-3),
            'images_per_second': pytest.approx(3200),
            'share_of_peak': pytest.approx(0.2),
        }
    }
    assert costs.estimate(None, 2e9, 16, machine) == {}
    assert costs.estimate(5_000_000, 2e9, 16, HERE) == {}
