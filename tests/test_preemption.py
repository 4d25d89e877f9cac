"""Promise 5, with real processes and real signals."""

import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
from several import Processes, flags_of_processes, free_port
from test_resume import arrays_in, assert_same_arrays

from psp_jax.command_line import INTERRUPTED, NOT_JOINED, PREEMPTED

slow = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings('ignore:Sharding info not provided')
TWO_MINUTES = 120


@pytest.fixture
def start(small_config, programs, tmp_path):
    """Starts a run of `small_config` in `tmp_path/run`, or of `config`; None: of its checkpoint."""
    started = []

    def run(*overrides, count=1, devices=1, workdir=tmp_path / 'run', config=small_config):
        words = ['-m', 'psp_jax.main', '--workdir', workdir, *overrides]
        words += ['--config', config] if config else []
        places = flags_of_processes(count) if count > 1 else [[]]
        environment = programs | {'JAX_NUM_CPU_DEVICES': str(devices)}
        folder = tmp_path / f'start {len(started)}'
        started.append(Processes(folder, [[*words, *place] for place in places], environment))
        return started[-1]

    yield run
    for processes in started:
        processes.kill()


def steps_in(workdir):
    folder = workdir / 'checkpoints'
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def last_step(text):
    return int(re.findall(r'^step +(\d+)/', text, re.M)[-1])


def assert_finished_like(workdir, straight):
    """The last checkpoint, the losses and the evaluations are those of an uninterrupted run."""
    assert_same_arrays(workdir / 'checkpoints/10', straight / 'checkpoints/10')
    for name in ('eval/10-whole/metrics.json', 'eval/5-whole/metrics.json'):
        mine, theirs = (json.loads((path / name).read_text()) for path in (workdir, straight))
        assert {**mine, 'seconds': 0} == {**theirs, 'seconds': 0}
    mine, theirs = (
        [
            (line['step'], line.get('loss'))
            for line in map(json.loads, (path / 'metrics.jsonl').read_text().splitlines())
        ]
        for path in (workdir, straight)
    )
    assert mine == theirs


@slow
def test_nothing_is_lost(start, trained, tmp_path):
    """Promise 5: SIGTERM at start-up, in training and in an evaluation, and Ctrl-C in training.

    Each ends with its exit code and a checkpoint of the last step. The last run ends with the bits
    of the run that nothing interrupted.
    """
    workdir = tmp_path / 'run'
    run = start()
    run.await_text('psp_jax')
    run.send()
    assert run.codes() == [PREEMPTED] and 'stopped before the first step' in run.text()
    assert steps_in(workdir) == []

    run = start()
    run.await_text(r'^step +2/10')
    run.send(signal.SIGINT)
    assert run.codes() == [INTERRUPTED]
    (step,) = steps_in(workdir)
    assert int(step) == last_step(run.text()) and 2 <= int(step) <= 5
    assert f'stopped by Ctrl-C; step {step} is saved. To continue: ' in run.text()
    assert f'python -m psp_jax.main --workdir {workdir}\n' in run.text()

    run = start(config=None)  # as the line above says
    run.await_text(r'^step +5/10')
    run.send()  # in the evaluation, or just before it
    assert run.codes() == [PREEMPTED] and f'continuing from step {step} ' in run.text()
    assert 'stopped by SIGTERM; step ' in run.text() and 'step 5  mIoU' in run.text()

    assert start().codes() == [0]
    assert_finished_like(workdir, trained.workdir)


@slow
def test_an_evaluation_that_was_cut_off_is_made_up_for(start, trained, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(trained.workdir, workdir)
    shutil.rmtree(workdir / 'checkpoints/10/metrics')
    (workdir / 'checkpoints/5/metrics/metrics').write_text('{"mIoU": 0.')
    run = start()
    assert run.codes() == [0] and 'step 10  mIoU' in run.text()
    assert (workdir / 'checkpoints/10/metrics/metrics').exists()
    assert_finished_like(workdir, trained.workdir)


@slow
def test_two_processes_stop_at_the_same_step(start, tmp_path):
    """SIGTERM to one of them, then Ctrl-C to both, then SIGTERM before the first step."""
    workdir, straight = tmp_path / 'run', tmp_path / 'straight'
    assert start(count=2, workdir=straight).codes() == [0, 0]
    steps = []
    for sent, to, code in (
        (signal.SIGTERM, (1,), PREEMPTED),
        (signal.SIGINT, (0, 1), INTERRUPTED),
    ):
        run = start(count=2)
        run.await_text(r'^step +\d+/10')
        run.send(sent, *to)
        assert run.codes() == [code, code]
        steps.append(last_step(run.text()))
        assert str(steps[-1]) in steps_in(workdir)
        assert f'step {steps[-1]} is saved' in run.text(0) and 'saved' not in run.text(1)
    assert steps[0] < steps[1] < 10
    run = start(count=2)
    run.await_text('parameters')
    run.send()
    assert run.codes() == [PREEMPTED, PREEMPTED] and 'before the first step' in run.text()
    assert start(count=2).codes() == [0, 0]
    assert_finished_like(workdir, straight)


@slow
def test_two_processes_go_on_from_the_checkpoint_before_a_damaged_one(start, trained, tmp_path):
    shutil.copytree(trained.workdir, tmp_path / 'run')
    for file in (tmp_path / 'run/checkpoints/10/state').rglob('*'):
        if file.is_file():
            file.write_bytes(b'')
    run = start(count=2)
    assert run.codes() == [0, 0]
    assert 'continuing from step 5' in run.text() and 'Traceback' not in run.text(0) + run.text(1)
    assert run.text().count('skipped, and renamed to 10.damaged') == 1
    assert steps_in(tmp_path / 'run') == ['10', '10.damaged', '5']


@slow
@pytest.mark.parametrize(('count', 'devices'), [(1, 2), (2, 1)])
def test_a_checkpoint_goes_on_elsewhere_with_the_same_loss(
    start, trained, tmp_path, count, devices, measured
):
    """The step after a checkpoint of one device, on two devices and in two processes."""
    shutil.copytree(trained.workdir, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run/checkpoints/10')
    run = start(count=count, devices=devices)
    run.await_text(r'^step +7/10')
    run.send()
    assert run.codes() == [PREEMPTED] * count and 'continuing from step 5' in run.text()
    mine, theirs = (
        next(row for row in map(json.loads, text) if row['step'] == 6)['loss']
        for text in (
            (folder / 'metrics.jsonl').read_text().splitlines()
            for folder in (tmp_path / 'run', trained.workdir)
        )
    )
    measured(f'loss after restoring on {count} x {devices}', abs(mine / theirs - 1), 1e-5)


# ---- Signals and failures, without training


@pytest.fixture
def wait_in_steps(tmp_path):
    """Starts a run of `count` processes whose steps only wait."""
    started = []

    def run(count, seconds=0.1, fails=-1):
        places = flags_of_processes(count) if count > 1 else [[]]
        commands = [['tests/stop_worker.py', seconds, fails, *place] for place in places]
        started.append(Processes(tmp_path / 'logs', commands, {'JAX_PLATFORMS': 'cpu'}))
        return started[-1]

    yield run
    for processes in started:
        processes.kill()


@pytest.mark.parametrize(
    ('count', 'sent', 'to', 'moment', 'code'),
    [
        (1, signal.SIGTERM, (0,), 'step 3', PREEMPTED),
        (1, signal.SIGTERM, (0,), 'starting', PREEMPTED),
        (1, signal.SIGINT, (0,), 'starting', INTERRUPTED),
        (2, signal.SIGTERM, (1,), 'step 3', PREEMPTED),
        pytest.param(2, signal.SIGTERM, (0, 1), 'step 3', PREEMPTED, marks=slow),
        pytest.param(2, signal.SIGINT, (0, 1), 'step 3', INTERRUPTED, marks=slow),
        pytest.param(2, signal.SIGTERM, (0,), 'starting', PREEMPTED, marks=slow),
        pytest.param(2, signal.SIGINT, (0, 1), 'starting', INTERRUPTED, marks=slow),
    ],
)
def test_all_processes_stop_after_the_same_step(wait_in_steps, count, sent, to, moment, code):
    run = wait_in_steps(count)
    run.await_text(moment)
    run.send(sent, *to)
    assert run.codes(TWO_MINUTES) == [code] * count
    steps = [re.findall(r'^step (\d+)', run.text(which), re.M) for which in range(count)]
    assert all(each == steps[0] for each in steps) and len(steps[0]) < 100
    if moment == 'starting':
        assert not steps[0]
        assert 'stopped before the first step; run the same command again' in run.text()
    else:
        assert f'step {steps[0][-1]} is saved. To continue: python -m psp_jax.main' in run.text()
    assert 'psp_jax: stopped' not in ''.join(map(run.text, range(1, count)))


def test_a_second_ctrl_c_ends_at_once(wait_in_steps):
    run = wait_in_steps(1, seconds=100)
    run.await_text('step 1')
    run.send(signal.SIGINT)
    run.await_text('Ctrl-C again ends at once')
    run.send(signal.SIGINT)
    assert run.codes(10) == [-signal.SIGINT]  # 130 in a shell


@pytest.mark.parametrize('fails', [0, pytest.param(1, marks=slow)])
def test_an_error_of_one_process_ends_the_other(wait_in_steps, fails):
    run = wait_in_steps(2, fails=fails)
    codes = run.codes(TWO_MINUTES)
    assert codes[fails] == 2 and codes[1 - fails] not in (0, 2, PREEMPTED, INTERRUPTED)
    assert run.text(fails).endswith('psp_jax: error: a bad file\n')
    assert_says_that_another_ended(run.text(1 - fails))


@slow
@pytest.mark.parametrize('dead', [0, 1])
@pytest.mark.parametrize('sent', [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_hangs_ends_the_other(wait_in_steps, dead, sent):
    run = wait_in_steps(2)
    run.await_text('step 3')
    run.send(sent, dead)
    code = run.processes[1 - dead].wait(TWO_MINUTES)
    assert code not in (0, 2, PREEMPTED, INTERRUPTED)
    assert_says_that_another_ended(run.text(1 - dead))


def assert_says_that_another_ended(text):
    said = 'psp_jax: error: another process of the run ended|JAX distributed service detected fatal'
    assert re.search(said, text) and 'Traceback' not in text


@slow
def test_an_error_of_all_processes_is_one_line_in_each(start, tmp_path):
    run = start('--config.data.train=nowhere.txt', count=2)
    assert run.codes() == [2, 2]
    for which in (0, 1):
        assert run.text(which).count('psp_jax: error: ') == 1
        assert 'nowhere.txt' in run.text(which) and 'Traceback' not in run.text(which)


@slow
def test_processes_that_do_not_share_the_working_directory_say_so(small_config, programs, tmp_path):
    commands = [
        ['-m', 'psp_jax.main', '--config', small_config, '--workdir', tmp_path / f'run {i}', *place]
        for i, place in enumerate(flags_of_processes(2))
    ]
    run = Processes(tmp_path / 'logs', commands, programs | {'JAX_NUM_CPU_DEVICES': '1'})
    assert run.codes() == [2, 2]
    assert 'process 1 does not see what process 0 writes there: set --workdir' in run.text()


@slow
@pytest.mark.parametrize('present', [0, 1])
def test_a_process_that_never_starts_ends_the_other(present):
    code = (
        'from psp_jax.runtime import preemption; preemption.INITIALIZATION_TIMEOUT = 5; '
        f'preemption.join("localhost:{free_port()}", 2, {present})'
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.returncode == NOT_JOINED
    waits, error = run.stderr.splitlines()
    assert f'process {present} waits for all 2 processes at localhost:' in waits
    assert 'psp_jax: error: not all 2 processes at localhost:' in error and 'within 5 s' in error


@slow
def test_a_full_disk_is_one_line_and_earlier_checkpoints_are_intact(start, trained, tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    size = sum(f.stat().st_size for f in (trained.workdir / 'checkpoints/5').rglob('*'))
    options = f'size={(size >> 20) * 5 // 2}m'
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', disk]).returncode:
        pytest.skip('may not mount a file system to fill')
    try:
        run = start('--config.checkpoint_every=1', workdir=disk / 'run')
        assert run.codes() == [2]
        (line,) = [line for line in run.text().splitlines() if 'psp_jax: error' in line]
        # Orbax's threads may say besides that their event loop is closed.
        assert 'no space left on the disk' in line.lower()
        steps = [step for step in steps_in(disk / 'run') if step.isdigit()]
        whole = arrays_in(trained.workdir / 'checkpoints/5').keys()
        assert steps
        for step in steps:
            assert arrays_in(disk / 'run/checkpoints' / step).keys() == whole
        # With room for it the same command goes on.
        subprocess.run(['mount', '-o', 'remount,size=2g', disk], check=True)
        run = start('--config.checkpoint_every=5', workdir=disk / 'run')
        assert run.codes() == [0] and f'continuing from step {max(map(int, steps))}' in run.text()
    finally:
        subprocess.run(['umount', '-l', disk], check=True)


def test_a_process_that_hangs_shows_its_stacks():
    code = 'from psp_jax.runtime import preemption; preemption.still_alive(0.2); input()'
    process = subprocess.Popen(
        [sys.executable, '-c', code],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert 'Timeout' in process.stderr.readline()
    finally:
        process.kill()
