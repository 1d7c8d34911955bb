"""Where a run starts: the order of the sources, what they fix, what contradicts, and what is read of them."""

import json
import shutil

import jax
import micro
import pytest
from conftest import ROOT, parse

from nanovision_jax import cli, models
from nanovision_jax import config as configs
from nanovision_jax.data import pipeline
from nanovision_jax.data.tokenizer import Tokenizer
from nanovision_jax.errors import UserError
from nanovision_jax.runs import checkpoint
from nanovision_jax.runs import config_file as runconfig
from nanovision_jax.training import start
from nanovision_jax.training.load import load_parameters


@pytest.fixture(scope='module')
def family(tmp_path_factory, tokenizer_folder):
    """A family in which every stage is done, with models that never learned."""
    folder = tmp_path_factory.mktemp('family')
    shutil.copytree(tokenizer_folder, folder / 'tokenizer')
    for stage in micro.STAGES:
        micro.parent_run(folder, stage)
    return folder


# The order ----------------------------------------------------------------------------------------------------------


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
    found = start.find(micro.run_config(stage, family), anew=True)
    assert [(parent.folder, parent.part, parent.target) for parent in found] == [
        (family / run, part, target) for run, part, target in wanted
    ]
    for source in found:
        source.prove()
        assert source.step == 7 and str(source) == f'{source.folder}, step 7'


def test_a_vision_run_may_start_from_a_decoder_that_never_chatted(family, tmp_path):
    cfg = micro.run_config('vision_pretrain', tmp_path, init_from=str(family / 'pretrain'))
    cfg.model.tower = str(family / 'clip')
    assert [parent.folder for parent in start.find(cfg)] == [family / 'pretrain', family / 'clip']


@pytest.mark.parametrize('stage', micro.STAGES)
def test_a_stage_may_start_from_a_run_of_its_own(family, tmp_path, stage):
    cfg = micro.run_config(stage, tmp_path, init_from=str(family / stage))
    assert [(source.folder, source.part, source.target) for source in start.find(cfg)] == [(family / stage, '', '')]
    if stage not in ('clip', 'pretrain'):
        return
    cfg.init_from = str(family / 'sft')
    with pytest.raises(UserError, match=f'{stage} cannot start from \\S+, a sft run: it takes {stage}.'):
        start.find(cfg)


@pytest.mark.parametrize(('stage', 'first'), [('sft', 'pretrain'), ('vision_instruct', 'vision_pretrain')])
def test_a_missing_parent_is_answered_with_the_command_that_makes_it(tmp_path, monkeypatch, stage, first):
    cfg = micro.run_config(stage, tmp_path)
    command = f'python -m nanovision_jax.train --config=configs/{first}.py:micro --config.run_dir={tmp_path}/{first}'
    with pytest.raises(UserError, match=rf'{stage} starts from the run {tmp_path}/{first}, .* Make it: {command}$'):
        start.find(cfg)
    monkeypatch.chdir(tmp_path)
    cfg.name, cfg.run_dir = 'mine', f'runs/mine/{stage}'
    with pytest.raises(UserError, match=f'configs/{first}.py:micro --config.name=mine$'):
        start.find(cfg)


def test_a_missing_tower_is_answered_with_the_command_that_makes_it(family, tmp_path):
    cfg = micro.run_config('vision_pretrain', tmp_path, init_from=str(family / 'sft'))
    with pytest.raises(
        UserError, match=rf'the run {tmp_path}/clip, .*--config=configs/clip.py:micro --config.run_dir={tmp_path}/clip$'
    ):
        start.find(cfg)


def test_a_parent_that_never_saved_is_missing(family, tmp_path):
    shutil.copytree(family / 'pretrain', tmp_path / 'pretrain')
    (tmp_path / 'pretrain' / 'checkpoints' / '7' / 'manifest.json').unlink()
    with pytest.raises(UserError, match='which does not exist or has no checkpoint'):
        start.find(micro.run_config('sft', tmp_path))


@pytest.mark.parametrize(
    ('stage', 'given'), [('sft', 'vision_pretrain'), ('vision_pretrain', 'clip'), ('vision_instruct', 'sft')]
)
def test_a_parent_of_the_wrong_stage_is_refused(family, tmp_path, stage, given):
    with pytest.raises(UserError, match=rf'{stage} cannot start from {family}/{given}, a {given} run: it takes'):
        micro.run_config(stage, tmp_path, init_from=str(family / given))


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
def test_what_is_given_and_contradicts_is_refused(family, tmp_path, stage, field, value):
    mine = bare(family, tmp_path, 'clip', *before(stage))
    theirs = configs.get(micro.run_config(stage, mine), field)
    with pytest.raises(UserError) as error:
        micro.run_config(stage, mine, **{field.replace('.', '__'): value})
    assert str(error.value).startswith(f'{field} is {value!r} here and {theirs!r} in {mine}')
    assert str(error.value).endswith('leave it out, or choose another --config.name.')


def test_a_config_that_was_not_filled_is_compared_too(family, tmp_path):
    cfg = micro.run_config('sft', bare(family, tmp_path, 'pretrain'))
    cfg.model.layers = 3
    with pytest.raises(UserError, match=r'model.layers is 3 here and 2 in \S+/pretrain'):
        start.check(cfg, start.find(cfg))


def before(stage):
    return [other for other in micro.STAGES[: micro.STAGES.index(stage)] if other != 'clip']


def bare(family, folder, *stages):
    """A family of those stages alone, and the tokenizer."""
    for name in ('tokenizer', *stages):
        shutil.copytree(family / name, folder / name)
    return folder


def seen(stage, family, *overrides):
    """As the command line has it: nothing of the model is given, and the dial stands at tiny."""
    return parse(stage, f'run_dir={family}/{stage}', 'data.length=64', *overrides)


# What is taken over --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('stage', ['sft', 'vision_pretrain', 'vision_instruct'])
def test_a_stage_takes_over_what_is_not_given(family, tmp_path, stage, capsys):
    mine = bare(family, tmp_path, 'clip', *before(stage))
    cfg = seen(stage, mine)
    wanted = micro.run_config(stage, family).model
    assert (cfg.model.width, cfg.model.heads, cfg.model.positions) == (32, 4, 128)
    if stage != 'sft':
        assert cfg.model.vision == wanted.vision
    assert 'model.width=32' in capsys.readouterr().out
    start.check(cfg, start.find(cfg))
    with pytest.raises(UserError, match=r'model.width is 64 here and 32 in'):
        seen(stage, mine, 'model.width=64')


def test_init_from_a_run_of_another_size_takes_one_field(family, tmp_path):
    cfg = seen('vision_pretrain', tmp_path, f'init_from={family}/sft', f'model.tower={family}/clip')
    assert (cfg.model.width, cfg.model.vision.image_size) == (32, 16)
    tokenizer = pipeline.family_tokenizer(cfg, start.find(cfg)[0].tokenizer)
    assert tokenizer.folder == tmp_path / 'tokenizer' and tokenizer.digest == Tokenizer(family / 'tokenizer').digest


def test_sizes_in_a_config_file_are_given(family, tmp_path):
    mine = bare(family, tmp_path, 'pretrain')
    file = tmp_path / 'mine.py'
    file.write_text(
        (ROOT / 'configs/sft.py')
        .read_text()
        .replace('    return config', '    config.model.width = 48\n    return config')
    )
    with pytest.raises(UserError, match=r'model.width is 48 here and 32 in'):
        cli.parse([f'--config={file}:tiny', f'--config.run_dir={mine}/sft'])


def test_a_run_that_goes_on_takes_over_its_own_shape(family, tmp_path):
    mine = bare(family, tmp_path, 'sft')  # what it started from is gone
    cfg = seen('sft', mine)
    assert cfg.model.width == 32
    assert [str(source) for source in start.find(cfg)] == [str(mine / 'sft')]
    with pytest.raises(start.Missing):
        start.find(cfg, anew=True)


def test_the_order_of_the_sources(family, tmp_path):
    """A finished pretrain run goes before the decoder that it started from; init_from goes before both."""
    mine = bare(family, tmp_path / 'a', 'pretrain')
    cfg = runconfig.read(mine / 'pretrain')
    cfg.model.decoder = str(tmp_path / 'decoder')  # continued pretraining of a decoder that is not there any more
    runconfig.save(cfg)
    micro.restamp(mine / 'pretrain')
    sft = seen('sft', mine)
    assert sft.model.decoder == str(tmp_path / 'decoder')
    assert [source.folder for source in start.find(sft)] == [mine / 'pretrain']
    other = seen('sft', mine, f'init_from={family}/pretrain')
    assert [source.folder for source in start.find(other)] == [family / 'pretrain']
    with pytest.raises(UserError, match=r"model.decoder is 'another/one' here and '\S+/decoder' in \S+/pretrain"):
        seen('sft', mine, 'model.decoder=another/one')
    assert start.lines(sft, []) == ['sft starts from random numbers']
    (source,) = start.find(sft)
    source.prove()
    assert start.lines(sft, [source]) == [f'sft starts from {mine}/pretrain, step 7']


def test_another_tokenizer_than_the_parents_is_refused(family, tmp_path):
    mine = bare(family, tmp_path, 'sft', 'clip')
    file = mine / 'tokenizer' / 'tokenizer.json'
    file.write_text(json.dumps(json.loads(file.read_text()), indent=4))
    cfg = seen('vision_pretrain', mine)
    decoder, tower = start.find(cfg)
    assert tower.tokenizer is None  # a tower alone has nothing to do with words
    with pytest.raises(UserError, match=rf'{mine}/sft was trained with another tokenizer than {mine}/tokenizer'):
        pipeline.family_tokenizer(cfg, decoder.tokenizer)


def test_one_tokenizer_by_two_names_is_one(family, tmp_path, tokenizer_folder):
    """The name says where it lay; what counts is what it is."""
    for name in ('one', 'two'):
        shutil.copytree(tokenizer_folder, tmp_path / name)
    made = pipeline.family_tokenizer(seen('pretrain', tmp_path / 'x', f'data.tokenizer={tmp_path}/one'))
    kept = (made.folder / 'source.json').read_text()
    assert str(tmp_path) not in kept
    shutil.rmtree(tmp_path / 'one')
    again = pipeline.family_tokenizer(seen('sft', tmp_path / 'x', f'data.tokenizer={tmp_path}/two'))
    assert again.digest == made.digest
    (made.folder / 'source.json').write_text(json.dumps({'data.tokenizer': f'{tmp_path}/one'}))  # as older runs say it
    assert (
        pipeline.family_tokenizer(seen('sft', tmp_path / 'x', f'data.tokenizer={tmp_path}/two')).digest == made.digest
    )
    file = tmp_path / 'two' / 'tokenizer.json'
    content = json.loads(file.read_text())
    content['model']['merges'].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match='a name has one tokenizer'):
        pipeline.family_tokenizer(seen('sft', tmp_path / 'x', f'data.tokenizer={tmp_path}/two'))


def test_a_vocabulary_that_the_family_s_tokenizer_has_not_is_refused(llava_folder, tmp_path):
    place = ['data.source=conversations', f'data.path={llava_folder}/instruct.json']
    pipeline.family_tokenizer(seen('sft', tmp_path, *place, 'data.vocab_size=300'))
    assert seen('sft', tmp_path, *place).data.vocab_size == 300
    assert seen('sft', tmp_path, *place, 'data.vocab_size=300').data.vocab_size == 300
    with pytest.raises(UserError, match=r'data.vocab_size is 400, but the tokenizer in \S+ was trained for 300'):
        seen('sft', tmp_path, *place, 'data.vocab_size=400')


# What is read --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('stage', ['sft', 'vision_pretrain', 'vision_instruct'])
def test_parents_parameters_are_inherited_bit_for_bit(family, stage):
    cfg, tokenizer = micro.run_config(stage, family), Tokenizer(family / 'tokenizer')
    fresh = jax.device_put(micro.params(cfg, tokenizer, seed=1)[1])
    params = fresh
    for source in start.find(cfg, anew=True):
        source.prove()
        params = load_parameters([source], params, tokenizer.size)
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
    (source,) = start.find(cfg, anew=True)
    source.prove()
    micro.assert_same(load_parameters([source], shapes, tokenizer.size), micro.params(cfg, tokenizer)[1])
