"""Trains three steps and evaluates in one of N processes, in float64: for test_processes.py.

python tests/processes_worker.py OUTPUT.npz [the flags of psp_jax.main that say which process]
"""

import sys

import jax
import numpy as np
from global_batch_worker import BATCH, STEPS, batch_of_step
from networks import small_config

from psp_jax.data.sources import Source
from psp_jax.evaluate import Evaluator
from psp_jax.main import parse_flags
from psp_jax.mesh import make_mesh, put_images, replicated
from psp_jax.runtime import preemption
from psp_jax.runtime.checkpoint import named_leaves
from psp_jax.state import jit_for_one_call, new_state, setup
from psp_jax.train import compile_step


def eleven_images():
    """Eleven images of four sizes; eleven is no multiple of any number of devices."""

    def read(number):
        rng = np.random.default_rng(number)
        shape = [(33, 33), (40, 25), (64, 50), (17, 65)][number % 4]
        label = rng.integers(0, 7, shape).astype(np.uint8)
        label[: number % 5] = 255
        return rng.integers(0, 256, (*shape, 3)).astype(np.uint8), label

    return Source(11, str, read)


def main(output, words):
    flags, _ = parse_flags(['--config', 'configs/scenes.py', *words])
    preemption.join(flags.coordinator_address, flags.num_processes, flags.process_id)
    run = setup(
        small_config(
            dtype='float64',
            batch_size=BATCH,
            total_steps=STEPS,
            model={'head_width': 128, 'aux_width': 64},
            data={'classes': '7'},
            eval={'batch_size': 3},
        )
    )
    mesh = make_mesh(run.config.mesh.data, BATCH)
    state = jit_for_one_call(lambda: new_state(run), out_shardings=replicated(mesh))()
    step_fn = compile_step(run, mesh)
    share = BATCH // jax.process_count()
    own = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    losses = []
    for step in range(STEPS):
        images, labels = batch_of_step(step)
        state, scalars = step_fn(state, put_images(images[own], labels[own], mesh))
        losses.append([float(scalars[name]) for name in ('loss', 'loss_main', 'loss_aux')])
    result = Evaluator(run, eleven_images()).evaluate(state.variables, STEPS)
    if jax.process_index() == 0:
        arrays = {k: np.asarray(v.addressable_data(0)) for k, v in named_leaves(state).items()}
        found = {'losses': losses, 'confusion': result.confusion, 'each': result.each}
        np.savez(output, devices=jax.device_count(), **found, **arrays)
    print('\n'.join(preemption.process_lines()))


if __name__ == '__main__':
    main(sys.argv[1], sys.argv[2:])
