"""The long test that nothing is lost: a run that is interrupted again and again, to its end.

    python -m benchmarks.soak --soak a1 --workdir runs/soak/a1 [--terms 25 --kills 25 --seed 0]
    python -m benchmarks.soak --tables [--docs docs/reliability.md]

a1: one process with 2 CPU devices; a2: two processes with 1 each; b: one process with 1, 2, 4 or 8
devices, another number at each restart. A PSPNet-18 with narrow heads trains on the built-in
scenes, once without interruption and once with SIGTERM and SIGKILL at times uniform in wall time,
from the start of the process on. What they hit is counted from what the processes wrote down. It
goes on until there were enough of each signal, with 5 interruptions inside saves and 5 inside
evaluations; a run that ends before is checked, and another one begins. Then (see
`soak_check.check`) the interrupted runs have to be the uninterrupted one.

All is in the JSON file --output (benchmarks/results/soak_SOAK.json), which is written after each
interruption: the same command goes on from there. It takes hours. As the runs have to be of the
same program, psp_jax must not change meanwhile: run it in a copy of the repository. All starts
share one folder of compiled programs (JAX_COMPILATION_CACHE_DIR), or most of the time would go to
compiling.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.markdown import with_table
from benchmarks.soak_check import check
from benchmarks.soak_plan import draw, missing, needed_steps
from benchmarks.soak_start import ROOT, SOAKS, Soak, lost, start
from benchmarks.soak_tables import summary, table
from psp_jax.command_line import whole_file

CALIBRATION_STEPS = 12


def soak(flags: argparse.Namespace) -> dict[str, Any]:
    """Runs what is still to be run; returns the content of the JSON file."""
    kind = SOAKS[flags.soak]
    folder = flags.workdir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    found = read_or_new(flags)
    starts, runs = found['starts'], found['runs']

    def save() -> None:
        if starts:
            found['summary'] = summary(found)
        with whole_file(str(flags.output)) as path:
            Path(path).write_text(as_text(found))

    if found.pop('current', None):  # this driver was ended, and its processes with it
        found['cut'] = found.get('cut', 0) + 1
        cut = {'run': f'run-{len(runs)}', 'number': len(starts), 'codes': [-9] * kind.processes}
        starts.append(cut | {'startup': None, 'failures': [], 'cut': True})
    if 'total_steps' not in found:
        if flags.total_steps:
            found['total_steps'] = flags.total_steps
        else:
            found['calibration'] = calibrate(kind, folder)
            found['total_steps'] = needed_steps(found)
        save()
    steps = found['total_steps']
    if 'straight' not in found:
        say(f'uninterrupted run of {steps} steps')
        straight = start_anew(kind, 'straight', 0, steps, folder)
        found['straight'] = straight
        found.setdefault('calibration', {'startup': straight['startup']})
        save()
    while True:
        name, number = f'run-{len(runs)}', len(starts)
        if starts and starts[-1]['run'] == name and not any(starts[-1]['codes']):
            runs.append(check(kind, name, steps, folder))
            say(f'{name}: {json.dumps(runs[-1])}')
            save()
            if not any(missing(found).values()):
                return found
            continue
        plan = draw(found, kind.processes) if any(missing(found).values()) else None
        devices = kind.devices[number % len(kind.devices)]
        found['current'] = {'number': number, 'run': name}
        save()
        made = start(kind, name, number, devices, steps, plan, folder)
        made['failures'] += lost(starts, made)
        del found['current']
        starts.append(made)
        say(describe(made, steps))
        save()


def read_or_new(flags: argparse.Namespace) -> dict[str, Any]:
    """The JSON file as it is, or what a new one has."""
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
    packages = ('jax', 'jaxlib', 'flax', 'orbax-checkpoint', 'numpy')
    cpu = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())
    return given | {
        'versions': {'python': platform.python_version()}
        | {name: metadata.version(name) for name in packages},
        'machine': f'{os.cpu_count()} x {cpu[1] if cpu else platform.machine()}',
        'date': time.strftime('%Y-%m-%d'),
        'starts': [],
        'runs': [],
    }


def digest() -> str:
    """Of the sources of psp_jax, which must stay the same."""
    made = hashlib.sha256()
    for path in sorted(ROOT.glob('psp_jax/**/*.py')):
        made.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return made.hexdigest()[:16]


def as_text(found: dict[str, Any]) -> str:
    """JSON with a line for each start."""
    starts = ',\n'.join('  ' + json.dumps(s) for s in found['starts'])
    rest = {name: value for name, value in found.items() if name != 'starts'}
    return f'{json.dumps(rest, indent=1)[:-2]},\n "starts": [\n{starts}\n ]\n}}\n'


def calibrate(kind: Soak, folder: Path) -> dict[str, float]:
    """Start-up and seconds a step, saves and evaluations included, once all is compiled."""
    for number in range(2):
        made = start_anew(kind, 'calibration', number, CALIBRATION_STEPS, folder)
    pace = (made['seconds'] - made['startup']) / CALIBRATION_STEPS
    found = {'startup': round(made['startup'], 2), 'seconds_per_step': round(pace, 3)}
    say(f'calibration: {found}')
    shutil.rmtree(folder / 'calibration')
    return found


def start_anew(kind: Soak, name: str, number: int, steps: int, folder: Path) -> dict[str, Any]:
    """Makes a run without interruption, after removing what there is of it."""
    shutil.rmtree(folder / name, ignore_errors=True)
    for path in (folder / 'logs').glob(f'{name}-*'):
        path.unlink()
    made = start(kind, name, number, kind.devices[0], steps, None, folder)
    if made['failures']:
        raise SystemExit(f'{name} failed: {made["failures"]}; see {folder}/logs')
    return made


def say(text: str) -> None:
    print(time.strftime('%H:%M:%S'), text, flush=True)


def describe(made: dict[str, Any], steps: int) -> str:
    what = f'{made["run"]} start {made["number"]}, {made["devices"]} device(s): '
    if 'signal' in made:
        what += f'{made["signal"]} to {made["to"]} after {made["after"]:.1f} s in {made["phase"]}, '
        what += f'ended {made["took"]} s later, '
    what += f'codes {made["codes"]}, steps {made["first"]} to {made["last"]} of {steps}'
    return what + ''.join(f'; FAILURE: {failure}' for failure in made['failures'])


def main() -> None:
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
    parser.add_argument('--results', type=Path, default=ROOT / 'benchmarks' / 'results')
    parser.add_argument('--docs', type=Path, help='a Markdown file that the table goes into')
    flags = parser.parse_args()
    failed = False
    if flags.tables:
        print(table(flags.results))
    else:
        if not flags.soak or not flags.workdir:
            parser.error('--soak and --workdir are needed')
        flags.output = flags.output or flags.results / f'soak_{flags.soak}.json'
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        found = soak(flags)
        print(json.dumps(found['summary'], indent=1))
        wrong = [values for run in found['runs'] for values in run['wrong'].values()]
        failed = bool(found['summary']['failures']) or any(wrong)
    if flags.docs:
        page = with_table(flags.docs.read_text(), '## The figures', table(flags.results))
        flags.docs.write_text(page)
    sys.exit(failed)


if __name__ == '__main__':
    main()
