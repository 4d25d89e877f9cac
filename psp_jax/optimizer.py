"""The optimizer: poly schedule, groups of parameters, and the update rules of OPTIMIZERS."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def sgd(
    optimizer: ConfigDict, rate: optax.Schedule, decays: Any
) -> optax.GradientTransformationExtraArgs:
    """v = momentum * v + g + weight_decay * p; p = p - rate * v (PyTorch's form)."""
    return optax.chain(
        optax.add_decayed_weights(optimizer.weight_decay, mask=decays),
        optax.sgd(rate, optimizer.momentum),
    )


def adamw(
    optimizer: ConfigDict, rate: optax.Schedule, decays: Any
) -> optax.GradientTransformationExtraArgs:
    """AdamW (Loshchilov & Hutter 2019), whose beta1 is optimizer.momentum."""
    return optax.adamw(
        rate, b1=optimizer.momentum, weight_decay=optimizer.weight_decay, mask=decays
    )


# The values of `optimizer.name`: (config.optimizer, schedule, tree of bool: which parameters decay)
# -> the optimizer at the backbone's rate. `make_optimizer` multiplies the updates of the heads.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    'sgd': sgd,
    'adamw': adamw,
}


class Group(NamedTuple):
    """Parameters that share a rate and a decay."""

    name: str
    multiplier: float  # of the learning rate
    decay: float


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """The backbone's rate at step n, from 0: rate * (1 - n / total_steps)**power (section 5.1).

    With `warmup_steps` = w the first w steps take (n + 1) / w of the rate, and the decay takes the
    remaining steps.
    """
    rate, warmup = config.optimizer.learning_rate, config.optimizer.warmup_steps
    schedule = optax.polynomial_schedule(
        rate, 0.0, config.optimizer.power, config.total_steps - warmup
    )
    if warmup:
        linear = optax.linear_schedule(rate / warmup, rate, max(warmup - 1, 1))
        schedule = optax.join_schedules([linear, schedule], [warmup])
    # optax divides an int32 count in float32, even if float64 is enabled.
    return lambda count: schedule(jnp.asarray(count, float))


def group_of(params: Any, optimizer: ConfigDict) -> Any:
    """A tree like `params` that holds each parameter's `Group`.

    Everything outside the backbone is a head and learns `head_multiplier` times as fast. semseg
    decays every parameter, BatchNorm's and biases too; the Caffe model does not
    (`decay_norm_and_bias=False`).
    """

    def find(path: Any, _: Any) -> Group:
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        in_backbone = name.startswith('backbone/')
        spared = name.endswith(('/scale', '/bias')) and not optimizer.decay_norm_and_bias
        return Group(
            ('backbone' if in_backbone else 'heads') + (' scale and bias' if spared else ''),
            1.0 if in_backbone else optimizer.head_multiplier,
            0.0 if spared else optimizer.weight_decay,
        )

    return jax.tree_util.tree_map_with_path(find, params)


def is_group(node: Any) -> bool:
    return isinstance(node, Group)


def table(params: Any, optimizer: ConfigDict) -> str:
    """The groups as lines for people: name, tensors, parameters, rate, decay."""
    found = jax.tree.leaves(group_of(params, optimizer), is_leaf=is_group)
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    lines = [f'{"group":<24}{"tensors":>8}{"parameters":>13}{"rate":>9}{"decay":>9}']
    for group in dict.fromkeys(found):
        members = [size for size, g in zip(sizes, found, strict=True) if g == group]
        rate = optimizer.learning_rate * group.multiplier
        lines.append(
            f'{group.name:<24}{len(members):>8}{sum(members):>13,}{rate:>9g}{group.decay:>9g}'
        )
    return '\n'.join(lines)


def make_optimizer(
    params: Any, config: ConfigDict
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """The optimizer of `config` for a tree of parameters or shapes, and the schedule it follows."""
    optimizer, schedule = config.optimizer, make_schedule(config)
    groups = group_of(params, optimizer)

    def mask(holds: Callable[[Group], bool]) -> Any:
        return jax.tree.map(holds, groups, is_leaf=is_group)

    rule = OPTIMIZERS[optimizer.name](optimizer, schedule, mask(lambda g: g.decay > 0))
    heads = mask(lambda g: g.multiplier != 1)
    return optax.chain(rule, optax.masked(optax.scale(optimizer.head_multiplier), heads)), schedule
