"""Fills the tables of docs/scale.md: what each recipe needs on machines that you may not have.

    python -m benchmarks.scale [--only PATTERN] [--tables] [--docs docs/scale.md]

Each row is one `--mode dry_run --topology ...` in a process of its own, which takes minutes for a
TPU. Its JSON stays in the folder --results, and rows that have one are not run again, so you can
stop and restart. Then the tables are printed; rows without results say `not run`. Needs
requirements-topology.txt.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.markdown import with_table
from psp_jax.dry_run.topology import GIB

BF16 = '--config.dtype=bfloat16'


class Row(NamedTuple):
    """The dry run of a data set's recipe at a depth, for a topology."""

    data: str
    depth: int
    topology: str
    overrides: tuple[str, ...] = (BF16,)

    @property
    def name(self) -> str:
        words = [f'{self.data}{self.depth}', self.topology.replace(':', '-')]
        words += [word.removeprefix('--config.').replace('=', '') for word in self.overrides]
        return '_'.join(words)


SPACE2 = '--config.mesh.space=2'
DATA = ('ade20k', 'voc2012', 'cityscapes')
ADE = tuple(Row('ade20k', 50, t) for t in ('v5e:2x4', 'v4:2x2x2', 'v5p:2x2x2', 'v6e:2x4', 'h100:8'))
PAIRS = tuple((data, depth) for depth in (50, 101) for data in DATA)
OTHERS = tuple(Row(*pair, t) for pair in PAIRS[1:] for t in ('v5e:2x4', 'h100:8'))
# One GPU runs the recipes unchanged, in float32. A v5e slice has 1, 4, 8, ... chips.
SMALLEST = (
    *(Row(*pair, 'h100:1', ()) for pair in PAIRS),
    Row('cityscapes', 101, 'h100:1'),
    *(Row(data, 18, 'h100:1', ()) for data in ('camvid', 'pets', 'scenes')),
    Row('custom', 50, 'h100:1', ()),
    *(Row(data, 50, 'v5e:1x1') for data in DATA),
    Row('cityscapes', 50, 'v5e:2x2'),
    Row('cityscapes', 50, 'v5e:4x4', (BF16, SPACE2)),  # half an image a chip
)
TABLES = {
    'ADE20K, PSPNet-50': ADE,
    'The other data sets and depths': OTHERS,
    'The smallest slices': SMALLEST,
}
# The order of the runs: the quick ones (GPUs) first, then the smallest slices.
ORDER = sorted(
    (*ADE, *SMALLEST, *OTHERS),
    key=lambda row: (row.topology.startswith('v'), row in OTHERS, not row.overrides),
)
COLUMNS = (
    *('data set', 'depth', 'machine', 'dtype', 'images a device', 'GFLOPs an image'),
    *('GiB a device', 'fits', 'all-reduce a step', 'ms a step', 'images/s', 'of peak'),
    *('evaluation: GiB a device', 'images/s', 'compiled in'),
)


def run_row(row: Row, path: Path) -> bool:
    """Runs the command of a row, with its JSON in `path`; returns whether it succeeded."""
    words = ['--mode', 'dry_run', '--config', f'configs/{row.data}.py:depth={row.depth}']
    words += ['--topology', row.topology, '--output', str(path), *row.overrides]
    print(f'\n{row.name}: python -m psp_jax.main {" ".join(words)}', flush=True)
    return (
        subprocess.run([sys.executable, '-m', 'psp_jax.main', *words], check=False).returncode == 0
    )


def cells(row: Row, found: dict[str, Any] | None) -> list[str]:
    """The cells of a row; found: its JSON, or None if it was not run."""
    if found is None:
        start = [row.data, str(row.depth), f'`{row.topology}`', 'not run']
        return start + [''] * (len(COLUMNS) - len(start))
    train, evaluation, grid = found['train'], found['evaluate'], found['mesh']
    each = found['batch_size'] / grid['data'] / grid['space']
    exchanged = train['collectives'].get('all-reduce')
    times = [p.get('estimate') for p in (train, evaluation)]
    space = f', space {grid["space"]}' if grid['space'] > 1 else ''

    def gib(program: dict[str, Any]) -> str:
        total = program['bytes']['total']
        return '?' if total is None else f'{total / GIB:.2f}'

    return [
        row.data,
        str(row.depth),
        f'`{row.topology}`{space}',
        found['dtype'],
        f'{each:g}',
        f'{train["flops_per_image"] / 1e9:.0f}',
        f'{gib(train)} of {found["memory"] / GIB:.2f}',
        'yes' if found['fits'] else '**no**',
        f'{exchanged["count"]} x, {exchanged["bytes"] / 2**20:.0f} MiB' if exchanged else '-',
        f'{1e3 * times[0]["seconds"]:.0f}' if times[0] else '-',
        f'{times[0]["images_per_second"]:.0f}' if times[0] else '-',
        f'{times[0]["share_of_peak"]:.0%}' if times[0] else '-',
        gib(evaluation),
        f'{times[1]["images_per_second"]:.0f}' if times[1] else '-',
        f'{train["compile_seconds"] + evaluation["compile_seconds"]:.0f} s',
    ]


def table(rows: tuple[Row, ...], results: Path) -> str:
    """The Markdown table of some rows; results: the folder of their JSON."""
    lines = [f'| {" | ".join(COLUMNS)} |', '|' + '---|' * len(COLUMNS)]
    for row in rows:
        path = results / f'{row.name}.json'
        found = json.loads(path.read_text()) if path.exists() else None
        lines.append(f'| {" | ".join(cells(row, found))} |')
    return '\n'.join(lines)


def with_tables(text: str, results: Path) -> str:
    """The Markdown `text` with each table replaced by the current one."""
    for title, rows in TABLES.items():
        text = with_table(text, f'### {title}', table(rows, results))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--results', type=Path, default=Path('benchmarks/results/scale'))
    parser.add_argument('--only', default='', help='run only rows whose name contains this')
    parser.add_argument('--tables', action='store_true', help='run nothing, only print the tables')
    parser.add_argument('--docs', type=Path, help='a Markdown file to put the tables into')
    flags = parser.parse_args()
    flags.results.mkdir(parents=True, exist_ok=True)
    failed = []
    for row in ORDER:
        path = flags.results / f'{row.name}.json'
        wanted = flags.only in row.name and not path.exists() and not flags.tables
        if wanted and not run_row(row, path):
            failed.append(row.name)
    for title, rows in TABLES.items():
        print(f'\n### {title}\n\n{table(rows, flags.results)}')
    if flags.docs:
        flags.docs.write_text(with_tables(flags.docs.read_text(), flags.results))
    if failed:
        sys.exit(f'rows that failed: {", ".join(failed)}')


if __name__ == '__main__':
    main()
