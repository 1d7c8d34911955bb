"""Where a model looks: how much of the attention of its answer's tokens patches have, and which words patches are like.

Axes: B batch, T length, M images, F features (M · patches), A tokens of the answer, L layers, D width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, UInt8

from nanovision_jax import models
from nanovision_jax.inference.engine import Definition, Prompt, bucket
from nanovision_jax.models.attention import Structure


def looks(
    definition: Definition, params, image_token: int, prompt: Prompt, answer: list[int]
) -> Float32[np.ndarray, 'L A F']:
    """How much of its attention the token from which each of an answer's tokens follows gives every patch.

    Each layer's, the mean of its heads, by the path that makes all weights at once. prompt: with an image at least.
    """
    ids = np.concatenate([prompt.ids, answer[:-1]]).astype(np.int32)
    width = bucket(len(ids))
    tokens, segments = np.zeros((1, width), np.int32), np.zeros((1, width), np.int32)
    tokens[0, : len(ids)], segments[0, : len(ids)] = ids, 1
    shares = jax.device_get(_looks(definition, params, tokens, segments, np.stack(prompt.images)[None]))
    asking = np.arange(len(prompt.ids) - 1, len(ids))
    return shares[:, asking][:, :, np.flatnonzero(prompt.ids == image_token)]


@functools.partial(jax.jit, static_argnames='definition')
def _looks(
    definition,
    params,
    tokens: Int[Array, '1 T'],
    segments: Int[Array, '1 T'],
    images: UInt8[Array, '1 M height width 3'],
) -> Float[Array, 'L T T']:
    model = models.merge(definition.graphdef, params)
    x = model.embed(tokens, model.image_features(images))
    structure = Structure(causal=True, segments=segments)
    return model.decoder.looks(x, jnp.arange(tokens.shape[1])[None], structure)[:, 0]


def norms(definition: Definition, params, image_token: int, prompt: Prompt) -> tuple[float, float]:
    """The mean norms of what stands in the place of a prompt's patches, and of its words, before the first block."""
    tokens = np.zeros((1, bucket(len(prompt.ids))), np.int32)
    tokens[0, : len(prompt.ids)] = prompt.ids
    found = jax.device_get(_norms(definition, params, tokens, np.stack(prompt.images)[None]))[0][: len(prompt.ids)]
    is_image = prompt.ids == image_token
    return float(found[is_image].mean()), float(found[~is_image].mean())


@functools.partial(jax.jit, static_argnames='definition')
def _norms(definition, params, tokens: Int[Array, '1 T'], images: UInt8[Array, '1 M height width 3']):
    model = models.merge(definition.graphdef, params)
    return jnp.linalg.norm(model.embed(tokens, model.image_features(images)).astype(jnp.float32), axis=-1)


def nearest_words(
    definition: Definition, params, image: UInt8[np.ndarray, 'size size 3'], without: tuple[int, ...], count: int = 5
) -> tuple[Int32[np.ndarray, 'F count'], Float32[np.ndarray, 'F count']]:
    """(ids, cosines) of the tokens whose embeddings are most like what the projector makes of each patch.

    without: ids that are no words, special ones.
    """
    return jax.device_get(_nearest(definition, params, image[None, None], np.array(without, np.int32), count))


@functools.partial(jax.jit, static_argnames=('definition', 'count'))
def _nearest(definition, params, images: UInt8[Array, '1 1 size size 3'], without: Int[Array, ' n'], count: int):
    model = models.merge(definition.graphdef, params)
    decoder = model.decoder
    table = decoder.embed(jnp.arange(decoder.vocab_size)[None])[0].astype(jnp.float32)
    patches = model.image_features(images)[0].astype(jnp.float32)
    table, patches = (x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-9) for x in (table, patches))
    cosines, ids = jax.lax.top_k((patches @ table.T).at[:, without].set(-jnp.inf), count)
    return ids, cosines
