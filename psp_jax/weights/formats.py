"""Tables of the parameter names in other code bases' files. names.py applies them.

All names go through those of semseg, the authors' PyTorch code: each format has a table from its
names to semseg's, and `OURS` is the table from ours.
"""

from dataclasses import dataclass, field
from typing import Any

Renaming = tuple[tuple[str, str], ...]  # (pattern of a name's beginning, its replacement)

# Modules of this network -> semseg's.
OURS: Renaming = (
    ('backbone/stem_conv1', 'layer0.0'),
    ('backbone/stem_bn1', 'layer0.1'),
    ('backbone/stem_conv2', 'layer0.3'),
    ('backbone/stem_bn2', 'layer0.4'),
    ('backbone/stem_conv3', 'layer0.6'),
    ('backbone/stem_bn3', 'layer0.7'),
    (r'backbone/layer(\d)_block(\d+)/downsample_conv', r'layer\1.\2.downsample.0'),
    (r'backbone/layer(\d)_block(\d+)/downsample_bn', r'layer\1.\2.downsample.1'),
    (r'backbone/layer(\d)_block(\d+)/((?:conv|bn)\d)', r'layer\1.\2.\3'),
    (r'pyramid/level(\d+)_conv', r'ppm.features.\1.1'),
    (r'pyramid/level(\d+)_bn', r'ppm.features.\1.2'),
    ('head/conv', 'cls.0'),
    ('head/bn', 'cls.1'),
    ('head/classifier', 'cls.4'),
    ('aux_head/conv', 'aux.0'),
    ('aux_head/bn', 'aux.1'),
    ('aux_head/classifier', 'aux.4'),
)
# Beginnings of semseg's names -> the part of this network that they belong to.
PARTS = {'layer': 'backbone', 'ppm.': 'pyramid', 'cls.': 'head', 'aux.': 'aux_head'}
# Arrays of a module -> PyTorch's. Kernels [H, W, in, out] become [out, in, H, W].
LEAVES = {
    'kernel': 'weight',
    'scale': 'weight',
    'bias': 'bias',
    'mean': 'running_mean',
    'var': 'running_var',
}

# ImageNet networks with a stem of three 3x3 convolutions, as MIT's and semseg's code name them.
_THREE_CONVS: Renaming = (
    (r'conv1\.', 'layer0.0.'),
    (r'bn1\.', 'layer0.1.'),
    (r'conv2\.', 'layer0.3.'),
    (r'bn2\.', 'layer0.4.'),
    (r'conv3\.', 'layer0.6.'),
    (r'bn3\.', 'layer0.7.'),
)


@dataclass(frozen=True)
class Format:
    """The names in one code base's files, and the options that its networks have."""

    name: str
    # Patterns. A file has this format if each of them matches the beginning of a name in it. If
    # several formats match, the first in FORMATS is used.
    marks: tuple[str, ...]
    rename: Renaming = ()
    drop: tuple[str, ...] = ()  # patterns of arrays that this network does not use
    # Keys of the configuration that do not follow from shapes, with their necessary values.
    needs: dict[str, Any] = field(default_factory=dict)


# Options of the pyramid that do not follow from shapes; equal in all of these code bases.
_PYRAMID = {'model.bins': (1, 2, 3, 6), 'model.pool': 'average', 'model.reduce': True}

COUNTERS = r'.*\.num_batches_tracked'  # PyTorch's counts of batches, which are not needed

FORMATS = (
    Format(
        name='semseg',
        marks=(r'layer0\.0\.', r'cls\.'),
        needs={'model.dilation': 'full', 'model.align_corners': True, **_PYRAMID},
    ),
    Format(
        name='mmsegmentation',
        marks=(r'backbone\.', r'decode_head\.'),
        rename=(
            (r'backbone\.stem\.', 'layer0.'),
            (r'backbone\.conv1\.', 'layer0.0.'),
            (r'backbone\.bn1\.', 'layer0.1.'),
            (r'backbone\.layer', 'layer'),
            (r'decode_head\.psp_modules\.(\d+)\.1\.conv\.', r'ppm.features.\1.1.'),
            (r'decode_head\.psp_modules\.(\d+)\.1\.bn\.', r'ppm.features.\1.2.'),
            (r'decode_head\.bottleneck\.conv\.', 'cls.0.'),
            (r'decode_head\.bottleneck\.bn\.', 'cls.1.'),
            (r'decode_head\.conv_seg\.', 'cls.4.'),
            (r'auxiliary_head\.convs\.0\.conv\.', 'aux.0.'),
            (r'auxiliary_head\.convs\.0\.bn\.', 'aux.1.'),
            (r'auxiliary_head\.conv_seg\.', 'aux.4.'),
        ),
        needs={'model.dilation': 'contract_first', 'model.align_corners': False, **_PYRAMID},
    ),
    Format(
        name='CSAIL',
        marks=(r'conv3\.', r'conv_last\.'),
        rename=(
            *_THREE_CONVS,
            (r'ppm\.(\d+)\.', r'ppm.features.\1.'),
            (r'conv_last\.', 'cls.'),
            (r'cbr_deepsup\.', 'aux.'),
            (r'conv_last_deepsup\.', 'aux.4.'),
        ),
        drop=(r'.*\._tmp_running_(mean|var)', r'.*\._running_iter', r'fc\.'),
        needs={'model.dilation': 'contract', 'model.align_corners': False, **_PYRAMID},
    ),
    Format(
        name="semseg's ImageNet ResNet",
        marks=(r'conv1\.weight', r'conv3\.weight', r'layer4\.'),
        rename=_THREE_CONVS,
        drop=(r'fc\.',),
    ),
    Format(
        name='timm ResNet with a deep stem',
        marks=(r'conv1\.6\.', r'layer4\.'),
        rename=((r'conv1\.', 'layer0.'), (r'bn1\.', 'layer0.7.')),
        drop=(r'fc\.',),
    ),
    Format(
        name='torchvision or timm ResNet',
        marks=(r'conv1\.weight', r'layer4\.'),
        rename=((r'conv1\.', 'layer0.0.'), (r'bn1\.', 'layer0.1.')),
        drop=(r'fc\.',),
    ),
)
