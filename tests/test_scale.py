"""benchmarks/scale.py: the tables of docs/scale.md."""

import json
from pathlib import Path

from benchmarks import scale
from psp_jax.dry_run.topology import GIB

ROOT = Path(__file__).parents[1]


def test_the_tables_of_the_docs_are_those_of_the_results():
    text = (ROOT / 'docs' / 'scale.md').read_text()
    assert scale.with_tables(text, ROOT / 'benchmarks' / 'results' / 'scale') == text


def test_a_row_has_the_figures_of_its_file(tmp_path):
    row = scale.Row('ade20k', 50, 'v5e:2x4')
    estimate = {'seconds': 0.0125, 'images_per_second': 640.0, 'share_of_peak': 0.257}
    program = {
        'bytes': {'total': GIB},
        'flops_per_image': 4_000_000_000,
        'collectives': {'all-reduce': {'count': 12, 'bytes': 7 * 2**20}},
        'compile_seconds': 61.0,
        'estimate': estimate,
    }
    found = {
        'batch_size': 16,
        'mesh': {'data': 4, 'space': 2},
        'memory': 4 * GIB,
        'fits': False,
        'dtype': 'bfloat16',
        'train': program,
        'evaluate': program | {'bytes': {'total': 17 * GIB}},
    }
    last = scale.table((row,), tmp_path).splitlines()[-1]
    assert last.startswith('| ade20k | 50 | `v5e:2x4` | not run |')
    (tmp_path / f'{row.name}.json').write_text(json.dumps(found))
    assert scale.table((row,), tmp_path).splitlines()[-1] == (
        '| ade20k | 50 | `v5e:2x4`, space 2 | bfloat16 | 2 | 4 | 1.00 of 4.00 | **no** '
        '| 12 x, 7 MiB | 12 | 640 | 26% | 17.00 | 640 | 122 s |'
    )
