"""What each stage trains, what it starts from, and its loss."""

import json
import shutil

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest

from nanovision_jax import checkpoint, models, stages, train
from nanovision_jax import config as configs
from nanovision_jax.data.tokenizer import Tokenizer
from nanovision_jax.errors import UserError
from nanovision_jax.models.clip import softmax_loss


@pytest.fixture(scope='module')
def family(tmp_path_factory, tokenizer_folder):
    """A family in which every stage is done, with models that never learned."""
    folder = tmp_path_factory.mktemp('family')
    shutil.copytree(tokenizer_folder, folder / 'tokenizer')
    for stage in micro.STAGES:
        micro.parent_run(folder, stage)
    return folder


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
    parts = train.split_params(stage, params)
    assert (set(parts[0]), set(parts[1])) == (trained, frozen)
    assert parts[0] | parts[1] == params


# Losses --------------------------------------------------------------------------------------------------------------


def test_the_loss_of_tokens_is_summed_over_what_is_learned():
    rng, (b, t, v) = np.random.default_rng(0), (3, 5, 7)
    logits = rng.normal(size=(b, t, v)).astype(np.float32)
    logits[..., 5:] = -np.inf  # the padded vocabulary
    targets, weights = rng.integers(0, 5, (b, t)), rng.integers(0, 2, (b, t)).astype(np.float32)
    batch = {name: jnp.zeros((b, t), jnp.int32) for name in ('tokens', 'positions', 'segments')}
    total, count = stages.loss('sft', lambda *_: jnp.asarray(logits), batch | {'targets': targets, 'weights': weights})
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = [-np.log(chances[i, j, targets[i, j]]) for i, j in zip(*np.nonzero(weights), strict=True)]
    np.testing.assert_allclose(total, sum(wanted), rtol=1e-5)
    assert count == len(wanted)


def test_only_vision_stages_hand_pictures_to_the_model():
    for stage, given in (('pretrain', 3), ('vision_instruct', 4)):
        batch, seen = micro.batch(micro.config(stage)), []

        def model(*inputs):
            seen.extend(inputs)
            return jnp.zeros((*inputs[0].shape, 128))

        stages.loss(stage, model, batch)
        names = ('tokens', 'positions', 'segments', 'images')
        assert len(seen) == given and all(x is batch[name] for x, name in zip(seen, names, strict=False))


def test_the_loss_of_pairs_counts_pairs():
    logits = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    batch = micro.batch(micro.config('clip'))
    batch['images'] = batch['images'][:4]

    class Towers:
        loss = staticmethod(softmax_loss)

        def __call__(self, *_):
            return jnp.asarray(logits)

    total, count = stages.loss('clip', Towers(), batch)
    rows, columns = (np.exp(logits) / np.exp(logits).sum(axis, keepdims=True) for axis in (1, 0))
    wanted = -(np.log(np.diag(rows)) + np.log(np.diag(columns))).mean() / 2
    np.testing.assert_allclose(total / count, wanted, rtol=1e-5)
    assert count == 4


# What it starts from -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('stage', 'wanted'),
    [
        ('clip', []),
        ('pretrain', []),
        ('sft', [('pretrain', '', '')]),
        ('vision_pretrain', [('sft', '', 'decoder'), ('clip', 'vision', 'vision')]),
        ('vision_instruct', [('vision_pretrain', '', '')]),
    ],
)
def test_each_stage_finds_its_parents_beside_it(family, stage, wanted):
    found = stages.parents(micro.run_config(stage, family))
    assert [(parent.run_dir, parent.part, parent.target) for parent in found] == [
        (family / run, part, target) for run, part, target in wanted
    ]
    assert all(parent.step == 7 for parent in found)


def test_a_vision_run_may_start_from_a_decoder_that_never_chatted(family, tmp_path):
    cfg = micro.run_config('vision_pretrain', tmp_path, init_from=str(family / 'pretrain'))
    cfg.model.tower = str(family / 'clip')
    assert [parent.run_dir for parent in stages.parents(cfg)] == [family / 'pretrain', family / 'clip']


@pytest.mark.parametrize('stage', ['clip', 'pretrain'])
def test_a_first_stage_may_start_from_a_run_of_its_own(family, tmp_path, stage):
    cfg = micro.run_config(stage, tmp_path, init_from=str(family / stage))
    assert [(parent.run_dir, parent.part) for parent in stages.parents(cfg)] == [(family / stage, '')]
    cfg.init_from = str(family / 'sft')
    with pytest.raises(UserError, match=f'{stage} cannot start from \\S+, a sft run: it takes {stage}.'):
        stages.parents(cfg)


@pytest.mark.parametrize(('stage', 'first'), [('sft', 'pretrain'), ('vision_instruct', 'vision_pretrain')])
def test_a_missing_parent_is_answered_with_the_command_that_makes_it(tmp_path, stage, first):
    cfg = micro.run_config(stage, tmp_path)
    command = f'python -m nanovision_jax.train --config=configs/{first}.py:micro'
    with pytest.raises(UserError, match=rf'{stage} starts from the run {tmp_path}/{first}, .* Make it: {command}$'):
        stages.parents(cfg)
    cfg.name = 'mine'
    with pytest.raises(UserError, match=f'{command} --config.name=mine$'):
        stages.parents(cfg)


def test_a_missing_tower_is_answered_with_the_command_that_makes_it(family, tmp_path):
    cfg = micro.run_config('vision_pretrain', tmp_path, init_from=str(family / 'sft'))
    with pytest.raises(UserError, match=rf'the run {tmp_path}/clip, .*--config=configs/clip.py:micro$'):
        stages.parents(cfg)


def test_a_parent_that_never_saved_is_missing(family, tmp_path):
    shutil.copytree(family / 'pretrain', tmp_path / 'pretrain')
    (tmp_path / 'pretrain' / 'checkpoints' / '7' / 'manifest.json').unlink()
    with pytest.raises(UserError, match='which does not exist'):
        stages.parents(micro.run_config('sft', tmp_path))


@pytest.mark.parametrize(('stage', 'given'), [('sft', 'sft'), ('vision_pretrain', 'clip'), ('vision_instruct', 'sft')])
def test_a_parent_of_the_wrong_stage_is_refused(family, stage, given):
    cfg = micro.run_config(stage, family, init_from=str(family / given))
    with pytest.raises(UserError, match=rf'{stage} cannot start from {family}/{given}, a {given} run: it takes'):
        stages.parents(cfg)


@pytest.mark.parametrize(
    ('stage', 'field', 'value'),
    [
        ('sft', 'model.layers', 3),
        ('sft', 'model.rope_theta', 1e4),
        ('vision_pretrain', 'model.width', 64),
        ('vision_pretrain', 'model.vision.image_size', 32),
        ('vision_pretrain', 'model.vision.mean', (0.5, 0.5, 0.5)),
        ('vision_instruct', 'model.projector', 'linear'),
        ('vision_instruct', 'model.vision.fit', 'pad'),
    ],
)
def test_another_size_than_the_parents_is_refused(family, stage, field, value):
    cfg = micro.run_config(stage, family)
    part, _, name = field.rpartition('.')
    theirs = configs.get(cfg, field)
    setattr(configs.get(cfg, part), name, value)
    with pytest.raises(UserError) as error:
        stages.parents(cfg)
    assert str(error.value).startswith(f'{field} is {value} here and {theirs} in {family}')


def test_another_tokenizer_than_the_parents_is_refused(family, tmp_path):
    shutil.copytree(family / 'tokenizer', tmp_path / 'tokenizer')
    file = tmp_path / 'tokenizer' / 'tokenizer.json'
    file.write_text(json.dumps(json.loads(file.read_text()), indent=4))
    other = Tokenizer(tmp_path / 'tokenizer')
    for parent in stages.parents(micro.run_config('vision_pretrain', family)):
        stages.check_tokenizer(parent, Tokenizer(family / 'tokenizer'))
        if parent.part == 'vision':
            stages.check_tokenizer(parent, other)  # a tower alone has nothing to do with words
        else:
            with pytest.raises(UserError, match=f'{family}/sft was trained with another tokenizer than {tmp_path}'):
                stages.check_tokenizer(parent, other)


@pytest.mark.parametrize('stage', ['sft', 'vision_pretrain', 'vision_instruct'])
def test_parents_parameters_are_inherited_bit_for_bit(family, stage):
    cfg, tokenizer = micro.run_config(stage, family), Tokenizer(family / 'tokenizer')
    fresh = jax.device_put(micro.params(cfg, tokenizer, seed=1)[1])
    params = fresh
    for parent in stages.parents(cfg):
        params = stages.inherit(parent, params, tokenizer.size)
    theirs = {name: micro.params(micro.run_config(name, family), tokenizer)[1] for name in micro.STAGES}
    if stage == 'vision_pretrain':
        wanted = {'decoder': theirs['sft'], 'vision': theirs['clip']['vision'], 'projector': fresh['projector']}
        assert checkpoint.tree_digest(theirs['sft']) != checkpoint.tree_digest(fresh['decoder'])
    else:
        wanted = theirs['pretrain' if stage == 'sft' else 'vision_pretrain']
    micro.assert_same(params, wanted)


def test_shapes_can_inherit_too(family):
    """What only plans or shows a run hands shapes with shardings instead of arrays."""
    cfg, tokenizer = micro.run_config('sft', family), Tokenizer(family / 'tokenizer')
    shapes = models.abstract(cfg, tokenizer.size, tokenizer.image)[1]
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes)
    (parent,) = stages.parents(cfg)
    micro.assert_same(stages.inherit(parent, shapes, tokenizer.size), micro.params(cfg, tokenizer)[1])
