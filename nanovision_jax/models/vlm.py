"""The vision-language model: a frozen tower, a projector, and the decoder they speak to (LLaVA, arXiv:2304.08485).

Axes: B batch, T length, M image slots a row, N images, P patches, F = M · P features a row, E tower width, D width,
V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from nanovision_jax.models.attention import batch_shards, over_batch
from nanovision_jax.models.clip import VisionTower
from nanovision_jax.models.decoder import Decoder
from nanovision_jax.models.layers import Linear, matrix_init

LEAST, PARTS = 1024, 16  # patches, at least, that a tower takes at once; else a share of a device's: it skips the rest


class Projector(nnx.Module):
    """Tower features to decoder width: two layers with exact GELU (LLaVA 1.5), or one linear layer (LLaVA v1)."""

    def __init__(self, kind: str, from_width: int, width: int, dtype, rngs: nnx.Rngs):
        linear = dict(kernel_init=matrix_init(), dtype=dtype, rngs=rngs)
        self.first = Linear(from_width, width, **linear)
        self.second = Linear(width, width, **linear) if kind == 'mlp' else None

    def __call__(self, features: Float[Array, 'B P E']) -> Float[Array, 'B P D']:
        """Patch features to vectors that stand among the decoder's token embeddings."""
        with jax.named_scope('projector'):
            x = self.first(features)
            return x if self.second is None else self.second(jax.nn.gelu(x, approximate=False))


def splice(
    embedded: Float[Array, 'B T D'], is_image: Bool[Array, 'B T'], features: Float[Array, 'B F D']
) -> Float[Array, 'B T D']:
    """Puts the i-th feature of a row in the place of the row's i-th image token."""
    index = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, features.shape[1] - 1)
    spread = jnp.take_along_axis(features, index[:, :, None], axis=1)
    return jnp.where(is_image[:, :, None], spread.astype(embedded.dtype), embedded)


class VLM(nnx.Module):
    """Tower, projector and decoder. `cfg` is a config.Model; `image_token` is the id whose runs stand for images."""

    def __init__(self, cfg, vocab_size: int, image_token: int, dtype, rngs: nnx.Rngs):
        self.image_token, self.dtype = image_token, dtype
        self.vision = VisionTower(cfg.vision, dtype, rngs, cfg.attention)
        self.projector = Projector(cfg.projector, cfg.vision.width, cfg.width, dtype, rngs)
        self.decoder = Decoder(cfg, vocab_size, dtype, rngs)

    def image_features(self, images: UInt8[Array, 'B M height width 3']) -> Float[Array, 'B F D']:
        """Every slot's image through tower and projector, in token order."""
        b, m = images.shape[:2]
        features = self.tower_features(images.reshape(b * m, *images.shape[2:]))
        return self.project(features.reshape(b, m, *features.shape[1:]))

    def tower_features(self, images: UInt8[Array, 'N height width 3']) -> Float[Array, 'N P E']:
        """What the frozen tower makes of images."""
        return jax.lax.stop_gradient(self.vision.features(self.vision.normalize(over_batch(images))))

    def filled_features(
        self, images: UInt8[Array, 'B M height width 3'], filled: Int[Array, ' B']
    ) -> Float[Array, 'B M P E']:
        """tower_features() of each row's first `filled` slots; the others cost nothing, and may be zeros.

        On each device the filled slots come first, and go chunk by chunk through the tower.
        """
        shards, (b, m, *size) = batch_shards(), images.shape
        slots, patches = b * m // shards, self.vision.cfg.patches
        chunk = min(slots, max(-(-LEAST // patches), -(-slots // PARTS)))
        there = (jnp.arange(m) < filled[:, None]).reshape(shards, slots)
        order = jnp.argsort(~there, axis=1)  # a stable sort
        places = jnp.pad(order, ((0, 0), (0, -slots % chunk)))
        images = images.reshape(shards, slots, *size)

        def body(i, found):
            here = jax.lax.dynamic_slice_in_dim(places, i * chunk, chunk, axis=1)
            part = jnp.take_along_axis(images, here[:, :, None, None, None], axis=1)
            features = self.tower_features(part.reshape(-1, *size)).reshape(shards, chunk, patches, -1)
            return jax.lax.dynamic_update_slice_in_dim(found, features, i * chunk, axis=1)

        turns = -(-there.sum(axis=1).max() // chunk)
        found = jnp.zeros((*places.shape, patches, self.vision.cfg.width), self.dtype)
        found = jax.lax.fori_loop(0, turns, body, found)
        back = jnp.argsort(order, axis=1)
        return jnp.take_along_axis(found, back[:, :, None, None], axis=1).reshape(b, m, patches, -1)

    def project(self, features: Float[Array, 'B M P E']) -> Float[Array, 'B F D']:
        """Every slot's tower features through the projector, in token order."""
        b, m, p, e = features.shape
        return over_batch(self.projector(over_batch(features.reshape(b * m, p, e))).reshape(b, m * p, -1))

    def embed(self, tokens: Int[Array, 'B T'], features: Float[Array, 'B F D']) -> Float[Array, 'B T D']:
        """Token ids to vectors, with the images' features in place of the image tokens."""
        return splice(self.decoder.embed(tokens), tokens == self.image_token, features)

    def hidden(
        self,
        tokens: Int[Array, 'B T'],
        positions: Int[Array, 'B T'],
        segments: Int[Array, 'B T'],
        images: UInt8[Array, 'B M height width 3'] | None = None,
        features: Shaped[Array, 'B M P E'] | None = None,
        scales: Float[Array, 'B M P'] | None = None,
    ) -> Float[Array, 'B T D']:
        """Packed rows of text and images to hidden states. Rows without images go the same way, with empty slots.

        features: tower_features() of the images, which are not given then; scales: what int8 ones are multiplied by.
        """
        if images is not None:
            filled = jnp.sum(tokens == self.image_token, axis=1) // self.vision.cfg.patches
            features = self.filled_features(images, filled)
        seen = self.project(features if scales is None else features * scales[..., None])
        return self.decoder.over_rows(self.embed(tokens, seen), positions, segments)

    def logits(self, hidden: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
        """As Decoder.logits()."""
        return self.decoder.logits(hidden)

    def __call__(
        self,
        tokens: Int[Array, 'B T'],
        positions: Int[Array, 'B T'],
        segments: Int[Array, 'B T'],
        images: UInt8[Array, 'B M height width 3'],
    ) -> Float[Array, 'B T V']:
        """Packed rows of text and images to logits."""
        return self.logits(self.hidden(tokens, positions, segments, images))
