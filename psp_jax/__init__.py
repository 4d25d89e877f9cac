"""PSPNet in JAX: training, evaluation and prediction on TPUs, GPUs and CPUs."""

__version__ = '0.1.0'
