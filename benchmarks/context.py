"""Does the pyramid use context that a plain dilated FCN misses? (paper, section 3.1)

    python -m benchmarks.context [--steps 360] [--seeds 0 1 2] [--workdir runs/context]

Trains PSPNet and the FCN (`bins=()`) on the built-in scenes, where the same object is a car in a
street and a boat in a harbour. Both get the same steps, images, order and seeds. Each run is a
`python -m psp_jax.main` of its own. You may stop the benchmark at any time: it does not repeat
finished runs and continues an interrupted one. Progress and a table go to stderr, JSON to stdout.
Six runs take about six times as long as `make demo`.

The table has the FCN's theoretical receptive field and the distance of the cue. If the field is
larger, the FCN can see the cue, and the benchmark measures whether it learns to use it.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from psp_jax.config_check import load_config
from psp_jax.data import scenes
from psp_jax.model.resnet import BLOCKS, DILATIONS, STEMS, is_basic

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / 'configs' / 'scenes.py'
NETWORKS = {'pspnet': '(1,2,3,6)', 'fcn': '()'}  # the `bins` of each
MEASURES = ('mIoU', 'car IoU', 'boat IoU', 'confused')

Layer = tuple[int, int, int]  # kernel size, stride, dilation


def layers_of(depth: int, stem: str, dilation: str) -> list[Layer]:
    """The layers on the longest path from the image to the head's 3x3 convolution."""
    layers = [(size, 2 if i == 0 else 1, 1) for i, (size, _) in enumerate(STEMS[stem])]
    layers.append((3, 2, 1))  # max pooling
    dilations = ((1, 1), (1, 1), *DILATIONS[dilation])
    for i, (blocks, (first, rest)) in enumerate(zip(BLOCKS[depth], dilations, strict=True)):
        for block in range(blocks):
            dilated = first if block == 0 else rest
            layers.append((3, 2 if i == 1 and block == 0 else 1, dilated))
            if is_basic(depth):  # a bottleneck's other convolutions are 1x1
                layers.append((3, 1, dilated))
    return [*layers, (3, 1, 1)]


def receptive_field(layers: list[Layer]) -> int:
    """Side, in pixels, of the square of the image on which one cell of the last layer depends.

    A layer adds (kernel - 1) * dilation cells of its input; the width of a cell is the product of
    the strides before it.
    """
    side, step = 1, 1
    for kernel, stride, dilation in layers:
        side += (kernel - 1) * dilation * step
        step *= stride
    return side


def train(network: str, seed: int, steps: int, workdir: Path) -> Path:
    """Runs one training if its last evaluation does not exist; returns the folder of that."""
    run = workdir / f'{network}-steps{steps}-seed{seed}'
    result = run / 'eval' / f'{steps}-whole'
    if not (result / 'metrics.json').exists():
        arguments = f'bins={NETWORKS[network]},seed={seed},steps={steps}'
        command = [sys.executable, '-m', 'psp_jax.main', '--workdir', str(run)]
        command += ['--config', f'{CONFIG}:{arguments}']
        print(f'== {network}, seed {seed}', file=sys.stderr, flush=True)
        code = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode
        if code:
            sys.exit(code)
    return result


def measure(result: Path) -> dict[str, float]:
    """`MEASURES` of one evaluation, as fractions.

    'confused' is the share of the pixels labelled car or boat that are predicted as the other of
    the two. A network that recognises vehicles and then guesses has about half.
    """
    scores = json.loads((result / 'metrics.json').read_text())
    iou = {c['name']: c['iou'] for c in scores['classes']}
    confusion = np.load(result / 'confusion.npy')  # [label, prediction]
    vehicles = [scenes.CAR, scenes.BOAT]
    confused = confusion[scenes.CAR, scenes.BOAT] + confusion[scenes.BOAT, scenes.CAR]
    return {
        'mIoU': scores['mIoU'],
        'car IoU': iou['car'],
        'boat IoU': iou['boat'],
        'confused': float(confused / confusion[vehicles].sum()),
    }


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for a single run) of each measure."""
    columns = {name: [run[name] for run in runs] for name in MEASURES}
    return {
        name: {
            'mean': statistics.fmean(values),
            'std': statistics.stdev(values) if len(values) > 1 else None,
        }
        for name, values in columns.items()
    }


def table(report: dict[str, Any]) -> str:
    """The report as lines of text, in percent."""
    lines = [f'{"":<10}' + ''.join(f'{name:>18}' for name in (*MEASURES, 'receptive field'))]
    for network, found in report['networks'].items():
        cells = []
        for name in MEASURES:
            mean, std = found['summary'][name].values()
            spread = '' if std is None else f' +- {100 * std:.2f}'
            cells.append(f'{100 * mean:.2f}{spread}')
        field = found['receptive_field']
        cells.append(field if isinstance(field, str) else f'{field} px')
        lines.append(f'{network:<10}' + ''.join(f'{cell:>18}' for cell in cells))
    cue = report['cue_distance']
    lines.append(
        f'percent, mean +- sample standard deviation over {len(report["seeds"])} seed(s), '
        f'{report["steps"]} steps; confused: car as boat or boat as car, guessing gives about 50\n'
        f'distance from a car or boat to the nearest cue: {cue["min"]:.1f} px or more, median '
        f'{cue["median"]:.1f} px; half the receptive field reaches that far if it is larger'
    )
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.context',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--steps', type=int, default=360, help='training steps of each run')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--workdir', type=Path, default=ROOT / 'runs' / 'context')
    flags = parser.parse_args()
    workdir = flags.workdir.absolute()

    config = load_config(str(CONFIG))
    model = config.model
    field = receptive_field(layers_of(model.depth, model.stem, model.dilation))
    first, last = map(int, config.data.val.split(':'))
    distances = [scenes.cue_distance(index) for index in range(first, last)]

    # Seed by seed, so that an unfinished experiment compares both networks too.
    runs: dict[str, list[dict[str, float]]] = {network: [] for network in NETWORKS}
    for seed in flags.seeds:
        for network, measured in runs.items():
            measured.append(measure(train(network, seed, flags.steps, workdir)))
    report = {
        'steps': flags.steps,
        'seeds': flags.seeds,
        'cue_distance': {'min': min(distances), 'median': statistics.median(distances)},
        'networks': {
            network: {
                'receptive_field': field if network == 'fcn' else 'whole image',
                'runs': measured,
                'summary': summary(measured),
            }
            for network, measured in runs.items()
        },
    }
    print(table(report), file=sys.stderr)
    print(json.dumps(report, indent=2))


if __name__ == '__main__':
    main()
