"""What the models share: how matrices are initialised, and how a vocabulary is padded."""

import math

from flax import nnx


def padded(vocab_size: int) -> int:
    """The vocabulary's rows in the model: the next multiple of 128, which matrix units and meshes like."""
    return math.ceil(vocab_size / 128) * 128


def matrix_init(layers: int = 0):
    """Normal with variance 1/fan-in; matrices that write to the residual stream are scaled by 1/sqrt(2 layers)."""
    return nnx.initializers.variance_scaling(1 / (2 * layers) if layers else 1.0, 'fan_in', 'normal')
