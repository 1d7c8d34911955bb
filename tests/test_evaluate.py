"""Evaluation: scoring rules by hand, intervals, controls that catch a model which does not look, bits per byte."""

import json
import math
import re
import sys
import types
import weakref

import micro
import numpy as np
import pytest
import reference
from PIL import Image

import nanovision_jax
from nanovision_jax import cli, evaluate
from nanovision_jax.data import conversation, images
from nanovision_jax.errors import UserError
from nanovision_jax.evals import base, vqa
from nanovision_jax.evals import run as evaluating

COLOURS = {'red': (255, 0, 0), 'green': (0, 255, 0), 'blue': (0, 0, 255), 'black': (0, 0, 0)}


def test_answers_are_compared_without_case_articles_and_punctuation():
    for given, expected in (
        ('The red  Circle.', 'red circle'),
        ('an owl, a cat', 'owl cat'),
        ("it's 3.5!", 'it s 3 5'),
        ('¿Über?', 'über'),
        ('A', 'a'),  # not nothing: it may be the answer to a choice
        (' . ', '.'),  # a sign alone is an answer of its own
    ):
        assert vqa.normalise(given) == expected
    for kind, answer, wanted, expected in (
        ('colour', 'Red.', 'red', 1),
        ('colour', 'a red', 'the red', 1),
        ('colour', 'red one', 'red', 0),
        ('colour', '', 'red', 0),
        ('choice', '', 'A', 0),
        ('choice', 'a', 'A', 1),
        ('choice', 'B', 'A', 0),
    ):
        assert vqa.score(kind, answer, wanted) == expected


@pytest.mark.parametrize(
    ('answer', 'expected'),
    [
        ('a big red circle, a small blue star and a green cross', 1),
        ('A green cross, a big red circle, and a small blue star.', 1),
        ('a big red circle and a small blue star', 2 / 3),
        ('a big red circle, a small blue star, a green cross and a dot', 3 / 4),
        ('a big red circle, a big red circle and a big red circle', 1 / 5),
        ('a big red star, a small blue circle and a cross', 0),
        ('', 0),
    ],
)
def test_a_description_is_scored_by_its_parts(answer, expected):
    assert vqa.score('description', answer, 'a big red circle, a small blue star and a green cross') == expected


def question(image, reference, kind='colour', place=0):
    return vqa.Question(f'{image}-{reference}', image, place, 'what?', reference, kind)


def test_chance_is_the_commonest_answer():
    asked = [question(f'{i}', answer) for i, answer in enumerate(['red', 'Red.', 'red', 'blue', 'green'])]
    assert vqa.chance(asked) == 0.6
    described = [question(f'{i}', answer, 'description') for i, answer in enumerate(['x and y', 'x and y', 'x and z'])]
    assert vqa.chance(described) == pytest.approx((1 + 1 + 1 / 3) / 3)


def test_the_interval_is_that_of_the_mean_over_pictures():
    scores = np.arange(400) % 4 > 0  # three quarters
    low, high = base.interval(scores, np.arange(400))
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.008)
    low, high = base.interval(np.repeat(scores[:100], 4), np.repeat(np.arange(100), 4))  # four alike of each picture
    assert (low, high) == pytest.approx((0.75 - 2 * half, 0.75 + 2 * half), abs=0.016)
    assert base.interval(scores, np.arange(400)) == base.interval(scores, [f'{i:03}' for i in range(400)])
    assert base.interval(np.full(7, 0.5), np.arange(7)) == [0.5, 0.5]


def test_other_pictures_are_never_the_own_one():
    for count in (2, 3, 7):
        names = [f'{i}.png' for i in range(count)]
        for seed in range(5):
            given = base.others(names * 3, seed)
            assert all(name != other for name, other in given.items())
            assert sorted(given) == sorted(given.values()) == names  # each as often as before


@pytest.fixture
def squares(tmp_path):
    """Twelve pictures of one colour each, with two questions about it: a LLaVA file and a folder of pictures."""
    rows = []
    (tmp_path / 'images').mkdir()
    for i in range(12):
        colour = list(COLOURS)[i % 4]
        Image.new('RGB', (21, 21), COLOURS[colour]).save(tmp_path / 'images' / f'{i}.png')
        turns = [('What colour is it?', f'It is {colour}.'), ('Is it dark here?', 'Yes' if colour == 'black' else 'No')]
        said = [
            {'from': who, 'value': text} for turn in turns for who, text in zip(('human', 'gpt'), turn, strict=True)
        ]
        said[0]['value'] = f'<image>\n{said[0]["value"]}'
        rows.append({'id': f'q{i}', 'image': f'{i}.png', 'conversations': said})
    rows.append({'id': 'blind', 'conversations': rows[0]['conversations'][2:]})  # no picture: not asked
    (tmp_path / 'squares.json').write_text(json.dumps(rows))
    return tmp_path


class Stub:
    """Stands for a model: answers by the mean colour of a prompt's picture, or always as if it were red."""

    def __init__(self, tokenizer, looks):
        self.tokenizer, self.looks = tokenizer, looks

    def answer(self, prompts, max_new_tokens):
        return [self.say(prompt) for prompt in prompts]

    def say(self, prompt):
        assert (prompt.ids == self.tokenizer.image).sum() == 9 and len(prompt.images) == 1
        seen = tuple(prompt.images[0].reshape(-1, 3).mean(0).astype(int))
        colour = {value: name for name, value in COLOURS.items()}.get(seen, 'grey') if self.looks else 'red'
        if 'dark' in self.tokenizer.decode(prompt.ids):
            return 'yes' if colour == 'black' else 'no'
        return f'it is {colour}'


@pytest.fixture
def model_run(tokenizer, monkeypatch):
    """A function (looks) → evaluates a run that has the stub for a model."""

    def use(looks, stage='vision_instruct'):
        stub = Stub(tokenizer, looks)
        opened = types.SimpleNamespace(config=micro.odd_config(stage), tokenizer=tokenizer, answer=stub.answer)
        monkeypatch.setattr(evaluating, 'load', lambda run_dir: opened)

    return use


def test_a_model_that_looks_does_better_than_its_controls(model_run, squares):
    model_run(looks=True)
    found = evaluating.evaluate(squares / 'run', 'vqa', data=squares / 'squares.json')
    assert (found.task, found.n, found.accuracy, found.interval) == ('vqa', 24, 1.0, [1.0, 1.0])
    assert json.loads((squares / 'run/eval/vqa-of-squares.json').read_text()) == found.to_json()
    shuffled = [found.by_kind[kind].pop('shuffled') for kind in ('is it dark', 'what colour is')]
    assert found.by_kind == {
        'is it dark': {'n': 12, 'accuracy': 1.0, 'chance': 0.75, 'blank': 0.75},  # only that it is not dark
        'what colour is': {'n': 12, 'accuracy': 1.0, 'chance': 0.25, 'blank': 0.0},
    }
    assert found.controls['shuffled'] == pytest.approx(sum(shuffled) / 2)
    assert found.controls['blank'] == 9 / 24 and found.too_long == 0
    assert found.controls['shuffled'] < 0.7
    rows = [json.loads(line) for line in (squares / 'run/eval/vqa-of-squares.jsonl').read_text().splitlines()]
    assert len(rows) == 24 and len({row['id'] for row in rows}) == 24
    assert rows[2] | {'id': ''} == {
        'id': '',
        'image': '1.png',
        'question': 'What colour is it?',
        'reference': 'It is green.',
        'answer': 'it is green',
        'correct': 1.0,
        'kind': 'what colour is',
    }


def test_a_model_that_does_not_look_does_as_well_without_its_picture(model_run, squares, capsys):
    model_run(looks=False)
    argv = [f'--run={squares}/run', '--task=vqa', '--split=heldout', f'--data={squares}/squares.json', '--limit=20']
    evaluate.main([*argv, f'--output={squares}/elsewhere'])
    found = base.Accuracy(**json.loads((squares / 'elsewhere/vqa-of-squares-limit20.json').read_text()))
    assert found.n == 20 and found.controls == {'blank': found.accuracy, 'shuffled': found.accuracy}
    assert found.accuracy == pytest.approx((3 + 8) / 20)
    assert all(kind['accuracy'] <= kind['chance'] for kind in found.by_kind.values())
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith('vqa: 55.0% of 20 questions (95% interval ')
    assert sum('(0 points below)' in line for line in said) == 2


def test_a_question_beyond_the_context_is_not_asked_but_counted(model_run, squares, capsys):
    model_run(looks=True)
    rows = json.loads((squares / 'squares.json').read_text())
    rows[0]['conversations'][2]['value'] = 'dark ' * 61
    (squares / 'long.json').write_text(json.dumps(rows))
    evaluate.main([f'--run={squares}/run', '--task=vqa', f'--data={squares}/long.json', '--allow-missing'])
    found = base.Accuracy(**json.loads((squares / 'run/eval/vqa-of-long.json').read_text()))
    assert (found.n, found.too_long, found.accuracy) == (23, 1, 1.0)
    assert (found.asked, found.left_out) == (24, {'longer than the context': 1})
    assert 'asked 24, answered 23, left out 1 (1 × longer than the context); not' in capsys.readouterr().out


def many(folder, wrong, count=300, **more):
    """A LLaVA file of `count` questions, each about its own picture; `wrong`: {row: what happened to its picture}."""
    rows = []
    (folder / 'many').mkdir(parents=True)
    for i in range(count):
        file, name = folder / 'many' / f'{i}.png', list(COLOURS)[i % 4]
        said = [{'from': 'human', 'value': 'What colour is it?'}, {'from': 'gpt', 'value': f'It is {name}.'}]
        rows.append({'id': i, 'image': file.name, 'conversations': said} | more.get(f'row{i}', {}))
        if wrong.get(i) != 'missing':
            Image.new('RGB', (21, 21), COLOURS[name]).save(file)
        if wrong.get(i) == 'damaged':
            file.write_bytes(file.read_bytes()[:40])
    (folder / 'many.json').write_text(json.dumps(rows))
    return {'data': folder / 'many.json', 'images': folder / 'many'}


def test_what_cannot_be_read_is_counted_with_its_reason(model_run, tmp_path, capsys):
    model_run(looks=True)
    turns = [{'from': 'human', 'value': 'Why?'}, {'from': 'gpt', 'value': 'So.'}]
    two = {'image': ['0.png', '1.png'], 'conversations': turns * 3}
    files = many(tmp_path, {7: 'missing', 8: 'missing', 250: 'damaged'}, 302, row300=two, row301={'image': []})
    found = evaluating.evaluate(tmp_path / 'run', 'vqa', **files)
    assert (found.asked, found.n, found.accuracy, found.too_long) == (300, 297, 1.0, 0)
    assert found.left_out == {'missing image': 2, 'image does not decode': 1}
    assert found.other == {'question about 2 pictures': 3, 'question about no pictures': 1}
    rows = [json.loads(line) for line in (tmp_path / 'run/eval/vqa-of-many.jsonl').read_text().splitlines()]
    assert len(rows) == 300 and len({row['id'] for row in rows}) == 300
    assert rows[-3] == {
        'id': '7-7',
        'image': '7.png',
        'question': 'What colour is it?',
        'reference': 'It is black.',
        'left_out': "missing image '7.png'",
        'kind': 'what colour is',
    }
    assert [(row['image'], row['left_out']) for row in rows if 'answer' not in row][1:] == [
        ('8.png', "missing image '8.png'"),
        ('250.png', 'image does not decode'),
    ]
    assert found.lines()[-1] == (
        'asked 300, answered 297, left out 3 (2 × missing image, 1 × image does not decode); '
        'not counted: 3 × question about 2 pictures, 1 × question about no pictures'
    )


def test_more_than_one_in_a_hundred_left_out_is_an_error_and_writes_nothing(model_run, tmp_path, monkeypatch, capsys):
    model_run(looks=True)
    files = many(tmp_path, dict.fromkeys((3, 4, 250), 'missing'), 300)
    old = evaluating.evaluate(tmp_path / 'run', 'vqa', **files)
    kept = {file: file.read_bytes() for file in (tmp_path / 'run/eval').iterdir()}
    (tmp_path / 'many' / '5.png').unlink()  # four of 300 now
    argv = [f'--run={tmp_path}/run', '--task=vqa', f'--data={files["data"]}', f'--images={files["images"]}']
    monkeypatch.setattr(Stub, 'say', lambda *_, **__: pytest.fail('the model was asked'))
    monkeypatch.setattr(sys, 'argv', ['evaluate', *argv])
    with pytest.raises(SystemExit) as stop:
        cli.run(evaluate.main)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert '4 of 300 questions cannot be asked, and at most 1% may be left out: 4 × missing image; mend' in said
    assert kept == {file: file.read_bytes() for file in (tmp_path / 'run/eval').iterdir()} and len(kept) == 2
    monkeypatch.undo()

    model_run(looks=True)
    evaluate.main([*argv, '--allow-missing'])
    found = base.Accuracy(**json.loads((tmp_path / 'run/eval/vqa-of-many.json').read_text()))
    assert (found.asked, found.n, old.n) == (300, 296, 297)


def test_where_nothing_can_be_read_nothing_is_scored(model_run, tmp_path):
    model_run(looks=True)
    files = many(tmp_path, dict.fromkeys(range(8), 'missing'), 8)
    with pytest.raises(UserError, match=r'8 of 8 questions cannot be asked.*8 × missing image; there is none to score'):
        evaluating.evaluate(tmp_path / 'run', 'vqa', **files, allow_missing=True)
    rows = [row | {'image': []} for row in json.loads(files['data'].read_text())]
    files['data'].write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r'no question about one picture .* It has 8 × question about no pictures'):
        evaluating.evaluate(tmp_path / 'run', 'vqa', **files)


def test_a_row_that_is_no_conversation_is_one_lost_question(model_run, tmp_path):
    model_run(looks=True)
    files = many(tmp_path, {}, 200, row9={'conversations': [{'from': 'nobody', 'value': 'x'}]})
    found = evaluating.evaluate(tmp_path / 'run', 'vqa', **files)
    assert (found.asked, found.n, found.left_out) == (200, 199, {'unknown speaker': 1})


def test_a_missing_picture_counts_on_one_side_alone(llava_folder, tmp_path):
    cfg = micro.odd_config('vision_instruct')
    rows = [row for row in json.loads((llava_folder / 'instruct.json').read_text()) if 'image' in row]
    gone = [row | {'image': f'gone/{i}.jpg', 'id': f'gone {i}'} for i, row in enumerate(rows * 5)]
    (tmp_path / 'some.json').write_text(json.dumps(rows + gone))
    cfg.data.source, cfg.data.path, cfg.data.images = (
        'conversations',
        f'{tmp_path}/some.json',
        f'{llava_folder}/images.zip',
    )
    lost = {split: vqa.load_questions(cfg, split).lost for split in ('train', 'validation')}
    asked = sum(len(row['conversations']) // 2 for row in gone)
    named = {split: {row['image'] for row in rows} for split, rows in lost.items()}
    assert sum(map(len, lost.values())) == asked and not named['train'] & named['validation']
    assert 0 < len(named['validation']) < 0.12 * 300


def test_pictures_are_read_a_batch_at_a_time(model_run, tmp_path, monkeypatch):
    model_run(looks=True)
    monkeypatch.setattr(vqa, 'BATCH', 8)
    decode, alive, most = images.decode, weakref.WeakSet(), []

    class Picture(np.ndarray):  # an array that can be watched
        __hash__ = object.__hash__
        __eq__ = object.__eq__

    def watched(data, vision):
        picture = decode(data, vision).view(Picture)
        alive.add(picture)
        most.append(len(alive))
        return picture

    monkeypatch.setattr(images, 'decode', watched)
    found = {}
    for count in (40, 120):
        found[count] = evaluating.evaluate(tmp_path / f'{count}', 'vqa', **many(tmp_path / f'{count}', {}, count))
    assert len(most) >= 3 * 160 and max(most) <= 2 * 8
    assert found[120].accuracy == 1.0 and found[120].controls['blank'] == 0.0


def test_a_picture_that_vanishes_is_said(model_run, tmp_path, monkeypatch):
    model_run(looks=True)
    files = many(tmp_path, {}, 8)
    monkeypatch.setattr(vqa, 'check_left_out', lambda *_: (tmp_path / 'many/5.png').unlink())
    with pytest.raises(UserError, match=r"cannot be read again: missing image '5\.png'\.$"):
        evaluating.evaluate(tmp_path / 'run', 'vqa', **files)


def test_a_result_of_older_code_is_still_told(tmp_path):
    values = {'task': 'vqa', 'n': 9, 'accuracy': 0.75, 'interval': [0.4, 0.9], 'by_kind': {}, 'controls': {}}
    (tmp_path / 'eval').mkdir()
    (tmp_path / 'eval/vqa-heldout.json').write_text(json.dumps(values | {'too_long': 0}))
    (tmp_path / 'eval/bpb.json').write_text(json.dumps({'task': 'bpb', 'n': 9}))
    (tmp_path / 'eval/vqa-by-somebody.json').write_text('no result')
    (compressed, text), (split, questions) = ((split, result) for split, result in base.read_results(tmp_path))
    assert (compressed, text.lines()) == ('validation', ['task: bpb', 'n: 9'])
    assert split == 'heldout' and len(questions.lines()) == 1 and questions.to_json() == values | {'too_long': 0}
    (tmp_path / 'eval/vqa.json').write_text(json.dumps({'task': 'vqa', 'n': 9}))
    with pytest.raises(UserError, match=r'eval/vqa\.json is damaged'):
        base.read_results(tmp_path)


def test_questions_are_asked_alone_with_what_the_system_says(tmp_path, tokenizer):
    system, user, answer = ({'role': role, 'content': role} for role in ('system', 'user', 'assistant'))
    assert vqa.pairs([system, user, answer, user, answer, user]) == [(user, answer)] * 2
    turns = [
        {'from': 'system', 'value': 'Be brief.'},
        *[{'from': 'human', 'value': 'a?'}, {'from': 'gpt', 'value': 'b'}] * 2,
    ]
    files = many(tmp_path, {}, 1, row0={'conversations': turns})
    cfg = micro.odd_config('vision_instruct')
    found = vqa.load_questions(cfg, 'validation', files['data'], files['images']).found
    content = [{'type': 'image'}, {'type': 'text', 'text': 'a?'}]
    told = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': content}]
    wanted = conversation.encode(told, tokenizer, [cfg.model.vision.patches], question=True).ids
    assert [vqa.prompt_ids(question, cfg, tokenizer).tolist() for question in found] == [wanted.tolist()] * 2
    assert 'Be brief.' in tokenizer.decode(wanted)


def test_a_picture_that_is_null_and_an_answer_that_is_empty_are_left_out(tokenizer, tmp_path):
    turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'a cat'}]
    silent = [{'from': 'human', 'value': 'What?'}, {'from': 'gpt', 'value': ' '}]
    odd = [{'from': 'human', 'value': 'What?'}, {'from': 'gpt', 'value': 'a cat', 'kind': 5}]
    null = {'image': None, 'conversations': turns}
    files = many(tmp_path, {}, 4, row0=null, row1={'conversations': silent}, row2={'conversations': odd})
    questions = vqa.load_questions(micro.odd_config('vision_instruct'), 'validation', files['data'], files['images'])
    assert questions.reasons() == {'1 image places for 0 images': 1, 'empty answer': 1}
    assert [question.kind for question in questions.found] == ['5', 'what colour is']


@pytest.mark.parametrize(('answer', 'reference'), [('<', '>'), ('+', '-'), ('', '?'), ('-5', '5')])
def test_signs_are_not_all_the_same(answer, reference):
    assert vqa.score('any', answer, reference) == 0 and vqa.score('any', reference, f' {reference} ') == 1


def test_what_cannot_be_evaluated_is_said(model_run, squares, monkeypatch):
    model_run(looks=True)
    data = squares / 'squares.json'
    for options, message in (
        ({'task': 'vqb'}, "no task 'vqb'. Did you mean 'vqa'"),
        ({'split': 'hedlout'}, "no split 'hedlout'. Did you mean 'heldout'"),
        ({'limit': 0}, '--limit takes a number above 0, not 0'),
        ({'task': 'bpb', 'images': squares, 'data': None}, '--images is for vqa: bpb reads text alone'),
        ({'task': 'bpb', 'allow_missing': True}, '--allow-missing is for vqa: bpb reads text alone'),
        ({'data': None, 'images': squares}, '--images is where the pictures of --data are: it takes --data too'),
        ({'output': data}, r'squares\.json cannot be a folder: .*squares\.json is none'),
        ({'output': '/proc/out'}, '/proc/out cannot be written: nothing can be made in /proc'),
        ({'limit': 2}, 'all questions are about one picture'),
        ({'data': squares / 'nothing.json'}, r'there is no .*nothing\.json: --data is what vqa asks about'),
        ({'task': 'bpb', 'data': squares / 'nothing.txt'}, r'there is no .*nothing\.txt'),
        ({'task': 'bpb', 'split': 'heldout', 'data': None}, 'text has no heldout split'),
    ):
        with pytest.raises(UserError, match=message):
            evaluating.evaluate(squares / 'run', **{'task': 'vqa', 'data': data} | options)
    model_run(looks=True, stage='clip')
    with pytest.raises(UserError, match='bpb takes a run with a decoder'):
        evaluating.evaluate(squares / 'run', 'bpb', data=data)
    monkeypatch.setattr(evaluating, 'load', lambda run_dir: pytest.fail('the run was opened'))
    with pytest.raises(UserError, match='cannot be written'):
        evaluating.evaluate(squares / 'run', 'vqa', data=data, output='/proc/out')
    model_run(looks=True, stage='sft')
    with pytest.raises(UserError, match='a sft run cannot answer it'):
        evaluating.evaluate(squares / 'run', 'vqa', data=data)
    assert not (squares / 'run').exists()


def test_questions_come_from_the_held_out_pictures_alone(llava_folder, tiny_config):
    cfg = micro.odd_config('vision_instruct')
    cfg.data.source, cfg.data.path = 'conversations', str(llava_folder / 'instruct.json')
    sides = {split: {q.image for q in vqa.load_questions(cfg, split).found} for split in ('train', 'validation')}
    assert {split: len(names) for split, names in sides.items()} == {'train': 56, 'validation': 4}
    assert not sides['train'] & sides['validation']
    found = vqa.load_questions(tiny_config('vision_instruct'), 'heldout', limit=50).found
    assert len(found) == 50 and len({q.place for q in found}) == len({q.image for q in found}) < 24
    assert 'description' in {q.kind for q in found} and len({q.id for q in found}) == 50


@pytest.mark.parametrize(('stage', 'limit'), [('sft', None), ('vision_instruct', 2)])
def test_bits_per_byte_are_the_numpy_ones(stage, limit, tokenizer, tmp_path, monkeypatch):
    cfg = micro.odd_config(stage)
    graphdef, params = micro.model(cfg, tokenizer)
    opened = types.SimpleNamespace(config=cfg, tokenizer=tokenizer, graphdef=graphdef, params=params)
    monkeypatch.setattr(evaluating, 'load', lambda run_dir: opened)
    words = 'the naïve cat sees a big red house, under the tree.\nüber 你好 café 42! ' * 4
    (tmp_path / 'words.txt').write_text(words)
    found = evaluating.evaluate(tmp_path / 'run', 'bpb', data=tmp_path / 'words.txt', limit=limit)

    ids = [tokenizer.end_of_text, *tokenizer.encode(words)]
    length, windows = cfg.data.length, limit or (len(ids) - 1) // cfg.data.length
    assert windows > 1
    p = micro.double(params.get('decoder', params))
    nats = 0
    for start in range(0, windows * length, length):
        here = ids[start : start + length + 1]
        logits = reference.decoder(p, p['embedding']['embedding'][here[:-1]])[:, : tokenizer.size]
        logits -= logits.max(1, keepdims=True)
        nats += sum(np.log(np.exp(row).sum()) - row[target] for row, target in zip(logits, here[1:], strict=True))
    size = len(tokenizer.decode(ids[1 : windows * length + 1]).encode())
    assert (found.task, found.n, found.bytes) == ('bpb', windows * length, size)
    assert found.loss == pytest.approx(nats / (windows * length), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    (file,) = (tmp_path / 'run/eval').iterdir()
    assert file.name == f'bpb-of-words{f"-limit{limit}" if limit else ""}.json'
    assert json.loads(file.read_text()) == found.to_json()
    rest, beyond = (len(ids) - 1) % length, (len(ids) - 1) // length * length - windows * length
    other = {'token behind the last whole window': rest} | ({'token beyond the limit': beyond} if beyond else {})
    assert (found.asked, found.left_out, found.other) == (windows * length, {}, other)
    assert rest and bool(beyond) == bool(limit)
    assert found.lines()[0] == 'task: bpb' and f'bytes: {size}' in found.lines()


# A real engine -------------------------------------------------------------------------------------------------------


def test_the_scores_of_a_real_run_are_those_of_asking_it_by_hand(tokenizer, tmp_path, monkeypatch):
    """Of a model that never learned: four of seven wanted answers are what it says."""
    monkeypatch.setattr(vqa, 'BATCH', 4)
    run_dir = micro.run_folder(micro.odd_config('vision_instruct', tmp_path / 'run'), tokenizer)
    opened, rng = nanovision_jax.load(run_dir), np.random.default_rng(0)

    def by_hand(image, text):
        messages = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': text}]}]
        return opened.chat(messages, images=[image], max_new_tokens=64)

    shown, rows = {}, []
    for i in range(7):
        image, text = Image.fromarray(rng.integers(0, 256, (21, 21, 3), np.uint8)), ('cat?', 'dog?')[i % 2]
        shown[f'{i}.png'] = image
        image.save(tmp_path / f'{i}.png')
        said = [('human', f'<image>\n{text}'), ('gpt', by_hand(image, text) if i % 3 else 'a house')]
        said = [{'from': who, 'value': value} for who, value in said]
        rows.append({'id': f'q{i}', 'image': f'{i}.png', 'conversations': said})
    (tmp_path / 'rows.json').write_text(json.dumps(rows))
    found = evaluating.evaluate(run_dir, 'vqa', data=tmp_path / 'rows.json', images=tmp_path)

    asked = [json.loads(line) for line in (run_dir / 'eval/vqa-of-rows.jsonl').read_text().splitlines()]
    assert [row['answer'] for row in asked] == [by_hand(shown[row['image']], row['question']) for row in asked]
    assert len({row['answer'] for row in asked}) > 2  # it does look
    other, grey = base.others([row['image'] for row in asked]), Image.new('RGB', (21, 21), (128, 128, 128))

    def mean(image_of):
        scores = [
            vqa.score(row['kind'], by_hand(image_of(row['image']), row['question']), row['reference']) for row in asked
        ]
        return pytest.approx(np.mean(scores))

    assert found.n == found.asked == 7 and found.accuracy == mean(shown.get) == 4 / 7
    assert found.controls == {'blank': mean(lambda _: grey), 'shuffled': mean(lambda name: shown[other[name]])}
    assert found.controls['shuffled'] < found.accuracy
    assert {kind: row['n'] for kind, row in found.by_kind.items()} == {'cat?': 4, 'dog?': 3}


# Names and comparisons -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('given', 'part', 'told'),
    [
        ({}, 'validation', 'validation split'),
        ({'limit': 9}, 'limit9', 'validation split, at most 9 of it'),
        ({'split': 'heldout', 'limit': 9}, 'heldout-limit9', 'heldout split, at most 9 of it'),
        ({'data': 'a/my-own.file.json', 'limit': 9}, 'of-my-own-limit9', 'my-own, at most 9 of it'),
        ({'shots': 0}, 'shots0', 'validation split, 0 examples before each'),
    ],
)
def test_what_is_not_the_whole_split_says_so_in_its_name(given, part, told):
    assert base.part_of(**given) == part and base.told_part(part) == told


def results(run, scores, part='validation', task='vqa', question='What is it?'):
    """A run's evaluation with these {id: score}, two questions an image."""
    rows = [{'id': name, 'image': f'{int(name) // 2}.png', 'correct': score} for name, score in scores.items()]
    rows = [{'question': question} | row for row in rows]
    rows.append({'id': 'lost', 'image': None, 'left_out': 'missing image'})
    mean = float(np.mean(list(scores.values())))
    base.write_result(base.Accuracy(task, len(scores), mean, [mean, mean], {}, {}), rows, run / 'eval', part)


def test_runs_are_compared_on_what_all_were_asked(tmp_path, capsys):
    rng = np.random.default_rng(0)
    hard = rng.random(400) < 0.5  # for all of them
    first = {str(i): float(not hard[i]) for i in range(400)}
    better = first | {str(i): 1.0 for i in range(400) if hard[i] and i % 8 == 0}
    results(tmp_path / 'a', first)
    results(tmp_path / 'b', {name: better[name] for name in list(better)[:300]})
    results(tmp_path / 'c', first)
    evaluate.main(['--compare', *(str(tmp_path / name) for name in 'abc')])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == 'vqa, validation split: accuracy on 300 questions that all were asked, of up to 400'
    gained = 100 * np.mean([better[str(i)] - first[str(i)] for i in range(300)])
    assert f'{gained:+.1f} points' in lines[1] and 'chance' not in lines[1]
    low, high = map(float, re.search(r'95%: \+(.*) to \+(.*)\)', lines[1]).groups())
    assert 0 < low < gained < high < 2 * gained  # unpaired, it would be 8 points wide
    assert '+0.0 points (95%: +0.0 to +0.0), which may be chance' in lines[2]


def test_questions_that_share_a_number_alone_are_no_pair(tmp_path, capsys):
    results(tmp_path / 'a', {'1': 1.0, '2': 0.0})
    results(tmp_path / 'b', {'1': 0.0, '2': 0.0}, question='What is it not?')
    evaluate.main(['--compare', f'{tmp_path}/a', f'{tmp_path}/b'])
    assert capsys.readouterr().out.splitlines() == [
        'vqa, validation split: accuracy on 0 questions that all were asked, of up to 2'
    ]


def test_what_is_no_share_is_compared_as_it_is(tmp_path, capsys):
    for run, value in (('a', 0.8), ('b', 1.05)):
        rows = [{'id': name, 'image': name, 'scores': {'CIDEr': value}} for name in 'xy']
        controls = {'blank': {'CIDEr': value - 0.5}}
        result = base.Scores('coco_caption', 2, 'CIDEr', {'CIDEr': value}, [value, value], {}, controls, {})
        assert any(line.endswith(f'{value - 0.5:.2f}  (-0.50)') for line in result.lines())
        base.write_result(result, rows, tmp_path / run / 'eval', 'validation')
    evaluate.main(['--compare', f'{tmp_path}/a', f'{tmp_path}/b'])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ['0.80', f'{tmp_path}/a']
    assert '  1.05  ' in lines[2] and lines[2].endswith('  +0.25 (95%: +0.25 to +0.25)')


def test_what_cannot_be_compared_is_one_sentence(tmp_path):
    results(tmp_path / 'a', {'1': 1.0, '2': 0.0})
    results(tmp_path / 'b', {'1': 1.0}, part='heldout')
    runs = [str(tmp_path / name) for name in 'ab']
    for argv, why in (
        (['--compare', *runs], 'no evaluation, question by question, is in all of these runs'),
        (['--compare', runs[0]], '--compare takes two runs or more'),
        (['--compare', *runs, '--limit=3'], '--compare takes two runs or more, and --task'),
        (['--task=vqa'], '--run is missing'),
        ([f'--run={runs[0]}'], '--task is missing'),
    ):
        with pytest.raises(UserError, match=why):
            evaluate.main(argv)
