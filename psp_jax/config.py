"""The configuration: every key with its default, its meaning and its legal values.

A config file (`configs/*.py`) defines `get_config(arg: str = '') -> ConfigDict`, which starts from
`default_config()`. The text behind the colon of `configs/ade20k.py:depth=101` is its `arg`, and
`--config.key=value` on the command line has the last word.
"""

import difflib
import fnmatch
import importlib.util
import json
import os
import re
import traceback
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from psp_jax.config_check import as_text, check_values, parsed, typed
from psp_jax.errors import UserError

# Keys that a resumed run may change, since none of them has a part in what the parameters become.
# `total_steps` is not among them: the learning rate's decay is a function of it.
FREE_ON_RESUME = (
    'log_every',
    'hang_seconds',
    'eval_every',
    'checkpoint_every',
    'checkpoint_keep',
    'optimizer.recipe_batch_size',
    'eval.*',
    'mesh.*',
    'data.root',
    'data.threads',
    'data.on_error',
    'data.val',
    'data.test',
)


def default_config() -> ConfigDict:
    """Every key there is, set to PSPNet-50 as its paper trains it; locked against new keys."""
    config = _group(
        seed=0,  # of the initialisation, the data order, the augmentation and dropout
        batch_size=16,  # images a step, over all devices and hosts
        total_steps=150_000,  # training steps; the learning rate reaches 0 after the last
        eval_every=5_000,  # steps between evaluations; the last step is always evaluated
        checkpoint_every=1_000,  # steps between checkpoints; evaluated steps have one too
        checkpoint_keep=2,  # newest checkpoints kept, the best one by mIoU besides
        log_every=50,  # steps between log lines
        hang_seconds=900,  # without a finished step until all stacks are dumped; 0 = never
        # Weights to start from: a file (.pth, .safetensors), hf://OWNER/NAME[/FILE], the workdir or
        # checkpoint of another run; two files with a comma; '' = random.
        init_from='',
        init_skip='',  # parameters that start fresh all the same: patterns, comma-separated
        dtype='float32',  # of activations: float32 | bfloat16 | float64 (for exact comparisons)
    )
    config.mesh = _group(
        data=-1,  # devices that the batch is divided over; -1 = all there are, over mesh.space
        # Neighbouring devices that each image is split over in height, for crops that do not fit
        # on one; the results are the same. Divides the devices of each process.
        space=1,
    )
    config.data = _group(
        source='list',  # list | dirs | tfds:NAME | scenes (drawn on the fly, nothing to download)
        # Folder or gs:// address that the paths below are relative to; of tfds its data_dir.
        # 'list:FOLDER' and 'dirs:FOLDER' in `source` are short for it.
        root='',
        # What each split reads. list: a list file; dirs: 'IMAGES_DIR,LABELS_DIR'; tfds: a split
        # ('train[:90%]'); scenes: 'FIRST:LAST', a range of scene numbers.
        train='',
        val='',
        test='',
        classes='',  # a label space's name | comma-separated names | a number of classes
        label_map='',  # '' | minus_one (0 -> 255, v -> v - 1) | cityscapes_ids | '{11: 255}'
        crop=473,  # pixels, or (height, width); 8n + 1 where model.align_corners
        mean=(123.675, 116.28, 103.53),  # RGB, of pixels in 0..255
        std=(58.395, 57.12, 57.375),  # RGB, of pixels in 0..255
        scale=(0.5, 2.0),  # lowest and highest random scale; (1, 1) = off
        rotate=10.0,  # degrees either way, for every second example; 0 = off
        blur=0.5,  # probability of a 5x5 Gaussian blur; 0 = off
        mirror=0.5,  # probability of a horizontal flip; 0 = off
        # A training example that cannot be read: stop, naming it | skip it and take the next one;
        # evaluation always stops, for its scores are of every image.
        on_error='stop',
        threads=0,  # that read and augment on each host; 0 = one a core
    )
    config.model = _group(
        depth=50,  # ResNet: 18 | 34 | 50 | 101 | 152 | 269
        stem='deep',  # deep (3x3: 64, 64, 128) | deep_small (3x3: 32, 32, 64) | conv7 (7x7: 64)
        # full: every block of stage 3 dilates 2 and of stage 4 dilates 4 (semseg);
        # contract: the first block of each half as much (mmsegmentation, torchvision);
        # contract_first: besides, only the first 3x3 of a basic block (mmsegmentation's ResNet-18).
        dilation='full',
        bins=(1, 2, 3, 6),  # grids of the pyramid; () = the plain dilated FCN, no pyramid
        pool='average',  # average | max, within a bin
        reduce=True,  # 1x1 convolution to 1/N of the channels on each of the N levels
        head_width=512,  # channels of the head's 3x3 convolution
        aux_width=256,  # channels of the auxiliary head's 3x3 convolution
        dropout=0.1,  # probability of dropping a channel before a head's last convolution
        align_corners=True,  # corner pixels of features and image coincide when resizing
    )
    config.loss = _group(
        aux_weight=0.4,  # of the auxiliary loss; 0 = no auxiliary head
    )
    config.optimizer = _group(
        learning_rate=0.01,  # of the backbone, before warm-up and decay
        power=0.9,  # of the decay (1 - step / total_steps) ** power
        momentum=0.9,
        weight_decay=1e-4,
        decay_norm_and_bias=True,  # weight decay on BatchNorm and biases too (semseg)
        head_multiplier=10.0,  # learning rate of pyramid and heads over the backbone's
        warmup_steps=0,  # steps of linear warm-up, whose n-th takes n/w of the rate; 0 = none
        recipe_batch_size=16,  # that learning_rate was chosen for; a line is logged if it differs
    )
    config.eval = _group(
        # whole: in one piece, by the long side (quick; what training uses);
        # semseg: windows of the training crop, mirrored too (the authors' PyTorch test);
        # caffe: the same as their MATLAB code; mmseg: in one piece, by the short side;
        # mmseg_slide: windows as mmsegmentation's.
        protocol='whole',
        split='val',  # train | val | test
        base_size=0,  # pixels, the side that images are resized to at scale 1; 0 = their own
        scales=(1.0,),  # that are averaged; multi-scale is (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
        flip='auto',  # average mirror images in: auto (semseg and caffe do) | true | false
        multiple=8,  # pixels; canvases of whole images go up to multiples of it; 64 = few programs
        batch_size=8,  # images, or windows, a call of the network on each host
        save_predictions=False,  # write every prediction as the data set's server takes it
        panels=4,  # pictures of image, label and prediction that are kept
    )
    return config.lock()


def load_config(path_with_args: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The checked configuration of `configs/X.py[:arg=value,...]` and `--config.key=value` flags.

    Raises UserError for a missing file, an unknown argument or key, a wrong type or illegal value.
    """
    path, arg = split_path(path_with_args)
    if not os.path.isfile(path):
        raise UserError(f'--config={path}: there is no such file')
    spec = importlib.util.spec_from_file_location('psp_jax_user_config', path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        line = getattr(error, 'lineno', None)
        where = f'{path}, line {line}' if line else path
        raise UserError(f'{where}: the config file cannot be loaded ({error})') from error
    if not hasattr(module, 'get_config'):
        raise UserError(f"{path}: defines no function get_config(arg: str = '')")
    try:
        made = module.get_config(arg)
    except (AttributeError, KeyError) as error:
        message = _unknown_key(error)
        if message is None:
            raise
        raise UserError(message) from error
    if not isinstance(made, ConfigDict):
        raise UserError(f'{path}: get_config returned {type(made).__name__}, not a ConfigDict')
    return resolve(flatten(made), overrides)


def resolve(values: Mapping[str, Any], overrides: Iterable[str] = ()) -> ConfigDict:
    """The checked configuration of flat `values` ('data.crop': 473), defaults and overrides.

    Raises UserError for an unknown key, a wrong type or an illegal value.
    """
    config = default_config()
    for key, value in values.items():
        _assign(config, key, value)
    apply_overrides(config, overrides)
    check_config(config)
    return config


def split_path(path_with_args: str) -> tuple[str, str]:
    """'configs/ade20k.py:depth=101' -> ('configs/ade20k.py', 'depth=101')."""
    match = re.fullmatch(r'(.+?\.py)(?::(.*))?', path_with_args)
    if not match:
        raise UserError(
            f'--config={path_with_args}: expected a Python file and, behind a colon, '
            'its arguments, as in configs/ade20k.py:depth=101'
        )
    return match[1], match[2] or ''


def config_name(path_with_args: str) -> str:
    """'configs/ade20k.py:depth=101' -> 'ade20k'."""
    return os.path.splitext(os.path.basename(split_path(path_with_args)[0]))[0]


def parse_arg(arg: str, **defaults: Any) -> SimpleNamespace:
    """'depth=101,bins=(1,2)' over the defaults, whose types the values take.

    Raises UserError for an unknown name, a missing '=' and a value of another type.
    """
    args = SimpleNamespace(**defaults)
    for item in filter(None, (part.strip() for part in re.split(r',(?![^(\[]*[)\]])', arg))):
        name, equals, text = (part.strip() for part in item.partition('='))
        if name not in defaults:
            raise UserError(
                f'config argument {name!r} is unknown; did you mean '
                f'{nearest(name, defaults)!r}? There are: {", ".join(defaults)}'
            )
        if not equals:
            raise UserError(
                f'config argument {name!r} needs a value, as in {name}={as_text(defaults[name])}'
            )
        setattr(args, name, parsed(name, text, defaults[name]))
    return args


def apply_overrides(config: ConfigDict, overrides: Iterable[str]) -> None:
    """Sets `--config.key=value` or `--config.key`, `value` in place, typed as the defaults are.

    Raises UserError for an unknown key, a missing value and a value of another type.
    """
    words = iter(overrides)
    for word in words:
        key, equals, text = word.partition('=')
        key = key.removeprefix('--config.')
        if not equals:
            text = next(words, '--')
            if text.startswith('--'):
                raise UserError(f'--config.{key} needs a value, as in --config.{key}=VALUE')
        _assign(config, key, parsed(key, text, _default(key)))


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{'seed': 0, ..., 'data.crop': 473, ...} in the order of default_config."""
    flat: dict[str, Any] = {}
    for name, value in config.items(preserve_field_references=False):
        if isinstance(value, ConfigDict):
            flat |= {f'{name}.{inner}': leaf for inner, leaf in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def to_json(config: ConfigDict) -> str:
    """JSON text, one line a key, in the order of default_config; tuples become lists."""
    values = flatten(config)
    order = [key for key in flatten(default_config()) if key in values]
    lines = (f'  {json.dumps(key)}: {json.dumps(values[key])}' for key in order)
    return '{\n' + ',\n'.join(lines) + '\n}\n'


def from_json(text: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """What to_json wrote, lists as tuples again; keys that it lacks get their defaults."""
    return resolve(
        {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in json.loads(text).items()
        },
        overrides,
    )


def resume_differences(saved: ConfigDict, current: ConfigDict) -> list[str]:
    """'key: old in the checkpoint, new now' for keys that differ and are not FREE_ON_RESUME."""
    before, now = flatten(saved), flatten(current)
    return [
        f'{key}: {as_text(before[key])} in the checkpoint, {as_text(value)} now'
        for key, value in now.items()
        if before[key] != value
        and not any(fnmatch.fnmatchcase(key, pattern) for pattern in FREE_ON_RESUME)
    ]


def check_config(config: ConfigDict) -> None:
    """Raises UserError naming the first key whose value is not legal."""
    check_values(flatten(config))


def set_depth(config: ConfigDict, depth: int) -> None:
    """Sets model.depth and, for the basic blocks of 18 and 34 layers, the narrow stem and heads."""
    config.model.depth = depth
    if depth in (18, 34):
        config.model.stem = 'deep_small'
        config.model.head_width = 128
        config.model.aux_width = 64


def read_tfds(config: ConfigDict, name: str, train: str = 'train', val: str = 'val') -> None:
    """Has both splits read from what `python -m psp_jax.datasets NAME` prepares, in its folder."""
    config.data.source = f'tfds:{name}'
    config.data.root = ''
    config.data.train = train
    config.data.val = val
    config.data.label_map = ''  # classes already


def imagenet_weights(depth: int) -> str:
    """Public ImageNet weights of the authors' deep-stem ResNet (timm's copy of GluonCV's)."""
    return f'hf://timm/resnet{depth}s.gluon_in1k' if depth in (50, 101, 152) else ''


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` most like `name`, whole or by the part behind the last dot."""

    def likeness(other: str) -> float:
        pairs = ((name, other), (name.split('.')[-1], other.split('.')[-1]))
        return sum(difflib.SequenceMatcher(None, a, b).ratio() for a, b in pairs)

    return max(names, key=likeness)


def _group(**values: Any) -> ConfigDict:
    # type_safe=False, since data.crop may be an int or a tuple; typed() is stricter anyway
    return ConfigDict(values, type_safe=False, sort_keys=False)


def _default(key: str) -> Any:
    """The key's default value, or the UserError that names the nearest key."""
    defaults = flatten(default_config())
    if key in defaults:
        return defaults[key]
    inside = [name for name in defaults if name.startswith(f'{key}.')]
    if inside:
        raise UserError(f'config key {key!r} is a group; its keys are {", ".join(inside)}')
    raise UserError(f'config key {key!r} is unknown; did you mean {nearest(key, defaults)!r}?')


def _assign(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a key by its dotted name after the check of name and type."""
    value = typed(key, value, _default(key))
    *groups, name = key.split('.')
    for group in groups:
        config = config[group]
    config[name] = value


def _unknown_key(error: AttributeError | KeyError) -> str | None:
    """Where a config file uses which unknown key; None for any other error, a bug in the file.

    A locked ConfigDict raises from its own module, quoting the key first.
    """
    frames = traceback.extract_tb(error.__traceback__)
    quoted = re.search(r'["\'](\w+)["\']', str(error).replace('\\', ''))
    if 'ml_collections' not in frames[-1].filename or not quoted:
        return None
    place = next(frame for frame in reversed(frames) if 'ml_collections' not in frame.filename)
    keys = [*flatten(default_config()), *default_config()]
    return (
        f'{place.filename}, line {place.lineno}: config key {quoted[1]!r} is unknown; '
        f'did you mean {nearest(quoted[1], keys)!r}?'
    )
