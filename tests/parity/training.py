"""Training steps on both sides; prints JSON of how far apart they are.

    PYTHONPATH=.:tests python -m parity.training --depth 50 --size 97 --steps 10
    PYTHONPATH=.:tests python -m parity.training --depth 50 --size 97 --float32

The first compares in float64: {'losses': ..., 'gradient': ..., 'end': ...}, the largest distance of
each kind as a share of the array's largest value. The second compares the gradients of one step in
float32 with PyTorch's in float64, ours and PyTorch's own: how many are off by more than 1e-4, and
the median distance.
"""

import argparse
import json

import jax
import numpy as np
import torch

from parity import cases, our_side, torch_side


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--depth', type=int, choices=(18, 50), default=18)
    parser.add_argument('--size', type=int, default=97)
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--learning-rate', type=float, default=cases.RECIPE['learning_rate'])
    parser.add_argument(
        '--other-rules', action='store_true', help='contract_first, max, align_corners=False'
    )
    parser.add_argument('--float32', action='store_true')
    flags = parser.parse_args()
    cases.RECIPE['learning_rate'] = flags.learning_rate
    network = cases.R18 if flags.depth == 18 else cases.R50
    if flags.other_rules:
        network = network._replace(dilation='contract_first', pool='max', align_corners=False)
    weights = cases.made_up(torch_side.shapes(network))
    steps = 1 if flags.float32 else flags.steps
    batches = [cases.pictures(flags.batch, flags.size, seed) for seed in range(steps)]
    exact = torch_side.train(network, weights, batches, steps + 2, torch.float64)
    if flags.float32:
        sides = {
            'ours': our_side.train(network, weights, batches, steps + 2, 'float32'),
            'torch': torch_side.train(network, weights, batches, steps + 2, torch.float32),
        }
        names = [name for name in exact if name.startswith('gradient/')]
        report = {'gradients': len(names)}
        for side, result in sides.items():
            distances = [our_side.distance(result[name], exact[name]) for name in names]
            report[side] = {
                'above 1e-4': sum(d > 1e-4 for d in distances),
                'median': float(np.median(distances)),
                'largest': max(distances),
            }
    else:
        jax.config.update('jax_enable_x64', True)
        result = our_side.train(network, weights, batches, steps + 2, 'float64')
        assert result.keys() == exact.keys()
        report = {kind: 0.0 for kind in ('losses', 'gradient', 'end')}
        for name, value in result.items():
            kind = name.split('/')[0]
            report[kind] = max(report[kind], our_side.distance(value, exact[name]))
    print(json.dumps(report))


if __name__ == '__main__':
    main()
