"""Every config file: its resolved values, its commands, and the networks that it describes.

To update the golden files: UPDATE_GOLDEN=1 .venv/bin/python -m pytest tests/test_configs.py
"""

import importlib.util
import os
import re
import subprocess
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from psp_jax.config import flatten, to_json
from psp_jax.config_check import from_json, load_config
from psp_jax.data.labels import label_space
from psp_jax.errors import UserError
from psp_jax.state import TrainState, setup
from psp_jax.train import train_step

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / 'tests' / 'golden' / 'configs'
NAMES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))
VARIANTS = {
    **{name: '' for name in NAMES},
    'ade20k-baseline': 'bins=(),aux=0,augment=false',
    'ade20k-depth101-semseg': 'depth=101,recipe=semseg',
    'ade20k-max-unreduced': 'pool=max,reduce=false',
    'ade20k-tfds': 'source=tfds',
    'cityscapes-coarse': 'recipe=coarse',
    'cityscapes-coarse-tfds': 'recipe=coarse,source=tfds',
    'cityscapes-depth18-semseg': 'depth=18,recipe=semseg',
    'scenes-fcn': 'bins=(),seed=1',
    'voc2012-coco': 'pretrain=coco',
    'voc2012-depth101-semseg': 'depth=101,recipe=semseg',
    'voc2012-tfds': 'source=tfds',
}


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def docstring(name: str) -> str:
    spec = importlib.util.spec_from_file_location('config_file', f'configs/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.__doc__


# ---- values


@pytest.mark.parametrize('variant', VARIANTS)
def test_resolved_configuration_equals_the_golden_file(variant):
    text = to_json(load_config(f'configs/{variant.split("-")[0]}.py:{VARIANTS[variant]}'))
    path = GOLDEN / f'{variant}.json'
    if os.environ.get('UPDATE_GOLDEN'):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        pytest.skip(f'wrote {path}')
    assert text == path.read_text()
    assert to_json(from_json(text)) == text


def test_each_variant_has_a_golden_file_and_there_is_no_other():
    assert sorted(path.stem for path in GOLDEN.iterdir()) == sorted(VARIANTS)


@pytest.mark.parametrize(
    ('config', 'steps', 'crop', 'classes', 'rotate', 'blur'),
    [
        # paper, section 5.1 (no rotation and blur on Cityscapes); semseg's epochs x iterations
        ('ade20k.py:recipe=paper', 150_000, 473, 150, 10, 0.5),
        ('voc2012.py:recipe=paper', 30_000, 473, 21, 10, 0.5),
        ('cityscapes.py:recipe=paper', 90_000, 713, 19, 0, 0),
        ('ade20k.py:recipe=semseg', 100 * 1263, 473, 150, 10, 0.5),
        ('voc2012.py:recipe=semseg', 50 * 661, 473, 21, 10, 0.5),
        ('cityscapes.py:recipe=semseg', 200 * 186, 713, 19, 10, 0.5),
    ],
)
def test_recipes_are_the_published_ones(config, steps, crop, classes, rotate, blur):
    config = load_config(f'configs/{config}')
    assert (config.total_steps, config.data.crop) == (steps, crop)
    assert (config.data.rotate, config.data.blur) == (rotate, blur)
    assert (config.batch_size, config.optimizer.learning_rate) == (16, 0.01)
    assert len(label_space(config.data.classes).names) == classes


def test_without_augmentation_only_the_crop_is_random():
    data = load_config('configs/ade20k.py:augment=false').data
    assert (data.scale, data.rotate, data.blur, data.mirror) == ((1, 1), 0, 0, 0)


def test_the_error_of_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(UserError, match='recipe=mmseg: must be one of paper, semseg'):
        load_config('configs/voc2012.py:recipe=mmseg')


# ---- words


@pytest.mark.parametrize('name', NAMES)
def test_a_config_file_says_what_it_is_its_command_and_what_to_expect(name):
    text = docstring(name)
    commands = re.findall(r"python -m psp_jax\.main --config '?(configs/[^\s']+)", text)
    assert text[0] != '\n' and 'Expect: ' in text and commands
    for command in commands:
        assert command.startswith(f'configs/{name}.py')
        load_config(command)


@pytest.mark.parametrize('name', NAMES)
def test_a_config_file_documents_the_arguments_that_it_takes(name):
    documented = re.findall(r'^  ((\w+)=\S+)(?:  |$)', docstring(name), re.M)
    with pytest.raises(UserError) as raised:
        load_config(f'configs/{name}.py:?=1')
    assert str(raised.value).split('There are: ')[1].split(', ') == [name for _, name in documented]
    spelt_out = load_config(f'configs/{name}.py:{",".join(default for default, _ in documented)}')
    assert to_json(spelt_out) == to_json(load_config(f'configs/{name}.py'))


def shell_lines(name: str) -> str:
    """The docstring's shell commands: the lines that two or six spaces indent."""
    return '\n'.join(re.findall(r'^(?:  |      )\S.*$', docstring(name).split('Data:')[1], re.M))


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_the_commands_of_voc2012_make_its_lists(tmp_path):
    touch(tmp_path, *(f'SegmentationClassAug/{i}.png' for i in ('2007_1', '2007_2', '2008_3')))
    touch(tmp_path, 'ImageSets/Segmentation/val.txt')
    (tmp_path / 'ImageSets/Segmentation/val.txt').write_text('2007_2\n2009_4\n')
    subprocess.run(['bash', '-euc', shell_lines('voc2012')], cwd=tmp_path, check=True)
    data = load_config('configs/voc2012.py').data
    assert (tmp_path / data.val).read_text().splitlines() == [
        f'JPEGImages/{i}.jpg SegmentationClass/{i}.png' for i in ('2007_2', '2009_4')
    ]
    assert (tmp_path / data.train).read_text().splitlines() == [
        f'JPEGImages/{i}.jpg SegmentationClassAug/{i}.png' for i in ('2007_1', '2008_3')
    ]


def test_the_commands_of_cityscapes_make_its_lists(tmp_path):
    touch(
        tmp_path,
        'leftImg8bit/train/aachen/aachen_1_leftImg8bit.png',
        'leftImg8bit/train/bonn/bonn_2_leftImg8bit.png',
        'leftImg8bit/val/lindau/lindau_3_leftImg8bit.png',
    )
    subprocess.run(['bash', '-euc', shell_lines('cityscapes')], cwd=tmp_path, check=True)
    data = load_config('configs/cityscapes.py').data
    assert (tmp_path / data.train).read_text().splitlines() == [
        f'leftImg8bit/train/{name}_leftImg8bit.png gtFine/train/{name}_gtFine_labelTrainIds.png'
        for name in ('aachen/aachen_1', 'bonn/bonn_2')
    ]
    assert (tmp_path / data.val).read_text().splitlines() == [
        'leftImg8bit/val/lindau/lindau_3_leftImg8bit.png '
        'gtFine/val/lindau/lindau_3_gtFine_labelTrainIds.png'
    ]


# ---- networks


def ablations() -> list[tuple[str, int]]:
    """(arguments, parameters) of each row of docs/ablations.md."""
    rows = re.findall(
        r'^\| [^|]+ \| `(\S+)` \| ([\d,]+) \| [\d.]+ / [\d.]+ \|$',
        (ROOT / 'docs' / 'ablations.md').read_text(),
        re.M,
    )
    return [(arguments, int(parameters.replace(',', ''))) for arguments, parameters in rows]


def counted_by_hand(depth: int, bins: int, reduce: bool, aux: bool, classes: int) -> int:
    """Parameters of a bottleneck PSPNet: convolutions have k*k*in*out, BatchNorm 2 a channel."""

    def conv(size: int, inputs: int, outputs: int) -> int:
        return size**2 * inputs * outputs + 2 * outputs

    total = conv(3, 3, 64) + conv(3, 64, 64) + conv(3, 64, 128)
    inputs = 128
    blocks = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 269: (3, 30, 48, 8)}[depth]
    for count, width in zip(blocks, (64, 128, 256, 512), strict=True):
        for block in range(count):
            total += conv(1, inputs, width) + conv(3, width, width) + conv(1, width, 4 * width)
            total += conv(1, inputs, 4 * width) if block == 0 else 0
            inputs = 4 * width
    level = 2048 // bins if bins and reduce else 2048
    total += bins * conv(1, 2048, level) if reduce else 0
    total += conv(3, 2048 + bins * level, 512) + (512 + 1) * classes
    return total + (conv(3, 1024, 256) + (256 + 1) * classes if aux else 0)


def test_the_count_by_hand_equals_the_official_codes():
    assert counted_by_hand(50, 4, True, True, 150) == 49_180_908
    assert counted_by_hand(101, 4, True, False, 150) == 65_774_678


def test_there_is_a_command_for_every_row_of_the_papers_four_tables():
    assert len(ablations()) == 7 + 5 + 4 + 5


@pytest.mark.parametrize(('arguments', 'parameters'), dict(ablations()).items())
def test_the_network_of_an_ablation_has_the_stated_number_of_parameters(arguments, parameters):
    config = load_config(f'configs/ade20k.py:{arguments}')
    shapes = setup(config).variables['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    assert parameters == counted_by_hand(
        config.model.depth,
        len(config.model.bins),
        config.model.reduce,
        config.loss.aux_weight > 0,
        150,
    )


ARCHITECTURES = {
    str(
        [flatten(config)[key] for key in flatten(config) if key.startswith('model.')]
        + [config.loss.aux_weight > 0]
    ): arguments
    for arguments, _ in ablations()
    for config in [load_config(f'{ROOT}/configs/ade20k.py:{arguments}')]
}  # one command for each different network


@pytest.mark.slow
@pytest.mark.parametrize('arguments', ARCHITECTURES.values())
def test_a_step_of_an_ablation_changes_every_parameter(arguments):
    config = load_config(
        f'configs/ade20k.py:{arguments}',
        ['--config.data.crop=33', '--config.batch_size=2', '--config.optimizer.weight_decay=0'],
    )
    run = setup(config)
    rng = np.random.default_rng(0)

    def fill(path, leaf):  # in numpy: compiling the initialisation takes as long as the step
        if path[-1].key == 'kernel':
            spread = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            return (spread * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
        return np.full(leaf.shape, path[-1].key in ('scale', 'var'), leaf.dtype)

    variables = jax.tree_util.tree_map_with_path(fill, run.variables)
    state = TrainState(np.int32(0), **variables, opt_state=run.tx.init(variables['params']))
    batch = {
        'image': rng.integers(0, 256, (2, 33, 33, 3), np.uint8),
        'label': rng.integers(0, 150, (2, 33, 33), np.uint8),
    }
    step = partial(train_step, run=run)
    if config.model.depth > 101:  # only more blocks of the same kind, which take minutes to compile
        after, _ = jax.eval_shape(step, state, batch)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        return
    options = {'xla_backend_optimization_level': 0}  # compiles faster
    after, scalars = jax.jit(step, compiler_options=options)(state, batch)
    assert scalars['finite'] and ('loss_aux' in scalars) == (config.loss.aux_weight > 0)
    still = [
        jax.tree_util.keystr(path)
        for (path, before), now in zip(
            jax.tree_util.tree_leaves_with_path(state.params),
            jax.tree.leaves(after.params),
            strict=True,
        )
        if (before == now).all()
    ]
    assert still == []
