"""How the next token is drawn from a model's scores.

Axes: B batch, V vocabulary.
"""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from nanovision_jax.errors import UserError

# Below COLD a temperature counts as 0, above HOT it is refused: the logits divided by it would leave float32.
COLD, HOT = 1e-6, 1e6
HARSH = 100  # the largest repetition penalty, and its inverse the smallest


class Sampling(NamedTuple):
    """The options of one answer. temperature 0 takes the likeliest token; top_k 0, top_p 1 and min_p 0 keep all.

    seed: any int; those that differ by a multiple of 2**32 are the same one. min_p: tokens less likely than this share
    of the likeliest's probability are left out. repetition_penalty: what the scores of tokens of prompt and answer are
    divided by, if they are positive, else multiplied with (arXiv:1909.05858); 1 changes none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def checked(self) -> 'Sampling':
        """The same as plain numbers. Raises UserError for options that make no sense."""
        made = Sampling(
            as_number('temperature', self.temperature), as_whole('top_k', self.top_k),
            as_number('top_p', self.top_p), as_whole('seed', self.seed),
            as_number('min_p', self.min_p), as_number('repetition_penalty', self.repetition_penalty),
        )  # fmt: skip
        if not 0 <= made.temperature <= HOT or made.top_k < 0 or not 0 < made.top_p <= 1:
            raise UserError(f'sampling wants temperature in [0, {HOT:.0f}], top_k of at least 0 and top_p in (0, 1].')
        if not 0 <= made.min_p <= 1 or not 1 / HARSH <= made.repetition_penalty <= HARSH:
            raise UserError(f'sampling wants min_p in [0, 1] and repetition_penalty in [{1 / HARSH}, {HARSH}].')
        return made


class Sampler(NamedTuple):
    """The Sampling of every row of a batch, as arrays."""

    temperature: Float[Array, ' B']
    top_k: Int[Array, ' B']
    top_p: Float[Array, ' B']
    keys: Key[Array, ' B']
    min_p: Float[Array, ' B']
    repetition_penalty: Float[Array, ' B']


_keys = jax.jit(jax.vmap(jax.random.key))


def make_sampler(rows: Sequence[Sampling]) -> Sampler:
    """The Sampler of checked options, one a row."""
    temperature, top_k, top_p, seeds, min_p, repetition_penalty = zip(*rows, strict=True)
    return Sampler(
        np.array(temperature, np.float32),
        np.array([min(k, 2**31 - 1) for k in top_k], np.int32),
        np.array(top_p, np.float32),
        _keys(np.array([seed % 2**32 for seed in seeds], np.uint32)),
        np.array(min_p, np.float32),
        np.array(repetition_penalty, np.float32),
    )


def draw(
    sampler: Sampler, logits: Float[Array, 'B V'], greedy: bool, met: Bool[Array, 'B V'] | None = None
) -> tuple[Int[Array, ' B'], Sampler]:
    """(a token id for every row, the sampler to go on with). greedy: all rows take the likeliest one.

    met: the tokens that repetition_penalty is about, if any row has one.
    """
    if met is not None:
        penalty = sampler.repetition_penalty[:, None]
        logits = jnp.where(met, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    likeliest = first_largest(logits)
    if greedy:
        return likeliest, sampler
    both = jax.vmap(jax.random.split)(sampler.keys)
    options = sampler.temperature, sampler.top_k, sampler.top_p, sampler.min_p
    drawn = jax.vmap(sample)(both[:, 1], logits, *options).astype(jnp.int32)
    return jnp.where(sampler.temperature < COLD, likeliest, drawn), sampler._replace(keys=both[:, 0])


def first_largest(logits: Float[Array, 'B V']) -> Int[Array, ' B']:
    """jnp.argmax() of each row in two plain reductions: XLA for CPU vectorises these, and not one over pairs."""
    last = logits.shape[-1] - 1
    largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest, jnp.arange(last + 1, dtype=jnp.int32), last), axis=-1)


def sample(key, logits: Float[Array, ' V'], temperature, top_k, top_p, min_p) -> Int[Array, '']:
    """One token id of one row; top_k 0, top_p 1 and min_p 0 keep everything."""
    order = jnp.argsort(-logits)
    scores = logits[order] / jnp.maximum(temperature, COLD)
    probability = jax.nn.softmax(scores)
    before = jnp.cumsum(probability) - probability  # mass of the likelier tokens: the likeliest one always stays
    kept = (
        (before < top_p) & ((top_k == 0) | (jnp.arange(len(scores)) < top_k)) & (probability >= min_p * probability[0])
    )
    return order[jax.random.categorical(key, jnp.where(kept, scores, -jnp.inf))]


def as_whole(name: str, value) -> int:
    """An option as an int. Raises UserError where it is no whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f'{name} takes a whole number, not {value!r}.') from None


def as_number(name: str, value) -> float:
    """An option as a float. Raises UserError where it is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f'{name} takes a number, not {value!r}.') from None
