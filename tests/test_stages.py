"""What each stage trains, and its loss."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import micro
import numpy as np
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
    """Stands for a decoder: its hidden states are its logits."""

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    def logits(self, hidden):
        return hidden

    def output_kernel(self):
        return jnp.eye(self.vocabulary)


# Losses --------------------------------------------------------------------------------------------------------------


def test_the_loss_of_tokens_is_summed_over_what_is_learned():
    rng, (b, t, v) = np.random.default_rng(0), (3, 5, 7)
    logits = rng.normal(size=(b, t, v)).astype(np.float32)
    logits[..., 5:] = -np.inf  # the padded vocabulary
    targets, weights = rng.integers(0, 5, (b, t)), rng.integers(0, 2, (b, t)).astype(np.float32)
    arrays = map(jnp.asarray, (logits, targets, weights))
    total, count = objectives.next_token(Scores(v), *arrays)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = [-np.log(chances[i, j, targets[i, j]]) for i, j in zip(*np.nonzero(weights), strict=True)]
    np.testing.assert_allclose(total, sum(wanted), rtol=1e-5)
    assert count == len(wanted)


def test_only_vision_stages_hand_pictures_to_the_model():
    for stage, given in (('pretrain', 3), ('vision_instruct', 4)):
        batch, seen = jax.tree.map(jnp.asarray, micro.batch(micro.config(stage))), []

        class Model(Scores):
            def hidden(self, *inputs, seen=seen):
                seen.extend(inputs)
                return jnp.zeros((*inputs[0].shape, 128))

        objectives.OBJECTIVES[STAGES[stage].objective].total(Model(128), batch)
        names = ('tokens', 'positions', 'segments', 'images')
        assert len(seen) == given and all(x is batch[name] for x, name in zip(seen, names, strict=False))


def test_the_loss_of_pairs_counts_pairs():
    logits = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    batch = micro.batch(micro.config('clip'))
    batch['images'] = batch['images'][:4]

    class Towers:
        contrastive = 'softmax'

        def embed(self, *_):
            return ()

        def logits(self):
            return jnp.asarray(logits)

    total, count = objectives.OBJECTIVES['contrastive'].total(Towers(), batch)
    rows, columns = (np.exp(logits) / np.exp(logits).sum(axis, keepdims=True) for axis in (1, 0))
    wanted = -(np.log(np.diag(rows)) + np.log(np.diag(columns))).mean() / 2
    np.testing.assert_allclose(total / count, wanted, rtol=1e-5)
    assert count == 4


# Losses in chunks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('sizes', [None, (1, 1, 1), (4, 2, 1), (2, 2, 2)])
@pytest.mark.parametrize('tied', [False, True])
def test_the_loss_in_chunks_is_the_plain_one_and_so_are_its_gradients(sizes, tied, monkeypatch):
    cfg = micro.config('pretrain')
    cfg.model.tied = tied
    graphdef, params = micro.params(cfg)
    batch = micro.batch(cfg)

    def loss(params, batch):
        total, count = objectives.OBJECTIVES['next_token'].total(models.merge(graphdef, params), batch)
        return total / count

    def found():
        mesh = sizes and mesh_of(sizes)
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            placed = jax.device_put(params, parallel.shardings(params, mesh)) if mesh else params
            on = parallel.put_batch(batch, mesh) if mesh else batch
            return jax.device_get(jax.jit(jax.value_and_grad(loss))(placed, on))

    plain = found()
    monkeypatch.setattr(objectives, 'LOGITS', 4 * 128 * 16)  # 16 tokens at once
    seen, in_chunks = [], objectives._chunked

    def watched(*args):
        seen.append(args[4])
        return in_chunks(*args)

    monkeypatch.setattr(objectives, '_chunked', watched)
    chunked = found()
    devices = 1 if sizes is None else sizes[0] * sizes[1]
    assert seen == [8 * 32 // devices // 16]
    chex.assert_trees_all_close(chunked, plain, rtol=2e-5, atol=2e-6)


def test_a_device_whose_own_logits_are_small_makes_them_at_once(monkeypatch):
    """However many there are on all devices together: chunks would cost time and spare nothing."""
    graphdef, params = micro.params(micro.config('pretrain'))
    batch, mesh = micro.batch(micro.config('pretrain')), mesh_of((4, 2, 1))
    monkeypatch.setattr(objectives, 'LOGITS', 4 * 128 * 32)  # a row of 32 tokens, of eight
    with jax.set_mesh(mesh):
        total = objectives.OBJECTIVES['next_token'].total
        loss = jax.make_jaxpr(lambda params, batch: total(models.merge(graphdef, params), batch))
        program = str(loss(params, parallel.put_batch(batch, mesh)))
    assert 'f32[8,32,128]' in program and 'shard_map' not in program
