"""Schedules and optimizers, against numbers worked out by hand."""

import re

import jax
import jax.numpy as jnp
import micro
import numpy as np
import optax
import pytest
from optax import contrib

from nanovision_jax import config as configs
from nanovision_jax import models
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.training import muon, optim


def test_cosine_rises_linearly_and_falls_to_its_end():
    rate = optim.schedule(configs.Optim(learning_rate=1e-3, end_learning_rate=1e-4, warmup=10), 110)
    found = [float(rate(step)) for step in (0, 5, 10, 35, 60, 85, 110, 200)]
    quarter = 0.45 * np.cos(np.pi / 4)  # the wave runs from 1e-3 to 1e-4 round 5.5e-4
    wanted = [0, 5e-4, 1e-3, (0.55 + quarter) * 1e-3, 5.5e-4, (0.55 - quarter) * 1e-3, 1e-4, 1e-4]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_linear_falls_on_a_line():
    cfg = configs.Optim(learning_rate=2e-4, end_learning_rate=2e-5, warmup=10, schedule='linear')
    rate = optim.schedule(cfg, 110)
    np.testing.assert_allclose([float(rate(s)) for s in (0, 10, 60, 110)], [0, 2e-4, 1.1e-4, 2e-5], rtol=1e-5)


@pytest.mark.parametrize(('warmup', 'steps', 'peak_at'), [(0.03, 1000, 30), (0.5, 10, 5), (20, 1000, 20), (99, 10, 10)])
def test_warmup_below_one_is_a_share_of_all_steps(warmup, steps, peak_at):
    rate = optim.schedule(configs.Optim(learning_rate=1.0, end_learning_rate=0.0, warmup=warmup), steps)
    rates = [float(rate(step)) for step in range(steps + 1)]
    assert int(np.argmax(rates)) == peak_at
    np.testing.assert_allclose(rates[: peak_at + 1], np.linspace(0, 1, peak_at + 1), atol=1e-6)


def test_no_warmup_starts_at_the_top():
    assert float(optim.schedule(configs.Optim(learning_rate=1.0, warmup=0), 10)(0)) == 1.0


@pytest.mark.parametrize('stage', micro.STAGES)
def test_weight_decay_is_for_kernels_only(stage):
    params = models.abstract(micro.config(stage), micro.TOKENIZER.size, micro.TOKENIZER.image)[1]
    for path, decays in jax.tree.leaves_with_path(optim.decayed(params)):
        name = parallel.path_name(path)
        spared = ('bias', 'scale', 'embedding', 'position', 'class_token', 'logit_scale')
        assert decays == name.endswith('kernel') != name.endswith(spared), name


def update(cfg, grads, params):
    """What the first step of the peak learning rate adds to the parameters."""
    optimizer = optim.make_optimizer(cfg, 10)
    updates, _ = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(grads, params)
    return updates


PARAMS = {'kernel': jnp.array([2.0, -4.0]), 'bias': jnp.array([2.0, -4.0])}
GRADS = {'kernel': jnp.array([3.0, 0.0]), 'bias': jnp.array([0.0, 4.0])}  # of norm 5


def test_adamw_decays_the_kernel_and_not_the_bias():
    cfg = configs.Optim(learning_rate=0.1, warmup=0, weight_decay=0.5)
    found = update(cfg, jax.tree.map(jnp.zeros_like, GRADS), PARAMS)
    np.testing.assert_allclose(found['kernel'], [-0.1, 0.2], rtol=1e-6)  # -rate · decay · parameter
    np.testing.assert_array_equal(found['bias'], [0, 0])


def test_adamw_takes_a_first_step_of_the_learning_rate():
    found = update(configs.Optim(learning_rate=0.1, warmup=0, weight_decay=0), GRADS, PARAMS)
    np.testing.assert_allclose(found['kernel'], [-0.1, 0], rtol=1e-5)
    np.testing.assert_allclose(found['bias'], [0, -0.1], rtol=1e-5)


def llama(cfg):
    """The same config with the second flavour of decoder."""
    cfg.model.flavour, cfg.model.kv_heads = 'llama', 2
    return cfg


@pytest.mark.parametrize('cfg', [*map(micro.config, micro.STAGES), llama(micro.config('vision_instruct'))])
def test_muon_holds_every_matrix_of_the_blocks_and_the_projector(cfg):
    params = models.abstract(cfg, micro.TOKENIZER.size, micro.TOKENIZER.image)[1]
    state = jax.eval_shape(optim.make_optimizer(configs.Optim(name='muon'), 10).init, params)
    moments = [parallel.path_name(path) for path, _ in jax.tree.leaves_with_path(state)]
    names = [parallel.path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    held = [name for name in names if name.endswith('kernel') and ('blocks/' in name or 'projector/' in name)]
    assert held
    for name in names:
        found = [m for m in moments if m.endswith('/' + name)]
        assert len(found) == (1 if name in held else 2), name  # Muon keeps one moment, AdamW two
        assert all(('muon/' in m) == (name in held) for m in found), name


def test_muon_steps_by_orthogonal_matrices():
    """For each layer, query, key and value alone: singular values near 1, times the scale that makes rates AdamW's."""
    shapes = {
        'blocks': {
            'qkv': {'kernel': (2, 6, 3, 2, 5)},
            'q': {'kernel': (2, 6, 2, 5)},
            'kv': {'kernel': (2, 6, 2, 1, 5)},
            'out': {'kernel': (2, 2, 5, 6)},
            'ffn_gate': {'kernel': (2, 6, 7)},
            'ffn_out': {'kernel': (2, 7, 6)},
        },
        'projector': {'first': {'kernel': (4, 6)}},
    }
    rng = np.random.default_rng(0)
    grads = jax.tree.map(
        lambda shape: rng.standard_normal(shape, np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    cfg = configs.Optim(name='muon', learning_rate=0.1, warmup=0, weight_decay=0.0)
    found = update(cfg, grads, jax.tree.map(jnp.zeros_like, grads))
    blocks = found['blocks']
    stacks = {
        'qkv': np.moveaxis(blocks['qkv']['kernel'], 2, 1).reshape(6, 6, 10),
        'q': blocks['q']['kernel'].reshape(2, 6, 10),
        'kv': np.moveaxis(blocks['kv']['kernel'], 2, 1).reshape(4, 6, 5),
        'out': blocks['out']['kernel'].reshape(2, 10, 6),
        'ffn_gate': blocks['ffn_gate']['kernel'],
        'ffn_out': blocks['ffn_out']['kernel'],
        'projector': found['projector']['first']['kernel'][None],
    }
    for name, stack in stacks.items():
        scale = 0.1 * 0.2 * max(stack.shape[1:]) ** 0.5
        values = np.linalg.svd(stack, compute_uv=False) / scale
        # Five Newton-Schulz steps with these coefficients end between 0.68 and 1.13, from all but the smallest values.
        assert values.min() > 0.6, (name, values)
        assert values.max() < 1.25, (name, values)


def test_muon_is_optaxs_and_its_state_has_the_same_names():
    cfg = configs.Optim(name='muon', learning_rate=0.1, warmup=0, weight_decay=0.5, clip_norm=1e9)
    shapes = {'qkv': (2, 6, 3, 2, 5), 'out': (2, 2, 5, 6), 'ffn_in': (2, 6, 7), 'ffn_out': (2, 7, 6)}
    rng = np.random.default_rng(0)
    params, grads = (
        {'blocks': {name: {'kernel': rng.standard_normal(shape, np.float32)} for name, shape in shapes.items()}}
        for _ in range(2)
    )
    ours = optim.make_optimizer(cfg, 10)

    def axes(params):
        numbers = {'qkv': (-4, (-2, -1)), 'out': ((-3, -2), -1), 'ffn_in': (-2, -1), 'ffn_out': (-2, -1)}
        found = {name: {'kernel': contrib.MuonDimensionNumbers(*numbers[name])} for name in params['blocks']}
        return {'blocks': found}

    rate = optim.schedule(cfg, 10)
    peer = contrib.muon(rate, weight_decay=0.5, consistent_rms=0.2, muon_weight_dimension_numbers=axes)
    states = [optimizer.init(params) for optimizer in (ours, peer)]
    for _ in range(3):
        found, states[0] = jax.jit(ours.update)(grads, states[0], params)
        wanted, states[1] = jax.jit(peer.update)(grads, states[1], params)
    for ours, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-6)
    names = [{parallel.path_name(path) for path, _ in jax.tree.leaves_with_path(state)} for state in states]
    muons = {f'1/inner_states/muon/inner_state/{name}' for name in names[1] if '/adam/' not in name}
    assert len(muons) > 4 and muons <= names[0]


@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 2, 2)])
def test_each_device_turns_its_share_of_muons_matrices(sizes):
    stack = np.random.default_rng(0).standard_normal((20, 4, 6)).astype(np.float32)
    stack /= np.linalg.norm(stack, axis=(1, 2), keepdims=True)
    wanted = muon.newton_schulz(jnp.asarray(stack))
    assert np.linalg.svd(wanted, compute_uv=False).min() > 0.3
    with jax.set_mesh(parallel.make_mesh(configs.Mesh(*sizes))):
        spread = jax.jit(lambda stack: muon.newton_schulz(stack, parallel.AXES))
        compiled = spread.lower(stack).compile()
        np.testing.assert_allclose(compiled(stack), wanted, atol=1e-5)
    products = re.findall(r'= f32\[(\d+),4,(?:4|6)\]\S* dot\(', compiled.as_text())
    assert products and set(products) == {'3'}  # of 24, four of which are padding


def test_muon_leaves_the_rest_to_adamw_and_decays_alike():
    params = {'blocks': {'ffn_in': {'kernel': jnp.eye(2)}}, 'head': {'kernel': jnp.eye(2)}, 'scale': jnp.ones(2)}
    cfg = configs.Optim(name='muon', learning_rate=0.1, warmup=0, weight_decay=0.5)
    found = update(cfg, jax.tree.map(jnp.zeros_like, params), params)
    np.testing.assert_allclose(found['blocks']['ffn_in']['kernel'], -0.05 * np.eye(2), rtol=1e-6)
    np.testing.assert_allclose(found['head']['kernel'], -0.05 * np.eye(2), rtol=1e-6)
    np.testing.assert_array_equal(found['scale'], 0)
    grads = jax.tree.map(jnp.ones_like, params)
    adamw = update(configs.Optim(learning_rate=0.1, warmup=0, weight_decay=0.5), grads, params)
    found = update(cfg, grads, params)
    np.testing.assert_array_equal(found['head']['kernel'], adamw['head']['kernel'])
    np.testing.assert_array_equal(found['scale'], adamw['scale'])


@pytest.mark.parametrize(('clip_norm', 'scale'), [(1.0, 1 / 5), (2.5, 1 / 2), (5.1, 1)])
def test_sgd_follows_gradients_clipped_by_their_common_norm(clip_norm, scale):
    found = update(configs.Optim(name='sgd', learning_rate=0.1, warmup=0, clip_norm=clip_norm), GRADS, PARAMS)
    for name, grad in GRADS.items():
        np.testing.assert_allclose(found[name], -0.1 * scale * grad, rtol=1e-6)


def test_sgd_keeps_no_moments():
    state = optim.make_optimizer(configs.Optim(name='sgd'), 10).init(PARAMS)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [()]  # the step count
    assert optax.tree.get(state, 'count') == 0
