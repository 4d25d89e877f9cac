"""Several processes together compute what one process with all their devices computes."""

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import made_once
from several import LITTLE_OPTIMISATION, Processes, flags_of_processes

from psp_jax.main import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def results(programs, shared):
    """The arrays of 1 x 8, 2 x 4 and 4 x 2 (processes x devices), and what process 0 prints."""

    def make(folder):
        folder.mkdir()
        for count in (1, 2, 4):
            command = ['tests/processes_worker.py', folder / f'{count}.npz']
            places = flags_of_processes(count) if count > 1 else [[]]
            devices = {'JAX_NUM_CPU_DEVICES': str(8 // count)}
            run = Processes(
                folder / f'logs {count}',
                [[*command, *place] for place in places],
                programs | LITTLE_OPTIMISATION | devices,
            )
            assert run.codes(900) == [0] * count, run.text()
            (folder / f'{count}.txt').write_text(run.text())

    folder = made_once(shared / 'processes', make)
    return {
        count: (dict(np.load(folder / f'{count}.npz')), (folder / f'{count}.txt').read_text())
        for count in (1, 2, 4)
    }


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 4])
def test_processes_together_equal_one_with_all_devices(results, count, measured):
    """Losses, parameters, statistics and momentum to rounding of float64; evaluation exactly."""
    one, several = results[1][0], results[count][0]
    assert one['devices'] == several['devices'] == 8
    assert one.keys() == several.keys() and len(one) > 100
    worst = 0.0
    for name in one.keys() - {'confusion', 'each', 'devices'}:
        scale = np.abs(one[name]).max() + 1e-12
        worst = max(worst, float(np.abs(one[name] - several[name]).max() / scale))
    measured(f'1 x 8 against {count} x {8 // count}', worst, 1e-6)
    np.testing.assert_array_equal(one['confusion'], several['confusion'])
    np.testing.assert_array_equal(one['each'], several['each'])


@pytest.mark.slow
def test_process_0_lists_all_processes(results):
    lines = [line for line in results[4][1].splitlines() if re.match(r'process \d on ', line)]
    assert [line.split(' on ')[0] for line in lines] == [f'process {i}' for i in range(4)]
    assert len({re.search(r'pid (\d+): 2 x cpu$', line)[1] for line in lines}) == 4


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('--coordinator_address nowhere', '--coordinator_address=nowhere: must be HOST:PORT'),
        ('--coordinator_address a:1', '--coordinator_address needs --num_processes and'),
        ('--num_processes 2', '--coordinator_address=None: must be HOST:PORT'),
        (
            '--coordinator_address localhost:1 --num_processes 2 --process_id 2',
            '--process_id=2: must be from 0 to 1',
        ),
        ('--num_processes two', 'argument --num_processes: invalid int value'),
        ('--mode export --output y.safetensors --num_processes 2', 'is for --mode train or eval'),
    ],
)
def test_flags_of_processes_that_do_not_fit_are_named(words, message, capsys, tmp_path):
    command = f'--config {ROOT}/configs/scenes.py --workdir {tmp_path} {words}'
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def test_environment_variables_stand_for_the_flags(monkeypatch, capsys):
    monkeypatch.setenv('JAX_NUM_PROCESSES', 'many')
    assert main(['--config', f'{ROOT}/configs/scenes.py']) == 2
    assert "argument --num_processes: invalid int value: 'many'" in capsys.readouterr().err
