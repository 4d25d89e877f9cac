"""PSPNet in JAX: training and evaluation on TPUs, GPUs and CPUs."""

__version__ = '0.1.0'
