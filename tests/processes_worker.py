"""Trains three steps and evaluates in one of N processes, in float64: for test_processes.py.

python tests/processes_worker.py OUTPUT.npz [the flags of psp_jax.main that say which process]
"""

import sys

import jax
import numpy as np
from global_batch_worker import BATCH, STEPS, batch_of_step, config_of_test

from psp_jax import evaluate, optimizer
from psp_jax.data.sources import Source
from psp_jax.main import parse_flags
from psp_jax.mesh import make_mesh, put_batch, replicated
from psp_jax.model import pspnet
from psp_jax.runtime import preemption
from psp_jax.runtime.checkpoint import named_leaves
from psp_jax.state import create_state, enable_float64, init_variables, jit_for_one_call
from psp_jax.train import compile_step


def pictures():
    """Eleven images of four sizes, which no number of devices divides."""

    def read(number):
        rng = np.random.default_rng(number)
        shape = [(33, 33), (40, 25), (64, 50), (17, 65)][number % 4]
        label = rng.integers(0, 7, shape).astype(np.uint8)
        label[: number % 5] = 255
        return rng.integers(0, 256, (*shape, 3)).astype(np.uint8), label

    return Source(11, str, read)


def main(output, words):
    flags, _ = parse_flags(['--config', 'configs/scenes.py', *words])
    preemption.start(flags.coordinator_address, flags.num_processes, flags.process_id)
    config = config_of_test()
    config.eval.batch_size = 3
    enable_float64(config)
    mesh = make_mesh(config.mesh.data, BATCH)
    model = pspnet.build(config)
    params = jax.eval_shape(lambda: init_variables(model, 0))['params']
    tx = optimizer.make_optimizer(params, config.optimizer)
    state = jit_for_one_call(lambda: create_state(model, tx, 0), out_shardings=replicated(mesh))()
    step_fn = compile_step(mesh, model, tx, config)
    share = BATCH // jax.process_count()
    own = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    losses = []
    for step in range(STEPS):
        batch = {name: rows[own] for name, rows in batch_of_step(step).items()}
        state, scalars = step_fn(state, put_batch(batch, mesh))
        losses.append([float(scalars[name]) for name in ('loss', 'loss_main', 'loss_aux')])
    evaluator = evaluate.make_evaluator(config, model, pictures())
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    result = evaluator.evaluate(variables, STEPS)
    if jax.process_index() == 0:
        arrays = {k: np.asarray(v.addressable_data(0)) for k, v in named_leaves(state).items()}
        found = {'losses': losses, 'confusion': result.confusion, 'each': result.each}
        np.savez(output, devices=jax.device_count(), **found, **arrays)
    print('\n'.join(preemption.table()))


if __name__ == '__main__':
    main(sys.argv[1], sys.argv[2:])
