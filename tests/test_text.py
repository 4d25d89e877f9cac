"""The figures of a dry run as lines."""

import re

import pytest

from psp_jax.dry_run import text
from psp_jax.dry_run.topology import GIB

TRAIN = {
    'bytes': {'parameters': 3 * 2**20, 'activations': 5 * GIB // 4, 'total': GIB},
    'flops_per_image': 4_000_000_000,
    'fits': True,
    'collectives': {'all-reduce': {'count': 12, 'bytes': 7 * 2**20}},
    'cycles': 1_234_567,
    'unknown_loops': 1,
    'compile_seconds': 61.0,
    'estimate': {'seconds': 0.0125, 'images_per_second': 640.0, 'share_of_peak': 0.257},
}
EVALUATE = {
    'bytes': {'parameters': 3 * 2**20, 'canvases': 1000, 'total': 17 * GIB},
    'flops_per_image': 5_000_000_000,
    'fits': False,
    'collectives': {},
    'cycles': None,
    'compile_seconds': 5.0,
    'protocol': 'whole',
    'image': [80, 90],
    'image_is': 'why not',
    'input': [4, 81, 89, 3],
}
RESULT = {
    'memory': 4 * GIB,
    'remark': 'the remark',
    'batch_size': 8,
    'crop': [65, 65],
    'fits': False,
    'train': TRAIN,
    'evaluate': EVALUATE,
}


def test_the_table_has_the_figures_of_both_programs():
    lines = text.table(RESULT).splitlines()
    rows = dict(re.split(r'\s{2,}', line.strip(), maxsplit=1) for line in lines if '   ' in line)
    rows = {title: re.split(r'\s{2,}', cells) for title, cells in rows.items()}
    assert rows == {
        'training step': ['evaluation'],
        'input': ['8 x 65 x 65', '4 x 81 x 89'],
        'FLOPs an image': ['4.0 G', '5.0 G'],
        'parameters': ['3.0 MiB', '3.0 MiB'],
        'activations': ['1.25 GiB', '-'],
        'canvases': ['-', '1000 B'],
        'total': ['1.00 GiB', '17.00 GiB'],
        'of': ['4.00 GiB', '4.00 GiB'],
        'fits': ['yes', 'no'],
        'all-reduce': ['12 x, 7.0 MiB', '0 x, 0 B'],
        'cycles': ['1,234,567', '-'],
        'time of a call': ['12.5 ms', '-'],
        'images a second': ['640.0', '-'],
        'share of the peak': ['25.7%', '-'],
        'compiled in': ['1m01s', '0m05s'],
    }
    assert lines[-4:] == [
        'evaluation: protocol whole, an image of 80 x 90 (why not)',
        'note: the remark',
        'note: loops of unknown length are counted as if they ran once',
        'does not fit: evaluation needs 17.00 GiB of 4.00 GiB a device',
    ]


@pytest.mark.parametrize(
    'data, line',
    [
        (
            {'read': True, 'images': 5000, 'shape': [8, 65, 65, 3], 'seconds': 1.23},
            'data: 5,000 training images; the first batch, 8 x 65 x 65 x 3, read in 1.2 s',
        ),
        (
            {'read': False, 'reason': 'a/train.txt does not exist'},
            'data: no batch, because they cannot be read here (a/train.txt does not exist)',
        ),
    ],
)
def test_the_line_about_the_data(data, line):
    assert text.data_line(data) == line


@pytest.mark.parametrize('count, expected', [(None, '?'), (1023, '1023 B'), (1536, '1.5 KiB')])
def test_sizes(count, expected):
    assert text.size_text(count) == expected
