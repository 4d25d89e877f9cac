"""Whether a soak's run that was interrupted is the one that was not."""

import json
import multiprocessing
import os
import statistics
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.soak_start import KEEP, Soak, names_in, read_lines
from psp_jax.command_line import quieten_libraries

LAST = 20  # steps, of which the final loss is the mean


def check(soak: Soak, name: str, steps: int, folder: Path) -> dict[str, Any]:
    """Whether the run `name` is the uninterrupted one; each list of `wrong` has what is not.

    ledger: (step, example ids, digest of the pixels) of each process, with every step there;
    log: each step once in metrics.jsonl; retained: the newest and the best checkpoints, no others.
    With equal numbers of devices also arrays: those of the last checkpoint, bit by bit; scores: of
    every evaluation; losses: of every step.
    """
    names = (name, 'straight')
    every_step = list(range(1, steps + 1))
    wrong: dict[str, list[Any]] = {'ledger': [], 'log': []}
    for i in range(soak.processes):
        mine, expected = (read_ledger(folder, n, i) for n in names)
        if sorted(expected) != every_step:
            wrong['ledger'].append('the uninterrupted run is not whole')
        for step in sorted(mine.keys() | expected.keys()):
            rows = mine.get(step)
            if not rows or any(row not in expected.get(step, []) for row in rows):
                wrong['ledger'].append(step)
    logs = [read_lines(folder / n / 'metrics.jsonl') for n in names]
    trained = [[e for e in log if 'loss' in e] for log in logs]
    evaluated = [[e['step'] for e in log if 'loss' not in e] for log in logs]
    wrong['log'] += _apart([e['step'] for e in trained[0]], every_step) + _apart(*evaluated)
    scores = [read_scores(folder / n) for n in names]
    if scores[0].keys() != scores[1].keys():
        wrong['log'].append('evaluations differ')
    wrong['retained'] = retained(folder, name, scores[0])
    if len(soak.devices) == 1:
        last_ones = [folder / n / 'checkpoints' / str(steps) for n in names]
        # In a process of its own: after JAX has started threads, no process should be forked.
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
            wrong['arrays'] = pool.submit(differing_arrays, *last_ones).result()
        wrong['scores'] = [step for step in scores[1] if scores[0].get(step) != scores[1][step]]
        wrong['losses'] = [
            a['step'] for a, b in zip(*trained, strict=False) if _losses(a) != _losses(b)
        ]

    def pair(values: Any) -> dict[str, float]:
        return dict(zip(('interrupted', 'uninterrupted'), values, strict=True))

    return {
        'run': name,
        'wrong': {key: values[:10] for key, values in wrong.items()},
        'steps': steps,
        'taken': sum(len(rows) for rows in read_ledger(folder, name, 0).values()),
        'evaluations': len(scores[0]),
        'final_loss': pair(statistics.mean(e['loss'] for e in log[-LAST:]) for log in trained),
        'final_mIoU': pair(log[max(log)]['mIoU'] for log in scores),
    }


def read_ledger(folder: Path, name: str, index: int) -> dict[int, list[Any]]:
    """{step: [(example ids, digest of their pixels), ...]}, each as often as a process took it."""
    ledger: dict[int, list[Any]] = {}
    for path in sorted((folder / 'logs').glob(f'{name}-*-{index}.jsonl')):
        for event in read_lines(path):
            if event['event'] == 'step':
                ledger.setdefault(event['step'], []).append((event['ids'], event['pixels']))
    return ledger


def _apart(one: list[int], other: list[int]) -> list[int]:
    """Numbers that one list has more often than the other; [0] if only the order differs."""
    if one == other:
        return []
    a, b = Counter(one), Counter(other)
    return sorted(n for n in a.keys() | b.keys() if a[n] != b[n]) or [0]


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
        for event in read_lines(path)
        if event['event'] in ('saved', 'resumed') and event['step']
    }
    top = max(s['mIoU'] for s in scores.values())
    best = {str(step) for step, s in scores.items() if s['mIoU'] == top}
    there = names_in(folder / name / 'checkpoints')
    if best & there:
        best = {max(best & there, key=int)}  # of several that are equally good, any
    wanted = {str(step) for step in sorted(saved)[-KEEP:]} | best
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
