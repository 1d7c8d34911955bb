"""The decoder: against plain numpy, causality, packing, positions, the padded vocabulary, the cache."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import micro
import numpy as np
import optax
import pytest
import reference
from flax import nnx

from nanovision_jax import config as configs
from nanovision_jax import models
from nanovision_jax.data import batch as batches
from nanovision_jax.models.decoder import rotary_angles, rotate_halves
from nanovision_jax.models.layers import padded
from nanovision_jax.training import optim

T = 29
CFG = micro.odd_config('sft')
GRAPHDEF, PARAMS = micro.model(CFG, micro.ODD)


@jax.jit
def forward(params, tokens, positions, segments):
    return models.merge(GRAPHDEF, params)(tokens, positions, segments)


def examples(*lengths, seed=0):
    """Examples as batch.pack takes them, of so many inputs each."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, micro.ODD.image, n + 1, np.int32), np.ones(n + 1, bool), []) for n in lengths]


def logits(*rows):
    """Real logits [row, T, VOCAB] of three rows, each a list of examples."""
    packed = [batches.pack(row, T) for row in rows]
    inputs = [np.stack([row[name] for row in packed]) for name in ('tokens', 'positions', 'segments')]
    return np.asarray(forward(PARAMS, *inputs))[..., : micro.ODD.size]


def test_the_decoder_is_the_numpy_one():
    row = examples(11, 13, 5)
    found, p = logits(row, row, row)[0], micro.double(PARAMS)
    alone = [reference.decoder(p, p['embedding']['embedding'][ids[:-1]]) for ids, _, _ in row]
    np.testing.assert_allclose(found, np.concatenate(alone)[:, : micro.ODD.size], atol=1e-4)


def test_no_token_sees_a_later_one():
    (ids, learned, _), *_ = examples(T)
    changed = []
    for t in (7, 20):
        other = ids.copy()
        other[t] = (ids[t] + 1) % micro.ODD.image
        changed.append([(other, learned, [])])
    plain, *later = logits([(ids, learned, [])], *changed)
    for t, found in zip((7, 20), later, strict=True):
        assert (found[:t] == plain[:t]).all()
        assert (found[t:] != plain[t:]).any(axis=-1).all()


def test_packed_neighbours_do_not_see_each_other():
    a, b, c, d = examples(7, 11, 5, 11)
    plain, changed, _ = logits([a, b, c], [a, d, c], [a, b, c])
    assert (plain[:7] == changed[:7]).all() and (plain[18:23] == changed[18:23]).all()
    assert (plain[7:18] != changed[7:18]).any(axis=-1).all()


def test_an_example_gets_the_same_logits_alone_and_anywhere_in_a_row():
    a, b, c = examples(7, 11, 5)
    alone, last, middle = logits([a], [b, c, a], [c, a, b])
    np.testing.assert_allclose(last[16:23], alone[:7], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(middle[5:12], alone[:7], rtol=1e-5, atol=1e-5)


@jax.jit
def rotated(x, positions):
    return rotate_halves(x, rotary_angles(CFG.model, positions))


def test_rotation_turns_pairs_that_stand_half_a_head_apart():
    rng = np.random.default_rng(1)
    x, positions = rng.normal(size=(2, 5, 3, 14)), rng.integers(0, 2048, (2, 5))
    found = np.asarray(rotated(x, positions))
    pairs = np.stack([x[..., :7], x[..., 7:]], -1).reshape(x.shape)  # (0, 7), (1, 8), … put side by side
    for row in range(2):
        turned = reference.rope(pairs[row], positions[row], 1e6)
        np.testing.assert_allclose(found[row], np.concatenate([turned[..., ::2], turned[..., 1::2]], -1), atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_rotated_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(2)
    q, k = (np.broadcast_to(rng.normal(size=(3, 14)), (2, 5, 3, 14)) for _ in range(2))
    start = np.array([0, 1, 7, 59, 307])
    turned = np.asarray(rotated(q, start + np.array([[5], [17]])))  # row 0 is 5 tokens after the keys, row 1 is 17
    products = (turned * np.asarray(rotated(k, np.broadcast_to(start, (2, 5))))).sum(-1)
    np.testing.assert_allclose(products, np.broadcast_to(products[:, :1], (2, 5, 3)), atol=1e-4)
    assert (abs(products[0, 0] - products[1, 0]) > 0.1).all()


def test_padded_vocabulary_rows_stay_nothing():
    rows = padded(micro.ODD.size)
    assert (rows, padded(128), padded(129)) == (128, 128, 256)
    optimizer = optim.make_optimizer(configs.Optim(learning_rate=0.1, warmup=0, weight_decay=0.5), 10)
    tokens = jnp.arange(2 * T).reshape(2, T)
    positions, segments = tokens % T, jnp.ones_like(tokens)

    @jax.jit
    def run():
        params = nnx.to_pure_dict(nnx.state(models.build(CFG, micro.ODD.size, micro.ODD.image, nnx.Rngs(0))))

        def loss(params):
            scores = models.merge(GRAPHDEF, params)(tokens, positions, segments)
            return optax.softmax_cross_entropy_with_integer_labels(scores, tokens).mean(), scores

        (value, scores), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return params, value, scores, grads, optax.apply_updates(params, updates)

    params, value, scores, grads, after = run()
    assert np.isfinite(value) and np.isneginf(scores[..., micro.ODD.size :]).all()
    for tree in (params, grads, after):
        assert not np.any(tree['embedding']['embedding'][micro.ODD.size :])
        assert not np.any(tree['head']['kernel'][:, micro.ODD.size :])
        assert np.any(tree['head']['kernel'][:, : micro.ODD.size], axis=0).all()
    assert (params['head']['kernel'] != after['head']['kernel'])[:, : micro.ODD.size].any()
    fan_in = {'qkv': 42, 'ffn_in': 42, 'out': 42 * 2 * CFG.model.layers, 'ffn_out': 53 * 2 * CFG.model.layers}
    for name, n in fan_in.items():  # what writes to the residual stream starts smaller by sqrt(2 · layers)
        np.testing.assert_allclose(np.std(params['blocks'][name]['kernel']) * n**0.5, 1, rtol=0.05)


def test_decoding_with_the_cache_gives_the_full_forward_pass():
    rows = [examples(T, seed=seed) for seed in range(3)]
    tokens = np.stack([batches.pack(row, T)['tokens'] for row in rows])

    graphdef, params = models.unstack(GRAPHDEF, PARAMS)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, tokens, starts):
        decoder = models.merge(graphdef, params)
        x, cache = decoder.extend(decoder.embed(tokens), starts, cache)
        return decoder.logits(x)[..., : micro.ODD.size], cache

    wanted, places = logits(*rows), np.arange(3)
    cache = models.merge(graphdef, params).empty_cache(3, T + 8)
    lengths = np.array([12, 9, 7], np.int32)  # behind them stands what is never seen
    prompt = np.where(np.arange(12) < lengths[:, None], tokens[:, :12], 7)
    first, cache = step(cache, prompt[:, :5], np.zeros(3, np.int32))  # in two pieces
    second, cache = step(cache, prompt[:, 5:], np.full(3, 5, np.int32))
    prefilled = np.concatenate([first, second], axis=1)
    for length, found, whole in zip(lengths, prefilled, wanted, strict=True):
        np.testing.assert_allclose(found[:length], whole[:length], atol=1e-4)
    for _ in range(T - 12):
        scores, cache = step(cache, tokens[places, lengths][:, None], lengths)
        np.testing.assert_allclose(scores[:, 0], wanted[places, lengths], atol=1e-4)
        lengths += 1


def test_a_wrong_shape_is_caught_by_the_annotations():
    tokens = np.zeros((3, T), np.int32)
    with pytest.raises(jaxtyping.TypeCheckError):
        jax.eval_shape(forward, PARAMS, tokens, tokens[:, 1:], tokens)
    with pytest.raises(jaxtyping.TypeCheckError):
        jax.eval_shape(forward, PARAMS, tokens.astype(np.float32), tokens, tokens)
