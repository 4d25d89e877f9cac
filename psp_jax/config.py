"""The configuration: every key with its default and its meaning.

A config file (`configs/*.py`) defines `get_config(arg: str = '') -> ConfigDict`, which starts from
`default_config()`. The text after the colon of `configs/ade20k.py:depth=101` is its `arg`.
`--config.key=value` on the command line overrides both. config_check.py loads and checks it.
"""

import json
import re
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from psp_jax.config_values import as_text, nearest, parsed
from psp_jax.errors import UserError


def default_config() -> ConfigDict:
    """All keys with their defaults: PSPNet-50 as its paper trains it."""
    config = _group(
        seed=0,  # of the initialisation, the data order, the augmentation and dropout
        batch_size=16,  # images a step, over all devices and hosts
        total_steps=150_000,  # training steps; the learning rate reaches 0 after the last
        eval_every=5_000,  # steps between evaluations; the last step is always evaluated
        checkpoint_every=1_000,  # steps between checkpoints; evaluated steps have one too
        checkpoint_keep=2,  # newest checkpoints to keep, besides the best one by mIoU
        log_every=50,  # steps between log lines
        hang_seconds=900,  # print all stacks if no step finishes in this time; 0 = never
        # Weights to start from: a file (.pth, .safetensors), hf://OWNER/NAME[/FILE], the workdir or
        # checkpoint of another run; two files with a comma; '' = random.
        init_from='',
        # Modules that start fresh although init_from has them: patterns of the beginning of their
        # names, comma-separated, such as 'head/classifier'.
        init_skip='',
        # Python modules, comma-separated, that are imported first and may add entries to the tables
        # of backbones, contexts, losses, optimizers, label spaces and protocols.
        custom_imports='',
        dtype='float32',  # of activations: float32 | bfloat16 | float64 (for exact comparisons)
    )
    config.mesh = _group(
        data=-1,  # devices that the batch is divided over; -1 = all devices / mesh.space
        # Neighbouring devices that each image is split over in height, for crops that do not fit
        # on one; the results are the same. Divides the devices of each process.
        space=1,
    )
    config.data = _group(
        source='list',  # list | dirs | tfds:NAME | scenes (drawn on the fly, nothing to download)
        # Folder or gs:// address that the paths below are relative to; for tfds its data_dir.
        # 'list:FOLDER' and 'dirs:FOLDER' in `source` are short for it.
        root='',
        # What each split reads. list: a list file; dirs: 'IMAGES_DIR,LABELS_DIR'; tfds: a split
        # ('train[:90%]'); scenes: 'FIRST:LAST', a range of scene numbers.
        train='',
        val='',
        test='',
        classes='',  # a label space's name | comma-separated names | a number of classes
        label_map='',  # '' | minus_one (0 -> 255, v -> v - 1) | cityscapes_ids | '{11: 255}'
        crop=473,  # pixels, or (height, width); 8n + 1 if model.align_corners
        mean=(123.675, 116.28, 103.53),  # RGB, of pixels in 0..255
        std=(58.395, 57.12, 57.375),  # RGB, of pixels in 0..255
        scale=(0.5, 2.0),  # lowest and highest random scale; (1, 1) = off
        rotate=10.0,  # degrees either way, for every second example; 0 = off
        blur=0.5,  # probability of a 5x5 Gaussian blur; 0 = off
        mirror=0.5,  # probability of a horizontal flip; 0 = off
        # A training example that cannot be read: stop, naming it | skip it and take the next one;
        # evaluation always stops, because it must score every image.
        on_error='stop',
        threads=0,  # number that reads and augments on each host; 0 = one per core
    )
    config.model = _group(
        backbone='resnet',  # an entry of BACKBONES (model/backbones.py)
        depth=50,  # ResNet: 10 | 18 | 34 | 50 | 101 | 152 | 269
        stem='deep',  # deep (3x3: 64, 64, 128) | deep_small (3x3: 32, 32, 64) | conv7 (7x7: 64)
        # full: every block of stage 3 dilates 2 and of stage 4 dilates 4 (semseg);
        # contract: as full, but the first block of each stage dilates half as much (mmsegmentation,
        # torchvision);
        # contract_first: as contract, and in a basic block only the first 3x3 dilates
        # (mmsegmentation's ResNet-18).
        dilation='full',
        # Between backbone and head: pyramid | none (the plain dilated FCN), or another entry of
        # CONTEXTS (model/contexts.py).
        context='pyramid',
        bins=(1, 2, 3, 6),  # grids of the pyramid; () = as context='none'
        pool='average',  # average | max, within a bin
        reduce=True,  # 1x1 convolution to 1/N of the channels on each of the N levels
        head_width=512,  # channels of the head's 3x3 convolution
        aux_width=256,  # channels of the auxiliary head's 3x3 convolution
        dropout=0.1,  # probability of dropping a channel before a head's last convolution
        align_corners=True,  # corner pixels of features and image coincide when resizing
    )
    config.loss = _group(
        name='cross_entropy',  # an entry of LOSSES (losses.py)
        aux_weight=0.4,  # of the auxiliary loss; 0 = no auxiliary head
    )
    config.optimizer = _group(
        name='sgd',  # sgd | adamw, or another entry of OPTIMIZERS (optimizer.py)
        learning_rate=0.01,  # of the backbone, before warm-up and decay
        power=0.9,  # of the decay (1 - step / total_steps) ** power
        momentum=0.9,  # of SGD; of AdamW its beta1
        weight_decay=1e-4,
        decay_norm_and_bias=True,  # weight decay on BatchNorm and biases too (semseg)
        head_multiplier=10.0,  # learning rate outside the backbone / that of the backbone
        warmup_steps=0,  # w steps of linear warm-up before the decay; step n takes n/w of the rate
        recipe_batch_size=16,  # learning_rate is for this; a note is logged if batch_size differs
    )
    config.eval = _group(
        # whole: in one piece, by the long side (quick; what training uses);
        # semseg: windows of the training crop, mirrored too (the authors' PyTorch test);
        # caffe: the same by their MATLAB code; mmseg: in one piece, by the short side;
        # mmseg_slide: windows as in mmsegmentation.
        protocol='whole',
        split='val',  # train | val | test
        base_size=0,  # pixels, the side that images are resized to at scale 1; 0 = their own
        scales=(1.0,),  # to average over; multi-scale is (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
        flip='auto',  # average over mirror images too: auto (semseg, caffe: true) | true | false
        multiple=8,  # pixels; whole images are padded to multiples of it; 64 = few programs
        batch_size=8,  # images (or windows) in a call of the network, on each host
        save_predictions=False,  # write every prediction as the data set's server takes it
        panels=4,  # images in panels.png, with their label and prediction
    )
    return config


def crop_size(data: ConfigDict) -> tuple[int, int]:
    """(height, width) of the training crop, which is also the size of evaluation's windows.

    data: config.data.
    """
    crop = data.crop
    return (crop, crop) if isinstance(crop, int) else (crop[0], crop[1])


def parse_arg(arg: str, **defaults: Any) -> SimpleNamespace:
    """Reads 'depth=101,bins=(1,2)' over the defaults; values get the types of the defaults.

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


def set_depth(config: ConfigDict, depth: int) -> None:
    """Sets model.depth and, below 50 (basic blocks), the narrow stem and heads."""
    config.model.depth = depth
    if depth < 50:
        config.model.stem = 'deep_small'
        config.model.head_width = 128
        config.model.aux_width = 64


def read_tfds(config: ConfigDict, name: str, train: str = 'train', val: str = 'val') -> None:
    """Reads both splits from what `python -m psp_jax.datasets NAME` prepares, in its folder."""
    config.data.source = f'tfds:{name}'
    config.data.root = ''
    config.data.train = train
    config.data.val = val
    config.data.label_map = ''  # the stored values are class ids


def imagenet_weights(depth: int) -> str:
    """Public ImageNet weights of the authors' deep-stem ResNet (timm's copy of GluonCV's)."""
    return f'hf://timm/resnet{depth}s.gluon_in1k' if depth in (50, 101, 152) else ''


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


def _group(**values: Any) -> ConfigDict:
    # type_safe=False, since data.crop may be an int or a tuple; typed() is stricter anyway
    return ConfigDict(values, type_safe=False, sort_keys=False)
