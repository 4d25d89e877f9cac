"""The notebooks for Colab: their contents, their commands, and a run of each from top to bottom.

They run as papermill runs them, with a cell of other parameters after their own, in a kernel that
cannot download packages or weights.
"""

import ast
import base64
import html
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import safetensors.numpy
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from parity import cases
from parity.foreign import CONV7, classifier, semseg
from PIL import Image
from test_tfds_source import NAMES, prepare, write_pets

from psp_jax.config_check import load_config, resolve
from psp_jax.data.decode import read_image
from psp_jax.data.labels import label_space
from psp_jax.data.sources import make_source
from psp_jax.datasets.__main__ import make_builder
from psp_jax.main import parse_flags
from psp_jax.predict import load

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / 'notebooks'
NAMES_OF_NOTEBOOKS = ('quickstart', 'pets', 'evaluate')


def read(name):
    return nbformat.read(FOLDER / f'{name}.ipynb', as_version=nbformat.NO_CONVERT)


def cell(notebook, id):
    return next(cell for cell in notebook.cells if cell.id == id)


def sources(notebook, kind):
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def parameters(notebook):
    """{name: value} of the cell of parameters, whose values are literals."""
    (found,) = (cell for cell in notebook.cells if 'parameters' in cell.metadata.get('tags', ()))
    assigned = ast.parse(found.source).body
    return {line.targets[0].id: ast.literal_eval(line.value) for line in assigned}


# ---- Contents


@pytest.mark.parametrize('name', NAMES_OF_NOTEBOOKS)
def test_a_notebook_is_valid_and_has_no_output(name):
    notebook = read(name)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == 'code':
            assert cell.outputs == [] and cell.execution_count is None
    text = (FOLDER / f'{name}.ipynb').read_text()
    assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + '\n'  # small diffs


def test_all_have_the_same_repository_and_installation():
    assert {path.stem for path in FOLDER.glob('*.ipynb')} == set(NAMES_OF_NOTEBOOKS)
    found = set()
    for name in NAMES_OF_NOTEBOOKS:
        notebook = read(name)
        badge = r'\(https://colab\.research\.google\.com/github/(\S+?)/blob/main/(\S+?)\)'
        ((repository, path),) = re.findall(badge, notebook.cells[0].source)
        assert (ROOT / path) == FOLDER / f'{name}.ipynb'
        assert parameters(notebook)['REPOSITORY'] == repository
        found.add((repository, cell(notebook, 'install').source))
    assert len(found) == 1


# ---- Commands


def commands(notebook):
    """The words of each `python -m psp_jax...` in code and text, with the parameters' values."""
    code = '\n'.join(sources(notebook, 'code')).replace('\\\n', ' ')
    lines = re.findall(r'^ *!(python -m psp_jax.*)', code, re.M)
    text = '\n'.join(sources(notebook, 'markdown'))
    lines += re.findall(r'`(python -m psp_jax[^`]*)`', text)
    values = {
        **{'batch': 8, 'workdir': 'runs/x', 'which': 'best', 'init_from': '', 'flags': ''},
        'config': 'configs/pets.py:border=class,depth=50,steps=7',
        **parameters(notebook),
    }
    return [shlex.split(line.format(**values)) for line in lines]


@pytest.mark.parametrize('name', NAMES_OF_NOTEBOOKS)
def test_every_command_is_legal(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands(read(name))
    assert len(found) >= 2
    for _, _, module, *words in found:
        if module == 'psp_jax.datasets':
            make_builder(words[0], None)
            continue
        assert module == 'psp_jax.main'
        flags, overrides = parse_flags(words)
        if flags.config:
            load_config(flags.config, overrides)
        else:
            resolve({'data.classes': '2'}, overrides)


@pytest.mark.parametrize('name', NAMES_OF_NOTEBOOKS)
def test_every_example_of_flags_is_legal(name):
    code, text = ('\n'.join(sources(read(name), kind)) for kind in ('code', 'markdown'))
    examples = re.findall(r"^FLAGS = ''  # .*?: '(.*)'$", code, re.M)
    examples += re.findall(r"`FLAGS = '(.*)'`", text)
    examples += re.findall(r"`('?--config\.[a-z][^`]*)`", text)
    for example in examples:
        words = [shlex.split(word)[0] for word in shlex.split(example, posix=False)]
        resolve({'data.classes': '2'}, words)


# ---- requirements-colab.txt


def requirements(path):
    """{name: line} without comments and environment markers."""
    lines = [line.partition('#')[0].strip() for line in path.read_text().splitlines()]
    return {re.match(r'[\w-]+', line)[0]: line for line in lines if line}


def test_colab_keeps_its_own_jax_and_tensorflow():
    ours, colab = (
        requirements(p) for p in (ROOT / 'requirements.txt', FOLDER / 'requirements-colab.txt')
    )
    assert colab.items() <= ours.items()  # the same ranges
    builds = {'jax', 'tensorflow', 'tensorflow-cpu'}
    with_jax = {'flax', 'optax', 'orbax-checkpoint'}  # newer ones ask for a newer jax
    assert ours.keys() - colab.keys() == builds | with_jax | {'numpy'}


# ---- Cells by themselves


@pytest.fixture
def runtime(monkeypatch, tmp_path):
    """Runs the cell that installs, in an empty folder and without git, pip and a new process.

    Returns its commands.
    """
    (tmp_path / 'content').mkdir()
    monkeypatch.chdir(tmp_path / 'content')
    monkeypatch.setattr(sys, 'path', list(sys.path))
    seen = subprocess.CompletedProcess('', 0, 'a warning\n[1, "Tesla T4"]\n', '')

    def install(has_tensorflow=True, git_exit_code=0):
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(subprocess, 'run', lambda *_, **__: seen)
        monkeypatch.setattr(importlib.util, 'find_spec', lambda n: has_tensorflow and find_spec(n))
        namespace = {'REPOSITORY': 'somebody/psp_jax', 'INSTALL': True}
        commands = []

        def system(command):
            command = re.sub(r'\{(\w+)\}', lambda match: namespace[match[1]], command)
            commands.append(shlex.split(command))
            if commands[-1][0] == 'git' and git_exit_code:
                namespace['_exit_code'] = git_exit_code
            elif commands[-1][0] == 'git':
                (Path('psp_jax') / 'psp_jax/model').mkdir(parents=True)
                shutil.copy(ROOT / 'requirements.txt', 'psp_jax')

        namespace['get_ipython'] = lambda: SimpleNamespace(system=system)
        source = cell(read('quickstart'), 'install').source
        exec(TransformerManager().transform_cell(source), namespace)
        return commands

    return install


def test_code_is_fetched_once_and_pip_keeps_jax(runtime, capsys, tmp_path):
    git, pip = runtime()
    assert git == shlex.split('git clone --quiet --depth 1 https://github.com/somebody/psp_jax')
    assert Path.cwd() == tmp_path / 'content/psp_jax'
    assert capsys.readouterr().out == '1 x Tesla T4\n'
    assert pip[:5] == shlex.split('python -m pip install --quiet')
    assert pip[7:] == ['-r', 'notebooks/requirements-colab.txt']
    kept = dict(line.split('==') for line in Path(pip[6]).read_text().split())
    assert kept['jax'] == metadata.version('jax') and kept['numpy'] == np.__version__
    assert {'jaxlib', 'tensorflow', 'tensorflow_cpu', 'tensorflow-cpu'} & kept.keys() > {'jaxlib'}
    assert not {'tensorflow-datasets', 'ml_collections', 'flax'} & kept.keys()
    os.chdir('..')  # a restarted kernel begins here again
    assert [words[0] for words in runtime()] == ['python']


def test_a_runtime_without_tensorflow_gets_the_cpu_build(runtime):
    _, pip = runtime(has_tensorflow=False)
    assert pip[-1].startswith('tensorflow-cpu>=') and pip[7] == '-r'


def test_code_that_cannot_be_fetched_stops_the_notebook(runtime):
    with pytest.raises(AssertionError, match='git could not fetch the code'):
        runtime(git_exit_code=128)


def test_weights_that_cannot_be_downloaded_are_replaced_by_random_ones(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    names = {'config': 'configs/pets.py:depth=18', 'WEIGHTS': 'hf://nobody/nothing'}
    exec(cell(read('pets'), 'weights').source, names)
    assert names['init_from'] == ''
    assert 'STARTING FROM RANDOM WEIGHTS: ' in capsys.readouterr().out


@pytest.mark.parametrize('chosen', [True, False])
def test_colab_asks_for_a_photograph(monkeypatch, tmp_path, chosen, capsys):
    """google.colab saves the file in the current folder and returns {} if nothing was chosen."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)

    def upload():
        Image.fromarray(pixels).save('my cat.png')
        return {'my cat.png': b''} if chosen else {}

    files = SimpleNamespace(upload=upload)
    monkeypatch.setitem(sys.modules, 'google.colab', SimpleNamespace(files=files))
    names = {'PHOTO': '', 'sys': sys}
    exec(cell(read('evaluate'), 'photo').source, names)
    if chosen:
        np.testing.assert_array_equal(names['image'], pixels)
    else:
        assert names['image'].shape == (65, 129, 3) and 'is a scene' in capsys.readouterr().out


# ---- configs/pets.py


def test_pets_have_the_classes_of_the_trimaps(tmp_path, monkeypatch):
    """Which are 1 = pet, 2 = background, 3 = border by the data set's own description."""
    monkeypatch.chdir(ROOT)
    write_pets(tmp_path)
    prepare(tmp_path, tmp_path / 'data', 'array_record')
    for border, third in (('ignore', 255), ('class', 2)):
        data = load_config(f'configs/pets.py:border={border}').data
        data.root = str(tmp_path / 'data')
        names = label_space(data.classes).names
        table = np.array([99, names.index('pet'), names.index('background'), third], np.uint8)
        assert third == 255 or names[third] == 'border'
        for split, own in (('train', 'trainval'), ('val', 'test')):
            source = make_source(data, split)
            assert source.length == len(NAMES[own])
            for i in range(source.length):
                stem = source.name(i).rpartition('/')[2].removesuffix('.jpg')
                assert stem in NAMES[own]
                with Image.open(tmp_path / f'annotations/annotations/trimaps/{stem}.png') as trimap:
                    np.testing.assert_array_equal(source.read(i)[1], table[np.asarray(trimap)])


# ---- Runs from top to bottom

# The training step is that of conftest's SMALL_CONFIG: compiled once for all tests.
SMALL = (
    '--config.batch_size=2 --config.data.crop=33 --config.model.head_width=16'
    ' --config.model.aux_width=8 --config.eval.batch_size=2 --config.optimizer.learning_rate=0.01'
)
FOUR_SCENES = ' --config.data.val=1000000:1000004'


@pytest.fixture
def run(programs, tmp_path):
    """Runs a notebook with other parameters; returns it with its outputs."""

    def execute(name, **values):
        notebook = read(name)
        assert values.keys() <= parameters(notebook).keys()
        injected = nbformat.v4.new_code_cell('\n'.join(f'{k} = {v!r}' for k, v in values.items()))
        after = notebook.cells.index(cell(notebook, 'parameters')) + 1
        notebook.cells.insert(after, injected)
        environment = os.environ | programs
        environment['PATH'] = f'{Path(sys.executable).parent}:{environment["PATH"]}'
        environment |= {'PIP_NO_INDEX': '1', 'HF_HUB_OFFLINE': '1'}
        environment['IPYTHONDIR'] = str(tmp_path / 'ipython')
        client = NotebookClient(notebook, timeout=600, resources={'metadata': {'path': FOLDER}})
        client.execute(env=environment)
        return notebook

    return execute


def printed(notebook, id):
    outputs = cell(notebook, id).outputs
    return ''.join(output.text for output in outputs if output.output_type == 'stream')


def pictures(notebook):
    """{id of a cell: the pictures it shows}."""
    return {
        cell.id: [
            Image.open(io.BytesIO(base64.b64decode(output.data['image/png'])))
            for output in cell.outputs
            if 'image/png' in output.get('data', ())
        ]
        for cell in notebook.cells
        if cell.cell_type == 'code'
    }


def shown_html(notebook, id):
    found = [output.get('data', {}) for output in cell(notebook, id).outputs]
    return '\n'.join(data['text/html'] for data in found if 'text/html' in data)


def assert_shows_the_evaluation(notebook, workdir, step, images):
    """The score, the panels and the report are those that the run left behind."""
    scores = json.loads((workdir / 'eval/metrics.json').read_text())
    assert (scores['step'], scores['images']) == (step, images)
    assert f'{scores["mIoU"]:.1%}' in printed(notebook, 'look')
    folder = workdir / f'eval/{step}-whole'
    (shown,) = pictures(notebook)['look']
    with Image.open(folder / 'panels.png') as panels:
        np.testing.assert_array_equal(shown, panels)
    page = re.search(r'srcdoc="([^"]*)"', shown_html(notebook, 'report'))[1]
    assert html.unescape(page) == (folder / 'report.html').read_text()


@pytest.mark.slow
def test_quickstart_runs(run, tmp_path):
    workdir = tmp_path / 'run 1'
    notebook = run('quickstart', WORKDIR=str(workdir), STEPS=10, FLAGS=SMALL + FOUR_SCENES)
    assert re.search(r'^\d+ x ', printed(notebook, 'install'), re.M)
    assert 'step 10/10  loss' in printed(notebook, 'train')
    assert_shows_the_evaluation(notebook, workdir, 10, images=4)
    assert [p.size for p in pictures(notebook)['scenes']] == [(2 * 3 * 129, 4 * 3 * 65)]
    assert '<iframe' in shown_html(notebook, 'tensorboard')  # it runs


@pytest.mark.slow
def test_pets_run_on_photographs_that_tfds_has_prepared(run, tmp_path):
    write_pets(tmp_path)
    data_dir, workdir = tmp_path / 'data dir', tmp_path / 'run 1'
    prepare(tmp_path, data_dir, 'array_record')
    timm = classifier(semseg(cases.R18._replace(stem='conv7')), CONV7)
    weights = tmp_path / 'resnet18.safetensors'
    safetensors.numpy.save_file(timm, weights)
    notebook = run(
        'pets',
        **{'INSTALL': False, 'DATA_DIR': str(data_dir), 'WORKDIR': str(workdir)},
        **{'BORDER': 'class', 'STEPS': 2, 'WEIGHTS': str(weights), 'VAL': 'test'},
        FLAGS=SMALL + ' --config.eval.base_size=0',
    )
    assert '5 training images; classes: background, pet, border' in printed(notebook, 'photographs')
    assert len(pictures(notebook)['photographs']) == 3
    assert str(weights) in printed(notebook, 'train')
    assert_shows_the_evaluation(notebook, workdir, 2, len(NAMES['test']))


@pytest.mark.slow
def test_pets_without_a_network_go_on_with_the_scenes(run, tmp_path):
    workdir = tmp_path / 'run 1'
    notebook = run(
        'pets',
        **{'INSTALL': False, 'OFFLINE': True, 'DATA_DIR': str(tmp_path), 'WORKDIR': str(workdir)},
        **{'STEPS': 10, 'FLAGS': SMALL + FOUR_SCENES},
    )
    assert 'THERE ARE NO PHOTOGRAPHS' in printed(notebook, 'data')
    assert_shows_the_evaluation(notebook, workdir, 10, images=4)


@pytest.mark.slow
def test_evaluate_trains_a_network_where_there_is_none(run, tmp_path):
    workdir = tmp_path / 'run 1'
    notebook = run(
        'evaluate',
        **{'INSTALL': False, 'WORKDIR': str(workdir), 'STEPS': 10},
        **{'TRAIN_FLAGS': SMALL + FOUR_SCENES},
    )
    assert_shows_the_evaluation(notebook, workdir, 10, images=4)
    ((overlay,), (sure,)) = (pictures(notebook)[id] for id in ('predict', 'sure'))
    assert sure.size == (4 * 129 + 2, 4 * 65 + 2) and overlay.width == sure.width - 2


@pytest.mark.slow
def test_evaluate_takes_a_checkpoint_and_a_photograph(run, trained, tmp_path):
    workdir, photo = tmp_path / 'run 1', tmp_path / 'my cat.jpg'
    shutil.copytree(trained.workdir, workdir)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    Image.fromarray(pixels).save(photo)
    notebook = run(
        'evaluate',
        **{'INSTALL': False, 'CHECKPOINT': str(workdir / 'checkpoints/5'), 'PHOTO': str(photo)},
    )
    assert 'has checkpoints of steps [5, 10]; using 5' in printed(notebook, 'checkpoint')
    assert_shows_the_evaluation(notebook, workdir, 5, images=3)
    (sure,) = pictures(notebook)['sure']
    network = load(str(workdir / 'checkpoints/5'))
    most = network.probabilities(read_image(str(photo))).max(-1)
    np.testing.assert_allclose(np.asarray(sure)[1:-1:6, 1:-1:6] / 255, most, atol=1 / 255)
