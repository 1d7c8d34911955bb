"""CLIP's towers against plain numpy, the captions' causality, and the contrastive loss."""

import math

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
import reference
from flax import nnx

from nanovision_jax import models
from nanovision_jax.data.pairs import Captions
from nanovision_jax.models.clip import quick_gelu
from nanovision_jax.training.objectives import sigmoid_contrastive, softmax_contrastive

T = 13
CFG = micro.odd_config('clip')
GRAPHDEF, PARAMS = micro.model(CFG, micro.ODD)
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (5, 21, 21, 3), np.uint8)
TOKENS = RNG.integers(0, micro.ODD.size, (5, T), np.int32)
ENDS = np.array([12, 3, 0, 7, 11], np.int32)


def one_a_row(ends):
    """positions, segments and ends of captions that have a row each."""
    shape = len(ends), T
    places = jnp.broadcast_to(jnp.arange(T), shape)
    return places, jnp.ones(shape, jnp.int32), ends + T * jnp.arange(len(ends))


@jax.jit
def run(params, pictures, tokens, ends):
    """Everything there is to look at, in one compilation."""
    clip = models.merge(GRAPHDEF, params)
    pixels = clip.vision.normalize(pictures)
    return {
        'features': clip.vision.features(pixels),
        'first': clip.vision.features(pixels, layer=1),
        'picture': clip.vision.pooled(pixels),
        'caption': clip.text.pooled(tokens, *one_a_row(ends)),
        'logits': clip(pictures, tokens, *one_a_row(ends)),
    }


@pytest.fixture(scope='module')
def found():
    return jax.tree.map(np.asarray, run(PARAMS, PICTURES, TOKENS, ENDS))


def test_the_vision_tower_is_the_numpy_one(found):
    p = micro.double(PARAMS['vision'])
    for i, picture in enumerate(PICTURES):
        states = [reference.tower(p, CFG.model.vision, picture, count) for count in (1, 2, 3)]
        np.testing.assert_allclose(found['first'][i], states[0][1:], atol=1e-4)
        np.testing.assert_allclose(found['features'][i], states[1][1:], atol=1e-4)  # of three layers, all but one
        np.testing.assert_allclose(found['picture'][i], reference.layer_norm(states[2][0], p['norm_out']), atol=1e-4)


def test_the_text_tower_is_the_numpy_one(found):
    p = micro.double(PARAMS['text'])
    expected = [reference.text_tower(p, tokens)[end] for tokens, end in zip(TOKENS, ENDS, strict=True)]
    np.testing.assert_allclose(found['caption'], expected, atol=1e-4)


def test_a_caption_is_read_up_to_its_end_and_no_further(found):
    rows = np.arange(5)
    before, after = TOKENS.copy(), TOKENS.copy()
    before[rows, ENDS // 2] += 1
    after[1:, 12] += 1  # row 0 ends there
    assert (run(PARAMS, PICTURES, after, ENDS)['caption'] == found['caption']).all()
    assert (run(PARAMS, PICTURES, before, ENDS)['caption'] != found['caption']).any(axis=1).all()


def test_packed_captions_are_read_as_those_of_a_row_each(found):
    pairs = [
        {'images': picture, 'ids': ids[: end + 1]} for picture, ids, end in zip(PICTURES, TOKENS, ENDS, strict=True)
    ]
    batch = Captions(T, 3)(pairs)
    assert batch['tokens'].shape == (3, T) and (batch['segments'].max(axis=1) > 1).any()
    packed = jax.jit(lambda params, batch: models.merge(GRAPHDEF, params)(**batch))(PARAMS, batch)
    np.testing.assert_allclose(packed, found['logits'], atol=1e-5)


def test_logits_are_scaled_cosines(found):
    p = micro.double(PARAMS)
    picture = found['picture'] @ p['vision_projection']['kernel']
    caption = found['caption'] @ p['text_projection']['kernel']
    picture, caption = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (picture, caption))
    np.testing.assert_allclose(found['logits'], np.exp(p['logit_scale']) * picture @ caption.T, atol=1e-4)
    warmer = [PARAMS | {'logit_scale': 0 * PARAMS['logit_scale'] + scale} for scale in (4, 9)]
    scaled = [run(params, PICTURES, TOKENS, ENDS)['logits'] for params in warmer]
    np.testing.assert_allclose(scaled[0], math.exp(4) * picture @ caption.T, atol=1e-3)
    np.testing.assert_allclose(scaled[1], 100 * picture @ caption.T, atol=1e-3)  # exp(9) is clipped


def test_the_contrastive_loss_is_the_numpy_one():
    pictures, captions = RNG.normal(size=(2, 7, 3))
    logits, loss = pictures @ captions.T, jax.jit(softmax_contrastive)
    np.testing.assert_allclose(loss(logits), reference.contrastive(pictures, captions), rtol=1e-5)
    np.testing.assert_allclose(loss(logits.T), loss(logits), rtol=1e-6)
    np.testing.assert_allclose(loss(np.zeros((7, 7))), math.log(7), rtol=1e-6)
    assert loss(50 * np.eye(7)) < 1e-6


def test_the_sigmoid_contrastive_is_the_sum_over_pairs_each_on_its_own():
    logits = RNG.normal(size=(5, 5))
    wanted = sum(math.log1p(math.exp(-logits[i, j] if i == j else logits[i, j])) for i in range(5) for j in range(5))
    np.testing.assert_allclose(jax.jit(sigmoid_contrastive)(logits), wanted / 5, rtol=1e-5)
    assert jax.jit(sigmoid_contrastive)(100 * np.eye(5) - 50) < 1e-6


def test_sigmoid_towers_start_warm_and_unlikely():
    cfg = micro.odd_config('clip')
    cfg.model.contrastive = 'sigmoid'
    model = models.build(cfg, 100, 99, nnx.Rngs(0))
    logits = model(*map(jnp.asarray, (PICTURES, TOKENS, *one_a_row(ENDS))))
    assert np.all(np.abs(np.asarray(logits) + 10) <= 10.001)  # cosines by 10, less 10
    assert model.contrastive == 'sigmoid'


def test_quick_gelu():
    x = np.linspace(-5, 5, 11)
    np.testing.assert_allclose(jax.jit(quick_gelu)(x), x / (1 + np.exp(-1.702 * x)), atol=1e-6)
