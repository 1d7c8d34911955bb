"""Rows: plans that fit, rows that are functions of (seed, i), every example once an epoch, nothing moved or lost."""

import concurrent.futures
import json
import math
import pickle
import random
import re

import numpy as np
import pytest
from conftest import parse
from PIL import Image

from nanovision_jax.data import catalog, images, index, packing, sources
from nanovision_jax.data.pairs import Captions, PairRows, longest_first
from nanovision_jax.errors import UserError

# Plans ---------------------------------------------------------------------------------------------------------------


def spread(seed, n=2000, length=512):
    rng = np.random.default_rng(seed)
    lengths = np.minimum(length, rng.lognormal(4.3, 0.7, n).astype(int) + 5)
    return rng.permutation(n), lengths, rng.integers(0, 3, n)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('slots', [2, 5, 100])
def test_a_plan_fits_and_holds_every_example_once(seed, slots):
    order, lengths, pictures = spread(seed)
    rows = packing.plan(order, lengths, pictures, 512, slots)
    assert sorted(i for row in rows for i in row) == list(range(2000))
    assert all(rows)
    assert max(lengths[row].sum() for row in rows) <= 512
    assert max(pictures[row].sum() for row in rows) <= slots


@pytest.mark.parametrize('seed', range(4))
def test_rows_are_nearly_full(seed):
    order, lengths, pictures = spread(seed)
    rows = packing.plan(order, lengths, np.zeros_like(pictures), 512, 0)
    assert lengths.sum() / (512 * len(rows)) > 0.93
    one_after_the_other, left = 1, 512
    for i in order:
        one_after_the_other, left = (one_after_the_other + 1, 512) if lengths[i] > left else (one_after_the_other, left)
        left -= lengths[i]
    assert len(rows) < 0.93 * one_after_the_other


def test_slots_are_used_where_they_bind():
    order, lengths, _ = spread(0)
    rows = packing.plan(order, lengths // 8, np.ones(2000, int), 512, 4)
    assert len(rows) == 2000 / 4


def test_a_plan_is_a_function_of_its_input():
    order, lengths, pictures = spread(1)
    first = packing.plan(order, lengths, pictures, 512, 4)
    assert packing.plan(order.copy(), lengths, pictures, 512, 4) == first
    assert packing.plan(order[::-1], lengths, pictures, 512, 4) != first


def test_an_example_of_the_whole_row_fits():
    assert packing.plan(np.arange(3), np.array([8, 8, 1]), np.array([0, 1, 1]), 8, 1) == [[0], [1], [2]]


def first_fit(order, lengths, pictures, length, slots, open_rows):
    """The rule, written a second time: [row] in the order in which they were closed."""
    done, rows = [], []
    for i in order:
        fits = [r for r in rows if lengths[[*r, i]].sum() <= length and pictures[[*r, i]].sum() <= slots]
        if not fits and len(rows) == open_rows:
            fullest = max(rows, key=lambda r: lengths[r].sum())
            done.append(fullest)
            rows = [r for r in rows if r is not fullest]
        if not fits:
            rows.append(fits := [])
            fits = [fits]
        fits[0].append(i)
    return done + rows


@pytest.mark.parametrize('open_rows, slots', [(16, 0), (16, 4), (3, 4), (64, 0)])
def test_a_plan_is_first_fit_whatever_is_looked_at_at_a_time(monkeypatch, open_rows, slots):
    order, lengths, pictures = spread(2)
    order, pictures = order[:600], pictures if slots else np.zeros_like(pictures)
    wanted = first_fit(order.tolist(), lengths, pictures, 512, slots, open_rows)
    for chunk in (7, 600, 1 << 16):
        monkeypatch.setattr(packing, 'CHUNK', chunk)
        assert packing.plan(order, lengths, pictures, 512, slots, open_rows) == wanted


def test_chats_of_two_fifths_of_a_row_fill_97_percent_of_it_with_128_open():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.9, 0.6, 40_000), 20, 1024).astype(np.int32)
    order, none = np.random.default_rng(1).permutation(40_000), np.zeros(40_000, np.int32)
    share = [lengths.sum() / 1024 / len(packing.plan(order, lengths, none, 1024, 0, rows)) for rows in (16, 128)]
    assert 0.40 < lengths.mean() / 1024 < 0.42 and 0.96 < share[0] < 0.97 < share[1]


# Orders --------------------------------------------------------------------------------------------------------------


def test_each_epoch_has_an_order_of_its_own():
    drawn = [packing.Shuffled(50, 3).at(i) for i in range(150)]
    assert [epoch for epoch, _ in drawn] == [0] * 50 + [1] * 50 + [2] * 50
    orders = [tuple(thing for epoch, thing in drawn if epoch == e) for e in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({*orders, tuple(range(50))}) == 4
    assert [packing.Shuffled(50, 4).at(i)[1] for i in range(50)] != list(orders[0])
    assert [packing.Shuffled(50, 3, shuffle=False).at(i) for i in (0, 49, 50)] == [(0, 0), (0, 49), (1, 0)]


def test_orders_do_not_depend_on_who_asks_when():
    expected = [packing.Shuffled(2, 0).at(i) for i in range(3000)]
    shuffled = packing.Shuffled(2, 0)
    assert [shuffled.at(i) for i in reversed(range(3000))] == expected[::-1]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shuffled.at, range(3000))) == expected


# Mixtures ------------------------------------------------------------------------------------------------------------

SIZES, WEIGHTS = (1000, 60, 300), (0.7, 0.1, 0.2)


def parts_of(order):
    """How many of each part's things an order draws."""
    return np.bincount(np.searchsorted(np.cumsum(SIZES), order, side='right'), minlength=3).tolist()


def test_an_epoch_of_a_mixture_has_its_shares():
    mixed = packing.Mixed(SIZES, WEIGHTS, seed=3)
    assert mixed.n == 600  # 10% of it are the 60 that there are
    assert len(set(mixed.order(0).tolist())) == 600
    for epoch in range(4):
        order = mixed.order(epoch)
        assert parts_of(order) == [420, 60, 120]
        for part, share in enumerate((0.7, 0.1, 0.2)):  # well mixed: any 100 in a row have about the shares
            drawn = [parts_of(order[i : i + 100])[part] for i in range(0, 600, 100)]
            assert all(abs(count - 100 * share) < 20 for count in drawn)


def test_a_mixture_goes_through_each_part_before_it_repeats():
    mixed = packing.Mixed(SIZES, WEIGHTS, seed=3)
    drawn = np.concatenate([mixed.order(epoch) for epoch in range(5)])
    counts = np.bincount(drawn, minlength=sum(SIZES))
    assert set(counts[:1000].tolist()) == {2, 3} and counts[:1000].sum() == 5 * 420
    assert set(counts[1000:1060].tolist()) == {5}
    assert set(counts[1060:].tolist()) == {2} and counts[1060:].sum() == 5 * 120


def test_a_mixtures_order_is_a_function_of_seed_and_epoch():
    wanted = [packing.Mixed(SIZES, WEIGHTS, seed=3).order(epoch) for epoch in range(6)]
    mixed = pickle.loads(pickle.dumps(packing.Mixed(SIZES, WEIGHTS, seed=3)))
    for epoch in (5, 0, 3, 3, 1):
        assert np.array_equal(mixed.order(epoch), wanted[epoch])
    assert not np.array_equal(wanted[0], wanted[1])
    assert not np.array_equal(wanted[0], packing.Mixed(SIZES, WEIGHTS, seed=4).order(0))


def test_an_unshuffled_mixture_has_every_part_from_the_start():
    order = packing.Mixed(SIZES, WEIGHTS, seed=3, shuffle=False).order(0)
    assert [parts_of(order[i : i + 100]) for i in range(0, 600, 100)] == [[70, 10, 20]] * 6
    first = order[order < 1000]
    assert len(first) > 400 and (np.diff(first) > 0).all()


@pytest.mark.parametrize('subset, wanted', {
    '': (0, 200), '[:10%]': (0, 20), '[10%:]': (20, 200), '[-5%:]': (190, 200), '[50:70]': (50, 70),
    '[-3:]': (197, 200), '[:1000]': (0, 200), '[25%:75%]': (50, 150), '[:]': (0, 200),
}.items())  # fmt: skip
def test_bounds_of_a_subset(subset, wanted):
    assert catalog.bounds(subset, 200) == wanted


def test_weights_are_shares():
    parts = catalog.parse_mixture('llava_instruct[:10%]:3, magpie:1')
    assert parts == (('llava_instruct', '[:10%]', 0.75), ('magpie', '', 0.25))


# Conversations -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def make(llava_folder, tokenizer, tmp_path_factory):
    """A function that gives fresh rows over LLaVA's files: (stage, seed, *overrides) → rows."""
    folder = tmp_path_factory.mktemp('family')

    def fresh(stage='vision_instruct', seed=0, *overrides, split='train', **options):
        name = 'instruct' if stage in ('vision_instruct', 'sft') else 'pretrain'
        place = [f'run_dir={folder}/{stage}', 'data.source=conversations', f'data.path={llava_folder}/{name}.json']
        config = parse(stage, 'data.length=128', 'data.slots=3', *place, *overrides)
        source = sources.open_source(config, split)
        kind = PairRows if stage == 'clip' else packing.PackedRows
        found = index.build_index(source, config, tokenizer, split)
        return kind(source, found, config, tokenizer, packing.Shuffled(len(found.rows), seed, **options))

    return fresh


def same(a, b):
    pairs = [(a[name], b[name]) for name in a]
    return a.keys() == b.keys() and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


STAGES = ['vision_instruct', 'vision_pretrain', 'sft', 'clip']


@pytest.mark.parametrize('stage', STAGES)
def test_rows_are_functions_of_seed_and_place(make, stage):
    rows = make(stage)
    n = 2 * rows.rows_per_epoch() + 3
    read = [rows[i] for i in range(n)]
    backwards, again = make(stage), pickle.loads(pickle.dumps(make(stage)))
    for i in reversed(range(n)):
        assert same(backwards[i], read[i])
    for i in (n - 1, 0, n // 2):
        assert same(again[i], read[i]) and same(make(stage)[i], read[i])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(map(same, pool.map(make(stage).__getitem__, range(n)), read))


@pytest.mark.parametrize('stage', [*STAGES, 'pretrain'])
def test_rows_have_the_types_of_the_contract(make, tokenizer, stage):
    rows = text_rows([documents(tokenizer, 40)], tokenizer) if stage == 'pretrain' else make(stage)
    types = {'weights': np.float32, 'images': np.uint8}
    for name, array in rows[0].items():
        assert array.dtype == types.get(name, np.int32), name
    wanted = {'tokens', 'targets', 'weights', 'segments', 'positions'} | ({'images'} if 'vision' in stage else set())
    assert set(rows[0]) == ({'images', 'ids'} if stage == 'clip' else wanted)


@pytest.mark.parametrize('stage', STAGES)
def test_seeds_and_epochs_differ(make, stage):
    rows, other = make(stage), make(stage, 1)
    n = rows.rows_per_epoch()
    first, second = [rows[i] for i in range(n)], [rows[n + i] for i in range(n)]
    assert not all(same(a, b) for a, b in zip(first, second, strict=True))
    assert not all(same(a, other[i]) for i, a in enumerate(first))


@pytest.mark.parametrize('stage', ['vision_instruct', 'sft'])
def test_every_example_comes_once_an_epoch(make, stage):
    rows, start = make(stage), 0
    for epoch in range(3):
        n = len(rows.epoch(epoch))
        seen = [k for i in range(start, start + n) for k in rows.examples(i)]
        assert sorted(seen) == list(range(len(rows.index.rows)))
        start += n


def test_every_pair_comes_once_an_epoch(make):
    rows = make('clip')
    n = rows.rows_per_epoch()
    assert n == len(rows.index.rows)
    for epoch in range(2):
        assert len({rows[epoch * n + i]['images'].tobytes() for i in range(n)}) == n


def test_held_out_rows_come_in_order(make):
    rows = make('vision_pretrain', split='validation', shuffle=False)
    assert [k for i in range(rows.rows_per_epoch()) for k in rows.examples(i)] == list(range(4))


@pytest.mark.parametrize('stage', ['vision_instruct', 'vision_pretrain', 'sft'])
def test_every_example_can_be_read_back_from_its_row(make, stage):
    rows = make(stage)
    config, vision = rows.config, rows.config.model.vision
    several = 0
    for i in range(rows.rows_per_epoch()):
        row, pictures = rows[i], []
        for number, k in enumerate(rows.examples(i), 1):
            example = rows.source[rows.index.rows[k]]
            ids, learned, kept = index.encode_example(example, config, rows.tokenizer)
            here = row['segments'] == number
            assert np.ptp(np.flatnonzero(here)) == here.sum() - 1  # in one piece
            assert row['tokens'][here].tolist() == ids[:-1].tolist()
            assert row['targets'][here].tolist() == ids[1:].tolist()
            assert row['weights'][here].tolist() == learned[1:].tolist()
            assert row['positions'][here].tolist() == list(range(len(ids) - 1))
            pictures += [images.decode(data, vision) for data in kept]
        assert row['segments'].max() == number
        several += number > 1
        padding = row['segments'] == 0
        assert padding.argmax() + padding.sum() == len(padding) or not padding.any()  # all at the end
        assert not any(row[name][padding].any() for name in ('tokens', 'targets', 'weights', 'positions'))
        if stage == 'sft':
            assert 'images' not in row
        else:
            assert row['images'].shape == (3, 60, 60, 3)
            assert (row['tokens'] == rows.tokenizer.image).sum() == len(pictures) * vision.patches
            assert all((a == b).all() for a, b in zip(row['images'], pictures, strict=False))
            assert not row['images'][len(pictures) :].any()
    assert several > 2


def test_a_run_of_image_tokens_gets_its_own_picture(tokenizer, tmp_path):
    """Random conversations with pictures, many of them cut: picture n is of colour n, and the text before it says n."""
    rng, said, number = random.Random(0), [], 0
    (tmp_path / 'images').mkdir()
    for _ in range(60):
        turns, names = [], []
        for _ in range(rng.randint(1, 4)):
            value = ''
            for _ in range(rng.choice([0, 1, 1, 2])):
                names.append(f'{number}.png')
                colour = (number, 255 - number, number)
                Image.new('RGB', (60, 60), colour).save(tmp_path / 'images' / names[-1])
                value += f'{number} <image> '
                number += 1
            answer = ' '.join(['dog'] * rng.choice([1, 3, 60]))
            turns += [{'from': 'human', 'value': f'{value}what?'}, {'from': 'gpt', 'value': answer}]
        if rng.random() < 0.3:
            turns.append({'from': 'human', 'value': f'{number} <image> and this?'})
            names.append(names[0] if names else f'{number - 1}.png')
        said.append({'image': names, 'conversations': turns})
    assert number < 256
    (tmp_path / 'data.json').write_text(json.dumps(said))
    place = [f'run_dir={tmp_path}/vision_instruct', 'data.source=conversations', f'data.path={tmp_path}/data.json']
    config = parse('vision_instruct', 'data.length=128', 'data.slots=8', *place)
    source = sources.open_source(config, 'train')
    found = index.build_index(source, config, tokenizer, 'train')
    rows = packing.PackedRows(source, found, config, tokenizer, packing.Shuffled(len(found.rows), 0))
    seen, cut = 0, 0
    for i in range(rows.rows_per_epoch()):
        row = rows[i]
        cut += sum(len(source[found.rows[k]].images) > found.images[k] for k in rows.examples(i))
        image = row['tokens'] == tokenizer.image
        starts = np.flatnonzero(image & ~np.append(False, image[:-1]))
        for slot, at in enumerate(starts):  # the model gives the picture of slot k to the k-th run of image tokens
            n = int(re.search(r'(\d+)\s*$', tokenizer.decode(row['tokens'][max(0, at - 4) : at]))[1])
            assert row['images'][slot][0, 0].tolist() == [n, 255 - n, n]
            seen += 1
    assert seen > 50 and cut > 10


def test_only_answers_are_learned(make, tokenizer):
    rows = make()
    for i in range(rows.rows_per_epoch()):
        row = rows[i]
        for k, number in zip(rows.examples(i), range(1, 99), strict=False):
            taught = row['targets'][(row['segments'] == number) & (row['weights'] > 0)]
            messages = rows.source[rows.index.rows[k]].messages
            said = ''.join(f'{m["content"]}<|end|>' for m in messages if m['role'] == 'assistant')
            assert said.startswith(tokenizer.decode(taught, special=True)) and len(taught)


def test_efficiency_is_what_the_rows_hold(make):
    rows = make()
    row = [rows[i] for i in range(rows.rows_per_epoch())]
    used = rows.efficiency()
    assert used['tokens'] == pytest.approx(np.mean([r['segments'] > 0 for r in row]))
    assert used['image slots'] == pytest.approx(np.mean([r['images'].any(axis=(1, 2, 3)) for r in row]))
    assert used['tokens'] > 0.7


# Pairs ---------------------------------------------------------------------------------------------------------------


def test_pairs_hold_a_picture_and_its_caption(make, tokenizer):
    rows = make('clip', shuffle=False)
    for i in range(10):
        example, row = rows.source[rows.index.rows[i]], rows[i]
        ids = [tokenizer.end_of_text, *tokenizer.encode(example.caption), tokenizer.end]
        assert row['ids'].tolist() == ids
        assert (row['images'] == images.decode(example.images[0], rows.config.model.vision)).all()


def drawn_pairs(rng, count, longest):
    """Pairs whose images and captions begin with their number."""
    return [
        {'images': np.full((2, 2, 3), i, np.uint8), 'ids': np.array([i, *range(100, 100 + rng.integers(1, longest))])}
        for i in range(count)
    ]


def read_back(batch):
    """The captions of a batch in the order of its pairs: what is before each end in its segment."""
    length = batch['tokens'].shape[1]
    for end in batch['ends']:
        row, column = divmod(int(end), length)
        segments = batch['segments'][row]
        mine = np.flatnonzero(segments == segments[column])
        assert mine[-1] == column and segments[column] > 0
        assert (batch['positions'][row, mine] == np.arange(len(mine))).all()
        yield batch['tokens'][row, mine]


@pytest.mark.parametrize('shards, parts', [(1, 1), (4, 1), (1, 3), (2, 4)])
def test_packed_captions_are_those_of_their_pictures_on_the_same_device_and_in_the_same_part(shards, parts):
    rng = np.random.default_rng(0)
    pairs, rows = drawn_pairs(rng, 48, 10), 24
    batch = Captions(20, rows, shards, parts)(pairs)
    assert all((batch['images'] == np.stack([pair['images'] for pair in pairs])).ravel())
    for pair, ids in zip(pairs, read_back(batch), strict=True):
        assert (ids == pair['ids']).all()
    assert (batch['segments'] > 0).sum() == sum(len(pair['ids']) for pair in pairs)
    row, pair = batch['ends'] // 20, np.arange(48)
    assert (row // (rows // shards) == pair // (48 // shards)).all() and (row % parts == pair % parts).all()
    assert all(batch[name].dtype == np.int32 for name in ('tokens', 'segments', 'positions', 'ends'))


def test_captions_that_find_no_row_are_halved_the_longest_first_and_keep_their_end():
    pairs = [{'images': np.zeros((2, 2, 3), np.uint8), 'ids': np.arange(n)} for n in (9, 4, 7, 10)]
    found = list(read_back(Captions(10, 2)(pairs)))
    assert [len(ids) for ids in found] == [5, 4, 4, 6]
    assert all(
        ids[-1] == pair['ids'][-1] and (ids[:-1] == pair['ids'][: len(ids) - 1]).all()
        for ids, pair in zip(found, pairs, strict=True)
    )
    smallest = Captions(4, 2)([{'images': pairs[0]['images'], 'ids': np.arange(n)} for n in (4, 3, 4, 2)])
    assert [ids.tolist() for ids in read_back(smallest)] == [[0, 3], [0, 2], [0, 3], [0, 1]]


def test_shuffled_captions_fill_most_of_their_rows_and_hardly_ever_need_more(make):
    rows = make('clip', 0, 'data.batch_size=64', 'data.length=40')
    rng = np.random.default_rng(1)
    rows.index.lengths = np.clip(rng.normal(15, 6, 4000), 2, 39).astype(np.int32)
    for shards, parts, least in ((1, 1, 0.8), (2, 2, 0.5), (64, 1, 0.3)):
        captions = rows.pack(shards, parts)
        size, share = 64 // (shards * parts), captions.rows // (shards * parts)
        drawn = rng.choice(rows.index.lengths + 1, (1000, size))
        beyond = sum(len(longest_first(lengths, 40)) > share for lengths in drawn)
        assert beyond <= 5 and drawn.mean() * 64 / (captions.rows * 40) > least
    assert make('clip', 0, 'data.batch_size=64', shuffle=False).pack(2, 2).rows == 64  # sorted, they would need that


def test_what_is_read_is_kept_where_all_of_it_has_room(make, monkeypatch):
    for stage, *more in (('clip',), ('vision_instruct',), ('clip', 'data.augment=true')):
        make(stage, 0, *more)  # the index is there
        read, load = [], images.load
        monkeypatch.setattr(images, 'load', lambda *args, load=load, read=read: read.append(0) or load(*args))
        rows = make(stage, 0, *more)
        n = rows.rows_per_epoch()
        first = [rows[i] for i in range(n)]
        pictures = len(read)
        again = [rows[n + i] for i in range(n)]
        assert pictures > 5 and len(read) == (2 * pictures if more else pictures)
        monkeypatch.setattr(packing, 'MEMORY', 10_000)
        plain = make(stage, 0, *more)
        assert all(map(same, first + again, (plain[i] for i in range(2 * n))))
        assert len(read) >= 4 * pictures - 2 * pictures * (not more)
        monkeypatch.undo()


@pytest.mark.parametrize('stage', ['clip', 'vision_instruct'])
def test_training_may_read_jpegs_at_a_part_of_their_size_and_held_out_rows_never_do(make, stage):
    small = 'model.vision.image_size=8', 'model.vision.patch_size=8'
    exact, draft = make(stage, 0, *small), make(stage, 0, 'data.draft=true', *small)
    reduced = 0
    for i in range(exact.rows_per_epoch()):
        one, other = exact[i], draft[i]
        assert all(np.array_equal(one[name], other[name]) for name in one if name != 'images')
        reduced += (one['images'] != other['images']).any()
        chosen = [exact.shuffled.at(i)[1]] if stage == 'clip' else exact.examples(i)
        seen = [data for k in chosen for data in draft.source[draft.index.rows[k]].images]
        for picture, data in zip(other['images'].reshape(-1, 8, 8, 3), seen, strict=False):
            assert (picture == images.decode(data, draft.config.model.vision, draft=True)).all()
    assert reduced > 10
    held_out = make(stage, 0, 'data.draft=true', *small, shuffle=False)
    assert same(held_out[3], make(stage, 0, *small, shuffle=False)[3])
    assert 'part of their size' in draft.identity()['packing'] and held_out.identity() != draft.identity()


def test_an_augmented_picture_is_not_enlarged_after_it_was_reduced(make, monkeypatch):
    seen = []
    load = images.load
    monkeypatch.setattr(images, 'load', lambda data, least=None: seen.append(least) or load(data, least))
    rows = make('clip', 0, 'data.augment=true', 'data.draft=true')
    assert same(rows[5], rows[5]) and set(seen[-2:]) == {math.ceil(1.3 * rows.config.model.vision.image_size)}


def test_augmented_pairs_change_with_the_epoch_only(make):
    plain, changed = make('clip'), make('clip', 0, 'data.augment=true')
    n = plain.rows_per_epoch()
    assert same(changed[5], make('clip', 0, 'data.augment=true')[5])
    assert (changed[5]['images'] != plain[5]['images']).any()
    captions = [changed[n + i]['ids'].tobytes() for i in range(n)]
    later = changed[n + captions.index(changed[5]['ids'].tobytes())]
    assert (changed[5]['images'] != later['images']).any()
    held_out = make('clip', 0, 'data.augment=true', shuffle=False)
    assert same(held_out[3], make('clip', shuffle=False)[3])


# Text ----------------------------------------------------------------------------------------------------------------


def documents(tokenizer, n, seed=0, dtype=np.uint16):
    rng = np.random.default_rng(seed)
    drawn = [[tokenizer.end_of_text, *rng.integers(5, tokenizer.size, rng.integers(1, 90))] for _ in range(n)]
    return np.concatenate(drawn).astype(dtype)


def text_rows(shards, tokenizer, seed=0, shuffle=True):
    return packing.TextRows(shards, parse('pretrain', 'data.length=32'), tokenizer, seed, shuffle)


def test_windows_follow_each_other(tokenizer):
    shards = [documents(tokenizer, 40), documents(tokenizer, 25, 1, np.uint32)]
    rows = text_rows(shards, tokenizer, shuffle=False)
    counts = [(len(shard) - 1) // 32 for shard in shards]
    assert rows.rows_per_epoch() == sum(counts)
    start = 0
    for shard, count in zip(shards, counts, strict=True):
        read = [rows[start + i] for i in range(count)]
        assert np.concatenate([row['tokens'] for row in read]).tolist() == shard[: 32 * count].tolist()
        assert np.concatenate([row['targets'] for row in read]).tolist() == shard[1 : 32 * count + 1].tolist()
        start += count
    assert same(rows[start], rows[0])  # the next epoch


def test_a_document_is_a_segment(tokenizer):
    rows, splits = text_rows([documents(tokenizer, 100)], tokenizer, shuffle=False), 0
    for i in range(rows.rows_per_epoch()):
        row, segment, position = rows[i], 1, -1
        assert (row['weights'] == 1).all()
        for place, token in enumerate(row['tokens']):
            if token == tokenizer.end_of_text and place > 0:
                segment, position = segment + 1, -1
                splits += 1
            position += 1
            assert (row['segments'][place], row['positions'][place]) == (segment, position)
    assert splits > 50


def test_text_rows_are_functions_of_seed_and_place(tokenizer):
    shards = [documents(tokenizer, 40), documents(tokenizer, 25, 1)]
    rows = text_rows(shards, tokenizer)
    n = rows.rows_per_epoch()
    read = [rows[i] for i in range(2 * n)]
    again = text_rows(shards, tokenizer)
    assert all(same(again[i], read[i]) for i in reversed(range(2 * n)))
    windows = [row['tokens'].tobytes() for row in read]
    assert len(set(windows)) == n and sorted(windows[:n]) == sorted(windows[n:]) and windows[:n] != windows[n:]
    other = text_rows(shards, tokenizer, seed=1)
    assert [other[i]['tokens'].tobytes() for i in range(n)] != windows[:n]


@pytest.mark.parametrize('dtype, id', [(np.uint16, 65_535), (np.uint32, 70_000), (np.uint32, 2**32 - 1)])
def test_an_id_beyond_the_vocabulary_raises(tokenizer, dtype, id):
    shard = np.full(33, 7, dtype)
    assert text_rows([shard], tokenizer)[0]['tokens'].max() == 7
    for wrong in (tokenizer.size, id):
        shard[20] = wrong
        with pytest.raises(UserError, match=f'token id {wrong} '):
            text_rows([shard], tokenizer)[0]
    shard[20] = tokenizer.size - 1
    assert text_rows([shard], tokenizer)[0]['tokens'][20] == tokenizer.size - 1


def test_too_little_text_is_refused(tokenizer):
    with pytest.raises(UserError, match='less text than one row'):
        text_rows([np.full(32, 7, np.uint16)], tokenizer)


def test_pickled_rows_map_their_files_again(tokenizer, tmp_path):
    np.save(tmp_path / 'a.npy', np.tile(documents(tokenizer, 50), 100))
    rows = text_rows([np.load(tmp_path / 'a.npy', mmap_mode='r')], tokenizer)
    rows[0]
    text = pickle.dumps(rows)
    assert (tmp_path / 'a.npy').stat().st_size > 300_000 and len(text) < 100_000
    again = pickle.loads(text)
    assert isinstance(again.shards[0], np.memmap)
    assert all(same(again[i], rows[i]) for i in range(20))


def test_a_subset_of_text_is_a_part_of_its_windows(tokenizer):
    shards = [documents(tokenizer, 7), documents(tokenizer, 20)]
    config = parse('pretrain', 'data.length=32')
    every = packing.TextRows(shards, config, tokenizer, 0, shuffle=False)
    n = every.rows_per_epoch()
    part = packing.TextRows(shards, config, tokenizer, 0, shuffle=False, subset='[50%:]')
    first = round(n / 2)
    assert part.rows_per_epoch() == n - first
    assert all(same(part[i], every[first + i]) for i in range(n - first))
