"""The index: which examples are usable, which are not and why, how long they are, and that it is made once."""

import concurrent.futures
import json
import pathlib
import random
import subprocess
import sys
import textwrap
import threading
import zipfile

import numpy as np
import pytest
from conftest import ROOT, is_held_out, jpeg, parse, sentence

from nanovision_jax.data import index, pipeline, sources, workers
from nanovision_jax.errors import UserError

GOOD = [{'from': 'human', 'value': '<image>\nwhat?'}, {'from': 'gpt', 'value': 'a cat'}]
MORE = [{'from': 'human', 'value': 'and?'}, {'from': 'gpt', 'value': 'a dog'}]
BAD = {
    'image does not decode': {'image': 'broken.jpg', 'conversations': GOOD},
    "unknown speaker 'narrator'": {'image': 'a.jpg', 'conversations': [{'from': 'narrator', 'value': 'x'}, *GOOD]},
    'no answer': {'image': 'a.jpg', 'conversations': GOOD[:1]},
    '3 images for 2 slots': {
        'images': ['a.jpg'] * 3,
        'conversations': [{'from': 'human', 'value': '<image>' * 3}, GOOD[1]],
    },
    "missing image 'none.jpg'": {'image': 'none.jpg', 'conversations': GOOD},
}


@pytest.fixture
def made(tmp_path):
    """(a function that writes rows and gives their vision_instruct config, the training picture)."""
    rng, data = np.random.default_rng(0), b''
    while not data or is_held_out(data):
        data = jpeg(rng)
    with zipfile.ZipFile(tmp_path / 'images.zip', 'w') as file:
        file.writestr('a.jpg', data)
        file.writestr('broken.jpg', data[: len(data) // 2])

    def write(rows, *overrides, stage='vision_instruct'):
        (tmp_path / 'x.json').write_text(json.dumps(rows))
        place = [f'run_dir={tmp_path}/runs/{stage}', f'data.path={tmp_path}/x.json', 'data.source=conversations']
        return parse(stage, 'data.slots=2', *place, *overrides)

    return write


def good(n):
    return [{'image': 'a.jpg', 'conversations': GOOD}] * n


def build(config, tokenizer, split='train'):
    return index.build_index(sources.open_source(config, split), config, tokenizer, split)


def test_turns_with_pictures_beyond_the_slots_are_left_out_with_their_answers(made, tokenizer):
    turns = [{'from': 'human', 'value': '<image>\nand?'}, MORE[1]]
    rows = [*good(200), {'image': ['a.jpg'] * 3, 'conversations': [*GOOD, *turns, *turns, *MORE]}]
    config = made(rows)
    found = build(config, tokenizer)
    assert not found.bad and found.shortened == 1 and found.images[-1] == 2
    ids, learned, images = index.encode_example(sources.open_source(config, 'train')[200], config, tokenizer)
    short = made([{'image': ['a.jpg'] * 2, 'conversations': [*GOOD, *turns]}])
    wanted = index.encode_example(sources.open_source(short, 'train')[0], short, tokenizer)
    assert len(images) == 2 and ids.tolist() == wanted[0].tolist() and learned.tolist() == wanted[1].tolist()


def test_bad_rows_are_skipped_counted_and_listed(made, tokenizer):
    rows = good(500)
    places = dict(zip(BAD, (0, 7, 100, 333, 504), strict=True))
    for reason, place in places.items():
        rows.insert(place, BAD[reason])
    found = build(made(rows), tokenizer)
    assert found.bad == [{'row': place, 'reason': reason} for reason, place in places.items()]
    assert found.rows.tolist() == [i for i in range(505) if i not in places.values()]
    assert len(set(found.lengths.tolist())) == 1 and (found.images == 1).all()


@pytest.mark.parametrize('reason', BAD)
def test_one_bad_row_in_a_hundred_is_left_out(made, tokenizer, reason):
    found = build(made([*good(99), BAD[reason]]), tokenizer)
    assert len(found.rows) == 99 and found.bad == [{'row': 99, 'reason': reason}]


def test_over_one_percent_is_refused_with_the_reasons(made, tokenizer):
    rows = good(94) + [BAD['no answer']] * 3 + [BAD["missing image 'none.jpg'"]] * 2 + [BAD['image does not decode']]
    with pytest.raises(UserError) as caught:
        build(made(rows), tokenizer)
    told = str(caught.value)
    assert told.startswith('6 of 100 examples')
    assert '(at most 1% may be): 3 × no answer; 2 × missing image; 1 × image does not decode. ' in told
    listed = pathlib.Path(told.rpartition('decode. ')[2].removesuffix(' lists them.'))
    assert [json.loads(line)['row'] for line in listed.read_text().splitlines()] == list(range(94, 100))
    assert listed.parent == made(rows).family / 'data' and '\n' not in told


def test_reasons_of_one_kind_are_counted_together(made, tokenizer):
    missing = [{'image': f'no\'{i}".jpg', 'conversations': GOOD} for i in range(7)]
    with pytest.raises(UserError, match=r'7 of 7 examples .*: 7 × missing image\. '):
        build(made(missing), tokenizer)
    found = build(made([*good(700), *missing]), tokenizer)
    assert found.reasons == {'missing image': len(found.left_out)} and len(found.bad) == 7


def test_a_bad_row_of_a_text_stage_has_its_number_in_the_file(made, tokenizer):
    text = [{'from': 'human', 'value': 'a?'}, {'from': 'gpt', 'value': 'b'}]
    rows = good(3) + [{'conversations': text}] * 150 + [{'conversations': text[:1]}]
    found = build(made(rows, stage='sft'), tokenizer)
    assert found.bad == [{'row': 153, 'reason': 'no answer'}]
    assert len(found.rows) == 150


def test_lengths_are_those_of_the_examples(llava_folder, tokenizer, tmp_path):
    for stage in ('vision_pretrain', 'vision_instruct', 'clip', 'sft'):
        name = 'instruct' if stage in ('vision_instruct', 'sft') else 'pretrain'
        place = [f'run_dir={tmp_path}/{stage}', 'data.source=conversations', f'data.path={llava_folder}/{name}.json']
        config = parse(stage, *place)
        source, found = sources.open_source(config, 'train'), build(config, tokenizer)
        assert len(found.rows) >= 10
        for row, length, pictures in zip(found.rows, found.lengths, found.images, strict=True):
            ids, learned, _ = index.encode_example(source[row], config, tokenizer)
            assert length == len(ids) - 1 == len(learned) - 1
            assert pictures == len(source[row].images)


def test_the_two_sides_share_nothing_and_leave_nothing(llava_folder, tokenizer, tmp_path):
    place = [f'run_dir={tmp_path}/x', 'data.source=conversations', f'data.path={llava_folder}/pretrain.json']
    config = parse('vision_pretrain', *place)
    train, validation = (set(build(config, tokenizer, split).rows.tolist()) for split in ('train', 'validation'))
    assert not train & validation and train | validation == set(range(60))
    assert len(validation) == 4


def test_long_conversations_are_cut_and_longer_ones_left_out(made, tokenizer):
    rng = random.Random(0)
    said = [{'from': ('human', 'gpt')[i % 2], 'value': sentence(rng, 5, 9)} for i in range(60)]
    said[0]['value'] = '<image>' + said[0]['value']
    endless = [GOOD[0], {'from': 'gpt', 'value': 'cat ' * 600}]
    rows = [*good(200), {'image': 'a.jpg', 'conversations': said}, {'image': 'a.jpg', 'conversations': endless}]
    found = build(made(rows, 'data.length=128'), tokenizer)
    assert 64 < found.lengths[-1] <= 128 and len(found.rows) == 201
    assert (found.asked, found.dropped, found.shortened, found.cut, found.bad) == (202, 1, 1, 0, [])


def test_captions_for_clip(made, tokenizer):
    rows = [
        *good(300),
        {'conversations': [{'from': 'human', 'value': 'a?'}, GOOD[1]]},
        {'image': 'a.jpg', 'conversations': [GOOD[0], {'from': 'gpt', 'value': ' '}]},
        {'image': 'a.jpg', 'conversations': [GOOD[0], {'from': 'gpt', 'value': 'cat ' * 600}]},
    ]
    config = made(rows, stage='clip')
    found = build(config, tokenizer)
    reasons = ['0 images where clip needs one', 'no caption']
    assert found.bad == [{'row': 300 + i, 'reason': reason} for i, reason in enumerate(reasons)]
    assert found.lengths[-1] == config.data.length - 1
    ids, *_ = index.encode_example(sources.open_source(config, 'train')[0], config, tokenizer)
    assert ids.tolist() == [tokenizer.end_of_text, *tokenizer.encode('a cat'), tokenizer.end]


def test_nothing_left_is_refused(made, tokenizer):
    with pytest.raises(
        UserError, match=r'no validation example in .*: of 10 examples 5% should be, .* and none is; more'
    ):
        build(made(good(10)), tokenizer, 'validation')
    with pytest.raises(UserError, match='no train example'):
        build(made([]), tokenizer)


def test_what_each_split_lost_is_counted(made, tokenizer):
    """Of every split: asked, used, and left out with the reason; a row without its picture is on one side too."""
    rng = np.random.default_rng(3)
    broken = [{'image': 'broken.jpg', 'conversations': GOOD}] * 10
    missing = [{'id': i, 'image': f'none{i}.jpg', 'conversations': GOOD} for i in range(60)]
    rows = [*good(5000), *broken, *missing, *[{'conversations': []}] * 3]
    said = [{'from': 'human', 'value': ''}, {'from': 'gpt', 'value': 'b'}]
    rows += [{'conversations': [{**said[0], 'value': f'q {rng.random()}?'}, said[1]]} for _ in range(3000)]
    config = made(rows)
    train, validation = (build(config, tokenizer, split) for split in ('train', 'validation'))
    assert train.asked + validation.asked == len(rows) == 8073
    assert train.asked == len(train.rows) + len(train.left_out)
    assert sorted(train.left_out + validation.left_out, key=lambda row: row['row']) == train.bad == validation.bad
    lost = [sum('missing' in row['reason'] for row in found.left_out) for found in (train, validation)]
    assert sum(lost) == 60 and 0 < lost[1] < 10  # about a twentieth
    everywhere = train.reasons, validation.reasons
    assert sum(reasons.get('image does not decode', 0) for reasons in everywhere) == 10
    assert any('no answer' in reasons for reasons in everywhere)
    assert sum(map(sum, (reasons.values() for reasons in everywhere))) == len(train.bad) == 73


@pytest.mark.parametrize('stage', ['sft', 'vision_instruct', 'clip'])
def test_one_held_out_example_is_enough_for_batches(made, tokenizer, stage, tmp_path):
    """A set of 20 rows has one on average: its row comes again and again."""
    n = next(n for n in range(1000) if is_held_out(f'q {n}?'.encode()))
    rng, data = np.random.default_rng(n), b''
    while not is_held_out(data):
        data = jpeg(rng)
    config = made([], stage=stage)
    with zipfile.ZipFile(tmp_path / 'images.zip', 'a') as file:
        file.writestr('held_out.jpg', data)
    talk = [{'from': 'human', 'value': f'q {n}?'}, GOOD[1]]
    held_out = {'conversations': talk} if stage == 'sft' else {'image': 'held_out.jpg', 'conversations': GOOD}
    others = [{'conversations': [{'from': 'human', 'value': 'other'}, GOOD[1]]}] * 20 if stage == 'sft' else good(20)
    config = made([*others, held_out], stage=stage)
    train, validation = (pipeline.open_rows(config, tokenizer, split)[0] for split in ('train', 'validation'))
    assert len(train.index.rows) == 20 and validation.index.rows.tolist() == [20] and validation.rows_per_epoch() == 1
    stream = pipeline.batches(validation, 4)
    for batch in (next(stream), next(stream)):
        if stage == 'clip':
            ends = batch.pop('ends')
            assert len(ends) == 4 and len(set(batch['tokens'].ravel()[ends])) == 1
            batch = {'images': batch['images']}
        assert all(len(array) == 4 and (array == array[:1]).all() for array in batch.values())
    assert validation.index.asked == 1 and validation.efficiency()['tokens'] > 0


# Too long ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def long(made):
    """(a function: how many of 100 rows are long, overrides → config; the long row, and one whose question is long)."""
    answer = {'image': 'a.jpg', 'conversations': [GOOD[0], {'from': 'gpt', 'value': 'cat dog ' * 300}, *MORE]}
    question = {'image': 'a.jpg', 'conversations': [{'from': 'human', 'value': '<image>' + 'cat ' * 600}, GOOD[1]]}

    def write(n, *overrides, row=answer):
        return made([*good(100 - n), *[row] * n], 'data.length=64', *overrides)

    return write, answer, question


@pytest.mark.parametrize('n, how', [(5, ''), (5, 'drop'), (60, 'drop')])
def test_too_long_rows_are_dropped_and_counted(long, tokenizer, n, how):
    found = build(long[0](n, f'data.too_long={how}'), tokenizer)
    assert (found.asked, len(found.rows), found.dropped, found.bad) == (100, 100 - n, n, [])
    assert found.told(64) == [
        f'{n} of 100 conversations ({n}.0%) have a first answer beyond data.length=64 and are left out'
    ]


@pytest.mark.parametrize(
    'n, how, told', [(6, '', 'up to 5% are left out by themselves'), (1, 'refuse', 'none may have')]
)
def test_more_too_long_rows_than_allowed_are_refused(long, tokenizer, n, how, told):
    with pytest.raises(UserError) as caught:
        build(long[0](n, f'data.too_long={how}'), tokenizer)
    assert str(caught.value).startswith(f'{n} of 100 examples of ') and f'data.length=64 ({told})' in str(caught.value)
    assert str(caught.value).endswith('data.too_long=drop or data.too_long=cut.')


def test_a_too_long_answer_is_cut_to_its_beginning(long, tokenizer):
    write, answer, question = long
    config = write(20, 'data.too_long=cut')
    found = build(config, tokenizer)
    assert (found.asked, len(found.rows), found.cut, found.dropped, found.shortened) == (100, 100, 20, 0, 0)
    assert found.lengths[-1] == 64 and found.images[-1] == 1
    ids, learned, pictures = index.encode_example(sources.open_source(config, 'train')[99], config, tokenizer)
    whole = list(tokenizer.encode(answer['conversations'][1]['value']))
    said = ids[learned].tolist()
    assert len(said) > 20 and said == whole[: len(said)] and tokenizer.end not in said and learned[-1]
    assert len(pictures) == 1 and (ids == tokenizer.image).sum() == config.model.vision.patches
    found = build(write(20, 'data.too_long=cut', row=question), tokenizer)  # of the answer, nothing fits
    assert (len(found.rows), found.cut, found.dropped) == (80, 0, 20)


def test_what_became_of_long_conversations_is_printed_once(long, tokenizer, capsys):
    config = long[0](20, 'data.too_long=cut')
    rows, _ = pipeline.open_rows(config, tokenizer)
    told = '20 of 100 conversations (20.0%) have a first answer beyond data.length=64 and learn its beginning\n'
    assert capsys.readouterr().out == told
    assert sum(rows[i]['segments'].max() for i in range(rows.rows_per_epoch())) == len(rows.index.rows) == 100
    cut = rows.identity()
    config.data.too_long = 'drop'
    other = pipeline.open_rows(config, tokenizer)[0].identity()
    assert cut['packing'] != other['packing'] and cut['data'] == other['data']


def test_a_wrong_word_for_too_long_is_one_sentence(made):
    with pytest.raises(UserError, match=r"data\.too_long is 'cat'. Did you mean 'cut'"):
        made(good(1), 'data.too_long=cat')


# Made once -----------------------------------------------------------------------------------------------------------


def files(config):
    return {file: file.stat().st_mtime_ns for file in (config.family / 'data').glob('*.npz')}


def test_the_index_is_made_once(made, tokenizer, monkeypatch):
    config = made([*good(150), BAD['no answer']])
    first = build(config, tokenizer)
    kept = files(config)
    assert len(kept) == 1
    monkeypatch.setattr(sources.Conversations, '__getitem__', None)  # reading anything would fail
    again = build(config, tokenizer)
    assert files(config) == kept
    for name in ('rows', 'lengths', 'images', 'bad'):
        assert np.array_equal(getattr(first, name), getattr(again, name))


def test_an_index_without_its_list_of_bad_rows_is_made_again(made, tokenizer, capsys):
    config = made([*good(150), BAD['no answer']])
    first = build(config, tokenizer)
    (listed,) = (config.family / 'data').glob('*.bad_rows.jsonl')
    listed.unlink()
    again = build(config, tokenizer)
    assert again.bad == first.bad == [{'row': 150, 'reason': 'no answer'}] and listed.exists()
    assert 'is damaged (' in capsys.readouterr().out


def test_another_file_or_config_has_another_index(made, tokenizer):
    assert len(build(made(good(10)), tokenizer).rows) == 10
    assert len(build(made(good(12)), tokenizer).rows) == 12
    config = made(good(12), 'data.length=100')
    build(config, tokenizer)
    build(made(good(12), stage='clip'), tokenizer)
    assert len(files(config)) == 4


def test_a_run_that_goes_on_has_its_index_though_pictures_are_lost(own, tokenizer, tmp_path):
    fields = ['data.source=conversations', f'data.path={own.file}', 'data.length=64', 'data.slots=2']
    config = parse('vision_instruct', f'run_dir={tmp_path}/x/vision_instruct', *fields)

    def built(lost=(), split='train'):
        return index.build_index(sources.open_source(config, split), config, tokenizer, split, frozenset(lost))

    def same(one, other):
        return one.key == other.key and np.array_equal(one.rows, other.rows)

    before, held_out = built(), built(split='validation')
    gone, broken, other = before.rows[[3, 5, 7]].tolist()
    (own.images / f'{gone}.jpg').rename(tmp_path / 'aside')
    (own.images / f'{broken}.jpg').write_bytes(b'nothing')
    lost = [gone, broken, other]
    assert same(built(lost), before) and same(built(lost, 'validation'), held_out)
    assert not same(built([gone]), before)  # something else has changed too
    assert len(built().rows) == len(before.rows) - 2  # a new run has an index of its own
    assert same(built(lost), before)  # which is not taken for the older one
    (tmp_path / 'aside').rename(own.images / f'{gone}.jpg')
    assert same(built(lost), before)
    own.file.write_text(json.dumps(own.rows[::-1]))
    assert not same(built(range(300)), before)


def test_an_interrupted_pass_leaves_no_index(made, tokenizer, monkeypatch):
    config = made(good(10))
    with monkeypatch.context() as patch:
        patch.setattr(index.image_files, 'load', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # a mistake of ours is never taken for a bad example
            build(config, tokenizer)
    assert not list((config.family / 'data').iterdir())
    assert len(build(config, tokenizer).rows) == 10


# Bounds --------------------------------------------------------------------------------------------------------------


def test_only_a_window_of_examples_is_in_hand(made, tokenizer, monkeypatch):
    """Millions of examples: at no time are more of them read than are looked at."""
    config = made(good(20 * index.BLOCK))
    source, open_now, most, lock = sources.open_source(config, 'train'), 0, 0, threading.Lock()
    gone = []

    class Watched(sources.Example):
        def __del__(self):
            gone.append(1)

    read = sources.Conversations.__getitem__

    def watched(self, i):
        nonlocal open_now, most
        example = read(self, i)
        with lock:
            open_now += 1
            most = max(most, open_now - len(gone))
        return Watched(example.id, example.messages, example.images, example.names)

    monkeypatch.setattr(sources.Conversations, '__getitem__', watched)
    assert len(index.build_index(source, config, tokenizer, 'train').rows) == 20 * index.BLOCK
    assert open_now == 20 * index.BLOCK and most <= 2


def test_a_pass_takes_what_it_needs_and_no_more():
    taken, done = [], []

    def items():
        for i in range(100):
            taken.append(i)
            assert len(taken) - len(done) <= 9
            yield i

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for i in workers.ordered_map(pool, lambda i: i * i, items(), 8):
            done.append(i)
    assert done == [i * i for i in range(100)]


# In processes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pooled(monkeypatch):
    """Every pass of more than BLOCK examples is done by two processes."""
    monkeypatch.setattr(index, 'cores', lambda: 2)
    monkeypatch.setattr(index, 'TIMED', 0)
    monkeypatch.setattr(index, 'LEFT', 0)


@pytest.mark.parametrize('stage', ['vision_instruct', 'clip', 'sft'])
@pytest.mark.parametrize('too_long', ['drop', 'cut'])
def test_processes_find_what_one_finds(made, tokenizer, tmp_path, request, stage, too_long):
    """Bad rows of every kind, dropped, cut and shortened conversations, and both splits, on each side of a BLOCK."""
    rng = random.Random(0)
    long, talk = {'from': 'gpt', 'value': 'cat ' * 200}, [*GOOD, *MORE * 30]
    text = [{'from': 'human', 'value': 'a?'}, GOOD[1]]
    rows = [*good(700), *BAD.values(), *[{'image': 'a.jpg', 'conversations': [GOOD[0], long]}] * 9]
    rows += [{'image': 'a.jpg', 'conversations': talk}] * 50 + [{'conversations': [*text, *MORE * 30]}] * 50
    rows += [{'conversations': [{**text[0], 'value': f'{i}?'}, text[1]]} for i in range(300)]
    rng.shuffle(rows)
    rows += [{'conversations': text[:1]}, {'conversations': [text[0], long]}]
    config = made(rows, 'data.length=64', f'data.too_long={too_long}', stage=stage)
    monkeypatch = request.getfixturevalue('monkeypatch')
    monkeypatch.setattr(index, '_check_dropped', lambda *_: None)
    source, found, calls = sources.open_source(config, 'train'), {}, []
    index._scan(source, config, tokenizer, tmp_path / 'one.npz')
    request.getfixturevalue('pooled')
    monkeypatch.setattr(
        workers.Workers,
        'call',
        lambda self, start, call=workers.Workers.call: (calls.append(start), call(self, start))[1],
    )
    index._scan(source, config, tokenizer, tmp_path / 'two.npz')
    assert calls and sorted(calls) == list(range(index.BLOCK, len(source), index.BLOCK))
    for name in ('one', 'two'):
        with np.load(tmp_path / f'{name}.npz') as saved:
            found[name] = {key: saved[key] for key in saved.files}
    assert found['one'].keys() == {'lengths', 'pictures', 'sides', 'fits', 'key', 'base', 'stamps'}
    for key, array in found['one'].items():
        assert array.dtype == found['two'][key].dtype and np.array_equal(array, found['two'][key])
    listed = [(tmp_path / f'{name}.bad_rows.jsonl').read_bytes() for name in ('one', 'two')]
    assert listed[0] == listed[1] and (found['one']['lengths'] == 0).sum() == listed[0].count(b'\n') > 0
    if stage != 'clip':
        done = {index.WHOLE, index.SHORTENED, index.CUT if too_long == 'cut' else index.DROPPED}
        assert set(found['one']['fits']) == done and set(found['one']['sides']) == {True, False}


def test_a_pass_that_is_soon_over_starts_no_process(made, tokenizer, monkeypatch):
    monkeypatch.setattr(index, 'cores', lambda: 2)
    monkeypatch.setattr(index, 'TIMED', 0)
    monkeypatch.setattr(index, 'Workers', None)
    assert len(build(made(good(20 * index.BLOCK)), tokenizer).rows) == 20 * index.BLOCK


class Odd(sources.Source):
    """Examples that are not to be had: what is raised at number 150."""

    mixes_splits = True

    def __init__(self, kind, *args):
        self.kind, self.args = kind, args

    def __len__(self):
        return 1000

    def __getitem__(self, i):
        if i == 150:
            raise self.kind(*self.args)
        return sources.Example(
            str(i), [{'role': 'user', 'content': 'a?'}, {'role': 'assistant', 'content': 'b'}], [], []
        )

    def split_of(self, example):
        return 'train'


class Unreadable(Exception):
    """One that pickle writes and cannot read."""

    def __init__(self, one, two):
        super().__init__(f'{one} {two}')


@pytest.mark.parametrize(
    'raised, kind, told',
    [
        ((UserError, 'the zip file is damaged.'), UserError, r'^the zip file is damaged\.'),
        ((KeyError, 'x'), KeyError, 'x'),
        ((Unreadable, 1, 2), RuntimeError, 'Unreadable: 1 2'),
        ((SystemExit, 3), UserError, 'one of 2 processes that read the data ended early, with code 3: '),
    ],
)
def test_what_goes_wrong_in_a_process_is_raised_and_leaves_none(
    made, tokenizer, tmp_path, pooled, monkeypatch, raised, kind, told
):
    started = []
    start = subprocess.Popen.__init__
    monkeypatch.setattr(
        subprocess.Popen, '__init__', lambda self, *a, **k: (started.append(self), start(self, *a, **k))[1]
    )
    with pytest.raises(kind, match=told) as caught:
        index._scan(Odd(*raised), made(good(1), stage='sft'), tokenizer, tmp_path / 'x' / 'x.npz')
    if raised[0] == kind:
        assert 'in __getitem__' in caught.value.__notes__[0]  # where it happened is not lost
    assert len(started) == 2 and all(process.returncode is not None for process in started)
    assert not list((tmp_path / 'x').iterdir())


def test_an_interrupt_ends_the_processes(made, tokenizer, tmp_path, pooled, monkeypatch):
    started = []
    start = subprocess.Popen.__init__
    monkeypatch.setattr(
        subprocess.Popen, '__init__', lambda self, *a, **k: (started.append(self), start(self, *a, **k))[1]
    )

    def interrupted(pool, function, items, ahead):
        yield function(next(items))
        raise KeyboardInterrupt

    monkeypatch.setattr(index, 'ordered_map', interrupted)
    config = made(good(1000))
    with pytest.raises(KeyboardInterrupt):
        build(config, tokenizer)
    assert len(started) == 2 and all(process.returncode is not None for process in started)
    assert not list((config.family / 'data').iterdir())


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path):
    """As a notebook's cells, or a user's script, call the library; what is printed in a process harms nothing."""
    (tmp_path / 'script.py').write_text(
        textwrap.dedent("""
        from nanovision_jax.data import workers
        print('once')
        with workers.Workers(print, 2) as pool:
            print([future.result() for future in [pool.submit(pool.call, i) for i in range(5)]])
        """)
    )
    (tmp_path / 'elsewhere/nanovision_jax').mkdir(parents=True)
    (tmp_path / 'elsewhere/nanovision_jax/__init__.py').write_text('raise ImportError("of the current folder")')
    where = tmp_path / 'elsewhere'
    done = subprocess.run(
        [sys.executable, '../script.py'], cwd=where, capture_output=True, text=True, env={'PYTHONPATH': str(ROOT)}
    )
    assert done.stdout == f'once\n{[None] * 5}\n', done.stderr[-500:]
    assert sorted(done.stderr.split()) == list('01234')
