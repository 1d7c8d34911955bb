"""Muon (Keller Jordan, 2024), scaled as in arXiv:2502.16982, with its Newton-Schulz turns spread over a mesh.

optax.contrib.muon turns every matrix on every device of a mesh that copies the model. Here each device turns its share
of a stack of matrices (layers; queries, keys and values), in bfloat16 where the hardware likes that.
"""

import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float
from optax import contrib

from nanovision_jax.models.layers import platform
from nanovision_jax.parallel.mesh import path_name

# What is taken as matrices: (end of the parameter's path, axes in, axes out). The other axes (layers; queries, keys and
# values) count matrices of their own. The layers next to pixels, words and logits stay with AdamW.
MATRICES = (
    (r'blocks/(qkv|kv)/kernel', (-4,), (-2, -1)),
    (r'blocks/q/kernel', (-3,), (-2, -1)),
    (r'blocks/out/kernel', (-3, -2), (-1,)),
    (r'blocks/ffn_(in|gate|out)/kernel', (-2,), (-1,)),
    (r'projector/(first|second)/kernel', (-2,), (-1,)),
)
TURNS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # as published: singular values end between 0.68 and 1.13
RMS = 0.2  # of an update, as of AdamW's, so that both take the same rates


def is_matrix(path) -> bool:
    """Whether a parameter is Muon's."""
    return _axes(path_name(path)) is not None


def _axes(name):
    for pattern, axes_in, axes_out in MATRICES:
        if re.search(pattern + '$', name):
            return contrib.MuonDimensionNumbers(axes_in, axes_out)
    return None


def muon(rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Steps by orthogonal matrices, of parameters for which is_matrix() holds."""

    def axes(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: _axes(path_name(path)), params)

    momentum = contrib.scale_by_muon(ns_steps=0, weight_dimension_numbers=axes)  # and of norm 1

    def orthogonal(updates, state, params=None):
        updates, state = momentum.update(updates, state, params)
        return jax.tree.map(_orthogonal, updates, axes(updates)), state

    def scaled(updates, _):
        return jax.tree.map(lambda x, dims: x * RMS * max(_sizes(x, dims)) ** 0.5, updates, axes(updates))

    steps = optax.chain(
        optax.GradientTransformation(momentum.init, orthogonal),
        optax.stateless(scaled),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    # Checkpoints know its state by the names that optax.contrib.muon gives it.
    return optax.partition({'muon': steps}, lambda params: jax.tree.map(lambda _: 'muon', params))


def _sizes(x, axes):
    """(in, out) of the matrices of a parameter."""
    return tuple(int(np.prod([x.shape[axis] for axis in part])) for part in axes)


def _orthogonal(x, axes):
    """A parameter whose matrices have their singular values brought near 1."""
    low, wide = sorted(_sizes(x, axes))
    axes_in, axes_out = ([axis % x.ndim for axis in part] for part in axes)
    matrix = axes_in + axes_out if _sizes(x, axes) == (low, wide) else axes_out + axes_in
    order = [*sorted(set(range(x.ndim)) - set(matrix)), *matrix]
    turned = x.transpose(order)
    stack = turned.reshape(-1, low, wide)
    if platform() == 'cpu':  # several devices are virtual there; XLA has hung in so many gathers at once
        stack = newton_schulz(stack)
    else:
        mesh = jax.sharding.get_abstract_mesh()
        axes = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
        stack = newton_schulz(stack.astype(jnp.bfloat16), axes if len(stack) > 1 else ())
    return stack.astype(x.dtype).reshape(turned.shape).transpose(np.argsort(order))


def newton_schulz(
    stack: Float[Array, 'matrices rows columns'], axes: Sequence[str] = ()
) -> Float[Array, 'matrices rows columns']:
    """Matrices of norm 1, no higher than wide, with their singular values brought near 1.

    axes: of the mesh at hand, over whose devices the matrices are split for it.
    """
    sizes, inner = jax.sharding.get_abstract_mesh().shape, tuple(axis for axis in axes if axis != 'data')
    a, b, c = COEFFICIENTS

    def spread(x):
        return jax.lax.with_sharding_constraint(x, PartitionSpec(inner)) if inner else x

    def turned(x):
        count = len(x)
        x = spread(_padded(x, math.prod(sizes[axis] for axis in inner)))
        for _ in range(TURNS):
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
        return spread(x)[:count]

    def share(stack):
        stack = _padded(stack, sizes['data'])
        each = len(stack) // sizes['data']
        mine = jax.lax.dynamic_slice_in_dim(stack, jax.lax.axis_index('data') * each, each)
        return jax.lax.all_gather(turned(mine), 'data', tiled=True)

    if 'data' not in axes:
        return turned(stack)
    # By hand: left to the partitioner it would split the momentum too, and gather that as well.
    whole = PartitionSpec()
    found = jax.shard_map(share, in_specs=whole, out_specs=whole, axis_names={'data'}, check_vma=False)(stack)
    return found[: len(stack)]


def _padded(stack, multiple):
    """A stack with zeros at its end, of a length that `multiple` divides."""
    return jnp.pad(stack, ((0, -len(stack) % multiple), (0, 0), (0, 0)))
