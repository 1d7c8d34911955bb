"""What the models share: matrix products, how matrices are initialised and quantized, a padded vocabulary, and what the
backward pass recomputes."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8

from nanovision_jax.models import kernels


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


def rematerialized(body, kind: str):
    """The body of a scan over blocks, with what its backward pass recomputes by model.remat: 'none'; 'dots', all but
    matrix products (and splash attention); 'full', all but the block's input."""
    if kind == 'none':
        return body
    policies = jax.checkpoint_policies
    dots = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(kernels.RESIDUALS)
    )
    return jax.checkpoint(body, policy=dots if kind == 'dots' else None)


# Matrix products -----------------------------------------------------------------------------------------------------


def _dot_general(inputs, kernel, dimension_numbers, precision=None, out_sharding=None):
    """jax.lax.dot_general, of the last axes of inputs with the first of kernel, in the form that suits the hardware."""
    if platform() != 'cpu':
        return jax.lax.dot_general(inputs, kernel, dimension_numbers, precision, out_sharding=out_sharding)
    return _product(len(dimension_numbers[0][0]), inputs, kernel)


def contract(inputs, kernel):
    """inputs [..., D] with a kernel [D, ...], as Linear does."""
    return _dot_general(inputs, kernel, (((inputs.ndim - 1,), (0,)), ((), ())))


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': what the mesh at hand is of, which need not be there, or what jax runs on."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(axes, inputs, kernel):
    """The product over the last `axes` of inputs and the first `axes` of kernel, for XLA's CPU backend.

    Of the gradient in the kernel it copies the left factor, to turn it, and jax's own rule makes it copy the larger one
    for half of the layers: with this one a training step of `tiny` takes a quarter less time.
    """
    return jax.lax.dot_general(inputs, kernel, ((_last(inputs, axes), _first(axes)), ((), ())))


def _forward(axes, inputs, kernel):
    return _product(axes, inputs, kernel), (inputs, kernel)


def _backward(axes, residuals, slope):
    inputs, kernel = residuals
    rows, out = inputs.ndim - axes, kernel.ndim - axes
    in_inputs = jax.lax.dot_general(slope, kernel, ((_last(slope, out), _last(kernel, out)), ((), ())))
    rows = ((_first(rows), _first(rows)), ((), ()))
    if inputs.size <= slope.size:
        return in_inputs, jax.lax.dot_general(inputs, slope, rows)
    turned = jax.lax.optimization_barrier(jax.lax.dot_general(slope, inputs, rows))  # or XLA would turn it inside
    return in_inputs, turned.transpose(*range(out, kernel.ndim), *range(out))


def _first(n):
    return tuple(range(n))


def _last(x, n):
    return tuple(range(x.ndim - n, x.ndim))


_product.defvjp(_forward, _backward)

Linear = functools.partial(nnx.Linear, dot_general=_dot_general)
LinearGeneral = functools.partial(nnx.LinearGeneral, dot_general=_dot_general)
