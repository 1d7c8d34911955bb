"""Weights stored in fewer bytes: what is kept, how far off it is, and that decoding reads the same."""

import itertools
import re

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest

import nanovision_jax
from nanovision_jax import models
from nanovision_jax.errors import UserError
from nanovision_jax.inference import engine
from nanovision_jax.inference.engine import Engine, Prompt
from nanovision_jax.inference.sampling import Sampling
from nanovision_jax.inference.weights import quantize, stored
from nanovision_jax.models.layers import Quantized

LLAMA = dict(flavour='llama', tied=True, heads=4, kv_heads=2, head_dim=8, qkv_bias=True, qk_norm=True)


def model(flavour, stage='sft'):
    """(config, graphdef, params) of a small model with random weights."""
    cfg = micro.odd_config(stage, positions=211)
    for name, value in (LLAMA if flavour == 'llama' else {}).items():
        setattr(cfg.model, name, value)
    return cfg, *micro.model(cfg, micro.ODD)


def scores(graphdef, params, tokens):
    """Logits [B, T, VOCAB] of rows of tokens."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    forward = jax.jit(lambda params, *x: models.merge(graphdef, params)(*x))
    return np.asarray(forward(params, tokens, positions, jnp.ones_like(tokens)))[..., : micro.ODD.size]


def said(cfg, graphdef, params, **options):
    """What a model says after a token, of 8 rows: [8, 150]."""
    prompts = [Prompt(np.array([5 + row], np.int32), []) for row in range(8)]
    chunks = list(Engine(cfg, graphdef, params, (-1,)).generate(prompts, 150, Sampling(**options)))
    rows = zip(prompts, *chunks, strict=True)
    return jnp.array([[*prompt.ids, *itertools.chain(*pieces)] for prompt, *pieces in rows])


def loss(scores, tokens):
    """The mean loss of tokens, in nats."""
    shares = jax.nn.log_softmax(scores[:, :-1])
    return -float(jnp.take_along_axis(shares, tokens[:, 1:, None], axis=2).mean())


@pytest.mark.parametrize('axes', [(0,), (1,), (0, 1)])
def test_a_quantized_matrix_is_off_by_half_a_step_of_its_channel(axes):
    matrix = np.random.default_rng(0).normal(size=(7, 11, 5)).astype(np.float32) * np.arange(5)  # a channel of zeros
    found = quantize(jnp.array(matrix), axes)
    largest = abs(matrix).max(axis=axes, keepdims=True)
    assert found.values.dtype == jnp.int8 and found.scale.shape == largest.shape
    assert np.abs(found.values).max() == 127 and (np.asarray(found.matrix())[..., 0] == 0).all()
    assert (abs(found.matrix() - matrix) <= largest / 254 * 1.001).all()


@pytest.mark.parametrize('flavour', ['gpt', 'llama'])
def test_int8_and_bfloat16_say_what_the_model_says(flavour):
    cfg, graphdef, params = model(flavour)
    tokens = said(cfg, graphdef, params, temperature=1.0)  # text that the model itself would write
    plain = scores(graphdef, params, tokens)
    off = {}
    for weights in ('', 'bfloat16', 'int8'):
        kept = stored(cfg, graphdef, params, weights)
        found = scores(*kept, tokens)
        off[weights] = np.linalg.norm(found - plain) / np.linalg.norm(plain)
        assert loss(found, tokens) - loss(plain, tokens) < np.log(1.01)  # perplexity within 1%
    # Of a weight's usual size, bfloat16 is off by 0.2% and int8 by 0.7%; each product on the way adds its own.
    assert off[''] < 1e-5 < off['bfloat16'] < 0.02 and off['bfloat16'] < off['int8'] < 0.05


@pytest.mark.parametrize('flavour', ['gpt', 'llama'])
def test_what_is_stored_in_which_dtype(flavour):
    cfg, graphdef, params = model(flavour, 'vision_instruct')
    before = jax.tree.map(jnp.copy, params)
    tree = stored(cfg, graphdef, params, 'int8')[1]
    matrices = {'qkv', 'out', 'ffn_in', 'ffn_out', 'q', 'kv', 'ffn_gate'}
    assert sorted(tree['decoder']['blocks']) == list(range(cfg.model.layers))
    for block in tree['decoder']['blocks'].values():
        assert all(isinstance(block[name]['kernel'], Quantized) for name in matrices & set(block))
        assert block['attention_norm']['scale'].dtype == jnp.float32
    assert isinstance(tree['decoder']['embedding']['embedding'], Quantized)
    assert ('head' in tree['decoder']) == (flavour == 'gpt')
    assert all(isinstance(layer['kernel'], Quantized) for layer in tree['projector'].values())
    assert {leaf.dtype for leaf in jax.tree.leaves(tree['vision'])} == {jnp.dtype(jnp.float32)}
    tree = stored(cfg, graphdef, params, 'bfloat16')[1]
    kinds = {path[-1].key: leaf.dtype for path, leaf in jax.tree.leaves_with_path(tree)}
    assert {kinds['kernel'], kinds['embedding']} == {jnp.dtype(jnp.bfloat16)} and kinds['scale'] == jnp.float32
    micro.assert_same(params, before)
    cfg.dtype = 'bfloat16'  # then so are they as trained, which is what each use would make of them
    kinds = {path[-1].key: leaf.dtype for path, leaf in jax.tree.leaves_with_path(stored(cfg, graphdef, params)[1])}
    assert kinds['kernel'] == jnp.bfloat16 and kinds['scale'] == jnp.float32


@pytest.mark.parametrize('weights', ['bfloat16', 'int8'])
@pytest.mark.parametrize('backend', ['cpu', 'gpu'])  # where they are made wide for an answer, and where they are not
def test_cached_answers_are_those_of_the_stored_weights(weights, backend, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    cfg, graphdef, params = model('gpt')
    kept = stored(cfg, graphdef, params, weights)
    tokens = said(cfg, *kept)
    found = scores(*kept, tokens)[:, :-1]
    picked = np.take_along_axis(found, np.asarray(tokens)[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(picked, found.max(axis=2), atol=1e-4)
    again = Engine(cfg, *kept, (-1,)).params  # what is stored so stays so
    jax.tree.map(np.testing.assert_array_equal, again, kept[1])


def test_a_run_is_loaded_so(tmp_path, tokenizer):
    run_dir = micro.run_folder(micro.odd_config('vision_instruct', tmp_path / 'vision_instruct'), tokenizer)
    plain, small = nanovision_jax.load(run_dir), nanovision_jax.load(run_dir, weights='int8')
    ids = np.random.default_rng(0).integers(5, 250, (2, 23))
    wanted, found = plain.logits(ids)[..., : tokenizer.size], small.logits(ids)[..., : tokenizer.size]
    assert 0 < np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)
    assert small.chat('a cat?', max_new_tokens=9) and small.model.decoder.head is not None
    with pytest.raises(UserError, match="weights takes bfloat16, int8 or nothing, not 'int4'"):
        nanovision_jax.load(run_dir, weights='int4')


def test_a_loop_reads_int8_and_not_matrices_made_before_it(monkeypatch):
    cfg, graphdef, params = model('gpt')
    runner = Engine(cfg, *stored(cfg, graphdef, params, 'int8'), (-1,))
    state, _ = runner._start(runner.params, [Prompt(np.array([5], np.int32), [])], [Sampling()])

    def carried():
        """The shapes that the decoding loop carries."""
        arguments = (runner.definition, runner.params, state, np.array([-1], np.int32), 5)
        text = engine.decode.lower(*arguments, greedy=True).compile().as_text()
        (loop,) = re.findall(r'= \((.*)\) while\(', text)
        return set(re.findall(r'\w+\[[\d,]+\]', loop))

    shape = '[42,53]'  # ffn_in's
    assert f's8{shape}' in carried() and f'f32{shape}' not in carried()
    monkeypatch.setattr(engine, 'kept_quantized', lambda params, changing: params)
    engine.decode.clear_cache()
    assert f'f32{shape}' in carried()  # without it they would be made
