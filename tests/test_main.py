import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import psp_jax
from psp_jax.command_line import split_overrides
from psp_jax.config import to_json
from psp_jax.config_check import load_config
from psp_jax.errors import Stopped, UserError
from psp_jax.main import main

ROOT = Path(__file__).parents[1]
SCENES = 'configs/scenes.py'


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def calls(monkeypatch):
    """Puts recorders in the place of training and evaluation; a list of their calls."""
    made = []
    monkeypatch.setattr(
        psp_jax,
        'train',
        SimpleNamespace(train_and_evaluate=lambda *args: made.append(('train', *args))),
        raising=False,
    )
    monkeypatch.setattr(
        psp_jax,
        'evaluate',
        SimpleNamespace(evaluate_checkpoint=lambda *args: made.append(('eval', *args))),
        raising=False,
    )
    return made


@pytest.fixture
def training_raises(monkeypatch):
    def install(error):
        def train_and_evaluate(*args):
            raise error

        monkeypatch.setattr(
            psp_jax, 'train', SimpleNamespace(train_and_evaluate=train_and_evaluate), raising=False
        )

    return install


def test_help_shows_the_contract_without_a_heavy_import():
    code = (
        'import sys\nfrom psp_jax.main import main\ntry:\n    main(["--help"])\nfinally:\n'
        '    print(sorted({"jax", "tensorflow", "numpy", "flax"} & set(sys.modules)))'
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == ''
    *help_lines, imported = run.stdout.splitlines()
    assert imported == '[]'
    for word in (
        '--config',
        '--workdir',
        '--mode',
        '--checkpoint',
        'train',
        'eval',
        'latest',
        'best',
        '--config.key=value',
        'runs/NAME',
    ):
        assert word in '\n'.join(help_lines)


def test_an_error_of_the_users_is_one_line_and_exit_code_2():
    run = subprocess.run(
        [sys.executable, '-m', 'psp_jax.main', '--config', SCENES, '--config.data.crp=65'],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and run.stdout == ''
    assert run.stderr == (
        "psp_jax: error: config key 'data.crp' is unknown; did you mean 'data.crop'?\n"
    )


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        ('', '--mode train needs --config'),
        ('--mode eval', '--mode eval needs --config, such as --config configs/scenes.py, or the'),
        ('--mode dry_run --workdir runs/a', '--mode dry_run needs --config FILE[:ARGS]'),
        ('--mode evla --config configs/scenes.py', "invalid choice: 'evla'"),
        ('--confg configs/scenes.py', 'flag --confg is unknown; did you mean --config?'),
        (
            '--work=runs/a --config configs/scenes.py',
            'flag --work is unknown; did you mean --workdir?',
        ),
        ('--config', '--config: expected one argument'),
        ('configs/scenes.py', "'configs/scenes.py' belongs to no flag"),
        (
            '--config configs/scenes.py --checkpoint best',
            '--checkpoint is for --mode eval or predict or export',
        ),
        ('--mode export --workdir r', '--mode export needs --output PATH'),
        ('--mode predict --workdir r --output o', '--mode predict needs --images WHICH'),
        (
            '--mode eval --workdir r --probabilities',
            '--probabilities is for --mode predict, not for eval',
        ),
        ('--config configs/scenes.py --config.seed', '--config.seed needs a value'),
        ('--config configs/scenes.py --config.seed --mode eval', '--config.seed needs a value'),
        ('--config configs/scene.py', 'configs/scene.py: there is no such file'),
        ('--config configs/scenes.py:seeed=1', "'seeed' is unknown; did you mean 'seed'?"),
        ('--config configs/scenes.py --config.data.crop=100', 'a crop must be 8n + 1 (97 or 105)'),
        ('--config configs/scenes.py --config.total_steps=x', 'total_steps=x: expected an integer'),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(argv, message, calls, capsys):
    assert main(argv.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith('psp_jax: error: ') and message in printed.err
    assert printed.err.count('\n') == 1 and printed.out == '' and calls == []


def test_training_gets_configuration_workdir_and_name(calls):
    assert main(['--config.seed', '-1', '--config', SCENES]) == 2
    overrides = ['--config.seed', '5', '--config.batch_size=4']
    assert main(['--config', f'{SCENES}:steps=7', *overrides]) == 0
    assert main(['--config', SCENES, '--workdir', '/tmp/here']) == 0
    (mode, config, workdir, name), (*_, other, _) = calls
    assert (mode, workdir, name, other) == ('train', 'runs/scenes', 'scenes', '/tmp/here')
    assert (config.seed, config.total_steps, config.batch_size) == (5, 7, 4)


def test_evaluation_takes_the_configuration_from_the_checkpoint_unless_given(calls):
    assert main(['--mode', 'eval', '--workdir', 'runs/a', '--config.eval.split=test']) == 0
    assert main(['--mode=eval', '--config', SCENES, '--checkpoint=300']) == 0
    assert calls[0] == ('eval', None, 'runs/a', 'latest', ['--config.eval.split=test'])
    _, config, workdir, checkpoint, _ = calls[1]
    assert (config.data.source, workdir, checkpoint) == ('scenes', 'runs/scenes', '300')


def test_a_workdir_alone_continues_with_the_configuration_of_its_checkpoint(
    calls, trained, small_config
):
    assert main(['--workdir', str(trained.workdir), '--config.log_every=3']) == 0
    ((mode, config, workdir, name),) = calls
    assert (mode, workdir, name) == ('train', str(trained.workdir), trained.workdir.name)
    expected = load_config(str(small_config), ['--config.log_every=3'])
    assert to_json(config) == to_json(expected)


def test_a_workdir_alone_that_holds_no_checkpoint_says_so(calls, tmp_path, capsys):
    assert main(['--workdir', str(tmp_path)]) == 2
    assert f'{tmp_path}/checkpoints: holds no checkpoint' in capsys.readouterr().err
    assert calls == []


def test_overrides_keep_their_order_among_other_flags():
    argv = '--config.a=1 --workdir w --config.b -2 --mode eval --config.c'.split()
    assert split_overrides(argv) == (
        ['--config.a=1', '--config.b', '-2', '--config.c'],
        ['--workdir', 'w', '--mode', 'eval'],
    )


@pytest.mark.parametrize(
    ('error', 'code', 'message'),
    [
        (
            UserError('3.png: value 12 is no class'),
            2,
            'psp_jax: error: 3.png: value 12 is no class',
        ),
        (KeyboardInterrupt(), 130, 'psp_jax: interrupted'),
        (Stopped(75, 'step 7 is saved'), 75, 'psp_jax: step 7 is saved'),
        (
            OSError(errno.ENOSPC, 'No space left on device', 'a'),
            2,
            'no space left on the disk of a;',
        ),
        (ValueError('RESOURCE_EXHAUSTED: No space left on device [errno 28]'), 2, 'no space left'),
    ],
)
def test_what_stops_a_run_is_one_line(error, code, message, training_raises, capsys):
    training_raises(error)
    assert main(['--config', SCENES]) == code
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count('\n') == 1


@pytest.mark.parametrize('error', [ValueError('a bug'), OSError(errno.ENOENT, 'No such file', 'x')])
def test_a_bug_keeps_its_traceback(error, training_raises):
    training_raises(error)
    with pytest.raises(type(error)):
        main(['--config', SCENES])
