"""Losses. Each gives (sum of losses, how many they are), so that the parts of a batch add up.

Next-token losses take hidden states and the head that scores them: no caller holds logits [B, T, V].

Axes: B batch, T length, D width, V vocabulary, E embedding.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Total = tuple[Float[Array, ''], Float[Array, '']]  # (sum of losses, their number)


def token_losses(head: Callable, hidden: Float[Array, 'B T D'], targets: Int[Array, 'B T']) -> Float[Array, 'B T']:
    """The cross-entropy of every target, in nats. head: hidden states [B, T, D] → logits [B, T, V]."""
    return optax.softmax_cross_entropy_with_integer_labels(head(hidden), targets)


def next_token(
    head: Callable, hidden: Float[Array, 'B T D'], targets: Int[Array, 'B T'], weights: Float[Array, 'B T']
) -> Total:
    """Cross-entropy over the targets whose weight is 1; those of weight 0 are not learned."""
    return jnp.sum(token_losses(head, hidden, targets) * weights), jnp.sum(weights)


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
    return next_token(model.logits, model.hidden(*inputs), batch['targets'], batch['weights'])


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
