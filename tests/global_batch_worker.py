"""Trains three steps on N CPU devices in float64 and saves what came out: for test_train.py.

python tests/global_batch_worker.py DEVICES OUTPUT.npz
"""

import sys

import jax
import numpy as np

from psp_jax import optimizer
from psp_jax.config import default_config
from psp_jax.mesh import make_mesh, put_batch, replicated
from psp_jax.model import pspnet
from psp_jax.runtime.checkpoint import named_leaves
from psp_jax.state import create_state, enable_float64, init_variables, jit_for_one_call
from psp_jax.train import compile_step

SIZE, BATCH, STEPS = 33, 8, 3


def config_of_test():
    config = default_config()
    config.dtype = 'float64'
    config.batch_size, config.total_steps = BATCH, STEPS
    config.data.classes = '7'
    config.data.crop = SIZE
    config.model.depth, config.model.stem = 18, 'deep_small'
    config.model.head_width, config.model.aux_width = 128, 64
    return config


def batch_of_step(step: int) -> dict[str, np.ndarray]:
    """Images with an unequal share of ignored pixels each; one is ignored as a whole."""
    rng = np.random.default_rng(step)
    labels = rng.integers(0, 7, (BATCH, SIZE, SIZE)).astype(np.uint8)
    for row in range(BATCH):
        labels[row, : row * 4] = 255
    labels[step] = 255
    images = rng.integers(0, 256, (BATCH, SIZE, SIZE, 3)).astype(np.uint8)
    return {'image': images, 'label': labels}


def main(devices: int, output: str) -> None:
    jax.config.update('jax_num_cpu_devices', devices)
    config = config_of_test()
    enable_float64(config)
    mesh = make_mesh(config.mesh.data, BATCH)
    assert mesh.size == devices
    model = pspnet.build(config)
    params = jax.eval_shape(lambda: init_variables(model, 0))['params']
    tx = optimizer.make_optimizer(params, config.optimizer)
    state = jit_for_one_call(lambda: create_state(model, tx, 0), out_shardings=replicated(mesh))()
    step_fn = compile_step(mesh, model, tx, config)
    losses = []
    for step in range(STEPS):
        state, scalars = step_fn(state, put_batch(batch_of_step(step), mesh))
        losses.append([float(scalars[name]) for name in ('loss', 'loss_main', 'loss_aux')])
    np.savez(output, losses=losses, **{k: np.asarray(v) for k, v in named_leaves(state).items()})


if __name__ == '__main__':
    main(int(sys.argv[1]), sys.argv[2])
