"""A training run, from the configuration to the last checkpoint."""

import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from psp_jax import evaluate, optimizer
from psp_jax.config import to_json
from psp_jax.data.pipeline import example_index, train_batches
from psp_jax.data.sources import Source, check_source, make_source
from psp_jax.errors import UserError
from psp_jax.losses import map_row_blocks, map_row_phases, segmentation_loss
from psp_jax.mesh import (
    check_cut,
    cut_images,
    is_cut,
    make_mesh,
    on_devices,
    put_batch,
    replicated,
    split_images,
)
from psp_jax.model import pspnet
from psp_jax.model.geometry import crop_size
from psp_jax.model.resample import resize_matrix
from psp_jax.report import console
from psp_jax.report.writer import Skips, Writer
from psp_jax.runtime import checkpoint, cluster, preemption, resume
from psp_jax.state import (
    TrainState,
    create_state,
    enable_float64,
    init_variables,
    jit_for_one_call,
)
from psp_jax.weights.load import load_weights, replace_arrays


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    model: pspnet.PSPNet,
    tx: optax.GradientTransformation,
    config: ConfigDict,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of SGD on the global batch: the next state, and scalars about this step.

    batch: 'image' uint8 [B, H, W, 3], 'label' uint8 [B, H, W] (255 = ignore); on a `mesh` that cuts
    images, as `put_batch` pads them. Scalars: loss, loss_main and loss_aux (mean over the valid
    pixels of the global batch), learning_rate, and finite (whether the loss and every updated value
    are).
    """
    images, labels = batch['image'], batch['label']
    map_rows: Callable[..., Any] = map_row_blocks
    if mesh is not None and is_cut(mesh):
        images, labels = cut_images(batch, crop_size(config)[0], mesh)
        map_rows = map_row_phases
    images = pspnet.normalise(images, config)
    dropout = jax.random.fold_in(jax.random.key(config.seed), state.step)

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        (logits, aux_logits), updates = model.apply(
            {'params': params, 'batch_stats': state.batch_stats},
            images,
            True,
            mutable=['batch_stats'],
            rngs={'dropout': dropout},
        )
        rows, columns = [
            resize_matrix(logits.shape[axis], images.shape[axis], model.align_corners)
            for axis in (1, 2)
        ]
        losses = {'loss_main': segmentation_loss(logits, labels, rows, columns, map_rows)}
        loss = losses['loss_main']
        if aux_logits is not None:
            losses['loss_aux'] = segmentation_loss(aux_logits, labels, rows, columns, map_rows)
            loss += config.loss.aux_weight * losses['loss_aux']
        return loss, (losses, updates['batch_stats'])

    (loss, (losses, batch_stats)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params
    )
    rate = optimizer.learning_rate(state.step, config.optimizer, config.total_steps)
    updates, opt_state = tx.update(gradients, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - rate.astype(p.dtype) * u, state.params, updates)
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((loss, params, batch_stats))]
    state = TrainState(state.step + 1, params, batch_stats, opt_state)
    scalars = {'loss': loss, **losses, 'learning_rate': rate, 'finite': jnp.stack(finite).all()}
    return state, scalars


def compile_step(
    mesh: jax.sharding.Mesh,
    model: pspnet.PSPNet,
    tx: optax.GradientTransformation,
    config: ConfigDict,
) -> jax.stages.Wrapped:
    """`train_step` jitted over the mesh: state replicated and donated, batch split.

    Of the batch it takes 'image' and 'label'.
    """
    return jax.jit(
        lambda state, batch: train_step(state, batch, model=model, tx=tx, config=config, mesh=mesh),
        donate_argnums=0,
        in_shardings=(replicated(mesh), split_images(mesh)),
        out_shardings=(replicated(mesh), replicated(mesh)),
    )


def train_and_evaluate(config: ConfigDict, workdir: str, name: str) -> TrainState:
    """Trains as `config` says, continuing from the newest checkpoint in `workdir` if it has one.

    Raises UserError for bad data, a checkpoint that does not fit and a loss that is not finite.
    """
    # ---- Devices
    enable_float64(config)
    preemption.still_alive(config.hang_seconds)
    mesh = make_mesh(config.mesh.data, config.batch_size, config.mesh.space)
    check_cut(crop_size(config)[0], mesh)
    console.say(
        f'psp_jax {name}: {mesh.size} {jax.devices()[0].platform} device(s), '
        f'{jax.process_count()} process(es), workdir {workdir}'
    )
    console.say('\n'.join(preemption.table()))

    # ---- Data: bad files are found before anything is compiled
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

    # ---- Network and optimizer; the state is born on the devices it will live on
    model = pspnet.build(config)
    params = jax.eval_shape(lambda: init_variables(model, config.seed))['params']
    tx = optimizer.make_optimizer(params, config.optimizer)
    console.say(optimizer.table(params, config.optimizer))
    make_state = jit_for_one_call(
        lambda: create_state(model, tx, config.seed), out_shardings=replicated(mesh)
    )
    evaluator = evaluate.make_evaluator(config, model, eval_source)

    # ---- A run that was interrupted goes on
    manager = checkpoint.open_manager(workdir, config.checkpoint_keep)
    checkpoint.check_shared(manager)
    preemption.wait_for(manager.wait_until_finished)
    first, steps = 0, resume.saved_steps(manager)
    if steps and steps[-1]:
        target = on_devices(jax.eval_shape(make_state), mesh)
        first, state = resume.newest_state(manager, steps, config, source, target)
        console.say(f'continuing from step {first} of {manager.directory / str(first)}')
    elif steps:
        raise UserError(
            f'--workdir={workdir} holds imported weights: to start from them, set '
            f'--config.init_from={workdir} and another --workdir'
        )
    elif config.init_from:
        shapes = jax.eval_shape(make_state)
        wanted = checkpoint.named_leaves(
            {'params': shapes.params, 'batch_stats': shapes.batch_stats}
        )
        weights = load_weights(config.init_from, config, wanted)
        state = replace_arrays(make_state(), weights.arrays)
        console.say('init_from: ' + '; '.join(weights.report))
    else:
        state = make_state()
    scored = due(first, config) and manager.metrics(first) is not None
    # As the first process sees it: others would wait for scores that nobody makes.
    evaluated = not due(first, config) or bool(cluster.exchange('scored' if scored else '')[0])
    if first == config.total_steps and evaluated:
        console.say(f'step {first} is the last: the run is finished')
        manager.close()
        return state

    # ---- The loop. Order matters: a step is dispatched before the last one's scalars are read, so
    # that the device never waits for the host; and a state is saved only once its own scalars are
    # known to be finite.
    log = Writer(workdir, first, evaluated)
    batches = train_batches(
        source,
        config,
        start_step=first,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    speed, interval = console.Speed(), []
    skips = Skips(workdir, first * config.batch_size)

    def batch_of(step: int) -> Any:
        """The batch of a step on the devices; nothing is read after the last step."""
        if step > config.total_steps:
            return None
        host = next(batches)
        for position, text in host['skipped']:
            skips.add(position, text)
        return put_batch({name: host[name] for name in ('image', 'label')}, mesh)

    def read(step: int, scalars: dict[str, jax.Array]) -> None:
        values = {name: value.item() for name, value in jax.device_get(scalars).items()}
        speed.steps += 1
        if not values.pop('finite'):
            raise UserError(not_finite(step, values['loss'], source, config))
        interval.append(values)
        if step % config.log_every and step != config.total_steps:
            return
        seconds, wait = speed.read()
        means = {name: float(np.mean([v[name] for v in interval])) for name in values}
        means |= {
            'learning_rate': values['learning_rate'],
            'seconds_per_step': seconds,
            'images_per_second': config.batch_size / seconds,
            'data_wait': wait,
        }
        interval.clear()
        log.scalars(step, means)
        console.say(console.step_line(step, config.total_steps, means))

    def keep(step: int, state: TrainState) -> None:
        meta = {'config': to_json(config), 'examples': source.length, 'versions': versions()}
        with preemption.saving():
            checkpoint.save(manager, step, state, meta)

    def score(step: int, state: TrainState) -> None:
        """Evaluates a step that is saved, or about to be: nothing is lost where this ends."""
        with preemption.leaving_is_safe():
            variables = {'params': state.params, 'batch_stats': state.batch_stats}
            result = evaluator.evaluate(variables, step)
            report_evaluation(result, workdir, log, config)
            checkpoint.add_metrics(manager, step, result.scores, config.checkpoint_keep)
        speed.reset()

    stopped = False
    try:
        if not evaluated:
            score(first, state)
        if first == config.total_steps:
            return state
        unread = None
        batch = batch_of(first + 1)
        start = time.perf_counter()
        step_fn = compile_step(mesh, model, tx, config).lower(state, batch).compile()
        console.say(f'compiled in {console.duration(time.perf_counter() - start)}')
        speed.reset()
        for step in range(first + 1, config.total_steps + 1):
            stopped = preemption.stops_before(step)
            if stopped:
                if unread:
                    read(*unread)
                    keep(step - 1, state)
                break
            state, scalars = step_fn(state, batch)
            start = time.perf_counter()
            batch = batch_of(step + 1)
            if scalars['loss'].is_ready():  # else the devices were busy all the while
                speed.waited += time.perf_counter() - start
            if unread:
                read(*unread)
            unread = step, scalars
            preemption.still_alive(config.hang_seconds)

            if due(step, config) or step % config.checkpoint_every == 0:
                read(*unread)
                unread = None
                keep(step, state)
                speed.reset()
            if due(step, config):
                score(step, state)
    finally:
        try:
            manager.wait_until_finished()  # raises what went wrong in the last save
        finally:
            manager.close()
            log.close()
    if stopped:
        preemption.leave()
    if skipped := skips.summary():
        console.say(skipped)
    return state


def due(step: int, config: ConfigDict) -> bool:
    """Whether a step is evaluated."""
    return step > 0 and (step % config.eval_every == 0 or step == config.total_steps)


def not_finite(step: int, loss: float, source: Source, config: ConfigDict) -> str:
    """What to tell of a step whose loss or parameters became NaN or infinite."""
    positions = np.arange((step - 1) * config.batch_size, step * config.batch_size)
    names = [source.name(int(i)) for i in example_index(positions, source.length, config.seed)]
    return (
        f'step {step}: the loss ({loss}) or an updated parameter is not finite; nothing was saved '
        f'after it. Lower optimizer.learning_rate, or look at its examples: {", ".join(names)}'
    )


def report_evaluation(
    result: evaluate.Result, workdir: str, writer: Writer, config: ConfigDict
) -> None:
    """Files, the table and TensorBoard for one evaluation during training."""
    scores = result.scores
    picture = evaluate.write_result(result, workdir, config)
    console.say(console.class_table(scores))
    console.say(f'step {scores["step"]}  {console.headline(scores)}')
    names = ('mIoU', 'mIoU_all', 'mAcc', 'allAcc', 'loss')
    writer.scalars(scores['step'], {f'{scores["split"]}/{name}': scores[name] for name in names})
    if picture is not None:
        writer.image(scores['step'], 'panels', picture)


def versions() -> dict[str, str]:
    """The libraries that a checkpoint was made with."""
    return {name: metadata.version(name) for name in ('jax', 'flax', 'optax', 'orbax-checkpoint')}
