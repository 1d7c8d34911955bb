"""The engine: prefill and cached decoding of batches of unequal prompts. It knows ids and images, and no tokenizer.

Prompts are padded on the right; a row's tokens stand in the cache's columns from the first on, and those behind its
last are never seen. The decoding loop runs inside one jit, a chunk of tokens a call, and the cache grows between
chunks: each token reads all of it.

Axes: B batch, T prompt (padded), V vocabulary, M image slots, F features, D width.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from nanovision_jax import models
from nanovision_jax.errors import UserError
from nanovision_jax.inference.sampling import COLD, Sampler, Sampling, as_whole, draw, make_sampler
from nanovision_jax.inference.weights import kept_quantized, readable, stored
from nanovision_jax.stages import stage_of

# Tokens decoded between looks at the result: at first, and at most; a chunk that took less than QUICK seconds doubles.
CHUNK, LARGEST, QUICK = 16, 64, 0.05
COLUMNS = 128  # of the smallest cache


@dataclasses.dataclass
class Prompt:
    """Token ids int32 [n] and the images uint8 [size, size, 3] of their image runs, in order."""

    ids: np.ndarray
    images: list


class State(NamedTuple):
    """Where a batch stands between two chunks."""

    logits: Float[Array, 'B V']  # of the next token
    cache: list  # of the layers' keys and values
    lengths: Int[Array, ' B']  # how many tokens of each row are in the cache: the column of the next
    done: Bool[Array, ' B']  # rows that have stopped
    sampler: Sampler
    met: Bool[Array, 'B V'] | None  # tokens of prompt and answer, where a repetition penalty is about them


@dataclasses.dataclass(frozen=True, eq=False)
class Definition:
    """A graphdef whose hash is its identity: a graphdef's own takes longer than decoding some tokens.

    mesh: over whose axis `tensor` the model is split; None: it lies on one device.
    """

    graphdef: nnx.GraphDef
    mesh: jax.sharding.Mesh | None = None


define = functools.lru_cache(maxsize=None)(Definition)  # equal ones are one Definition, so one compilation


def bucket(n: int, least: int = 32) -> int:
    """The next power of two: few shapes, so few compilations."""
    return max(least, 1 << (n - 1).bit_length())


@functools.partial(jax.jit, static_argnames='definition')
def see(definition, params, images: UInt8[Array, 'B M height width 3']) -> Float[Array, 'B F D']:
    """Images as the features that stand among a decoder's embeddings."""
    return models.merge(definition.graphdef, params).image_features(images)


@functools.partial(jax.jit, static_argnames=('definition', 'columns'))
def prefill(
    definition,
    params,
    tokens: Int[Array, 'B T'],
    lengths: Int[Array, ' B'],
    features: Float[Array, 'B F D'] | None,
    sampler: Sampler,
    met: Bool[Array, 'B V'] | None,
    columns: int,
) -> State:
    """Prompts of `lengths` tokens and features of their images (None: a text model), in a cache of `columns`."""
    model = models.merge(definition.graphdef, params)
    decoder = models.decoder_of(model)
    x = decoder.embed(tokens) if features is None else model.embed(tokens, features)
    cache = decoder.empty_cache(len(tokens), columns)
    hidden, cache = decoder.extend(x, jnp.zeros_like(lengths), cache)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    return State(decoder.logits(last)[:, 0], cache, lengths, jnp.zeros(len(tokens), bool), sampler, met)


@functools.partial(jax.jit, static_argnames=('definition', 'greedy'), donate_argnames='state')
def decode(definition, params, state: State, stops: Int[Array, ' stops'], most: Int[Array, ''], greedy: bool):
    """`most` further tokens a row, or fewer where every row is done. The cache has room for them.

    A row is done after the first of `stops`, which is among its tokens, and at the end of the context.
    Returns (tokens [B, LARGEST], how many columns of them are filled, the State to go on with).
    """

    def going_on(carry):
        count, _, state = carry
        return (count < most) & ~jnp.all(state.done)

    def step(carry):
        count, tokens, (logits, cache, lengths, done, sampler, met) = carry
        decoder = models.decoder_of(models.merge(definition.graphdef, kept_quantized(params, count)))
        token, sampler = draw(sampler, logits, greedy, met)
        token = jnp.where(done, stops[0], token)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], count, axis=1)
        done |= jnp.any(token[:, None] == stops, axis=1) | (lengths + 1 >= decoder.cfg.positions)
        hidden, cache = decoder.extend(decoder.embed(token[:, None]), lengths, cache)
        if met is not None:
            met |= jnp.arange(met.shape[1]) == token[:, None]
        return count + 1, tokens, State(decoder.logits(hidden)[:, 0], cache, lengths + 1, done, sampler, met)

    tokens = jnp.full((state.logits.shape[0], LARGEST), stops[0], jnp.int32)
    count, tokens, state = jax.lax.while_loop(going_on, step, (0, tokens, state))
    return tokens, count, state


@functools.partial(jax.jit, static_argnames='definition')
def follow(definition, params, state: State, options: Int[Array, 'B K']) -> tuple:
    """How likely each token of an option is behind a prompt: (log-probability, whether none is likelier), both [B, K].

    The State is left as it is: its cache, which has room for the options, serves the next option too.
    """
    decoder = models.decoder_of(models.merge(definition.graphdef, params))
    hidden = decoder.embed(options[:, :-1])
    if options.shape[1] > 1:
        hidden, _ = decoder.extend(hidden, state.lengths, state.cache)

    def judged(row):
        first, hidden, option = row
        scores = jnp.concatenate([first[None], decoder.logits(hidden[None])[0]])
        found = jnp.take_along_axis(jax.nn.log_softmax(scores), option[:, None], axis=1)[:, 0]
        return found, jnp.argmax(scores, axis=1) == option

    return jax.lax.map(judged, (state.logits, hidden, options))  # row by row: all scores of a batch are gigabytes


@functools.partial(jax.jit, static_argnames='columns')
def grow(cache: list, columns: int) -> list:
    """A cache with room for so many columns."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, columns - x.shape[2]), (0, 0))), cache)


class Engine:
    """Continues prompts with a model of any stage that has a decoder.

    params: nested dicts of arrays; stops: the ids that end an answer. Raises UserError for a model without a decoder.
    """

    def __init__(self, config, graphdef, params, stops):
        if not stage_of(config).decodes:
            raise UserError(f'a {config.stage} run compares pictures with captions: it has no decoder to chat with.')
        self.graphdef, self.params = stored(config, graphdef, params)
        self.config, self.definition, self.stops = config, define(self.graphdef, self._mesh()), tuple(stops)
        self.vocabulary = len(jax.tree.leaves(self.params.get('decoder', self.params)['embedding'])[0])

    def _mesh(self):
        sharding = jax.tree.leaves(self.params)[0].sharding
        return sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None

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
        params, stops = readable(self.config, self.params), np.array(self.stops, np.int32)
        state, column = self._start(params, prompts, sampling)
        finished, most = np.zeros(len(prompts), bool), CHUNK
        while left and not finished.all():
            if column == (room := state.cache[0][0].shape[2]):
                room = bucket(column + 1)
                state = state._replace(cache=grow(state.cache, room))
            began = time.monotonic()
            some = min(most, left, room - column)
            tokens, count, state = decode(self.definition, params, state, stops, some, greedy=greedy)
            tokens, done, count = jax.device_get((tokens, state.done, count))
            if time.monotonic() - began < QUICK:
                most = min(2 * most, LARGEST)
            count = int(count)
            left, column = left - count, column + count
            chunk = []
            for row, ids in enumerate(tokens[:, :count]):
                stop = np.flatnonzero(np.isin(ids, self.stops))
                chunk.append([] if finished[row] else ids[: stop[0]].tolist() if len(stop) else ids.tolist())
            finished |= done
            yield chunk

    def judge(self, prompts: Sequence[Prompt], options: Sequence[Sequence[np.ndarray]]) -> list[list[tuple]]:
        """How likely a prompt goes on with each of its options, which are token ids.

        Of each option (log-probabilities float32 [n], whether no token was likelier bool [n]), of its n tokens. A
        prompt is read once, whatever the number of its options. Raises UserError where prompt and option are longer
        than the context.
        """
        positions, params = self.config.model.positions, readable(self.config, self.params)
        longest = max(len(p.ids) + max(map(len, o)) - 1 for p, o in zip(prompts, options, strict=True))
        if longest > positions:
            raise UserError(f'prompt and option are {longest} tokens long, and the context holds {positions}.')
        state, _ = self._start(params, prompts, [Sampling()] * len(prompts))
        width = bucket(max(len(option) for each in options for option in each), least=1)
        room = bucket(longest + width, least=COLUMNS)
        if room > state.cache[0][0].shape[2]:
            state = state._replace(cache=grow(state.cache, room))
        found = [[] for _ in prompts]
        for number in range(max(map(len, options))):
            ids = np.zeros((len(prompts), width), np.int32)
            for row, each in zip(ids, options, strict=True):
                option = each[min(number, len(each) - 1)]
                row[: len(option)] = option
            likely, first = jax.device_get(follow(self.definition, params, state, ids))
            for row, each in enumerate(options):
                if number < len(each):
                    count = len(each[number])
                    found[row].append((likely[row, :count], first[row, :count]))
        return found

    def _start(self, params, prompts, sampling) -> tuple[State, int]:
        """(the State after the prompts, the length of the longest)."""
        positions = self.config.model.positions
        lengths = np.array([len(prompt.ids) for prompt in prompts], np.int32)
        longest = int(lengths.max())
        if longest >= positions:
            raise UserError(f'the prompt is {longest} tokens long, and the context holds {positions}.')
        width = min(bucket(longest), positions)
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt.ids)] = prompt.ids
        columns = bucket(longest + 1, least=COLUMNS)
        met = None
        if any(one.repetition_penalty != 1 for one in sampling):
            met = np.zeros((len(prompts), self.vocabulary), bool)
            for row, prompt in zip(met, prompts, strict=True):
                row[prompt.ids] = True
        features, sampler = self.features(prompts), make_sampler(sampling)
        return prefill(self.definition, params, tokens, lengths, features, sampler, met, columns), longest

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
        return see(self.definition, self.params, images)
