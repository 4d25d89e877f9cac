"""The command line from generated photographs to metrics, and what it says to bad input."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from psp_jax.data.pipeline import example_index
from psp_jax.main import main

ROOT = Path(__file__).parents[1]
LINE = re.compile(
    r'step +(\d+)/10  loss \d+\.\d{4} \(main \d+\.\d{4}, aux \d+\.\d{4}, lr \d\.\d\de[+-]\d\d\)'
    r'  \d+\.\d images/s  waiting for data \d+%  ETA \d+m\d\ds'
)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch, programs):
    monkeypatch.chdir(ROOT)


def error_of(capsys, *words):
    """The one line on stderr of a command that is the user's error."""
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith('psp_jax: error: ') and error.endswith('\n') and error.count('\n') == 1
    return error


def read_json(path):
    return json.loads(Path(path).read_text())


def without_time(scores):
    return {name: value for name, value in scores.items() if name != 'seconds'}


# ---- a run


def test_a_run_leaves_checkpoints_metrics_and_pictures(trained):
    workdir = trained.workdir
    assert 'Traceback' not in trained.stderr
    assert sorted(path.name for path in (workdir / 'checkpoints').iterdir()) == ['10', '5']
    assert sorted(path.name for path in workdir.iterdir()) == [
        'checkpoints',
        'eval',
        'metrics.jsonl',
        'tensorboard',
    ]
    assert list((workdir / 'tensorboard').glob('events*'))
    assert sorted(path.name for path in (workdir / 'eval').iterdir()) == [
        '10-whole',
        '5-whole',
        'metrics.json',
    ]
    for step in (5, 10):
        files = sorted(path.name for path in (workdir / 'eval' / f'{step}-whole').iterdir())
        assert files == ['confusion.npy', 'metrics.json', 'panels.png']
    with Image.open(workdir / 'eval' / '10-whole' / 'panels.png') as picture:
        height, width = picture.size[::-1]
    assert height > 3 * 65 and width > 3 * 129  # three rows of image, label, prediction


def test_progress_is_one_line_a_step_with_loss_speed_and_time_left(trained):
    lines = [line for line in trained.stdout.splitlines() if '  loss ' in line]
    steps = [line for line in lines if LINE.fullmatch(line)]
    assert [int(LINE.fullmatch(line)[1]) for line in steps] == list(range(1, 11))
    rest = [line for line in lines if line not in steps]  # the headlines of the evaluations
    assert [line.split()[:3] for line in rest] == [['step', step, 'mIoU'] for step in ('5', '10')]
    assert steps[-1].endswith('ETA 0m00s')


def test_scalars_are_json_lines(trained):
    lines = [json.loads(line) for line in open(trained.workdir / 'metrics.jsonl')]
    training = [line for line in lines if 'loss' in line]
    assert [line['step'] for line in training] == list(range(1, 11))
    for line in training:
        # polynomial decay to 0 after step 10
        rate = 0.01 * (1 - (line['step'] - 1) / 10) ** 0.9
        assert line['learning_rate'] == pytest.approx(rate, rel=1e-5)
        assert line['loss'] == pytest.approx(line['loss_main'] + 0.4 * line['loss_aux'], rel=1e-5)
        assert line['images_per_second'] == pytest.approx(2 / line['seconds_per_step'])
        assert 0 <= line['data_wait'] <= 1
    validation = [line for line in lines if 'val/mIoU' in line]
    assert [line['step'] for line in validation] == [5, 10]
    assert len(lines) == 12
    scores = read_json(trained.workdir / 'eval' / '10-whole' / 'metrics.json')
    assert validation[1]['val/mIoU'] == scores['mIoU']


def test_every_valid_pixel_is_in_the_confusion_matrix_once(trained, photographs):
    labels = [np.asarray(Image.open(path)) for path in photographs.glob('labels/val_*.png')]
    pixels = np.concatenate([label[label != 255] for label in labels])
    for step in (5, 10):
        confusion = np.load(trained.workdir / 'eval' / f'{step}-whole' / 'confusion.npy')
        assert confusion.dtype.kind == 'i' and confusion.sum() == len(pixels)
        np.testing.assert_array_equal(confusion.sum(1), np.bincount(pixels, minlength=10))
        scores = read_json(trained.workdir / 'eval' / f'{step}-whole' / 'metrics.json')
        assert [c['pixels'] for c in scores['classes']] == confusion.sum(1).tolist()


def test_metrics_follow_from_the_confusion_matrix(trained):
    confusion = np.load(trained.workdir / 'eval' / '10-whole' / 'confusion.npy').tolist()
    scores = read_json(trained.workdir / 'eval' / 'metrics.json')
    assert scores == read_json(trained.workdir / 'eval' / '10-whole' / 'metrics.json')
    ious, accs = {}, {}
    for k in range(10):
        right, labelled = confusion[k][k], sum(confusion[k])
        union = labelled + sum(row[k] for row in confusion) - right
        ious[k] = right / union if union else None
        accs[k] = right / labelled if labelled else None
    some = [[v for v in values.values() if v is not None] for values in (ious, accs)]
    assert accs[9] is None  # no label has this class
    assert scores['step'] == 10 and scores['protocol'] == 'whole' and scores['images'] == 3
    assert scores['mIoU'] == pytest.approx(sum(some[0]) / len(some[0]))
    assert scores['mIoU_all'] == pytest.approx(sum(some[0]) / 10)
    assert scores['mAcc'] == pytest.approx(sum(some[1]) / len(some[1]))
    assert scores['allAcc'] == pytest.approx(
        sum(confusion[k][k] for k in range(10)) / sum(map(sum, confusion))
    )
    assert [set(c) for c in scores['classes']] == [{'id', 'name', 'iou', 'acc', 'pixels'}] * 10
    assert [c['id'] for c in scores['classes']] == list(range(10))
    assert [c['iou'] for c in scores['classes']] == pytest.approx(list(ious.values()))
    assert [c['acc'] for c in scores['classes']] == pytest.approx(list(accs.values()))


def test_a_finished_run_does_nothing_and_says_so(trained, small_config, capsys):
    def content():
        files = [p for p in sorted(trained.workdir.rglob('*')) if p.is_file()]
        return {p: p.read_bytes() for p in files if p.parent.name != 'tensorboard'}

    before = content()
    assert main(['--config', str(small_config), '--workdir', str(trained.workdir)]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == 'step 10 is the last: the run is finished'
    assert not LINE.search(output)
    assert content() == before


# ---- evaluation


@pytest.fixture
def copy_of_run(trained, tmp_path):
    """The trained run in a folder of its own, without what evaluation wrote."""
    shutil.copytree(trained.workdir / 'checkpoints', tmp_path / 'copy' / 'checkpoints')
    return tmp_path / 'copy'


def test_evaluation_needs_no_config_and_equals_the_one_in_training(trained, copy_of_run, capsys):
    assert main(['--mode', 'eval', '--workdir', str(copy_of_run)]) == 0
    written = re.search(r'written to (.*)', capsys.readouterr().out)[1]
    assert Path(written) == copy_of_run / 'eval' / '10-whole'
    for name in ('eval/metrics.json', 'eval/10-whole/metrics.json'):
        scores, expected = (read_json(folder / name) for folder in (copy_of_run, trained.workdir))
        assert without_time(scores) == without_time(expected)
    assert np.array_equal(
        *(
            np.load(folder / 'eval' / '10-whole' / 'confusion.npy')
            for folder in (copy_of_run, trained.workdir)
        )
    )


def test_the_evaluated_checkpoint_is_the_latest_the_best_a_step_or_a_path(
    trained, tmp_path, capsys
):
    scores = {
        step: read_json(trained.workdir / 'eval' / f'{step}-whole' / 'metrics.json')
        for step in (5, 10)
    }
    best = max(scores, key=lambda step: scores[step]['mIoU'])
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'checkpoints').symlink_to(trained.workdir / 'checkpoints')
    path = trained.workdir / 'checkpoints' / '5'
    for which, step in (('latest', 10), ('best', best), ('5', 5), (path, 5)):
        # a path needs no run in the working directory
        workdir = tmp_path / 'other' if which == path else tmp_path / 'run'
        words = ['--mode', 'eval', '--workdir', str(workdir), '--checkpoint', str(which)]
        assert main(words) == 0
        assert f'checkpoints/{step} on 3 images' in capsys.readouterr().out
        found = read_json(workdir / 'eval' / 'metrics.json')
        assert without_time(found) == without_time(scores[step])


def test_a_checkpoint_of_another_architecture_is_refused_with_what_differs(
    trained, small_config, capsys
):
    words = '--mode', 'eval', '--config', small_config, '--workdir', trained.workdir
    error = error_of(capsys, *words, '--config.model.head_width=24')
    assert f'{trained.workdir}/checkpoints/10 is of another architecture' in error
    assert re.search(
        r'params/head/\S*kernel float32\[3, 3, \d+, 16\] / float32\[3, 3, \d+, 24\]', error
    )
    error = error_of(capsys, *words, '--config.loss.aux_weight=0')
    assert re.search(r'params/aux_head/\S+ float32\[.*\] / missing', error)


# ---- the built-in scenes


def test_the_scenes_train_too(small_config, tmp_path, capsys):
    overrides = {
        'total_steps': 10,
        'batch_size': 2,
        'log_every': 5,
        'data.crop': 33,
        'data.val': '1000000:1000003',
        'model.depth': 10,
        'model.head_width': 16,
        'model.aux_width': 8,
        'optimizer.learning_rate': 0.01,
        'eval.batch_size': 2,
    }
    words = [f'--config.{key}={value}' for key, value in overrides.items()]
    assert main(['--config', 'configs/scenes.py', '--workdir', str(tmp_path), *words]) == 0
    assert 'step 10/10  loss' in capsys.readouterr().out
    scores = read_json(tmp_path / 'eval' / 'metrics.json')
    assert (scores['step'], scores['images']) == (10, 3)
    assert sum(c['pixels'] for c in scores['classes']) == 3 * 65 * 129
    assert {'car', 'boat'} <= {c['name'] for c in scores['classes']}


def test_folders_train_as_the_list_of_the_same_files(trained, small_config, photographs, tmp_path):
    for split in ('train', 'val'):
        for kind, pattern in (('images', f'{split} *.jpg'), ('labels', f'labels/{split}_*.png')):
            (tmp_path / kind / split).mkdir(parents=True)
            for path in photographs.glob(pattern):
                (tmp_path / kind / split / f'{path.stem[-1]}{path.suffix}').symlink_to(path)
    flags = {
        'source': f'dirs:{tmp_path}',
        'train': 'images/train,labels/train',
        'val': 'images/val,labels/val',
    }
    words = [f'--config.data.{key}={value}' for key, value in flags.items()]
    workdir = tmp_path / 'run'
    assert main(['--config', str(small_config), '--workdir', str(workdir), *words]) == 0
    ours, lists = (read_json(path / 'eval/metrics.json') for path in (workdir, trained.workdir))
    assert without_time(ours) == without_time(lists)
    ours, lists = (
        [json.loads(line)['loss'] for line in (path / 'metrics.jsonl').read_text().splitlines()[:5]]
        for path in (workdir, trained.workdir)
    )
    assert ours == lists


# ---- bad input


@pytest.fixture
def spoilt(photographs, tmp_path):
    """A copy of the photographs for a test to spoil."""
    return Path(shutil.copytree(photographs, tmp_path / 'spoilt'))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def save_label(path, change):
    label = np.array(Image.open(path))
    Image.fromarray(change(label)).save(path)


def of_value_12(label):
    label[20, 20] = 12
    return label


BAD_DATA = {
    'no list': (lambda d: (d / 'train.txt').unlink(), ['{d}/train.txt does not exist']),
    'one field': (
        lambda d: (d / 'train.txt').write_text('train_0.jpg\n'),
        ['{d}/train.txt:1', 'train_0.jpg', 'image label'],
    ),
    'no example': (
        lambda d: (d / 'train.txt').write_text('\n'),
        ['{d}/train.txt lists no example'],
    ),
    'no image': (lambda d: (d / 'train 3.jpg').unlink(), ['{d}/train 3.jpg does not exist']),
    'no label': (lambda d: (d / 'labels/val_2.png').unlink(), ['{d}/labels/val_2.png does not']),
    'truncated image': (
        lambda d: truncate(d / 'train 3.jpg'),
        ['{d}/train 3.jpg cannot be decoded'],
    ),
    'truncated label': (
        lambda d: truncate(d / 'labels/val_1.png'),
        ['{d}/labels/val_1.png cannot be decoded'],
    ),
    'two sizes': (
        lambda d: save_label(d / 'labels/train_1.png', lambda label: label[1:]),
        ['{d}/train 1.jpg is 46x41', '{d}/labels/train_1.png is 46x40'],
    ),
    'no class': (
        lambda d: save_label(d / 'labels/train_2.png', of_value_12),
        ['{d}/labels/train_2.png', '12', '10 classes'],
    ),
}


@pytest.mark.parametrize(('spoil', 'messages'), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_are_named_before_training(
    spoil, messages, small_config, spoilt, tmp_path, capsys
):
    spoil(spoilt)
    error = error_of(
        capsys,
        '--config',
        small_config,
        '--workdir',
        tmp_path / 'run',
        f'--config.data.root={spoilt}',
    )
    for message in messages:
        assert message.format(d=spoilt) in error
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('data.crp=33', "config key 'data.crp' is unknown; did you mean 'data.crop'?"),
        ('batch_size=two', 'batch_size=two: expected an integer'),
        ('data.crop=100', 'data.crop=100: a crop must be 8n + 1 (97 or 105)'),
        ('data.root=/nowhere', '/nowhere/train.txt does not exist'),
        ('data.val=', 'data.val is empty'),
        ('data.classes=', 'data.classes'),
        ('mesh.data=3', 'mesh.data=3'),
    ],
)
def test_a_bad_key_is_named(override, message, small_config, tmp_path, capsys):
    error = error_of(
        capsys, '--config', small_config, '--workdir', tmp_path / 'run', f'--config.{override}'
    )
    assert message in error


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_a_workdir_that_cannot_be_written_is_named(mode, trained, small_config, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    workdir = tmp_path / 'file' / 'run'
    words = ['--config', small_config, '--workdir', workdir, '--mode', mode]
    if mode == 'eval':
        words += ['--checkpoint', trained.workdir / 'checkpoints' / '10']
    assert str(workdir) in error_of(capsys, *words)


def test_evaluation_without_a_run_is_refused(tmp_path, capsys):
    error = error_of(capsys, '--mode', 'eval', '--workdir', tmp_path)
    assert f'{tmp_path}/checkpoints: holds no checkpoint' in error


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_training_goes_on_from_the_one_before(
    copy_of_run, trained, small_config, python
):
    words = ['--config', small_config, '--workdir', copy_of_run]
    shutil.rmtree(copy_of_run / 'checkpoints' / '10' / 'state' / 'd')
    # in a process of its own too, since what orbax left waiting speaks up when a process ends
    process = python('-m', 'psp_jax.main', *words, '--mode', 'eval')
    assert process.returncode == 2 and 'never retrieved' not in process.stderr
    # what orbax left waiting may speak up in between
    error = next(line for line in process.stderr.splitlines() if line.startswith('psp_jax: error'))
    assert f'{copy_of_run}/checkpoints/10: cannot be read' in error, process.stderr
    assert 'remove this folder' in error and len(error) < 800
    process = python('-m', 'psp_jax.main', *words)
    assert process.returncode == 0, process.stderr
    skipped = f'skipped, and renamed to 10.damaged: {copy_of_run}/checkpoints/10: cannot be read'
    assert skipped in process.stdout and 'continuing from step 5 of' in process.stdout
    names = sorted(path.name for path in (copy_of_run / 'checkpoints').iterdir())
    assert names == ['10', '10.damaged', '5']
    made, first = (values_of(path / 'checkpoints/10') for path in (copy_of_run, trained.workdir))
    for value, expected in zip(made, first, strict=True):
        np.testing.assert_array_equal(value, expected)


# ---- what goes wrong in mid-run


@pytest.mark.slow
def test_a_truncated_jpeg_in_mid_run_is_named_and_the_run_can_go_on(
    small_config, spoilt, tmp_path, python
):
    # 200 lines of the same few files, one of them bad: read in step 3, not checked at the start
    lines = (spoilt / 'train.txt').read_text().splitlines() * 40
    order = example_index(np.arange(20), 200, seed=0)
    checked = np.linspace(0, 199, 64).round().astype(int)
    bad = next(i for i in order[4:6] if i not in checked)
    shutil.copy(spoilt / 'train 0.jpg', spoilt / 'bad.jpg')
    truncate(spoilt / 'bad.jpg')
    lines[bad] = 'bad.jpg labels/train_0.png'
    (spoilt / 'train.txt').write_text('\n'.join(lines))

    workdir = tmp_path / 'run'
    process = python(
        '-m',
        'psp_jax.main',
        '--config',
        small_config,
        '--workdir',
        workdir,
        f'--config.data.root={spoilt}',
        '--config.checkpoint_every=1',
    )
    assert process.returncode == 2
    assert process.stderr.startswith(f'psp_jax: error: {spoilt}/bad.jpg cannot be decoded')
    assert process.stderr.count('\n') == 1
    assert 'step  1/10' in process.stdout
    assert [path.name for path in (workdir / 'checkpoints').iterdir()] == ['1']

    # The same command goes on without it.
    words = ['--config', small_config, '--workdir', workdir, f'--config.data.root={spoilt}']
    process = python('-m', 'psp_jax.main', *words, '--config.data.on_error=skip')
    assert process.returncode == 0 and 'continuing from step 1' in process.stdout
    start = f'skipped example 1 of this process: {spoilt}/bad.jpg cannot be decoded (image file'
    assert process.stderr.startswith(start) and process.stderr.count('\n') == 1
    (line,) = (workdir / 'skipped.jsonl').read_text().splitlines()
    assert json.loads(line)['position'] in (4, 5) and 'bad.jpg' in json.loads(line)['error']
    assert f'skipped 1 training example(s): {workdir}/skipped*.jsonl' in process.stdout


def values_of(checkpoint):
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(checkpoint / 'state')

    def leaves(node):
        return (
            [leaf for child in node.values() for leaf in leaves(child)]
            if isinstance(node, dict)
            else [np.asarray(node)]
        )

    return leaves(tree)


def test_a_run_that_could_not_be_evaluated_does_not_begin(
    small_config, photographs, tmp_path, capsys
):
    Image.new('L', (50, 37), 255).save(tmp_path / 'void.png')
    (tmp_path / 'val.txt').write_text(f'{photographs}/train 0.jpg\t{tmp_path}/void.png\n')
    words = ['--config', str(small_config), '--workdir', str(tmp_path / 'run')]
    assert main([*words, f'--config.data.val={tmp_path}/val.txt']) == 2
    assert 'data.val: no label holds a class; set another eval.split' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:Sharding info not provided')  # arrays go to this device
def test_a_loss_that_is_not_finite_names_step_and_examples_and_is_not_saved(
    small_config, photographs, tmp_path, capsys
):
    error = error_of(
        capsys,
        '--config',
        small_config,
        '--workdir',
        tmp_path,
        '--config.optimizer.learning_rate=1e30',
        '--config.checkpoint_every=1',
    )
    step = int(re.search(r'step (\d+): the loss', error)[1])
    assert 1 <= step <= 4 and 'optimizer.learning_rate' in error
    lines = (photographs / 'train.txt').read_text().splitlines()
    examples = [lines[i] for i in example_index(np.arange(20), 5, seed=0)[2 * step - 2 : 2 * step]]
    assert error.count('.jpg') == 2
    for image, label in (line.rsplit(' ', 1) for line in examples):
        assert f'{photographs}/{image}' in error and f'{photographs}/{label}' in error
    kept = sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir())
    assert all(number < step for number in kept)
    for number in kept:
        assert all(np.isfinite(v).all() for v in values_of(tmp_path / 'checkpoints' / str(number)))
