"""Does the pyramid use context that a plain dilated FCN misses? (paper, section 3.1)

    python -m benchmarks.context [--steps 360] [--seeds 0 1 2] [--workdir runs/context]

Trains PSPNet and the FCN (`bins=()`) on the built-in scenes, where the same object is a car in a
street and a boat in a harbour. Both networks get the same steps, the same pictures in the same
order and the same seeds. Each run is a `python -m psp_jax.main` of its own; one that is finished is
not run again and one that was cut off goes on, so the whole may be stopped and started at will.
Progress and a table go to stderr, JSON to stdout. Six runs take about six times as long as
`make demo`, which is the first of them.

The FCN's theoretical receptive field is printed beside the distance of the cue. It may well exceed
the picture: then the FCN *could* see the cue, and what is measured is whether training makes it
use it, not whether it can.
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
    """The layers on the longest path from the image through the backbone and the head's 3x3."""
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

    A layer adds (kernel - 1) * dilation steps of its input, each as wide as the strides before it.
    """
    side, step = 1, 1
    for kernel, stride, dilation in layers:
        side += (kernel - 1) * dilation * step
        step *= stride
    return side


def train(network: str, seed: int, steps: int, workdir: Path) -> Path:
    """Runs one training unless its last evaluation is there; returns the folder of that."""
    run = workdir / f'{network}-steps{steps}-seed{seed}'
    result = run / 'eval' / f'{steps}-whole'
    if not (result / 'metrics.json').exists():
        arguments = f'bins={NETWORKS[network]},seed={seed},steps={steps}'
        command = [
            sys.executable,
            '-m',
            'psp_jax.main',
            '--config',
            f'{CONFIG}:{arguments}',
            '--workdir',
            str(run),
        ]
        print(f'== {network}, seed {seed}', file=sys.stderr, flush=True)
        code = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode
        if code:
            sys.exit(code)
    return result


def measure(result: Path) -> dict[str, float]:
    """`MEASURES` of one evaluation, as fractions.

    'confused' is the share of the pixels labelled car or boat that are predicted as the other of
    the two; a network that tells vehicles from the rest and then guesses has about half.
    """
    scores = json.loads((result / 'metrics.json').read_text())
    iou = {c['name']: c['iou'] for c in scores['classes']}
    confusion = np.load(result / 'confusion.npy')  # of (label, prediction)
    vehicles = [scenes.CAR, scenes.BOAT]
    exchanged = confusion[scenes.CAR, scenes.BOAT] + confusion[scenes.BOAT, scenes.CAR]
    return {
        'mIoU': scores['mIoU'],
        'car IoU': iou['car'],
        'boat IoU': iou['boat'],
        'confused': float(exchanged / confusion[vehicles].sum()),
    }


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and sample standard deviation (None of a single run) of each measure over the seeds."""
    columns = {name: [run[name] for run in runs] for name in MEASURES}
    return {
        name: {
            'mean': statistics.fmean(values),
            'std': statistics.stdev(values) if len(values) > 1 else None,
        }
        for name, values in columns.items()
    }


def table(report: dict[str, Any]) -> str:
    """The report as lines for people, in percent."""
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
    height, width = report['picture']
    cue = report['cue_distance']
    lines.append(
        f'percent, mean +- sample standard deviation over {len(report["seeds"])} seed(s), '
        f'{report["steps"]} steps; confused = car as boat or boat as car, guessing gives about 50\n'
        f'pictures of {height} x {width} pixels; from a car or boat to the nearest cue: '
        f'{cue["min"]:.1f} px at least, {cue["median"]:.1f} px in the median'
    )
    reach = report['networks']['fcn']['receptive_field'] // 2
    corner = float(np.hypot(height - 1, width - 1))
    verdict = (
        'more than the picture: the FCN could see every cue, and the table says what it learned'
        if reach >= max(height, width) - 1
        else 'beyond the nearest cue of some pictures'
        if reach >= cue['min']
        else 'less than the distance of any cue: the FCN cannot know'
    )
    lines.append(
        f"in theory the FCN sees {reach} px to each side (the picture's diagonal is "
        f'{corner:.0f} px), {verdict}'
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

    # Seed by seed, so that an unfinished experiment already compares the two.
    runs: dict[str, list[dict[str, float]]] = {network: [] for network in NETWORKS}
    for seed in flags.seeds:
        for network, measured in runs.items():
            measured.append(measure(train(network, seed, flags.steps, workdir)))
    report = {
        'steps': flags.steps,
        'seeds': flags.seeds,
        'picture': [scenes.HEIGHT, scenes.WIDTH],
        'cue_distance': {'min': min(distances), 'median': statistics.median(distances)},
        'networks': {
            network: {
                'receptive_field': field if network == 'fcn' else 'the picture',
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
