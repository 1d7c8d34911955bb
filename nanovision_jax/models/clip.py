"""CLIP's vision and text towers (arXiv:2103.00020), and the contrastive loss that trains them.

Axes: B batch, T text length, N heads, H head dim, D width, P patches, E embedding, L layers.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from nanovision_jax.models.attention import attend, causal_mask, over_batch
from nanovision_jax.models.gpt import matrix_init


def quick_gelu(x):
    """The sigmoid approximation of GELU that CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


class Block(nnx.Module):
    """Pre-norm attention and a quick-GELU MLP, with biases throughout."""

    def __init__(self, cfg, dtype, rngs: nnx.Rngs):
        d, n = cfg.width, cfg.heads
        norm = functools.partial(nnx.LayerNorm, d, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs)
        into = dict(kernel_init=matrix_init(), dtype=dtype, rngs=rngs)
        out = dict(kernel_init=matrix_init(cfg.layers), dtype=dtype, rngs=rngs)
        self.attention_norm, self.ffn_norm = norm(), norm()
        self.qkv = nnx.LinearGeneral(d, (3, n, d // n), **into)
        self.out = nnx.LinearGeneral((n, d // n), d, axis=(-2, -1), **out)
        self.ffn_in = nnx.Linear(d, cfg.ffn, **into)
        self.ffn_out = nnx.Linear(cfg.ffn, d, **out)

    def __call__(self, x, mask):
        """x [B, T, D] → [B, T, D]."""
        q, k, v = jnp.moveaxis(self.qkv(self.attention_norm(x)), 2, 0)
        x = x + self.out(attend(q, k, v, mask))
        return x + self.ffn_out(quick_gelu(self.ffn_in(self.ffn_norm(x))))


def run_blocks(blocks, x, mask, layers, remat):
    """The first `layers` of the stacked blocks over x [B, T, D]; remat recomputes them in the backward pass."""

    def body(x, block):
        return block(over_batch(x), mask), None

    first = jax.tree.map(lambda leaf: leaf[:layers], blocks)
    unroll = layers if layers <= 4 else 1
    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, first, unroll=unroll)[0]


class VisionTower(nnx.Module):
    """A ViT with a class token. `cfg` is a config.Vision; `remat` is for training it."""

    def __init__(self, cfg, dtype, rngs: nnx.Rngs, remat: bool = False):
        d = cfg.width
        norm = functools.partial(nnx.LayerNorm, d, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs)
        scale = nnx.initializers.normal(d**-0.5)
        self.cfg, self.remat = cfg, remat
        self.patch = nnx.Linear(
            cfg.patch_size**2 * 3, d, use_bias=False, kernel_init=matrix_init(), dtype=dtype, rngs=rngs
        )
        self.class_token = nnx.Param(scale(rngs.params(), (d,)))
        self.position = nnx.Param(scale(rngs.params(), (cfg.patches + 1, d)))
        self.norm_in, self.norm_out = norm(), norm()
        self.blocks = nnx.vmap(lambda r: Block(cfg, dtype, r))(rngs.split(cfg.layers))

    def normalize(self, images: UInt8[Array, 'B height width 3']) -> Float[Array, 'B height width 3']:
        """Bytes to the normalised pixels that the tower was trained on."""
        return (images.astype(jnp.float32) / 255 - jnp.array(self.cfg.mean)) / jnp.array(self.cfg.std)

    def hidden(self, pixels: Float[Array, 'B height width 3'], layers: int) -> Float[Array, 'B T D']:
        """Hidden states after the first `layers` blocks: T = 1 + P, the class token comes first."""
        with jax.named_scope('tower'):
            p, b, side = self.cfg.patch_size, pixels.shape[0], self.cfg.image_size // self.cfg.patch_size
            patches = pixels.reshape(b, side, p, side, p, 3).swapaxes(2, 3).reshape(b, side * side, p * p * 3)
            x = over_batch(self.patch(patches))
            first = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (b, 1, x.shape[-1]))
            x = jnp.concatenate([first, x], axis=1) + self.position[...].astype(x.dtype)
            return run_blocks(self.blocks, self.norm_in(x), None, layers, self.remat)

    def features(self, pixels: Float[Array, 'B height width 3'], layer: int = -2) -> Float[Array, 'B P D']:
        """Patch tokens as LLaVA takes them: the last layer but one, without the class token, before the final norm."""
        count = self.cfg.layers + 1 + layer if layer < 0 else layer
        return self.hidden(pixels, count)[:, 1:]

    def pooled(self, pixels: Float[Array, 'B height width 3']) -> Float[Array, 'B D']:
        """The class token after all layers and the final norm."""
        return self.norm_out(self.hidden(pixels, self.cfg.layers)[:, 0])


class TextTower(nnx.Module):
    """A causal transformer over captions. `cfg` is a config.Text; `remat` is for training it."""

    def __init__(self, cfg, rows: int, length: int, dtype, rngs: nnx.Rngs, remat: bool = False):
        d = cfg.width
        scale = nnx.initializers.normal(d**-0.5)
        self.embedding = nnx.Embed(rows, d, embedding_init=scale, dtype=dtype, rngs=rngs)
        self.position = nnx.Param(scale(rngs.params(), (length, d)))
        self.blocks = nnx.vmap(lambda r: Block(cfg, dtype, r))(rngs.split(cfg.layers))
        self.norm = nnx.LayerNorm(d, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs)
        self.layers, self.remat = cfg.layers, remat

    def pooled(self, tokens: Int[Array, 'B T'], ends: Int[Array, ' B']) -> Float[Array, 'B D']:
        """The state at each caption's end token, which has seen the whole caption."""
        with jax.named_scope('text_tower'):
            x = over_batch(self.embedding(tokens) + self.position[...][: tokens.shape[1]])
            x = self.norm(run_blocks(self.blocks, x, causal_mask(tokens.shape[1]), self.layers, self.remat))
            return x[jnp.arange(x.shape[0]), ends]


class CLIP(nnx.Module):
    """Both towers and the projections to the space in which pictures and captions are compared."""

    def __init__(self, cfg, rows: int, length: int, dtype, rngs: nnx.Rngs):
        project = functools.partial(nnx.Linear, use_bias=False, kernel_init=matrix_init(), dtype=dtype, rngs=rngs)
        self.vision = VisionTower(cfg.vision, dtype, rngs, cfg.remat)
        self.text = TextTower(cfg.text, rows, length, dtype, rngs, cfg.remat)
        self.vision_projection = project(cfg.vision.width, cfg.text.embed)
        self.text_projection = project(cfg.text.width, cfg.text.embed)
        self.logit_scale = nnx.Param(jnp.array(math.log(1 / 0.07), jnp.float32))

    def __call__(
        self, images: UInt8[Array, 'B height width 3'], tokens: Int[Array, 'B T'], ends: Int[Array, ' B']
    ) -> Float[Array, 'B B']:
        """float32 similarity of each picture (rows) with each caption (columns), scaled by the learned temperature."""
        picture = self.vision_projection(self.vision.pooled(self.vision.normalize(images))).astype(jnp.float32)
        caption = self.text_projection(self.text.pooled(tokens, ends)).astype(jnp.float32)
        picture, caption = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (picture, caption))
        # Clipped at 100 as in CLIP: above it, training becomes unstable.
        return jnp.exp(jnp.minimum(self.logit_scale[...], math.log(100))) * picture @ caption.T


def contrastive_loss(logits: Float[Array, 'B B']) -> Float[Array, '']:
    """CLIP's loss: each picture finds its caption among the batch's, each caption its picture; the mean of both."""
    diagonal = jnp.diagonal(logits)
    to_caption = jax.nn.logsumexp(logits, axis=1) - diagonal
    to_picture = jax.nn.logsumexp(logits, axis=0) - diagonal
    return (to_caption.mean() + to_picture.mean()) / 2
