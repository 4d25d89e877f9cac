"""Promise 4: a run that was killed at any moment and goes on is the run that was not killed."""

import os
import re
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from psp_jax.main import main


def killed_in_save(words, step, finished):
    """Runs the command line until it saves `step`, and then kills this process with SIGKILL.

    It does so when the checkpoint is `finished`, or else while it is being written.
    """
    from psp_jax.runtime import checkpoint

    save = checkpoint.save

    def deadly_save(manager, saved_step, *args):
        save(manager, saved_step, *args)
        if saved_step == step:
            if finished:
                manager.wait_until_finished()
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save = deadly_save
    main(words)


def arrays_in(checkpoint):
    """Every array of a checkpoint by its name, read by orbax alone, whatever devices wrote it."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(checkpoint / 'state').item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        tree = checkpointer.restore(checkpoint / 'state', restore_args=as_numpy)
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): value for path, value in flat}


def assert_same_arrays(one, other):
    """Two checkpoints have the same names, dtypes and bits."""
    one, other = arrays_in(one), arrays_in(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert value.tobytes() == other[name].tobytes(), name


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.filterwarnings('ignore:Sharding info not provided')  # arrays go to this device
def test_resume_is_exact(trained, small_config, python, tmp_path, capsys):
    """Ten steps, equal bit for bit to runs killed after step 5 and within the save of step 8.

    Augmentation, dropout and momentum are on. The second process also writes checkpoints at other
    steps and the third logs at others: a continued run may change these keys.
    """
    workdir = tmp_path / 'run'
    words = ['--config', str(small_config), '--workdir', str(workdir)]

    def killed(words, *args):
        process = python('-c', f'from test_resume import *; killed_in_save{(words, *args)}')
        assert process.returncode == -signal.SIGKILL, process.stderr
        return process.stdout

    killed(words, 5, True)
    assert names_in(workdir / 'checkpoints') == ['5']
    said = killed([*words, '--config.checkpoint_every=2'], 8, False)
    assert 'continuing from step 5 of' in said
    left = names_in(workdir / 'checkpoints')
    assert left[:2] == ['5', '6'] and len(left) == 3 and re.match(r'8\..*tmp', left[2])
    assert main([*words, '--config.log_every=3']) == 0
    assert 'continuing from step 6 of' in capsys.readouterr().out
    assert_same_arrays(trained.workdir / 'checkpoints/10', workdir / 'checkpoints/10')

    # The comparison could have failed: the steps after the kill have changed nearly everything.
    after, before = (arrays_in(trained.workdir / 'checkpoints' / step) for step in ('10', '5'))
    same = [name for name, value in after.items() if np.array_equal(value, before[name])]
    assert len(same) < len(after) / 20


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('seed=1', 'seed: 0 in the checkpoint, 1 now'),
        ('batch_size=4', 'batch_size: 2 in the checkpoint, 4 now'),
        ('total_steps=12', 'total_steps: 10 in the checkpoint, 12 now'),
        ('model.head_width=24', 'model.head_width: 16 in the checkpoint, 24 now'),
    ],
)
@pytest.mark.parametrize('with_config', [True, False])
def test_a_run_is_not_resumed_as_another_one(
    trained, small_config, override, message, with_config, capsys
):
    words = ['--workdir', str(trained.workdir), f'--config.{override}']
    assert main(words + ['--config', str(small_config)] * with_config) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
    assert f'{trained.workdir}/checkpoints/10' in error and '--workdir' in error
