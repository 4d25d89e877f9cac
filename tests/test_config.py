import ast
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psp_jax.config import default_config, flatten, parse_arg, set_depth, to_json
from psp_jax.config_check import (
    apply_overrides,
    check_values,
    config_name,
    from_json,
    load_config,
    resolve,
    resume_differences,
)
from psp_jax.errors import UserError

SOURCES = sorted((Path(__file__).parents[1] / 'psp_jax').rglob('*.py'))
CUSTOM = 'configs/custom.py'


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])


def legal_config(**values):
    return resolve({'data.classes': '3', **values})


def write_config(folder: Path, line: str) -> str:
    """A config file in whose line 5 `line` stands."""
    path = folder / 'mine.py'
    path.write_text(
        'from psp_jax.config import default_config\n'
        "def get_config(arg=''):\n"
        '    config = default_config()\n'
        "    config.data.classes = '3'\n"
        f'    {line}\n'
        '    return config\n'
    )
    return str(path)


# ---- defaults


def test_defaults_are_the_papers_recipe():
    # section 5.1 of the paper; crop, ImageNet's mean and deviation and the head's rate: semseg
    paper = {
        'optimizer.learning_rate': 0.01,
        'optimizer.power': 0.9,
        'optimizer.momentum': 0.9,
        'optimizer.weight_decay': 0.0001,
        'batch_size': 16,
        'total_steps': 150000,
        'loss.aux_weight': 0.4,
        'data.scale': (0.5, 2),
        'data.rotate': 10,
        'model.bins': (1, 2, 3, 6),
        'data.crop': 473,
        'optimizer.head_multiplier': 10,
        'optimizer.warmup_steps': 0,
        'optimizer.recipe_batch_size': 16,
        'model.dropout': 0.1,
        'model.dilation': 'full',
    }
    flat = flatten(default_config())
    assert {key: flat[key] for key in paper} == paper
    assert flat['data.mean'] == pytest.approx([255 * m for m in (0.485, 0.456, 0.406)])
    assert flat['data.std'] == pytest.approx([255 * s for s in (0.229, 0.224, 0.225)])


def test_defaults_are_legal_once_the_classes_are_named():
    config = default_config()
    with pytest.raises(UserError, match="data.classes='': must be set"):
        check_values(flatten(config))
    config.data.classes = 'wall,floor'
    check_values(flatten(config))


def keys_read(source: str) -> set[str]:
    """The keys that Python source reads from arguments annotated as ConfigDict.

    An argument `config` or anything's field `config` is the whole configuration, `data: ConfigDict`
    its group of that name, and `model = config.model` names a group too. `data[split]` reads what
    each split is read from.
    """
    read = set()
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        arguments = function.args
        names = {}
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            if argument.annotation and 'ConfigDict' in ast.unparse(argument.annotation):
                names[argument.arg] = '' if argument.arg == 'config' else argument.arg

        def key(node: ast.AST, names: dict[str, str] = names) -> str | None:
            if isinstance(node, ast.Name):
                return names.get(node.id)
            if isinstance(node, ast.Attribute) and node.attr == 'config':
                return ''
            if isinstance(node, ast.Attribute) and (group := key(node.value)) is not None:
                return f'{group}.{node.attr}' if group else node.attr
            return None

        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                target, value = node.targets[0], node.value
                both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                pairs = zip(target.elts, value.elts, strict=False) if both else [(target, value)]
                for name, group in pairs:
                    if isinstance(name, ast.Name) and key(group) is not None:
                        names[name.id] = key(group)
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(key(node))
            elif isinstance(node, ast.Subscript) and ast.unparse(node.slice) == 'split':
                read |= {f'{key(node.value)}.{split}' for split in ('train', 'val', 'test')}
    return read - {None}


def test_the_search_for_reads_sees_reads_and_nothing_else():
    source = """
import optimizer
def f(config: ConfigDict, data: ConfigDict, model: Model):
    config.seed = 1
    rates, seed = config.optimizer, config.loss
    optimizer.power(model.depth, data.crop)
    return lambda: (rates.momentum, seed.aux_weight, config.eval.panels, model[split])
def g(data: ConfigDict):
    data[split], data[other]
"""
    leaves = set(flatten(default_config()))
    assert keys_read(source) & leaves == {
        'data.crop',
        'optimizer.momentum',
        'loss.aux_weight',
        'eval.panels',
        'data.train',
        'data.val',
        'data.test',
    }


def test_every_default_key_is_read():
    read = set().union(*(keys_read(path.read_text()) for path in SOURCES))
    assert sorted(set(flatten(default_config())) - read) == []


# ---- arguments and overrides


def test_parse_arg_types_values_by_the_defaults():
    args = parse_arg(
        'depth=101, recipe=semseg,bins=(1,2,3),reduce=FALSE,aux=1',
        depth=50,
        recipe='paper',
        bins=(1,),
        reduce=True,
        aux=0.4,
        pool='average',
    )
    assert vars(args) == {
        'depth': 101,
        'recipe': 'semseg',
        'bins': (1, 2, 3),
        'reduce': False,
        'aux': 1.0,
        'pool': 'average',
    }
    assert isinstance(args.aux, float)


@pytest.mark.parametrize(
    ('text', 'bins'),
    [('()', ()), ('(1)', (1,)), ('1', (1,)), ('(1,)', (1,)), ('(1, 2)', (1, 2)), ('[1,2]', None)],
)
def test_parse_arg_reads_tuples_as_they_are_written(text, bins):
    if bins is None:
        with pytest.raises(UserError, match='expected a tuple of integers'):
            parse_arg(f'bins={text}', bins=(1, 2, 3, 6))
    else:
        assert parse_arg(f'bins={text}', bins=(1, 2, 3, 6)).bins == bins


@pytest.mark.parametrize(
    ('arg', 'message'),
    [
        ('dpeth=101', "'dpeth' is unknown; did you mean 'depth'? There are: depth, bins"),
        ('depth', r"'depth' needs a value, as in depth=50"),
        ('depth=deep', "depth=deep: expected an integer, got 'deep'"),
        ('depth=50.5', 'depth=50.5: expected an integer, got 50.5'),
    ],
)
def test_parse_arg_refuses(arg, message):
    with pytest.raises(UserError, match=message.replace('?', r'\?')):
        parse_arg(arg, depth=50, bins=(1, 2))


def test_overrides_come_with_an_equals_sign_or_as_the_next_word():
    config = default_config()
    apply_overrides(
        config,
        [
            '--config.seed',
            '7',
            '--config.mesh.data',
            '-1',
            '--config.data.root=/a folder=b',
            '--config.data.crop=(65, 129)',
            '--config.optimizer.power=1',
            '--config.model.bins=()',
            '--config.model.reduce=false',
            '--config.data.label_map={11: 255}',
            '--config.total_steps=1_000',
            '--config.optimizer.weight_decay=1e-3',
        ],
    )
    changed = {
        key: value
        for key, value in flatten(config).items()
        if value != flatten(default_config())[key]
    }
    assert changed == {
        'seed': 7,
        'data.root': '/a folder=b',
        'data.crop': (65, 129),
        'optimizer.power': 1.0,
        'model.bins': (),
        'model.reduce': False,
        'data.label_map': '{11: 255}',
        'total_steps': 1000,
        'optimizer.weight_decay': 0.001,
    }
    assert isinstance(config.optimizer.power, float)


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('data.crp=65', "config key 'data.crp' is unknown; did you mean 'data.crop'?"),
        ('crop=65', "config key 'crop' is unknown; did you mean 'data.crop'?"),
        ('total_step=65', "config key 'total_step' is unknown; did you mean 'total_steps'?"),
        ('optimiser.momentum=0', "did you mean 'optimizer.momentum'?"),
        (
            'model=50',
            "config key 'model' is a group; its keys are model.backbone, model.depth, model.stem",
        ),
        ('seed', '--config.seed needs a value'),
        ('model.depth=fifty', "model.depth=fifty: expected an integer, got 'fifty' (str)"),
        ('model.reduce=1', "model.reduce=1: expected true or false, got '1'"),
        ('data.crop=(1, 2, 3)', 'data.crop=(1, 2, 3): expected an integer or (height, width)'),
        ('data.crop=True', 'data.crop=true: expected an integer or (height, width)'),
        ('data.scale=(a, b)', 'data.scale=(a, b): expected a tuple of numbers, such as (0.5, 2.0)'),
        ('seed=1.0', 'seed=1.0: expected an integer, got 1.0 (float)'),
    ],
)
def test_an_override_that_is_wrong_says_how(override, message):
    with pytest.raises(UserError) as raised:
        load_config(CUSTOM, [f'--config.{override}'])
    assert message in str(raised.value)
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('model.depth=51', 'model.depth=51: must be one of 10, 18, 34, 50, 101, 152, 269'),
        ('dtype=float16', 'dtype=float16: must be one of float32, bfloat16'),
        ('data.source=lists', 'must be one of list, dirs, tfds, scenes'),
        ('data.source=tfds', 'must be list, dirs, scenes or tfds:NAME'),
        ('eval.split=vall', 'must be one of train, val, test'),
        ('batch_size=0', 'batch_size=0: must be positive'),
        ('checkpoint_every=-5', 'checkpoint_every=-5: must be positive'),
        ('optimizer.learning_rate=nan', 'optimizer.learning_rate=nan: must be finite'),
        ('optimizer.warmup_steps=-1', 'must be 0 or more'),
        ('optimizer.warmup_steps=20000', 'must be less than total_steps=20000'),
        (
            'data.scale=(2, 0.5)',
            'data.scale=(2.0, 0.5): must be two positive numbers, the lower first',
        ),
        ('data.scale=2', 'must be two positive numbers, the lower first'),
        ('data.mirror=1.5', 'must be a probability'),
        ('data.rotate=-10', 'must be from 0 to 180 degrees'),
        ('data.std=(1, 0, 1)', 'must be three positive numbers'),
        ('model.dropout=1', 'must be 0 or more and less than 1'),
        ('model.bins=(1, 0)', 'model.bins=(1, 0): must be positive integers'),
        ('mesh.data=0', 'must be positive, or -1'),
        ('seed=4294967296', 'less than 2 ** 31'),
        ('data.classes=', "data.classes='': must be set"),
        ('model.context=piramid', 'model.context=piramid: must be one of pyramid, none'),
        ('optimizer.name=adam', 'optimizer.name=adam: must be one of sgd, adamw'),
        ('custom_imports=no.such', 'cannot import no.such'),
    ],
)
def test_an_illegal_value_is_named_with_what_is_legal(override, message):
    with pytest.raises(UserError) as raised:
        load_config(CUSTOM, [f'--config.{override}'])
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ('crop', 'message'),
    [
        ('100', 'data.crop=100: a crop must be 8n + 1 (97 or 105), so that'),
        ('(65, 96)', 'data.crop=(65, 96): a crop must be 8n + 1 (89 or 97), so that'),
        ('1', 'data.crop=1: a crop must be 8n + 1 (9), so that'),
        ('-7', 'data.crop=-7: a crop must be 8n + 1 (9), so that'),
    ],
)
def test_a_crop_that_is_not_8n_plus_1_is_told_its_neighbours(crop, message):
    with pytest.raises(UserError) as raised:
        load_config(CUSTOM, [f'--config.data.crop={crop}'])
    assert message in str(raised.value)


@given(side=st.integers(-20, 800), align_corners=st.booleans())
def test_crops_are_legal_if_the_stride_meets_both_edges(side, align_corners):
    features = side
    for _ in range(3):  # each stride of 2 with padding 1 keeps positions 0, 2, 4, ...
        features = (features + 1) // 2
    meets_both_edges = features > 1 and 8 * (features - 1) == side - 1
    legal = meets_both_edges or not align_corners and side > 0 and 8 * features == side
    values = {'data.crop': side, 'model.align_corners': align_corners}
    if legal:
        assert legal_config(**values).data.crop == side
    else:
        with pytest.raises(UserError, match='a crop must be'):
            legal_config(**values)


# ---- config files


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        (
            'config.data.crp = 65',
            "mine.py: config key 'data.crp' is unknown; did you mean 'data.crop'?",
        ),
        ('config.dta.crop = 65', 'Did you mean "data" instead of "dta"?'),
        ('print(config.model.dpeth)', 'Did you mean "depth" instead of "dpeth"?'),
        ("config.total_steps = 'many'", 'total_steps=many: expected an integer'),
        (
            'config.data.crop = [65, 65]',
            'data.crop=[65, 65]: expected an integer or (height, width)',
        ),
        ('config.data = 3', "config key 'data' is a group"),
        ('return {}', 'get_config returned dict, not a ConfigDict'),
    ],
)
def test_a_config_file_that_is_wrong_is_named(tmp_path, line, message):
    with pytest.raises(UserError) as raised:
        load_config(write_config(tmp_path, line))
    assert message in str(raised.value) and '\n' not in str(raised.value)


def test_a_bug_in_a_config_file_stays_a_bug(tmp_path):
    with pytest.raises(ZeroDivisionError):
        load_config(write_config(tmp_path, 'config.seed = 1 // 0'))


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        ('configs/nothing.py', 'configs/nothing.py: there is no such file'),
        ('configs/ade20k', 'expected a Python file'),
        ('psp_jax/errors.py', 'defines no function get_config'),
    ],
)
def test_a_config_that_is_no_config_file_says_so(path, message):
    with pytest.raises(UserError, match=message):
        load_config(path)


def test_a_loaded_configuration_is_locked_and_named_after_its_file(tmp_path):
    path = write_config(tmp_path, 'config.seed = 5')
    config = load_config(f'{path}:', ['--config.batch_size=4'])
    assert (config.seed, config.batch_size) == (5, 4)
    assert config_name(f'{path}:a=1,b=(2,3)') == 'mine'
    with pytest.raises(AttributeError):
        config.sed = 3


@pytest.mark.parametrize('depth', [18, 34, 50, 269])
def test_set_depth_narrows_the_heads_of_basic_block_networks(depth):
    config = default_config()
    set_depth(config, depth)
    widths = (config.model.depth, config.model.head_width, config.model.aux_width)
    assert widths == ((depth, 128, 64) if depth < 50 else (depth, 512, 256))
    assert config.model.stem == ('deep_small' if depth < 50 else 'deep')


# ---- the saved configuration


def test_json_keeps_every_value_and_tuples():
    config = legal_config(
        **{
            'data.crop': (65, 129),
            'model.bins': (),
            'seed': 3,
            'data.label_map': '{11: 255}',
            'optimizer.power': 1,
        }
    )
    text = to_json(config)
    assert json.loads(text)['data.crop'] == [65, 129]
    back = flatten(from_json(text))
    assert back == flatten(config)
    assert {key: type(value) for key, value in back.items()} == {
        key: type(value) for key, value in flatten(config).items()
    }


def test_json_of_an_older_version_takes_defaults_and_of_a_newer_is_refused():
    assert from_json('{"data.classes": "3", "seed": 4}').seed == 4
    with pytest.raises(UserError, match="'seeed' is unknown; did you mean 'seed'"):
        from_json('{"data.classes": "3", "seeed": 4}')


def other_value(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return value[:-1]
    return value + type(value)(1)


@pytest.mark.parametrize('key', flatten(default_config()))
def test_a_run_resumes_only_where_the_mathematics_is_the_same(key):
    free = {
        'custom_imports',
        'log_every',
        'eval_every',
        'checkpoint_every',
        'checkpoint_keep',
        'optimizer.recipe_batch_size',
        'eval.protocol',
        'eval.scales',
        'eval.flip',
        'eval.save_predictions',
        'eval.split',
        'eval.base_size',
        'eval.multiple',
        'eval.batch_size',
        'eval.panels',
        'hang_seconds',
        'mesh.data',
        'mesh.space',
        'data.root',
        'data.threads',
        'data.on_error',
        'data.val',
        'data.test',
    }
    before, now = default_config(), default_config()
    assert resume_differences(before, now) == []
    *groups, name = key.split('.')
    group = now[groups[0]] if groups else now
    group[name] = other_value(group[name])
    differences = resume_differences(before, now)
    assert [line.split(':')[0] for line in differences] == ([] if key in free else [key])


def test_a_difference_names_both_values():
    lines = resume_differences(legal_config(seed=1, batch_size=8), legal_config(seed=2))
    assert lines == ['seed: 1 in the checkpoint, 2 now', 'batch_size: 8 in the checkpoint, 16 now']
