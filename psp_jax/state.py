"""What a training run carries from step to step."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from psp_jax.mesh import local_mesh, on_devices
from psp_jax.model.pspnet import PSPNet, build
from psp_jax.runtime import checkpoint


@flax.struct.dataclass
class TrainState:
    """`step` counts the finished steps (int32 scalar); the rest are trees of arrays."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


def init_variables(model: PSPNet, seed: int) -> dict[str, Any]:
    """Fresh `params` and `batch_stats`, a function of the seed alone."""
    key = jax.random.key(seed)
    # Parameters do not depend on the image size; 33 x 33 is the smallest that every part accepts.
    images = jnp.zeros((1, 33, 33, 3), model.dtype)
    return dict(model.init({'params': key, 'dropout': key}, images, True))


def create_state(model: PSPNet, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    variables = init_variables(model, seed)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables['params'],
        batch_stats=variables['batch_stats'],
        opt_state=tx.init(variables['params']),
    )


def jit_for_one_call(make: Callable[..., Any], **shardings: Any) -> jax.stages.Wrapped:
    """jax.jit for what runs once, such as `create_state`.

    On a CPU XLA takes seconds for the random numbers of each shape of kernel, to save milliseconds
    when they are drawn: there it is told to optimise little (4 times faster for PSPNet-18).
    """
    on_cpu = jax.default_backend() == 'cpu'
    options = {'xla_backend_optimization_level': 1} if on_cpu else None
    return jax.jit(make, compiler_options=options, **shardings)


def enable_float64(config: ConfigDict) -> None:
    """Lets JAX compute in float64 where the configuration asks for it (for exact comparisons)."""
    if config.dtype == 'float64':
        jax.config.update('jax_enable_x64', True)


def restore_variables(config: ConfigDict, path: Any, step: int) -> dict[str, Any]:
    """`params` and `batch_stats` of a checkpoint, on each of this process's devices.

    Raises UserError where they do not fit the network of `config`.
    """
    enable_float64(config)
    shapes = jax.eval_shape(lambda: init_variables(build(config), config.seed))
    target = {name: shapes[name] for name in ('params', 'batch_stats')}
    mesh = local_mesh(config.mesh.data, config.mesh.space)
    return checkpoint.restore(path, step, on_devices(target, mesh))
