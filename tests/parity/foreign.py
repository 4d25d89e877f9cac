"""Made-up files of weights as other code bases write them, and loading them. No PyTorch.

The names are written down from those code bases' files, independently of weights/formats.py.
"""

import functools
import json
import re
from pathlib import Path

import numpy as np
import safetensors.numpy

from parity import cases, golden, our_side
from psp_jax.runtime.checkpoint import named_leaves
from psp_jax.state import setup
from psp_jax.weights.load import load_weights
from psp_jax.weights.names import semseg_name

PARTS = ('backbone', 'pyramid', 'head', 'aux_head')
STEM = {'0': 'conv1', '1': 'bn1', '3': 'conv2', '4': 'bn2', '6': 'conv3', '7': 'bn3'}
THREE_CONVS = {f'layer0.{i}.': f'{name}.' for i, name in STEM.items()}
CONV7 = {'layer0.0.': 'conv1.', 'layer0.1.': 'bn1.'}
TIMM_DEEP = {'layer0.7.': 'bn1.', 'layer0.': 'conv1.'}
MMSEG = {
    'layer': 'backbone.layer',
    'ppm.features.{}.1.': 'decode_head.psp_modules.{}.1.conv.',
    'ppm.features.{}.2.': 'decode_head.psp_modules.{}.1.bn.',
    'cls.0.': 'decode_head.bottleneck.conv.',
    'cls.1.': 'decode_head.bottleneck.bn.',
    'cls.4.': 'decode_head.conv_seg.',
    'aux.0.': 'auxiliary_head.convs.0.conv.',
    'aux.1.': 'auxiliary_head.convs.0.bn.',
    'aux.4.': 'auxiliary_head.conv_seg.',
}
MMSEG_DEEP = {'layer0.': 'backbone.stem.'} | MMSEG
MMSEG_CONV7 = {'layer0.0.': 'backbone.conv1.', 'layer0.1.': 'backbone.bn1.'} | MMSEG
CSAIL = THREE_CONVS | {
    'ppm.features.{}.1.': 'ppm.{}.1.',
    'ppm.features.{}.2.': 'ppm.{}.2.',
    'cls.0.': 'conv_last.0.',
    'cls.1.': 'conv_last.1.',
    'cls.4.': 'conv_last.4.',
    'aux.0.': 'cbr_deepsup.0.',
    'aux.1.': 'cbr_deepsup.1.',
    'aux.4.': 'conv_last_deepsup.',
}


def renamed(tensors, table):
    """The tensors with the beginnings of their names changed as the table says."""
    full = {}
    for old, new in table.items():
        full |= {old.format(i): new.format(i) for i in range(4)} if '{}' in old else {old: new}
    result = {}
    for name, value in tensors.items():
        old = next((o for o in full if name.startswith(o)), None)
        result[full[old] + name[len(old) :] if old else name] = value
    return result


def semseg(network):
    """Made-up tensors of a network under semseg's names, in the shapes of PyTorch's model."""
    return dict(_made_up(network))


@functools.cache
def _made_up(network):
    name = 'shapes/R18 full' if network.depth == 18 else 'shapes/R50 full'
    shapes = json.loads(str(np.load(golden.FILE)[name]))
    for head, width in (('cls', network.head_width), ('aux', network.aux_width)):
        shapes |= {name: [width] for name in shapes if name.startswith(f'{head}.1.')}
        shapes[f'{head}.0.weight'][0] = shapes[f'{head}.4.weight'][1] = width
        shapes[f'{head}.4.weight'][0] = shapes[f'{head}.4.bias'][0] = network.classes
    if network.stem == 'conv7':
        shapes = {n: s for n, s in shapes.items() if not re.match(r'layer0\.[3467]\.', n)}
        shapes |= {name: [64] for name in shapes if name.startswith('layer0.1.')}
        shapes['layer0.0.weight'] = [64, 3, 7, 7]
    return cases.made_up({name: tuple(shape) for name, shape in shapes.items()})


def classifier(tensors, table):
    """The backbone of `tensors` in a file of an ImageNet classifier, its names by the table."""
    backbone = {name: value for name, value in tensors.items() if name.startswith('layer')}
    last = {'fc.weight': np.ones((1000, 512), np.float32), 'fc.bias': np.ones(1000, np.float32)}
    return renamed(backbone, table) | last


def save(tensors, path: Path) -> str:
    """Writes the tensors as .safetensors; returns the path."""
    safetensors.numpy.save_file(tensors, path)
    return str(path)


def wanted(config):
    """The parameters and statistics of a network by name, as shapes. Found once for a network."""
    key = f'{config.model}{config.loss}{config.data.classes}'
    if key not in _shapes:
        _shapes[key] = named_leaves(setup(config).variables)
    return _shapes[key]


_shapes: dict = {}


def load(source, network, **keys):
    """`load_weights` for a network of cases.py, with these keys of the configuration changed."""
    config = our_side.config_of(network, 'float32')
    config.update_from_flattened_dict(keys)
    return load_weights(source, config, wanted(config))


def assert_holds(weights, tensors, parts=('layer', 'ppm', 'cls', 'aux')):
    """Each parameter has the tensor of its name, kernels as [H, W, in, out], bit for bit."""
    expected = {n: t for n, t in tensors.items() if n.startswith(parts)}
    found = {semseg_name(name): array for name, array in weights.arrays.items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        array = found[name]
        if tensor.ndim == 4:
            array = np.moveaxis(array, (3, 2), (0, 1))
        np.testing.assert_array_equal(array, tensor)
