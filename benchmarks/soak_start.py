"""One start of a soak's run: its processes, the signal that they get, and what became of them."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from psp_jax.command_line import PREEMPTED

ROOT = Path(__file__).parents[1]
KEEP = 2  # newest checkpoints
OVERRIDES = (
    *('batch_size=8', 'checkpoint_every=3', 'eval_every=6', 'log_every=1'),
    *(f'checkpoint_keep={KEEP}', 'data.train=0:64', 'data.crop=33'),
    *('model.stem=deep_small', 'model.head_width=16', 'model.aux_width=8'),
    *('eval.batch_size=2', 'eval.panels=2'),
)
# What a process is at.
BEFORE, STARTUP, COMPILING = 'before Python listens', 'start-up', 'compiling'
TRAINING, SAVE, BOTH, EVALUATION = 'training', 'save', 'save and evaluation', 'evaluation'
PHASES = (BEFORE, STARTUP, COMPILING, TRAINING, SAVE, BOTH, EVALUATION)
PATIENCE = 420  # seconds for a process to end after a signal; joining alone may take 300
SILENCE = 900  # seconds without any event that count as a hang


class Soak(NamedTuple):
    processes: int
    devices: tuple[int, ...]  # of each process, in turn
    title: str
    validation: int = 8  # images; more make evaluations longer, which are hit the more often


SOAKS = {
    'a1': Soak(1, (2,), '1 process x 2 devices'),
    'a2': Soak(2, (1,), '2 processes x 1 device', 24),
    'b': Soak(1, (1, 2, 4, 8), '1, 2, 4, 8 devices in turn'),
}


class Plan(NamedTuple):
    """An interruption: `sent` to the processes `to`, so many seconds `after` the start."""

    sent: str
    after: float
    to: list[int]


def start(
    soak: Soak, name: str, number: int, devices: int, steps: int, plan: Plan | None, folder: Path
) -> dict[str, Any]:
    """Runs the processes until all have ended; what became of them.

    name: the run's folder in `folder`; number: of the start, for the names of logs.
    """
    logs = [folder / 'logs' / f'{name}-{number:03}-{i}.jsonl' for i in range(soak.processes)]
    logs[0].parent.mkdir(exist_ok=True)
    began = time.time()
    running = launch(soak, logs, folder / name, devices, steps)
    sent, hung = 0.0, False
    ended = [0.0] * soak.processes
    while not all(ended):
        time.sleep(0.01)
        now = time.time()
        for i, process in enumerate(running):
            if not ended[i] and process.poll() is not None:
                ended[i] = now
        if plan and not sent and now >= began + plan.after and not any(ended):
            sent = time.time()
            for i in plan.to:
                running[i].send_signal(getattr(signal, plan.sent))
        changed = max([began, *(log.stat().st_mtime for log in logs if log.exists())])
        if not hung and now > (sent + PATIENCE if sent else changed + SILENCE):
            hung = True
            for process in running:
                process.send_signal(signal.SIGUSR1)  # for their stacks
            time.sleep(2)
            for process in running:
                process.kill()
            if not sent:
                sent, plan = now, Plan('none', 0, [])
    events = [read_lines(log) for log in logs]
    # A step takes all processes: one that some had not come to was not taken.
    each = [[e['step'] for e in log if e['event'] == 'step'] for log in events]
    taken = min(each, key=len)
    first = [
        next((e['time'] for e in log if e['event'] in ('step', 'evaluating')), None)
        for log in events
    ]
    found: dict[str, Any] = {
        'run': name,
        'number': number,
        'devices': devices,
        'began': began,
        'seconds': max(ended) - began,
        'codes': [process.returncode for process in running],
        'hung': hung,
        'startup': max(first) - began if all(first) else None,  # they wait for the slowest
        'resumed': next((e['step'] for e in events[0] if e['event'] == 'resumed'), None),
        'first': taken[0] if taken else None,
        'last': taken[-1] if taken else None,
    }
    checkpoints = folder / name / 'checkpoints'
    if plan and sent:
        all_killed = plan.sent == 'SIGKILL' and len(plan.to) == soak.processes
        found |= {
            'signal': plan.sent,
            'to': plan.to,
            'after': sent - began,
            'phase': phase(
                events,
                plan.to[0] if plan.to else 0,
                sent,
                names_in(checkpoints) if all_killed else set(),
            ),
            'joined': all(
                any(e['event'] == 'joined' and e['time'] <= sent for e in log) for log in events
            ),
            'took': [round(t - sent, 2) for t in ended],
        }
    final = checkpoints / str(steps) / 'metrics' / 'metrics'
    found['failures'] = failures(found, soak.processes, final.exists())
    return found


def launch(
    soak: Soak, logs: list[Path], workdir: Path, devices: int, steps: int
) -> list[subprocess.Popen]:
    """A process for each of the logs; its output goes beside."""
    environment = {
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': str(devices),
        'JAX_COMPILATION_CACHE_DIR': str(workdir.parent / 'programs'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'PYTHONPATH': str(ROOT),
    }
    port = _free_port()
    running = []
    for i, log in enumerate(logs):
        words = [sys.executable, '-m', 'benchmarks.soak_worker', str(log)]
        words += ['--config', f'configs/scenes.py:steps={steps}', '--workdir', str(workdir)]
        validation = f'data.val=1000000:{1000000 + soak.validation}'
        words += [f'--config.{word}' for word in (*OVERRIDES, validation)]
        if len(logs) > 1:
            words += ['--coordinator_address', f'localhost:{port}', '--process_id', str(i)]
            words += ['--num_processes', str(len(logs))]
        with open(log.with_suffix('.log'), 'w') as output:
            running.append(
                subprocess.Popen(
                    words,
                    cwd=ROOT,
                    env=os.environ | environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    preexec_fn=_die_with_parent,
                )
            )
    return running


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return free.getsockname()[1]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The content of a file of JSON lines; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def phase(events: list[list[dict[str, Any]]], which: int, sent: float, whole: set[str]) -> str:
    """What process `which` was at when the signal was `sent`, from the events of all processes.

    whole: names of finished checkpoints, where nothing could go on after the signal: a save that
    is among them had ended, though nobody came to note it.
    """
    until = [[e for e in log if e['time'] <= sent] for log in events]
    saved = {e['step'] for log in until for e in log if e['event'] == 'saved'}
    begun = {e['step'] for e in until[which] if e['event'] == 'saving'}
    count = Counter(e['event'] for e in until[which])
    saving = any(str(step) not in whole for step in begun - saved)
    evaluating = count['evaluating'] > count['evaluated']
    if saving or evaluating:
        return BOTH if saving and evaluating else SAVE if saving else EVALUATION
    if count['compiled']:
        return TRAINING
    return COMPILING if count['compiling'] else STARTUP if count['listening'] else BEFORE


def failures(found: dict[str, Any], processes: int, final: bool) -> list[str]:
    """What a start should not have done; `final`: the run's last step has been evaluated."""
    codes = found['codes']
    if found['hung']:
        return [f'did not end; killed ({codes})']
    if 'signal' not in found:
        return [f'ended by itself with {codes}'] if any(codes) else []
    hit = [codes[i] for i in found['to']]
    others = [code for i, code in enumerate(codes) if i not in found['to']]
    if final and not any(others) and not any(code > 0 for code in codes):
        return []  # too late, the run was finished
    if found['signal'] == 'SIGKILL':
        # Who waits for a process that never joins gives up, to be started again.
        wrong = {0, 2} | ({PREEMPTED} if found['joined'] else set())
        bad = hit != [-signal.SIGKILL] * len(hit) or bool(wrong & set(others))
    else:
        too_early = found['phase'] == BEFORE and hit == [-signal.SIGTERM]
        bad = codes != [PREEMPTED] * processes and not too_early
    return [f'{codes} after {found["signal"]} to {found["to"]} in {found["phase"]}'] if bad else []


def lost(starts: list[dict[str, Any]], made: dict[str, Any]) -> list[str]:
    """Notes in `made` how many steps it took again; failures: it skipped one, or SIGTERM lost one.

    starts: all before it.
    """
    made['redone'] = 0
    last, stopped, cut = 0, False, False
    for s in starts:
        if s['run'] == made['run']:
            if s.get('cut'):
                cut = True
            elif s['last']:
                last, stopped, cut = s['last'], PREEMPTED in s['codes'], False
    if made['first'] is None or cut:  # after a cut: steps that the driver did not live to note
        return []
    made['redone'] = last + 1 - made['first']
    if made['redone'] < 0:
        return [f'steps from {last + 1} to {made["first"] - 1} were left out']
    if made['redone'] and stopped:
        return [f'SIGTERM took {made["redone"]} steps back']
    return []
