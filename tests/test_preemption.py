"""Promise 5, with real processes and real signals: SIGTERM at any moment, and other ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from several import flags_of_processes
from test_resume import arrays_in

from psp_jax.command_line import NOT_JOINED, PREEMPTED
from psp_jax.data.pipeline import example_index
from psp_jax.runtime import cluster

ROOT = Path(__file__).parents[1]
STOPPED = 'psp_jax: stopped by SIGTERM; run the same command again'
PATIENCE = 240  # seconds; machines of continuous integration are slow

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings('ignore:Sharding info not provided'),  # arrays go to this device
]


class Started:
    """Processes of one run, whose output goes to files."""

    def __init__(self, folder, environment, words, hooks, count, devices):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f'process {i}' for i in range(count)]
        self.processes = []
        for log, place in zip(self.logs, flags_of_processes(count), strict=True):
            with open(log, 'w') as file:
                command = [sys.executable, 'tests/hooked_main.py', json.dumps(hooks), *words]
                command += place if count > 1 else []
                self.processes.append(
                    subprocess.Popen(
                        [str(word) for word in command],
                        cwd=ROOT,
                        env=os.environ
                        | environment
                        | {'JAX_NUM_CPU_DEVICES': str(devices), 'PYTHONPATH': str(ROOT)},
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def text(self, which=0):
        return self.logs[which].read_text()

    def await_text(self, pattern, which=0):
        """Returns as soon as a process has printed `pattern`."""
        start = time.monotonic()
        while not re.search(pattern, self.text(which)):
            assert time.monotonic() < start + PATIENCE, f'no {pattern!r} in:\n{self.text(which)}'
            assert self.processes[which].poll() is None, self.text(which)
            time.sleep(0.02)

    def send(self, sent=signal.SIGTERM, which=0):
        self.processes[which].send_signal(sent)

    def codes(self, seconds=PATIENCE):
        """The exit codes of all processes, which have so long."""
        try:
            return [process.wait(seconds) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError('\n'.join(map(self.text, range(len(self.logs))))) from None


@pytest.fixture
def start(small_config, programs, tmp_path):
    """Starts a run of `small_config` in `tmp_path/run`, each time from another log folder."""
    started = []

    def run(*overrides, hooks=None, count=1, devices=1, workdir=tmp_path / 'run', cache=True):
        words = ['--config', small_config, '--workdir', workdir, *overrides]
        made = Started(
            tmp_path / f'start {len(started)}',
            programs if cache else {'JAX_ENABLE_COMPILATION_CACHE': 'false'},
            words,
            hooks or {},
            count,
            devices,
        )
        started.append(made)
        return made

    yield run
    for one in started:
        for process in one.processes:
            process.kill()


def steps_in(workdir):
    folder = workdir / 'checkpoints'
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def last_step(text):
    return int(re.findall(r'^step +(\d+)/', text, re.M)[-1])


def assert_same_arrays(one, other):
    """Of two checkpoints, or of what `arrays_in` gave of them."""
    one, other = (x if isinstance(x, dict) else arrays_in(x) for x in (one, other))
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == []


def test_nothing_is_lost(start, trained, tmp_path):
    """Promise 5: SIGTERM while compiling, in training, in evaluation and right after a save.

    Each ends in the exit code, with a finished checkpoint within a step; the last run ends with
    the same bits, scores and kept checkpoints as the one that nothing interrupted.
    """
    workdir = tmp_path / 'run'
    run = start(cache=False)
    run.await_text('parameters')  # of the table before compiling
    time.sleep(1)
    run.send()
    assert run.codes(15) == [PREEMPTED] and STOPPED in run.text()
    assert steps_in(workdir) == []

    run = start()
    run.await_text(r'step +2/10')
    run.send()
    assert run.codes() == [PREEMPTED]
    (step,) = steps_in(workdir)
    assert int(step) == last_step(run.text()) and 2 <= int(step) <= 4
    before = arrays_in(workdir / 'checkpoints' / step)

    run = start(cache=False)
    run.await_text('continuing from step')
    time.sleep(1)
    run.send()
    assert run.codes(15) == [PREEMPTED] and 'compiled in' not in run.text()
    assert steps_in(workdir) == [step]
    assert_same_arrays(workdir / 'checkpoints' / step, before)

    run = start(hooks={'slow_images': 3})
    run.await_text('continuing from step')
    run.await_text('evaluating an image')
    run.send()
    assert run.codes(15) == [PREEMPTED]
    assert run.text().count('evaluating an image') <= 2  # of three
    assert steps_in(workdir) == [step, '5']
    assert_same_arrays(workdir / 'checkpoints' / step, before)
    assert not (workdir / 'checkpoints/5/metrics').exists()

    run = start('--config.checkpoint_every=8', hooks={'term_after_save': 8})
    assert run.codes() == [PREEMPTED]
    text = run.text()
    assert text.index('step 5  mIoU') < text.index('step  6/10')  # first what had been cut off
    assert steps_in(workdir)[-1] in ('8', '9')

    run = start('--config.checkpoint_every=8')
    assert run.codes() == [0]
    assert 'continuing from step' in run.text()
    assert_same_arrays(workdir / 'checkpoints/10', trained.workdir / 'checkpoints/10')
    for name in ('eval/10-whole/metrics.json', 'eval/5-whole/metrics.json'):
        mine, theirs = (
            json.loads((path / name).read_text()) for path in (workdir, trained.workdir)
        )
        assert {**mine, 'seconds': 0} == {**theirs, 'seconds': 0}
    best = max(
        (5, 10),
        key=lambda step: json.loads((workdir / f'eval/{step}-whole/metrics.json').read_text())[
            'mIoU'
        ],
    )
    assert str(best) in steps_in(workdir) and '10' in steps_in(workdir)
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    training = [line['step'] for line in lines if 'loss' in line]
    assert training == list(range(1, 11))
    assert [line['step'] for line in lines if 'loss' not in line] == [5, 10]


def test_a_second_sigterm_ends_at_once(start, tmp_path):
    run = start(hooks={'slow_save': 60})
    run.await_text('saving')
    run.send()
    time.sleep(0.2)
    run.send()  # the same one, by another way: of a shell and of the cluster
    time.sleep(2)
    assert run.processes[0].poll() is None
    run.send()
    assert run.codes(5) == [128 + signal.SIGTERM]


def test_sigterm_to_one_process_of_two_stops_both(start, tmp_path):
    """To the second in training, to the first in evaluation, to the second after a save."""
    workdir, straight = tmp_path / 'run', tmp_path / 'straight'
    ledger = tmp_path / 'ledger'
    two = {'count': 2, 'devices': 1}
    run = start(hooks={'batches': str(ledger)}, **two)
    run.await_text(r'step +3/10')
    run.send(which=1)
    assert run.codes() == [PREEMPTED, PREEMPTED]
    assert STOPPED in run.text(0) and STOPPED not in run.text(1)
    (step,) = steps_in(workdir)
    assert int(step) == last_step(run.text()) and 3 <= int(step) <= 5

    run = start(hooks={'slow_images': 3, 'only': 0, 'batches': str(ledger)}, **two)
    run.await_text('evaluating an image')
    run.send()
    assert run.codes(30) == [PREEMPTED, PREEMPTED]
    assert steps_in(workdir) == sorted({step, '5'})

    run = start('--config.checkpoint_every=8', hooks={'term_after_save': 8, 'only': 1}, **two)
    assert run.codes() == [PREEMPTED, PREEMPTED]
    assert steps_in(workdir)[-1] in ('8', '9')
    assert start(**two).codes() == [0, 0]
    assert start(workdir=straight, **two).codes() == [0, 0]
    assert_same_arrays(workdir / 'checkpoints/10', straight / 'checkpoints/10')
    # Every process read its own half of each batch.
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert {(process, position % 2) for process, batch, _ in rows for position in batch} == {
        (0, 0),
        (1, 1),
    }


def test_sigterm_to_both_processes_at_once(start, tmp_path):
    run = start(count=2)
    run.await_text(r'step +2/10')
    for which in (0, 1):
        run.send(which=which)
    assert run.codes() == [PREEMPTED, PREEMPTED]
    (step,) = steps_in(tmp_path / 'run')
    assert int(step) == last_step(run.text()) and 2 <= int(step) <= 4


@pytest.mark.parametrize('which', [0, 1])
def test_sigterm_while_the_first_process_reports_an_evaluation(start, trained, tmp_path, which):
    """The second has finished by then, and is not alone in ending well."""
    shutil.copytree(trained.workdir, tmp_path / 'run')
    run = start('--mode', 'eval', count=2, hooks={'slow_report': 9, 'only': 0})
    run.await_text('reporting')
    time.sleep(4)
    run.send(which=which)
    assert run.codes(30) == [PREEMPTED, PREEMPTED]
    assert STOPPED in run.text(0) and 'psp_jax: error' not in run.text(0) + run.text(1)


def test_two_processes_go_on_from_the_checkpoint_before_a_damaged_one(start, trained, tmp_path):
    shutil.copytree(trained.workdir, tmp_path / 'run')
    for file in (tmp_path / 'run/checkpoints/10/state').rglob('*'):
        if file.is_file():
            file.write_bytes(b'')
    run = start(count=2)
    assert run.codes() == [0, 0]
    assert 'continuing from step 5' in run.text()
    assert run.text().count('skipped, and renamed to 10.damaged') == 1
    assert steps_in(tmp_path / 'run') == ['10', '10.damaged', '5']


def test_two_processes_start_from_what_the_first_one_sees(start, trained, tmp_path):
    """Of checkpoints and scores that a shared disk shows to the second one later."""
    shutil.copytree(trained.workdir, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run/checkpoints/10')
    run = start(count=2, hooks={'hidden': True, 'unreadable': 2, 'only': 1})
    run.await_text(r'step +6/10')
    run.send()
    assert run.codes() == [PREEMPTED, PREEMPTED]
    assert 'continuing from step 5' in run.text()
    assert 'step 5  mIoU' not in run.text()  # it was evaluated before


def test_a_checkpoint_that_only_one_process_can_read_ends_both(start, trained, tmp_path):
    shutil.copytree(trained.workdir, tmp_path / 'run')
    run = start(count=2, hooks={'unreadable': 3, 'only': 1})
    assert run.codes() == [1, 1]
    for which in (0, 1):
        (line,) = [s for s in run.text(which).splitlines() if s.startswith('psp_jax: error: ')]
        assert 'process 1 cannot read what others can: ' in line and '/run/checkpoints/10' in line
        assert 'Traceback' not in run.text(which)
    assert steps_in(tmp_path / 'run') == ['10', '5']


def test_processes_that_do_not_share_the_working_directory_are_told(start, tmp_path):
    run = start(count=2, hooks={'elsewhere': True, 'only': 1})
    assert run.codes() == [2, 2]
    line = f'psp_jax: error: {tmp_path}/run: process 1 does not see what process 0 writes there: '
    assert line in run.text(0) and 'Traceback' not in run.text(0) + run.text(1)


@pytest.mark.parametrize(('count', 'devices'), [(1, 2), (2, 1)])
def test_a_checkpoint_goes_on_elsewhere_with_the_same_loss(
    start, trained, tmp_path, count, devices, measured
):
    """The step after a checkpoint of one device, on two and in two processes."""
    shutil.copytree(trained.workdir, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run/checkpoints/10')
    run = start(count=count, devices=devices)
    run.await_text(r'step +7/10')
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


def test_a_slow_process_sees_the_checkpoints_that_the_other_is_about_to_remove(start, tmp_path):
    keys = ('checkpoint_keep=1', 'checkpoint_every=99', 'eval_every=2')
    words = [f'--config.{key}' for key in keys]
    run = start(*words, count=2, hooks={'slow_reload': 2, 'only': 1})
    assert run.codes() == [0, 0]
    mious = {
        step: json.loads((tmp_path / f'run/eval/{step}-whole/metrics.json').read_text())['mIoU']
        for step in (2, 4, 6, 8, 10)
    }
    best = max(mious, key=mious.get)
    assert steps_in(tmp_path / 'run') == sorted({str(best), '10'})
    assert max(mious[4], mious[6], mious[8], mious[10]) > mious[2]  # one was removed so


def test_sigterm_at_start_up_ends_both_processes(start, tmp_path):
    run = start(count=2, cache=False)
    run.await_text('parameters')
    run.send(which=1)
    assert run.codes(30) == [PREEMPTED, PREEMPTED]
    assert steps_in(tmp_path / 'run') == []


@pytest.mark.parametrize('which', [0, 1])
def test_sigterm_before_the_processes_have_come_together_ends_both(start, tmp_path, which):
    run = start(count=2, hooks={'slow_join': 4, 'only': 0, 'joining': PATIENCE})
    for process in (1, 0):  # earlier, SIGTERM would end one that does not listen yet
        run.await_text('joining', process)
    run.send(which=which)
    assert run.codes() == [PREEMPTED, PREEMPTED]
    assert 'compiled' not in run.text()


@pytest.mark.parametrize('dead', [0, 1])
def test_a_process_that_never_comes_ends_the_other(start, dead):
    run = start(count=2, hooks={'patience': 10, 'slow_join': 99, 'only': dead})
    run.await_text('joining', dead)
    run.send(signal.SIGKILL, dead)
    assert run.codes()[1 - dead] == NOT_JOINED
    assert 'psp_jax: error: the 2 processes did not come together' in run.text(1 - dead)
    assert 'Traceback' not in run.text(1 - dead)


@pytest.mark.parametrize(('dead', 'heartbeat'), [(0, 100), (1, 20)])
def test_a_process_that_dies_does_not_leave_the_other_waiting(start, dead, heartbeat):
    """The stated time: two minutes, of which JAX's heartbeat takes 100 s."""
    assert cluster.HEARTBEAT_TIMEOUT == 100
    run = start(count=2, hooks={'kill_at': 4, 'only': dead, 'heartbeat': heartbeat})
    run.processes[dead].wait(PATIENCE)
    codes = run.codes(heartbeat + 20)
    assert codes[dead] == -signal.SIGKILL
    assert codes[1 - dead] not in (0, 2, PREEMPTED)


def test_an_error_of_one_process_ends_all_with_its_line(start, photographs, tmp_path):
    """A training example that only the second process reads, in mid-run."""
    place = example_index(np.arange(20), 200, seed=0)
    checked = set(np.linspace(0, 199, 64).round().astype(int).tolist())
    bad = next(int(i) for i in place[5:12:2] if i not in checked)  # odd positions are process 1's
    (tmp_path / 'torn.jpg').write_bytes(b'\xff\xd8')
    lines = [f'{photographs}/train 0.jpg\t{photographs}/labels/train_0.png'] * 200
    lines[bad] = f'{tmp_path}/torn.jpg\t{photographs}/labels/train_0.png'
    (tmp_path / 'train.txt').write_text('\n'.join(lines))
    run = start(f'--config.data.train={tmp_path}/train.txt', count=2)
    assert run.codes() == [2, 2]
    line = f'{tmp_path}/torn.jpg cannot be decoded'
    assert f'psp_jax: error: {line}' in run.text(1)
    assert f'psp_jax: error: process 1: {line}' in run.text(0)
    assert 'Traceback' not in run.text(0) + run.text(1)

    run = start(f'--config.data.train={tmp_path}/train.txt', '--config.data.on_error=skip', count=2)
    assert run.codes() == [0, 0]
    assert f'psp_jax: error: {line}' not in run.text(1) and f': {line}' in run.text(1)
    (row,) = map(json.loads, (tmp_path / 'run/skipped-1.jsonl').read_text().splitlines())
    assert line in row['error'] and row['position'] == place.tolist().index(bad)
    assert not (tmp_path / 'run/skipped.jsonl').exists()


def test_a_run_goes_on_with_other_processes_and_devices(start, trained, tmp_path):
    """Two processes, then one with two devices, then one: the same examples at every step."""
    ledgers = [tmp_path / f'ledger {i}' for i in range(3)]
    run = start(count=2, hooks={'batches': str(ledgers[0])})
    run.await_text(r'step +2/10')
    run.send(which=1)
    assert run.codes() == [PREEMPTED, PREEMPTED]
    run = start(devices=2, hooks={'batches': str(ledgers[1])})
    run.await_text(r'step +7/10')
    run.send()
    assert run.codes() == [PREEMPTED]
    run = start(hooks={'batches': str(ledgers[2])})
    assert run.codes() == [0]
    said = [int(step) for step in re.findall(r'^step +(\d+)/', run.text(), re.M)]
    assert said[-1] == 10
    for i, ledger in enumerate(ledgers):
        rows = [json.loads(line) for line in ledger.read_text().splitlines()]
        steps = {}
        for _, positions, _ in rows:
            for position in positions:
                steps.setdefault(position // 2, []).append(position)
        assert all(sorted(found) == [2 * step, 2 * step + 1] for step, found in steps.items())
        assert sorted(steps) == list(range(min(steps), max(steps) + 1))
        assert min(steps) == 0 or i and min(steps) <= 9
    assert max(steps) == 9
    # Sums round differently, and training amplifies that: the first losses are equal still.
    lines = (tmp_path / 'run/metrics.jsonl').read_text().splitlines()
    mine, theirs = (
        {row['step']: row['loss'] for row in map(json.loads, text) if 'loss' in row}
        for text in (lines, (trained.workdir / 'metrics.jsonl').read_text().splitlines())
    )
    assert list(mine) == list(theirs) == list(range(1, 11))
    assert mine[1] == pytest.approx(theirs[1], rel=1e-5)


def test_a_full_disk_is_told_and_earlier_checkpoints_are_intact(start, trained, tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    megabytes = sum(f.stat().st_size for f in (trained.workdir / 'checkpoints/5').rglob('*')) >> 20
    options = f'size={megabytes * 5 // 2}m'
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', disk])
    if mounted.returncode:
        pytest.skip('may not mount a file system to fill')
    try:
        run = start('--config.checkpoint_every=1', workdir=disk / 'run')
        assert run.codes() == [2]
        (line,) = [line for line in run.text().splitlines() if 'psp_jax: error' in line]
        assert 'no space left on the disk' in line.lower() and 'Traceback' not in run.text()
        steps = [step for step in steps_in(disk / 'run') if step.isdigit()]
        assert steps
        for step in steps:
            assert (
                arrays_in(disk / 'run/checkpoints' / step).keys()
                == arrays_in(trained.workdir / 'checkpoints/5').keys()
            )
        # With room for it the same command goes on.
        subprocess.run(['mount', '-o', 'remount,size=2g', disk], check=True)
        run = start('--config.checkpoint_every=5', workdir=disk / 'run')
        assert run.codes() == [0] and f'continuing from step {max(map(int, steps))}' in run.text()
    finally:
        subprocess.run(['umount', '-l', disk], check=True)


def test_a_step_that_hangs_shows_all_stacks(start):
    run = start('--config.hang_seconds=3', hooks={'hang_at': 3})
    run.await_text(r'Timeout \(0:00:03\)!')
    run.await_text('in train_and_evaluate')
    assert run.processes[0].poll() is None
