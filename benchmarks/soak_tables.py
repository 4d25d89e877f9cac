"""What the soaks found: counts over all starts, and the Markdown table."""

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.soak_check import LAST
from benchmarks.soak_plan import SIGNALS, counts, heard, missing
from benchmarks.soak_start import BEFORE, PHASES, SOAKS
from psp_jax.command_line import PREEMPTED

Found = dict[str, Any]  # the content of a soak's JSON file


def summary(found: Found) -> dict[str, Any]:
    """Counts over all starts so far."""
    starts = found['starts']
    redone = [s.get('redone', 0) for s in starts]
    after_term = [
        max(s['took'])
        for s in starts
        if s.get('signal') == 'SIGTERM' and s['phase'] != BEFORE and PREEMPTED in s['codes']
    ]
    peers = [
        seconds
        for s in starts
        if s.get('signal') == 'SIGKILL'
        for i, seconds in enumerate(s['took'])
        if i not in s['to']
    ]
    return {
        'phases': {name: dict(counts(found, (name,))) for name in SIGNALS},
        'starts': len(starts),
        'finished_runs': len(found['runs']),
        'failures': [f'start {s["number"]}: {f}' for s in starts for f in s['failures']],
        'redone': sum(redone),
        'most_redone': max(redone, default=0),
        'seconds_after_sigterm': _spread(after_term),
        'seconds_of_peer_after_sigkill': _spread(peers),
        'hours': round(sum(s.get('seconds', 0) for s in starts) / 3600, 2),
        'missing': missing(found),
    }


def _spread(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {
        'count': len(seconds),
        'median': round(statistics.median(seconds), 1),
        'most': round(max(seconds), 1),
    }


# ---- The cells of a row


def _state(found: Found) -> str:
    finished = found['runs'] and not any(found['summary']['missing'].values())
    return 'finished' if finished else 'under way'


def _interruptions(found: Found) -> str:
    return ', '.join(str(heard(found['summary']['phases'][name])) for name in SIGNALS)


def _in_phase(phase: str, found: Found) -> str:
    return ', '.join(str(found['summary']['phases'][name].get(phase, 0)) for name in SIGNALS)


def _two(one: str, other: str, found: Found) -> str:
    return f'{found["summary"][one]}, {found["summary"][other]}'


def _median_and_most(key: str, found: Found) -> str:
    spread = found['summary'][key]
    return f'{spread["median"]:g}, {spread["most"]:g}' if spread else '-'


def _checked(key: str, good: str, found: Found) -> str:
    """What is wrong in any run; '-' where it is not compared."""
    runs = found['runs']
    if not runs:
        return 'not yet'
    if key not in runs[0]['wrong']:
        return '-'
    bad = [value for run in runs for value in run['wrong'][key]]
    return f'**no**: {bad}' if bad else good


def _both_runs(key: str, found: Found) -> str:
    pairs = [f'{r[key]["interrupted"]:.4f}, {r[key]["uninterrupted"]:.4f}' for r in found['runs']]
    return '; '.join(pairs) or '-'


ROWS: dict[str, Callable[[Found], str]] = {
    'state': _state,
    'interruptions: SIGTERM, SIGKILL': _interruptions,
    **{f'... {phase}': partial(_in_phase, phase) for phase in PHASES},
    'starts, runs that were finished': partial(_two, 'starts', 'finished_runs'),
    'wrong exit codes, hangs, lost steps': lambda found: str(len(found['summary']['failures'])),
    'steps of a run': lambda found: str(found['total_steps']),
    'steps taken again after SIGKILL: all, most at once': partial(_two, 'redone', 'most_redone'),
    'seconds to exit after SIGTERM: median, most': partial(
        _median_and_most, 'seconds_after_sigterm'
    ),
    'seconds until the other process ends after SIGKILL of one: median, most': partial(
        _median_and_most, 'seconds_of_peer_after_sigkill'
    ),
    '(step, example ids, pixels) of the uninterrupted run': partial(
        _checked, 'ledger', 'identical'
    ),
    'arrays of the last checkpoint': partial(_checked, 'arrays', 'bit-equal'),
    'scores of all evaluations': partial(_checked, 'scores', 'equal'),
    'losses of all steps': partial(_checked, 'losses', 'equal'),
    'every step once in metrics.jsonl': partial(_checked, 'log', 'yes'),
    'the newest and the best checkpoints, nothing else': partial(_checked, 'retained', 'yes'),
    f'final loss, mean of {LAST} steps: interrupted, not': partial(_both_runs, 'final_loss'),
    'final mIoU: interrupted, not': partial(_both_runs, 'final_mIoU'),
    'hours, with interruptions': lambda found: f'{found["summary"]["hours"]:.1f}',
    'digest of the sources': lambda found: f'`{found["sources"]}`',
    'machine': lambda found: found['machine'],
    'versions': lambda found: ', '.join(f'{n} {v}' for n, v in found['versions'].items()),
}


def table(results: Path) -> str:
    """A Markdown table of what the folder has of the soaks, one column each."""
    columns = [column(results / f'soak_{name}.json') for name in SOAKS]
    lines = ['| ' + ' | '.join(['', *(soak.title for soak in SOAKS.values())]) + ' |']
    lines.append('|---' * (len(SOAKS) + 1) + '|')
    lines += [f'| {" | ".join(row)} |' for row in zip(ROWS, *columns, strict=True)]
    return '\n'.join(lines)


def column(path: Path) -> list[str]:
    """The cells of a soak, in the order of ROWS."""
    found = json.loads(path.read_text()) if path.exists() else {}
    if 'summary' not in found:
        return ['not run yet'] * len(ROWS)
    return [cell(found) for cell in ROWS.values()]
