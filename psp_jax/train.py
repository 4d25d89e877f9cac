"""A training run, from the configuration to the last checkpoint."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from psp_jax import evaluate, losses, optimizer
from psp_jax.config import crop_size, to_json
from psp_jax.data.pipeline import example_index, train_batches
from psp_jax.data.sources import Source, check_source, make_source
from psp_jax.errors import UserError
from psp_jax.mesh import (
    check_cut,
    cut_images,
    make_mesh,
    on_devices,
    put_images,
    replicated,
    split_images,
)
from psp_jax.model import pspnet
from psp_jax.report import console
from psp_jax.report.writer import RunLog
from psp_jax.runtime import checkpoint, preemption, resume
from psp_jax.state import Setup, TrainState, jit_for_one_call, new_state, setup
from psp_jax.weights.load import load_weights, replace_arrays


def train_step(
    state: TrainState, batch: dict[str, jax.Array], *, run: Setup
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on the global batch: the next state, and scalars about this step.

    batch: 'image' uint8 [B, H, W, 3], 'label' uint8 [B, H or more, W] (255 = ignore). Scalars:
    loss, loss_main and loss_aux (means over the valid pixels of the global batch), learning_rate,
    and finite (whether the loss and every updated value are).
    """
    config, images = run.config, pspnet.normalise(batch['image'], run.config)
    dropout = jax.random.fold_in(jax.random.key(config.seed), state.step)

    def loss_of(params: Any) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        outputs, updates = run.model.apply(
            {'params': params, 'batch_stats': state.batch_stats},
            images,
            True,
            mutable=['batch_stats'],
            rngs={'dropout': dropout},
        )
        size = images.shape[1], images.shape[2]
        found = losses.training_losses(outputs, batch['label'], size, config)
        return found['loss'], (found, updates['batch_stats'])

    gradients, (found, batch_stats) = jax.grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = run.tx.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((found, params, batch_stats))]
    rate = run.schedule(state.step)
    scalars = {**found, 'learning_rate': rate, 'finite': jnp.stack(finite).all()}
    return TrainState(state.step + 1, params, batch_stats, opt_state), scalars


def compile_step(run: Setup, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    """`train_step` jitted over the mesh: state replicated and donated, batch as of `put_images`."""
    height = crop_size(run.config.data)[0]
    return jax.jit(
        lambda state, batch: train_step(state, cut_images(batch, height, mesh), run=run),
        donate_argnums=0,
        in_shardings=(replicated(mesh), split_images(mesh)),
        out_shardings=(replicated(mesh), replicated(mesh)),
    )


def train_and_evaluate(config: ConfigDict, workdir: str, name: str) -> TrainState:
    """Trains as `config` says, continuing from the newest checkpoint in `workdir` if it has one.

    Raises UserError for bad data, a checkpoint that does not fit and a loss that is not finite.
    """
    # ---- Devices, data and network: bad files are found before anything is compiled
    preemption.still_alive(config.hang_seconds)
    run = setup(config)
    mesh = make_mesh(config.mesh.data, config.batch_size, config.mesh.space)
    check_cut(mesh, run.model, run.variables, crop_size(config.data))
    console.say(
        f'psp_jax {name}: {mesh.size} {jax.devices()[0].platform} device(s), '
        f'{jax.process_count()} process(es), workdir {workdir}'
    )
    console.say('\n'.join(preemption.process_lines()))
    source, eval_source = open_data(config)
    console.say(optimizer.table(run.shapes.params, config.optimizer))
    evaluator = evaluate.Evaluator(run, eval_source)

    with checkpoint.open_manager(workdir, config.checkpoint_keep) as manager:
        # ---- What the run starts from
        first, state = starting_state(run, manager, source, mesh)
        evaluated = not due(first, config) or resume.has_metrics(manager, first)
        if first == config.total_steps and evaluated:
            console.say(f'step {first} is the last: the run is finished')
            return state

        # ---- The loop. Order matters: a step is dispatched before the scalars of the step before
        # it are read, so that the devices never wait for the host. A state is saved only after
        # its own scalars are known to be finite.
        with closing(RunLog(workdir, config, first, evaluated)) as log:
            if not evaluated:
                score(evaluator, first, state, manager, log)
            batches = device_batches(source, mesh, first, log)
            batch, unread = next(batches, None), None
            if batch is not None:
                step_fn = compiled(compile_step(run, mesh), state, batch)
            for step in range(first + 1, config.total_steps + 1):
                if preemption.stop_requested():
                    break
                state, scalars = step_fn(state, batch)
                with log.reading(scalars):
                    batch = next(batches, None)
                if unread:
                    read_step(*unread, source, log)
                unread = step, scalars
                preemption.still_alive(config.hang_seconds)
                if due(step, config) or step % config.checkpoint_every == 0:
                    read_step(*unread, source, log)
                    unread = None
                    save(manager, step, state, config, source)
                    log.restart_clock()
                if due(step, config):
                    score(evaluator, step, state, manager, log)
            if unread:  # stopped after a step that is not saved yet
                read_step(*unread, source, log)
                save(manager, unread[0], state, config, source)
    preemption.finish(int(state.step), workdir)
    return state


def open_data(config: ConfigDict) -> tuple[Source, Source]:
    """The sources of training and of evaluation, checked, with a line about them.

    Raises UserError if files are bad, or if no label of the evaluated split holds a class.
    """
    source, eval_source = (make_source(config.data, s) for s in ('train', config.eval.split))
    note = check_source(source, skip=config.data.on_error == 'skip')
    check_source(eval_source)
    if not evaluate.can_be_scored(eval_source, config.data.threads):
        raise UserError(f'data.{config.eval.split}: no label holds a class; set another eval.split')
    console.say(
        f'data: {source.length} training images, {eval_source.length} of '
        f'{config.eval.split!r}; {config.total_steps} steps of {config.batch_size} are '
        f'{config.total_steps * config.batch_size / source.length:.1f} epochs{note}'
    )
    if config.batch_size != config.optimizer.recipe_batch_size:
        console.say(
            f"note: batch_size {config.batch_size} is not the recipe's "
            f'{config.optimizer.recipe_batch_size}: learning rate and batch statistics differ'
        )
    return source, eval_source


def starting_state(
    run: Setup, manager: checkpoint.Manager, source: Source, mesh: jax.sharding.Mesh
) -> tuple[int, TrainState]:
    """The step and state that a run starts from, on the devices it will live on.

    1. The newest checkpoint of its own working directory.
    2. Else the weights that config.init_from names; arrays that these lack are random.
    3. Else random values, a function of the seed.

    Raises UserError if the checkpoint is of another run, or the weights do not fit.
    """
    config = run.config
    make_state = jit_for_one_call(lambda: new_state(run), out_shardings=replicated(mesh))
    steps = resume.saved_steps(manager)
    if steps and not steps[-1]:
        workdir = manager.directory.parent
        raise UserError(
            f'--workdir={workdir} holds imported weights: to start from them, set '
            f'--config.init_from={workdir} and another --workdir'
        )
    if steps:
        target = on_devices(run.shapes, mesh)
        first, state = resume.newest_state(manager, steps, config, source.length, target)
        console.say(f'continuing from step {first} of {manager.directory / str(first)}')
        return first, state
    if config.init_from:
        wanted = checkpoint.named_leaves(run.variables)
        weights = load_weights(config.init_from, config, wanted)
        console.say('init_from: ' + '; '.join(weights.report))
        return 0, replace_arrays(make_state(), weights.arrays)
    return 0, make_state()


def device_batches(
    source: Source, mesh: jax.sharding.Mesh, first: int, log: RunLog
) -> Iterator[dict[str, jax.Array]]:
    """The batches of the steps after `first`, on the devices; none is read after the last step."""
    config = log.config
    batches = train_batches(
        source,
        config,
        start_step=first,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    for _ in range(first, config.total_steps):
        host = next(batches)
        log.skipped(host['skipped'])
        yield put_images(host['image'], host['label'], mesh)


def compiled(step_fn: jax.stages.Wrapped, state: TrainState, batch: Any) -> Callable[..., Any]:
    """The compiled training step, with a line about the time it took."""
    start = time.perf_counter()
    made = step_fn.lower(state, batch).compile()
    console.say(f'compiled in {console.duration(time.perf_counter() - start)}')
    return made


def read_step(step: int, scalars: dict[str, jax.Array], source: Source, log: RunLog) -> None:
    """Waits for the scalars of a step and logs them.

    Raises UserError, naming the step's examples, if the loss or a parameter is not finite.
    """
    values = {name: value.item() for name, value in jax.device_get(scalars).items()}
    if values.pop('finite'):
        log.step(step, values)
        return
    batch_size, seed = log.config.batch_size, log.config.seed
    positions = np.arange((step - 1) * batch_size, step * batch_size)
    names = [source.name(int(i)) for i in example_index(positions, source.length, seed)]
    raise UserError(
        f'step {step}: the loss ({values["loss"]}) or an updated parameter is not finite; nothing '
        'was saved after it. Lower optimizer.learning_rate, or look at its examples: '
        f'{", ".join(names)}'
    )


def due(step: int, config: ConfigDict) -> bool:
    """Whether a step is evaluated."""
    return step > 0 and (step % config.eval_every == 0 or step == config.total_steps)


def save(
    manager: checkpoint.Manager, step: int, state: TrainState, config: ConfigDict, source: Source
) -> None:
    """Starts saving a state, with the values that a restart compares and the library versions."""
    libraries = ('jax', 'flax', 'optax', 'orbax-checkpoint')
    versions = {name: metadata.version(name) for name in libraries}
    meta = {'config': to_json(config), 'examples': source.length, 'versions': versions}
    checkpoint.save(manager, step, state, meta)


def score(
    evaluator: evaluate.Evaluator,
    step: int,
    state: TrainState,
    manager: checkpoint.Manager,
    log: RunLog,
) -> None:
    """Evaluates a step after its save has begun: if the evaluation is cut off, nothing is lost."""
    result = evaluator.evaluate(state.variables, step)
    picture = evaluate.write_result(result, log.workdir, log.config)
    log.evaluation(result.scores, picture)
    checkpoint.add_metrics(manager, step, result.scores, log.config.checkpoint_keep)
    log.restart_clock()
