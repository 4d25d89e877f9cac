"""Checkpoints: the only file that imports orbax.

`WORKDIR/checkpoints/STEP/` holds the train state (arrays under names such as
`params/backbone/stem_conv1/kernel`), the resolved configuration, the versions of the libraries, and
the metrics of the step if it was evaluated. Saving is asynchronous and atomic: a checkpoint counts
only once it is complete.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator
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
from psp_jax.state import Setup


class Unreadable(UserError):
    """The files of a checkpoint are missing or damaged."""


# What orbax and tensorstore raise if files of a checkpoint are missing, truncated or changed.
_UNREADABLE = (OSError, KeyError, TypeError, ValueError)


class Manager(ocp.CheckpointManager):
    """Orbax's manager, but a truncated metrics file counts as missing."""

    def metrics(self, step: int) -> dict[str, Any] | None:
        try:
            found = super().metrics(step)
        except _UNREADABLE:
            return None
        return found if isinstance(found, dict) and 'mIoU' in found else None


# ---- Write


def directory(workdir: str) -> epath.Path:
    """The folder of a working directory's checkpoints; a working directory may be a bucket."""
    path = epath.Path(workdir) / 'checkpoints'
    return path if '://' in workdir else path.absolute()


def open_manager(workdir: str, keep: int) -> Manager:
    """A manager that keeps the newest `keep` checkpoints and the best by mIoU; use it in `with`.

    Raises UserError if the working directory cannot be written, or if the processes of the run do
    not share it.
    """
    best = policies.BestN(
        get_metric_fn=lambda metrics: metrics['mIoU'], n=1, keep_checkpoints_without_metrics=False
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
        best_fn=lambda metrics: metrics['mIoU'],
        cleanup_tmp_directories=True,  # of saves that were cut off
    )
    path = directory(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if '://' not in workdir and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error.strerror}); set --workdir') from error
    if jax.process_count() > 1:
        _check_shared(path)
    return Manager(path, options=options)


def _check_shared(path: epath.Path) -> None:
    """Raises UserError if some process does not see what process 0 writes to a folder."""
    mark = path / '.seen-by-all'
    if jax.process_index() == 0:
        mark.touch()
    multihost_utils.sync_global_devices('mark')
    seen = multihost_utils.process_allgather(np.array(mark.exists()))
    if jax.process_index() == 0:
        mark.unlink()
    if not seen.all():
        raise UserError(
            f'{path.parent}: process {seen.argmin()} does not see what process 0 writes there: set '
            '--workdir to a folder on a disk that all processes share, or in a bucket'
        )


def named_leaves(tree: Any) -> dict[str, Any]:
    """{'params/head/classifier/bias': leaf, ...} of any tree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in flat}


def save(manager: Manager, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Starts saving `state`, a tree of arrays, and `meta`, which becomes JSON."""
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(unflatten_dict(named_leaves(state), sep='/')),
        meta=ocp.args.JsonSave(meta),
    )
    # Without `force` orbax asks JAX whether to stop at this step. Only preemption.py may ask that,
    # because JAX counts the calls.
    manager.save(step, args=items, force=True)


def add_metrics(manager: Manager, step: int, metrics: dict[str, Any], keep: int) -> None:
    """Adds the metrics of a saved step, 'mIoU' among them; removes checkpoints no longer kept.

    Orbax takes metrics only while it saves. But evaluation takes long, and the state must be saved
    before it begins. So this writes the file that orbax would have written. Process 0 does all of
    it, because other processes may see the changes of a shared disk later.
    """
    manager.wait_until_finished()
    folder = manager.directory / str(step) / 'metrics'
    if jax.process_index() == 0:
        folder.mkdir(exist_ok=True)
        unfinished = folder / 'unfinished'
        with unfinished.open('w') as file:
            file.write(json.dumps(metrics))
        unfinished.replace(folder / 'metrics')
        manager.reload()
        steps = sorted(manager.all_steps())
        for old in {*steps[:-keep]} - {manager.best_step()}:
            # Orbax cleans up this name if the process ends in between.
            gone = manager.directory / f'{old}{ocp.path.step.TMP_DIR_SUFFIX}'
            (manager.directory / str(old)).rename(gone).rmtree()
    multihost_utils.sync_global_devices(f'metrics of step {step}')
    manager.reload()


def set_aside(manager: Manager, step: int) -> str:
    """Renames a damaged checkpoint, so that its step can be saved again; returns the new name."""
    name = f'{step}.damaged'
    if jax.process_index() == 0:
        if (manager.directory / name).exists():
            (manager.directory / name).rmtree()
        (manager.directory / str(step)).rename(manager.directory / name)
    multihost_utils.sync_global_devices(f'damaged step {step}')
    manager.reload()
    return name


def save_variables(workdir: str, variables: dict[str, Any], meta: dict[str, Any]) -> None:
    """Writes imported `params` and `batch_stats` as the checkpoint of step 0."""
    with open_manager(workdir, 1) as manager:
        save(manager, 0, variables, meta)


# ---- Find


def find_in(source: str) -> tuple[epath.Path, int]:
    """Directory and step of a checkpoint's path, or of the newest one of a working directory."""
    if directory(source).exists():
        return find(source, 'latest')
    if not os.path.basename(source.rstrip('/')).isdecimal():
        raise UserError(f'{source}: this folder holds no checkpoints to start from')
    return find('', source)


def find(workdir: str, which: str) -> tuple[epath.Path, int]:
    """Directory and step of a checkpoint: 'latest', 'best', a step, or the path of a checkpoint."""
    path = directory(workdir)
    if which not in ('latest', 'best') and not which.isdecimal():
        path = epath.Path(os.path.normpath(which) if '://' not in which else which.rstrip('/'))
        path, which = path.absolute().parent if '://' not in which else path.parent, path.name
        if not which.isdecimal() or not (path / which).exists():
            raise UserError(
                f'--checkpoint={path / which}: no checkpoint; give latest, best, a step, or the '
                'path of one, such as runs/NAME/checkpoints/STEP'
            )
    with reader(path) as manager:
        steps, best = sorted(manager.all_steps()), manager.best_step()
    if not steps:
        raise UserError(f'{path}: holds no checkpoint; train first, or set --workdir')
    if which == 'best' and best is None:
        raise UserError(f'{path}: no checkpoint was evaluated; use --checkpoint latest')
    step = int({'latest': steps[-1], 'best': best}.get(which, which))
    if step not in steps:
        raise UserError(f'{path}: holds no checkpoint of step {step}, only of {steps}')
    return path, step


def find_with_config(
    config: ConfigDict | None, workdir: str, which: str, overrides: Iterable[str]
) -> tuple[epath.Path, int, ConfigDict]:
    """Directory and step of a checkpoint as `find`, and `config` or else the checkpoint's own.

    `overrides` are `--config.key=value` flags on the checkpoint's own configuration. All processes
    get the step that process 0 finds, because a training run may add checkpoints at the same time.
    """
    path, step = find(workdir, which)
    step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    return path, step, config or config_of(path, step, overrides)


def reader(path: epath.Path) -> Manager:
    """A manager that only reads; use it in `with`. Each process opens its own."""
    handlers = {'state': ocp.StandardCheckpointHandler(), 'meta': ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(
        read_only=True,
        best_fn=lambda metrics: metrics['mIoU'],
        multiprocessing_options=_by_itself(),
    )
    return Manager(path, options=options, item_handlers=handlers)


def _by_itself() -> ocp.options.MultiprocessingOptions:
    """Each process reads for itself: if one fails, the others do not wait for it."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})


# ---- Read


def read_meta(path: epath.Path, step: int) -> dict[str, Any]:
    """What was saved beside the state: {'config': ..., 'versions': ...}."""
    with reader(path) as manager, _explained(path / str(step)):
        return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta


def config_of(path: epath.Path, step: int, overrides: Iterable[str] = ()) -> ConfigDict:
    """The configuration of a checkpoint, changed by `--config.key=value` flags.

    Raises UserError if a flag has an unknown key or an illegal value.
    """
    return from_json(read_meta(path, step)['config'], overrides)


def newest_config(workdir: str, overrides: Iterable[str]) -> ConfigDict:
    """The configuration of a run, as `config_of`, from its newest undamaged checkpoint."""
    path, newest = find(workdir, 'latest')
    with reader(path) as manager:
        older = sorted(set(manager.all_steps()) - {newest}, reverse=True)
    for step in (newest, *older):
        with contextlib.suppress(Unreadable):
            return config_of(path, step, overrides)
    return config_of(path, newest, overrides)  # raises the error of the newest


def shapes(path: epath.Path, step: int, parts: Iterable[str]) -> dict[str, Any]:
    """The saved arrays under names that begin with one of `parts`: {name: its shape and dtype}."""
    with reader(path) as manager, _explained(path / str(step)):
        found = manager.item_metadata(step)['state']
        if found is None:
            raise FileNotFoundError('its list of arrays is missing')
        saved = flatten_dict(getattr(found, 'tree', found), sep='/')
    return {name: leaf for name, leaf in saved.items() if name.split('/')[0] in parts}


def restore(path: epath.Path, step: int, target: Any) -> Any:
    """The saved values in the structure of `target`, a tree of arrays or ShapeDtypeStructs.

    `target` may be a part of what was saved: evaluation leaves the optimizer out. But under each
    first name in `target`, such as `params`, all names, shapes and dtypes must be equal; otherwise
    a UserError lists the differences. Values get the shardings of `target`, on any number of
    devices.
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
    arguments = {
        name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype)
        for name, leaf in wanted.items()
    }
    values = _read(path, step, arguments)
    return jax.tree.unflatten(jax.tree.structure(target), [values[name] for name in wanted])


def restore_variables(setup: Setup, path: epath.Path, step: int) -> dict[str, Any]:
    """`params` and `batch_stats` of a checkpoint, on each of this process's devices.

    Raises UserError if they do not fit the network of `setup`.
    """
    mesh = local_mesh(setup.config.mesh.data, setup.config.mesh.space)
    return restore(path, step, on_devices(setup.variables, mesh))


def read_arrays(path: epath.Path, step: int, wanted: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of these names on the host, in the dtypes of `wanted`."""
    arguments = {
        name: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        for name, leaf in wanted.items()
    }
    return _read(path, step, arguments)


def _read(path: epath.Path, step: int, arguments: dict[str, ocp.RestoreArgs]) -> dict[str, Any]:
    tree = unflatten_dict(arguments, sep='/')
    restoring = ocp.args.PyTreeRestore(item=tree, restore_args=tree, partial_restore=True)
    handler, options = ocp.PyTreeCheckpointHandler(), _by_itself()
    with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        with _explained(path / str(step)):
            found = checkpointer.restore(path / str(step) / 'state', args=restoring)
    return flatten_dict(found, sep='/')


@contextlib.contextmanager
def _explained(path: epath.Path) -> Iterator[None]:
    """Turns a reading error into a UserError or, if a disk does not answer, a PassingError."""
    try:
        yield
    except _UNREADABLE as error:
        reason = ' '.join(str(error).partition('[tensorstore_spec')[0].split())
        if isinstance(error, PermissionError) or 'PERMISSION_DENIED' in reason:
            raise UserError(f'{path}: may not be read ({reason})') from error
        passing = isinstance(error, (TimeoutError, ConnectionError))
        if passing or any(text in reason for text in PASSING_TEXTS):
            raise PassingError(f'{path}: cannot be read at the moment ({reason})') from error
        raise Unreadable(
            f'{path}: cannot be read as a checkpoint of psp_jax ({reason}). If it is damaged, '
            'remove this folder; then the one before it is the latest'
        ) from error


def compare(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """A text for each name that one side lacks or whose shape or dtype differs."""

    def described(leaf: Any) -> str:
        return 'missing' if leaf is None else f'{leaf.dtype}{list(leaf.shape)}'

    pairs = {
        name: (described(saved.get(name)), described(wanted.get(name)))
        for name in sorted(saved.keys() | wanted.keys())
    }
    return [f'{name} {here} / {there}' for name, (here, there) in pairs.items() if here != there]
