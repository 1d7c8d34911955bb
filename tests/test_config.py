"""Configs: each mistake is one sentence, overrides arrive, the recipes are the published ones, nothing heavy loads."""

import ast
import dataclasses
import itertools
import subprocess
import sys

import pytest
from conftest import ROOT, parse

from nanovision_jax import cli
from nanovision_jax import config as configs
from nanovision_jax.errors import UserError, nearest
from nanovision_jax.stages import STAGES

SFT, PRETRAIN, CLIP, VISION = (
    f'--config={ROOT}/configs/{stage}.py:tiny' for stage in ('sft', 'pretrain', 'clip', 'vision_pretrain')
)

MISTAKES = {
    'no config': ([], 'which config'),
    'no config but a field': (['--config.steps=3'], 'which config'),
    'config without a value': (['--config'], 'needs a value'),
    'a missing file': ([f'--config={ROOT}/configs/sfd.py'], "Did you mean '{root}/configs/sft.py'"),
    'an empty file name': (['--config='], 'no config file'),
    'a folder': ([f'--config={ROOT}/configs'], 'no config file'),
    'an unknown size': ([SFT.replace('tiny', 'tny')], "no size 'tny'"),
    'an odd depth': ([SFT.replace('tiny', 'd7')], "no size 'd7'"),
    'no depth': ([SFT.replace('tiny', 'd0')], "no size 'd0'"),
    'an empty size': ([SFT.replace('tiny', '')], "no size ''"),
    'an unknown field': ([SFT, '--config.optim.learning_rat=1'], "Did you mean 'optim.learning_rate'"),
    'an unknown top field': ([SFT, '--config.setps=1'], "Did you mean 'steps'"),
    'a group of fields': ([SFT, '--config.optim=1'], "no config field 'optim'"),
    'the size as a field': ([SFT, '--config.size=d20'], 'sft.py:d20'),
    'a field without a value': ([SFT, '--config.steps'], '--config.steps needs a value'),
    'an int that is none': ([SFT, '--config.steps=many'], "takes int, not 'many'"),
    'an int with a fraction': ([SFT, '--config.steps=1.5'], "takes int, not '1.5'"),
    'a float that is none': ([SFT, '--config.optim.learning_rate=high'], "takes float, not 'high'"),
    'a bool that is none': ([SFT, '--config.data.augment=perhaps'], "takes bool, not 'perhaps'"),
    'two numbers for three': ([SFT, '--config.model.vision.mean=(0.5, 0.5)'], 'takes three numbers'),
    'an unknown flag': ([SFT, '--resme'], "Did you mean '--resume'"),
    'an unknown flag with a value': ([SFT, '--stpes=3'], 'unknown argument --stpes'),
    'a flag that is neither': ([SFT, '--resume=perhaps'], "--resume takes bool, not 'perhaps'"),
    'a stray word': ([SFT, 'junk'], "unexpected argument 'junk'"),
    'one dash': ([SFT, '-v'], "unexpected argument '-v'"),
    'a bad schedule': ([SFT, '--config.optim.schedule=cosin'], "Did you mean 'cosine'"),
    'a bad source': ([SFT, '--config.data.source=tinyworld'], "Did you mean 'tiny_world'"),
    'a bad stage': ([SFT, '--config.stage=sfft'], "Did you mean 'sft'"),
    'a bad dtype': ([SFT, '--config.dtype=float'], "Did you mean 'float32'"),
    'a mixture without weights': ([SFT, '--config.data.mixture=magpie,chat'], "'magpie' is not NAME:WEIGHT"),
    'a weight that is none': ([SFT, '--config.data.mixture=magpie:much'], "'magpie:much' is not NAME:WEIGHT"),
    'a weight of nothing': ([SFT, '--config.data.mixture=magpie:0,chat:1'], "'magpie:0' is not NAME:WEIGHT"),
    'a weight without a name': ([SFT, '--config.data.mixture=:1'], "':1' is not NAME:WEIGHT"),
    'an unknown part': ([SFT, '--config.data.mixture=magpy:1,chat:1'], "Did you mean 'magpie'"),
    'a part that is text': ([SFT, '--config.data.mixture=fineweb_edu:1'], "no prepared conversations 'fineweb_edu'"),
    'a part twice': ([SFT, '--config.data.mixture=chat[:10%]:1,chat[10%:]:1'], 'names a data set twice'),
    'a mixture of text': ([PRETRAIN, '--config.data.mixture=magpie:1,chat:1'], 'stage pretrain learns from text'),
    'captions without pictures': ([CLIP, '--config.data.mixture=magpie:1,llava_pretrain:1'], 'magpie has none'),
    'features without a tower': ([SFT, '--config.data.cache_features=bf16'], 'stage sft has no such tower'),
    'features of a tower that learns': ([CLIP, '--config.data.cache_features=int8'], 'stage clip has no such tower'),
    'features of pictures that change': (
        [VISION, '--config.data.cache_features=bf16', '--config.data.augment=true'],
        'data.augment makes new ones: choose one',
    ),
    'features in another dtype': ([VISION, '--config.data.cache_features=int4'], "Did you mean 'int8'"),
    'a bad subset': ([SFT, '--config.data.source=magpie[:ten]'], "'magpie[:ten]' is no part of a data set"),
    'a subset of a file': ([SFT, '--config.data.source=conversations[:10%]'], 'only prepared sets'),
    'prepared text for conversations': ([SFT, '--config.data.source=fineweb_edu'], 'for pretrain'),
    'prepared conversations for text': ([PRETRAIN, '--config.data.source=magpie'], 'learns from text'),
    'no batch': ([SFT, '--config.data.batch_size=0'], 'data.batch_size is 0'),
    'no heads': ([SFT, '--config.model.heads=0'], 'model.heads is 0'),
    'no patch': ([SFT, '--config.model.vision.patch_size=0'], 'patch_size is 0'),
    'a clip norm that is no number': ([SFT, '--config.optim.clip_norm=nan'], 'clip_norm is nan'),
    'a negative seed': ([SFT, '--config.seed=-1'], 'seed is -1'),
    'negative steps': ([SFT, '--config.steps=-5'], 'steps is -5, and must not be below 0'),
    'a rate of nothing': ([SFT, '--config.optim.learning_rate=0'], 'learning_rate is 0.0, and must be above 0'),
    'an infinite rate': ([SFT, '--config.optim.learning_rate=inf'], 'learning_rate is inf, and must be finite'),
    'a rate that is no number': ([SFT, '--config.optim.end_learning_rate=nan'], 'end_learning_rate is nan'),
    'decay that grows': ([SFT, '--config.optim.weight_decay=-0.1'], 'weight_decay is -0.1, and must not be below 0'),
    'moments that never fade': ([SFT, '--config.optim.b2=1'], 'b2 is 1.0, and must be below 1'),
    'a colour that is no number': ([SFT, '--config.model.vision.mean=(nan, 0, 0)'], 'takes three numbers'),
    'endless epochs': ([SFT, '--config.steps=0', '--config.epochs=inf'], 'epochs is inf, and must be finite'),
    'a seed beyond 32 bits': ([SFT, '--config.seed=4294967296'], 'seed is 4294967296, and must be below 4294967296'),
    'a source and a mixture': (
        [SFT, '--config.data.source=magpie', '--config.data.mixture=chat:1'],
        'data.source and data.mixture are both given',
    ),
    'no length': ([SFT, '--config.steps=0', '--config.epochs=0'], 'how long'),
    'heads that do not divide': ([SFT, '--config.model.heads=3'], 'not a multiple'),
    'heads of odd size': ([SFT, '--config.model.width=126', '--config.model.heads=2'], 'RoPE'),
    'patches that do not divide': ([SFT, '--config.model.vision.patch_size=16'], 'patch_size 16'),
    'a row beyond the positions': ([SFT, '--config.data.length=4096'], 'beyond model.positions 512'),
    'parts that do not divide': ([SFT, '--config.optim.accumulate=3'], 'optim.accumulate=3'),
    'text for conversations': ([SFT, '--config.data.source=text'], 'for pretrain'),
    'a source without a path': ([SFT, '--config.data.source=conversations'], 'needs data.path'),
}


def message_of(argv):
    with pytest.raises(UserError) as caught:
        cli.parse(argv, 'usage', resume=False, anew=False)
    return str(caught.value)


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_is_one_sentence(mistake):
    argv, told = MISTAKES[mistake]
    message = message_of(argv)
    assert told.format(root=ROOT) in message
    assert '\n' not in message and len(message) < 300
    assert message.endswith(('.', '?'))


@pytest.mark.parametrize(
    'program, told',
    {
        'def get_config(size=0): oops(': 'SyntaxError',
        'x = 1': 'get_config',
        'def get_config(size=0): return 3': 'returns a nanovision_jax.config.Config',
        'def get_config(size=0): raise KeyError': 'KeyError',
        'def get_config(size=0): return 1 + ""': 'TypeError',
    }.items(),
)
def test_a_broken_config_file_is_one_sentence(tmp_path, monkeypatch, program, told):
    monkeypatch.delitem(sys.modules, 'config_config', raising=False)  # where ml_collections ran the file before
    (tmp_path / 'mine.py').write_text(program)
    message = message_of([f'--config={tmp_path}/mine.py'])
    assert told in message and 'mine.py' in message
    assert '\n' not in message


def test_nearest():
    assert nearest('cosin', ['linear', 'cosine']) == " Did you mean 'cosine'?"
    assert nearest('zzz', ['b', 'a']) == ' There are: a, b.'
    assert nearest('zzz', []) == ''


def test_the_command_answers_in_one_line():
    command = [sys.executable, '-m', 'nanovision_jax.train', '--config.optim.learning_rat=1', SFT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ''
    assert done.stderr == "error: no config field 'optim.learning_rat'. Did you mean 'optim.learning_rate'?\n"


@pytest.mark.parametrize('argv', [['--help'], [SFT, '-h'], ['--config=nothing.py', '--help']])
def test_help_names_every_field(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse(argv, 'what it is for')
    assert caught.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith('what it is for\n')
    assert set(configs.fields(configs.Config)) <= set(told.split())
    assert {'optim.learning_rate', 'model.vision.patch_size', 'run_dir'} <= set(configs.fields(configs.Config))


def test_help_tells_meaning_limits_default_and_what_this_run_would_have(capsys):
    with pytest.raises(SystemExit):
        cli.parse([SFT, '--config.optim.b1=0.5', '--help'], 'usage')
    told = capsys.readouterr().out
    assert (
        '  optim.b1 (float)\n      decay of the mean of gradients; at least 0; below 1; default: 0.9; here: 0.5\n'
    ) in told
    assert "one of 'adamw', 'muon', 'sgd'; default: 'adamw'; here: 'muon'" in told
    with pytest.raises(SystemExit):
        cli.parse(['--help'], 'usage')
    assert 'here:' not in capsys.readouterr().out
    assert all(field.metadata['meaning'] for field in configs.options(configs.Config).values())


# Overrides -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name, text, value',
    [
        ('steps', '7', 7),
        ('mesh.data', '-1', -1),
        ('mesh.fsdp', '-1', -1),
        ('epochs', '2', 2.0),
        ('optim.learning_rate', '3e-5', 3e-5),
        ('optim.warmup', '0.03', 0.03),
        ('data.augment', 'true', True),
        ('data.augment', 'True', True),
        ('data.augment', '1', True),
        ('data.augment', 'false', False),
        ('data.path', '/a=b/c d=e', '/a=b/c d=e'),
        ('data.images', '', ''),
        ('name', '3', '3'),
        ('name', 'none', 'none'),
        ('data.images', "it's", "it's"),
        ('model.vision.mean', '(0.5, 0.25, 1)', (0.5, 0.25, 1)),
        ('model.vision.layers', '3', 3),
    ],
)
@pytest.mark.parametrize('apart', [False, True])
def test_an_override_arrives(name, text, value, apart):
    given = [f'--config.{name}', text] if apart else [f'--config.{name}={text}']
    plain, changed = cli.parse([SFT])[0], cli.parse([SFT, *given])[0]
    assert configs.get(changed, name) == value
    assert type(configs.get(changed, name)) is type(value)
    others = [other for other in configs.fields(configs.Config) if other not in (name, 'run_dir', 'data.path')]
    assert all(configs.get(plain, other) == configs.get(changed, other) for other in others)


def test_the_last_of_two_overrides_counts():
    assert cli.parse([SFT, '--config.steps=1', '--config.steps=2'])[0].steps == 2


def test_order_does_not_matter():
    argv = [SFT, '--config.steps=9', '--config.optim.b1=0.5', '--resume']
    expected = cli.parse(argv, resume=False, anew=False)
    assert expected[0].steps == 9 and expected[0].optim.b1 == 0.5
    assert expected[1] == {'resume': True, 'anew': False}
    for shuffled in itertools.permutations(argv):
        assert cli.parse(shuffled, resume=False, anew=False) == expected


@pytest.mark.parametrize('text, value', {'': True, '=true': True, '=False': False, '=0': False}.items())
def test_flags_take_values(text, value):
    assert cli.parse([SFT, f'--resume{text}'], resume=False)[1] == {'resume': value}


def test_parse_reads_its_argument_and_not_the_process(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train', '--config=nothing.py', '--config.steps=1'])
    assert cli.parse([SFT, '--config.steps=5'])[0].steps == 5


def test_names_follow_from_each_other():
    config = parse('sft')
    assert (config.name, config.run_dir, config.data.path) == ('tiny', 'runs/tiny/sft', 'runs/tiny/data')
    config = parse('sft', 'name=mine')
    assert (config.run_dir, config.data.path) == ('runs/mine/sft', 'runs/mine/data')
    config = parse('sft', 'run_dir=/x/y')
    assert (str(config.family), config.data.path) == ('/x', '/x/data')
    for prepared in ('data.source=magpie', 'data.source=magpie[:10%]', 'data.mixture=magpie:1'):
        assert parse('sft', prepared).data.path == 'data'
    assert parse('sft', 'data.mixture=magpie:1').data.source == 'mixture'


# The recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('size', ['tiny', 'd4', 'd20'])
@pytest.mark.parametrize('stage', STAGES)
def test_every_config_file_parses(stage, size):
    config = parse(stage, size=size)
    assert (config.stage, config.size, config.run_dir) == (stage, size, f'runs/{size}/{stage}')
    assert (config.data.source == 'tiny_world') == (size == 'tiny')


def test_d20_is_the_default():
    for stage in STAGES:
        assert cli.parse([f'--config={ROOT}/configs/{stage}.py'])[0] == parse(stage, size='d20')


def test_d20_is_the_reference_model():
    for stage in STAGES:
        model = parse(stage, size='d20').model
        assert (model.layers, model.width, model.heads, model.ffn, model.positions) == (20, 1280, 10, 5120, 2048)
        assert model.rope_theta == 1e6
        tower = model.vision
        assert (tower.image_size, tower.patch_size, tower.patches) == (224, 16, 196)
        assert (tower.width, tower.layers, tower.heads, tower.ffn) == (768, 12, 12, 3072)


@pytest.mark.parametrize('depth', [2, 12, 20, 32])
def test_the_size_dial(depth):
    model = configs.base_config('pretrain', f'd{depth}').model
    assert (model.layers, model.width, model.ffn) == (depth, 64 * depth, 4 * 64 * depth)
    assert model.width // model.heads == 128


RECIPES = {  # optimizer name, b1, b2, weight decay; peak, end, schedule, warmup; length, steps, epochs
    'clip': ('adamw', 0.9, 0.98, 0.2, 5e-4, 0.0, 'cosine', 2000, 77, 0, 32),
    'pretrain': ('adamw', 0.9, 0.95, 0.1, 1e-3, 1e-4, 'cosine', 1000, 1024, 35_000, 1),
    'sft': ('adamw', 0.9, 0.95, 0.1, 2e-4, 2e-5, 'linear', 1000, 1024, 5_000, 1),
    'vision_pretrain': ('adamw', 0.9, 0.95, 0.0, 2e-3, 0.0, 'cosine', 0.03, 2048, 0, 1),
    'vision_instruct': ('adamw', 0.9, 0.95, 0.0, 2e-5, 0.0, 'cosine', 0.03, 2048, 0, 1),
}


@pytest.mark.parametrize('stage', RECIPES)
def test_recipes(stage):
    config = parse(stage, size='d20')
    o = config.optim
    recipe = (o.name, o.b1, o.b2, o.weight_decay, o.learning_rate, o.end_learning_rate, o.schedule, o.warmup)
    assert (*recipe, config.data.length, config.steps, config.epochs) == RECIPES[stage]
    assert o.clip_norm == 1.0


def test_batches_of_the_recipes():
    assert parse('clip', size='d20').data.batch_size == 4096
    assert parse('sft', size='d20').data.batch_size == 32
    data = parse('pretrain', size='d20').data
    assert data.batch_size * data.length == 262_144


# Layers --------------------------------------------------------------------------------------------------------------


def test_importing_loads_nothing_heavy():
    program = (
        'import sys, nanovision_jax\n'
        'assert nanovision_jax.__version__ and callable(nanovision_jax.load)\n'
        'heavy = {"jax", "flax", "grain", "transformers", "tensorflow_datasets", "orbax", "numpy"}\n'
        'print(sorted(heavy & set(sys.modules)))\n'
        'from nanovision_jax import cli\n'
        f'cli.parse(["--config={ROOT}/configs/clip.py:tiny"])\n'
        'print(sorted((heavy - {"numpy"}) & set(sys.modules)))\n'
    )
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ('[]\n[]\n', '')


def imports(tree):
    """The top-level names of the packages that a syntax tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition('.')[0]


def test_data_does_not_import_jax():
    files = [*(ROOT / 'nanovision_jax/data').rglob('*.py'), ROOT / 'nanovision_jax/config.py']
    assert len(files) > 8
    for file in files:
        assert not {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'torch'} & set(imports(ast.parse(file.read_text()))), (
            file
        )
    assert 'jax' in set(
        imports(ast.parse((ROOT / 'nanovision_jax/training/loop.py').read_text()))
    )  # the search finds it


def test_help_is_given_without_a_config_file_too(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(['--help', '--config.steps=2'], 'what it is for')
    assert stop.value.code == 0 and 'what it is for' in capsys.readouterr().out


def test_every_field_has_a_type_that_the_command_line_takes():
    assert set(configs.fields(configs.Config).values()) == {str, int, float, bool, tuple}
    assert dataclasses.is_dataclass(configs.Config)
