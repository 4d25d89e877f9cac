"""Runs of several processes, real ones on this machine: equal results, and what they are told."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import made_once
from several import LITTLE_OPTIMISATION, flags_of_processes, free_port

from psp_jax.command_line import PREEMPTED
from psp_jax.errors import UserError
from psp_jax.main import main
from psp_jax.runtime import preemption

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def results(programs, shared):
    """What 1 x 8, 2 x 4 and 4 x 2 (processes x devices) come to, and what the first one prints."""
    folder = made_once(shared / 'processes', lambda folder: train_in_processes(folder, programs))
    return {
        count: (dict(np.load(folder / f'{count}.npz')), (folder / f'{count}.txt').read_text())
        for count in (1, 2, 4)
    }


def train_in_processes(folder, programs):
    folder.mkdir()
    for count in (1, 2, 4):
        started = []
        for words in flags_of_processes(count):
            command = [sys.executable, 'tests/processes_worker.py', folder / f'{count}.npz', *words]
            started.append(
                subprocess.Popen(
                    [str(word) for word in command],
                    cwd=ROOT,
                    env=os.environ
                    | programs
                    | LITTLE_OPTIMISATION
                    | {'JAX_NUM_CPU_DEVICES': str(8 // count), 'PYTHONPATH': '.'},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        outputs = [process.communicate(timeout=900) for process in started]
        assert [p.returncode for p in started] == [0] * count, outputs
        (folder / f'{count}.txt').write_text(outputs[0][0])


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
def test_the_first_process_lists_all(results):
    lines = [line for line in results[4][1].splitlines() if line.startswith('process ')]
    assert [line.split(' on ')[0] for line in lines] == [f'process {i}' for i in range(4)]
    assert len({re.search(r'pid (\d+): 2 x cpu$', line)[1] for line in lines}) == 4


AT_THE_END = """
import os, signal, sys, time
from psp_jax import cluster, processes

index, address, delay = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])

def run():
    processes.start(address, 2, index)
    others = cluster.exchange(str(os.getpid()))
    if index == 0:
        time.sleep(2)  # the second has ended its work by now
        os.kill(int(others[1]), signal.SIGTERM)
        time.sleep(delay)
    return 0

with processes.listening(for_good=True):
    code = processes.ended(run)
if len(sys.argv) > 4:
    os.kill(os.getpid(), signal.SIGTERM)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ('delay', 'codes', 'again'),
    [(0, {0, PREEMPTED}, []), (2, {PREEMPTED}, []), (0, {0, PREEMPTED}, ['when all is over'])],
)
def test_sigterm_when_the_work_is_done_ends_all_alike(delay, codes, again):
    address = f'localhost:{free_port()}'
    started = [
        subprocess.Popen([sys.executable, '-c', AT_THE_END, str(i), address, str(delay), *again])
        for i in (0, 1)
    ]
    found = {process.wait(timeout=50) for process in started}
    assert len(found) == 1 and found <= codes


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('--coordinator_address nowhere', '--coordinator_address=nowhere: must be HOST:PORT'),
        ('--num_processes 2', '--coordinator_address=None: must be HOST:PORT'),
        ('--process_id 0', '--coordinator_address=None: must be HOST:PORT'),
        (
            '--coordinator_address localhost:1 --num_processes 2 --process_id 2',
            '--process_id=2: must be from 0 to 1',
        ),
        ('--num_processes two', 'argument --num_processes: invalid int value'),
    ],
)
def test_flags_of_processes_that_do_not_fit_are_named(words, message, capsys, tmp_path):
    command = f'--config {ROOT}/configs/scenes.py --workdir {tmp_path} {words}'
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def test_modes_of_one_process_refuse_to_be_many(capsys):
    words = '--mode export --workdir x --output y.safetensors --num_processes 2'
    assert main(words.split()) == 2
    assert '--mode export runs in one process' in capsys.readouterr().err


def test_environment_variables_stand_for_the_flags(monkeypatch):
    monkeypatch.setenv('JAX_NUM_PROCESSES', 'many')
    with pytest.raises(UserError, match='JAX_NUM_PROCESSES=many: must be a number'):
        preemption.start(None, None, None)
    monkeypatch.setenv('JAX_NUM_PROCESSES', '1')
    preemption.start(None, None, None)  # alone
