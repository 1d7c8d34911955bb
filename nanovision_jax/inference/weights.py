"""How a model's weights are stored for decoding, which is bound by reading them.

As trained (''), a matrix that is wider than the dtype of compute is kept in that, as each use would cast it. 'bfloat16'
keeps matrices in two bytes a weight; 'int8' keeps those of decoder and projector in one, with a float32 scale for each
output channel. Norms and biases stay as they are, and so does the tower, which runs once a picture. Compute has the
config's dtype all the same: on accelerators a matrix is cast as a product reads it; on CPU matrices are made whole for
each answer, so that there they save memory between answers, and no time.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanovision_jax import models
from nanovision_jax.errors import UserError
from nanovision_jax.models.layers import Quantized

WEIGHTS = ('', 'bfloat16', 'int8')


def check_weights(weights: str):
    """Raises UserError for a way to store weights that there is not."""
    if weights not in WEIGHTS:
        raise UserError(f'weights takes {", ".join(WEIGHTS[1:])} or nothing, not {weights!r}.')


def stored(config, graphdef, params, weights: str = ''):
    """(graphdef, params) of a model, its decoder's blocks one by one and its weights stored as `weights` says.

    Parameters that are stored in fewer bytes already stay as they are.
    """
    graphdef, params = models.unstack(graphdef, params)
    dtype = jnp.dtype(jnp.bfloat16) if weights == 'bfloat16' else models.compute_dtype(config.dtype)

    def store(path, leaf):
        names = [part.key for part in path]
        if names[-1] not in ('kernel', 'embedding') or isinstance(leaf, Quantized):
            return leaf
        if weights == 'int8' and 'vision' not in names:
            # A product sums over the first axis; `out` over heads and their width, the embedding, as head, over width.
            return quantize(leaf, (1,) if names[-1] == 'embedding' else (0, 1) if names[-2] == 'out' else (0,))
        return leaf.astype(dtype) if dtype.itemsize < leaf.dtype.itemsize else leaf

    return graphdef, jax.tree_util.tree_map_with_path(store, params, is_leaf=lambda leaf: isinstance(leaf, Quantized))


def readable(config, params):
    """The parameters as products on this device read them: those for CPU take nothing narrower than they compute in.

    There the matrices are made once an answer, and are gone after it.
    """
    if jax.default_backend() != 'cpu':
        return params
    dtype = models.compute_dtype(config.dtype)

    def widened(leaf):
        if isinstance(leaf, Quantized):
            return _matrix(leaf, dtype)
        return leaf.astype(dtype) if leaf.dtype.itemsize < dtype.itemsize else leaf

    return jax.tree.map(widened, params, is_leaf=lambda leaf: isinstance(leaf, Quantized))


@functools.partial(jax.jit, static_argnames='dtype')
def _matrix(quantized, dtype):
    return quantized.matrix().astype(dtype)


def kept_quantized(params, changing):
    """The parameters for one turn of a loop in which `changing`, an array, changes.

    Without this the compiler makes quantized matrices float32 ones before the loop, as they do not change in it, and
    each turn reads four bytes a weight.
    """
    return jax.tree.map(
        lambda leaf: jax.lax.optimization_barrier((leaf, changing))[0] if isinstance(leaf, Quantized) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, Quantized),
    )


@functools.partial(jax.jit, static_argnames='axes')
def quantize(matrix: Float[Array, '...'], axes: tuple[int, ...]) -> Quantized:
    """A matrix as int8, symmetric, with one scale for each output channel; `axes` are those that products sum over."""
    largest = jnp.max(jnp.abs(matrix), axis=axes, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest / 127)
    return Quantized(jnp.round(matrix / scale).astype(jnp.int8), scale)
