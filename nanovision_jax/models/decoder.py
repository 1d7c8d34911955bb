"""The text decoder: a GPT as in nanoGPTVision, or with Llama's blocks; segment masks and a key-value cache.

Axes: B batch, T query, S key (cache slots), N heads, H head dim, D width, V vocabulary (padded), L layers.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nanovision_jax.models.attention import attend, cache_mask, over_batch, segment_mask
from nanovision_jax.models.layers import extend_cache, matrix_init, padded
from nanovision_jax.models.llama import LlamaBlock

Cache = dict[str, Float[Array, 'L B S N H']]


def rotate(x: Float[Array, 'B T N H'], positions: Int[Array, 'B T'], theta: float) -> Float[Array, 'B T N H']:
    """Rotary position embedding over interleaved pairs (0, 1), (2, 3), … (RoFormer, arXiv:2104.09864)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    even, odd = jnp.moveaxis(x.astype(jnp.float32).reshape(*x.shape[:-1], half, 2), -1, 0)
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape).astype(x.dtype)


class Block(nnx.Module):
    """Pre-norm attention and a ReLU feed-forward layer. `layers` sets the scale of the output matrices."""

    def __init__(self, cfg, dtype, rngs: nnx.Rngs):
        d, n = cfg.width, cfg.heads
        self.theta = cfg.rope_theta
        norm = dict(epsilon=cfg.epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs)
        into = dict(use_bias=False, kernel_init=matrix_init(), dtype=dtype, rngs=rngs)
        out = dict(kernel_init=matrix_init(cfg.layers), dtype=dtype, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(d, **norm)
        self.qkv = nnx.LinearGeneral(d, (3, n, d // n), **into)
        self.out = nnx.LinearGeneral((n, d // n), d, axis=(-2, -1), **out)
        self.ffn_norm = nnx.LayerNorm(d, **norm)
        self.ffn_in = nnx.Linear(d, cfg.ffn, **into)
        self.ffn_out = nnx.Linear(cfg.ffn, d, use_bias=False, **out)

    def __call__(self, x, positions, mask, cache=None):
        """x [B, T, D] → (x, cache). A cache {k, v: [B, S, N, H]} gets this call's keys at slots `positions`."""
        q, k, v = jnp.moveaxis(self.qkv(self.attention_norm(x)), 2, 0)
        q, k = rotate(q, positions, self.theta), rotate(k, positions, self.theta)
        k, v, cache = extend_cache(cache, k, v, positions)
        x = x + self.out(attend(q, k, v, mask))
        with jax.named_scope('ffn'):
            return x + self.ffn_out(jax.nn.relu(self.ffn_in(self.ffn_norm(x)))), cache


class GPT(nnx.Module):
    """The decoder. `cfg` is a config.Model; `vocab_size` counts real tokens, padded rows stay zero and never score."""

    def __init__(self, cfg, vocab_size: int, dtype, rngs: nnx.Rngs):
        rows = padded(vocab_size)
        real = (jnp.arange(rows) < vocab_size).astype(jnp.float32)

        def embed_init(key, shape, dtype=jnp.float32):
            return jax.random.normal(key, shape, dtype) / math.sqrt(cfg.width) * real[:, None]

        def head_init(key, shape, dtype=jnp.float32):
            return matrix_init()(key, shape, dtype) * real

        self.cfg, self.vocab_size, self.dtype = cfg, vocab_size, dtype
        llama = cfg.flavour == 'llama'
        block = LlamaBlock if llama else Block
        norm = nnx.RMSNorm if llama else functools.partial(nnx.LayerNorm, use_fast_variance=False)
        self.embedding = nnx.Embed(rows, cfg.width, embedding_init=embed_init, dtype=dtype, rngs=rngs)
        self.blocks = nnx.vmap(lambda r: block(cfg, dtype, r))(rngs.split(cfg.layers))
        self.norm = norm(cfg.width, epsilon=cfg.epsilon, dtype=dtype, rngs=rngs)
        head = dict(use_bias=False, kernel_init=head_init, dtype=dtype, rngs=rngs)
        self.head = None if cfg.tied else nnx.Linear(cfg.width, rows, **head)

    def embed(self, tokens: Int[Array, 'B T']) -> Float[Array, 'B T D']:
        """Token ids to vectors."""
        return over_batch(self.embedding(tokens))

    def trunk(
        self,
        x: Float[Array, 'B T D'],
        positions: Int[Array, 'B T'],
        mask: Bool[Array, 'B T S'],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, 'B T D'], Cache | None]:
        """All blocks over embedded tokens; with a cache, this call's keys and values are written to it."""

        def body(x, layer):
            block, cache = layer
            return block(over_batch(x), positions, mask, cache)

        body = jax.checkpoint(body) if self.cfg.remat else body
        return jax.lax.scan(body, x, (self.blocks, cache), unroll=self.cfg.unroll)

    def logits(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
        """Hidden states to float32 scores of the next token; padded vocabulary rows are -inf."""
        with jax.named_scope('head'):
            x = self.norm(x)
            scores = (self.embedding.attend(x) if self.head is None else self.head(x)).astype(jnp.float32)
            return jnp.where(jnp.arange(scores.shape[-1]) < self.vocab_size, scores, -jnp.inf)

    def __call__(
        self, tokens: Int[Array, 'B T'], positions: Int[Array, 'B T'], segments: Int[Array, 'B T']
    ) -> Float[Array, 'B T V']:
        """Packed token rows to logits; attention never crosses a segment."""
        return self.logits(self.trunk(self.embed(tokens), positions, segment_mask(segments))[0])

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A key-value cache of zeros for `batch` rows of up to `slots` positions."""
        cfg = self.cfg
        shape = (cfg.layers, batch, slots, cfg.kv_heads or cfg.heads, cfg.head_size)
        return {name: jnp.zeros(shape, self.dtype) for name in ('k', 'v')}

    def extend(
        self, x: Float[Array, 'B T D'], positions: Int[Array, 'B T'], cache: Cache
    ) -> tuple[Float[Array, 'B T D'], Cache]:
        """Runs T further embedded tokens a row against the cache, and adds them to it."""
        return self.trunk(x, positions, cache_mask(positions, cache['k'].shape[2]), cache)
