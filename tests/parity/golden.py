"""Results of the PyTorch side on file, for comparisons on machines without PyTorch.

PYTHONPATH=.:tests python -m parity.golden make     computes them again (needs torch)
PYTHONPATH=.:tests python -m parity.golden train    our training beside them, in float64: JSON
"""

import json
import sys
from pathlib import Path

import numpy as np

from parity import cases

FILE = Path(__file__).parents[1] / 'golden' / 'parity.npz'
NETWORKS = {
    'R18 full': cases.R18,
    'R18 contract_first max': cases.R18._replace(
        dilation='contract_first', align_corners=False, pool='max'
    ),
    'R50 full': cases.R50,
    'R50 contract': cases.R50._replace(dilation='contract', align_corners=False),
}
TRAINED, STEPS, TOTAL_STEPS = 'R18 full', 2, 3


def digest(array: np.ndarray) -> np.ndarray:
    """Largest absolute value, root mean square and eight of the values: float64 [10]."""
    flat = np.asarray(array, np.float64).ravel()
    some = flat[np.linspace(0, flat.size - 1, 8).astype(int)]
    return np.array([np.abs(flat).max(), np.sqrt(np.mean(flat**2)), *some])


def batches() -> list:
    return [cases.pictures(3, 33, seed) for seed in range(STEPS)]


def weights(golden: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The made-up weights of a network; their names and shapes are on file."""
    return cases.made_up(json.loads(str(golden[f'shapes/{name}'])))


def make() -> None:
    import torch

    from parity import torch_side

    golden = {}
    for name, network in NETWORKS.items():
        shapes = torch_side.shapes(network)
        golden[f'shapes/{name}'] = np.array(json.dumps(shapes))
        images, _ = cases.pictures(1, 97)
        logits = torch_side.forward(network, cases.made_up(shapes), images)
        golden[f'logits/{name}'], golden[f'aux_logits/{name}'] = logits
    result = torch_side.train(
        NETWORKS[TRAINED], weights(golden, TRAINED), batches(), TOTAL_STEPS, torch.float64
    )
    for name, value in result.items():
        golden[f'train/{name}'] = value if name == 'losses' else digest(value)
    np.savez_compressed(FILE, **golden)


def train() -> None:
    """Prints the largest distance from the golden losses, gradients, and end of training."""
    import jax

    jax.config.update('jax_enable_x64', True)
    from parity import our_side

    golden = dict(np.load(FILE))
    result = our_side.train(
        NETWORKS[TRAINED], weights(golden, TRAINED), batches(), TOTAL_STEPS, 'float64'
    )
    worst: dict[str, float] = {}
    expected = {name.removeprefix('train/') for name in golden if name.startswith('train/')}
    assert expected == set(result)
    for name, value in result.items():
        found = value if name == 'losses' else digest(value)
        kind = name.split('/')[0]
        difference = our_side.distance(found, golden[f'train/{name}'])
        worst[kind] = max(worst.get(kind, 0.0), difference)
    print(json.dumps(worst))


if __name__ == '__main__':
    {'make': make, 'train': train}[sys.argv[1]]()
