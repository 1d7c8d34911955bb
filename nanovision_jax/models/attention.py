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

    causal: none behind itself; segments: none of another segment of its row. With a cache, this call's keys are put
    into its columns from `column` on; starts: each row's first column, for calls with one query a row, which sees the
    columns from there to its own (without: the call is a whole prompt, which sees itself alone).
    """

    causal: bool = False
    segments: Int[Array, 'B T'] | None = None
    column: Int[Array, ''] | int | None = None
    starts: Int[Array, ' B'] | None = None


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
    return None if not parts else parts[0] if len(parts) == 1 else parts[0] & parts[1]


# Heads stand before columns, as the products of decoding want them: another order is copied into this one each time.
KeysValues = tuple[Float[Array, 'B K S H'], Float[Array, 'B K S H']]


def attend_cached(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    structure: Structure,
    cache: KeysValues | None,
) -> tuple[Float[Array, 'B T N H'], KeysValues | None]:
    """(attention, the cache with this call's keys and values in it). Without a cache it is attend()."""
    if cache is None:
        return attend(q, k, v, structure), None
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(old, jnp.moveaxis(new, 1, 2), structure.column, axis=2)
        for old, new in zip(cache, (k, v), strict=True)
    )
    if structure.starts is None:
        return attend(q, k, v, structure), (keys, values)
    with jax.named_scope('attention'):
        columns = jnp.arange(keys.shape[2])
        seen = (columns >= structure.starts[:, None]) & (columns <= structure.column)
        grouped = q.reshape(q.shape[0], keys.shape[1], -1, q.shape[3])  # heads that share keys and values
        scores = jnp.einsum('bkgh,bksh->bkgs', grouped, keys, preferred_element_type=jnp.float32) * q.shape[3] ** -0.5
        shares = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
        found = jnp.einsum('bkgs,bksh->bkgh', shares.astype(values.dtype), values)
    return found.reshape(q.shape), (keys, values)


def over_batch(x: Shaped[Array, '...']) -> Shaped[Array, '...']:
    """Keeps the first axis of an activation split over the mesh's data and fsdp axes; nothing without a mesh.

    Without it, FSDP works all the same, with ten times the bytes sent: the partitioner splits activations by width.
    """
    if not jax.sharding.get_abstract_mesh().shape_tuple:
        return x
    return jax.lax.with_sharding_constraint(x, P(('data', 'fsdp'), *[None] * (x.ndim - 1)))
