"""How a run that was interrupted goes on: from which checkpoint, and whether it is the same run."""

import json
import time
from typing import Any

from ml_collections import ConfigDict

from psp_jax.config_check import from_json, resume_differences
from psp_jax.data.sources import Source
from psp_jax.errors import PassingError, UserError
from psp_jax.report import console
from psp_jax.runtime import checkpoint, cluster
from psp_jax.state import TrainState

_PAUSES = (5, 25)  # seconds


def saved_steps(manager: checkpoint.Manager) -> list[int]:
    """The steps of the checkpoints, from old to new, as the first process sees them.

    Shared disks may show them to others a little later.
    """
    return json.loads(cluster.exchange(json.dumps(sorted(manager.all_steps())))[0])


def newest_state(
    manager: checkpoint.Manager,
    steps: list[int],
    config: ConfigDict,
    source: Source,
    target: Any,
) -> tuple[int, TrainState]:
    """Step and state of the newest of `steps` that can be read; damaged ones are set aside.

    Raises UserError where it is of another run, or none can be read, and PassingError where some
    processes can read it and others not: a restart may find their disk mended.
    """
    damaged: dict[int, checkpoint.Unreadable] = {}
    for step in reversed(steps):
        try:
            state = _read_by_all(manager.directory, step, config, source, target)
        except checkpoint.Unreadable as error:
            damaged[step] = error
            continue
        for other, why in damaged.items():
            name = checkpoint.set_aside(manager, other)
            console.say(f'skipped, and renamed to {name}: {why}')
        return step, state
    raise next(iter(damaged.values()))


def _read_by_all(path: Any, step: int, config: ConfigDict, source: Source, target: Any) -> Any:
    """The state, once all processes have read it; raises Unreadable where none of them can."""
    state, failure = None, checkpoint.Unreadable()
    for pause in (*_PAUSES, None):
        if state is None:
            try:
                check_resume(checkpoint.read_meta(path, step), config, source, path / str(step))
                state = checkpoint.restore(path, step, target)
            except checkpoint.Unreadable as error:
                failure = error
        failures = cluster.exchange('' if state is not None else str(failure))
        if not any(failures):
            return state
        if all(failures):
            raise failure
        if pause is not None:
            time.sleep(pause)  # a shared disk may show it to some processes later
    which = next(i for i, text in enumerate(failures) if text)
    raise PassingError(f'process {which} cannot read what others can: {failures[which]}')


def check_resume(meta: dict[str, Any], config: ConfigDict, source: Source, where: Any) -> None:
    """Raises UserError where a resumed run would not be the run that was begun."""
    differences = resume_differences(from_json(meta['config']), config)
    if meta['examples'] != source.length:  # the order of the examples depends on their number
        differences.append(f'training images: {meta["examples"]} then, {source.length} now')
    if differences:
        raise UserError(
            f'{where} was trained otherwise: {"; ".join(differences)}. Use the same values, or '
            'another --workdir'
        )
