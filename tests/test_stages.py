"""What each stage trains, and its loss."""

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest

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


# Losses --------------------------------------------------------------------------------------------------------------


def test_the_loss_of_tokens_is_summed_over_what_is_learned():
    rng, (b, t, v) = np.random.default_rng(0), (3, 5, 7)
    logits = rng.normal(size=(b, t, v)).astype(np.float32)
    logits[..., 5:] = -np.inf  # the padded vocabulary
    targets, weights = rng.integers(0, 5, (b, t)), rng.integers(0, 2, (b, t)).astype(np.float32)
    arrays = map(jnp.asarray, (logits, targets, weights))
    total, count = objectives.next_token(lambda hidden: hidden, *arrays)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = [-np.log(chances[i, j, targets[i, j]]) for i, j in zip(*np.nonzero(weights), strict=True)]
    np.testing.assert_allclose(total, sum(wanted), rtol=1e-5)
    assert count == len(wanted)


def test_only_vision_stages_hand_pictures_to_the_model():
    for stage, given in (('pretrain', 3), ('vision_instruct', 4)):
        batch, seen = jax.tree.map(jnp.asarray, micro.batch(micro.config(stage))), []

        class Model:
            def hidden(self, *inputs, seen=seen):
                seen.extend(inputs)
                return jnp.zeros((*inputs[0].shape, 128))

            def logits(self, hidden):
                return hidden

        objectives.OBJECTIVES[STAGES[stage].objective].total(Model(), batch)
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
