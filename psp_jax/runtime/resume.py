"""How an interrupted run continues: from which checkpoint, and whether it is the same run."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from psp_jax.config_check import from_json, resume_differences
from psp_jax.errors import PassingError, UserError
from psp_jax.report import console
from psp_jax.runtime import checkpoint


def saved_steps(manager: checkpoint.Manager) -> list[int]:
    """The steps of the checkpoints, from old to new, as process 0 sees them.

    All use these, because other processes may see a new checkpoint on a shared disk later.
    """
    steps = np.array(sorted(manager.all_steps()), np.int32)
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    if jax.process_index():
        steps = np.zeros(count, np.int32)
    return np.asarray(multihost_utils.broadcast_one_to_all(steps)).tolist() if count else []


def newest_state(
    manager: checkpoint.Manager, steps: list[int], config: ConfigDict, examples: int, target: Any
) -> tuple[int, Any]:
    """Step and state of the newest of `steps` that can be read; renames damaged checkpoints.

    `examples` is the number of training images, `target` the state as shapes with shardings.
    Raises UserError if the checkpoint is from a different run, or if all are damaged.
    """
    damaged: dict[int, checkpoint.Unreadable] = {}
    for step in reversed(steps):
        try:
            state = _restore(manager, step, config, examples, target)
        except checkpoint.Unreadable as error:
            damaged[step] = error
            continue
        for other, why in damaged.items():
            name = checkpoint.set_aside(manager, other)
            console.say(f'skipped, and renamed to {name}: {why}')
        return step, state
    raise next(iter(damaged.values()))


def _restore(
    manager: checkpoint.Manager, step: int, config: ConfigDict, examples: int, target: Any
) -> Any:
    """The state of a step. Raises Unreadable only if every process finds it damaged."""
    path, state, failure = manager.directory, None, None
    try:
        check_same_run(checkpoint.read_meta(path, step), config, examples, path / str(step))
        state = checkpoint.restore(path, step, target)
    except checkpoint.Unreadable as error:
        failure = error
    failures = multihost_utils.process_allgather(np.array(failure is not None))
    if failure is not None and failures.all():
        raise failure
    if failures.any():
        raise PassingError(
            f'{path / str(step)}: process {failures.argmax()} cannot read this checkpoint, but '
            'others can'
        )
    return state


def check_same_run(meta: dict[str, Any], config: ConfigDict, examples: int, where: Any) -> None:
    """Raises UserError if a continued run would differ from the run that began.

    `meta` is what was saved beside the state of the checkpoint `where`.
    """
    differences = resume_differences(from_json(meta['config']), config)
    if meta['examples'] != examples:  # the order of the examples depends on their number
        differences.append(f'training images: {meta["examples"]} then, {examples} now')
    if differences:
        raise UserError(
            f'{where} was trained with other values: {"; ".join(differences)}. Use the same '
            'values, or another --workdir'
        )


def has_metrics(manager: checkpoint.Manager, step: int) -> bool:
    """Whether process 0 sees the metrics of a step.

    Process 0 decides, so that no process waits for an evaluation that others skip.
    """
    seen = np.array(manager.metrics(step) is not None)
    return bool(multihost_utils.broadcast_one_to_all(seen))
