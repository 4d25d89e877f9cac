"""Promise 4: a run that was stopped at any moment and goes on is the run that was not stopped."""

import json
import os
import re
import signal
from hashlib import sha256
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from psp_jax.main import main


def drive(words, log, kill_at=0, finished=True):
    """The command line with `words`, which writes a line to `log` for each batch of training.

    At the checkpoint of step `kill_at` it kills itself with SIGKILL: once the checkpoint is
    `finished`, or else while it is being written. Returns the exit code.
    """
    from psp_jax import train
    from psp_jax.runtime import checkpoint

    train_batches, save = train.train_batches, checkpoint.save

    def recorded_batches(*args, **kwargs):
        for batch in train_batches(*args, **kwargs):
            pixels = sha256(batch['image'].tobytes() + batch['label'].tobytes()).hexdigest()
            with open(log, 'a') as file:
                file.write(json.dumps([batch['position'].tolist(), pixels]) + '\n')
            yield batch

    def deadly_save(manager, step, *args):
        save(manager, step, *args)
        if step == kill_at:
            if finished:
                manager.wait_until_finished()
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'train_batches', recorded_batches)
        patch.setattr(checkpoint, 'save', deadly_save)
        return main(words)


def batches_in(log):
    return [json.loads(line) for line in Path(log).read_text().splitlines()]


def arrays_in(checkpoint):
    """Every array of a checkpoint by its name, read by orbax alone, whatever devices wrote it."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(checkpoint / 'state').item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        tree = checkpointer.restore(checkpoint / 'state', restore_args=as_numpy)
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): value for path, value in flat}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.filterwarnings('ignore:Sharding info not provided')  # arrays go to this device
def test_resume_is_exact(trained, small_config, python, tmp_path, capsys):
    """Ten steps, equal bit for bit to runs killed after step 5 and within the save of step 8.

    Augmentation, dropout and momentum are on. The second process also writes checkpoints at other
    steps and the third logs at others: keys that are free to change.
    """
    config = small_config.read_text()
    assert 'scale' not in config and 'dropout' not in config  # on by default
    workdir = tmp_path / 'run'
    words = ['--config', str(small_config), '--workdir', str(workdir)]

    def killed(words, log, *args):
        call = f'from test_resume import drive; drive{(words, str(log), *args)}'
        process = python('-c', call)
        assert process.returncode == -signal.SIGKILL, process.stderr
        return process.stdout

    killed(words, tmp_path / '1', 5)
    assert names_in(workdir / 'checkpoints') == ['5']
    said = killed([*words, '--config.checkpoint_every=2'], tmp_path / '2', 8, False)
    assert 'continuing from step 5 of' in said
    left = names_in(workdir / 'checkpoints')
    assert left[:2] == ['5', '6'] and len(left) == 3 and re.match(r'8\..*tmp', left[2])
    assert drive([*words, '--config.log_every=3'], tmp_path / '3') == 0
    assert 'continuing from step 6 of' in capsys.readouterr().out

    # Each process took up the examples where its checkpoint had left them...
    every = [[2 * step, 2 * step + 1] for step in range(10)]
    first, second, third = (batches_in(tmp_path / name) for name in '123')
    assert [ids for ids, _ in first] == every[: len(first)] and 5 <= len(first) < 10
    assert [ids for ids, _ in second] == every[5 : 5 + len(second)] and 3 <= len(second)
    assert [ids for ids, _ in third] == every[6:]
    # ... with the same random choices made on them,
    assert second[0] == first[5] and third[:2] == second[1:3]
    # and ended with the same parameters, statistics and momentum.
    straight, resumed = (
        arrays_in(path / 'checkpoints' / '10') for path in (trained.workdir, workdir)
    )
    assert straight.keys() == resumed.keys()
    assert {name.split("'")[1] for name in straight} == {
        'step',
        'params',
        'batch_stats',
        'opt_state',
    }
    for name, value in straight.items():
        assert value.dtype == resumed[name].dtype
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    # The comparison could have failed: the steps after the kill have changed nearly everything.
    before = arrays_in(trained.workdir / 'checkpoints' / '5')
    same = [name for name, value in straight.items() if np.array_equal(value, before[name])]
    assert len(same) < len(straight) / 20


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('seed=1', 'seed: 0 in the checkpoint, 1 now'),
        ('batch_size=4', 'batch_size: 2 in the checkpoint, 4 now'),
        ('total_steps=12', 'total_steps: 10 in the checkpoint, 12 now'),
        ('model.head_width=24', 'model.head_width: 16 in the checkpoint, 24 now'),
    ],
)
def test_a_run_is_not_resumed_as_another_one(trained, small_config, override, message, capsys):
    words = ['--config', str(small_config), '--workdir', str(trained.workdir)]
    assert main([*words, f'--config.{override}']) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
    assert f'{trained.workdir}/checkpoints/10' in error and '--workdir' in error
