"""Slots: a running batch that requests join and leave, on the device. scheduler.py says when.

The cache has a fixed number of rows, the slots, each of a context's length. A prompt is read in pieces that begin at
multiples of one length, and only the last of them is shorter: so a slot that already holds its beginning gives the same
bits as reading it again, and what a slot says does not depend on the others.

Axes: N slots, T tokens of a piece, C tokens of a call, A alternatives, V vocabulary, D width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from nanovision_jax import models
from nanovision_jax.inference.sampling import Sampler, draw
from nanovision_jax.inference.weights import kept_quantized

ALTERNATIVES = 20  # the likeliest tokens that are told with a token's probability: as many as OpenAI's clients ask for


class Slots(NamedTuple):
    """Where every slot stands between two calls."""

    logits: Float[Array, 'N V']  # of the next token
    cache: list  # of the layers' keys and values
    lengths: Int[Array, ' N']  # how many tokens are in the cache
    left: Int[Array, ' N']  # how many more it may say; 0: it says nothing
    met: Bool[Array, 'N V']  # tokens of prompt and answer, which the repetition penalty is about
    sampler: Sampler


class Said(NamedTuple):
    """What slots said in a call: C tokens at most, of which a slot's first `counts` are its own."""

    tokens: Int[Array, 'N C']
    counts: Int[Array, ' N']
    probabilities: Float[Array, 'N C']  # logarithms; as alternatives, nothing where they were not asked for
    alternatives: Int[Array, 'N C A']
    theirs: Float[Array, 'N C A']


@functools.partial(jax.jit, static_argnames=('definition', 'columns'))
def empty(definition, params, sampler: Sampler, columns: int) -> Slots:
    """Slots that hold nothing, one for each row of `sampler`."""
    decoder = models.decoder_of(models.merge(definition.graphdef, params))
    count, rows = len(sampler.temperature), decoder.output_kernel().shape[1]
    none = jnp.zeros(count, jnp.int32)
    cache, met = decoder.empty_cache(count, columns), jnp.zeros((count, rows), bool)
    return _placed(Slots(jnp.zeros((count, rows), jnp.float32), cache, none, none, met, sampler), definition.mesh)


def _placed(slots, mesh):
    """Slots where they always lie on a mesh, the cache's heads split: elsewhere, the next call would be compiled."""
    if mesh is None:
        return slots
    put = jax.lax.with_sharding_constraint
    cache = put(slots.cache, NamedSharding(mesh, P(None, 'tensor')))
    return put(slots._replace(cache=None), NamedSharding(mesh, P()))._replace(cache=cache)


@functools.partial(jax.jit, static_argnames='definition', donate_argnames='store')
def see(definition, params, store: Float[Array, 'features D'], images: UInt8[Array, 'M height width 3'], places):
    """Puts the features of images into a store, from row `places[i]` on; a place behind its end puts them nowhere."""
    model = models.merge(definition.graphdef, params)
    features = model.image_features(images[:, None])
    rows = places[:, None] + jnp.arange(features.shape[1])
    store = store.at[rows].set(features.astype(store.dtype), mode='drop')
    mesh = definition.mesh
    return store if mesh is None else jax.lax.with_sharding_constraint(store, NamedSharding(mesh, P()))


@functools.partial(jax.jit, static_argnames=('definition', 'scored'), donate_argnames='slots')
def read(
    definition,
    params,
    slots: Slots,
    store: Float[Array, 'features D'],
    row: Int[Array, ''],
    tokens: Int[Array, ' T'],
    places: Int[Array, ' T'],
    following: Int[Array, ' T'],
    start: Int[Array, ''],
    count: Int[Array, ''],
    scored: bool,
):
    """Reads a piece of a prompt into slot `row`, behind its first `start` tokens.

    count: how many of T tokens are there; places: the row of the store that stands for an image's token, -1 for words.
    Returns (the Slots, what _scored() tells of `following`, each token's successor, if `scored`).
    """
    decoder = models.decoder_of(models.merge(definition.graphdef, params))
    seen = store[jnp.maximum(places, 0)]
    x = jnp.where((places >= 0)[:, None], seen, decoder.embed(tokens[None])[0].astype(seen.dtype))
    hidden, cache = decoder.extend(x[None].astype(decoder.dtype), start[None], slots.cache, row)
    logits = decoder.logits(jax.lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1))[0, 0]
    logits, lengths = slots.logits.at[row].set(logits), slots.lengths.at[row].set(start + count)
    slots = _placed(slots._replace(logits=logits, cache=cache, lengths=lengths), definition.mesh)
    return slots, _scored(decoder.logits(hidden)[0], following) if scored else None


def _scored(logits, tokens):
    """(log-probability of each token, the likeliest ones, their log-probabilities)."""
    logs = jax.nn.log_softmax(logits, axis=-1)
    theirs, alternatives = jax.lax.top_k(logs, min(ALTERNATIVES, logits.shape[-1]))
    return jnp.take_along_axis(logs, tokens[..., None], axis=-1)[..., 0], alternatives, theirs


@functools.partial(jax.jit, static_argnames='mesh', donate_argnames='slots')
def admit(mesh, slots: Slots, row: Int[Array, ''], most: Int[Array, ''], met: Bool[Array, ' V'], one: Sampler) -> Slots:
    """Lets a slot speak, at most so many tokens. met: those of its prompt; one: its options, a Sampler of one row."""
    sampler = jax.tree.map(lambda of_all, new: of_all.at[row].set(new[0]), slots.sampler, one)
    left, met = slots.left.at[row].set(most), slots.met.at[row].set(met)
    return _placed(slots._replace(left=left, met=met, sampler=sampler), mesh)


@functools.partial(jax.jit, static_argnames='mesh', donate_argnames='slots')
def silence(mesh, slots: Slots, row: Int[Array, '']) -> Slots:
    """Lets a slot say no more."""
    return _placed(slots._replace(left=slots.left.at[row].set(0)), mesh)


@functools.partial(jax.jit, static_argnames='mesh', donate_argnames='slots')
def copy(mesh, slots: Slots, source: Int[Array, ''], target: Int[Array, '']) -> Slots:
    """Gives a slot what another one holds in the cache."""
    return _placed(
        slots._replace(cache=jax.tree.map(lambda leaf: leaf.at[target].set(leaf[source]), slots.cache)), mesh
    )


@functools.partial(
    jax.jit, static_argnames=('definition', 'columns', 'most', 'greedy', 'scored'), donate_argnames='slots'
)
def say(
    definition,
    params,
    slots: Slots,
    stops: Int[Array, ' stops'],
    allowed: UInt32[Array, 'N words'],
    turns: Int[Array, ''],
    columns: int,
    most: int,
    greedy: bool,
    scored: bool,
) -> tuple[Said, Slots]:
    """Up to `turns` further tokens (`most` at most) of every slot that speaks; it ends with one of `stops`.

    allowed: a bit for each token that may come next. columns: of the cache, which all that is said fits into; no others
    are read. greedy: every slot takes the likeliest.
    """
    count, vocabulary = slots.logits.shape
    a = min(ALTERNATIVES, vocabulary) if scored else 0
    said = Said(
        jnp.zeros((count, most), jnp.int32),
        jnp.zeros(count, jnp.int32),
        jnp.zeros((count, most if scored else 0), jnp.float32),
        jnp.zeros((count, most, a), jnp.int32),
        jnp.zeros((count, most, a), jnp.float32),
    )
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    may = bits.reshape(count, -1)[:, :vocabulary] > 0

    def going_on(carry):
        turn, _, slots = carry
        return (turn < turns) & jnp.any(slots.left > 0)

    def step(carry):
        turn, said, slots = carry
        decoder = models.decoder_of(models.merge(definition.graphdef, kept_quantized(params, turn)))
        speaks = slots.left > 0
        token, sampler = draw(slots.sampler, jnp.where(may, slots.logits, -jnp.inf), greedy, slots.met)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=turn, axis=1)
        said = said._replace(tokens=put(said.tokens, token[:, None]), counts=said.counts + speaks)
        if scored:
            probability, alternatives, theirs = _scored(slots.logits[:, None], token[:, None])
            said = said._replace(
                probabilities=put(said.probabilities, probability),
                alternatives=put(said.alternatives, alternatives),
                theirs=put(said.theirs, theirs),
            )
        hidden, cache = decoder.extend(decoder.embed(token[:, None]), slots.lengths, slots.cache)
        lengths = slots.lengths + speaks
        stopped = jnp.any(token[:, None] == stops, axis=1) | (lengths >= decoder.cfg.positions)
        left = jnp.where(stopped, 0, jnp.maximum(slots.left - 1, 0))
        logits = jnp.where(speaks[:, None], decoder.logits(hidden)[:, 0], slots.logits)
        met = slots.met | (speaks[:, None] & (jnp.arange(vocabulary) == token[:, None]))
        return turn + 1, said, Slots(logits, cache, lengths, left, met, sampler)

    whole, speak = slots.cache, (slots.left > 0)[:, None, None, None]
    before = jax.tree.map(lambda leaf: leaf[:, :, :columns], whole)
    _, said, slots = jax.lax.while_loop(going_on, step, (0, said, slots._replace(cache=before)))

    def back(leaf, old, new):  # a slot that said nothing may hold more columns, and got a key into the last of these
        return jax.lax.dynamic_update_slice(leaf, jnp.where(speak, new, old), (0, 0, 0, 0))

    return said, _placed(slots._replace(cache=jax.tree.map(back, whole, before, slots.cache)), definition.mesh)
