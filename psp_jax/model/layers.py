"""The layers that every part of the network uses.

A module whose output cells depend on neighbouring input cells has an attribute `reach`, in rows of
its input. The evaluation of padded images (inference/masks.py) and the split of images over devices
(mesh.py) use it.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# He et al. 2015, fan-out: the backbone's and the pyramid's convolutions.
kaiming_normal = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default, which semseg's heads start from.
fan_in_uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def reach_of(module: nn.Module) -> int:
    """Rows and columns of its input that a module's output depends on, to each side.

    The module's attribute `reach`; for flax's own convolution what its kernel says; else 0.
    """
    if not isinstance(module, nn.Conv):
        return getattr(module, 'reach', 0)
    sizes, dilation = np.atleast_1d(module.kernel_size), np.atleast_1d(module.kernel_dilation or 1)
    return int(np.max(dilation * (sizes - 1) // 2))


def native_conv(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
    """The compiler's own convolution with the padding of `conv`."""
    # Explicit: at a stride of 2 and an even size 'SAME' pads (0, 1), but the reference (1, 1).
    pad = dilation * (kernel.shape[0] - 1) // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )


def kernel_gradient_by_shifts(
    x: jax.Array, dy: jax.Array, kernel: jax.Array, stride: int, dilation: int
) -> jax.Array:
    """The gradient of `native_conv` by its kernel, one matrix product for each kernel position.

    Equal to the convolution that automatic differentiation makes, and two to three times faster on
    CPUs, which have no fast kernel for that convolution.
    """
    size = kernel.shape[0]
    pad = dilation * (size - 1) // 2
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    batch, height, width, _ = dy.shape

    def position(i: int, j: int) -> jax.Array:
        top, left = i * dilation, j * dilation
        bottom, right = top + stride * (height - 1) + 1, left + stride * (width - 1) + 1
        window = lax.slice(
            x, (0, top, left, 0), (batch, bottom, right, x.shape[3]), (1, stride, stride, 1)
        )
        # Sums over three separate axes: flattened, they could not stay split over devices.
        # `dy` is first, because the compiler transposes the first argument, and `dy` is the same
        # for all positions.
        return lax.dot_general(dy, window, (((0, 1, 2), (0, 1, 2)), ((), ())))

    gradient = jnp.stack([position(i, j) for i in range(size) for j in range(size)])
    return gradient.swapaxes(1, 2).reshape(kernel.shape)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def spatial_conv(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
    """`native_conv` with, on CPUs, a faster gradient."""
    return native_conv(x, kernel, stride, dilation)


def _spatial_conv_forward(x, kernel, stride, dilation):
    return native_conv(x, kernel, stride, dilation), (x, kernel)


def _spatial_conv_backward(stride, dilation, residuals, dy):
    x, kernel = residuals
    (dx,) = jax.vjp(lambda x: native_conv(x, kernel, stride, dilation), x)[1](dy)

    def native(x, dy):
        return jax.vjp(lambda k: native_conv(x, k, stride, dilation), kernel)[1](dy)[0]

    def shifts(x, dy):
        return kernel_gradient_by_shifts(x, dy, kernel, stride, dilation)

    return dx, lax.platform_dependent(x, dy, cpu=shifts, default=native)


spatial_conv.defvjp(_spatial_conv_forward, _spatial_conv_backward)


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, dilation: int = 1) -> jax.Array:
    """Convolves [B, H, W, I] with a [k, k, I, O] kernel, k odd: [B, ceil(H/s), ceil(W/s), O].

    Padded with dilation * (k - 1) / 2 zeros on all four sides, at any size and stride.
    """
    if kernel.shape[0] == 1:  # a matrix product, which CPUs run 2 (forward) to 10 times faster
        return lax.dot_general(x[:, ::stride, ::stride], kernel[0, 0], (((3,), (0,)), ((), ())))
    return spatial_conv(x, kernel, stride, dilation)


class Conv(nn.Module):
    """`conv` with its parameter `kernel` and, if `bias` is set, a bias for each channel."""

    features: int
    size: int = 3
    stride: int = 1
    dilation: int = 1
    bias: bool = False
    kernel_init: nn.initializers.Initializer = kaiming_normal
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def reach(self) -> int:
        """Rows and columns of the input that an output cell depends on, to each side."""
        return self.dilation * (self.size - 1) // 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param('kernel', self.kernel_init, shape, self.param_dtype)
        y = conv(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.dilation)
        if self.bias:
            bound = (self.size**2 * x.shape[-1]) ** -0.5

            def init(key, shape, dtype):
                return jax.random.uniform(key, shape, dtype, -bound, bound)

            y += self.param('bias', init, (self.features,), self.param_dtype).astype(self.dtype)
        return y


class MaxPool(nn.Module):
    """3x3 max pooling with a stride of 2, padded by 1: [B, H, W, C] -> [B, ceil(H/2), ...]."""

    reach = 1  # as Conv's

    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) with the reference's running statistics.

    Under `jit` with the batch split over devices the mean and variance are those of the *global*
    batch: this is synchronised batch normalisation, always on. The batch is normalised
    by its biased variance; the running variance takes the unbiased one, as PyTorch's does (they
    differ by N/(N-1), 6.7 % in the pyramid's 1 x 1 branch at a batch of 16). Statistics are never
    of lower precision than float32.
    """

    momentum: float = 0.9  # of the running statistics; PyTorch's 0.1 is 1 - 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shape, exact = (x.shape[-1],), self.param_dtype
        scale = self.param('scale', nn.initializers.ones_init(), shape, exact)
        bias = self.param('bias', nn.initializers.zeros_init(), shape, exact)
        running_mean = self.variable('batch_stats', 'mean', jnp.zeros, shape, exact)
        running_var = self.variable('batch_stats', 'var', jnp.ones, shape, exact)
        x = x.astype(exact)
        if train:
            mean = jnp.mean(x, (0, 1, 2))
            # The mean of squares minus the square of the mean: one pass over x instead of two.
            var = jnp.maximum(jnp.mean(jnp.square(x), (0, 1, 2)) - jnp.square(mean), 0)
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                unbiased = var * (count / max(count - 1, 1))
                keep = self.momentum
                running_mean.value = keep * running_mean.value + (1 - keep) * mean
                running_var.value = keep * running_var.value + (1 - keep) * unbiased
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * lax.rsqrt(var + self.epsilon)
        return (x * factor + (bias - mean * factor)).astype(self.dtype)
