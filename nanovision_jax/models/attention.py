"""Attention behind one door, the key-value cache, and where activations lie on a mesh.

Axes: B batch, T query, S key (in a cache: its length), N heads, K key-value heads (each serves N / K of the heads),
H head dim.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from nanovision_jax.models import kernels

MASKED = -1e30  # added to the scores of keys that are not seen: their weight is exactly 0
BLOCK = 256  # columns of a cache that are looked at together, where not all are


@dataclasses.dataclass(frozen=True)
class Structure:
    """Which keys a query sees: all of them, less what each field rules out.

    causal: none behind itself; segments: none of another segment of its row.
    """

    causal: bool = False
    segments: Int[Array, 'B T'] | None = None


def attend(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    structure: Structure,
    kernel: str = 'xla',
) -> Float[Array, 'B T N H']:
    """Softmax attention: the one door to attention kernels.

    kernel: as kernels.choose() gives it, for what that kernel is for; the rest is XLA's, as everything is by default.
    Keys that a query does not see get exactly zero weight, so what they hold cannot change a bit of the result.
    """
    with jax.named_scope('attention'):
        if kernel in kernels.PACKED and structure.causal and structure.segments is not None:
            return _on_each_device(kernels.PACKED[kernel], q, k, v, structure.segments)
        if kernel == 'cudnn' and structure.segments is None:
            return kernels.cudnn(q, k, v, structure.causal)
        return _plain(q, k, v, structure)


def _on_each_device(kernel, q, k, v, segments):
    """kernel(q, k, v, segments) of each device's rows and heads: the partitioner cannot look into a kernel."""
    if not (axes := _open_axes()):
        return kernel(q, k, v, segments)
    rows = batch_axes() or None
    rows, heads = P(rows), P(rows, None, 'tensor' if 'tensor' in axes else None)
    return jax.shard_map(
        kernel, in_specs=(heads, heads, heads, rows), out_specs=heads, axis_names=set(axes), check_vma=False
    )(q, k, v, segments)


def _plain(q, k, v, structure):
    """All scores at once, in float32, as XLA compiles them."""
    return weighted(weights(q, k, structure), v)


# Batched products of two axes: XLA's CPU backend is a third slower at the same in four axes.


def weights(q: Float[Array, 'B T N H'], k: Float[Array, 'B S K H'], structure: Structure) -> Float[Array, 'B N T S']:
    """How much of a query's attention each key has, in float32: all of them at once."""
    b, t, n, h = q.shape
    q, k = (x.swapaxes(1, 2) for x in (q * h**-0.5, k))
    q = q.reshape(b, k.shape[1], -1, h)
    scores = jnp.matmul(q, k.swapaxes(2, 3), preferred_element_type=jnp.float32).reshape(b, n, t, -1)
    if (bias := _bias(structure, t, k.shape[2])) is not None:
        scores = scores + bias[:, None]
    return jax.nn.softmax(scores, axis=-1)


def weighted(weights: Float[Array, 'B N T S'], v: Float[Array, 'B S K H']) -> Float[Array, 'B T N H']:
    """The values that weights() ask for."""
    b, n, t, s = weights.shape
    v = v.swapaxes(1, 2)
    found = weights.astype(v.dtype).reshape(b, v.shape[1], -1, s) @ v
    return found.reshape(b, n, t, -1).swapaxes(1, 2)


def _bias(structure: Structure, queries: int, keys: int) -> Float[Array, '#B T S'] | None:
    """What is added to scores: MASKED where a query does not see a key; None where everything is seen."""
    seen = []
    if structure.segments is not None:
        seen.append(structure.segments[:, :, None] == structure.segments[:, None, :])
    if structure.causal:
        seen.append(jnp.tril(jnp.ones((1, queries, keys), bool)))
    if not seen:
        return None
    return jnp.where(seen[0] if len(seen) == 1 else seen[0] & seen[1], 0.0, MASKED)


# The cache, and the mesh ---------------------------------------------------------------------------------------------


# Heads stand before columns, as the products of decoding want them: another order is copied into this one each time.
KeysValues = tuple[Float[Array, 'rows K S H'], Float[Array, 'rows K S H']]


def attend_cached(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    starts: Int[Array, ' B'],
    cache: KeysValues,
    row: Int[Array, ''] | None = None,
) -> tuple[Float[Array, 'B T N H'], KeysValues]:
    """(attention, the cache with this call's keys and values in it, in each row from its column `starts` on).

    A query sees the columns up to its own. The cache has room for T columns from every start. row: the row of a cache
    of more rows that a call with one row is about; of that, columns behind the last that is seen are not read.
    """
    with jax.named_scope('attention'):
        new = (jnp.moveaxis(x, 1, 2) for x in (k, v))
        if row is not None:
            cache = tuple(
                jax.lax.dynamic_update_slice(old, x, (row, 0, starts[0], 0)) for old, x in zip(cache, new, strict=True)
            )
            return _over_blocks(q, starts[0], cache, row), cache
        put = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
        cache = keys, values = tuple(put(old, x, starts) for old, x in zip(cache, new, strict=True))
        b, t, n, h = q.shape
        kv, s = keys.shape[1:3]
        # Batched products of two axes: XLA's CPU backend takes more than twice as long for the same in four.
        grouped = jnp.moveaxis(q.reshape(b, t, kv, -1, h) * h**-0.5, 1, 3).reshape(b * kv, -1, h)
        keys, values = keys.reshape(b * kv, s, h), values.reshape(b * kv, s, h)
        scores = jnp.matmul(grouped, keys.swapaxes(1, 2), preferred_element_type=jnp.float32).reshape(b, kv, -1, t, s)
        seen = jnp.arange(s) <= (starts[:, None] + jnp.arange(t))[:, :, None]
        shares = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
        found = shares.astype(values.dtype).reshape(b * kv, -1, s) @ values
        return jnp.moveaxis(found.reshape(b, kv, -1, t, h), 3, 1).reshape(b, t, n, h), cache


def _over_blocks(q, start, cache, row):
    """attend_cached() of one row, block by block of columns (arXiv:2112.05682), as far as there are any."""
    keys, values = cache
    (_, t, n, h), (_, kv, s, _) = q.shape, keys.shape
    block = math.gcd(s, BLOCK)
    grouped = jnp.moveaxis(q[0].reshape(t, kv, -1, h) * h**-0.5, 0, 2).reshape(kv, -1, h)
    own = jnp.tile(start + jnp.arange(t), n // kv)[:, None]

    def further(i, before):
        most, total, found = before
        k, v = (jax.lax.dynamic_slice(leaf, (row, 0, i * block, 0), (1, kv, block, h))[0] for leaf in (keys, values))
        scores = jnp.matmul(grouped, k.swapaxes(1, 2), preferred_element_type=jnp.float32)
        scores = jnp.where(i * block + jnp.arange(block) <= own, scores, -jnp.inf)
        higher = jnp.maximum(most, scores.max(-1))
        shares, fade = jnp.exp(scores - higher[:, :, None]), jnp.exp(most - higher)
        added = jnp.matmul(shares.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return higher, total * fade + shares.sum(-1), found * fade[:, :, None] + added

    none = jnp.zeros(grouped.shape[:2], jnp.float32)  # every query sees the first column, so no maximum stays infinite
    begun = none - jnp.inf, none, jnp.zeros(grouped.shape, jnp.float32)
    _, total, found = jax.lax.fori_loop(0, (start + t - 1) // block + 1, further, begun)
    found = (found / total[:, :, None]).astype(values.dtype).reshape(kv, -1, t, h)
    return jnp.moveaxis(found, 2, 0).reshape(1, t, n, h)


def batch_axes() -> tuple[str, ...]:
    """The axes of the mesh at hand over which the partitioner splits rows; none without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in _open_axes() if axis in ('data', 'fsdp') and sizes[axis] > 1)


def batch_shards() -> int:
    """Into how many parts the mesh at hand splits rows; 1 without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in batch_axes())


def _open_axes():
    """The axes of the mesh at hand that are left to the partitioner here."""
    mesh = jax.sharding.get_abstract_mesh()
    return [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]


def over_batch(x: Shaped[Array, '...']) -> Shaped[Array, '...']:
    """Keeps the first axis of an activation split over the mesh's data and fsdp axes; nothing without a mesh.

    Without it, FSDP works all the same, with ten times the bytes sent: the partitioner splits activations by width.
    """
    if not (axes := batch_axes()):
        return x
    return jax.lax.with_sharding_constraint(x, P(axes, *[None] * (x.ndim - 1)))


def whole(table: Shaped[Array, '...']) -> Shaped[Array, '...']:
    """A parameter gathered on every device of a mesh, to be looked up there: rows of a split one cannot be."""
    return table if not _open_axes() else jax.lax.with_sharding_constraint(table, P())
