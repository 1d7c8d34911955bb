"""Attention, its masks, and where activations lie on a mesh.

Axes: B batch, T query, S key, N heads, K key-value heads (each serves N / K of the heads), H head dim.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped


def attend(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    mask: Bool[Array, '#B T S'] | None,
) -> Float[Array, 'B T N H']:
    """Softmax attention; a query sees the keys where mask is True (all of them without a mask).

    Masked keys get exactly zero weight, so what they hold cannot change a bit of the result.
    """
    with jax.named_scope('attention'):
        return jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[:, None], implementation='xla')


def segment_mask(segments: Int[Array, 'B T']) -> Bool[Array, 'B T T']:
    """Causal within each packed example: a token sees itself and the earlier tokens of its own segment."""
    length = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    return same & causal_mask(length)


def causal_mask(length: int) -> Bool[Array, '1 T T']:
    """A token sees itself and what came before it."""
    return jnp.tril(jnp.ones((1, length, length), bool))


def cache_mask(positions: Int[Array, 'B T'], slots: int) -> Bool[Array, 'B T S']:
    """A token at position p sees the cache slots 0..p: slot and position are the same number."""
    return jnp.arange(slots)[None, None, :] <= positions[:, :, None]


def over_batch(x: Shaped[Array, '...']) -> Shaped[Array, '...']:
    """Keeps the first axis of an activation split over the mesh's data and fsdp axes; nothing without a mesh.

    Without it, FSDP works all the same, with ten times the bytes sent: the partitioner splits activations by width.
    """
    if not jax.sharding.get_abstract_mesh().shape_tuple:
        return x
    return jax.lax.with_sharding_constraint(x, P(('data', 'fsdp'), *[None] * (x.ndim - 1)))
