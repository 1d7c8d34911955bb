"""Losses. Each gives (sum of losses, how many they are), so that the parts of a batch add up.

Next-token losses take hidden states and the decoder that scores them: no caller holds logits [B, T, V].

Axes: B batch, T length, D width, V vocabulary, E embedding.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from nanovision_jax import models
from nanovision_jax.models.attention import batch_axes

Total = tuple[Float[Array, ''], Float[Array, '']]  # (sum of losses, their number)


LOGITS = 256 << 20  # bytes of float32 logits that a device holds at once
LEAST, PARTS = 256, 16  # at least so many tokens at once, else a share of a batch: what is not learned is skipped


def chunk_of(tokens: int, vocabulary: int) -> int:
    """How many tokens' logits a device makes at once."""
    return min(tokens, max(LEAST, min(-(-tokens // PARTS), LOGITS // (4 * vocabulary))))


def next_token(
    decoder, hidden: Float[Array, 'B T D'], targets: Int[Array, 'B T'], weights: Float[Array, 'B T']
) -> Total:
    """Cross-entropy over the targets whose weight is 1; those of weight 0 are not learned, and cost nothing.

    On each device the learned tokens come first, and go chunk by chunk through the output layer and the loss, whose
    gradient is made in the same go. So its sum over rows is reduced over devices once, and not once a chunk.
    """
    x, axes = decoder.norm(hidden), batch_axes()

    def local(kernel, x, targets, weights):
        total = _fused(kernel, x.reshape(-1, x.shape[-1]), targets.ravel(), weights.ravel(), decoder.vocab_size)
        return jax.lax.psum(total, axes) if axes else total

    with jax.named_scope('head'):
        if axes:
            rows, whole = PartitionSpec(axes), PartitionSpec()
            specs = (whole, rows, rows, rows)
            local = jax.shard_map(local, in_specs=specs, out_specs=whole, axis_names=set(axes), check_vma=False)
        return local(decoder.output_kernel(), x, targets, weights), jnp.sum(weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused(
    kernel: Float[Array, 'D V'],
    x: Float[Array, 'tokens D'],
    targets: Int[Array, ' tokens'],
    weights: Float[Array, ' tokens'],
    vocab_size: int,
) -> Float[Array, '']:
    """The weighted sum of the losses of normed hidden states, whose logits x @ kernel are never there as a whole."""
    return _over_chunks(kernel, x, targets, weights, vocab_size, in_x=False, in_kernel=False)[0]


def _forward(kernel, x, targets, weights, vocab_size):
    values = (argument.value for argument in (kernel, x, targets, weights))
    total, *gradients = _over_chunks(*values, vocab_size, in_x=x.perturbed, in_kernel=kernel.perturbed)
    return total, gradients


def _backward(_, gradients, slope):
    in_kernel, in_x = gradients
    in_kernel = None if in_kernel is None else in_kernel * slope  # in float32, as it is summed over devices
    return in_kernel, None if in_x is None else (in_x * slope).astype(in_x.dtype), None, None


_fused.defvjp(_forward, _backward, symbolic_zeros=True)  # which tells what is frozen


def _over_chunks(kernel, x, targets, weights, vocab_size, in_x, in_kernel):
    """(sum of losses, its gradient in kernel and in x where they are asked for): products in x's dtype, sums in
    float32."""
    tokens = len(x)
    chunk = chunk_of(tokens, kernel.shape[1])
    cast = kernel.astype(x.dtype)
    order = jnp.argsort(weights == 0)  # a stable sort
    pad = -tokens % chunk
    xs, ts, ws = (jnp.pad(a[order], ((0, pad),) + ((0, 0),) * (a.ndim - 1)) for a in (x, targets, weights))
    column = jnp.arange(kernel.shape[1])

    def body(i, sums):
        total, kernel_slope, x_slopes = sums
        part, target, weight = (jax.lax.dynamic_slice_in_dim(a, i * chunk, chunk) for a in (xs, ts, ws))
        scores = jnp.matmul(part, cast, preferred_element_type=jnp.float32)
        scores = jnp.where(column < vocab_size, scores, -jnp.inf)
        log_sum = jax.nn.logsumexp(scores, axis=1)
        total += jnp.sum((log_sum - jnp.take_along_axis(scores, target[:, None], 1)[:, 0]) * weight)
        hit = column == target[:, None]
        slopes = ((jnp.exp(scores - log_sum[:, None]) - hit) * weight[:, None]).astype(x.dtype)
        if in_kernel:
            kernel_slope += jnp.matmul(part.T, slopes, preferred_element_type=jnp.float32)
        if in_x:
            x_slopes = jax.lax.dynamic_update_slice_in_dim(x_slopes, slopes @ cast.T, i * chunk, 0)
        return total, kernel_slope, x_slopes

    zeros = jnp.zeros_like(kernel, jnp.float32) if in_kernel else None, jnp.zeros_like(xs) if in_x else None
    learned = jnp.sum(weights > 0)
    total, *found = jax.lax.fori_loop(0, -(-learned // chunk), body, (jnp.zeros_like(weights[0]), *zeros))
    return total, found[0].astype(kernel.dtype) if in_kernel else None, found[1][jnp.argsort(order)] if in_x else None


def softmax_contrastive(logits: Float[Array, 'B B']) -> Float[Array, '']:
    """CLIP's loss (arXiv:2103.00020): each image finds its caption among the batch's, each caption its image; the mean
    of both."""
    diagonal = jnp.diagonal(logits)
    to_caption = jax.nn.logsumexp(logits, axis=1) - diagonal
    to_image = jax.nn.logsumexp(logits, axis=0) - diagonal
    return (to_caption.mean() + to_image.mean()) / 2


def sigmoid_contrastive(logits: Float[Array, 'B B']) -> Float[Array, '']:
    """SigLIP's loss (arXiv:2303.15343): each pair on its own, matching or not; the sum over captions, the mean over
    images."""
    matches = 2 * jnp.eye(logits.shape[0]) - 1
    return -jnp.sum(jax.nn.log_sigmoid(matches * logits)) / logits.shape[0]


CONTRASTIVE = {'softmax': softmax_contrastive, 'sigmoid': sigmoid_contrastive}  # by model.contrastive


# From a model and a batch --------------------------------------------------------------------------------------------


class Objective(NamedTuple):
    """What a stage minimises.

    total: (model, batch) → (sum of losses, their number). Where the examples of a batch are compared with each other
    there are also embed: (model, batch) → what is compared, and compare: (model, that) → the mean loss.
    """

    total: Callable
    embed: Callable | None = None
    compare: Callable | None = None


def _next_token(model, batch) -> Total:
    inputs = {name: value for name, value in batch.items() if name not in ('targets', 'weights')}
    return next_token(models.decoder_of(model), model.hidden(**inputs), batch['targets'], batch['weights'])


def _embed_pairs(model, batch):
    return model.embed(**batch)


def _compare_pairs(model, embedded) -> Float[Array, '']:
    return CONTRASTIVE[model.contrastive](model.logits(*embedded))


def _pairs(model, batch) -> Total:
    count = jnp.float32(batch['images'].shape[0])
    return _compare_pairs(model, _embed_pairs(model, batch)) * count, count


OBJECTIVES = {  # by the name that stages.py gives
    'next_token': Objective(_next_token),
    'contrastive': Objective(_pairs, _embed_pairs, _compare_pairs),
}
