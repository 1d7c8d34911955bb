"""The scripts: the quickstart with a stub that writes its commands down, the others as they are."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import types

import micro
import pytest
from conftest import ROOT
from jax.experimental import topologies
from PIL import Image

import nanovision_jax
from nanovision_jax.errors import UserError
from nanovision_jax.parallel import hardware

# Stands for Python: writes its command down, and leaves behind what the command would.
STUB = """#!/usr/bin/env bash
echo "$*" >> commands
option() { for arg in "${@:2}"; do case "$arg" in "$1"=*) echo "${arg#*=}";; esac; done; }
case "$2" in
  nanovision_jax.train)
    config=$(option --config "$@") name=$(option --config.name "$@") stage=$(basename "${config%%.py*}")
    mkdir -p "runs/$name/$stage" && cd "runs/$name/$stage" && { [ -e lineage.json ] || touch lineage.json; };;
  nanovision_jax.evaluate)
    run=$(option --run "$@") task=$(option --task "$@") split=$(option --split "$@")
    [ "$split" = validation ] || task=$task-$split
    mkdir -p "$run/eval" && touch "$run/eval/$task.json";;
esac
"""
STAGES = ['clip', 'pretrain', 'sft', 'vision_pretrain', 'vision_instruct']


@pytest.fixture
def project(tmp_path):
    """A folder with the quickstart, whose installation gives the stub for Python."""
    (tmp_path / 'scripts').mkdir()
    shutil.copy(ROOT / 'scripts/quickstart.sh', tmp_path / 'scripts')
    (tmp_path / 'scripts/install.sh').write_text('python=./python\n')
    (tmp_path / 'python').write_text(STUB)
    (tmp_path / 'python').chmod(0o755)
    return tmp_path


def quickstart(project, *argv):
    """(the finished process, the commands that it gave)."""
    done = subprocess.run(['bash', 'scripts/quickstart.sh', *argv], capture_output=True, text=True, cwd=project)
    commands = project / 'commands'
    given = commands.read_text().splitlines() if commands.exists() else []
    commands.unlink(missing_ok=True)
    return done, given


def trained(commands):
    """{stage: the overrides that it was given}, in order."""
    found = [re.fullmatch(r'-m nanovision_jax\.train --config=configs/(\w+)\.py:tiny ?(.*)', c) for c in commands]
    return {match[1]: match[2].split() for match in found if match}


def test_the_quickstart_goes_down_the_road(project):
    done, commands = quickstart(project)
    assert done.returncode == 0, done.stderr
    assert trained(commands) == {stage: ['--config.name=tiny'] for stage in STAGES}
    assert commands[5:] == [
        '-m nanovision_jax.evaluate --run=runs/tiny/pretrain --task=bpb --split=validation',
        '-m nanovision_jax.evaluate --run=runs/tiny/vision_instruct --task=vqa --split=validation --limit=2400',
        '-m nanovision_jax.evaluate --run=runs/tiny/vision_instruct --task=vqa --split=heldout --limit=1200',
        'scripts/sample_conversation.py runs/tiny',
        '-m nanovision_jax.report runs/tiny',
    ]
    assert re.search(r'^== vision_instruct took \d+ s$', done.stdout, re.M)
    assert 'chat --run=runs/tiny/vision_instruct --image=runs/tiny/pictures/1.png' in done.stdout


def test_a_finished_evaluation_is_skipped_until_its_run_goes_on(project):
    assert len([c for c in quickstart(project)[1] if 'evaluate' in c]) == 3
    assert not [c for c in quickstart(project)[1] if 'evaluate' in c]
    later = time.time() + 60
    os.utime(project / 'runs/tiny/vision_instruct/lineage.json', (later, later))
    evaluated = [c for c in quickstart(project)[1] if 'evaluate' in c]
    assert len(evaluated) == 2 and all('vision_instruct' in c for c in evaluated)


def test_a_stage_that_fails_ends_the_quickstart(project):
    (project / 'python').write_text(STUB + 'case "$3" in *sft*) exit 3;; esac\n')
    done, commands = quickstart(project)
    assert done.returncode == 3 and list(trained(commands)) == STAGES[:3] and len(commands) == 3


def test_your_own_data_take_another_road(project, tmp_path_factory):
    folder = tmp_path_factory.mktemp('my data')
    for name in ('pretrain.json', 'instruct.json', 'words.txt'):
        (folder / name).write_text('')
    done, commands = quickstart(project, '--data', str(folder), '--text', str(folder / 'words.txt'))
    assert done.returncode == 0, done.stderr
    given = {stage: ' '.join(options) for stage, options in trained(commands).items()}
    assert list(given) == [
        'pretrain',
        'clip',
        'sft',
        'vision_pretrain',
        'vision_instruct',
    ]  # the text's tokenizer
    assert all(options.startswith('--config.name=photos ') for options in given.values())
    assert f'--config.data.source=text --config.data.path={folder}/words.txt' in given['pretrain']
    for stage, file in (('clip', 'pretrain'), ('sft', 'instruct'), ('vision_pretrain', 'pretrain')):
        assert f'--config.data.source=conversations --config.data.path={folder}/{file}.json' in given[stage]
    assert 'image_size=64' in given['clip'] and 'image_size' not in given['vision_instruct']
    assert [c for c in commands if 'heldout' in c] == [] and commands[-1].endswith('report runs/photos')
    commands = quickstart(project, '--name', 'mine', '--data', str(folder), '--text', str(folder / 'words.txt'))[1]
    assert all('--config.name=mine' in options for options in trained(commands).values())


@pytest.mark.parametrize(
    ('argv', 'why'),
    [
        (['--nonsense'], "unknown argument '--nonsense'"),
        (['--name'], '--name needs a value'),
        (['--data', '.'], '--data and --text go together'),
        (['--text', '.'], '--data and --text go together'),
        (['--data', '.', '--text', '.'], r'there is no \./pretrain\.json'),
    ],
)
def test_a_mistake_is_one_sentence_and_trains_nothing(project, argv, why):
    done, commands = quickstart(project, *argv)
    assert done.returncode == 2 and commands == []
    assert re.fullmatch(f'error: .*{why}.*\n', done.stderr)


def test_the_quickstarts_help(project):
    for option in ('-h', '--help'):
        done, commands = quickstart(project, option)
        assert done.returncode == 0 and commands == [] and done.stderr == ''
        assert all(word in done.stdout for word in ('--name', '--data FOLDER', '--text PATH', 'pretrain.json'))
        assert '#' not in done.stdout and 'set -euo' not in done.stdout


# The sample conversation ---------------------------------------------------------------------------------------------


SAMPLE = runpy.run_path(str(ROOT / 'scripts/sample_conversation.py'))['main']


def test_a_mistake_with_the_sample_conversation_is_a_sentence(tmp_path, capsys):
    for argv, why in (([], 'family'), ([str(tmp_path)], 'vision_instruct is no run folder')):
        with pytest.raises(UserError, match=why):
            SAMPLE(argv)
    with pytest.raises(SystemExit) as stop:
        SAMPLE(['--help'])
    assert stop.value.code == 0 and 'chat.jsonl' in capsys.readouterr().out


def test_the_sample_conversation_is_kept_for_the_report(tiny_family, tmp_path, capsys):
    family = micro.family(tmp_path / 'family', tiny_family)
    cfg = micro.run_config('vision_instruct', family, model__positions=512)  # it never stops before 64 tokens
    micro.parent_run(family, 'vision_instruct', cfg)
    SAMPLE([str(family)])
    rows = [json.loads(line) for line in (family / 'chat.jsonl').read_text().splitlines()]
    assert all(row.keys() == {'image', 'question', 'answer'} for row in rows)
    shown = list(dict.fromkeys(row['image'] for row in rows))
    assert shown == [f'pictures/{n}.png' for n in (1, 2, 3)] and 3 <= len(rows) <= 9
    model, said = nanovision_jax.load(family / 'vision_instruct'), capsys.readouterr().out
    for name in shown:
        talk = [row for row in rows if row['image'] == name]
        first = [{'type': 'image'}, {'type': 'text', 'text': talk[0]['question']}]
        answer = model.chat([{'role': 'user', 'content': first}], [Image.open(family / name)], max_new_tokens=64)
        assert talk[0]['answer'] == answer
        assert all(f'you: {row["question"]}\n' in said for row in talk)


# Benchmarks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('stage', ['pretrain', 'vision_instruct'])
def test_the_benchmark_of_the_step_prints_what_it_measured(stage, monkeypatch, capsys):
    monkeypatch.setattr(hardware, 'peak_flops', lambda: (1e12, 'a figure for tests'))
    small = ['data.batch_size=8', 'data.length=64', 'data.slots=2', 'data.vocab_size=128', 'model.layers=1']
    small += ['model.width=32', 'model.heads=2', 'model.ffn=32', 'model.positions=64', 'dtype=float32']
    small += ['model.vision.image_size=16', 'model.vision.patch_size=8', 'model.vision.layers=2']
    argv = [f'--config={ROOT}/configs/{stage}.py:tiny', '--steps=3', *(f'--config.{field}' for field in small)]
    runpy.run_path(str(ROOT / 'scripts/benchmarks/step.py'))['main'](argv)
    found = json.loads(capsys.readouterr().out)
    names = 'stage size batch step_seconds tokens_per_second mfu mfu_of compile_seconds peak_device_bytes loss devices '
    assert list(found) == [*names.split(), 'versions']
    assert (found['stage'], found['size'], found['mfu_of']) == (stage, 'tiny', 'a figure for tests')
    assert found['batch']['tokens'] == [8, 64] and ('images' in found['batch']) == (stage == 'vision_instruct')
    assert found['tokens_per_second'] > 0 and found['mfu'] >= 0 and found['compile_seconds'] > 0
    assert 3 < found['loss'] < 7  # of 128 words, nearly: log(128) is 4.9
    assert found['versions'].keys() == {'jax', 'optax'}


def test_the_benchmark_of_the_data_prints_what_it_measured():
    """In a process of its own, where there is no jax; its counts hold, its speeds are numbers."""
    argv = ['--examples=200', '--plan=3000', '--repeats=1']
    program = (
        'import runpy, sys; sys.modules["jax"] = None\n'  # grain takes it where it is
        f'runpy.run_path({str(ROOT / "scripts/benchmarks/data.py")!r})["main"]({argv!r})'
    )
    done = subprocess.run(
        [sys.executable, '-c', program], capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-500:]
    *lines, found = done.stdout.splitlines()
    found = json.loads(found)
    assert len(lines) > 25 and all(len(line) >= 80 for line in lines)
    sizes, alone, plan = found['images_per_second_and_core'], found['index']['alone'], found['plan']
    assert sizes.keys() == {'224', '336'} and all(sizes['224'][way] > 0 for way in ('pil', 'exact', 'draft'))
    assert found['megabytes_tokenized_per_second_and_core']['trained'].keys() == {'text', 'documents', 'conversations'}
    assert found['index']['examples'] == 200 and 180 <= alone['of_train'] < 200
    assert found['index']['as_it_comes']['of_train'] == alone['of_train'] and alone['examples_per_second'] > 0
    assert plan['examples'] == 3000 and 3000 / 6 < plan['rows'] < 3000 / 4  # rows hold some five
    packed = found['packing']
    assert all(0.9 < used['tokens'] <= 1 for used in packed.values()) and packed['captions']['image slots'] > 0.99


def test_the_benchmark_of_the_data_reads_batches_of_a_config(llava_folder, tmp_path):
    (tmp_path / 'micro.py').write_text(
        'from nanovision_jax.config import Data, base_config\n'
        'def get_config(size):\n'
        '    config = base_config("sft", size)\n'
        f'    config.run_dir = {str(tmp_path / "runs/sft")!r}\n'
        f'    path = {str(llava_folder / "instruct.json")!r}\n'
        '    config.data = Data("conversations", path, vocab_size=300, batch_size=4, length=64, too_long="drop")\n'
        '    return config\n'
    )
    speed = runpy.run_path(str(ROOT / 'scripts/benchmarks/data.py'))['measure_pipeline'](f'{tmp_path}/micro.py:tiny', 3)
    assert speed['tokens_per_second'] == pytest.approx(64 * speed['rows_per_second'], rel=0.02)
    assert speed['rows_per_second'] == pytest.approx(4 * speed['batches_per_second'], rel=0.02)


@pytest.mark.parametrize('arg, told', [('--example=5', 'unknown argument'), ('--examples=0', 'above 0')])
def test_a_mistake_in_the_data_benchmark_is_one_sentence(arg, told):
    with pytest.raises(UserError, match=told):
        runpy.run_path(str(ROOT / 'scripts/benchmarks/data.py'))['main']([arg])


def test_machines_that_are_not_there_are_described_to_the_compiler(monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')  # which the benchmark would set
    monkeypatch.syspath_prepend(ROOT / 'scripts/benchmarks')
    devices_of, asked = runpy.run_path(str(ROOT / 'scripts/benchmarks/memory.py'))['devices_of'], []

    def topology(name='', platform=None, **options):
        asked.append((name, platform, options))
        return types.SimpleNamespace(devices=('one', 'two'))

    monkeypatch.setattr(topologies, 'get_topology_desc', topology)
    assert devices_of('v5e:2x4') == devices_of('h100:2') == ['one', 'two']
    devices_of('v5e:1x1')
    chips, (_, platform, options), chip = asked
    assert chips == ('v5e:2x4', 'tpu', {}) and chip == ('v5e:1x1', 'tpu', {'chips_per_host_bounds': (1, 1, 1)})
    assert platform == 'cuda' and options['topology'] == '1x1x2'
    text = options['target_config']
    assert 'NVIDIA H100 80GB HBM3' in text and 'cuda_compute_capability: { major: 9 }' in text
    assert 'shared_memory_per_block_optin: 232448' in text and text.count('{') == text.count('}') == 2


@pytest.mark.parametrize(('name', 'takes'), [('a100:8', 'it takes jax-cuda12-plugin'), ('v9:2x4', 'it takes libtpu')])
def test_a_machine_that_nothing_compiles_for_is_a_sentence(name, takes, monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    monkeypatch.syspath_prepend(ROOT / 'scripts/benchmarks')

    def missing(*_, **__):
        raise NotImplementedError('no such thing\nmore')

    devices_of = runpy.run_path(str(ROOT / 'scripts/benchmarks/memory.py'))['devices_of']
    monkeypatch.setattr(topologies, 'get_topology_desc', missing)
    with pytest.raises(UserError, match=rf"^no topology '{name}' \(no such thing\): {takes}"):
        devices_of(name)


@pytest.mark.parametrize('stage', ['pretrain', 'vision_instruct'])
def test_the_benchmark_of_decoding_prints_what_it_measured(stage, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / 'scripts/benchmarks')
    small = ['data.vocab_size=128', 'model.layers=1', 'model.width=32', 'model.heads=2', 'model.ffn=32']
    small += ['data.length=64', 'model.positions=64', 'model.vision.layers=2']
    small += ['model.vision.image_size=16', 'model.vision.patch_size=8']
    argv = [f'--config={ROOT}/configs/{stage}.py:tiny', '--tokens=20', *(f'--config.{field}' for field in small)]
    main = runpy.run_path(str(ROOT / 'scripts/benchmarks/decode.py'))['main']
    sizes = {}
    for weights in ('', 'int8'):
        main([*argv, f'--weights={weights}'])
        found = json.loads(capsys.readouterr().out)
        assert list(found) == ['tokens', 'weights', 'prompt', 'batch', 'bytes_of_weights', 'devices', 'versions']
        assert (found['tokens'], len(found['prompt'])) == (20, 16 + 4 * (stage == 'vision_instruct'))
        for batch in found['batch'].values():
            assert list(batch) == ['first_token_ms', 'tokens_per_second', 'decode_tokens_per_second']
            assert batch['first_token_ms'] > 0 and batch['tokens_per_second'] > 0
        assert list(found['batch']) == ['1', '16'] and found['versions'].keys() == {'jax'}
        sizes[weights] = found['bytes_of_weights']
    assert sizes['int8'] < 0.4 * sizes['']


@pytest.mark.parametrize(
    ('argv', 'why'),
    [
        (['--run=a', '--tokens=1'], '--tokens takes a number above 1'),
        (['--run=a', '--weights=int4'], 'weights takes bfloat16, int8 or nothing'),
        (['--run=a', '--peer=torch'], '--peer is transformers'),
        (['--run=a', '--config=b'], '--config=b does not go with --run'),
        ([], 'say --config=FILE'),
    ],
)
def test_the_benchmark_of_decoding_says_what_it_cannot_do(argv, why, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'scripts/benchmarks')
    with pytest.raises(UserError, match=why):
        runpy.run_path(str(ROOT / 'scripts/benchmarks/decode.py'))['main'](argv)
