"""The weights and outputs of torchvision, timm and mmsegmentation themselves."""

import sys
import types

import jax
import numpy as np
import pytest
from parity import cases, foreign, our_side

from psp_jax.model import pspnet
from psp_jax.runtime import checkpoint
from psp_jax.state import jit_for_one_call, new_state, setup
from psp_jax.weights.load import load_weights, replace_arrays

torch = pytest.importorskip('torch', reason='PyTorch is not installed; make test-torch installs it')
pytestmark = pytest.mark.torch

SIZE = 97


def pictures():
    images, _ = cases.pictures(1, SIZE)
    return images, torch.from_numpy(cases.normalised(images).transpose(0, 3, 1, 2)).float()


def import_torchvision():
    """torchvision; its own compiled operators, which nothing here needs, may not load."""
    for name in ('nms', 'qnms'):
        try:
            schema = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
            torch.library.define(f'torchvision::{name}', schema)
        except RuntimeError:  # they are there
            break
    import torchvision

    return torchvision


def fill(model):
    """Gives a PyTorch module made-up weights; returns it in test mode."""
    state = model.state_dict()
    values = cases.made_up({n: tuple(v.shape) for n, v in state.items() if v.ndim})
    model.load_state_dict({n: torch.from_numpy(v) for n, v in values.items()}, strict=False)
    return model.eval()


def loaded(source, network):
    """Our variables with the weights of a file."""
    run = setup(our_side.config_of(network, 'float32'))
    variables = jit_for_one_call(lambda: new_state(run).variables)()
    weights = load_weights(str(source), run.config, checkpoint.named_leaves(variables))
    return run.config, replace_arrays(variables, weights.arrays)


def assert_fits(model, network, path, parts):
    """The names and shapes of a model without values are those of these parts of ours."""
    from safetensors.torch import save_file

    state = model.state_dict().items()
    save_file({n: torch.zeros(v.shape, dtype=torch.float16) for n, v in state}, path)
    config = our_side.config_of(network, 'float32')
    wanted = foreign.wanted(config)
    weights = load_weights(str(path), config, wanted)
    assert weights.arrays.keys() == {n for n in wanted if n.split('/')[1] in parts}
    for name, array in weights.arrays.items():
        assert array.shape == wanted[name].shape and array.dtype == wanted[name].dtype


def assert_backbone_equal(model, act, source, network, claim, measured):
    images, x = pictures()
    with torch.no_grad():
        y = model.maxpool(act(model.bn1(model.conv1(x))))
        layer3 = model.layer3(model.layer2(model.layer1(y)))
        theirs = [v.permute(0, 2, 3, 1).numpy() for v in (layer3, model.layer4(layer3))]
    config, variables = loaded(source, network)
    network = pspnet.build(config)

    @jax.jit
    def features(variables, images):
        x = pspnet.normalise(images, config)
        return network.apply(variables, x, method=lambda network, x: network.backbone(x, False))

    ours = features(variables, images)
    for name, a, b in zip(('layer3', 'layer4'), ours, theirs, strict=True):
        measured(f'{name} of {claim}', our_side.distance(np.asarray(a), b), 1e-5)


def test_torchvisions_resnet50(tmp_path, measured):
    torchvision = import_torchvision()
    dilated = [False, True, True]
    model = fill(torchvision.models.resnet50(replace_stride_with_dilation=dilated))
    torch.save(model.state_dict(), tmp_path / 'resnet50.pth')
    network = cases.R50._replace(stem='conv7', dilation='contract')
    assert_backbone_equal(
        model, model.relu, tmp_path / 'resnet50.pth', network, 'torchvision resnet50', measured
    )


@pytest.mark.parametrize(
    ('name', 'stem'), [('resnet50', 'conv7'), ('resnet50c', 'deep_small'), ('resnet50s', 'deep')]
)
def test_timms_resnets(name, stem, tmp_path, measured):
    import_torchvision()
    import timm
    from safetensors.torch import save_file

    model = fill(timm.create_model(name, output_stride=8))
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    network = cases.R50._replace(stem=stem, dilation='contract')
    path = tmp_path / 'model.safetensors'
    assert_backbone_equal(model, model.act1, path, network, f'timm {name}', measured)


@pytest.mark.parametrize('depth', [101, 152])
def test_deeper_backbones_fit(depth, tmp_path):
    torchvision = import_torchvision()
    import timm

    with torch.device('meta'):
        models = {
            'conv7': getattr(torchvision.models, f'resnet{depth}')(),
            'deep_small': timm.create_model(f'resnet{depth}c'),
            'deep': timm.create_model(f'resnet{depth}s'),
        }
    for stem, model in models.items():
        network = cases.R50._replace(depth=depth, stem=stem)
        assert_fits(model, network, tmp_path / 'x.safetensors', ('backbone',))


def mmseg_model(network):
    """mmsegmentation's own PSPNet. Its light wheel has no compiled operators; none is used here."""
    import_torchvision()

    def operator(name):
        if name.startswith('__'):
            raise AttributeError(name)
        return type(name, (torch.nn.Module,), {})

    operators = types.ModuleType('mmcv.ops')
    operators.__getattr__ = operator  # type: ignore[method-assign]
    sys.modules.setdefault('mmcv.ops', operators)
    from mmseg.models import EncoderDecoder

    channels = 512 if network.depth == 18 else 2048
    common = {
        'dropout_ratio': 0.1,
        'num_classes': network.classes,
        'norm_cfg': {'type': 'BN'},
        'align_corners': network.align_corners,
        'loss_decode': {'type': 'CrossEntropyLoss'},
    }
    return EncoderDecoder(
        backbone={
            'type': 'ResNet' if network.stem == 'conv7' else 'ResNetV1c',
            'depth': network.depth,
            'dilations': (1, 1, 2, 4),
            'strides': (1, 2, 1, 1),
            'norm_cfg': {'type': 'BN'},
            'contract_dilation': True,
        },
        decode_head={
            'type': 'PSPHead',
            'in_channels': channels,
            'in_index': 3,
            'channels': network.head_width,
            'pool_scales': (1, 2, 3, 6),
            **common,
        },
        auxiliary_head={
            'type': 'FCNHead',
            'in_channels': channels // 2,
            'in_index': 2,
            'channels': network.aux_width,
            'num_convs': 1,
            'concat_input': False,
            **common,
        },
    )


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(('depth', 'stem'), [(18, 'deep_small'), (50, 'deep_small'), (50, 'conv7')])
def test_mmsegmentations_pspnet(depth, stem, tmp_path, measured):
    network = (cases.R18 if depth == 18 else cases.R50)._replace(
        stem=stem,
        dilation='contract_first' if depth == 18 else 'contract',
        align_corners=False,
    )
    model = fill(mmseg_model(network))
    path = tmp_path / 'pspnet.pth'
    torch.save({'meta': {'epoch': 3}, 'state_dict': model.state_dict()}, path)
    images, x = pictures()
    with torch.no_grad():
        features = model.backbone(x)
        heads = model.decode_head(features), model.auxiliary_head(features)
    config, variables = loaded(path, network)
    theirs = [y.permute(0, 2, 3, 1).numpy() for y in heads]
    ours = our_side.logits(config, variables, images)
    for kind, a, b in zip(('logits', 'aux_logits'), ours, theirs, strict=True):
        span = b.max() - b.min()
        measured(
            f'{kind} of mmsegmentation R{depth} {stem}',
            np.abs(a - b).max() / span,
            1e-4,
        )


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('stem', ['deep_small', 'conv7'])
def test_mmsegmentations_deeper_pspnet_fits(stem, tmp_path):
    network = cases.R50._replace(
        depth=101, stem=stem, dilation='contract', align_corners=False, classes=150
    )
    with torch.device('meta'):
        model = mmseg_model(network)
    assert_fits(model, network, tmp_path / 'x.safetensors', foreign.PARTS)
