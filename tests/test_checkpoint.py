import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from psp_jax.errors import PassingError, UserError
from psp_jax.runtime import checkpoint
from psp_jax.state import TrainState

META = {'config': '{"seed": 0}', 'versions': {'jax': '0'}}


def a_state(step=3):
    """A train state as of a network of one convolution, its values by hand."""
    kernel = jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4) + step
    params = {'backbone': {'conv': {'kernel': kernel}}, 'head': {'bias': jnp.full(4, step / 7)}}
    trace = jax.tree.map(lambda x: -x, params)
    return TrainState(jnp.int32(step), params, {'bn': {'mean': jnp.ones(4)}}, ((trace,), ()))


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for value, expected in zip(*map(jax.tree.leaves, (tree, other)), strict=True):
        assert value.dtype == expected.dtype and value.sharding == expected.sharding
        np.testing.assert_array_equal(value, expected)


def save(workdir, metrics, keep=2):
    """Saves a checkpoint at each step of `metrics` ({step: mIoU or None})."""
    manager = checkpoint.open_manager(str(workdir), keep)
    for step, score in metrics.items():
        checkpoint.save(manager, step, a_state(step), META)
        if score is not None:
            checkpoint.add_metrics(manager, step, {'mIoU': score}, keep)
    manager.wait_until_finished()
    manager.close()
    return checkpoint.directory(str(workdir))


def steps_in(folder):
    return sorted(int(path.name) for path in Path(folder).iterdir())


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """The checkpoints' folder of a run with one checkpoint, of step 3; for reading only."""
    return save(tmp_path_factory.mktemp('run'), {3: 0.5})


@pytest.fixture
def two(tmp_path):
    """The checkpoints' folder of a run with checkpoints 1 and 2, for spoiling."""
    return save(tmp_path / 'run', {1: None, 2: None})


# ---- what comes back


def test_a_state_comes_back_as_it_was(saved):
    assert_same(checkpoint.restore(saved, 3, shapes(a_state())), a_state())


def test_a_part_of_a_state_comes_back_alone(saved):
    part = {'params': a_state().params, 'batch_stats': a_state().batch_stats}
    assert_same(checkpoint.restore(saved, 3, shapes(part)), part)


def test_configuration_and_versions_come_back(saved):
    assert checkpoint.read_meta(saved, 3) == META


WORKER = """
import sys
import jax
jax.config.update('jax_num_cpu_devices', 8)
import numpy as np
from psp_jax.mesh import local_mesh, on_devices, replicated
from psp_jax.runtime import checkpoint
from test_checkpoint import META, a_state, shapes

assert jax.device_count() == 8
workdir, old, new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
state = a_state(new)
state = jax.device_put(state, replicated(local_mesh(-1)))
if old:
    target = on_devices(jax.eval_shape(lambda: a_state(old)), local_mesh(-1))
    state = checkpoint.restore(checkpoint.directory(workdir), old, target)
    for value, expected in zip(jax.tree.leaves(state), jax.tree.leaves(a_state(old)), strict=True):
        assert len(value.sharding.device_set) == 8 and value.is_fully_replicated
        np.testing.assert_array_equal(value, expected)
else:
    manager = checkpoint.open_manager(workdir, 9)
    checkpoint.save(manager, new, state, META)
    manager.wait_until_finished()
    manager.close()
"""


def test_eight_devices_checkpoint_restores_on_one_and_back(tmp_path, python):
    python('-c', WORKER, tmp_path, 0, 5).check_returncode()
    folder = checkpoint.directory(str(tmp_path))
    assert_same(checkpoint.restore(folder, 5, shapes(a_state(5))), a_state(5))
    save(tmp_path, {6: None})
    python('-c', WORKER, tmp_path, 6, 0).check_returncode()


# ---- strictness


def changed(path, change):
    """The shapes of a state with what is at `path` of its params replaced by change(it)."""
    state = shapes(a_state())
    *groups, name = path.split('/')
    params = state.params
    for group in groups:
        params = params[group]
    params[name] = change(params[name])
    return state


def like(shape, dtype):
    return lambda old: jax.ShapeDtypeStruct(shape, dtype, sharding=old.sharding)


@pytest.mark.parametrize(
    ('path', 'change', 'message'),
    [
        (
            'backbone/conv/kernel',
            like((2, 3, 5), jnp.float32),
            'params/backbone/conv/kernel float32[2, 3, 4] / float32[2, 3, 5]',
        ),
        (
            'backbone/conv/kernel',
            like((4, 6), jnp.float32),  # as many values in another shape
            'params/backbone/conv/kernel float32[2, 3, 4] / float32[4, 6]',
        ),
        ('head/bias', like((4,), jnp.bfloat16), 'params/head/bias float32[4] / bfloat16[4]'),
        (
            'head',
            lambda old: {'offset': old['bias']},
            'params/head/bias float32[4] / missing; params/head/offset missing / float32[4]',
        ),
        (
            'head',
            lambda old: {**old, 'scale': old['bias']},
            'params/head/scale missing / float32[4]',
        ),
        ('head', lambda old: {}, 'params/head/bias float32[4] / missing'),
    ],
    ids=['shape', 'order', 'dtype', 'renamed', 'more in the network', 'more in the checkpoint'],
)
def test_strict_restore(saved, path, change, message):
    """Promise 9: names, shapes and dtypes are compared first; the error lists the differences."""
    with pytest.raises(UserError) as error:
        checkpoint.restore(saved, 3, changed(path, change))
    assert str(saved / '3') in str(error.value) and '(checkpoint / configuration)' in str(
        error.value
    )
    assert str(error.value).endswith(f': {message}')


def test_strict_restore_lists_every_difference_and_counts_the_rest(saved):
    state = shapes(a_state())
    state.batch_stats['bn']['mean'] = like((9,), jnp.float32)(state.batch_stats['bn']['mean'])
    state = state.replace(params={f'layer{i}': state.params['head'] for i in range(7)})
    with pytest.raises(UserError) as error:
        checkpoint.restore(saved, 3, state)
    text = str(error.value)
    # 1 statistic, 2 parameters of the checkpoint, 7 of the configuration
    assert 'batch_stats/bn/mean float32[4] / float32[9]' in text and '; and 4 more' in text
    assert text.count(' / ') == 1 + 6


# ---- which are kept, and which is meant


@pytest.mark.parametrize(
    ('metrics', 'keep', 'kept'),
    [
        ({1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2, 5: 0.4}, 2, [2, 4, 5]),
        ({1: 0.1, 2: 0.2, 3: 0.3, 4: 0.9}, 2, [3, 4]),  # the best is among the newest
        ({1: 0.9, 2: None, 3: None, 4: None}, 1, [1, 4]),  # not every step is evaluated
        ({1: None, 2: None, 3: None, 4: None}, 3, [2, 3, 4]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, metrics, keep, kept):
    assert steps_in(save(tmp_path, metrics, keep)) == kept


def test_a_checkpoint_is_found_by_name_step_and_path(tmp_path, monkeypatch):
    folder = save(tmp_path / 'a run', {10: 0.9, 20: 0.3, 30: None}, keep=3)
    monkeypatch.chdir(tmp_path)
    for which, step in (('latest', 30), ('best', 10), ('20', 20)):
        assert checkpoint.find('a run', which) == (folder, step)
    for path in (folder / '20', 'a run/checkpoints/20', './a run/checkpoints/20/'):
        assert checkpoint.find('elsewhere', str(path)) == (folder, 20)


def test_a_checkpoint_comes_with_its_configuration_unless_one_is_given(trained):
    workdir = str(trained.workdir)
    path, step, config = checkpoint.find_with_config(None, workdir, '5', ['--config.seed=3'])
    assert (path, step) == checkpoint.find(workdir, '5')
    assert (config.total_steps, config.seed) == (10, 3)
    assert checkpoint.find_with_config(config, workdir, 'latest', [])[1:] == (10, config)


def test_there_is_no_best_if_nothing_was_evaluated(two):
    with pytest.raises(UserError, match='no checkpoint was evaluated; use --checkpoint latest'):
        checkpoint.find(str(two.parent), 'best')


@pytest.mark.parametrize(
    ('which', 'message'),
    [
        ('7', 'holds no checkpoint of step 7, only of [1, 2]'),
        ('bets', 'bets: no checkpoint; give latest, best, a step, or the path of one'),
        ('nowhere/checkpoints/3', 'nowhere/checkpoints/3: no checkpoint; give'),
    ],
)
def test_a_checkpoint_that_is_not_there_says_so(two, which, message):
    with pytest.raises(UserError) as error:
        checkpoint.find(str(two.parent), which)
    assert message in str(error.value)


@pytest.mark.parametrize('which', ['latest', 'best', '3'])
def test_a_workdir_without_checkpoints_says_so(tmp_path, which):
    with pytest.raises(UserError, match=f'{tmp_path}.*holds no checkpoint; train first'):
        checkpoint.find(str(tmp_path), which)


# ---- damage


def test_a_save_that_was_cut_off_does_not_count(two):
    shutil.copytree(two / '2', two / '3.orbax-checkpoint-tmp')
    (two / '3.orbax-checkpoint-tmp' / 'state' / '_METADATA').unlink()
    (two / 'notes.txt').write_text('not a checkpoint')
    assert checkpoint.find(str(two.parent), 'latest') == (two, 2)
    assert_same(checkpoint.restore(two, 2, shapes(a_state(2))), a_state(2))
    # and the same step is saved over it
    save(two.parent, {3: None})
    assert_same(checkpoint.restore(two, 3, shapes(a_state(3))), a_state(3))


def empty(path):
    for file in Path(path).rglob('*'):
        if file.is_file():
            file.write_bytes(b'')


# Orbax awaits one of many reads; asyncio reports the errors of the others.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize(
    'damage',
    [
        lambda path: shutil.rmtree(path / 'meta'),
        lambda path: (path / 'state' / '_METADATA').unlink(),
        lambda path: empty(path / 'state' / 'd'),
        lambda path: empty(path),
    ],
    ids=['no meta', 'no list', 'empty arrays', 'empty files'],
)
def test_a_damaged_checkpoint_is_named_in_one_line_and_can_be_removed(two, damage):
    damage(two / '2')

    def read():
        folder, step = checkpoint.find(str(two.parent), 'latest')
        checkpoint.read_meta(folder, step)
        checkpoint.restore(folder, step, shapes(a_state(step)))
        return step

    with pytest.raises(UserError) as error:
        read()
    text = str(error.value)
    assert text.startswith(f'{two / "2"}: cannot be read') and 'remove this folder' in text
    assert '\n' not in text and len(text) < 800
    shutil.rmtree(two / '2')
    assert read() == 1


def test_a_workdir_that_is_a_file_says_so(tmp_path):
    (tmp_path / 'file').write_text('')
    for workdir in (tmp_path / 'file', tmp_path / 'file' / 'inside'):
        with pytest.raises(UserError, match=r'file.*/checkpoints: cannot be written .*--workdir'):
            checkpoint.open_manager(str(workdir), 1)


# Root may write anywhere, unless it gives up the capability (CAP_DAC_OVERRIDE) before it starts.
AS_A_USER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 1)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_a_folder_that_may_not_be_written_says_so_before_training(small_config, python, tmp_path):
    folder = tmp_path / 'run' / 'checkpoints'
    folder.mkdir(parents=True)
    folder.chmod(0o555)
    words = ('-m', 'psp_jax.main', '--config', small_config, '--workdir', tmp_path / 'run')
    process = python('-c', AS_A_USER, *words)
    assert process.returncode == 2
    error = f'psp_jax: error: {folder}: cannot be written (Permission denied); set --workdir'
    assert error in process.stderr and 'Traceback' not in process.stderr
    assert 'compiled' not in process.stdout and list(folder.iterdir()) == []


@pytest.mark.parametrize('step', [1, 2])
@pytest.mark.parametrize('text', ['', '{"mIoU": 0.'])
def test_a_truncated_metrics_file_counts_as_missing(tmp_path, step, text):
    folder = save(tmp_path / 'run', {1: 0.5, 2: 0.25})
    (folder / str(step) / 'metrics/metrics').write_text(text)
    scores = {1: {'mIoU': 0.5}, 2: {'mIoU': 0.25}}
    with checkpoint.open_manager(str(tmp_path / 'run'), 2) as manager:
        assert manager.metrics(step) is None and manager.metrics(3 - step) == scores[3 - step]
        assert manager.latest_step() == 2
        checkpoint.add_metrics(manager, step, scores[step], 1)  # the evaluation made up for
    assert checkpoint.find(str(tmp_path / 'run'), 'best') == (folder, 1)
    assert steps_in(folder) == [1, 2]


@pytest.mark.parametrize(
    ('error', 'kind'),
    [
        (TimeoutError('no answer'), PassingError),
        (ValueError('UNAVAILABLE: no route to the bucket'), PassingError),
        (PermissionError('Permission denied'), UserError),
        (ValueError('NOT_FOUND: no such chunk'), checkpoint.Unreadable),
    ],
)
def test_a_disk_that_does_not_answer_is_not_taken_for_damage(two, monkeypatch, error, kind):
    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr(ocp.Checkpointer, 'restore', failing)
    with pytest.raises(Exception, match=str(error)) as caught:
        checkpoint.restore(two, 2, shapes(a_state()))
    assert type(caught.value) is kind
