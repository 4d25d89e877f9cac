"""Trains three steps on N CPU devices in float64 and saves what came out: for test_train.py.

python tests/global_batch_worker.py DEVICES OUTPUT.npz
"""

import sys

import jax
import numpy as np
from networks import small_config

from psp_jax.mesh import make_mesh, put_images, replicated
from psp_jax.runtime.checkpoint import named_leaves
from psp_jax.state import jit_for_one_call, new_state, setup
from psp_jax.train import compile_step

SIZE, BATCH, STEPS = 33, 8, 3


def batch_of_step(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Images with an unequal share of ignored pixels each; one is ignored as a whole."""
    rng = np.random.default_rng(step)
    labels = rng.integers(0, 7, (BATCH, SIZE, SIZE)).astype(np.uint8)
    for row in range(BATCH):
        labels[row, : row * 4] = 255
    labels[step] = 255
    images = rng.integers(0, 256, (BATCH, SIZE, SIZE, 3)).astype(np.uint8)
    return images, labels


def main(devices: int, output: str) -> None:
    jax.config.update('jax_num_cpu_devices', devices)
    config = small_config(
        dtype='float64', batch_size=BATCH, total_steps=STEPS, data={'classes': '7'}
    )
    run = setup(config)
    mesh = make_mesh(config.mesh.data, BATCH)
    assert mesh.size == devices
    state = jit_for_one_call(lambda: new_state(run), out_shardings=replicated(mesh))()
    step_fn = compile_step(run, mesh)
    losses = []
    for step in range(STEPS):
        batch = put_images(*batch_of_step(step), mesh)
        state, scalars = step_fn(state, batch)
        losses.append([float(scalars[name]) for name in ('loss', 'loss_main', 'loss_aux')])
    lie = batch['image'].sharding, state.params['head']['conv']['kernel'].sharding
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}
    shardings = str([(dict(x.mesh.shape), tuple(x.spec)) for x in lie])
    np.savez(output, losses=losses, shardings=shardings, **arrays)


if __name__ == '__main__':
    main(int(sys.argv[1]), sys.argv[2])
