"""The text decoder: a GPT as in nanoGPTVision, or with Llama's blocks; packed rows and a key-value cache.

Axes: B batch, T query, S key (in a cache: its length), N heads, K key-value heads, H head dim, D width, V vocabulary
(padded), L layers.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nanovision_jax.models.attention import (
    KeysValues,
    Structure,
    attend,
    attend_cached,
    over_batch,
    weighted,
    weights,
    whole,
)
from nanovision_jax.models.layers import Linear, LinearGeneral, contract, matrix_init, padded, rematerialized

Rotary = tuple[Float[Array, 'B T 1 half'], Float[Array, 'B T 1 half']]  # cosines and sines of every position's angles


def rotary_frequencies(cfg) -> Float[Array, ' half']:
    """How fast each pair of a head's numbers turns; Llama 3.1 (cfg.rope_scaling) slows the long waves down."""
    half = cfg.head_size // 2
    frequency = cfg.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if not cfg.rope_scaling:
        return frequency
    factor, low, high, original = cfg.rope_scaling
    waves = original * frequency / (2 * math.pi)  # how often each turns within the original context
    smooth = jnp.clip((waves - low) / (high - low), 0, 1)
    return frequency * (smooth + (1 - smooth) / factor)


def rotary_angles(cfg, positions: Int[Array, 'B T']) -> Rotary:
    """Cosines and sines of the angles by which positions turn queries and keys; cfg: config.Model."""
    angle = positions[:, :, None, None] * rotary_frequencies(cfg)
    return jnp.cos(angle), jnp.sin(angle)


def rotate_halves(x: Float[Array, 'B T N H'], rotary: Rotary) -> Float[Array, 'B T N H']:
    """Rotary position embedding over pairs (i, i + H/2), as Hugging Face's decoders have it."""
    cos, sin = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1).astype(x.dtype)


# GPT -----------------------------------------------------------------------------------------------------------------


class GPTBlock(nnx.Module):
    """Pre-norm attention and a ReLU feed-forward layer. `cfg` is a config.Model."""

    def __init__(self, cfg, dtype, rngs: nnx.Rngs):
        d, n = cfg.width, cfg.heads
        self.kept_in_halves = False
        norm = dict(epsilon=cfg.epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs)
        into = dict(use_bias=False, kernel_init=matrix_init(), dtype=dtype, rngs=rngs)
        out = dict(kernel_init=matrix_init(cfg.layers), dtype=dtype, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(d, **norm)
        self.qkv = LinearGeneral(d, (3, n, d // n), **into)
        self.out = LinearGeneral((n, d // n), d, axis=(-2, -1), **out)
        self.ffn_norm = nnx.LayerNorm(d, **norm)
        self.ffn_in = Linear(d, cfg.ffn, **into)
        self.ffn_out = Linear(cfg.ffn, d, use_bias=False, **out)

    def in_halves(self) -> Float[Array, 'D 3 N H']:
        """The kernel of queries, keys and values; what a position turns as a pair stands half a head apart in it.

        The model rotates interleaved pairs (0, 1), (2, 3), … as RoFormer and nanoGPTVision do. Products of queries with
        keys stay what they are when both are put in another order, and of activations that takes twice the memory.
        """
        kernel = self.qkv.kernel[...]
        even, odd = kernel[:, :2, :, ::2], kernel[:, :2, :, 1::2]
        return jnp.concatenate([jnp.concatenate([even, odd], -1), kernel[:, 2:]], 1)

    def put_in_halves(self):
        """Keeps the kernel as in_halves() gives it, for decoding, which would put it there for each token."""
        self.qkv.kernel[...], self.kept_in_halves = self.in_halves(), True

    def __call__(self, x: Float[Array, 'B T D'], rotary: Rotary, attention: Callable):
        """x → (x, cache). attention: (queries, keys, values) → (attended, the layer's cache, if there is one)."""
        normed = self.attention_norm(x)
        qkv = self.qkv(normed) if self.kept_in_halves else contract(normed, self.in_halves().astype(normed.dtype))
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        q, k = rotate_halves(q, rotary), rotate_halves(k, rotary)
        attended, cache = attention(q, k, v)
        x = x + self.out(attended)
        with jax.named_scope('ffn'):
            return x + self.ffn_out(jax.nn.relu(self.ffn_in(self.ffn_norm(x)))), cache


# Llama and its kin (arXiv:2302.13971): SmolLM2, Qwen2 and Qwen3 ------------------------------------------------------


class LlamaBlock(nnx.Module):
    """Pre-norm attention with grouped key-value heads, and a SwiGLU feed-forward layer. `cfg` is a config.Model."""

    def __init__(self, cfg, dtype, rngs: nnx.Rngs):
        d, n, k, h = cfg.width, cfg.heads, cfg.kv_heads or cfg.heads, cfg.head_size
        norm = dict(epsilon=cfg.epsilon, dtype=dtype, rngs=rngs)
        bias = dict(use_bias=cfg.qkv_bias, kernel_init=matrix_init(), dtype=dtype, rngs=rngs)
        into = dict(use_bias=False, kernel_init=matrix_init(), dtype=dtype, rngs=rngs)
        out = dict(use_bias=False, kernel_init=matrix_init(cfg.layers), dtype=dtype, rngs=rngs)
        self.attention_norm, self.ffn_norm = nnx.RMSNorm(d, **norm), nnx.RMSNorm(d, **norm)
        self.q, self.kv = LinearGeneral(d, (n, h), **bias), LinearGeneral(d, (2, k, h), **bias)
        self.q_norm = nnx.RMSNorm(h, **norm) if cfg.qk_norm else None
        self.k_norm = nnx.RMSNorm(h, **norm) if cfg.qk_norm else None
        self.out = LinearGeneral((n, h), d, axis=(-2, -1), **out)
        self.ffn_gate, self.ffn_in = Linear(d, cfg.ffn, **into), Linear(d, cfg.ffn, **into)
        self.ffn_out = Linear(cfg.ffn, d, **out)

    def __call__(self, x: Float[Array, 'B T D'], rotary: Rotary, attention: Callable):
        """x → (x, cache). attention: (queries, keys, values) → (attended, the layer's cache, if there is one)."""
        normed = self.attention_norm(x)
        q, (k, v) = self.q(normed), jnp.moveaxis(self.kv(normed), 2, 0)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate_halves(q, rotary), rotate_halves(k, rotary)
        attended, cache = attention(q, k, v)
        x = x + self.out(attended)
        with jax.named_scope('ffn'):
            normed = self.ffn_norm(x)
            return x + self.ffn_out(jax.nn.silu(self.ffn_gate(normed)) * self.ffn_in(normed)), cache


# The decoder ---------------------------------------------------------------------------------------------------------


class Decoder(nnx.Module):
    """Embedding, blocks, norm and output layer. `cfg` is a config.Model, whose flavour says which blocks.

    `vocab_size` counts real tokens; the padded rows of the vocabulary stay zero and never score.
    """

    def __init__(self, cfg, vocab_size: int, dtype, rngs: nnx.Rngs):
        rows = padded(vocab_size)
        real = (jnp.arange(rows) < vocab_size).astype(jnp.float32)

        def embed_init(key, shape, dtype=jnp.float32):
            return jax.random.normal(key, shape, dtype) / math.sqrt(cfg.width) * real[:, None]

        def head_init(key, shape, dtype=jnp.float32):
            return matrix_init()(key, shape, dtype) * real

        self.cfg, self.vocab_size, self.dtype = cfg, vocab_size, dtype
        llama = cfg.flavour == 'llama'
        block = LlamaBlock if llama else GPTBlock
        norm = nnx.RMSNorm if llama else functools.partial(nnx.LayerNorm, use_fast_variance=False)
        self.embedding = nnx.Embed(rows, cfg.width, embedding_init=embed_init, dtype=dtype, rngs=rngs)
        self.blocks = nnx.vmap(lambda r: block(cfg, dtype, r))(rngs.split(cfg.layers))
        self.norm = norm(cfg.width, epsilon=cfg.epsilon, dtype=dtype, rngs=rngs)
        head = dict(use_bias=False, kernel_init=head_init, dtype=dtype, rngs=rngs)
        self.head = None if cfg.tied else Linear(cfg.width, rows, **head)

    def embed(self, tokens: Int[Array, 'B T']) -> Float[Array, 'B T D']:
        """Token ids to vectors."""
        # Not self.embedding(tokens): it casts the whole table, and sums a token's gradients in the dtype of compute.
        return over_batch(whole(jnp.asarray(self.embedding.embedding[...]))[tokens].astype(self.dtype))

    def trunk(
        self, x: Float[Array, 'B T D'], positions: Int[Array, 'B T'], structure: Structure
    ) -> Float[Array, 'B T D']:
        """All blocks over embedded tokens."""

        def attention(q, k, v):
            return attend(q, k, v, structure, self.cfg.attention), None

        return self._through(x, positions, attention)[0]

    def looks(
        self, x: Float[Array, 'B T D'], positions: Int[Array, 'B T'], structure: Structure
    ) -> Float[Array, 'L B T S']:
        """How much of a token's attention each other one has in each layer, the mean of its heads."""

        def attention(q, k, v):
            shares = weights(q, k, structure)
            return weighted(shares, v), shares.mean(axis=1)

        return self._through(x, positions, attention)[1]

    def _through(self, x, positions, attention):
        """(x behind all blocks, what attention gave beside in each layer)."""
        rotary = rotary_angles(self.cfg, positions)

        def body(x, block):
            return block(over_batch(x), rotary, attention)

        if isinstance(self.blocks, nnx.List):
            beside = []
            for block in self.blocks:
                x, one = body(x, block)
                beside.append(one)
            return x, jax.tree.map(lambda *layers: jnp.stack(layers), *beside)
        return jax.lax.scan(rematerialized(body, self.cfg.remat), x, self.blocks, unroll=self.cfg.unroll)

    def over_rows(
        self, x: Float[Array, 'B T D'], positions: Int[Array, 'B T'], segments: Int[Array, 'B T']
    ) -> Float[Array, 'B T D']:
        """Embedded packed rows to hidden states; attention never crosses a segment."""
        return self.trunk(x, positions, Structure(causal=True, segments=segments))

    def hidden(
        self, tokens: Int[Array, 'B T'], positions: Int[Array, 'B T'], segments: Int[Array, 'B T']
    ) -> Float[Array, 'B T D']:
        """Packed rows of tokens to hidden states, which logits() scores."""
        return self.over_rows(self.embed(tokens), positions, segments)

    def logits(self, hidden: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
        """Hidden states to float32 scores of the next token; padded vocabulary rows are -inf."""
        with jax.named_scope('head'):
            x = self.norm(hidden)
            scores = (self.embedding.attend(x) if self.head is None else self.head(x)).astype(jnp.float32)
            return jnp.where(jnp.arange(scores.shape[-1]) < self.vocab_size, scores, -jnp.inf)

    def output_kernel(self) -> Float[Array, 'D V']:
        """The matrix that turns normed hidden states into scores, in the parameters' dtype."""
        return self.embedding.embedding[...].T if self.head is None else self.head.kernel[...]

    def __call__(
        self, tokens: Int[Array, 'B T'], positions: Int[Array, 'B T'], segments: Int[Array, 'B T']
    ) -> Float[Array, 'B T V']:
        """Packed rows of tokens to logits."""
        return self.logits(self.hidden(tokens, positions, segments))

    def unstack(self):
        """Makes the stack of blocks a list of them, which decoding wants: of a stack, each layer's part is copied."""
        if not isinstance(self.blocks, nnx.List):
            graphdef, stack = nnx.split(self.blocks)
            self.blocks = nnx.List([nnx.merge(graphdef, layer) for layer in _layers(stack, self.cfg.layers)])
            for block in self.blocks:
                if isinstance(block, GPTBlock):
                    block.put_in_halves()

    def empty_cache(self, rows: int, columns: int) -> list[KeysValues]:
        """Keys and values of nothing, a pair a layer."""
        cfg = self.cfg
        shape = rows, cfg.kv_heads or cfg.heads, columns, cfg.head_size
        return [(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in range(cfg.layers)]

    def extend(
        self,
        x: Float[Array, 'B T D'],
        starts: Int[Array, ' B'],
        cache: list[KeysValues],
        row: Int[Array, ''] | None = None,
    ) -> tuple[Float[Array, 'B T D'], list[KeysValues]]:
        """Further embedded tokens, of row b from column starts[b] of the cache on, to hidden states and the cache with
        them. The decoder is unstacked. row: as attend_cached() takes it."""
        rotary, after = rotary_angles(self.cfg, starts[:, None] + jnp.arange(x.shape[1])), []
        for block, layer in zip(self.blocks, cache, strict=True):
            attention = functools.partial(attend_cached, starts=starts, cache=layer, row=row)
            x, layer = block(over_batch(x), rotary, attention)
            after.append(layer)
        return x, after


@functools.partial(jax.jit, static_argnames='count')
def _layers(stack, count):
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(count)]
