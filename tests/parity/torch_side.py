"""PSPNet in plain PyTorch, as the paper and its authors' code define it: the independent side.

Module names are those of the authors' checkpoints (layer0 to layer4, ppm, cls, aux).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from parity.cases import RECIPE, Network, normalised

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
STEMS = {'deep': (64, 64, 128), 'deep_small': (32, 32, 64), 'conv7': (64,)}


def conv_bn(inputs, outputs, size, stride=1, dilation=1):
    padding = dilation * (size - 1) // 2
    return (
        nn.Conv2d(inputs, outputs, size, stride, padding, dilation, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Residual(nn.Module):
    def __init__(self, inputs, width, bottleneck, stride, dilation, second_dilation):
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            self.conv1, self.bn1 = conv_bn(inputs, width, 1)
            self.conv2, self.bn2 = conv_bn(width, width, 3, stride, dilation)
            self.conv3, self.bn3 = conv_bn(width, outputs, 1)
        else:
            self.conv1, self.bn1 = conv_bn(inputs, width, 3, stride, dilation)
            self.conv2, self.bn2 = conv_bn(width, width, 3, 1, second_dilation)
        self.bottleneck = bottleneck
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(*conv_bn(inputs, outputs, 1, stride))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.bottleneck:
            y = self.bn3(self.conv3(torch.relu(y)))
        return torch.relu(y + (self.downsample(x) if hasattr(self, 'downsample') else x))


class Pyramid(nn.Module):
    def __init__(self, channels, bins, pool, align_corners):
        super().__init__()
        pools = {'average': nn.AdaptiveAvgPool2d, 'max': nn.AdaptiveMaxPool2d}
        self.features = nn.ModuleList(
            nn.Sequential(pools[pool](b), *conv_bn(channels, channels // len(bins), 1), nn.ReLU())
            for b in bins
        )
        self.align_corners = align_corners

    def forward(self, x):
        size = x.shape[2:]
        levels = [
            F.interpolate(level(x), size, mode='bilinear', align_corners=self.align_corners)
            for level in self.features
        ]
        return torch.cat([x, *levels], 1)


def head(inputs, width, classes):
    return nn.Sequential(
        *conv_bn(inputs, width, 3), nn.ReLU(), nn.Dropout2d(0.0), nn.Conv2d(width, classes, 1)
    )


class PSPNet(nn.Module):
    def __init__(self, network: Network):
        super().__init__()
        widths = STEMS[network.stem]
        stem, inputs = [], 3
        for i, width in enumerate(widths):
            size = 7 if network.stem == 'conv7' else 3
            stem += [*conv_bn(inputs, width, size, 2 if i == 0 else 1), nn.ReLU()]
            inputs = width
        self.layer0 = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1))
        bottleneck = network.depth >= 50
        for i, count in enumerate(BLOCKS[network.depth]):
            width, blocks = 64 * 2**i, []
            for block in range(count):
                dilation = {2: 2, 3: 4}.get(i, 1)
                if block == 0 and network.dilation != 'full':
                    dilation = max(dilation // 2, 1)
                second = 1 if network.dilation == 'contract_first' else dilation
                stride = 2 if i == 1 and block == 0 else 1
                blocks.append(Residual(inputs, width, bottleneck, stride, dilation, second))
                inputs = 4 * width if bottleneck else width
            setattr(self, f'layer{i + 1}', nn.Sequential(*blocks))
        self.ppm = Pyramid(inputs, (1, 2, 3, 6), network.pool, network.align_corners)
        self.cls = head(2 * inputs, network.head_width, network.classes)
        self.aux = head(inputs // 2, network.aux_width, network.classes)

    def forward(self, x):
        """Logits [B, C, h, w] of the main and the auxiliary head at 1/8 of the resolution."""
        x = self.layer3(self.layer2(self.layer1(self.layer0(x))))
        return self.cls(self.ppm(self.layer4(x))), self.aux(x)


def shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """The arrays of the network by name, PyTorch's counters left out."""
    with torch.device('meta'):
        state = PSPNet(network).state_dict()
    return {n: tuple(v.shape) for n, v in state.items() if not n.endswith('num_batches_tracked')}


def build(network: Network, weights: dict[str, np.ndarray], dtype=torch.float32) -> PSPNet:
    model = PSPNet(network)
    loaded = model.load_state_dict(
        {n: torch.from_numpy(v) for n, v in weights.items()}, strict=False
    )
    assert not loaded.unexpected_keys
    assert all(name.endswith('num_batches_tracked') for name in loaded.missing_keys)
    return model.to(dtype)


def forward(
    network: Network, weights: dict[str, np.ndarray], images: np.ndarray, dtype=torch.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, h, w, C] of uint8 images in test mode, of both heads."""
    model = build(network, weights, dtype).eval()
    x = torch.from_numpy(normalised(images).transpose(0, 3, 1, 2).copy()).to(dtype)
    with torch.no_grad():
        return tuple(y.permute(0, 2, 3, 1).numpy() for y in model(x))


def train(
    network: Network, weights: dict[str, np.ndarray], batches: list, total_steps: int, dtype
) -> dict[str, np.ndarray]:
    """Steps of the authors' recipe without dropout: losses [steps, 3], the first step's gradients
    ('gradient/NAME'), and all parameters and statistics in the end ('end/NAME')."""
    model = build(network, weights, dtype).train()
    fast = [p for n, p in model.named_parameters() if n.split('.')[0] in ('ppm', 'cls', 'aux')]
    slow = [p for n, p in model.named_parameters() if n.split('.')[0] not in ('ppm', 'cls', 'aux')]
    sgd = torch.optim.SGD(
        [{'params': slow}, {'params': fast}],
        lr=RECIPE['learning_rate'],
        momentum=RECIPE['momentum'],
        weight_decay=RECIPE['weight_decay'],
    )
    result, losses = {}, []
    for step, (images, labels) in enumerate(batches):
        rate = RECIPE['learning_rate'] * (1 - step / total_steps) ** RECIPE['power']
        sgd.param_groups[0]['lr'] = rate
        sgd.param_groups[1]['lr'] = rate * RECIPE['head_multiplier']
        x = torch.from_numpy(normalised(images).transpose(0, 3, 1, 2).copy()).to(dtype)
        y = torch.from_numpy(labels.astype(np.int64))
        main, aux = (
            F.cross_entropy(
                F.interpolate(
                    logits, y.shape[1:], mode='bilinear', align_corners=network.align_corners
                ),
                y,
                ignore_index=255,
            )
            for logits in model(x)
        )
        loss = main + RECIPE['aux_weight'] * aux
        sgd.zero_grad()
        loss.backward()
        if step == 0:
            for name, p in model.named_parameters():
                result[f'gradient/{name}'] = p.grad.numpy().copy()
        sgd.step()
        losses.append([value.item() for value in (loss, main, aux)])
    result['losses'] = np.array(losses)
    for name, value in model.state_dict().items():
        if not name.endswith('num_batches_tracked'):
            result[f'end/{name}'] = value.numpy()
    return result
