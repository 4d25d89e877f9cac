"""SGD as the reference trains: momentum, weight decay, poly rate, faster heads."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


class Group(NamedTuple):
    """Parameters that share a rate: `pattern` is found in their path, and no earlier group's is."""

    pattern: str
    multiplier: float  # of the learning rate
    decay: float


def groups(optimizer: ConfigDict) -> tuple[Group, ...]:
    """The parameter groups in order; the last one takes everything that is left.

    semseg decays every parameter, batch norm's and biases too; the Caffe model does not
    (`decay_norm_and_bias=False`). Pyramid and heads learn `head_multiplier` times as fast.
    """
    heads, norm_or_bias = '^(pyramid|head|aux_head)/', '(scale|bias)$'
    decay, multiplier = optimizer.weight_decay, optimizer.head_multiplier
    spared = (
        ()
        if optimizer.decay_norm_and_bias
        else (Group(f'{heads}.*{norm_or_bias}', multiplier, 0.0), Group(norm_or_bias, 1.0, 0.0))
    )
    return (*spared, Group(heads, multiplier, decay), Group('.*', 1.0, decay))


def group_of(params: Any, optimizer: ConfigDict) -> Any:
    """A tree like `params` that holds each parameter's `Group`."""

    def find(path: Any, _: Any) -> Group:
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        return next(g for g in groups(optimizer) if re.search(g.pattern, name))

    return jax.tree_util.tree_map_with_path(find, params)


def is_group(node: Any) -> bool:
    return isinstance(node, Group)


def table(params: Any, optimizer: ConfigDict) -> str:
    """The groups as lines for people: pattern, tensors, parameters, rate, decay."""
    found = jax.tree.leaves(group_of(params, optimizer), is_leaf=is_group)
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    lines = [f'{"group":<48}{"tensors":>8}{"parameters":>13}{"rate":>9}{"decay":>9}']
    for group in groups(optimizer):
        members = [size for size, g in zip(sizes, found, strict=True) if g == group]
        rate = optimizer.learning_rate * group.multiplier
        lines.append(
            f'{group.pattern:<48}{len(members):>8}{sum(members):>13,}{rate:>9g}{group.decay:>9g}'
        )
    return '\n'.join(lines)


def make_optimizer(params: Any, optimizer: ConfigDict) -> optax.GradientTransformation:
    """Gradients -> what one unit of learning rate takes off: v = momentum * v + g + decay * p,
    times the group's multiplier (PyTorch's form; the rate itself is `learning_rate`'s).
    """
    assigned = group_of(params, optimizer)

    def of_group(value: Any) -> Any:
        return jax.tree.map(value, assigned, is_leaf=is_group)

    def scale(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(jnp.multiply, updates, of_group(lambda g: g.multiplier)), state

    return optax.chain(
        optax.add_decayed_weights(optimizer.weight_decay, mask=of_group(lambda g: g.decay > 0)),
        optax.trace(optimizer.momentum),
        optax.GradientTransformation(lambda _: optax.EmptyState(), scale),
    )


def learning_rate(step: jax.Array, optimizer: ConfigDict, total_steps: int) -> jax.Array:
    """The rate of step n, counted from 0: base * (1 - n / total)**power (paper section 5.1).

    With `warmup_steps` = w, the first w steps take (n + 1) / w of it.
    """
    # Not 1 - step / total, which has lost its digits near the end of a long run; in float64 where
    # that is enabled.
    left = jnp.asarray(total_steps - step, float) / total_steps
    poly = optimizer.learning_rate * left**optimizer.power
    warmup = jnp.minimum(1.0, (step + 1) / max(optimizer.warmup_steps, 1))
    return poly * warmup
