"""The engine: prefill and cached decoding of batches of unequal prompts. It knows ids and images, and no tokenizer.

Rows are padded on the right, and a token's place in the cache is its position, so a row's padding is never seen and is
overwritten as the row grows. The decoding loop runs inside one jit, a chunk of tokens a call.

Axes: B batch, T prompt (padded), S cache length, V vocabulary, M image slots, F features, D width.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from nanovision_jax import models
from nanovision_jax.errors import UserError
from nanovision_jax.inference.sampling import COLD, Sampler, Sampling, as_whole, draw, make_sampler
from nanovision_jax.stages import stage_of

CHUNK = 16  # tokens decoded between looks at the result


@dataclasses.dataclass
class Prompt:
    """Token ids int32 [n] and the images uint8 [size, size, 3] of their image runs, in order."""

    ids: np.ndarray
    images: list


class State(NamedTuple):
    """Where a batch stands between two chunks."""

    logits: Float[Array, 'B V']  # of the next token
    cache: dict
    positions: Int[Array, ' B']  # where the next token goes
    done: Bool[Array, ' B']  # rows that have stopped
    sampler: Sampler


def bucket(n: int, least: int = 32) -> int:
    """The next power of two: few shapes, so few compilations."""
    return max(least, 1 << (n - 1).bit_length())


@functools.partial(jax.jit, static_argnames='graphdef')
def see(graphdef, params, images: UInt8[Array, 'B M height width 3']) -> Float[Array, 'B F D']:
    """Images as the features that stand among a decoder's embeddings."""
    return models.merge(graphdef, params).image_features(images)


@functools.partial(jax.jit, static_argnames=('graphdef', 'cache_length'))
def prefill(
    graphdef,
    params,
    tokens: Int[Array, 'B T'],
    lengths: Int[Array, ' B'],
    features: Float[Array, 'B F D'] | None,
    cache_length: int,
) -> tuple[Float[Array, 'B V'], dict]:
    """Padded prompts and their images' features (None: a text model) → (logits of the next token, cache)."""
    model = models.merge(graphdef, params)
    decoder = models.decoder_of(model)
    x = decoder.embed(tokens) if features is None else model.embed(tokens, features)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, cache = decoder.extend(x, positions, decoder.empty_cache(len(tokens), cache_length))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return decoder.logits(last)[:, 0], cache


@functools.partial(jax.jit, static_argnames=('graphdef', 'greedy'), donate_argnames='state')
def decode(graphdef, params, state: State, stops: Int[Array, ' stops'], greedy: bool):
    """Up to CHUNK further tokens a row, until every row is done.

    A row is done after the first of `stops`, which is among its tokens, and at the end of the cache.
    Returns (tokens [B, CHUNK], how many columns of them are filled, the State to go on with).
    """
    decoder = models.decoder_of(models.merge(graphdef, params))
    cache_length = state.cache['k'].shape[2]

    def going_on(carry):
        count, _, state = carry
        return (count < CHUNK) & ~jnp.all(state.done)

    def step(carry):
        count, tokens, state = carry
        token, sampler = draw(state.sampler, state.logits, greedy)
        token = jnp.where(state.done, stops[0], token)
        tokens = tokens.at[:, count].set(token)
        stopped = jnp.any(token[:, None] == stops, axis=1) | (state.positions + 1 >= cache_length)
        hidden, cache = decoder.extend(decoder.embed(token[:, None]), state.positions[:, None], state.cache)
        logits = decoder.logits(hidden)[:, 0]
        return count + 1, tokens, State(logits, cache, state.positions + 1, state.done | stopped, sampler)

    tokens = jnp.full((state.logits.shape[0], CHUNK), stops[0], jnp.int32)
    count, tokens, state = jax.lax.while_loop(going_on, step, (0, tokens, state))
    return tokens, count, state


class Engine:
    """Continues prompts with a model of any stage that has a decoder.

    params: nested dicts of arrays; stops: the ids that end an answer. Raises UserError for a model without a decoder.
    """

    def __init__(self, config, graphdef, params, stops):
        if not stage_of(config).decodes:
            raise UserError(f'a {config.stage} run compares pictures with captions: it has no decoder to chat with.')
        self.config, self.graphdef, self.params, self.stops = config, graphdef, params, tuple(stops)

    def generate(self, prompts: Sequence[Prompt], max_new_tokens=256, sampling=None):
        """Yields, chunk by chunk, a list with each prompt's new token ids; stop tokens are left out.

        sampling: a Sampling for each prompt, or one for all, whose i-th row then takes the seed `seed + i`: what a
        prompt is answered does not depend on what else is in the batch.
        Raises UserError for a prompt that leaves no room in the context, and for options that make no sense.
        """
        sampling = Sampling() if sampling is None else sampling
        if isinstance(sampling, Sampling):
            sampling = sampling.checked()
            sampling = [sampling._replace(seed=sampling.seed + row) for row in range(len(prompts))]
        sampling = [one.checked() for one in sampling]
        left = as_whole('max_new_tokens', max_new_tokens)
        if left < 1:
            raise UserError(f'max_new_tokens takes a number above 0, not {left}.')
        greedy = all(one.temperature < COLD for one in sampling)
        state, stops = self._start(prompts, left, sampling), jnp.array(self.stops, jnp.int32)
        finished = np.zeros(len(prompts), bool)
        while left and not finished.all():
            tokens, count, state = decode(self.graphdef, self.params, state, stops, greedy=greedy)
            tokens = np.asarray(tokens)[:, : min(int(count), left)]
            left -= tokens.shape[1]
            chunk = []
            for row, ids in enumerate(tokens):
                stop = np.flatnonzero(np.isin(ids, self.stops))
                chunk.append([] if finished[row] else ids[: stop[0]].tolist() if len(stop) else ids.tolist())
                finished[row] |= len(stop) > 0
            finished |= np.asarray(state.done)
            yield chunk

    def _start(self, prompts, max_new_tokens, sampling) -> State:
        positions = self.config.model.positions
        lengths = np.array([len(prompt.ids) for prompt in prompts], np.int32)
        longest = int(lengths.max())
        if longest >= positions:
            raise UserError(f'the prompt is {longest} tokens long, and the context holds {positions}.')
        cache_length = min(bucket(longest + max_new_tokens), positions)
        tokens = np.zeros((len(prompts), min(bucket(longest), cache_length)), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt.ids)] = prompt.ids
        features = self.features(prompts)
        logits, cache = prefill(self.graphdef, self.params, tokens, lengths, features, cache_length)
        sampler = make_sampler(sampling, logits.shape[1])
        return State(logits, cache, jnp.array(lengths), jnp.zeros(len(prompts), bool), sampler)

    def features(self, prompts: Sequence[Prompt]) -> Float[Array, 'B F D'] | None:
        """The features of every prompt's images; None for a model without a tower.

        Every row gets the same number of image slots, a power of two; those that are not filled are never looked at.
        """
        if not stage_of(self.config).sees:
            return None
        size = self.config.model.vision.image_size
        slots = bucket(max(1, max(len(prompt.images) for prompt in prompts)), least=1)
        images = np.zeros((len(prompts), slots, size, size, 3), np.uint8)
        for row, prompt in zip(images, prompts, strict=True):
            for slot, image in enumerate(prompt.images):
                row[slot] = image
        return see(self.graphdef, self.params, images)
