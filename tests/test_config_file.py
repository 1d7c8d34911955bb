"""config.json: what is written is read, from anywhere, and a damaged one is a sentence."""

import json
import os
import shutil

import pytest
from conftest import parse

from nanovision_jax.errors import UserError
from nanovision_jax.runs import config_file as runconfig
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.stages import STAGES


def saved(folder, stage='sft', *overrides, **options):
    config = parse(stage, f'run_dir={folder}', *overrides, **options)
    os.makedirs(folder)
    runconfig.save(config)
    return config


@pytest.mark.parametrize('stage', STAGES)
def test_json_and_back(stage, tmp_path):
    config = saved(tmp_path / 'x' / stage, stage, 'model.vision.std=(0.1, 0.2, 0.3)', 'optim.b1=0.7', size='d4')
    again = runconfig.read(tmp_path / 'x' / stage)
    assert runconfig.differences(config, again) == [] and again.stage == config.stage
    assert again.model == config.model and again.optim == config.optim
    assert again.model.vision.std == (0.1, 0.2, 0.3)
    assert hash(again.model) == hash(config.model)  # models are static arguments of compiled functions


def test_paths_are_kept_relative_to_the_run_and_found_after_a_move(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = ['data.source=conversations', 'data.path=mine/x.json', 'data.images=/elsewhere/images.zip']
    (tmp_path / 'tower').mkdir()
    saved('runs/a/sft', 'sft', *place, 'model.tower=tower', 'data.tokenizer=gpt2')
    kept = json.loads((tmp_path / 'runs/a/sft/config.json').read_text())
    assert kept['data']['path'] == '../../../mine/x.json' and kept['run_dir'] == '.'
    assert kept['data']['images'] == '/elsewhere/images.zip'
    assert kept['model']['tower'] == '../../../tower' and kept['data']['tokenizer'] == 'gpt2'
    assert runconfig.read('runs/a/sft').data.path == 'mine/x.json'
    monkeypatch.chdir(tmp_path / 'runs')
    assert runconfig.read('a/sft').data.path == '../mine/x.json'
    (tmp_path / 'moved').mkdir()
    shutil.move(tmp_path / 'runs', tmp_path / 'moved' / 'runs')
    read = runconfig.read(tmp_path / 'moved/runs/a/sft')
    assert read.data.path == str(tmp_path / 'moved/mine/x.json')
    assert read.run_dir == str(tmp_path / 'moved/runs/a/sft')
    assert read.data.images == '/elsewhere/images.zip' and read.data.tokenizer == 'gpt2'


def test_an_absolute_path_inside_the_family_moves_with_it(tmp_path):
    saved(tmp_path / 'a' / 'sft')  # tiny_world's data lie in the family
    (tmp_path / 'a').rename(tmp_path / 'b')
    assert runconfig.read(tmp_path / 'b' / 'sft').data.path == str(tmp_path / 'b' / 'data')


def test_where_a_run_lives_is_where_it_was_opened(tmp_path):
    saved(tmp_path / 'a' / 'sft')
    file = tmp_path / 'a' / 'sft' / 'config.json'
    file.write_text(file.read_text().replace('"run_dir": "."', '"run_dir": "/etc/x"'))
    config = runconfig.read(tmp_path / 'a' / 'sft')
    assert config.run_dir == str(tmp_path / 'a' / 'sft') and config.family == tmp_path / 'a'


def test_a_data_set_is_not_made_where_a_file_says(tmp_path):
    saved(tmp_path / 'a' / 'sft')
    file = tmp_path / 'a' / 'sft' / 'config.json'
    file.write_text(file.read_text().replace('"path": "../data"', f'"path": "{tmp_path}/elsewhere"'))
    assert runconfig.read(tmp_path / 'a' / 'sft').data.path == str(tmp_path / 'a' / 'data')
    (tmp_path / 'elsewhere').mkdir()  # where it is, it is read
    assert runconfig.read(tmp_path / 'a' / 'sft').data.path == f'{tmp_path}/elsewhere'


@pytest.mark.parametrize('here', ['', 'runs'])
def test_an_older_run_s_paths_are_relative_to_where_it_was_trained(tmp_path, monkeypatch, here):
    config = saved(tmp_path / 'runs/a/sft', 'sft', 'data.source=conversations', 'data.path=/mine/x.json')
    values = json.loads(runconfig.to_json(config))
    values['run_dir'], values['data']['path'] = 'runs/a/sft', 'mine/x.json'
    (tmp_path / 'runs/a/sft/config.json').write_text(json.dumps(values))
    monkeypatch.chdir(tmp_path / here)
    found = runconfig.read(os.path.relpath(tmp_path / 'runs/a/sft'))
    assert os.path.abspath(found.data.path) == str(tmp_path / 'mine/x.json')


@pytest.mark.parametrize(
    ('content', 'told'),
    [
        ('', 'holds no JSON'),
        ('{"stage": "sft"', 'holds no JSON'),
        ('[]', 'holds no JSON object'),
        ('[' * 100_000, 'holds no JSON'),
        ('{"optim": {"leaning_rate": 1}}', "a field this version does not know: 'leaning_rate'"),
        ('{"optim": 3}', '3 is no group of fields'),
        ('{"steps": "many"}', "steps is 'many'"),
        ('{"stage": "foo"}', "its stage is 'foo'"),
        ('{}', 'its stage is None'),
    ],
)
def test_a_damaged_config_is_one_sentence(tmp_path, content, told):
    (tmp_path / 'config.json').write_text(content)
    with pytest.raises(UserError, match=told) as error:
        runconfig.read(tmp_path)
    assert str(tmp_path) in str(error.value) and '\n' not in str(error.value)


def test_differences_are_those_that_change_results(tmp_path, monkeypatch):
    config = parse('sft')
    assert runconfig.differences(config, config) == []
    free = ['name=other', 'run_dir=runs/tiny/other', 'data.workers=3', 'checkpoint.every=7', 'checkpoint.keep=9']
    free += ['eval.every=3', 'eval.batches=2', 'log.every=1', 'log.to=tensorboard', 'mesh.data=1', 'mesh.fsdp=2']
    free += ['model.remat=full', 'model.attention=xla']
    free += ['data.path=./runs/tiny/data/']  # where it was by default
    assert runconfig.differences(config, parse('sft', *free)) == []
    seen = ['steps=3', 'seed=1', 'dtype=bfloat16', 'data.length=128', 'data.batch_size=16', 'optim.b1=0.5']
    seen += ['model.layers=2', 'model.vision.fit=pad', 'optim.learning_rate=0.1', 'data.images=x.zip']
    seen += ['optim.accumulate=2', 'optim.reduce_dtype=bfloat16']
    for override in seen:
        assert runconfig.differences(config, parse('sft', override)) == [override.partition('=')[0]]


def test_what_is_published_holds_no_path(tmp_path):
    (tmp_path / 'secret').mkdir()
    place = ['data.source=text', f'data.path={tmp_path}/secret/text.txt', f'data.tokenizer={tmp_path}/secret']
    config = parse('pretrain', f'run_dir={tmp_path}/runs/x/pretrain', *place)
    told = runconfig.public(config)
    assert str(tmp_path) not in json.dumps(told)
    assert (told['data']['path'], told['data']['tokenizer'], told['run_dir']) == ('text.txt', 'secret', 'pretrain')


@pytest.mark.parametrize('content', ['', '{"parents": [', '[]', '{"parents": 3}'])
def test_a_damaged_lineage_is_one_sentence(tmp_path, content):
    assert runfolder.read_lineage(tmp_path) == {}
    (tmp_path / 'lineage.json').write_text(content)
    with pytest.raises(UserError, match=r'lineage.json is damaged'):
        runfolder.read_lineage(tmp_path)


# Names ---------------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_told_apart_from_a_path_by_what_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runconfig.hub_id('openai/clip') == 'openai/clip'
    (tmp_path / 'openai').mkdir()  # a folder of the owner's name changes nothing
    assert runconfig.hub_id('openai/clip') == 'openai/clip'
    (tmp_path / 'openai' / 'clip').mkdir()
    assert runconfig.hub_id('openai/clip') is None
    assert runconfig.hub_id('hf:openai/clip') == 'openai/clip'
    for path in ('./openai/none', '/openai/none', '~/none', '../none'):
        assert runconfig.hub_id(path) is None


# Whole files ---------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    runfolder.write_whole(tmp_path / 'x.json', 'old')

    def fails(*_):
        raise OSError('no room')

    monkeypatch.setattr(os, 'replace', fails)
    with pytest.raises(OSError, match='no room'):
        runfolder.write_whole(tmp_path / 'x.json', 'new')
    assert (tmp_path / 'x.json').read_text() == 'old'
