"""What the models share: how matrices are initialised and quantized, and how a vocabulary is padded."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8


def padded(vocab_size: int) -> int:
    """The vocabulary's rows in the model: the next multiple of 128, which matrix units and meshes like."""
    return math.ceil(vocab_size / 128) * 128


class Quantized(NamedTuple):
    """A matrix in int8, and the scale of each output channel (the axes that products sum over have length 1)."""

    values: Int8[Array, '...']
    scale: Float[Array, '...']

    def matrix(self) -> Float[Array, '...']:
        """The matrix in float32, but for rounding."""
        return self.values.astype(jnp.float32) * self.scale

    def product(self, x, values, dimensions, **options):
        """As jax.lax.dot_general(), of which `values`, in the dtype of x, are the second factor.

        The scale comes last: all that is done to a weight before its product is a cast, which XLA fuses into it.
        """
        ((_, summed), _) = dimensions
        found = jax.lax.dot_general(x, values, dimensions, **options)
        return (found * self.scale.squeeze(summed)).astype(x.dtype)


def matrix_init(layers: int = 0):
    """Normal with variance 1/fan-in; matrices that write to the residual stream are scaled by 1/sqrt(2 layers)."""
    return nnx.initializers.variance_scaling(1 / (2 * layers) if layers else 1.0, 'fan_in', 'normal')
