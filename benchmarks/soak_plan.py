"""When a soak interrupts a run, and how often it still has to."""

import math
import random
import statistics
from collections import Counter
from typing import Any

from benchmarks.soak_start import BEFORE, BOTH, EVALUATION, SAVE, Plan

SIGNALS = ('SIGTERM', 'SIGKILL')
QUOTAS = {'save': 5, 'evaluation': 5}  # interruptions inside
SPAN = 2.5  # start-ups, within which an interruption comes
MARGIN = 1.25  # steps of the run over those that the interruptions should take


def counts(found: dict[str, Any], signals: tuple[str, ...] = SIGNALS) -> Counter:
    """Interruptions by phase."""
    return Counter(
        s['phase'] for s in found['starts'] if s.get('signal') in signals and any(s['codes'])
    )


def heard(by_phase: dict[str, int]) -> int:
    return sum(number for name, number in by_phase.items() if name != BEFORE)


def missing(found: dict[str, Any]) -> dict[str, int]:
    """How many interruptions are still to come, by signal and by phase."""
    phases = counts(found)
    have = {name: heard(counts(found, (name,))) for name in SIGNALS}
    # What was inside a save and an evaluation, which overlap, counts as one of the two.
    lent = min(phases[BOTH], max(QUOTAS['save'] - phases[SAVE], 0))
    have |= {'save': phases[SAVE] + lent, 'evaluation': phases[EVALUATION] + phases[BOTH] - lent}
    wanted = {'SIGTERM': found['terms'], 'SIGKILL': found['kills'], **QUOTAS}
    if found['terms'] + found['kills'] < sum(QUOTAS.values()):  # a trial
        wanted |= dict.fromkeys(QUOTAS, 0)
    return {name: max(number - have[name], 0) for name, number in wanted.items()}


def startup(found: dict[str, Any]) -> float:
    """Seconds from the start of the processes to the first step or evaluation, as of late."""
    times = [found['calibration']['startup']]
    for s in found['starts']:
        # One that was interrupted on its way took at least as long.
        times.append(s['startup'] or max(s.get('after', 0), statistics.median(times[-5:])))
    return statistics.median(times[-5:])


def draw(found: dict[str, Any], processes: int) -> Plan:
    """The next interruption: a signal, uniform in (0, SPAN start-ups), and whom it goes to."""
    rng = random.Random(f'{found["seed"]} {len(found["starts"])}')
    left = [missing(found)[name] for name in SIGNALS]
    sent = rng.choices(SIGNALS, left if any(left) else (1, 1))[0]
    to = [rng.randrange(processes)]
    if sent == 'SIGKILL' and rng.random() < 0.5:
        to = list(range(processes))
    return Plan(sent, rng.uniform(0, SPAN * startup(found)), to)


def needed_steps(found: dict[str, Any]) -> int:
    """So many that the interruptions come before the end: from what a start makes on average.

    A time t uniform in (0, SPAN s), of which the first s are start-up, leaves in the mean
    (t - s)+ = s (SPAN - 1)^2 / (2 SPAN).
    """
    starts = 1.2 * (found['terms'] + found['kills'])
    share = (SPAN - 1) ** 2 / (2 * SPAN)
    pace = found['calibration']
    return math.ceil(MARGIN * starts * share * pace['startup'] / pace['seconds_per_step'])
