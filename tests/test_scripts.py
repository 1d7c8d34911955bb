"""The scripts: the quickstart with a stub that writes its commands down, the others as they are."""

import json
import os
import re
import runpy
import shutil
import subprocess
import time

import micro
import pytest
from conftest import ROOT
from PIL import Image

import nanovision_jax
from nanovision_jax.errors import UserError

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
    limit=$(option --limit "$@"); task=$task${limit:+-limit$limit}
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
