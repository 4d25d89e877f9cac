"""The network and optimizer of a configuration, and the state that training steps update."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from psp_jax.model.pspnet import PSPNet, build
from psp_jax.optimizer import make_optimizer


@flax.struct.dataclass
class TrainState:
    """`step` counts the finished steps (int32 scalar); the rest are trees of arrays."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What the network is applied with."""
        return {'params': self.params, 'batch_stats': self.batch_stats}


@dataclass(frozen=True)
class Setup:
    """The network and the optimizer of a configuration; `setup` makes it."""

    config: ConfigDict
    model: PSPNet
    tx: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule  # step -> learning rate of the backbone
    shapes: TrainState  # of ShapeDtypeStructs

    @property
    def variables(self) -> dict[str, Any]:
        """The shapes of `params` and `batch_stats`."""
        return self.shapes.variables


def setup(config: ConfigDict) -> Setup:
    """Builds the network and the optimizer, and finds the shapes of the state; makes no array.

    Lets JAX compute in float64 if the configuration asks for it (for exact comparisons).
    """
    if config.dtype == 'float64':
        jax.config.update('jax_enable_x64', True)
    model = build(config)
    variables = jax.eval_shape(lambda: init_variables(model, config.seed))
    tx, schedule = make_optimizer(variables['params'], config)
    step = jax.eval_shape(lambda: jnp.zeros((), jnp.int32))
    opt_state = jax.eval_shape(tx.init, variables['params'])
    shapes = TrainState(step=step, opt_state=opt_state, **variables)
    return Setup(config, model, tx, schedule, shapes)


def new_state(setup: Setup) -> TrainState:
    """The state before the first step, a function of the seed alone."""
    variables = init_variables(setup.model, setup.config.seed)
    opt_state = setup.tx.init(variables['params'])
    return TrainState(step=jnp.zeros((), jnp.int32), opt_state=opt_state, **variables)


def init_variables(model: PSPNet, seed: int) -> dict[str, Any]:
    """Fresh `params` and `batch_stats`, a function of the seed alone."""
    key = jax.random.key(seed)
    # Parameters do not depend on the image size; 33 x 33 is the smallest size for all modules.
    made = model.init({'params': key, 'dropout': key}, jnp.zeros((1, 33, 33, 3)), True)
    return {name: made[name] for name in ('params', 'batch_stats')}


def jit_for_one_call(make: Callable[..., Any], **shardings: Any) -> jax.stages.Wrapped:
    """jax.jit for a function that runs once, such as `new_state`.

    On a CPU, XLA optimises the random numbers of each shape of kernel for seconds, which saves
    milliseconds. So it is told to optimise little there (4 times faster for PSPNet-18).
    """
    on_cpu = jax.default_backend() == 'cpu'
    options = {'xla_backend_optimization_level': 1} if on_cpu else None
    return jax.jit(make, compiler_options=options, **shardings)
