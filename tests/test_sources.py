"""Sources: LLaVA's files and JSON lines, the held-out 5%, tiny_world's views."""

import concurrent.futures
import json
import pickle
import zipfile

import numpy as np
import pytest
from conftest import is_held_out, jpeg, parse

from nanovision_jax.data import sources
from nanovision_jax.data.conversation import BadExample
from nanovision_jax.data.datasets import tiny_world
from nanovision_jax.data.sources import Conversations, Example, TinyWorldSource
from nanovision_jax.errors import UserError


def turns(question, answer='yes'):
    return [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]


def write(file, rows, lines=False):
    text = '\n'.join(json.dumps(row, ensure_ascii=False) for row in rows) if lines else json.dumps(rows)
    file.write_text(text, encoding='utf-8')
    return file


def test_llavas_files_are_read(llava_folder):
    for name, n in (('pretrain', 60), ('instruct', 72)):
        source = Conversations(llava_folder / f'{name}.json')
        rows = json.loads((llava_folder / f'{name}.json').read_text())
        assert len(source) == n == len(rows)
        with zipfile.ZipFile(llava_folder / 'images.zip') as pictures:
            for i, row in enumerate(rows):
                example = source[i]
                assert example.id == row['id']
                assert len(example.messages) == len(row['conversations'])
                assert example.names == ([row['image']] if 'image' in row else [])
                assert example.images == [pictures.read(name) for name in example.names]
                assert example.caption == row['conversations'][1]['value']


def test_a_folder_of_pictures_is_as_good_as_a_zip(llava_folder, tmp_path):
    zipfile.ZipFile(llava_folder / 'images.zip').extractall(tmp_path / 'images')
    (tmp_path / 'pretrain.json').write_text((llava_folder / 'pretrain.json').read_text())
    zipped = Conversations(llava_folder / 'pretrain.json')
    beside = Conversations(tmp_path / 'pretrain.json')
    named = Conversations(llava_folder / 'pretrain.json', tmp_path / 'images')
    for i in range(60):
        assert zipped[i] == beside[i] == named[i]


def test_messages_and_bare_rows(tmp_path):
    chat = [{'role': 'user', 'content': 'a?'}, {'role': 'assistant', 'content': 'b'}]
    rows = [{'messages': chat}, {'id': 7, 'conversations': turns('a?', 'b')}]
    source = Conversations(write(tmp_path / 'x.jsonl', rows, lines=True))
    assert [source[i].id for i in range(2)] == ['0', '7']
    assert source[0].messages == source[1].messages == chat


def test_json_lines_may_hold_every_character(tmp_path):
    odd = 'one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven'
    rows = [{'conversations': turns(odd)}, {'conversations': turns('b')}]
    file = write(tmp_path / 'x.jsonl', rows, lines=True)
    assert [Conversations(file)[i].messages[0]['content'] for i in range(2)] == [odd, 'b']
    file.write_text('\ufeff\n' + file.read_text().replace('\n', '\n\n') + '\n\n')  # a mark, and empty lines
    assert [Conversations(file)[i].messages[0]['content'] for i in range(2)] == [odd, 'b']


@pytest.mark.parametrize(
    'data',
    [b'[{"id": 1}, {"id"', b'[{"id": 1} {"id": 2}]', b'[', b'[1,]', b'hello', b'{"a":\n 1}', b'["\xe9"]'],
    ids=repr,
)
def test_broken_json_is_one_sentence(tmp_path, data):
    (tmp_path / 'x.json').write_bytes(data)
    with pytest.raises(UserError, match=r'x\.json is neither a JSON list nor JSON lines'):
        len(Conversations(tmp_path / 'x.json'))


def test_a_missing_file_is_one_sentence(tmp_path, llava_folder):
    for path in (tmp_path / 'none.json', tmp_path):
        with pytest.raises(UserError, match='no conversations at'):
            Conversations(path)
    with pytest.raises(UserError, match='no pictures at'):
        Conversations(llava_folder / 'pretrain.json', tmp_path / 'none.zip')


@pytest.mark.parametrize(
    'row, reason',
    [
        ('a string', 'no JSON object'),
        (['a list'], 'no JSON object'),
        ({'conversations': 'hello'}, 'no JSON objects'),
        ({'conversations': ['hello', 'you']}, 'no JSON objects'),
        ({'conversations': [{'from': 'narrator', 'value': 'x'}]}, "unknown speaker 'narrator'"),
        ({'conversations': [*turns('a'), {'from': 'system', 'value': 'x'}]}, 'system speaks out of turn'),
        ({'conversations': [{'from': 'observation', 'value': '{}'}]}, 'the role observation belongs to tools'),
        ({'messages': [{'role': 'assistant', 'content': None, 'tool_calls': [{}]}]}, 'tool_calls belong to tools'),
        ({'messages': [{'role': 'user'}]}, 'a turn without text'),
        ({'image': 'a.jpg', 'conversations': turns('<image>')}, 'missing image'),
        ({'image': 5, 'conversations': turns('<image>')}, "missing image '5'"),
        ({'conversations': turns('half \ud83d')}, 'not Unicode'),
    ],
)
def test_a_bad_row_is_a_bad_example_and_not_a_crash(tmp_path, row, reason):
    (tmp_path / 'x.json').write_text(json.dumps([row]))
    with pytest.raises(BadExample, match=reason):
        Conversations(tmp_path / 'x.json')[0]


def test_a_picture_that_the_zip_lacks(tmp_path, llava_folder):
    (tmp_path / 'images.zip').write_bytes((llava_folder / 'images.zip').read_bytes())
    write(tmp_path / 'x.json', [{'image': 'none.jpg', 'conversations': turns('<image>')}])
    with pytest.raises(BadExample, match=r"missing image 'none\.jpg'"):
        Conversations(tmp_path / 'x.json')[0]


def test_text_only_leaves_pictures_out_and_keeps_row_numbers(llava_folder):
    every = Conversations(llava_folder / 'instruct.json')
    source = Conversations(llava_folder / 'instruct.json', text_only=True)
    assert len(source) == 12
    for i in range(12):
        assert source[i] == every[source.number(i)] and not source[i].images
    assert [every.number(i) for i in range(len(every))] == list(range(72))
    assert source.key != every.key


def test_a_source_is_read_by_threads_and_other_processes(llava_folder):
    source = Conversations(llava_folder / 'instruct.json')
    expected = [source[i] for i in range(len(source))]
    again = pickle.loads(pickle.dumps(source))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: again[i], range(72))) == expected


# The held-out 5% -----------------------------------------------------------------------------------------------------


def test_a_picture_is_on_the_same_side_in_every_file(llava_folder):
    sides = []
    for name in ('pretrain', 'instruct'):
        source = Conversations(llava_folder / f'{name}.json')
        examples = [source[i] for i in range(len(source))]
        sides.append({e.names[0]: source.split_of(e) for e in examples if e.images})
        assert all((source.split_of(e) == 'validation') == is_held_out(e.images[0]) for e in examples if e.images)
    assert sides[0] == sides[1]
    assert sorted(sides[0].values()) == ['train'] * 56 + ['validation'] * 4


def test_sides_go_by_content_and_not_by_name(tmp_path):
    rng, source = np.random.default_rng(0), Conversations(write(tmp_path / 'x.json', []))
    pictures = [jpeg(rng) for _ in range(100)]
    sides = [source.split_of(Example('a', [], [data], [f'{i}.jpg'])) for i, data in enumerate(pictures)]
    copies = [source.split_of(Example('b', [], [data], [f'copy/{i}.jpg'])) for i, data in enumerate(pictures)]
    assert sides == copies and set(sides) == {'train', 'validation'}


def test_without_a_picture_the_first_question_decides(tmp_path):
    rows = [{'conversations': turns(f'question {i}', answer)} for i in range(200) for answer in ('yes', 'no')]
    source = Conversations(write(tmp_path / 'x.json', rows))
    sides = [source.split_of(source[i]) for i in range(400)]
    assert sides[::2] == sides[1::2] and set(sides) == {'train', 'validation'}


def test_five_percent_are_held_out(tmp_path):
    source = Conversations(write(tmp_path / 'x.json', []))
    held_out = sum(source.split_of(Example('', [], [str(i).encode()], [''])) == 'validation' for i in range(20_000))
    assert 0.045 < held_out / 20_000 < 0.055


# tiny_world and the stages -------------------------------------------------------------------------------------------


def test_tiny_world_views(tiny_family):
    captions, talks, chats = (
        TinyWorldSource(tiny_family / 'data', 'train', view) for view in ('caption', 'conversation', 'chat')
    )
    assert (len(captions), len(talks), len(chats)) == (64, 64, 48)
    for i in range(0, 64, 9):
        caption, talk = captions[i], talks[i]
        made = tiny_world.example('train', int(talk.id.rsplit('-')[-1]))
        assert caption.images == talk.images == [made['image']]
        assert talk.messages == made['conversation'] and caption.caption == made['caption']
        assert [message['role'] for message in caption.messages] == ['user', 'assistant']
        assert sum(part['type'] == 'image' for part in caption.messages[0]['content']) == 1
    assert not chats[0].images and chats[0].messages[0]['role'] == 'user'


def test_which_source_a_stage_reads(tiny_config, llava_folder):
    views = {'clip': 'caption', 'sft': 'chat', 'vision_pretrain': 'caption', 'vision_instruct': 'conversation'}
    for stage, view in views.items():
        source = sources.open_source(tiny_config(stage), 'validation')
        assert (source.view, source.split) == (view, 'validation')
        config = parse(stage, 'data.source=conversations', f'data.path={llava_folder}/instruct.json')
        assert len(sources.open_source(config, 'train')) == (12 if stage == 'sft' else 72)
    with pytest.raises(UserError, match='no heldout split'):
        sources.open_source(config, 'heldout')
