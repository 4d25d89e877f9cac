"""The long test that nothing is lost: a run that is interrupted again and again, to its end.

    python -m benchmarks.soak --soak a1 --workdir runs/soak/a1 [--terms 25 --kills 25 --seed 0]
    python -m benchmarks.soak --tables [--docs docs/reliability.md]

a1: one process with 2 CPU devices; a2: two processes with 1 each; b: one process with 1, 2, 4 or 8
devices, another number at each restart. A PSPNet-18 with narrow heads trains on the built-in
scenes, once without interruption and once with SIGTERM and SIGKILL at times uniform in wall time,
from the start of the process on. What they hit is counted from what the processes wrote down. It
goes on until there were enough of each signal, with 5 interruptions inside saves and 5 inside
evaluations; a run that ends before is checked, and another one begins. Then (see `check`) the
interrupted runs have to be the uninterrupted one.

All is in the JSON file --output (benchmarks/results/soak_SOAK.json), which is written after each
interruption: the same command goes on from there. It takes hours. As the runs have to be of the
same program, psp_jax must not change meanwhile: run it in a copy of the repository. All starts
share one folder of compiled programs (JAX_COMPILATION_CACHE_DIR), or most of the time would go to
compiling.
"""

import argparse
import ctypes
import faulthandler
import hashlib
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from psp_jax.command_line import PREEMPTED, quieten_libraries

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'benchmarks' / 'results'


class Soak(NamedTuple):
    processes: int
    devices: tuple[int, ...]  # of each process, in turn
    title: str


SOAKS = {
    'a1': Soak(1, (2,), '1 process x 2 devices'),
    'a2': Soak(2, (1,), '2 processes x 1 device'),
    'b': Soak(1, (1, 2, 4, 8), '1, 2, 4, 8 devices in turn'),
}
KEEP = 2  # newest checkpoints
OVERRIDES = (
    *('batch_size=8', 'checkpoint_every=3', 'eval_every=6', 'log_every=1'),
    *(f'checkpoint_keep={KEEP}', 'data.train=0:64', 'data.val=1000000:1000008', 'data.crop=33'),
    *('model.stem=deep_small', 'model.head_width=16', 'model.aux_width=8'),
    *('eval.batch_size=2', 'eval.panels=2'),
)
QUOTAS = {'save': 5, 'evaluation': 5}  # interruptions inside
BEFORE, STARTUP, COMPILING = 'before Python listens', 'start-up', 'compiling'
TRAINING, SAVE, BOTH, EVALUATION = 'training', 'save', 'save and evaluation', 'evaluation'
PHASES = (BEFORE, STARTUP, COMPILING, TRAINING, SAVE, BOTH, EVALUATION)
CALIBRATION_STEPS = 12
MARGIN = 1.25  # steps of the run over those that the interruptions should take
PATIENCE = 420  # seconds for a process to end after a signal; joining alone may take 300
SILENCE = 900  # seconds without any event that count as a hang
LAST = 20  # steps, of which the final loss is the mean


# ---- A process of the run: psp_jax.main that writes down what it does


def work(path: str, words: list[str]) -> int:
    """Runs the command line; JSON lines about its phases, with wall-clock times, go to `path`."""
    from psp_jax import main as command
    from psp_jax import processes

    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def log(event: str, **values: Any) -> None:
        # One write, unbuffered: it is there even if SIGKILL comes next.
        os.write(
            file, (json.dumps({'time': time.time(), 'event': event, **values}) + '\n').encode()
        )

    log('begun')
    faulthandler.register(signal.SIGUSR1)  # stacks of a process that hangs

    def listening(exit_code: Callable[..., int]) -> Callable[..., int]:
        def run(*args: Any) -> int:
            log('listening')
            return exit_code(*args)

        return run

    def joined(start: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            start(*args)
            log('joined')
            record(log)  # imports take seconds, in which SIGTERM should be heard

        return run

    _wrap(command, 'exit_code', listening)
    _wrap(processes, 'start', joined)
    return command.main(words)


def _wrap(module: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(module, name, make(getattr(module, name)))


def record(log: Callable[..., None]) -> None:
    """Has the training loop tell of steps and their examples, compiling, saves and evaluations."""
    from psp_jax import checkpoint, processes, train
    from psp_jax.data.pipeline import example_index

    ready: deque = deque()  # batches that were read and have not been trained on
    step = 0

    def batches(train_batches: Any) -> Any:
        def made(source: Any, config: Any, **options: Any) -> Iterator[dict[str, Any]]:
            nonlocal step
            step = options['start_step']
            log('resumed', step=step)
            return recorded(train_batches(source, config, **options), source, config)

        def recorded(found: Any, source: Any, config: Any) -> Iterator[dict[str, Any]]:
            for batch in found:
                ids = example_index(batch['position'], source.length, config.seed)
                pixels = hashlib.sha256(batch['image'].tobytes() + batch['label'].tobytes())
                ready.append((ids.tolist(), pixels.hexdigest()))
                yield batch

        return made

    class Step:
        """A jitted training step, and the program made of it."""

        def __init__(self, jitted: Any):
            self.program = jitted

        def lower(self, *args: Any) -> 'Step':
            log('compiling')
            self.program = self.program.lower(*args)
            return self

        def compile(self) -> 'Step':
            self.program = self.program.compile()
            log('compiled')
            return self

        def __call__(self, *args: Any) -> Any:
            nonlocal step
            step += 1
            ids, pixels = ready.popleft()
            log('step', step=step, ids=ids, pixels=pixels)
            return self.program(*args)

    def saving(save: Any) -> Any:
        def run(manager: Any, number: int, *args: Any) -> None:
            def watch() -> None:
                while not (manager.directory / str(number)).exists():
                    time.sleep(0.01)
                log('saved', step=number)

            log('saving', step=number)
            threading.Thread(target=watch, daemon=True).start()
            save(manager, number, *args)

        return run

    def evaluating(leaving_is_safe: Any) -> Any:
        @contextmanager
        def block() -> Iterator[None]:
            with leaving_is_safe():  # no more than evaluations
                log('evaluating')
                yield
                log('evaluated')

        return block

    _wrap(train, 'train_batches', batches)
    _wrap(train, 'compile_step', lambda compile_step: lambda *args: Step(compile_step(*args)))
    _wrap(checkpoint, 'save', saving)
    _wrap(processes, 'leaving_is_safe', evaluating)


# ---- Starting the processes, and what became of them


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
    logs = folder / 'logs'
    logs.mkdir(exist_ok=True)
    began = time.time()
    running = []
    port = _free_port()
    environment = {
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': str(devices),
        'JAX_COMPILATION_CACHE_DIR': str(folder / 'programs'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'PYTHONPATH': str(ROOT),
    }
    for i in range(soak.processes):
        words = [sys.executable, '-m', 'benchmarks.soak', '--worker']
        words += [
            str(_events(logs, name, number, i)),
            '--config',
            f'configs/scenes.py:steps={steps}',
        ]
        words += ['--workdir', str(folder / name), *(f'--config.{word}' for word in OVERRIDES)]
        if soak.processes > 1:
            words += ['--coordinator_address', f'localhost:{port}', '--process_id', str(i)]
            words += ['--num_processes', str(soak.processes)]
        with open(logs / f'{name}-{number:03}-{i}.log', 'w') as output:
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
    sent, hung = 0.0, False
    ended: list[float] = [0.0] * soak.processes
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
        if _silent(
            now,
            sent,
            [
                began,
                *(_changed(_events(logs, name, number, i), began) for i in range(soak.processes)),
            ],
        ):
            hung = True
            for process in running:
                process.send_signal(signal.SIGUSR1)
            time.sleep(2)
            for process in running:
                process.kill()
            sent = sent or now
            plan = plan or Plan('none', 0, [])
    events = [_lines(_events(logs, name, number, i)) for i in range(soak.processes)]
    codes = [process.returncode for process in running]
    taken = [event['step'] for event in events[0] if event['event'] == 'step']
    first = [e['time'] for e in events[0] if e['event'] in ('step', 'evaluating')]
    found: dict[str, Any] = {
        'run': name,
        'number': number,
        'devices': devices,
        'began': began,
        'seconds': max(ended) - began,
        'codes': codes,
        'hung': hung,
        'startup': first[0] - began if first else None,
        'resumed': next((e['step'] for e in events[0] if e['event'] == 'resumed'), None),
        'first': taken[0] if taken else None,
        'last': taken[-1] if taken else None,
    }
    if plan and sent:
        main = plan.to[0] if plan.to else 0
        all_killed = plan.sent == 'SIGKILL' and len(plan.to) == soak.processes
        whole = _names(folder / name / 'checkpoints') if all_killed else set()
        found |= {
            'signal': plan.sent,
            'to': plan.to,
            'after': sent - began,
            'phase': phase(events, main, sent, whole),
            'joined': all(_had(events[i], 'joined', sent) for i in range(soak.processes)),
            'took': [round(t - sent, 2) for t in ended],
        }
    final = folder / name / 'checkpoints' / str(steps) / 'metrics' / 'metrics'
    found['failures'] = failures(found, soak.processes, final.exists())
    return found


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return free.getsockname()[1]


def _events(logs: Path, name: str, number: int, index: int) -> Path:
    return logs / f'{name}-{number:03}-{index}.jsonl'


def _changed(path: Path, otherwise: float) -> float:
    return path.stat().st_mtime if path.exists() else otherwise


def _silent(now: float, sent: float, changes: list[float]) -> bool:
    return now > sent + PATIENCE if sent else now > max(changes) + SILENCE


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _had(events: list[dict[str, Any]], event: str, until: float) -> bool:
    return any(e['event'] == event and e['time'] <= until for e in events)


def phase(events: list[list[dict[str, Any]]], which: int, sent: float, whole: set[str]) -> str:
    """What process `which` was at when the signal was `sent`, from the events of all processes.

    whole: names of finished checkpoints, where nothing could go on after the signal: a save that
    is among them had ended, though nobody came to note it.
    """
    mine = [e for e in events[which] if e['time'] <= sent]
    count = Counter(e['event'] for e in mine)
    saved = {
        e['step'] for log in events for e in log if e['event'] == 'saved' and e['time'] <= sent
    }
    begun = {e['step'] for e in mine if e['event'] == 'saving'}
    saving = any(step not in saved and str(step) not in whole for step in begun)
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
    others = [code for i, code in enumerate(codes) if i not in found['to']]
    if final and not any(others) and not any(code > 0 for code in codes):
        return []  # too late, the run was finished
    hit = [codes[i] for i in found['to']]
    if found['signal'] == 'SIGKILL':
        # Who waits for a process that never joined cannot know that it is not the user's error.
        wrong = {0, PREEMPTED} | ({2} if found['joined'] else set())
        bad = hit != [-signal.SIGKILL] * len(hit) or bool(wrong & set(others))
    elif found['phase'] == BEFORE:
        bad = hit != [-signal.SIGTERM] and codes != [PREEMPTED] * processes
    else:
        bad = codes != [PREEMPTED] * processes
    return [f'{codes} after {found["signal"]} to {found["to"]} in {found["phase"]}'] if bad else []


# ---- Drawing interruptions


def counts(found: dict[str, Any], sent: str = '') -> Counter:
    """Interruptions by phase, of one signal or of both."""
    return Counter(
        s['phase']
        for s in found['starts']
        if s.get('signal', 'none') != 'none' and sent in s['signal'] and any(s['codes'])
    )


def heard(by_phase: Counter) -> int:
    return sum(number for name, number in by_phase.items() if name != BEFORE)


def missing(found: dict[str, Any]) -> dict[str, int]:
    """How many interruptions are still to come, by signal and by phase."""
    # One inside a save and an evaluation, which overlap, counts as inside a save only.
    phases = counts(found)
    have = {
        'SIGTERM': heard(counts(found, 'SIGTERM')),
        'SIGKILL': heard(counts(found, 'SIGKILL')),
        'save': phases[SAVE] + phases[BOTH],
        'evaluation': phases[EVALUATION],
    }
    wanted = {'SIGTERM': found['terms'], 'SIGKILL': found['kills'], **QUOTAS}
    if found['terms'] + found['kills'] < sum(QUOTAS.values()):  # a trial
        wanted |= dict.fromkeys(QUOTAS, 0)
    return {name: max(number - have[name], 0) for name, number in wanted.items()}


def startup(found: dict[str, Any]) -> float:
    """Seconds from the start of the processes to the first step or evaluation, as of late."""
    times = [found['calibration']['startup']]
    for s in found['starts']:
        # One that was interrupted on its way took at least as long.
        known = s['startup'] or max(s.get('after', 0), statistics.median(times[-5:]))
        times.append(known)
    return statistics.median(times[-5:])


def draw(found: dict[str, Any], processes: int) -> Plan:
    """The next interruption: a signal, uniform in (0, 2.5 start-ups), and whom it goes to."""
    rng = random.Random(f'{found["seed"]} {len(found["starts"])}')
    left = missing(found)
    terms, kills = left['SIGTERM'], left['SIGKILL']
    if not terms + kills:
        terms = kills = 1
    sent = rng.choices(('SIGTERM', 'SIGKILL'), (terms, kills))[0]
    to = [rng.randrange(processes)]
    if sent == 'SIGKILL' and rng.random() < 0.5:
        to = list(range(processes))
    return Plan(sent, rng.uniform(0, 2.5 * startup(found)), to)


# ---- The whole


def soak(flags: argparse.Namespace) -> dict[str, Any]:
    """Runs what is still to be run; returns the content of the JSON file."""
    kind = SOAKS[flags.soak]
    folder = flags.workdir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    found = read_or_new(flags)

    def save() -> None:
        unfinished = flags.output.with_name(flags.output.name + '.unfinished')
        unfinished.write_text(as_text(found))
        unfinished.replace(flags.output)

    if found.pop('current', None):  # this driver was ended, and its processes with it
        found['cut'] = found.get('cut', 0) + 1
        cut = {'run': _run(found), 'number': len(found['starts']), 'codes': [-9] * kind.processes}
        found['starts'].append(cut | {'startup': None, 'failures': [], 'cut': True})
    if 'total_steps' not in found:
        if flags.total_steps:
            found['total_steps'] = flags.total_steps
        else:
            found['calibration'] = calibrate(kind, folder)
            found['total_steps'] = needed_steps(found)
        save()
    steps = found['total_steps']
    if 'straight' not in found:
        forget(folder, 'straight')
        say(f'uninterrupted run of {steps} steps')
        straight = start(kind, 'straight', 0, kind.devices[0], steps, None, folder)
        if straight['failures']:
            raise SystemExit(f'the uninterrupted run failed: {straight["failures"]}')
        found['straight'] = straight
        found.setdefault('calibration', {'startup': straight['startup']})
        save()
    while True:
        name, starts = _run(found), found['starts']
        if starts and starts[-1]['run'] == name and not any(starts[-1]['codes']):
            found['runs'].append(check(found, name, flags.soak, folder))
            say(f'{name}: {json.dumps(found["runs"][-1])}')
            found['summary'] = summary(found)
            save()
            if not any(missing(found).values()):
                return found
            continue
        plan = draw(found, kind.processes) if any(missing(found).values()) else None
        number = len(starts)
        devices = kind.devices[number % len(kind.devices)]
        found['current'] = {'number': number, 'run': name}
        save()
        made = start(kind, name, number, devices, steps, plan, folder)
        made['failures'] += lost(starts, made)
        del found['current']
        starts.append(made)
        say(describe(made, steps))
        found['summary'] = summary(found)
        save()


def read_or_new(flags: argparse.Namespace) -> dict[str, Any]:
    """The JSON file as it is, or what a new one has."""
    names = ('jax', 'jaxlib', 'flax', 'orbax-checkpoint', 'numpy')
    given = {'soak': flags.soak, 'terms': flags.terms, 'kills': flags.kills, 'seed': flags.seed}
    given['sources'] = digest()
    if flags.output.exists():
        found = json.loads(flags.output.read_text())
        for name, value in given.items():
            if found[name] != value:
                raise SystemExit(
                    f'{flags.output} is of {name} {found[name]}, not {value}: begin anew, with '
                    'another --output and --workdir'
                )
        return found
    cpu = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())
    return given | {
        'versions': {'python': platform.python_version()}
        | {name: metadata.version(name) for name in names},
        'machine': f'{os.cpu_count()} x {cpu[1] if cpu else platform.machine()}',
        'date': time.strftime('%Y-%m-%d'),
        'starts': [],
        'runs': [],
    }


def as_text(found: dict[str, Any]) -> str:
    """JSON with a line for each start."""
    starts = ',\n'.join('  ' + json.dumps(s) for s in found['starts'])
    rest = {name: value for name, value in found.items() if name != 'starts'}
    return f'{json.dumps(rest, indent=1)[:-2]},\n "starts": [\n{starts}\n ]\n}}\n'


def digest() -> str:
    """Of the sources of psp_jax, which must stay the same."""
    made = hashlib.sha256()
    for path in sorted(ROOT.glob('psp_jax/**/*.py')):
        made.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return made.hexdigest()[:16]


def say(text: str) -> None:
    print(time.strftime('%H:%M:%S'), text, flush=True)


def _run(found: dict[str, Any]) -> str:
    return f'run-{len(found["runs"])}'


def forget(folder: Path, name: str) -> None:
    """Removes a run and its logs."""
    shutil.rmtree(folder / name, ignore_errors=True)
    for path in (folder / 'logs').glob(f'{name}-*'):
        path.unlink()


def calibrate(kind: Soak, folder: Path) -> dict[str, float]:
    """Start-up and seconds a step, saves and evaluations included, once all is compiled."""
    for number in range(2):
        forget(folder, 'calibration')
        devices = kind.devices[0]
        made = start(kind, 'calibration', number, devices, CALIBRATION_STEPS, None, folder)
        if made['failures']:
            raise SystemExit(f'calibration failed: {made["failures"]}; see {folder}/logs')
    pace = (made['seconds'] - made['startup']) / CALIBRATION_STEPS
    found = {'startup': round(made['startup'], 2), 'seconds_per_step': round(pace, 3)}
    say(f'calibration: {found}')
    shutil.rmtree(folder / 'calibration')
    return found


def needed_steps(found: dict[str, Any]) -> int:
    """So many that the interruptions come before the end: from what a start makes on average.

    A time t uniform in (0, 2.5 s), of which the first s are start-up, leaves (t - s)+ = 0.45 s.
    """
    starts = 1.2 * (found['terms'] + found['kills'])
    pace = found['calibration']
    return math.ceil(MARGIN * starts * 0.45 * pace['startup'] / pace['seconds_per_step'])


def lost(starts: list[dict[str, Any]], made: dict[str, Any]) -> list[str]:
    """Notes in `made` how many steps it took again; failures: it skipped one, or SIGTERM lost one.

    starts: all before it.
    """
    made['redone'] = 0
    before = [s for s in starts if s['run'] == made['run']]
    since = next((i for i in reversed(range(len(before))) if before[i].get('last')), None)
    if made.get('first') is None:
        return []
    if since is None:
        known = any(s.get('cut') for s in before)
        return [] if known or made['first'] == 1 else [f'began with step {made["first"]}']
    if any(s.get('cut') for s in before[since:]):
        return []  # steps were taken that the driver did not live to note
    made['redone'] = before[since]['last'] + 1 - made['first']
    if made['redone'] < 0:
        return [f'steps from {before[since]["last"] + 1} to {made["first"] - 1} were left out']
    if made['redone'] and PREEMPTED in before[since]['codes']:
        return [f'SIGTERM took {made["redone"]} steps back']
    return []


def describe(made: dict[str, Any], steps: int) -> str:
    what = f'{made["run"]} start {made["number"]}, {made["devices"]} device(s): '
    if 'signal' in made:
        what += f'{made["signal"]} to {made["to"]} after {made["after"]:.1f} s in {made["phase"]}, '
        what += f'ended {made["took"]} s later, '
    what += f'codes {made["codes"]}, steps {made["first"]} to {made["last"]} of {steps}'
    return what + ''.join(f'; FAILURE: {failure}' for failure in made['failures'])


# ---- Checking a finished run


def check(found: dict[str, Any], name: str, which: str, folder: Path) -> dict[str, Any]:
    """Whether the run `name` is the uninterrupted one; each list has what is wrong.

    ledger: (step, example ids, digest of the pixels) of each process, with every step there;
    log: each step once in metrics.jsonl; retained: the newest and the best checkpoints, no others.
    With equal numbers of devices also arrays: those of the last checkpoint, bit by bit; scores: of
    every evaluation; losses: of every step.
    """
    run, straight = folder / name, folder / 'straight'
    steps, processes = found['total_steps'], SOAKS[which].processes
    ledgers = [read_ledger(folder, 'straight', i) for i in range(processes)]
    takes = [read_ledger(folder, name, i) for i in range(processes)]
    wrong: dict[str, list[Any]] = {'ledger': [], 'log': []}
    for expected, mine in zip(ledgers, takes, strict=True):
        if sorted(expected) != list(range(1, steps + 1)):
            wrong['ledger'].append('the uninterrupted run is not whole')
        wrong['ledger'] += sorted(expected.keys() ^ mine.keys())
        wrong['ledger'] += [
            step
            for step, rows in mine.items()
            if any(row != expected.get(step, [None])[0] for row in rows)
        ]
    logs = [_lines(path / 'metrics.jsonl') for path in (run, straight)]
    trained, evaluated = ([[e for e in log if ('loss' in e) == t] for log in logs] for t in (1, 0))
    wrong['log'] += _apart([e['step'] for e in trained[0]], list(range(1, steps + 1)))
    wrong['log'] += _apart(*[[e['step'] for e in log] for log in evaluated])
    scores = [read_scores(path) for path in (run, straight)]
    if scores[0].keys() != scores[1].keys():
        wrong['log'].append('evaluations differ')
    wrong['retained'] = retained(folder, name, scores[0])
    if len(SOAKS[which].devices) == 1:
        last_ones = [str(path / 'checkpoints' / str(steps)) for path in (run, straight)]
        # In a process of its own: after JAX has started threads, no process should be forked.
        words = [sys.executable, '-m', 'benchmarks.soak', '--compare', *last_ones]
        compared = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE)
        wrong['arrays'] = json.loads(compared.stdout)
        wrong['scores'] = [k for k in scores[1] if scores[0].get(k) != scores[1][k]]
        wrong['losses'] = [
            a['step'] for a, b in zip(*trained, strict=False) if _losses(a) != _losses(b)
        ]
    last = [statistics.mean(e['loss'] for e in log[-LAST:]) for log in trained]
    final = [log[max(log)]['mIoU'] for log in scores]
    return {
        'run': name,
        'wrong': {key: values[:10] for key, values in wrong.items()},
        'steps': steps,
        'taken': sum(len(rows) for rows in takes[0].values()),
        'evaluations': len(scores[0]),
        'final_loss': {'interrupted': last[0], 'uninterrupted': last[1]},
        'final_mIoU': {'interrupted': final[0], 'uninterrupted': final[1]},
    }


def read_ledger(folder: Path, name: str, index: int) -> dict[int, list[Any]]:
    """{step: [(example ids, digest of their pixels), ...]}, each as often as a process took it."""
    ledger: dict[int, list[Any]] = {}
    for path in sorted((folder / 'logs').glob(f'{name}-*-{index}.jsonl')):
        for event in _lines(path):
            if event['event'] == 'step':
                ledger.setdefault(event['step'], []).append((event['ids'], event['pixels']))
    return ledger


def _apart(one: list[int], other: list[int]) -> list[int]:
    return (
        []
        if one == other
        else sorted((Counter(one) - Counter(other)) | (Counter(other) - Counter(one))) or [0]
    )


def _losses(line: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in line.items() if 'loss' in key or key == 'learning_rate'}


def read_scores(run: Path) -> dict[int, dict[str, Any]]:
    """{step: content of its metrics.json, without the time it took}."""
    paths = run.glob('eval/*/metrics.json')
    return {s['step']: {**s, 'seconds': 0} for s in (json.loads(p.read_text()) for p in paths)}


def retained(folder: Path, name: str, scores: dict[int, dict[str, Any]]) -> list[str]:
    """Checkpoints that should not be there (`+NAME`), and those that should (`-NAME`)."""
    saved = {
        event['step']
        for path in (folder / 'logs').glob(f'{name}-*-0.jsonl')
        for event in _lines(path)
        if event['event'] in ('saved', 'resumed') and event['step']
    }
    wanted = {str(step) for step in sorted(saved)[-KEEP:]}
    top = max(s['mIoU'] for s in scores.values())
    there = _names(folder / name / 'checkpoints')
    best = {str(step) for step, s in scores.items() if s['mIoU'] == top}
    if not best & there:
        wanted |= best
    else:  # of several that are equally good, any
        wanted |= {max(best & there, key=int)}
    return [f'+{n}' for n in sorted(there - wanted)] + [f'-{n}' for n in sorted(wanted - there)]


def differing_arrays(one: Path, other: Path) -> list[str]:
    """Names of arrays (parameters, statistics, momentum, step) whose bits are not the same."""
    os.environ['JAX_PLATFORMS'] = 'cpu'
    quieten_libraries()
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    trees = []
    for path in (one / 'state', other / 'state'):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            names = checkpointer.metadata(path).item_metadata.tree
            # As arrays of the host, whatever devices they were on.
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
            tree = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=how))
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        trees.append({jax.tree_util.keystr(key): np.asarray(value) for key, value in flat})
    first, second = trees
    assert len(first) > 100, 'there are parameters, statistics and momentum'
    return [
        name
        for name in sorted(first.keys() | second.keys())
        if name not in first
        or name not in second
        or first[name].dtype != second[name].dtype
        or first[name].tobytes() != second[name].tobytes()
    ]


# ---- The table


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Counts over all starts so far."""
    starts = found['starts']
    peers = [
        seconds
        for s in starts
        if s.get('signal') == 'SIGKILL'
        for i, seconds in enumerate(s['took'])
        if i not in s['to']
    ]
    after_term = [max(s['took']) for s in starts if s.get('signal') == 'SIGTERM' and heard_one(s)]
    return {
        'phases': {sent: dict(counts(found, sent)) for sent in ('SIGTERM', 'SIGKILL')},
        'starts': len(starts),
        'finished_runs': len(found['runs']),
        'failures': [f'start {s["number"]}: {f}' for s in starts for f in s['failures']],
        'redone': sum(s.get('redone', 0) for s in starts),
        'most_redone': max((s.get('redone', 0) for s in starts), default=0),
        'seconds_after_sigterm': _spread(after_term),
        'seconds_of_peer_after_sigkill': _spread(peers),
        'hours': round(sum(s.get('seconds', 0) for s in starts) / 3600, 2),
        'missing': missing(found),
    }


def heard_one(s: dict[str, Any]) -> bool:
    return s['phase'] != BEFORE and PREEMPTED in s['codes']


def _spread(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {
        'count': len(seconds),
        'median': round(statistics.median(seconds), 1),
        'most': round(max(seconds), 1),
    }


def table(results: Path) -> str:
    """A Markdown table of what the folder has of the soaks, one column each."""
    files = {name: results / f'soak_{name}.json' for name in SOAKS}
    found = {n: json.loads(p.read_text()) for n, p in files.items() if p.exists()}
    columns = {name: column(found[name]) for name in SOAKS if 'summary' in found.get(name, {})}
    rows = [''] + [f'{SOAKS[name].title}' for name in SOAKS]
    lines = [f'| {" | ".join(rows)} |', '|---' * (len(SOAKS) + 1) + '|']
    for row in ROWS:
        cells = [
            columns[name].get(row, '-') if name in columns else 'not run yet' for name in SOAKS
        ]
        lines.append(f'| {" | ".join([row, *cells])} |')
    return '\n'.join(lines)


ROWS = (
    'state',
    'interruptions: SIGTERM, SIGKILL',
    *(f'... {name}' for name in PHASES),
    'starts, runs that were finished',
    'wrong exit codes, hangs, lost steps',
    'steps of a run',
    'steps taken again after SIGKILL: all, most at once',
    'seconds to exit after SIGTERM: median, most',
    'seconds until the other process ends after SIGKILL of one: median, most',
    '(step, example ids, pixels) of the uninterrupted run',
    'arrays of the last checkpoint',
    'scores of all evaluations',
    'losses of all steps',
    'every step once in metrics.jsonl',
    'the newest and the best checkpoints, nothing else',
    f'final loss, mean of {LAST} steps: interrupted, not',
    'final mIoU: interrupted, not',
    'hours, with interruptions',
    'machine',
    'versions',
)


def column(found: dict[str, Any]) -> dict[str, str]:
    """The cells of a soak."""
    made, runs = found['summary'], found['runs']
    by = made['phases']
    finished = bool(runs) and not any(made['missing'].values())
    totals = [str(heard(Counter(by[sent]))) for sent in ('SIGTERM', 'SIGKILL')]
    cells = {
        'state': 'finished' if finished else 'under way',
        'interruptions: SIGTERM, SIGKILL': ', '.join(totals),
        'starts, runs that were finished': f'{made["starts"]}, {made["finished_runs"]}',
        'wrong exit codes, hangs, lost steps': str(len(made['failures'])),
        'steps of a run': str(found['total_steps']),
        'steps taken again after SIGKILL: all, most at once': (
            f'{made["redone"]}, {made["most_redone"]}'
        ),
        'hours, with interruptions': f'{made["hours"]:.1f}',
        'machine': found['machine'],
        'versions': ', '.join(f'{n} {v}' for n, v in found['versions'].items()),
    }
    for name in PHASES:
        cells[f'... {name}'] = ', '.join(str(by[s].get(name, 0)) for s in ('SIGTERM', 'SIGKILL'))
    for row, key in {
        'seconds to exit after SIGTERM: median, most': 'seconds_after_sigterm',
        'seconds until the other process ends after SIGKILL of one: median, most': (
            'seconds_of_peer_after_sigkill'
        ),
    }.items():
        if made[key]:
            cells[row] = f'{made[key]["median"]:g}, {made[key]["most"]:g}'
    for row, key, good in (
        ('(step, example ids, pixels) of the uninterrupted run', 'ledger', 'identical'),
        ('arrays of the last checkpoint', 'arrays', 'bit-equal'),
        ('scores of all evaluations', 'scores', 'equal'),
        ('losses of all steps', 'losses', 'equal'),
        ('every step once in metrics.jsonl', 'log', 'yes'),
        ('the newest and the best checkpoints, nothing else', 'retained', 'yes'),
    ):
        if runs and key in runs[0]['wrong']:
            bad = [value for run in runs for value in run['wrong'][key]]
            cells[row] = f'**no**: {bad}' if bad else good
        elif not runs:
            cells[row] = 'not yet'
    for row, key, digits in (
        (f'final loss, mean of {LAST} steps: interrupted, not', 'final_loss', 4),
        ('final mIoU: interrupted, not', 'final_mIoU', 4),
    ):
        if runs:
            cells[row] = '; '.join(
                f'{run[key]["interrupted"]:.{digits}f}, {run[key]["uninterrupted"]:.{digits}f}'
                for run in runs
            )
    return cells


def with_table(text: str, results: Path) -> str:
    """Markdown with the table below the heading 'The figures' as it is now."""
    made = table(results)
    text, found = re.subn(
        r'(?m)^(## The figures\n\n)(?:\|.*\n)*\n*', lambda match: f'{match[1]}{made}\n\n', text
    )
    assert found == 1, 'there must be one heading "The figures"'
    return text.rstrip() + '\n'


def main() -> None:
    if sys.argv[1:2] == ['--worker']:
        sys.exit(work(sys.argv[2], sys.argv[3:]))
    if sys.argv[1:2] == ['--compare']:
        print(json.dumps(differing_arrays(*map(Path, sys.argv[2:]))))
        return
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.soak',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--soak', choices=SOAKS)
    parser.add_argument('--workdir', type=Path, help='for checkpoints and logs')
    parser.add_argument('--output', type=Path, help='JSON; default: soak_SOAK.json in --results')
    parser.add_argument('--terms', type=int, default=25, help='interruptions by SIGTERM')
    parser.add_argument('--kills', type=int, default=25, help='by SIGKILL')
    parser.add_argument('--seed', type=int, default=0, help='of the interruptions')
    parser.add_argument('--total_steps', type=int, help='default: from a measured speed')
    parser.add_argument('--tables', action='store_true', help='only print the table')
    parser.add_argument('--results', type=Path, default=RESULTS)
    parser.add_argument('--docs', type=Path, help='a Markdown file that the table goes into')
    flags = parser.parse_args()
    failed = False
    if not flags.tables:
        if not flags.soak or not flags.workdir:
            parser.error('--soak and --workdir are needed')
        flags.output = flags.output or flags.results / f'soak_{flags.soak}.json'
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        found = soak(flags)
        print(json.dumps(found['summary'], indent=1))
        failed = bool(found['summary']['failures']) or any(
            any(run['wrong'].values()) for run in found['runs']
        )
    else:
        print(table(flags.results))
    if flags.docs:
        flags.docs.write_text(with_table(flags.docs.read_text(), flags.results))
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    main()
