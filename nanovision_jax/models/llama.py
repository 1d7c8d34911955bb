"""The second decoder flavour: the blocks of Llama (arXiv:2302.13971) and of its kin SmolLM2, Qwen2 and Qwen3.

Axes: B batch, T query, S key (cache slots), N heads, K key-value heads, H head dim, D width.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nanovision_jax.models.attention import attend
from nanovision_jax.models.layers import extend_cache, matrix_init


def frequencies(cfg) -> Float[Array, ' half']:
    """Rotary frequencies, of which Llama 3.1 slows the long waves down. cfg: config.Model."""
    half = cfg.head_size // 2
    frequency = cfg.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if not cfg.rope_scaling:
        return frequency
    factor, low, high, original = cfg.rope_scaling
    waves = original * frequency / (2 * math.pi)  # how often each turns within the original context
    smooth = jnp.clip((waves - low) / (high - low), 0, 1)
    return frequency * (smooth + (1 - smooth) / factor)


def rotate_halves(x: Float[Array, 'B T N H'], positions: Int[Array, 'B T'], frequency: Float[Array, ' half']):
    """Rotary position embedding over pairs (i, i + H/2), as Hugging Face's decoders have it."""
    angle = positions[:, :, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1).astype(x.dtype)


class LlamaBlock(nnx.Module):
    """Pre-norm attention with grouped key-value heads, and a SwiGLU feed-forward layer. cfg: config.Model."""

    def __init__(self, cfg, dtype, rngs: nnx.Rngs):
        d, n, k, h = cfg.width, cfg.heads, cfg.kv_heads or cfg.heads, cfg.head_size
        norm = dict(epsilon=cfg.epsilon, dtype=dtype, rngs=rngs)
        bias = dict(use_bias=cfg.qkv_bias, kernel_init=matrix_init(), dtype=dtype, rngs=rngs)
        into = dict(use_bias=False, kernel_init=matrix_init(), dtype=dtype, rngs=rngs)
        out = dict(use_bias=False, kernel_init=matrix_init(cfg.layers), dtype=dtype, rngs=rngs)
        self.cfg = cfg
        self.attention_norm, self.ffn_norm = nnx.RMSNorm(d, **norm), nnx.RMSNorm(d, **norm)
        self.q, self.kv = nnx.LinearGeneral(d, (n, h), **bias), nnx.LinearGeneral(d, (2, k, h), **bias)
        self.q_norm = nnx.RMSNorm(h, **norm) if cfg.qk_norm else None
        self.k_norm = nnx.RMSNorm(h, **norm) if cfg.qk_norm else None
        self.out = nnx.LinearGeneral((n, h), d, axis=(-2, -1), **out)
        self.ffn_gate, self.ffn_in = nnx.Linear(d, cfg.ffn, **into), nnx.Linear(d, cfg.ffn, **into)
        self.ffn_out = nnx.Linear(cfg.ffn, d, **out)

    def __call__(self, x, positions, mask, cache=None):
        """x [B, T, D] → (x, cache). A cache {k, v: [B, S, K, H]} gets this call's keys at slots `positions`."""
        hidden = self.attention_norm(x)
        q, (k, v) = self.q(hidden), jnp.moveaxis(self.kv(hidden), 2, 0)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        frequency = frequencies(self.cfg)
        q, k = rotate_halves(q, positions, frequency), rotate_halves(k, positions, frequency)
        k, v, cache = extend_cache(cache, k, v, positions)
        x = x + self.out(attend(q, k, v, mask))
        with jax.named_scope('ffn'):
            hidden = self.ffn_norm(x)
            return x + self.ffn_out(jax.nn.silu(self.ffn_gate(hidden)) * self.ffn_in(hidden)), cache
