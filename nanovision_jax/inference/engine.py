"""Inference: prefill, cached decoding, sampling; batches of unequal prompts; streaming.

Rows are padded on the right, and a token's cache slot is its position, so a row's padding is never seen and is
overwritten as the row grows. The decoding loop runs inside one jit, a chunk of tokens a call.

Axes: B batch, T prompt (padded), S cache slots, V vocabulary, M image slots.
"""

import dataclasses
import functools
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np

from nanovision_jax import models
from nanovision_jax.data import conversation, images
from nanovision_jax.errors import UserError
from nanovision_jax.stages import stage_of

CHUNK = 16  # tokens decoded between looks at the result
# Below COLD a temperature counts as 0, above HOT it is refused: the logits divided by it would leave float32.
COLD, HOT = 1e-6, 1e6


@dataclasses.dataclass
class Prompt:
    """Token ids int32 [n] and the pictures uint8 [size, size, 3] of their image runs, in order."""

    ids: np.ndarray
    images: list


def text_prompt(tokenizer, text):
    """The beginning of a document, for a model to continue. Raises UserError for what is no text."""
    if not isinstance(text, str) or re.search('[\ud800-\udfff]', text):  # a byte that was no character, say
        raise UserError(f'{text!a:.60} cannot be continued: text that is not Unicode.')
    return Prompt(np.array([tokenizer.end_of_text, *tokenizer.encode(text)], np.int32), [])


def chat_prompt(config, tokenizer, messages, pictures=()):
    """A conversation that ends with a question. pictures: PIL images, as place_images() places them.

    Raises UserError for a conversation that makes no sense.
    """
    vision = config.model.vision
    try:
        conversation.check(messages)
        messages = place_images(messages, len(pictures))
        ids = conversation.encode(messages, tokenizer, vision.patches, len(pictures), question=True).ids
    except conversation.BadExample as error:
        raise UserError(f'this conversation cannot be answered: {error}.') from error
    prepared = [images.prepare(images.to_rgb(picture), vision) for picture in pictures]
    return Prompt(ids, prepared)


def place_images(messages, count):
    """Messages with an image part for each of `count` pictures: those without one go before the first question."""
    if messages and messages[0]['role'] == 'system':
        return [messages[0], *place_images(messages[1:], count)]
    parts = [p for m in messages if not isinstance(m['content'], str) for p in m['content'] if p['type'] == 'image']
    missing = count - len(parts)
    if missing <= 0 or not messages:
        return messages
    first, *rest = messages
    content = first['content']
    content = [{'type': 'text', 'text': content}] if isinstance(content, str) else list(content)
    return [first | {'content': [{'type': 'image'}] * missing + content}, *rest]


def _whole(name, value):
    """An option as an int. Raises UserError where it is no whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f'{name} takes a whole number, not {value!r}.') from None


def _number(name, value):
    """An option as a float. Raises UserError where it is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f'{name} takes a number, not {value!r}.') from None


def _bucket(n, least=32):
    """The next power of two: few shapes, so few compilations."""
    return max(least, 1 << (n - 1).bit_length())


@functools.partial(jax.jit, static_argnames=('graphdef', 'slots'))
def prefill(graphdef, params, tokens, lengths, pictures, slots):
    """Prompts [B, T] of `lengths` [B], pictures uint8 [B, M, height, width, 3] or None → (logits [B, V], cache)."""
    model = models.merge(graphdef, params)
    decoder = model if pictures is None else model.decoder
    x = decoder.embed(tokens) if pictures is None else model.embed(tokens, pictures)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x, cache = decoder.extend(x, positions, decoder.empty_cache(len(tokens), slots))
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return decoder.logits(last)[:, 0], cache


@functools.partial(jax.jit, static_argnames=('graphdef', 'greedy'), donate_argnames='cache')
def decode(graphdef, params, logits, cache, positions, done, keys, sampling, stops, greedy):
    """Up to CHUNK further tokens a row, until every row is done.

    logits [B, V] of the next token, `positions` [B] where it goes, `done` [B] rows that have stopped, `keys` [B].
    Returns (tokens [B, CHUNK], the first of `stops` after which a row is done included, how many columns are filled,
    and logits, cache, positions, done, keys to go on with).
    """
    decoder = models.merge(graphdef, params)
    decoder = getattr(decoder, 'decoder', decoder)
    slots = cache['k'].shape[2]

    def going_on(state):
        return (state[0] < CHUNK) & ~jnp.all(state[5])

    def step(state):
        i, out, logits, cache, positions, done, keys = state
        if greedy:
            token = jnp.argmax(logits, axis=-1)
        else:
            both = jax.vmap(jax.random.split)(keys)
            keys = both[:, 0]
            token = jax.vmap(sample, in_axes=(0, 0, None))(both[:, 1], logits, sampling)
        token = jnp.where(done, stops[0], token.astype(jnp.int32))
        out = out.at[:, i].set(token)
        done = done | jnp.any(token[:, None] == stops, axis=1) | (positions + 1 >= slots)
        x, cache = decoder.extend(decoder.embed(token[:, None]), positions[:, None], cache)
        return i + 1, out, decoder.logits(x)[:, 0], cache, positions + 1, done, keys

    out = jnp.full((logits.shape[0], CHUNK), stops[0], jnp.int32)
    count, out, *rest = jax.lax.while_loop(going_on, step, (0, out, logits, cache, positions, done, keys))
    return out, count, *rest


def sample(key, logits, sampling):
    """One token id from logits [V]. sampling: (temperature, top_k, top_p); top_k 0 and top_p 1 keep everything."""
    temperature, top_k, top_p = sampling
    order = jnp.argsort(-logits)
    scores = logits[order] / temperature
    probability = jax.nn.softmax(scores)
    before = jnp.cumsum(probability) - probability  # mass of the likelier tokens: the likeliest one always stays
    kept = (before < top_p) & ((top_k == 0) | (jnp.arange(len(scores)) < top_k))
    return order[jax.random.categorical(key, jnp.where(kept, scores, -jnp.inf))]


class Engine:
    """Answers prompts with a model of any text or vision stage. `params`: nested dicts of arrays."""

    def __init__(self, config, graphdef, params, tokenizer):
        if not stage_of(config).decodes:
            raise UserError('a clip run compares pictures with captions: it has no decoder to chat with.')
        self.config, self.graphdef, self.params, self.tokenizer = config, graphdef, params, tokenizer

    def pieces(self, prompts, max_new_tokens=256, temperature=0.0, top_k=0, top_p=1.0, seed=0):
        """Yields, chunk by chunk, a list with each prompt's new token ids; stop tokens are left out.

        Row i samples with seed + i, so a prompt's answer does not depend on what else is in the batch. Any int is a
        seed; those that differ by a multiple of 2**32 are the same one. top_k 0, or beyond the vocabulary, keeps all.
        Raises UserError for a prompt that leaves no room in the context, and for options that make no sense.
        """
        max_new_tokens, top_k, seed = map(_whole, ('max_new_tokens', 'top_k', 'seed'), (max_new_tokens, top_k, seed))
        temperature, top_p = map(_number, ('temperature', 'top_p'), (temperature, top_p))
        if not 0 <= temperature <= HOT or top_k < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
            raise UserError(
                f'sampling wants temperature in [0, {HOT:.0f}], top_k of at least 0, top_p in (0, 1], '
                'and max_new_tokens above 0.'
            )
        greedy = temperature < COLD
        tokenizer, model = self.tokenizer, self.config.model
        lengths = np.array([len(prompt.ids) for prompt in prompts], np.int32)
        if lengths.max() >= model.positions:
            raise UserError(f'the prompt is {lengths.max()} tokens long, and the context holds {model.positions}.')
        slots = min(_bucket(int(lengths.max()) + max_new_tokens), model.positions)
        tokens = np.zeros((len(prompts), min(_bucket(int(lengths.max())), slots)), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt.ids)] = prompt.ids
        logits, cache = prefill(self.graphdef, self.params, tokens, lengths, self._pictures(prompts), slots)
        stops = jnp.array(tokenizer.stops, jnp.int32)
        sampling = (jnp.float32(temperature), jnp.int32(min(top_k, logits.shape[1])), jnp.float32(top_p))
        state = (logits, cache, jnp.array(lengths), jnp.zeros(len(prompts), bool))
        seeds = [(seed + row) % 2**32 for row in range(len(prompts))]
        state += (jax.vmap(jax.random.key)(np.array(seeds, np.uint32)),)
        made = 0
        finished = np.zeros(len(prompts), bool)
        while made < max_new_tokens and not finished.all():
            out, count, *state = decode(self.graphdef, self.params, *state, sampling, stops, greedy=greedy)
            out = np.asarray(out)[:, : min(int(count), max_new_tokens - made)]
            made += out.shape[1]
            chunk = []
            for row, ids in enumerate(out):
                stop = np.flatnonzero(np.isin(ids, tokenizer.stops))
                chunk.append([] if finished[row] else ids[: stop[0]].tolist() if len(stop) else ids.tolist())
                finished[row] |= len(stop) > 0
            finished |= np.asarray(state[3])
            yield chunk

    def _pictures(self, prompts):
        """uint8 [B, M, size, size, 3], or None for a model without a tower. M is the same power of two for all rows."""
        if not stage_of(self.config).sees:
            return None
        size = self.config.model.vision.image_size
        slots = _bucket(max(1, *(len(prompt.images) for prompt in prompts), 1), least=1)
        pictures = np.zeros((len(prompts), slots, size, size, 3), np.uint8)
        for row, prompt in zip(pictures, prompts, strict=True):
            for slot, picture in enumerate(prompt.images):
                row[slot] = picture
        return pictures

    def answer(self, prompts, **options):
        """The answers to a batch of prompts, as text. Options as in pieces()."""
        ids = [[] for _ in prompts]
        for chunk in self.pieces(prompts, **options):
            for row, new in zip(ids, chunk, strict=True):
                row += new
        return [self.tokenizer.decode(row) for row in ids]

    def stream(self, prompt, **options):
        """The answer to one prompt, piece by piece as text, never cut inside a character."""
        ids, said = [], ''
        for chunk in self.pieces([prompt], **options):
            ids += chunk[0]
            text = self.tokenizer.decode(ids)
            if not text.endswith('\ufffd') and len(text) > len(said):
                yield text[len(said) :]
                said = text
        if (text := self.tokenizer.decode(ids)) != said:
            yield text[len(said) :]
