"""Checkpoints: the only file that knows orbax.

`WORKDIR/checkpoints/STEP/` holds the train state (arrays under names such as
`params/backbone/stem_conv1/kernel`), and the resolved configuration with the versions that wrote
it. Saving is asynchronous and atomic: a checkpoint that was cut off does not count.
"""

import errno
import itertools
import json
import os
import time
import uuid
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from psp_jax.config_check import from_json
from psp_jax.errors import PASSING_TEXTS, PassingError, UserError
from psp_jax.mesh import local_mesh, on_devices
from psp_jax.runtime import cluster
from psp_jax.state import Setup


class Unreadable(UserError):
    """The files of a checkpoint are missing or broken."""


# What orbax and tensorstore raise where files of a checkpoint are missing, cut off or changed.
_UNREADABLE = (OSError, KeyError, TypeError, ValueError)


_SHARED_DISKS_TAKE = 60  # seconds at most, to show one process what another has written

# Of these a later try may know more.
_PASSING = (TimeoutError, ConnectionError)


class Manager(ocp.CheckpointManager):
    """Orbax's manager, for which torn scores are none: the step is evaluated again."""

    def metrics(self, step: int) -> dict[str, Any] | None:
        try:
            found = super().metrics(step)
        except _UNREADABLE:
            return None
        return found if isinstance(found, dict) and 'mIoU' in found else None


def directory(workdir: str) -> epath.Path:
    path = epath.Path(workdir) / 'checkpoints'
    return path if '://' in workdir else path.absolute()


def open_manager(workdir: str, keep: int) -> Manager:
    """A manager that keeps the newest `keep` checkpoints and the best by mIoU."""
    best = policies.BestN(
        get_metric_fn=lambda metrics: metrics['mIoU'], n=1, keep_checkpoints_without_metrics=False
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
        best_fn=lambda metrics: metrics['mIoU'],
        save_decision_policy=policies.FixedIntervalPolicy(1),  # train.py decides, not orbax
        cleanup_tmp_directories=True,  # of saves that were cut off
    )
    path = directory(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if '://' not in workdir and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error.strerror}); set --workdir') from error
    return Manager(path, options=options)


def check_shared(manager: Manager) -> None:
    """Raises UserError where the processes of a run do not have the working directory in common."""
    if jax.process_count() == 1:
        return
    name = f'.seen-by-all-{uuid.uuid4().hex}'
    mark = manager.directory / cluster.exchange(name)[0]
    if jax.process_index() == 0:
        for left in manager.directory.glob('.seen-by-all-*'):  # by processes that were killed
            left.unlink(missing_ok=True)
        mark.touch()
    cluster.exchange('written')
    until = time.monotonic() + _SHARED_DISKS_TAKE
    while not mark.exists() and time.monotonic() < until:
        time.sleep(0.5)
    seen = cluster.exchange('seen' if mark.exists() else '')
    if jax.process_index() == 0:
        mark.unlink(missing_ok=True)
    if not all(seen):
        raise UserError(
            f'{manager.directory.parent}: process {seen.index("")} does not see what process 0 '
            'writes there: set --workdir to a folder on a disk that all share, or in a bucket'
        )


def named_leaves(tree: Any) -> dict[str, Any]:
    """{'params/head/classifier/bias': leaf, ...} of any tree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in flat}


def save(manager: Manager, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Starts saving."""
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(unflatten_dict(named_leaves(state), sep='/')),
        meta=ocp.args.JsonSave(meta),
    )
    manager.save(step, args=items)


def add_metrics(manager: Manager, step: int, metrics: dict[str, Any], keep: int) -> None:
    """Adds the scores of a saved step, 'mIoU' among them, and removes what is best no more.

    Evaluation takes its time, and the state has to be safe by then: a checkpoint is saved first and
    gets the file that orbax would have written with it afterwards, all at once. The first process
    does it all, since others may see the changes of a shared disk later.
    """
    manager.wait_until_finished()
    folder = manager.directory / str(step) / 'metrics'
    if jax.process_index() == 0:
        folder.mkdir(exist_ok=True)
        unfinished = folder / 'unfinished'
        with unfinished.open('w') as file:
            file.write(json.dumps(metrics))
            if '://' not in str(folder):
                file.flush()
                os.fsync(file.fileno())
        unfinished.replace(folder / 'metrics')
        manager.reload()
        steps = sorted(manager.all_steps())
        for old in {*steps[:-keep]} - {manager.best_step()}:
            # By a name that orbax cleans away, should this end in between.
            gone = manager.directory / f'{old}{ocp.path.step.TMP_DIR_SUFFIX}'
            (manager.directory / str(old)).rename(gone).rmtree()
    multihost_utils.sync_global_devices(f'metrics of step {step}')
    manager.reload()


def set_aside(manager: Manager, step: int) -> str:
    """Renames a checkpoint that cannot be read, as its step is to be saved again; the new name."""
    names = (f'{step}.damaged{n or ""}' for n in itertools.count())
    name = next(name for name in names if not (manager.directory / name).exists())
    if jax.process_index() == 0:
        (manager.directory / str(step)).rename(manager.directory / name)
    multihost_utils.sync_global_devices(f'damaged step {step}')
    manager.reload()
    return name


def save_variables(workdir: str, variables: dict[str, Any], meta: dict[str, Any]) -> None:
    """Writes parameters and statistics that no training made as the checkpoint of step 0."""
    with open_manager(workdir, 1) as manager:
        save(manager, 0, variables, meta)


def find_in(source: str) -> tuple[epath.Path, int]:
    """The (directory, step) of a working directory's newest checkpoint, or of a checkpoint."""
    if directory(source).exists():
        return find(source, 'latest')
    if not os.path.basename(source.rstrip('/')).isdigit():
        raise UserError(f'{source}: this folder holds no checkpoints to start from')
    return find('', source)


def find(workdir: str, which: str) -> tuple[epath.Path, int]:
    """The (directory, step) of a checkpoint: 'latest', 'best', a step, or a checkpoint's path."""
    path = directory(workdir)
    if which not in ('latest', 'best') and not which.isdigit():
        path = epath.Path(os.path.normpath(which) if '://' not in which else which.rstrip('/'))
        path, which = path.absolute().parent if '://' not in which else path.parent, path.name
        if not which.isdigit() or not (path / which).exists():
            raise UserError(
                f'--checkpoint={path / which}: no checkpoint; give latest, best, a step, or the '
                'path of one, such as runs/NAME/checkpoints/STEP'
            )
    with reader(path) as manager:
        steps = list(manager.all_steps())
        if not steps:
            raise UserError(f'{path}: holds no checkpoint; train first, or set --workdir')
        if which == 'latest':
            step = max(steps)
        elif which == 'best':
            best = manager.best_step()
            if best is None:
                raise UserError(f'{path}: no checkpoint was evaluated; use --checkpoint latest')
            step = best
        else:
            step = int(which)
    if step not in steps:
        raise UserError(f'{path}: holds no checkpoint of step {step}, but of {sorted(steps)}')
    return path, step


def reader(path: epath.Path) -> Manager:
    """A manager that only reads, for a context."""
    handlers = {'state': ocp.StandardCheckpointHandler(), 'meta': ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(
        read_only=True,
        best_fn=lambda metrics: metrics['mIoU'],
        multiprocessing_options=_by_itself(),
    )
    return Manager(path, options=options, item_handlers=handlers)


def _by_itself() -> ocp.options.MultiprocessingOptions:
    """Of reading: each process for itself, since one that fails would leave the others waiting."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})


def read_meta(path: epath.Path, step: int) -> dict[str, Any]:
    """What was saved beside the state: {'config': ..., 'versions': ...}."""
    with reader(path) as manager:
        try:
            return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        except _UNREADABLE as error:
            raise cannot_be_read(path / str(step), error) from error


def config_of(path: epath.Path, step: int, overrides: Iterable[str] = ()) -> ConfigDict:
    """The configuration that a checkpoint was made with, with `--config.key=value` flags on it.

    Raises UserError for an unknown key and an illegal value.
    """
    return from_json(read_meta(path, step)['config'], overrides)


def shapes(path: epath.Path, step: int, parts: Iterable[str]) -> dict[str, Any]:
    """What was saved under the names that begin with one of `parts`: each with shape and dtype."""
    with reader(path) as manager:
        try:
            found = manager.item_metadata(step)['state']
            if found is None:
                raise FileNotFoundError('its list of arrays is missing')
            saved = flatten_dict(getattr(found, 'tree', found), sep='/')
        except _UNREADABLE as error:
            raise cannot_be_read(path / str(step), error) from error
    return {name: leaf for name, leaf in saved.items() if name.split('/')[0] in parts}


def restore(path: epath.Path, step: int, target: Any) -> Any:
    """The saved values in the shape of `target`, a tree of arrays or ShapeDtypeStructs.

    `target` may be a part of what was saved (evaluation leaves the optimizer out), but what it has
    must be there with the same names, shapes and dtypes, and within `params` and `batch_stats`
    nothing may be left over. Raises UserError that lists what differs. Values take the
    shardings of `target`, on any number of devices.
    """
    wanted = named_leaves(target)
    saved = shapes(path, step, {name.split('/')[0] for name in wanted})
    differences = compare(saved, wanted)
    if differences:
        shown = '; '.join(differences[:6])
        more = f'; and {len(differences) - 6} more' if len(differences) > 6 else ''
        raise UserError(
            f'{path / str(step)} is of another architecture than the configuration '
            f'(checkpoint / configuration): {shown}{more}'
        )
    values = _read(
        path,
        step,
        {
            name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype)
            for name, leaf in wanted.items()
        },
    )
    return jax.tree.unflatten(jax.tree.structure(target), [values[name] for name in wanted])


def restore_variables(run: Setup, path: epath.Path, step: int) -> dict[str, Any]:
    """`params` and `batch_stats` of a checkpoint, on each of this process's devices.

    Raises UserError if they do not fit the network of `run`.
    """
    mesh = local_mesh(run.config.mesh.data, run.config.mesh.space)
    return restore(path, step, on_devices(run.variables, mesh))


def read_arrays(path: epath.Path, step: int, wanted: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of these names on the host, in the dtypes of `wanted`."""
    return _read(
        path,
        step,
        {
            name: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
            for name, leaf in wanted.items()
        },
    )


def _read(path: epath.Path, step: int, arguments: dict[str, ocp.RestoreArgs]) -> dict[str, Any]:
    tree = unflatten_dict(arguments, sep='/')
    restoring = ocp.args.PyTreeRestore(item=tree, restore_args=tree, partial_restore=True)
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler, multiprocessing_options=_by_itself()) as checkpointer:
        try:
            found = checkpointer.restore(path / str(step) / 'state', args=restoring)
        except _UNREADABLE as error:
            raise cannot_be_read(path / str(step), error) from error
    return flatten_dict(found, sep='/')


def cannot_be_read(path: epath.Path, error: Exception) -> Exception:
    """What to tell of a checkpoint whose files are missing or broken, or cannot be had just now."""
    reason = ' '.join(str(error).partition('[tensorstore_spec')[0].split())
    if isinstance(error, PermissionError) or 'PERMISSION_DENIED' in reason:
        return UserError(f'{path}: may not be read ({reason})')
    if isinstance(error, _PASSING) or any(text in reason for text in PASSING_TEXTS):
        return PassingError(f'{path}: cannot be read at the moment ({reason})')
    return Unreadable(
        f'{path}: cannot be read as a checkpoint of psp_jax ({reason}). If it is damaged, remove '
        'this folder; then the one before it is the latest'
    )


def compare(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """One text for each name, shape or dtype that differs."""
    differences = []
    for name in sorted(saved.keys() | wanted.keys()):
        texts = []
        for leaves in (saved, wanted):
            leaf = leaves.get(name)
            texts.append('missing' if leaf is None else f'{leaf.dtype}{list(leaf.shape)}')
        if texts[0] != texts[1]:
            differences.append(f'{name} {texts[0]} / {texts[1]}')
    return differences
