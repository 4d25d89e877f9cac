"""benchmarks/scale.py: the tables of docs/scale.md."""

from pathlib import Path

from benchmarks import scale

ROOT = Path(__file__).parents[1]


def test_the_tables_of_the_docs_are_those_of_the_results():
    text = (ROOT / 'docs' / 'scale.md').read_text()
    assert scale.with_tables(text, ROOT / 'benchmarks' / 'results' / 'scale') == text


def test_a_row_without_results_says_so(tmp_path):
    row = scale.Row('ade20k', 50, 'v5e:2x4')
    last = scale.table((row,), tmp_path).splitlines()[-1]
    assert last.startswith('| ade20k | 50 | `v5e:2x4` | not run |')
