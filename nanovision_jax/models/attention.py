"""Attention behind one door, the key-value cache, and where activations lie on a mesh.

Axes: B batch, T query, S key (in a cache: its length), N heads, K key-value heads (each serves N / K of the heads),
H head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped


@dataclasses.dataclass(frozen=True)
class Structure:
    """Which keys a query sees: all of them, less what each field rules out.

    causal: none behind itself; segments: none of another segment of its row; positions: where the queries stand in a
    cache, of which a query at position p sees the places 0..p.
    """

    causal: bool = False
    segments: Int[Array, 'B T'] | None = None
    positions: Int[Array, 'B T'] | None = None


def attend(
    q: Float[Array, 'B T N H'], k: Float[Array, 'B S K H'], v: Float[Array, 'B S K H'], structure: Structure
) -> Float[Array, 'B T N H']:
    """Softmax attention: the one door to attention kernels.

    Keys that a query does not see get exactly zero weight, so what they hold cannot change a bit of the result.
    """
    with jax.named_scope('attention'):
        mask = _mask(structure, q.shape[1], k.shape[1])
        return jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[:, None], implementation='xla')


def _mask(structure: Structure, queries: int, keys: int) -> Bool[Array, '#B T S'] | None:
    """The structure spelled out, for the path that knows nothing better; None where everything is seen."""
    parts = []
    if structure.segments is not None:
        parts.append(structure.segments[:, :, None] == structure.segments[:, None, :])
    if structure.causal:
        parts.append(jnp.tril(jnp.ones((1, queries, keys), bool)))
    if structure.positions is not None:
        parts.append(jnp.arange(keys)[None, None, :] <= structure.positions[:, :, None])
    return None if not parts else parts[0] if len(parts) == 1 else parts[0] & parts[1]


def extend_cache(
    cache: dict | None, k: Float[Array, 'B T K H'], v: Float[Array, 'B T K H'], positions: Int[Array, 'B T']
) -> tuple:
    """(keys, values, cache) to attend to: this call's own, or a cache {k, v: [B, S, K, H]} with them at `positions`."""
    if cache is None:
        return k, v, None
    rows = jnp.arange(k.shape[0])[:, None]  # a position beyond the cache is dropped
    cache = {name: cache[name].at[rows, positions].set(new, mode='drop') for name, new in (('k', k), ('v', v))}
    return cache['k'], cache['v'], cache


def over_batch(x: Shaped[Array, '...']) -> Shaped[Array, '...']:
    """Keeps the first axis of an activation split over the mesh's data and fsdp axes; nothing without a mesh.

    Without it, FSDP works all the same, with ten times the bytes sent: the partitioner splits activations by width.
    """
    if not jax.sharding.get_abstract_mesh().shape_tuple:
        return x
    return jax.lax.with_sharding_constraint(x, P(('data', 'fsdp'), *[None] * (x.ndim - 1)))
