"""Losses. Each gives (sum of losses, how many they are), so that the parts of a batch add up.

Next-token losses take hidden states and the decoder that scores them: no caller holds logits [B, T, V].

Axes: B batch, T length, D width, V vocabulary, E embedding.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from nanovision_jax import models

Total = tuple[Float[Array, ''], Float[Array, '']]  # (sum of losses, their number)


LOGITS = 256 << 20  # bytes of float32 logits that a device may hold at once; beyond, they are made in chunks


def token_losses(decoder, hidden: Float[Array, 'B T D'], targets: Int[Array, 'B T']) -> Float[Array, 'B T']:
    """The cross-entropy of every target, in nats, of what decoder.logits() makes of hidden states."""

    def losses(part):
        return _plain(decoder, *part)

    chunks = _chunks(hidden.shape[0] * hidden.shape[1], decoder.output_kernel().shape[1], among=hidden.shape[1])
    if chunks == 1:
        return losses((hidden, targets))
    parts = (jnp.stack(jnp.split(x, chunks, axis=1)) for x in (hidden, targets))
    return jnp.concatenate(jax.lax.map(losses, tuple(parts)), axis=1)


def next_token(
    decoder, hidden: Float[Array, 'B T D'], targets: Int[Array, 'B T'], weights: Float[Array, 'B T']
) -> Total:
    """Cross-entropy over the targets whose weight is 1; those of weight 0 are not learned.

    Where the logits of a device would be large they are never there as a whole: they are made chunk by chunk, and once
    more in the backward pass.
    """
    axes = tuple(axis for axis in ('data', 'fsdp') if axis in jax.sharding.get_abstract_mesh().axis_names)
    rows = hidden.shape[0] // math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)
    chunks = _chunks(rows * hidden.shape[1], decoder.output_kernel().shape[1], among=rows * hidden.shape[1])
    if chunks == 1:
        total = jnp.sum(_plain(decoder, hidden, targets) * weights)
    else:
        total = _chunked(decoder, decoder.norm(hidden), targets, weights, chunks, axes)
    return total, jnp.sum(weights)


def _plain(decoder, hidden, targets):
    return optax.softmax_cross_entropy_with_integer_labels(decoder.logits(hidden), targets)


def _chunks(tokens, vocabulary, among):
    """The smallest number of equal parts of `among` tokens, of `tokens` in all, whose logits stay below LOGITS."""
    least = -(-4 * tokens * vocabulary // LOGITS)
    return next(n for n in range(1, among + 1) if among % n == 0 and n >= min(least, among))


def _chunked(decoder, x, targets, weights, chunks, axes):
    """The weighted sum of losses of normed hidden states x [B, T, D], in `chunks` on each device.

    Each device sums the gradient of the output layer over its own rows (shard_map), so that it is reduced over `axes`
    once, and not once a chunk as the partitioner would.
    """
    vocab_size, dtype = decoder.vocab_size, decoder.dtype

    def one(kernel, part):
        x, targets, weights = part
        scores = jnp.matmul(x, kernel.astype(dtype), preferred_element_type=jnp.float32)
        scores = jnp.where(jnp.arange(scores.shape[-1]) < vocab_size, scores, -jnp.inf)
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(scores, targets) * weights)

    def vary(x):
        return jax.lax.pcast(x, axes, to='varying') if axes else x

    def local(kernel, x, targets, weights):
        kernel = vary(kernel)  # here and not in the scan: its gradient is reduced where it is made to vary
        parts = tuple(a.reshape(chunks, -1, *a.shape[2:]) for a in (x, targets, weights))

        def add(total, part):
            return total + jax.checkpoint(one)(kernel, part), None

        total = jax.lax.scan(add, vary(jnp.float32(0)), parts)[0]
        return jax.lax.psum(total, axes) if axes else total

    with jax.named_scope('head'):
        if axes:
            rows = PartitionSpec(axes)
            local = jax.shard_map(
                local, in_specs=(PartitionSpec(), rows, rows, rows), out_specs=PartitionSpec(), axis_names=set(axes)
            )
        return local(decoder.output_kernel(), x, targets, weights)


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
    inputs = [batch[name] for name in ('tokens', 'positions', 'segments', 'images') if name in batch]
    return next_token(models.decoder_of(model), model.hidden(*inputs), batch['targets'], batch['weights'])


def _embed_pairs(model, batch):
    return model.embed(batch['images'], batch['tokens'], batch['ends'])


def _compare_pairs(model, embedded) -> Float[Array, '']:
    return CONTRASTIVE[model.contrastive](model.logits(*embedded))


def _pairs(model, batch) -> Total:
    count = jnp.float32(batch['images'].shape[0])
    return _compare_pairs(model, _embed_pairs(model, batch)) * count, count


OBJECTIVES = {  # by the name that stages.py gives
    'next_token': Objective(_next_token),
    'contrastive': Objective(_pairs, _embed_pairs, _compare_pairs),
}
