"""Evaluation against a naive loop over images, whatever the batch size and number of devices."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from plain_loops import CLASSES, Loop, config_of, picture, setup_and_variables
from several import LITTLE_OPTIMISATION, free_port

from psp_jax import predict
from psp_jax.data.sources import Source, make_source
from psp_jax.errors import UserError
from psp_jax.evaluate import can_be_scored, prediction_names, ranked, write_prediction
from psp_jax.main import main

ROOT = Path(__file__).parent.parent
SIZES = [(40, 57), (33, 33), (64, 48)]


def read(index):
    """Example `index` of eleven, of three sizes, with ignored pixels."""
    rng = np.random.default_rng(index)
    size = SIZES[index % 3]
    label = rng.integers(0, CLASSES, size).astype(np.uint8)
    label[rng.random(size) < 0.2] = 255
    return picture(size, index), label


SOURCE = Source(length=11, name=lambda index: f'example {index}', read=read)


def made(protocol, batch_size):
    """In float64, with one shape of input for all images: fewer programs, and padding."""
    keys = {'dtype': 'float64', 'eval.multiple': 48, 'eval.base_size': 49, 'eval.panels': 2}
    return setup_and_variables(protocol, **keys, **{'eval.batch_size': batch_size})


def naive_confusion(protocol):
    loop = Loop(*made(protocol, 1))
    confusion = np.zeros((CLASSES, CLASSES), np.int64)
    for index in range(SOURCE.length):
        image, label = read(index)
        valid = label != 255
        predictions = loop.probabilities(image).argmax(-1)
        np.add.at(confusion, (label[valid], predictions[valid]), 1)
    return confusion


SCRIPT = """
import sys
import jax, numpy as np
devices, processes, process, port, path, *runs = sys.argv[1:]
jax.config.update('jax_num_cpu_devices', int(devices))
if processes != '1':
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(f'localhost:{port}', int(processes), int(process))
import test_evaluate as t
from psp_jax.evaluate import Evaluator, can_be_scored
out = {}
assert can_be_scored(t.SOURCE, 2)
for word in runs:
    protocol, batch_size = word.split(',')
    if batch_size == '0':
        out[word] = t.naive_confusion(protocol)
        continue
    run, variables = t.made(protocol, int(batch_size))
    result = Evaluator(run, t.SOURCE).evaluate(variables, 7)
    assert result.scores['step'] == 7 and result.scores['images'] == 11
    out[word], out[f'each of {word}'] = result.confusion, result.each
    assert sorted(result.panels) == ([0, 10] if process == '0' else [])
if process == '0':
    np.savez(path, **out)
"""


def confusions(folder, environment, devices, runs, processes=1):
    """What `runs` ('PROTOCOL,BATCH_SIZE', 0 for the naive loop) count, on so many CPU devices."""
    port, path = free_port(), folder / f'{devices}x{processes}.npz'
    workers = [
        subprocess.Popen(
            [sys.executable, '-c', SCRIPT, *map(str, (devices, processes, i, port, path)), *runs],
            env=os.environ
            | environment
            | LITTLE_OPTIMISATION
            | {'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}'},
        )
        for i in range(processes)
    ]
    assert [worker.wait(timeout=900) for worker in workers] == [0] * processes
    return {f'{processes} x {devices}, {k}': v for k, v in np.load(path).items()}


def assert_all_equal(found):
    valid = sum(int((read(i)[1] != 255).sum()) for i in range(SOURCE.length))
    for protocol in {name.split(', ')[1].split(',')[0] for name in found if 'each' not in name}:
        of_protocol = {k: v for k, v in found.items() if protocol in k and 'each' not in k}
        first = next(iter(of_protocol.values()))
        assert first.sum() == valid and len(of_protocol) >= 2
        assert (first.sum(0) > 0).sum() >= 2  # the network does not say the same everywhere
        for name, confusion in of_protocol.items():
            assert confusion.dtype == np.int64
            np.testing.assert_array_equal(confusion, first, err_msg=name)
        each = [v for k, v in found.items() if protocol in k and 'each' in k]
        for other in each:
            np.testing.assert_array_equal(other, each[0])


def test_every_image_counts_exactly_once(tmp_path, programs):
    """Promise 6: the same counts at any batch size, on one device or eight, as a naive loop's."""
    found = confusions(tmp_path, programs, 1, ['whole,0', 'whole,4'])
    assert_all_equal(found | confusions(tmp_path, programs, 8, ['whole,3']))


@pytest.mark.slow
def test_eight_devices_and_two_processes_count_as_one(tmp_path, programs):
    found = confusions(tmp_path, programs, 1, ['whole,4', 'semseg,3'])
    found |= confusions(tmp_path, programs, 8, ['semseg,8'])
    found |= confusions(tmp_path, programs, 2, ['whole,3', 'semseg,4'], processes=2)
    assert_all_equal(found)


def test_labels_may_hold_no_class_until_the_last():
    def ignored(index):
        image, label = read(index)
        return image, np.full_like(label, 255)

    for source in (SOURCE._replace(read=ignored), SOURCE._replace(labelled=False)):
        assert not can_be_scored(source, threads=2)
    last = SOURCE._replace(read=lambda index: (read if index == 10 else ignored)(index))
    assert can_be_scored(last, threads=2)


def test_the_best_median_and_worst_images_are_shown_once():
    each = np.array([0.5, np.nan, 0.9, 0.1, 0.7, 0.3, 0.2])
    assert ranked(each, 1) == {'best': [2], 'median': [0], 'worst': [3]}
    assert ranked(each) == {'best': [2, 4], 'median': [0, 5], 'worst': [3, 6]}
    assert ranked(each[:3]) == {'each': [2, 0]}


def test_predictions_are_called_after_their_images():
    files = [('gs://b/val/x/1.jpg', ''), ('gs://b/val/y/1.jpg', '')]
    assert prediction_names(Source(2, str, read, files)) == ['x/1', 'y/1']
    with pytest.raises(UserError, match='two images are called 1'):
        prediction_names(Source(2, str, read, [('a/1.jpg', ''), ('a/1.png', '')]))


@pytest.mark.parametrize(
    ('classes', 'stored', 'mode'),
    [
        ('ade20k', [1, 14, 19], 'L'),
        ('cityscapes', [7, 26, 33], 'L'),
        ('voc2012', [0, 13, 18], 'P'),
    ],
)
def test_predictions_are_stored_as_the_servers_take_them(classes, stored, mode, tmp_path):
    config = config_of('whole', **{'data.classes': classes})
    ids = np.array([[0, 13, 18]], np.uint8)
    write_prediction(0, ids, names=['a/b'], folder=tmp_path, config=config)
    with Image.open(tmp_path / 'predictions' / 'val' / 'a' / 'b.png') as found:
        assert found.mode == mode and np.asarray(found).tolist() == [stored]


# ---- --mode eval


def copy_of(trained, tmp_path):
    shutil.copytree(trained.workdir / 'checkpoints', tmp_path / 'run' / 'checkpoints')
    return ['--mode', 'eval', '--workdir', str(tmp_path / 'run')]


def test_sliding_windows_by_the_command_line_leave_a_report(trained, tmp_path, capsys):
    keys = {'eval.protocol': 'semseg', 'eval.scales': (1.0, 1.5), 'eval.base_size': 64}
    words = [f'--config.{key}={value}' for key, value in keys.items()]
    words = [*copy_of(trained, tmp_path), *words, '--config.eval.save_predictions=true']
    assert main(words) == 0
    folder = tmp_path / 'run' / 'eval' / '10-semseg'
    text = (folder / 'metrics.json').read_text()
    assert (folder.parent / 'metrics.json').read_text() == text
    scores = json.loads(text)
    assert (scores['protocol'], scores['scales'], scores['flip']) == ('semseg', [1.0, 1.5], True)
    page = (folder / 'report.html').read_text()
    assert f'{scores["mIoU"]:.2%}' in page and 'best' in page and 'semseg, scales 1, 1.5' in page
    assert f'written to {folder}' in capsys.readouterr().out
    # The predictions on file are those that were scored.
    predictions = sorted((folder / 'predictions' / 'val').glob('*.png'))
    network = predict.load(str(trained.workdir), 'latest', keys)
    source = make_source(network.config.data, 'val')
    assert len(predictions) == source.length == scores['images']
    for number, path in enumerate(predictions):
        expected = network(source.read(number)[0])
        np.testing.assert_array_equal(np.asarray(Image.open(path)), expected)


@pytest.mark.parametrize('label', ['', '\tvoid.png'])
def test_a_split_without_labels_gets_predictions_alone(label, trained, tmp_path):
    """Whether it has no label files, or labels of 255 alone as Cityscapes's test set."""
    Image.new('L', (57, 40), 255).save(tmp_path / 'void.png')
    for i in range(2):
        Image.fromarray(picture((40, 57), i)).save(tmp_path / f'unknown {i}.png')
    lines = [f'unknown {i}.png{label}\n' for i in range(2)]
    (tmp_path / 'test.txt').write_text(''.join(lines))
    words = ['--config.eval.split=test', f'--config.data.root={tmp_path}']
    assert main([*copy_of(trained, tmp_path), *words, '--config.data.test=test.txt']) == 0
    folder = tmp_path / 'run' / 'eval'
    found = sorted(path for path in folder.rglob('*') if path.is_file())
    assert found == [folder / f'10-whole/predictions/test/unknown {i}.png' for i in range(2)]
    network = predict.load(str(trained.workdir))
    np.testing.assert_array_equal(np.asarray(Image.open(found[1])), network(picture((40, 57), 1)))
