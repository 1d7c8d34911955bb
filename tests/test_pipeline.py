"""The pipeline: one tokenizer a family, batches by place whatever reads them, fake batches like real ones."""

import itertools
import json
import pickle

import ml_dtypes
import numpy as np
import published
import pytest
from conftest import is_held_out, parse

from nanovision_jax.data import batch as batches
from nanovision_jax.data import features, pipeline, preparation, sources
from nanovision_jax.data.pairs import Captions
from nanovision_jax.data.tokenizer import Tokenizer
from nanovision_jax.errors import UserError
from nanovision_jax.stages import STAGES


@pytest.fixture(scope='module')
def open_rows(tiny_config):
    """A function that opens a stage's rows: (stage, *overrides) → (config, rows)."""

    def opened(stage, *overrides, split='train'):
        config = tiny_config(stage, 'data.vocab_size=384', 'data.length=512', 'data.slots=3', *overrides)
        return config, pipeline.open_rows(config, pipeline.family_tokenizer(config), split)[0]

    return opened


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def take(rows, n, *args, **options):
    return list(itertools.islice(pipeline.batches(rows, *args, **options), n))


@pytest.mark.parametrize('stage', STAGES)
def test_a_batch_is_its_rows(open_rows, stage):
    _, rows = open_rows(stage)
    for number, batch in enumerate(take(rows, 4, 3)):
        one = [rows[3 * number + i] for i in range(3)]
        made = (
            rows.captions(one) if stage == 'clip' else {name: np.stack([row[name] for row in one]) for name in one[0]}
        )
        assert same(batch, made)


@pytest.mark.parametrize('stage', ['pretrain', 'vision_instruct'])
def test_starting_late_is_skipping(open_rows, stage):
    _, rows = open_rows(stage)
    whole = take(rows, 12, 4)
    assert rows.rows_per_epoch() < 48  # beyond an epoch
    for n in (1, 5, 9):
        assert all(map(same, take(open_rows(stage)[1], 12 - n, 4, start=4 * n), whole[n:]))


def test_reading_held_out_rows_changes_nothing(open_rows):
    _, rows = open_rows('vision_instruct')
    plain = take(rows, 6, 4)
    stream, held_out = (
        pipeline.batches(rows, 4),
        pipeline.batches(open_rows('vision_instruct', split='validation')[1], 4),
    )
    for batch in plain:
        assert same(next(stream), batch)
        next(held_out)


def test_workers_read_the_same_batches(open_rows):
    _, rows = open_rows('vision_instruct')
    pickle.dumps(rows)
    for a, b in zip(take(rows, 5, 4, start=8), take(rows, 5, 4, start=8, workers=2), strict=True):
        assert same(a, b)


def test_a_batch_of_which_nothing_is_learned_is_an_error():
    class Rows:
        def __getitem__(self, i):
            return {'weights': np.full(3, float(i < 10), np.float32)}

    stream = pipeline.batches(Rows(), 4)
    assert [next(stream)['weights'].sum() for _ in range(3)] == [12, 12, 6]
    with pytest.raises(UserError, match='nothing is learned in rows 12 and on'):
        next(stream)


def test_a_mistake_in_reading_is_not_swallowed():
    class Rows:
        def __getitem__(self, i):
            return {'x': np.float32(1 / (i - 5))}

    with pytest.raises(ZeroDivisionError):
        take(Rows(), 9, 1)


@pytest.mark.parametrize('stage', ['clip', 'pretrain', 'sft'])
def test_training_rows_are_shuffled_by_the_seed_and_held_out_rows_are_not(open_rows, stage):
    def order(*overrides, split='train'):
        rows = open_rows(stage, *overrides, split=split)[1]
        return rows.shuffled.order(0).tolist()

    assert order() != order('seed=1') != sorted(order('seed=1')) == sorted(order())
    assert order(split='validation') == order('seed=1', split='validation') == sorted(order(split='validation'))


# Prepared sets and mixtures ------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """A folder with llava_pretrain (120 captions, 12 of them held out) and magpie (400 answers), prepared."""
    folder = tmp_path_factory.mktemp('prepared')
    rows, members = published.llava_rows(120, published.pictures(120))
    published.write_zip(folder / 'raw/images.zip', members)
    (folder / 'raw/chat.json').write_text(json.dumps(rows))
    published.write_parquet(folder / 'raw/train.parquet', published.magpie_rows(400), published.MAGPIE)
    for name in ('llava_pretrain', 'magpie'):
        preparation.prepare(name, str(folder / 'raw'), str(folder / 'data'))
    return folder


def mixed(prepared, tokenizer, stage, *overrides, split='train'):
    place = [f'data.path={prepared}/data', f'run_dir={prepared}/runs/{stage}', 'data.length=96', 'data.slots=2']
    return pipeline.open_rows(parse(stage, *place, *overrides), tokenizer, split)[0]


MIXTURE = 'data.mixture=llava_pretrain:0.75,magpie:0.25'


def sizes_of(prepared, split):
    """Rows of (llava_pretrain, magpie) in a split."""
    return [len(sources.Prepared(prepared / 'data', name, split)) for name in ('llava_pretrain', 'magpie')]


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_a_mixture_packs_words_and_pictures_into_the_same_rows(prepared, tokenizer, split):
    rows = mixed(prepared, tokenizer, 'vision_pretrain', MIXTURE, split=split)
    pictured, worded = sizes_of(prepared, split)
    drawn = [k for i in range(rows.rows_per_epoch()) for k in rows.examples(i)]
    assert sorted(drawn) == sorted(rows.shuffled.order(0).tolist())
    shown = sum(rows.index.images[k] == 1 for k in drawn)
    assert shown == min(pictured, int(worded / 0.25 * 0.75 + 1e-6)) and len(drawn) - shown == round(shown / 3)
    assert {len(rows.source[rows.index.rows[k]].images) for k in drawn} == {0, 1}
    both = [i for i in range(rows.rows_per_epoch()) if {0, 1} <= {int(rows.index.images[k]) for k in rows.examples(i)}]
    assert both
    row = rows[both[0]]
    assert row['images'].any() and row['weights'].any() and row['segments'].max() > 1
    used = rows.efficiency()
    assert used['tokens'] == pytest.approx(
        np.mean([(rows[i]['segments'] > 0).mean() for i in range(rows.rows_per_epoch())])
    )


def test_a_mixture_has_the_features_of_its_pictures(prepared, tokenizer, tmp_path):
    rows = mixed(prepared, tokenizer, 'vision_pretrain', MIXTURE)
    pictures, plain = features.Pictures(rows), [rows[i] for i in range(rows.rows_per_epoch())]
    assert len(pictures) == rows.index.images.sum() == 108
    vision = rows.config.model.vision
    made = features.Unfinished(tmp_path / 'kept', 108, vision, 'bf16')
    with made.opened():  # the n-th picture's features are n
        made.write(
            {'features': np.broadcast_to(np.arange(108, dtype=ml_dtypes.bfloat16)[:, None, None], (108, 9, 192))}
        )
    made.finish()
    rows.use_features(features.Features(tmp_path / 'kept', 'bf16', rows.index.images))
    for i, row in enumerate(plain):
        found = rows[i]
        assert found.keys() ^ row.keys() == {'features', 'images'} and found['features'].shape == (2, 9, 192)
        for slot in range(2):
            n = int(found['features'][slot, 0, 0])
            full = bool((row['tokens'] == tokenizer.image).sum() > 9 * slot)
            assert np.array_equal(row['images'][slot], pictures[n if full else 108]['images'])


def test_a_mixtures_validation_is_its_parts_validation(prepared, tokenizer):
    rows = mixed(prepared, tokenizer, 'vision_pretrain', MIXTURE, split='validation')
    ids = {rows.source[rows.index.rows[k]].id for k in rows.shuffled.order(0)}
    held_out = set()
    for name in ('llava_pretrain', 'magpie'):
        source = sources.Prepared(prepared / 'data', name, 'validation')
        held_out |= {source[i].id for i in range(len(source))}
    assert ids <= held_out and {row[0] for row in ids} == {'G', 'q'}


@pytest.mark.parametrize('what', [MIXTURE, 'data.source=llava_pretrain'])
def test_workers_and_resumption_change_no_row_of_prepared_data(prepared, tokenizer, what):
    rows = mixed(prepared, tokenizer, 'vision_pretrain', what)
    whole = take(rows, 9, 8)
    assert rows.rows_per_epoch() < 72  # beyond an epoch
    for a, b in zip(whole[4:], take(rows, 5, 8, start=32, workers=2), strict=True):
        assert same(a, b)
    again = mixed(prepared, tokenizer, 'vision_pretrain', what)
    assert all(map(same, whole[6:], take(again, 3, 8, start=48)))


def test_a_subset_is_a_part_of_the_training_rows_only(prepared, tokenizer):
    every, part = (sources.Prepared(prepared / 'data', 'magpie', 'train', subset) for subset in ('', '[10%:25%]'))
    first, stop = round(0.1 * len(every)), round(0.25 * len(every))
    assert [part[i] for i in range(len(part))] == [every[i] for i in range(first, stop)]
    rows = mixed(prepared, tokenizer, 'sft', 'data.source=magpie[10%:25%]')
    assert len(rows.index.rows) == stop - first
    held_out = mixed(prepared, tokenizer, 'sft', 'data.source=magpie[10%:25%]', split='validation')
    assert len(held_out.index.rows) == sizes_of(prepared, 'validation')[1]
    mix = mixed(prepared, tokenizer, 'sft', 'data.mixture=magpie[:10%]:1')
    assert len(mix.index.rows) == first
    with pytest.raises(UserError, match='no train example in magpie'):
        mixed(prepared, tokenizer, 'sft', 'data.source=magpie[:0]')


def test_sft_leaves_out_what_has_a_picture(prepared, tokenizer):
    rows = mixed(prepared, tokenizer, 'sft', 'data.source=magpie')
    assert len(rows.index.rows) == sizes_of(prepared, 'train')[1] and not rows.index.bad
    with pytest.raises(UserError, match='no train example in llava_pretrain'):  # nothing is left, and nothing is bad
        mixed(prepared, tokenizer, 'sft', 'data.source=llava_pretrain')


def test_more_pictures_than_slots_are_bad_rows(prepared, tokenizer, tmp_path):
    rows = [{'messages': published.said(f'what {i}?', images=0)} for i in range(300)]
    rows[0] = {'messages': published.said('all?', images=3), 'images': ['a.jpg'] * 3}
    (tmp_path / 'raw').mkdir()
    (tmp_path / 'raw/a.jpg').write_bytes(next(p for p in published.pictures(10) if not is_held_out(p)))
    published.write_jsonl(tmp_path / 'raw/x.jsonl', rows)
    preparation.prepare('chat', str(tmp_path / 'raw'), str(tmp_path / 'data'))
    rows = mixed(tmp_path, tokenizer, 'vision_instruct', 'data.source=chat')
    assert [row['reason'] for row in rows.index.bad] == ['3 images for 2 slots']


def test_a_prepared_set_is_indexed_once(prepared, tokenizer, monkeypatch):
    first = mixed(prepared, tokenizer, 'clip', 'data.source=llava_pretrain').index
    with monkeypatch.context() as patch:
        patch.setattr(sources.Prepared, '__getitem__', None)  # reading anything would fail
        again = mixed(prepared, tokenizer, 'clip', 'data.source=llava_pretrain').index
    assert np.array_equal(first.rows, again.rows) and len(first.rows) == 108
    other = sources.Prepared(prepared / 'data', 'llava_pretrain', 'train', '[:50%]')
    assert other.key != sources.Prepared(prepared / 'data', 'llava_pretrain', 'train').key


def test_a_tokenizer_is_trained_on_prepared_words(prepared, tmp_path):
    place = [f'data.path={prepared}/data', f'run_dir={tmp_path}/runs/sft', MIXTURE, 'data.vocab_size=300']
    tokenizer = pipeline.family_tokenizer(parse('sft', *place))
    assert len(tokenizer.encode('caption')) < 4 and len(tokenizer.encode('answer')) < 4
    with pytest.raises(UserError, match=r'set data\.tokenizer'):
        pipeline.family_tokenizer(parse('pretrain', 'data.source=fineweb_edu', f'run_dir={tmp_path}/other/pretrain'))


def test_what_is_not_prepared_is_one_sentence(tmp_path, tokenizer):
    for what in ('data.source=magpie', 'data.mixture=magpie:1'):
        config = parse('sft', what, f'data.path={tmp_path}', f'run_dir={tmp_path}/runs/sft')
        with pytest.raises(
            UserError, match=r'magpie is not prepared in .*: run python -m nanovision_jax\.prepare magpie'
        ):
            pipeline.open_rows(config, tokenizer)
        with pytest.raises(UserError, match='prepared data has no heldout split'):
            sources.open_source(config, 'heldout')


# Fake batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('stage', STAGES)
def test_a_fake_batch_looks_like_a_real_one(open_rows, stage):
    config, rows = open_rows(stage, 'data.batch_size=6')
    if stage == 'clip':
        rows.captions = Captions(512, 6)
    (real,) = take(rows, 1, 6)
    fake = batches.fake_batch(config)
    assert {name: (a.shape, a.dtype) for name, a in fake.items()} == {
        name: (a.shape, a.dtype) for name, a in real.items()
    }
    assert ('images' in real) == (stage in ('clip', 'vision_pretrain', 'vision_instruct'))


@pytest.mark.parametrize('kept, dtypes', [('bf16', ['bfloat16']), ('int8', ['int8', 'float32'])])
def test_a_fake_batch_of_features_has_no_pictures(kept, dtypes):
    config = parse('vision_pretrain', f'data.cache_features={kept}', 'data.slots=5', 'data.batch_size=2')
    plain, batch = (batches.fake_batch(c) for c in (parse('vision_pretrain'), config))
    assert batch.keys() - plain.keys() == {'features', 'scales'} - ({'scales'} if kept == 'bf16' else set())
    assert plain.keys() - batch.keys() == {'images'}
    assert [str(batch[name].dtype) for name in ('features', 'scales') if name in batch] == dtypes
    assert batch['features'].shape == (2, 5, 9, 192) and batch['features'].any(axis=(2, 3)).all()


@pytest.mark.parametrize('stage', ['pretrain', 'sft', 'vision_pretrain', 'vision_instruct'])
@pytest.mark.parametrize('slots', [1, 2, 5])
def test_a_fake_batch_is_valid(stage, slots):
    config = parse(stage, f'data.slots={slots}', 'data.batch_size=4', 'data.length=256')
    batch = batches.fake_batch(config, vocab_size=300)
    vision = stage.startswith('vision')
    assert batch['tokens'].min() >= 0 and max(batch['tokens'].max(), batch['targets'].max()) <= 299
    learned = batch['weights'].mean()
    assert learned == 1 if stage == 'pretrain' else set(np.unique(batch['weights'])) == {0, 1} and 0.3 < learned < 0.7
    assert ((batch['tokens'] == 299).sum(1) == (slots * config.model.vision.patches if vision else 0)).all()
    for segment in (1, 2):
        here = batch['segments'] == segment
        assert (here.sum(1) == 128).all()
        assert (batch['positions'][here].reshape(4, -1) == np.arange(128)).all()
    assert same(batch, batches.fake_batch(config, vocab_size=300))
    assert not same(batch, batches.fake_batch(config, vocab_size=300, seed=1))


# The tokenizer of a family -------------------------------------------------------------------------------------------


def conversations(folder, llava_folder, stage='vision_instruct', name='instruct', *overrides):
    place = [f'run_dir={folder}/{stage}', 'data.source=conversations', f'data.path={llava_folder}/{name}.json']
    return parse(stage, *place, *overrides)


def test_the_tokenizer_is_made_once(llava_folder, tmp_path):
    first = pipeline.family_tokenizer(conversations(tmp_path, llava_folder))
    times = {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    again = pipeline.family_tokenizer(conversations(tmp_path, llava_folder, 'vision_pretrain', 'pretrain'))
    assert first.folder == again.folder == tmp_path / 'tokenizer' and first.digest == again.digest
    assert {file: file.stat().st_mtime_ns for file in first.folder.iterdir()} == times
    assert not list(tmp_path.glob('*.part'))


def test_it_knows_the_words_of_every_file_beside(llava_folder, tmp_path):
    one = pipeline.family_tokenizer(conversations(tmp_path / 'a', llava_folder))
    two = pipeline.family_tokenizer(conversations(tmp_path / 'b', llava_folder, 'vision_pretrain', 'pretrain'))
    assert one.size == two.size > 261
    assert len(one.encode('house')) == len(two.encode('house')) < 5


def test_odd_files_and_rows_beside_do_not_matter(tmp_path):
    good = {'conversations': [{'from': 'human', 'value': 'hello'}, {'from': 'gpt', 'value': 'you'}]}
    rows = [good, 'a string', {'conversations': 'x'}, {'messages': [{'role': 'user'}]}]
    rows += [{'conversations': [{'from': 'human', 'value': 'half \ud83d'}]}]
    (tmp_path / 'x.json').write_text(json.dumps(rows))
    (tmp_path / 'notes.json').write_text('{\n"not": "rows"\n}')
    tokenizer = pipeline.family_tokenizer(conversations(tmp_path / 'runs', tmp_path, 'sft', 'x'))
    assert tokenizer.size >= 261


def test_broken_data_leaves_no_tokenizer(tmp_path):
    (tmp_path / 'x.json').write_text('[{"conversations":')
    config = conversations(tmp_path / 'runs', tmp_path, 'sft', 'x')
    with pytest.raises(UserError, match='neither a JSON list'):
        pipeline.family_tokenizer(config)
    assert not (tmp_path / 'runs/tokenizer').exists()
    (tmp_path / 'x.json').write_text('[]')
    assert pipeline.family_tokenizer(config).size >= 261


def test_a_folder_is_taken_over(llava_folder, tokenizer, tokenizer_folder, tmp_path):
    config = conversations(tmp_path, llava_folder, 'sft', 'instruct', f'data.tokenizer={tokenizer_folder}')
    taken = pipeline.family_tokenizer(config)
    assert taken.special == tokenizer.special and taken.size == tokenizer.size
    assert taken.encode('the naïve cat') == tokenizer.encode('the naïve cat')
    assert Tokenizer(tmp_path / 'tokenizer').digest == taken.digest


def test_another_tokenizer_is_refused(llava_folder, tokenizer_folder, tmp_path):
    pipeline.family_tokenizer(conversations(tmp_path, llava_folder))
    other = conversations(tmp_path, llava_folder, 'sft', 'instruct', f'data.tokenizer={tokenizer_folder}')
    with pytest.raises(UserError) as caught:
        pipeline.family_tokenizer(other)
    assert "was made from 'train'" in str(caught.value) and '--config.data.tokenizer=train' in str(caught.value)


def test_shards_need_a_tokenizer_to_be_named(tmp_path):
    config = parse('pretrain', 'data.source=shards', f'data.path={tmp_path}', f'run_dir={tmp_path}/runs/pretrain')
    with pytest.raises(UserError, match=r'set data\.tokenizer'):
        pipeline.family_tokenizer(config)


def test_open_rows_tells_what_is_bad(llava_folder, tmp_path, tokenizer):
    rows = json.loads((llava_folder / 'instruct.json').read_text())
    text = [{'from': 'human', 'value': 'a?'}, {'from': 'gpt', 'value': 'b'}]
    (tmp_path / 'x.json').write_text(json.dumps([*rows, *[{'conversations': text}] * 100, {'conversations': text[:1]}]))
    config = conversations(tmp_path / 'runs', tmp_path, 'sft', 'x')
    assert pipeline.open_rows(config, tokenizer)[1] == [{'row': 172, 'reason': 'no answer'}]
