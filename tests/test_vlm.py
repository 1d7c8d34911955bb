"""The vision-language model: against plain numpy, pictures in their places, packing, the cache."""

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
import reference

from nanovision_jax import models
from nanovision_jax.data import batch as batches
from nanovision_jax.models import vlm
from nanovision_jax.models.vlm import splice

T, P = 61, 9
CFG = micro.odd_config('vision_instruct')
GRAPHDEF, PARAMS = micro.model(CFG, micro.ODD)


@jax.jit
def forward(params, tokens, positions, segments, images):
    return models.merge(GRAPHDEF, params)(tokens, positions, segments, images)


def example(length, pictures, seed):
    """An example of `length` inputs as batch.pack takes it; picture k follows the text token 3k."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, micro.ODD.image, length + 1, np.int32)
    for k in range(pictures):
        ids[1 + k * (P + 3) : 1 + k * (P + 3) + P] = micro.ODD.image
    pictures = rng.integers(0, 256, (pictures, 21, 21, 3), np.uint8)
    return ids, np.ones(length + 1, bool), [{'images': picture} for picture in pictures]


A, B, C, D = example(23, 1, 1), example(31, 2, 2), example(7, 0, 3), example(31, 2, 4)


def pack(*rows):
    """Rows (three, so that one compilation is enough), each a list of examples, as the model's inputs."""
    packed = [batches.pack(row, T, batches.empty_slots(3, CFG.model.vision)) for row in rows]
    return [np.stack([row[name] for row in packed]) for name in ('tokens', 'positions', 'segments', 'images')]


def logits(*rows):
    return np.asarray(forward(PARAMS, *pack(*rows)))[..., : micro.ODD.size]


@pytest.fixture(scope='module')
def plain():
    return logits([A, B, C], [C], [C, B, A])


def test_the_model_is_the_numpy_one(plain):
    p = micro.double(PARAMS)
    for (ids, _, pictures), start in ((A, 0), (B, 23), (C, 54)):
        x = p['decoder']['embedding']['embedding'][ids[:-1]]
        if pictures:
            states = [reference.tower(p['vision'], CFG.model.vision, one['images'], 2)[1:] for one in pictures]
            x[ids[:-1] == micro.ODD.image] = reference.projector(p['projector'], np.concatenate(states))
        expected = reference.decoder(p['decoder'], x)[:, : micro.ODD.size]
        np.testing.assert_allclose(plain[0, start : start + len(x)], expected, atol=1e-4)


def test_packed_neighbours_do_not_see_each_others_pictures(plain):
    ids, learned, pictures = B
    repainted, retold = (ids, learned, [pictures[0], {'images': 255 - pictures[1]['images']}]), D
    for number, other in enumerate((repainted, retold)):
        changed = logits([A, other, C], [C], [C, B, A])[0]
        assert (changed[:23] == plain[0, :23]).all() and (changed[54:] == plain[0, 54:]).all()
        seen = 23 + 13 if number == 0 else 23  # the second picture begins at the example's token 13
        assert (changed[23:seen] == plain[0, 23:seen]).all()
        assert (changed[seen:54] != plain[0, seen:54]).any(axis=-1).all()


def test_an_example_gets_the_same_logits_alone_and_anywhere_in_a_row(plain):
    alone = logits([A], [B], [C])
    for found, expected in ((plain[0, :23], alone[0, :23]), (plain[0, 23:54], alone[1, :31])):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(plain[2, 7:38], alone[1, :31], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(plain[2, 38:], alone[0, :23], rtol=1e-5, atol=1e-5)


def test_empty_slots_change_nothing(plain):
    tokens, positions, segments, images = pack([A, C], [C], [C, B])
    expected = forward(PARAMS, tokens, positions, segments, images)
    filled = images.copy()
    filled[0, 1:], filled[1], filled[2, 2:] = 201, 31, 101
    assert (forward(PARAMS, tokens, positions, segments, filled) == expected).all()


def test_the_tower_takes_filled_slots_alone(monkeypatch, plain):
    tokens, positions, segments, images = pack([A, B, C], [C], [C, B, A])
    seen = []

    def counted(model, pixels):
        jax.debug.callback(lambda count: seen.append(int(count)), jnp.int32(len(pixels)))
        return tower_features(model, pixels)

    tower_features = vlm.VLM.tower_features
    monkeypatch.setattr(vlm.VLM, 'tower_features', counted)
    for least, turns in ((P, [1] * 6), (4 * P, [4, 4]), (5 * P, [5, 5]), (9 * P, [9])):  # two, none and two of three
        monkeypatch.setattr(vlm, 'LEAST', least)
        jax.clear_caches()
        found = forward(PARAMS, tokens, positions, segments, images)
        jax.effects_barrier()
        assert seen == turns
        seen.clear()
        np.testing.assert_allclose(found[..., : micro.ODD.size], plain, atol=1e-5)


def test_decoding_with_the_cache_gives_the_full_forward_pass(plain):
    tokens, _, _, images = pack([A], [B], [C])

    graphdef, params = models.unstack(GRAPHDEF, PARAMS)

    @jax.jit
    def first(params, tokens, images):
        model = models.merge(graphdef, params)
        embedded = model.embed(tokens, model.image_features(images))
        cache = model.decoder.empty_cache(3, 37)
        x, cache = model.decoder.extend(embedded[:, :5], jnp.zeros(3, jnp.int32), cache)  # which ends amid a picture
        return embedded, model.decoder.logits(x)[:, :, : micro.ODD.size], cache

    @jax.jit
    def step(params, cache, x, column):
        decoder = models.merge(graphdef, params).decoder
        x, cache = decoder.extend(x, jnp.full(3, column), cache)
        return decoder.logits(x)[:, 0, : micro.ODD.size], cache

    embedded, scores, cache = first(params, tokens, images)
    found = list(np.moveaxis(scores, 1, 0))
    for t in range(5, 31):
        scores, cache = step(params, cache, embedded[:, t : t + 1], np.int32(t))
        found.append(scores)
    found = np.stack(found, 1)
    np.testing.assert_allclose(found[0, :23], plain[0, :23], atol=1e-4)
    np.testing.assert_allclose(found[1], plain[0, 23:54], atol=1e-4)
    np.testing.assert_allclose(found[2, :7], plain[0, 54:], atol=1e-4)


def test_splice_puts_the_kth_feature_at_the_kth_image_token():
    rng = np.random.default_rng(5)
    embedded, features = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 17, 3), (4, 6, 3)))
    places = [[0, 1, 2, 3, 4, 5], [2, 3, 4, 11, 12, 16], [], [5, 7, 8]]
    is_image = np.zeros((4, 17), bool)
    for row, at in enumerate(places):
        is_image[row, at] = True
    found = np.asarray(jax.jit(splice)(embedded, is_image, features))
    for row, at in enumerate(places):
        assert (found[row, at] == features[row, : len(at)]).all()
    assert (found[~is_image] == embedded[~is_image]).all()


@pytest.mark.parametrize('kind', ['mlp', 'linear'])
def test_the_projector_is_the_numpy_one(kind):
    cfg = micro.odd_config('vision_pretrain')
    cfg.model.projector = kind
    graphdef, params = micro.model(cfg, micro.ODD)
    features = np.random.default_rng(6).normal(size=(2, P, 22)).astype(np.float32)
    found = jax.jit(lambda params, x: models.merge(graphdef, params).projector(x))(params, features)
    expected = reference.projector(micro.double(params['projector']), features.astype(np.float64))
    assert ('second' in params['projector']) == (kind == 'mlp')
    np.testing.assert_allclose(found, expected, atol=1e-5)
