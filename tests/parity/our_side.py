"""The computations of torch_side.py with psp_jax; the results have the same names."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from parity.cases import RECIPE, Network
from psp_jax.config import default_config
from psp_jax.model import pspnet
from psp_jax.runtime.checkpoint import named_leaves
from psp_jax.state import TrainState, setup
from psp_jax.train import train_step
from psp_jax.weights.names import semseg_name, to_ours, to_torch


def config_of(network: Network, dtype: str, total_steps: int = 1) -> ConfigDict:
    config = default_config()
    config.dtype, config.total_steps = dtype, total_steps
    config.data.classes = str(network.classes)
    for key in ('depth', 'stem', 'dilation', 'align_corners', 'pool', 'head_width', 'aux_width'):
        config.model[key] = getattr(network, key)
    config.model.dropout = 0.0
    config.loss.aux_weight = RECIPE['aux_weight']
    for key in ('learning_rate', 'momentum', 'weight_decay', 'head_multiplier', 'power'):
        config.optimizer[key] = RECIPE[key]
    return config


def variables_of(config: ConfigDict, weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """The weights as our tree. Each weight has a parameter, and each parameter a weight."""
    shapes = setup(config).variables
    names = {name: semseg_name(name) for name in named_leaves(shapes)}
    assert sorted(names.values()) == sorted(weights)

    leaves = []
    for name, leaf in named_leaves(shapes).items():
        value = to_ours(weights[names[name]])
        assert value.shape == leaf.shape, name
        leaves.append(jnp.asarray(value, leaf.dtype))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def forward(
    network: Network, weights: dict[str, np.ndarray], images: np.ndarray, dtype: str = 'float32'
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, h, w, C] of uint8 images in test mode, of both heads."""
    config = config_of(network, dtype)
    return logits(config, variables_of(config, weights), images)


def both_heads(model: pspnet.PSPNet, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits in test mode, where the network itself leaves the auxiliary head out."""
    logits, _ = model(x, False)
    layer3, _ = model.backbone(x, False)
    return logits, model.aux_head(layer3, False)


def logits(
    config: ConfigDict, variables: dict[str, Any], images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`forward` of variables that are ours already."""
    model = pspnet.build(config)

    @jax.jit
    def run(variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        return model.apply(variables, pspnet.normalise(images, config), method=both_heads)

    return tuple(np.asarray(x) for x in run(variables, images))


def train(
    network: Network, weights: dict[str, np.ndarray], batches: list, total_steps: int, dtype: str
) -> dict[str, np.ndarray]:
    """Steps of `train_step`: losses [steps, 3], the first step's gradients ('gradient/NAME'), and
    all parameters and statistics in the end ('end/NAME')."""
    run = setup(config_of(network, dtype, total_steps))
    variables = variables_of(run.config, weights)
    params = variables['params']
    state = TrainState(jnp.zeros((), jnp.int32), **variables, opt_state=run.tx.init(params))
    step_fn = jax.jit(lambda s, b: train_step(s, b, run=run))
    result, losses = {}, []
    for step, (images, labels) in enumerate(batches):
        state, scalars = step_fn(state, {'image': images, 'label': labels})
        losses.append([scalars[name].item() for name in ('loss', 'loss_main', 'loss_aux')])
        if step == 0:
            # After one step the momentum is the gradient plus the decay of the initial value.
            momentum = {
                name.split('trace/')[1]: leaf
                for name, leaf in named_leaves(state.opt_state).items()
                if 'trace/' in name
            }
            for name, before in named_leaves(params).items():
                gradient = momentum[name] - RECIPE['weight_decay'] * before
                result[f'gradient/{semseg_name(f"params/{name}")}'] = to_torch(np.asarray(gradient))
    result['losses'] = np.array(losses)
    end = named_leaves({'params': state.params, 'batch_stats': state.batch_stats})
    for name, value in end.items():
        result[f'end/{semseg_name(name)}'] = to_torch(np.asarray(value))
    return result


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference as a share of the largest value."""
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))
