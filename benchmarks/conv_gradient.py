"""Times a training step with our kernel gradient of 3x3 convolutions and with the compiler's own.

    python -m benchmarks.conv_gradient [--crop 97] [--batch 2] [--repeats 10]

Both steps train the CamVid network and differ in nothing else. They take turns, so that other load
on the machine affects both. Prints JSON: the median seconds of each, their ratio, and the
difference of the two gradients of the first step. On accelerators our step uses the compiler's
gradient too, and the ratio is 1 up to noise.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from psp_jax import train
from psp_jax.config_check import load_config
from psp_jax.data.labels import label_space
from psp_jax.mesh import make_mesh, put_images, replicated
from psp_jax.model import layers
from psp_jax.state import jit_for_one_call, new_state, setup

CONFIG = Path(__file__).parents[1] / 'configs' / 'camvid.py'
CONVOLUTIONS = {'shifts': layers.spatial_conv, 'native': layers.native_conv}
TOLERANCE = 1e-3  # relative; the gradients add the same float32 products in another order


def random_batch(config: ConfigDict) -> dict[str, np.ndarray]:
    """A training batch of noise. The contents do not change the time."""
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.data.crop, config.data.crop)
    classes = len(label_space(config.data.classes).names)
    return {
        'image': rng.integers(0, 256, (*shape, 3), np.uint8),
        'label': rng.integers(0, classes, shape, np.uint8),
    }


def relative_difference(a: Any, b: Any) -> float:
    """The largest |a - b| / max |b| over the arrays of two trees."""
    return max(
        float(np.abs(x - y).max() / np.abs(y).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def compare(config: ConfigDict, repeats: int) -> dict[str, Any]:
    """Median seconds of a step with each gradient, their ratio and the gradients' difference."""
    mesh, run = make_mesh(1, config.batch_size), setup(config)
    make_state = jit_for_one_call(lambda: new_state(run), out_shardings=replicated(mesh))
    batch = put_images(**random_batch(config), mesh=mesh)

    steps, states, gradients = {}, {}, {}
    for name, convolution in CONVOLUTIONS.items():
        steps[name] = train.compile_step(run, mesh)
        state = make_state()
        decay = jax.tree.map(lambda p: config.optimizer.weight_decay * np.asarray(p), state.params)
        with mock.patch.object(layers, 'spatial_conv', convolution):  # the first call traces
            states[name], _ = steps[name](state, batch)
        # The momentum starts at zero, so after one step it is the gradient plus the decay.
        momentum = optax.tree.get(states[name].opt_state, 'trace')
        gradients[name] = jax.tree.map(lambda m, d: np.asarray(m) - d, momentum, decay)

    times: dict[str, list[float]] = {name: [] for name in CONVOLUTIONS}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            states[name], _ = jax.block_until_ready(step(states[name], batch))
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {
        'seconds_per_step': seconds,
        'native_over_shifts': seconds['native'] / seconds['shifts'],
        'gradient_difference': relative_difference(gradients['shifts'], gradients['native']),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.conv_gradient',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--crop', type=int, default=97, help='pixels, 8n + 1')
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--repeats', type=int, default=10, help='timed steps of each')
    flags = parser.parse_args()
    config = load_config(
        str(CONFIG),
        [f'--config.data.crop={flags.crop}', f'--config.batch_size={flags.batch}'],
    )
    found = compare(config, flags.repeats)
    setting = {'benchmark': 'conv_gradient', 'platform': jax.default_backend(), **vars(flags)}
    print(json.dumps(setting | found, indent=2))
    if not found['gradient_difference'] < TOLERANCE:
        sys.exit(f'the gradients differ by more than {TOLERANCE}')


if __name__ == '__main__':
    main()
