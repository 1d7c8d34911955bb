"""Where a model looks: attention that is known beforehand, and words that patches were made of."""

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest

from nanovision_jax import models
from nanovision_jax.inference import looking
from nanovision_jax.inference.engine import Prompt, define
from nanovision_jax.models.attention import Structure

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


def opened(change=lambda params: None, flavour='gpt'):
    cfg = micro.config('vision_instruct')
    cfg.model.flavour = flavour
    graphdef, params = micro.model(cfg)
    change(params)
    return cfg, define(*models.unstack(graphdef, params)[:1]), models.unstack(graphdef, params)[1]


def prompt():
    ids = [5, *[micro.TOKENIZER.image] * 4, 7, 9]
    return Prompt(np.array(ids, np.int32), [IMAGE])


def test_queries_of_nothing_look_at_all_before_them_alike():
    def blind(params):
        kernel = params['decoder']['blocks']['qkv']['kernel']
        params['decoder']['blocks']['qkv']['kernel'] = kernel.at[:, :, 0].set(0)

    _, definition, params = opened(blind)
    shares = looking.looks(definition, params, micro.TOKENIZER.image, prompt(), [11, 12, 13])
    assert shares.shape == (2, 3, 4)  # layers, tokens of the answer, patches
    np.testing.assert_allclose(shares, np.broadcast_to(1 / np.array([7, 8, 9])[:, None], (2, 3, 4)), rtol=1e-5)


@pytest.mark.parametrize('flavour', ['gpt', 'llama'])
def test_attention_that_is_looked_at_is_the_attention_that_is_used(flavour):
    """The shares times the values are what the blocks get: hidden states are those of the plain path, in both forms."""
    cfg, definition, params = opened(flavour=flavour)
    graphdef, stacked = micro.model(cfg)
    tokens, positions = jnp.arange(1, 9)[None], jnp.arange(8)[None]
    structure = Structure(causal=True, segments=jnp.ones((1, 8), jnp.int32))
    found = []
    for model in (models.merge(graphdef, stacked), models.merge(definition.graphdef, params)):
        decoder = model.decoder
        x = decoder.embed(tokens)
        found.append(decoder.looks(x, positions, structure))
        np.testing.assert_allclose(found[-1].sum(-1), 1, rtol=1e-5)
        assert not np.triu(found[-1][0, 0], 1).any()
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6)


def test_norms_are_those_of_what_stands_before_the_first_block():
    _, definition, params = opened()
    images, words = looking.norms(definition, params, micro.TOKENIZER.image, prompt())
    model = models.merge(definition.graphdef, params)
    features = np.asarray(model.image_features(jnp.asarray(IMAGE)[None, None]))[0]
    table = np.asarray(params['decoder']['embedding']['embedding'])
    assert images == pytest.approx(np.linalg.norm(features, axis=1).mean(), rel=1e-5)
    assert words == pytest.approx(np.linalg.norm(table[[5, 7, 9]], axis=1).mean(), rel=1e-5)


def test_a_patch_that_is_a_word_is_nearest_to_that_word():
    """A projector that gives every patch the embedding of a word."""
    word = 17

    def speaking(params):
        table = params['decoder']['embedding']['embedding']
        params['projector'] = jax.tree.map(jnp.zeros_like, params['projector'])
        params['projector']['second']['bias'] = 90 * table[word]

    _, definition, params = opened(speaking)
    ids, cosines = looking.nearest_words(definition, params, IMAGE, (3,), 2)
    assert ids.shape == (4, 2) and (ids[:, 0] == word).all() and cosines[:, 0] == pytest.approx(1, abs=1e-5)
    ids, _ = looking.nearest_words(definition, params, IMAGE, (3, word), 2)
    assert word not in ids and 3 not in ids
