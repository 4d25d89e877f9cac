"""Interrupts a small run again and again, and compares it with a run that nothing interrupted.

    python -m benchmarks.soak --processes 1 --workdir runs/soak1 [--interruptions 25 --seed 0]
    python -m benchmarks.soak --processes 2 --workdir runs/soak2

A PSPNet-10 with narrow heads trains on the built-in scenes, on CPU devices. Each start gets
SIGTERM, SIGINT or SIGKILL at a random moment of start-up, training, a save or an evaluation. If a
run ends before there were enough interruptions, another one begins. Prints a line for each start,
and a table at the end. The exit code is 1 if an exit code is wrong, a process hangs, or a run
differs from the uninterrupted one in an array of its last checkpoint, in metrics.jsonl, or in the
metrics of an evaluation. Takes about half an hour on two cores.
"""

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from psp_jax.command_line import INTERRUPTED, PREEMPTED

ROOT = Path(__file__).parents[1]
STEPS, EVERY, EVALUATE_EVERY = 96, 4, 12  # steps of the run, between saves, between evaluations
CONFIG = (
    *('batch_size=2', f'checkpoint_every={EVERY}', f'eval_every={EVALUATE_EVERY}', 'log_every=1'),
    *('data.train=0:64', 'data.val=1000000:1000008', 'data.crop=33', 'model.depth=10'),
    *('model.head_width=16', 'model.aux_width=8', 'eval.batch_size=2', 'eval.panels=2'),
)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
MOMENTS = ('start-up', 'training', 'save', 'evaluation')
CODES = {signal.SIGTERM: PREEMPTED, signal.SIGINT: INTERRUPTED, signal.SIGKILL: -signal.SIGKILL}
PATIENCE = 1800  # seconds for any wait, on a busy machine
PEER_ENDS = 120  # seconds within which a process ends after another one was killed


class Start:
    """The processes of one start of a run; their output goes to log files."""

    def __init__(self, folder: Path, name: str, number: int, processes: int):
        self.workdir, self.finished = folder / name, False
        self.logs = [folder / f'{name}-{number:02}-{i}.log' for i in range(processes)]
        with socket.socket() as free:
            free.bind(('localhost', 0))
            address = f'localhost:{free.getsockname()[1]}'
        command = [sys.executable, '-m', 'psp_jax.main', '--workdir', str(self.workdir)]
        if not any(path.name.isdigit() for path in self.workdir.glob('checkpoints/*')):
            # Later starts take the configuration from the checkpoint.
            command += ['--config', f'configs/scenes.py:steps={STEPS}']
            command += [f'--config.{word}' for word in CONFIG]
        environment = {
            'JAX_PLATFORMS': 'cpu',
            'JAX_NUM_CPU_DEVICES': '1',
            'JAX_COMPILATION_CACHE_DIR': str(folder / 'programs'),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
            'XLA_FLAGS': '--xla_backend_optimization_level=1',  # compiles in less time
        }
        self.processes = []
        for i, log in enumerate(self.logs):
            words = ['--coordinator_address', address, '--num_processes', str(processes)]
            words += ['--process_id', str(i)]
            with open(log, 'w') as output:
                self.processes.append(
                    subprocess.Popen(
                        command + words * (processes > 1),
                        cwd=ROOT,
                        env=os.environ | environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def text(self) -> str:
        return self.logs[0].read_text()

    def steps(self) -> list[int]:
        """The steps that process 0 has logged."""
        return [int(step) for step in re.findall(r'^step +(\d+)/', self.text(), re.M)]

    def reached(self, moment: str, after: int) -> bool:
        """Whether the run is at a moment, once it has trained `after` steps if it is training."""
        steps = self.steps()
        if moment == 'start-up':
            return bool(self.text())
        if moment == 'training':
            return len(steps) >= after
        if moment == 'save':
            return any('tmp' in path.name for path in self.workdir.glob('checkpoints/*'))
        due = bool(steps) and steps[-1] % EVALUATE_EVERY == 0
        return due and f'step {steps[-1]}  mIoU' not in self.text()

    def wait(self, moment: str, after: int) -> bool:
        """Waits for a moment; False if the run has ended before."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if any(process.poll() is not None for process in self.processes):
                return False
            if self.reached(moment, after):
                return True
            time.sleep(0.005)
        for process in self.processes:
            process.kill()
        raise TimeoutError(f'{self.logs[0]}: {moment} did not come within {PATIENCE} s')

    def codes(self, seconds: float) -> list[int]:
        """The exit codes; kills what is still there after so many seconds."""
        until = time.monotonic() + seconds
        try:
            return [p.wait(max(until - time.monotonic(), 0.1)) for p in self.processes]
        finally:
            for process in self.processes:
                process.kill()


def interrupt(
    start: Start, sent: signal.Signals, moment: str, rng: random.Random
) -> dict[str, Any]:
    """Sends a signal at a moment; what came of it."""
    if not start.wait(moment, after=rng.randint(1, EVERY)):
        return {'codes': start.codes(PATIENCE), 'moment': None, 'wrong': ''}
    delay = {'start-up': 8.0, 'evaluation': 1.0}.get(moment, 0.1)
    time.sleep(rng.uniform(0, delay))
    ids = range(len(start.processes))
    # A terminal sends SIGINT to all processes. Clusters send SIGTERM to one or to all.
    to = list(ids) if sent == signal.SIGINT or rng.random() < 0.5 else [rng.choice(ids)]
    logged, began = len(start.steps()), time.monotonic()
    for i in to:
        start.processes[i].send_signal(sent)
    others_die = sent == signal.SIGKILL and len(to) < len(ids)
    codes = start.codes(PEER_ENDS if others_die else PATIENCE)
    good = all(codes[i] == CODES[sent] for i in (to if others_die else ids))
    if others_die:
        good &= all(code not in (0, PREEMPTED, INTERRUPTED) for code in codes)
    if moment == 'start-up' and not logged and sent != signal.SIGKILL:
        # Before Python hears signals, and before the processes have joined, a signal simply ends
        # the processes that get it.
        good |= all(codes[i] in (CODES[sent], -sent) for i in to)
    return {
        'codes': codes,
        'moment': moment,
        'to': to,
        'seconds': round(time.monotonic() - began, 1),
        'wrong': '' if good or not any(codes) else f'{codes} after {sent.name} in {moment}',
    }


def differences(run: Path, straight: Path) -> list[str]:
    """What differs between a run that was interrupted and the one that was not."""
    found = []
    arrays = [read_arrays(path / 'checkpoints' / str(STEPS) / 'state') for path in (run, straight)]
    for name in arrays[0].keys() | arrays[1].keys():
        one, other = (a.get(name) for a in arrays)
        if one is None or other is None or one.tobytes() != other.tobytes():
            found.append(f'array {name}')
    lines = [read_lines(path) for path in (run, straight)]
    found += [
        f'metrics.jsonl, line {i}' for i, (a, b) in enumerate(zip(*lines, strict=False)) if a != b
    ]
    if len(lines[0]) != len(lines[1]):
        found.append(f'metrics.jsonl has {len(lines[0])} lines, not {len(lines[1])}')
    for path in straight.glob('eval/*/metrics.json'):
        other = run / path.relative_to(straight)
        pair = [{**json.loads(p.read_text()), 'seconds': 0} for p in (path, other) if p.exists()]
        if len(pair) < 2 or pair[0] != pair[1]:
            found.append(str(path.relative_to(straight)))
    return found


def read_lines(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without the times."""
    times = ('seconds_per_step', 'images_per_second', 'data_wait')
    lines = map(json.loads, (run / 'metrics.jsonl').read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of a checkpoint by name, as numpy arrays."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        found = checkpointer.restore(path, restore_args=as_numpy)
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(found)}


def soak(folder: Path, processes: int, interruptions: int, seed: int) -> bool:
    """Runs everything and prints the table; whether all was right."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    say('uninterrupted run')
    if any(codes := Start(folder, 'straight', 0, processes).codes(4 * PATIENCE)):
        raise SystemExit(f'the uninterrupted run ended with {codes}; see {folder}')
    plans = itertools.cycle(itertools.product(MOMENTS, SIGNALS))
    done: list[dict[str, Any]] = []
    wrong: list[str] = []
    starts = 0
    for run in itertools.count():
        name = f'run{run}'
        for number in itertools.count():
            start = Start(folder, name, number, processes)
            if len(done) < interruptions:
                moment, sent = next(plans)
                made = interrupt(start, sent, moment, rng)
            else:
                made = {'codes': start.codes(4 * PATIENCE), 'moment': None, 'wrong': ''}
            starts += 1
            steps = start.steps()
            say(f'{name}: {made} steps {steps[:1]} to {steps[-1:]}')
            if made['moment'] and any(made['codes']):
                done.append(made | {'signal': sent.name})
            elif any(made['codes']):
                wrong.append(f'{name} ended by itself with {made["codes"]}')
            wrong += [made['wrong']] * bool(made['wrong'])
            if not any(made['codes']):
                break
        different = differences(folder / name, folder / 'straight')
        say(f'{name} is finished; differences: {different[:5]}')
        wrong += different
        if len(done) >= interruptions:
            break
    print(table(processes, done, starts, run + 1, wrong))
    return not wrong


def table(
    processes: int, done: list[dict[str, Any]], starts: int, runs: int, wrong: list[str]
) -> str:
    """Markdown: how often each signal hit each moment, and what came of it."""
    count = Counter((one['moment'], one['signal']) for one in done)
    rows = [f'|  | {" | ".join(s.name for s in SIGNALS)} |', '|---|---|---|---|']
    for moment in MOMENTS:
        rows.append(f'| {moment} | {" | ".join(str(count[moment, s.name]) for s in SIGNALS)} |')
    stops = [one['seconds'] for one in done if one['signal'] != 'SIGKILL']
    peers = [one['seconds'] for one in done if set(one['codes']) - {-9} and -9 in one['codes']]
    rows += [
        '',
        f'processes {processes}, interruptions {len(done)}, starts {starts}, runs {runs}',
        f'seconds to exit after SIGTERM or SIGINT: at most {max(stops, default=0)}',
        f'seconds until the other process ends after SIGKILL: at most {max(peers, default=0)}',
        f'wrong: {wrong or "nothing"}',
    ]
    return '\n'.join(rows)


def say(text: str) -> None:
    print(time.strftime('%H:%M:%S'), text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.soak',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--workdir', type=Path, required=True, help='is emptied first')
    parser.add_argument('--processes', type=int, default=1)
    parser.add_argument('--interruptions', type=int, default=25)
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    flags = parser.parse_args()
    good = soak(flags.workdir.absolute(), flags.processes, flags.interruptions, flags.seed)
    sys.exit(not good)


if __name__ == '__main__':
    main()
