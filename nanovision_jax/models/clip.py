"""Vision towers as CLIP (arXiv:2103.00020) and SigLIP (arXiv:2303.15343) have them, and CLIP's text tower.

Axes: B batch, R rows of packed captions, T text length, N heads, H head dim, D width, P patches, E embedding, L layers.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from nanovision_jax.models.attention import Structure, attend, batch_shards, over_batch
from nanovision_jax.models.layers import Linear, LinearGeneral, matrix_init, rematerialized


def quick_gelu(x):
    """The sigmoid approximation of GELU that CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
    'quick_gelu': quick_gelu,
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
    'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
}


class TowerBlock(nnx.Module):
    """Pre-norm attention and an MLP, with biases throughout."""

    def __init__(self, cfg, dtype, rngs, kernel: str, activation: str = 'quick_gelu', epsilon: float = 1e-5):
        d, n = cfg.width, cfg.heads
        norm = functools.partial(nnx.LayerNorm, d, epsilon=epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs)
        into = dict(kernel_init=matrix_init(), dtype=dtype, rngs=rngs)
        out = dict(kernel_init=matrix_init(cfg.layers), dtype=dtype, rngs=rngs)
        self.kernel, self.activation = kernel, ACTIVATIONS[activation]
        self.attention_norm, self.ffn_norm = norm(), norm()
        self.qkv = LinearGeneral(d, (3, n, d // n), **into)
        self.out = LinearGeneral((n, d // n), d, axis=(-2, -1), **out)
        self.ffn_in = Linear(d, cfg.ffn, **into)
        self.ffn_out = Linear(cfg.ffn, d, **out)

    def __call__(self, x: Float[Array, 'B T D'], structure: Structure) -> Float[Array, 'B T D']:
        """x → x."""
        q, k, v = jnp.moveaxis(self.qkv(self.attention_norm(x)), 2, 0)
        x = x + self.out(attend(q, k, v, structure, self.kernel))
        return x + self.ffn_out(self.activation(self.ffn_in(self.ffn_norm(x))))


def run_blocks(blocks, x: Float[Array, 'B T D'], structure: Structure, layers: int, remat: str):
    """The first `layers` of the stacked blocks over x; remat: see layers.rematerialized()."""

    def body(x, block):
        return block(over_batch(x), structure), None

    first = jax.tree.map(lambda leaf: leaf[:layers], blocks)
    unroll = layers if layers <= 4 else 1
    return jax.lax.scan(rematerialized(body, remat), x, first, unroll=unroll)[0]


class VisionTower(nnx.Module):
    """A ViT. `cfg` is a config.Vision, whose `kind` says what stands before the blocks; `remat` is for training it.

    kernel: what attend() goes through.
    """

    def __init__(self, cfg, dtype, rngs: nnx.Rngs, kernel: str = 'xla', remat: str = 'none'):
        d, with_class = cfg.width, cfg.class_tokens
        norm = functools.partial(nnx.LayerNorm, d, epsilon=cfg.epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs)
        scale = nnx.initializers.normal(d**-0.5)
        linear = dict(use_bias=not with_class, kernel_init=matrix_init(), dtype=dtype, rngs=rngs)
        self.cfg, self.remat = cfg, remat
        self.patch = Linear(cfg.patch_size**2 * 3, d, **linear)
        self.class_token = nnx.Param(scale(rngs.params(), (d,))) if with_class else None
        # CLIP starts as published. The other kind starts its positions as large as its patches, at 1: short runs match
        # captions with places better so.
        places = scale if with_class else nnx.initializers.normal(1.0)
        self.position = nnx.Param(places(rngs.params(), (cfg.patches + with_class, d)))
        self.norm_in = norm() if with_class else None
        self.norm_out = norm()
        block = functools.partial(TowerBlock, cfg, dtype, kernel=kernel, activation=cfg.activation, epsilon=cfg.epsilon)
        self.blocks = nnx.vmap(lambda r: block(rngs=r))(rngs.split(cfg.layers))

    def normalize(self, images: UInt8[Array, 'B height width 3']) -> Float[Array, 'B height width 3']:
        """Bytes to the normalised pixels that the tower was trained on."""
        return (images.astype(jnp.float32) / 255 - jnp.array(self.cfg.mean)) / jnp.array(self.cfg.std)

    def hidden(self, pixels: Float[Array, 'B height width 3'], layers: int) -> Float[Array, 'B T D']:
        """Hidden states after the first `layers` blocks: T patches, behind the class token if there is one."""
        with jax.named_scope('tower'):
            p, b, side = self.cfg.patch_size, pixels.shape[0], self.cfg.image_size // self.cfg.patch_size
            patches = pixels.reshape(b, side, p, side, p, 3).swapaxes(2, 3).reshape(b, side * side, p * p * 3)
            x = over_batch(self.patch(patches))
            if self.class_token is not None:
                first = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (b, 1, x.shape[-1]))
                x = jnp.concatenate([first, x], axis=1)
            x = x + self.position[...].astype(x.dtype)
            x = x if self.norm_in is None else self.norm_in(x)
            return run_blocks(self.blocks, x, Structure(), layers, self.remat)

    def features(self, pixels: Float[Array, 'B height width 3'], layer: int = -2) -> Float[Array, 'B P D']:
        """Patch tokens as LLaVA takes them: the last layer but one, without the class token, before the final norm."""
        count = self.cfg.layers + 1 + layer if layer < 0 else layer
        return self.hidden(pixels, count)[:, self.cfg.class_tokens :]

    def pooled(self, pixels: Float[Array, 'B height width 3']) -> Float[Array, 'B D']:
        """The class token after all layers and the final norm; the mean of the patches where there is none."""
        x = self.hidden(pixels, self.cfg.layers)
        return self.norm_out(x[:, 0] if self.class_token is not None else x.mean(axis=1))


class TextTower(nnx.Module):
    """A causal transformer over captions. `cfg` is a config.Text; `kernel` and `remat` as in VisionTower."""

    def __init__(self, cfg, rows: int, length: int, dtype, rngs: nnx.Rngs, kernel: str = 'xla', remat: str = 'none'):
        d = cfg.width
        scale = nnx.initializers.normal(d**-0.5)
        self.embedding = nnx.Embed(rows, d, embedding_init=scale, dtype=dtype, rngs=rngs)
        self.position = nnx.Param(scale(rngs.params(), (length, d)))
        self.blocks = nnx.vmap(lambda r: TowerBlock(cfg, dtype, r, kernel))(rngs.split(cfg.layers))
        self.norm = nnx.LayerNorm(d, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs)
        self.layers, self.remat = cfg.layers, remat

    def pooled(
        self,
        tokens: Int[Array, 'R T'],
        positions: Int[Array, 'R T'],
        segments: Int[Array, 'R T'],
        ends: Int[Array, ' B'],
    ) -> Float[Array, 'B D']:
        """The state at each caption's end token, which has seen the whole caption: `ends` counts tokens over all rows.

        On a mesh a caption is on the device that has its place in the batch.
        """
        with jax.named_scope('text_tower'):
            x = over_batch(self.embedding(tokens) + self.position[...][positions])
            x = self.norm(
                run_blocks(self.blocks, x, Structure(causal=True, segments=segments), self.layers, self.remat)
            )
            shards = batch_shards()
            x, ends = x.reshape(shards, -1, x.shape[-1]), ends.reshape(shards, -1)
            here = ends - x.shape[1] * jnp.arange(shards)[:, None]
            return over_batch(jnp.take_along_axis(x, here[:, :, None], axis=1)).reshape(-1, x.shape[-1])


class CLIP(nnx.Module):
    """Both towers and the projections to the space in which images and captions are compared."""

    def __init__(self, cfg, rows: int, length: int, dtype, rngs: nnx.Rngs):
        project = functools.partial(Linear, use_bias=False, kernel_init=matrix_init(), dtype=dtype, rngs=rngs)
        self.vision = VisionTower(cfg.vision, dtype, rngs, cfg.attention, cfg.remat)
        self.text = TextTower(cfg.text, rows, length, dtype, rngs, cfg.attention, cfg.remat)
        self.vision_projection = project(cfg.vision.width, cfg.text.embed)
        self.text_projection = project(cfg.text.width, cfg.text.embed)
        # Where the losses' papers start: CLIP at a temperature of 0.07, SigLIP at 0.1 and with all pairs unlikely.
        self.contrastive = cfg.contrastive
        sigmoid = cfg.contrastive == 'sigmoid'
        self.logit_scale = nnx.Param(jnp.array(math.log(10 if sigmoid else 1 / 0.07), jnp.float32))
        self.logit_bias = nnx.Param(jnp.array(-10.0, jnp.float32)) if sigmoid else None

    def __call__(
        self,
        images: UInt8[Array, 'B height width 3'],
        tokens: Int[Array, 'R T'],
        positions: Int[Array, 'R T'],
        segments: Int[Array, 'R T'],
        ends: Int[Array, ' B'],
    ) -> Float[Array, 'B B']:
        """float32 similarity of each image (rows) with each caption (columns), scaled by the learned temperature."""
        return self.logits(*self.embed(images, tokens, positions, segments, ends))

    def embed(
        self,
        images: UInt8[Array, 'B height width 3'],
        tokens: Int[Array, 'R T'],
        positions: Int[Array, 'R T'],
        segments: Int[Array, 'R T'],
        ends: Int[Array, ' B'],
    ) -> tuple[Float[Array, 'B E'], Float[Array, 'B E']]:
        """Images and captions as float32 unit vectors of the space in which they are compared."""
        image = self.vision_projection(self.vision.pooled(self.vision.normalize(images))).astype(jnp.float32)
        caption = self.text_projection(self.text.pooled(tokens, positions, segments, ends)).astype(jnp.float32)
        return tuple(x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, caption))

    def logits(self, image: Float[Array, 'B E'], caption: Float[Array, 'B E']) -> Float[Array, 'B B']:
        """What __call__ returns, of embed()'s vectors."""
        # Clipped at 100 as in CLIP: above it, training becomes unstable.
        logits = jnp.exp(jnp.minimum(self.logit_scale[...], math.log(100))) * image @ caption.T
        return logits if self.logit_bias is None else logits + self.logit_bias[...]
