"""The dry run: figures against hand-made programs, and the command line."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import scale
from psp_jax.config_check import resolve
from psp_jax.dry_run import costs, examine, text, topology
from psp_jax.dry_run.topology import GIB, Machine
from psp_jax.errors import UserError
from psp_jax.inference import protocols
from psp_jax.inference.programs import make_programs
from psp_jax.main import main
from psp_jax.mesh import local_mesh, make_mesh, on_devices, replicated, split_batch
from psp_jax.model import pspnet
from psp_jax.model.layers import conv
from psp_jax.state import init_variables

SMALL = {
    'batch_size': 8,
    'data.classes': '10',
    'data.crop': 65,
    'model.depth': 18,
    'model.stem': 'deep_small',
    'model.head_width': 16,
    'model.aux_width': 8,
    'eval.batch_size': 2,
}
HERE = Machine(jax.local_devices(), 4 * GIB)


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def flops_of(fn, *arguments):
    return costs.flops(jax.jit(fn).trace(*arguments).jaxpr.jaxpr)


# ---- FLOPs


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
def test_a_convolution_costs_the_same_in_each_of_its_gradients(stride, size):
    def loss(x, kernel):
        return jnp.sum(conv(x, kernel, stride) ** 2)

    arguments = shaped(2, 9, 9, 4), shaped(size, size, 4, 8)
    forward = flops_of(loss, *arguments)
    assert flops_of(jax.grad(loss, (0, 1)), *arguments) == 3 * forward
    assert flops_of(jax.grad(loss, 1), *arguments) == 2 * forward


def test_a_loop_counts_as_often_as_it_runs_and_unused_results_not_at_all():
    def fn(x, w):
        jnp.sin(x) @ w  # nobody takes it
        return jax.lax.map(lambda row: row[None] @ w, x)

    assert flops_of(fn, shaped(5, 7), shaped(7, 3)) == 5 * 2 * 7 * 3


def test_what_each_device_runs_counts_once_a_device():
    mesh = make_mesh(-1, jax.device_count())
    specs = jax.sharding.PartitionSpec('data')
    fn = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=specs, out_specs=specs)
    rows = 4 * jax.device_count()
    assert flops_of(fn, shaped(rows, 7)) == jax.device_count() * 2 * 4 * 4 * 7


# ---- The text of compiled programs

LOOPS = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %v = f32[8]{0} get-tuple-element(%p), index=1
  %fused = f32[8]{0} fusion(%v), kind=kLoop, calls=%add, backend_config={"estimated_cycles":"7"}
  %reduced = f32[8]{0} all-reduce(%fused), channel_id=1, to_apply=%add
  ROOT %out = (s32[], f32[8]{0}) tuple(%v, %reduced)
}

%inner_condition (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[8]{0:T(128)}, /*index=2*/s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%q), index=0
  %limit = s32[]{:T(128)} constant(4)
  ROOT %less = pred[] compare(%i, %limit), direction=LT, metadata={op_name="while/cond/lt"}
}

%outer_body (r: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = (s32[], f32[8]{0}) parameter(0)
  %first = s32[] constant(1)
  %copied = s32[]{:T(128)} copy(%first)
  %w = f32[8]{0} get-tuple-element(%r), index=1
  %start = (s32[], f32[8]{0}) tuple(%copied, %w)
  ROOT %while.1 = (s32[], f32[8]{0}) while(%start), condition=%inner_condition, body=%inner_body
}

%outer_condition (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[], f32[8]{0}) parameter(0)
  ROOT %wrapped = pred[] fusion(%s), kind=kLoop, calls=%add
}

ENTRY %main (a: f32[8], b: s32[]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = s32[] parameter(1)
  %t = (s32[], f32[8]{0}) tuple(%b, %a)
  %while.2 = (s32[], f32[8]{0}) while(%t), condition=%outer_condition, body=%outer_body, \
backend_config={"known_trip_count":{"n":"5"}}
  %c = f32[8]{0} get-tuple-element(%while.2), index=1
  ROOT %d = f32[8]{0} negate(%c), backend_config={"window_config":{"estimated_cycles":"100"}}
}
"""


def test_cycles_and_collectives_count_as_often_as_their_loops_run():
    # 5 rounds of a loop that counts from 1 to 4
    found = costs.cost(LOOPS)
    assert found.cycles == 5 * 3 * 7 + 100
    assert found.collectives == {'all-reduce': (15, 15 * 32)}
    assert found.unknown_loops == 0


def test_a_loop_of_unknown_length_is_counted_once_and_told():
    unknown = costs.cost(
        LOOPS.replace('%copied = s32[]{:T(128)} copy(%first)', '%copied = s32[] negate(%first)')
    )
    assert unknown.unknown_loops == 1
    assert unknown.collectives['all-reduce'].calls == 5


def test_collectives_count_what_goes_in_or_what_comes_out_whichever_is_more():
    text = """\
HloModule m

%wrapped (p: bf16[16,2]) -> bf16[4,2] {
  %p = bf16[16,2]{1,0} parameter(0)
  ROOT %rs = bf16[4,2]{1,0} reduce-scatter(%p), channel_id=3, dimensions={0}
}

ENTRY %main (a: f32[2,3]) -> f32[8,3] {
  %a = f32[2,3]{1,0} parameter(0)
  %ags = (f32[2,3]{1,0}, f32[8,3]{1,0:T(8,128)}) all-gather-start(%a), dimensions={0}
  %ag = f32[8,3]{1,0} all-gather-done(%ags)
  %cps = (f32[2,3]{1,0}, f32[2,3]{1,0}, u32[], u32[]) collective-permute-start(%a), channel_id=2
  %cp = f32[2,3]{1,0} collective-permute-done(%cps)
  %b = s64[3]{0} parameter(1)
  %ar = (f32[2,3]{1,0}, s64[3]{0}) all-reduce-start(%a, %b), channel_id=1
  %ard = (f32[2,3]{1,0}, s64[3]{0}) all-reduce-done(%ar)
  %h = bf16[16,2]{1,0} parameter(2)
  %as = ((bf16[16,2]{1,0}), bf16[4,2]{1,0}) async-start(%h), calls=%wrapped
  %ad = bf16[4,2]{1,0} async-done(%as)
  ROOT %r = f32[8,3]{1,0} copy(%ag)
}
"""
    assert costs.cost(text) == costs.Cost(
        {
            'all-gather': costs.Collective(1, 8 * 3 * 4),
            'all-reduce': costs.Collective(1, 2 * 3 * 4 + 3 * 8),
            'collective-permute': costs.Collective(1, 2 * 3 * 4 + 8),
            'reduce-scatter': costs.Collective(1, 16 * 2 * 2),
        },
        None,
        0,
    )


def test_the_text_of_a_real_program_is_understood():
    def fn(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c) @ c, None), x, None, length=11)[0]

    text = jax.jit(fn).lower(shaped(4, 4)).compile().as_text()
    runs, unknown = costs._runs(costs._computations(text))
    assert unknown == 0 and 11 in runs.values()


# ---- Memory


def test_the_bytes_of_a_device_add_up_and_decide_whether_it_fits():
    def fn(x, y):
        return {'sum': jnp.sort(x + y), 'rows': x[:7]}

    arguments = on_devices((shaped(1000), shaped(1000)), local_mesh(1))
    traced = jax.jit(fn, donate_argnums=0).trace(*arguments)
    parts = {'parameters': examine.bytes_on_device(arguments)}
    extra = {'next_batch': 12}
    found = examine.examine(traced, HERE, parts, extra)
    memory = traced.lower().compile().memory_analysis()
    assert found['bytes']['parameters'] == 2 * 4 * 1000
    expected = memory.argument_size_in_bytes + memory.output_size_in_bytes
    expected += memory.temp_size_in_bytes - memory.alias_size_in_bytes + 12
    expected += memory.generated_code_size_in_bytes
    total = found['bytes']['total']
    assert total == expected == sum(v for k, v in found['bytes'].items() if k != 'total')
    assert found['fits']
    assert examine.examine(traced, HERE._replace(memory=total), parts, extra)['fits']
    assert not examine.examine(traced, HERE._replace(memory=total - 1), parts, extra)['fits']


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
def test_a_program_that_the_compiler_finds_too_large_is_a_result(message, expected):
    def compile(**options):
        raise jax.errors.JaxRuntimeError(message)

    traced = SimpleNamespace(
        jaxpr=jax.make_jaxpr(lambda x: x @ x)(shaped(3, 3)),
        lower=lambda: SimpleNamespace(compile=compile),
    )
    found = examine.examine(traced, HERE, {'parameters': 5}, {})
    assert not found['fits'] and found['flops'] == 54
    assert found['bytes']['total'] == (expected and round(expected))
    assert found['message'] == message.partition('\n')[0]


def test_parameters_are_counted_as_the_network_has_them():
    config = resolve(SMALL)
    variables = jax.eval_shape(lambda: init_variables(pspnet.build(config), 0))
    run = examine.plan(config, HERE)
    found = examine.describe(run, 'small', None)
    assert found['parameters'] == sum(x.size for x in jax.tree.leaves(variables['params']))
    assert {x.shape for x in jax.tree.leaves(run.state.opt_state)} == {
        x.shape for x in jax.tree.leaves(variables['params'])
    }


def test_a_split_array_takes_its_part_of_each_device():
    mesh = make_mesh(-1, jax.device_count())
    rows = 4 * jax.device_count()
    whole = jax.ShapeDtypeStruct((rows, 3), jnp.float32, sharding=replicated(mesh))
    split = jax.ShapeDtypeStruct((rows, 3), jnp.uint8, sharding=split_batch(mesh))
    assert examine.bytes_on_device([whole, split]) == rows * 3 * 4 + 4 * 3


# ---- Estimates


def test_the_estimate_is_cycles_over_clock():
    machine = HERE._replace(peak=2e12, clock=1e9)
    found = examine.speed({'flops': 8e9, 'cycles': 5_000_000}, 16, 4, machine)
    # 5 ms; 2 GFLOP on each of 4 devices in 5 ms are 0.4 TFLOP/s of 2
    assert found['flops_per_image'] == 5e8
    assert found['estimate']['seconds'] == pytest.approx(5e-3)
    assert found['estimate']['images_per_second'] == pytest.approx(3200)
    assert found['estimate']['share_of_peak'] == pytest.approx(0.2)
    assert 'estimate' not in examine.speed({'flops': 8e9, 'cycles': None}, 16, 4, machine)
    assert 'estimate' not in examine.speed({'flops': 8e9, 'cycles': 1}, 16, 4, HERE)


# ---- What is compiled


@pytest.mark.parametrize('protocol', ['whole', 'semseg', 'mmseg_slide'])
def test_the_arguments_in_evaluation_are_those_of_real_images(protocol):
    config = resolve(
        SMALL | {'eval.protocol': protocol, 'eval.base_size': 130, 'eval.batch_size': 3}
    )
    seen = []

    def apply(variables, images, train, sizes):
        seen.append((images.shape, None if sizes is None else sizes.shape))
        return jnp.zeros((len(images), *(-(-n // 8) for n in images.shape[1:3]), 10)), None

    programs = make_programs(config, SimpleNamespace(apply=apply, classes=10), local_mesh(1))
    blocks = protocols.blocks(np.zeros((80, 130, 3), np.uint8), config, 10)
    programs.fields({}, blocks)
    real = seen.copy()
    (part,) = blocks[0].parts
    programs.network.clear_cache()
    programs.network.trace({}, *programs.arguments(part.shape, len(part.sources)))
    assert seen == 2 * real
    if protocol == 'semseg':  # 2 x 3 windows, 3 a call, each with its mirror image
        assert real[0][0] == (6, 65, 65, 3)


@pytest.mark.parametrize(
    'changes, size',
    [
        ({'data.classes': 'cityscapes', 'eval.base_size': 2048}, (1024, 2048)),
        ({'eval.base_size': 512}, (512, 512)),
        ({'data.crop': (65, 97)}, (65, 97)),
    ],
)
def test_the_size_of_an_image_in_evaluation(changes, size):
    assert examine.image_size(resolve(SMALL | changes))[0] == size


@pytest.mark.parametrize('protocol', ['whole', 'mmseg', 'mmseg_slide'])
@given(height=st.integers(60, 1500), ratio=st.floats(0.25, 4))
def test_no_image_in_evaluation_leads_to_a_larger_input(protocol, height, ratio):
    config = resolve(SMALL | {'eval.protocol': protocol, 'eval.base_size': 512})

    def area(size):
        views = protocols.views(size, config)
        return max(math.prod(protocols.window_shape(view, config)) for view in views)

    assert area((height, round(height * ratio))) <= area(examine.image_size(config)[0])


def test_the_first_batch_is_read_where_the_data_are(photographs):
    data = {'data.root': str(photographs), 'data.train': 'train.txt'}
    found = examine.read_batch(resolve(SMALL | data))
    assert found['read'] and found['images'] == 5 and found['shape'] == [8, 65, 65, 3]
    assert text.data_line(found).startswith('data: 5 training images; the first batch, 8 x 65')


def test_data_that_are_not_there_are_no_error():
    found = examine.read_batch(resolve(SMALL | {'data.root': 'nowhere', 'data.train': 'train.txt'}))
    assert not found['read']
    line = text.data_line(found)
    assert line == 'data: not there to be tried (nowhere/train.txt does not exist)'


# ---- Text and JSON

FIGURES = {
    'bytes': {'parameters': 3 * 2**20, 'activations': 5 * GIB // 4, 'total': GIB},
    'flops': 32_000_000_000,
    'flops_per_image': 4_000_000_000,
    'fits': True,
    'collectives': {'all-reduce': {'count': 12, 'bytes': 7 * 2**20}},
    'cycles': 1_234_567,
    'unknown_loops': 0,
    'compile_seconds': 61.0,
    'estimate': {'seconds': 0.0125, 'images_per_second': 640.0, 'share_of_peak': 0.257},
}
EVALUATION = FIGURES | {
    'collectives': {},
    'fits': False,
    'bytes': {'parameters': 3 * 2**20, 'canvases': 1000, 'total': 17 * GIB},
    'protocol': 'whole',
    'image': [80, 90],
    'image_is': 'why not',
    'input': [4, 81, 89, 3],
    'windows': 1,
}


@pytest.fixture
def figures(monkeypatch):
    """Puts figures in the place of those of compiled programs."""
    monkeypatch.setattr(examine, 'train_report', lambda *_: dict(FIGURES))
    monkeypatch.setattr(examine, 'evaluate_report', lambda *_: dict(EVALUATION))
    monkeypatch.setattr(topology, 'machine', lambda name: HERE._replace(remark='so it is'))


def test_the_json_has_the_figures_that_are_printed(figures, tmp_path, capsys):
    output = tmp_path / 'figures.json'
    examine.dry_run(resolve(SMALL), 'small', None, str(output))
    found = json.loads(output.read_text())
    lines = capsys.readouterr().out.splitlines()
    assert found['train'] == FIGURES and found['evaluate'] == EVALUATION
    assert not found['fits'] and found['memory'] == 4 * GIB
    assert f'{found["parameters"]:,} parameters' in lines[0]
    rows = {
        re.split(r'\s{2,}', line.strip())[0]: re.split(r'\s{2,}', line.strip())[1:]
        for line in lines
    }
    assert rows['FLOPs an image'] == ['4.0 G', '4.0 G']
    assert rows['input'] == ['8 x 65 x 65', '4 x 81 x 89']
    assert rows['parameters'] == ['3.0 MiB', '3.0 MiB']
    assert rows['activations'] == ['1.25 GiB', '-'] and rows['canvases'] == ['-', '1000 B']
    assert rows['total'] == ['1.00 GiB', '17.00 GiB'] and rows['of'] == ['4.00 GiB'] * 2
    assert rows['fits'] == ['yes', 'no']
    assert rows['all-reduce'] == ['12 x, 7.0 MiB', '0 x, 0 B']
    assert rows['cycles'] == ['1,234,567'] * 2
    assert rows['time of a call'] == ['12.5 ms'] * 2
    assert rows['images a second'] == ['640.0'] * 2
    assert rows['share of the peak'] == ['25.7%'] * 2
    assert rows['compiled in'] == ['1m01s'] * 2
    assert 'note: so it is' in lines
    assert lines[-2] == 'does not fit: evaluation needs 17.00 GiB of 4.00 GiB a device'
    assert lines[-1] == f'written to {output}'


def test_a_file_that_cannot_be_written_is_an_error_of_the_users(figures, tmp_path):
    with pytest.raises(UserError, match='cannot be written'):
        examine.dry_run(resolve(SMALL), 'small', None, str(tmp_path / 'no' / 'figures.json'))


def test_the_tables_of_the_docs_are_those_of_the_results():
    root = Path(__file__).parents[1]
    text = (root / 'docs' / 'scale.md').read_text()
    assert scale.with_tables(text, root / 'benchmarks' / 'results' / 'scale') == text


def test_a_row_of_the_tables_has_the_figures_of_its_file(tmp_path):
    row = scale.Row('ade20k', 50, 'v5e:2x4')
    found = {
        'batch_size': 16,
        'mesh': {'data': 4, 'space': 2},
        'memory': 4 * GIB,
        'fits': False,
        'dtype': 'bfloat16',
        'train': FIGURES,
        'evaluate': EVALUATION,
    }
    last = scale.table((row,), tmp_path).splitlines()[-1]
    assert last.startswith('| ade20k | 50 | `v5e:2x4` | not run |')
    (tmp_path / f'{row.name}.json').write_text(json.dumps(found))
    assert scale.table((row,), tmp_path).splitlines()[-1] == (
        '| ade20k | 50 | `v5e:2x4`, space 2 | bfloat16 | 2 | 4 | 1.00 of 4.00 | **no** '
        '| 12 x, 7 MiB | 12 | 640 | 26% | 17.00 | 640 | 122 s |'
    )


# ---- Errors


@pytest.mark.parametrize('name', ['v9:2x2', 'v5e', 'h100:x', 'v5e:2x', 'cpu:8', 'h100:0'])
def test_a_topology_that_is_not_known_is_told_with_those_that_are(name):
    with pytest.raises(UserError) as error:
        topology.machine(name)
    assert str(error.value) == (
        f'--topology={name} is not known; there are v4, v5e, v5p, v6e by the shape of their slices '
        '(v5e:2x4, v4:2x2x4) and a100-40gb, a100, h100, h200, b200 by cards (h100:8) or hosts x '
        'cards (h100:2x8)'
    )


@pytest.mark.parametrize('name, extra', [('v5e:2x4', 'jax[tpu]'), ('h100:8', 'jax[cuda13]')])
def test_a_missing_compiler_is_told_with_the_way_to_install_it(name, extra, monkeypatch, capsys):
    monkeypatch.setattr(topology.importlib.util, 'find_spec', lambda name: None)
    monkeypatch.chdir(Path(__file__).parents[1])
    words = ['--mode', 'dry_run', '--config', 'configs/scenes.py', '--topology', name]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'psp_jax: error: --topology={name} needs the ')
    assert error.endswith(f"pip install '{extra}'\n") and error.count('\n') == 1


def test_a_batch_that_does_not_divide_over_the_devices_is_an_error():
    devices = [SimpleNamespace(process_index=i // 4, device_kind='a') for i in range(12)]
    with pytest.raises(UserError, match='batch_size=8 does not divide over mesh.data=12'):
        examine.plan(resolve(SMALL), HERE._replace(devices=devices))


@pytest.mark.parametrize(
    'words, message',
    [
        ('--mode dry_run', '--mode dry_run needs --config'),
        ('--mode dry_run --workdir r', '--mode dry_run needs --config'),
        ('--config configs/scenes.py --topology v5e:2x4', '--topology NAME goes together with'),
        ('--mode dry_run --config c.py --checkpoint best', 'a dry run touches none'),
    ],
)
def test_flags_that_do_not_go_together(words, message, capsys):
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err


# ---- The whole command


def run(python, words, folder):
    """Runs the dry run with JSON; returns its figures, and its lines."""
    output = folder / 'figures.json'
    process = python('-m', 'psp_jax.main', '--mode', 'dry_run', *words, '--output', output)
    assert process.returncode == 0, process.stderr
    assert 'Traceback' not in process.stderr  # a slow machine makes XLA complain of slowness
    return json.loads(output.read_text()), process.stdout.splitlines()


@pytest.mark.slow
def test_the_command_line_says_what_a_run_needs_and_makes_nothing(small_config, python, tmp_path):
    workdir = tmp_path / 'run'
    found, lines = run(python, ['--config', small_config, '--workdir', workdir], tmp_path)
    assert found['fits'] and lines[-2].startswith('fits: ')
    assert found['data']['read'] and found['data']['images'] == 5
    for name in ('train', 'evaluate'):
        program = found[name]
        assert program['bytes']['total'] == sum(
            v for k, v in program['bytes'].items() if k != 'total'
        )
        assert program['flops_per_image'] > 1e8 and program['compile_seconds'] > 0
    parameters = found['train']['bytes']['parameters']
    assert parameters == 4 * found['parameters'] == found['train']['bytes']['optimizer']
    assert not workdir.exists()


def topology_run(python, config, name, folder, *more):
    words = ['--config', config, '--topology', name, '--config.batch_size=8', *more]
    found, lines = run(python, [*words, '--config.dtype=bfloat16'], folder)
    assert found['fits'] and found['topology'] == name
    # gradients, in bfloat16 where the kernels are, loss and statistics are summed over all devices
    exchanged = found['train']['collectives']['all-reduce']['bytes']
    assert 2 * found['parameters'] <= exchanged < 4.1 * found['parameters'] + 2**20
    assert found['evaluate']['collectives'] == {}
    return found, lines


@pytest.mark.topology
def test_a_tpu_slice_without_a_tpu(small_config, python, tmp_path):
    pytest.importorskip('libtpu', reason='libtpu is not installed; make test-topology installs it')
    found, _ = topology_run(python, small_config, 'v5e:2x4', tmp_path)
    assert (found['devices'], found['processes']) == (8, 2)
    assert set(found['train']['collectives']) == {'all-reduce'}
    assert found['train']['unknown_loops'] == 0
    for program in (found['train'], found['evaluate']):
        assert 0 < program['estimate']['share_of_peak'] < 1


@pytest.mark.topology
def test_cards_without_a_card(small_config, python, tmp_path):
    reason = 'jax[cuda13] is not installed; make test-topology installs it'
    pytest.importorskip('jax_cuda13_plugin', reason=reason)
    words = ('--config.mesh.space=2', '--config.data.crop=65')
    found, lines = topology_run(python, small_config, 'h100:2x4', tmp_path, *words)
    assert (found['devices'], found['processes']) == (8, 2)
    assert found['mesh'] == {'data': 4, 'space': 2}
    # rows beside a cut go to the neighbour
    assert 'collective-permute' in found['train']['collectives']
    assert 'all-gather' not in found['train']['collectives']
    assert found['train']['cycles'] is None and 'estimate' not in found['train']
    assert any('the workspace of cuDNN is not counted' in line for line in lines)


# In processes of their own: libtpu does not like company.
PRODUCT = """
import json, sys
import jax, jax.numpy as jnp
from psp_jax import costs, dry_run, topology
from psp_jax.mesh import make_mesh, on_devices

name, size = sys.argv[1], int(sys.argv[2])
machine = topology.machine(name)
mesh = make_mesh(1, 1, devices=machine.devices[:1])
x = on_devices(jax.ShapeDtypeStruct((size, size), jnp.bfloat16), mesh)
product = jax.jit(lambda x: jnp.sort(x @ x) if size > 10**5 else x @ x)
found = dry_run.examine(product.trace(x), machine, {}, {})
found['per_cycle'] = machine.peak / machine.clock if machine.peak else None
print(json.dumps(found))
"""


def product(name, size):
    words = [sys.executable, '-c', PRODUCT, name, str(size)]
    process = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.topology
@pytest.mark.parametrize('name', ['v4:2x2x1', 'v5e:1x1', 'v5p:2x2x1', 'v6e:2x2'])
def test_a_large_matrix_product_comes_near_the_peak_of_each_tpu(name):
    pytest.importorskip('libtpu', reason='libtpu is not installed; make test-topology installs it')
    found = product(name, 8192)
    assert found['flops'] == 2 * 8192**3
    assert 0.6 < found['flops'] / found['cycles'] / found['per_cycle'] <= 1


@pytest.mark.topology
def test_what_the_tpu_compiler_refuses_for_its_size_does_not_fit():
    pytest.importorskip('libtpu', reason='libtpu is not installed; make test-topology installs it')
    found = product('v5e:1x1', 400_000)
    assert not found['fits'] and found['bytes']['total'] > 2 * 400_000**2


@pytest.mark.topology
@pytest.mark.parametrize('name', ['a100-40gb:1', 'a100:8', 'h200:8', 'b200:2x8'])
def test_each_card_is_compiled_for(name):
    reason = 'jax[cuda13] is not installed; make test-topology installs it'
    pytest.importorskip('jax_cuda13_plugin', reason=reason)
    assert product(name, 512)['fits']


@pytest.mark.topology
def test_a_shape_that_no_slice_has_is_an_error_of_the_users():
    pytest.importorskip('libtpu', reason='libtpu is not installed; make test-topology installs it')
    words = ['-m', 'psp_jax.main', '--mode', 'dry_run', '--config', 'configs/scenes.py']
    process = subprocess.run(
        [sys.executable, *words, '--topology', 'v5e:3x3'],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.returncode == 2
    assert process.stderr.startswith('psp_jax: error: --topology=v5e:3x3: the compiler does not ')
