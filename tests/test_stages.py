"""What each stage trains, and its loss."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import micro
import numpy as np
import optax
import pytest

from nanovision_jax import config as configs
from nanovision_jax import models
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.stages import STAGES
from nanovision_jax.training import objectives, step

# What learns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('stage', 'trained', 'frozen'),
    [
        ('clip', {'vision', 'text', 'vision_projection', 'text_projection', 'logit_scale'}, set()),
        ('pretrain', {'embedding', 'blocks', 'norm', 'head'}, set()),
        ('sft', {'embedding', 'blocks', 'norm', 'head'}, set()),
        ('vision_pretrain', {'projector'}, {'vision', 'decoder'}),
        ('vision_instruct', {'projector', 'decoder'}, {'vision'}),
    ],
)
def test_what_learns_and_what_is_frozen(stage, trained, frozen):
    params = micro.params(micro.config(stage))[1]
    parts = step.partition(micro.config(stage), params)
    assert (set(parts[0]), set(parts[1])) == (trained, frozen)
    assert parts[0] | parts[1] == params


def mesh_of(sizes):
    return parallel.make_mesh(configs.Mesh(*sizes), jax.devices()[: sizes[0] * sizes[1] * sizes[2]])


class Scores:
    """Stands for a decoder: its hidden states are its logits, of which those from `vocab_size` on are padding."""

    def __init__(self, rows, vocab_size=None):
        self.rows, self.vocab_size = rows, vocab_size or rows

    def norm(self, hidden):
        return hidden

    def output_kernel(self):
        return jnp.eye(self.rows)


# Losses --------------------------------------------------------------------------------------------------------------


def test_the_loss_of_tokens_is_summed_over_what_is_learned():
    rng, (b, t, v) = np.random.default_rng(0), (3, 5, 7)
    logits = rng.normal(size=(b, t, v)).astype(np.float32)
    targets, weights = rng.integers(0, 5, (b, t)), rng.integers(0, 2, (b, t)).astype(np.float32)
    arrays = map(jnp.asarray, (logits, targets, weights))
    total, count = objectives.next_token(Scores(v, vocab_size=5), *arrays)
    chances = np.exp(logits[..., :5]) / np.exp(logits[..., :5]).sum(-1, keepdims=True)
    wanted = [-np.log(chances[i, j, targets[i, j]]) for i, j in zip(*np.nonzero(weights), strict=True)]
    np.testing.assert_allclose(total, sum(wanted), rtol=1e-5)
    assert count == len(wanted)


def test_only_vision_stages_hand_pictures_or_features_to_the_model():
    pictures = {'': ['images'], 'bf16': ['features'], 'int8': ['features', 'scales']}
    for stage, kept, more in (('pretrain', '', []), *(('vision_instruct', *item) for item in pictures.items())):
        cfg, seen = micro.config(stage), {}
        cfg.data.cache_features = kept
        batch = jax.tree.map(jnp.asarray, micro.batch(cfg))

        class Model(Scores):
            def hidden(self, tokens, seen=seen, **inputs):
                seen.update(inputs, tokens=tokens)
                return jnp.zeros((*tokens.shape, 128))

        objectives.OBJECTIVES[STAGES[stage].objective].total(Model(128), batch)
        assert seen.keys() == {'tokens', 'positions', 'segments', *more}
        assert all(x is batch[name] for name, x in seen.items())


def test_the_loss_of_pairs_counts_pairs():
    logits = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    batch = micro.batch(micro.config('clip'))
    batch['images'] = batch['images'][:4]

    class Towers:
        contrastive = 'softmax'

        def embed(self, **_):
            return ()

        def logits(self):
            return jnp.asarray(logits)

    total, count = objectives.OBJECTIVES['contrastive'].total(Towers(), batch)
    rows, columns = (np.exp(logits) / np.exp(logits).sum(axis, keepdims=True) for axis in (1, 0))
    wanted = -(np.log(np.diag(rows)) + np.log(np.diag(columns))).mean() / 2
    np.testing.assert_allclose(total / count, wanted, rtol=1e-5)
    assert count == 4


# The loss that never has all logits ----------------------------------------------------------------------------------


def of_plain_logits(decoder, hidden, targets, weights):
    """The loss of tokens as it is written down."""
    losses = optax.softmax_cross_entropy_with_integer_labels(decoder.logits(hidden), targets)
    return jnp.sum(losses * weights), jnp.sum(weights)


@pytest.mark.parametrize('sizes', [None, (1, 1, 1), (4, 2, 1), (2, 2, 2)])
@pytest.mark.parametrize('tied', [False, True])
def test_the_loss_in_chunks_is_the_plain_one_and_so_are_its_gradients(sizes, tied, monkeypatch):
    cfg = micro.config('pretrain')
    cfg.model.tied = tied
    graphdef, params = micro.params(cfg)
    batch, mesh = micro.batch(cfg), sizes and mesh_of(sizes)

    def found():
        def loss(params, batch):
            total, count = objectives.OBJECTIVES['next_token'].total(models.merge(graphdef, params), batch)
            return total / count

        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            placed = jax.device_put(params, parallel.shardings(params, mesh)) if mesh else params
            on = parallel.put_batch(batch, mesh) if mesh else batch
            return jax.device_get(jax.jit(jax.value_and_grad(loss))(placed, on))

    devices = 1 if sizes is None else sizes[0] * sizes[1]
    monkeypatch.setattr(objectives, 'LEAST', 1)
    monkeypatch.setattr(objectives, 'LOGITS', 4 * 128 * 12)  # 12 tokens at once, of which no device's are a multiple
    assert objectives.chunk_of(8 * 32 // devices, 128) == min(12, 256 // devices // 16)
    chunked = found()
    monkeypatch.setattr(objectives, 'next_token', of_plain_logits)
    chex.assert_trees_all_close(chunked, found(), rtol=2e-5, atol=2e-6)


def test_tokens_that_are_not_learned_never_meet_the_output_layer(monkeypatch):
    """What stands at them is no number here, and would show in the loss."""
    monkeypatch.setattr(objectives, 'LEAST', 4)
    rng, learned = np.random.default_rng(0), np.zeros((2, 64), np.float32)
    learned[0, 5:13] = learned[1, 56:] = 1  # 16 tokens: two chunks of eight, of 16 chunks
    hidden = np.where(learned[..., None] > 0, rng.normal(size=(2, 64, 128)), np.nan).astype(np.float32)
    targets = rng.integers(0, 128, (2, 64))

    def loss(hidden):
        return objectives.next_token(Scores(128), hidden, jnp.asarray(targets), jnp.asarray(learned))[0]

    total, slopes = jax.value_and_grad(loss)(jnp.asarray(hidden))
    wanted = jax.value_and_grad(loss)(jnp.nan_to_num(jnp.asarray(hidden)))
    np.testing.assert_array_equal(total, wanted[0])
    np.testing.assert_array_equal(slopes, wanted[1])
    assert np.isfinite(total) and (np.asarray(slopes).any(-1) == (learned > 0)).all()


def test_a_chunk_is_a_part_of_a_batch_that_logits_have_room_for():
    assert objectives.chunk_of(100, 1024) == 100
    assert objectives.chunk_of(36 * 128, 1024) == 288
    assert objectives.chunk_of(32 * 1024, 50304) == (256 << 20) // (4 * 50304)
    assert objectives.chunk_of(32 * 1024, 1 << 20) == 256
