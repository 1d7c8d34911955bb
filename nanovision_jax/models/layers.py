"""What the models share: how matrices start, how a vocabulary is padded, how a key-value cache grows.

Axes: B batch, T query, S key (cache slots), K key-value heads, H head dim.
"""

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


def padded(vocab_size: int) -> int:
    """The vocabulary's rows in the model: the next multiple of 128, which matrix units and meshes like."""
    return math.ceil(vocab_size / 128) * 128


def matrix_init(layers: int = 0):
    """Normal with variance 1/fan-in; matrices that write to the residual stream are scaled by 1/sqrt(2 layers)."""
    return nnx.initializers.variance_scaling(1 / (2 * layers) if layers else 1.0, 'fan_in', 'normal')


def extend_cache(
    cache: dict | None, k: Float[Array, 'B T K H'], v: Float[Array, 'B T K H'], positions: Int[Array, 'B T']
) -> tuple:
    """(keys, values, cache) to attend to: this call's own, or the cache [B, S, K, H] with them at slots `positions`."""
    if cache is None:
        return k, v, None
    rows = jnp.arange(k.shape[0])[:, None]  # a position beyond the cache is dropped
    cache = {name: cache[name].at[rows, positions].set(new, mode='drop') for name, new in (('k', k), ('v', v))}
    return cache['k'], cache['v'], cache
