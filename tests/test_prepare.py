"""The verb: prepared once, whole or not there, the same whoever reads, downloaded at one commit."""

import hashlib
import json
import shutil
import subprocess
import sys
import types

import huggingface_hub
import numpy as np
import pyarrow
import pytest
from conftest import ROOT, parse, sentence
from published import MAGPIE, asked, llava_rows, magpie_rows, pictures, said, write_jsonl, write_parquet, write_zip

from nanovision_jax import prepare as verb
from nanovision_jax.data import catalog, download, images, packing, preparation, sources, text
from nanovision_jax.data.datasets import fineweb_edu
from nanovision_jax.data.tokenizer import Tokenizer
from nanovision_jax.errors import UserError
from nanovision_jax.evals import vqa
from nanovision_jax.reporting.pictures import find_images
from nanovision_jax.runs import lock


@pytest.fixture
def captions(tmp_path):
    """A folder as LLaVA-CC3M-Pretrain-595K is published, of 80 rows."""
    rows, members = llava_rows(80, pictures(40))
    (tmp_path / 'raw').mkdir()
    (tmp_path / 'raw/chat.json').write_text(json.dumps(rows))
    write_zip(tmp_path / 'raw/images.zip', members)
    return tmp_path / 'raw'


def stamps(folder):
    return {file: file.stat().st_mtime_ns for file in folder.rglob('*') if file.is_file()}


def examples(folder, name='llava_pretrain', split='train'):
    source = sources.Prepared(folder, name, split)
    return [source[i] for i in range(len(source))]


def test_a_second_run_does_nothing(captions, tmp_path, capsys, monkeypatch):
    made = preparation.prepare('llava_pretrain', str(captions), str(tmp_path / 'data'))
    before = stamps(tmp_path / 'data')
    assert {file.name for file in before} >= {'source.json', 'bad_rows.jsonl', 'dataset_info.json'}
    monkeypatch.setattr(images, 'load', None)  # decoding anything would fail
    assert preparation.prepare('llava_pretrain', str(captions), str(tmp_path / 'data')) == made
    assert preparation.prepare('llava_pretrain', output=str(tmp_path / 'data')) == made
    assert 'prepared already' in capsys.readouterr().out and stamps(tmp_path / 'data') == before
    with pytest.raises(UserError, match=r'was prepared with --from=.*raw: remove it'):
        preparation.prepare('llava_pretrain', str(tmp_path), str(tmp_path / 'data'))


def test_an_interrupted_preparation_leaves_nothing(captions, tmp_path, monkeypatch):
    data, load = tmp_path / 'data', images.load
    with monkeypatch.context() as patch:
        seen = []
        patch.setattr(images, 'load', lambda data: seen.append(1) or (load(data) if len(seen) < 50 else 1 / 0))
        with pytest.raises(ZeroDivisionError):  # a mistake of ours is never taken for a bad row
            preparation.prepare('llava_pretrain', str(captions), str(data))
    assert not stamps(data)
    with pytest.raises(
        UserError, match=r'not prepared in .*data: run python -m nanovision_jax\.prepare llava_pretrain'
    ):
        examples(data)
    (data / 'llava_pretrain/incomplete.KILLED_1.0.0').mkdir()  # as kill -9 leaves it
    preparation.prepare('llava_pretrain', str(captions), str(data))
    assert [folder.name for folder in (data / 'llava_pretrain').iterdir()] == ['1.0.0']


def test_two_preparations_of_one_set_do_not_get_at_each_other(captions, tmp_path):
    """The second would remove what the first has made so far."""
    begun = tmp_path / 'llava_pretrain/incomplete.AB_1.0.0/part'
    begun.mkdir(parents=True)
    with lock.held(tmp_path / '.llava_pretrain.lock', 'a test'):
        with pytest.raises(UserError, match=r'llava_pretrain in .* is in use by .*, or choose another --output'):
            preparation.prepare('llava_pretrain', str(captions), str(tmp_path))
        assert begun.exists()


def test_the_number_of_workers_changes_no_row(captions, tmp_path):
    for workers in (1, 3):
        preparation.prepare('llava_pretrain', str(captions), str(tmp_path / f'{workers}'), workers=workers)
    for split in ('train', 'validation'):
        assert examples(tmp_path / '1', split=split) == examples(tmp_path / '3', split=split)
    assert len(examples(tmp_path / '1')) == 72


def test_every_picture_is_decoded_once(captions, tmp_path, monkeypatch, tokenizer):
    loaded, load = [], images.load
    monkeypatch.setattr(images, 'load', lambda data: loaded.append(data) or load(data))
    preparation.prepare('llava_pretrain', str(captions), str(tmp_path / 'data'))
    assert len(loaded) == 80
    from nanovision_jax.data import pipeline

    place = [f'data.path={tmp_path}/data', f'run_dir={tmp_path}/runs/x', 'data.source=llava_pretrain']
    rows, bad = pipeline.open_rows(parse('vision_pretrain', *place), tokenizer)
    assert len(loaded) == 80 and len(rows.index.rows) == 72 and not bad  # nor by the index


def test_over_one_percent_is_refused_and_listed(tmp_path):
    (tmp_path / 'raw').mkdir()
    rows = [{'prompt': f'p {i}', 'response': 'r' if i % 10 else ''} for i in range(100)]
    write_jsonl(tmp_path / 'raw/x.jsonl', rows)
    with pytest.raises(UserError) as caught:
        preparation.prepare('magpie', str(tmp_path / 'raw'), str(tmp_path / 'data'))
    listed = tmp_path / 'data/magpie.bad_rows.jsonl'
    assert f'10 of 100 rows in {tmp_path}/raw are bad (at most 1% may be): 10 × empty answer.' in str(caught.value)
    assert str(listed) in str(caught.value) and len(listed.read_text().splitlines()) == 10
    assert not (tmp_path / 'data/magpie/1.0.0').exists()
    write_jsonl(tmp_path / 'raw/x.jsonl', rows[1:3])
    with pytest.raises(UserError, match=r'no validation example in .*: of 2 rows'):
        preparation.prepare('magpie', str(tmp_path / 'raw'), str(tmp_path / 'data'))


def test_a_second_try_reads_nothing_of_the_first(tmp_path, monkeypatch):
    """What is refused leaves a list of bad rows; what is made leaves a set; neither is data."""
    monkeypatch.chdir(tmp_path)
    rows = [{'messages': said(f'q {i}')} for i in range(100)]
    write_jsonl(tmp_path / 'x.jsonl', [{'messages': [*row['messages'], {'role': 'narrator'}]} for row in rows])
    with pytest.raises(UserError, match='100 of 100 rows'):
        preparation.prepare('chat', '.')
    assert list(tmp_path.rglob('*bad_rows.jsonl'))
    write_jsonl(tmp_path / 'x.jsonl', rows)
    (tmp_path / 'runs/x/sft').mkdir(parents=True)
    for name in ('config.json', 'lineage.json', 'metrics.jsonl'):
        (tmp_path / 'runs/x/sft' / name).write_text('{}')
    assert preparation.prepare('chat', '.')['rows'] == 100
    assert preparation.prepare('chat', '.', 'again')['rows'] == 100  # beside data/chat/1.0.0 and its features.json


def test_files_of_several_kinds_are_all_read_or_refused(tmp_path):
    write_jsonl(tmp_path / 'a.jsonl', [{'messages': said(f'q {i}')} for i in range(60)])
    (tmp_path / 'b.json').write_text(json.dumps([{'messages': said(f'r {i}')} for i in range(60)]))
    messages = pyarrow.list_(pyarrow.struct({'role': pyarrow.string(), 'content': pyarrow.string()}))
    rows = [{'messages': said(f's {i}')} for i in range(60)]
    write_parquet(tmp_path / 'c.parquet', rows, {'messages': messages})
    assert preparation.prepare('chat', str(tmp_path), str(tmp_path.parent / 'data'))['rows'] == 180
    only = preparation.prepare('chat', str(tmp_path), str(tmp_path.parent / 'only'), files='*.parquet')
    assert only['rows'] == 60
    with pytest.raises(UserError, match=r"holds c\.parquet and a\.jsonl, .* as in --files='\*\.parquet'\.$"):
        preparation.prepare('magpie', str(tmp_path), str(tmp_path.parent / 'data'))


@pytest.mark.parametrize(
    'argv, told',
    [
        (['magpy'], "no data set 'magpy'. Did you mean 'magpie'?"),
        (['magpie', '--form=x'], "Did you mean '--from'?"),
        (['magpie', '--from=/none'], 'no folder /none'),
        (['magpie', '--from=.', '--minimum=relevance:3'], '--minimum is for cauldron'),
        (['chat'], 'chat is your own data: say --from=FOLDER'),
        (['cauldron'], 'say which part of it with --files'),
        ([], 'the following arguments are required: name'),
    ],
)
def test_a_mistake_is_one_sentence(argv, told, tmp_path):
    with pytest.raises(UserError) as caught:
        verb.main([*argv, f'--output={tmp_path}'])
    assert told in str(caught.value) and '\n' not in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r'holds no chat\.json and no blip_laion_cc_sbu_558k\.json'):
        preparation.prepare('llava_pretrain', str(tmp_path), str(tmp_path / 'data'))


def test_the_command_sums_up(tmp_path):
    rows = [{'prompt': f'p {i}', 'response': 'r' if i != 7 else ' '} for i in range(150)]
    write_jsonl(tmp_path / 'x.jsonl', rows)
    command = [sys.executable, '-m', 'nanovision_jax.prepare', 'magpie', f'--from={tmp_path}/x.jsonl']
    done = subprocess.run([*command, f'--output={tmp_path}/data'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    characters = sum(len(row['prompt'] + row['response']) for row in rows if row['response'] != ' ')
    assert told[0].startswith('150 rows, ') and told[0].endswith(f' validation, {characters:,} characters, 1 bad')
    assert told[1:] == [
        '  1 × empty answer',
        f'train on it: --config.data.source=magpie --config.data.path={tmp_path}/data',
    ]


def test_lineage_report_and_questions_know_prepared_data(captions, tmp_path):
    made = preparation.prepare('llava_pretrain', str(captions), str(tmp_path / 'data'))
    config = parse('vision_pretrain', 'data.mixture=llava_pretrain:1', f'data.path={tmp_path}/data')
    told = sources.provenance(config.data)
    assert told['mixture'] == 'llava_pretrain:1' and told['prepared'] == {'llava_pretrain': [made]}
    held_out = examples(tmp_path / 'data', split='validation')
    names = {held_out[0].names[0], held_out[3].names[0], 'unknown'}
    assert set(find_images(config, 'validation', names)) == names - {'unknown'}
    questions = vqa.load_questions(config, 'validation').found
    assert [question.image for question in questions] == [example.names[0] for example in held_out]
    config.data.path = str(tmp_path / 'moved')
    assert find_images(config, 'validation', names) == {}


# The hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose data sets are the folder `published`; it notes the revisions it is asked for."""
    published, asked_for = tmp_path / 'published', []
    published.mkdir()

    def dataset_info(self, repo, revision=None, files_metadata=False):
        asked_for.append((repo, revision))
        names = [file.relative_to(published).as_posix() for file in sorted(published.rglob('*')) if file.is_file()]
        siblings = []
        for name in names:
            data = (published / name).read_bytes()
            lfs = types.SimpleNamespace(sha256=hashlib.sha256(data).hexdigest())
            siblings.append(types.SimpleNamespace(rfilename=name, size=len(data), lfs=lfs))
        return types.SimpleNamespace(sha=revision or 'c0ffee', siblings=siblings)

    def hf_hub_download(repo, name, repo_type, revision, local_dir):
        to = local_dir / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(published / name, to)
        return str(to)

    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', dataset_info)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', hf_hub_download)
    return published, asked_for


def test_without_a_folder_the_pinned_commit_is_fetched(hub, tmp_path, monkeypatch):
    published, asked_for = hub
    write_parquet(published / 'data/train-00000-of-00001.parquet', magpie_rows(100), MAGPIE)
    (published / 'README.md').write_text('not needed')
    made = preparation.prepare('magpie', output=str(tmp_path / 'data'))
    repo = 'Magpie-Align/Magpie-Phi3-Pro-300K-Filtered'
    assert asked_for == [(repo, catalog.pinned(repo))]
    assert (made['repo'], made['revision'], made['rows']) == (repo, catalog.pinned(repo), 100)
    assert not (tmp_path / 'data/downloads/magpie/README.md').exists()
    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', None)
    assert preparation.prepare('magpie', output=str(tmp_path / 'data')) == made


def test_an_unpinned_commit_is_asked_for_once(hub, tmp_path):
    published, asked_for = hub
    write_jsonl(published / 'x.jsonl', [{'messages': [{'role': 'user', 'content': 'a'}]}])
    for _ in range(2):
        assert download.download('me/mine', None, ('*.jsonl',), tmp_path / 'down') == 'c0ffee'
    assert asked_for == [('me/mine', None), ('me/mine', 'c0ffee')]
    for other in (('me/other', None), ('me/mine', 'abc')):
        with pytest.raises(UserError, match='holds files of me/mine at c0ffee'):
            download.download(*other, ('*.jsonl',), tmp_path / 'down')
    with pytest.raises(UserError, match=r'holds no \*\.zip'):
        download.download('me/mine', None, ('*.zip',), tmp_path / 'other')


@pytest.mark.parametrize('damage', [lambda data: data[:-1], lambda data: data[:-1] + b'!'])
def test_a_damaged_download_is_refused(hub, tmp_path, monkeypatch, damage):
    published, _ = hub
    write_jsonl(published / 'x.jsonl', [{}])
    fetch = huggingface_hub.hf_hub_download

    def broken(*args, **options):
        path = fetch(*args, **options)
        (tmp_path / 'down/x.jsonl').write_bytes(damage((published / 'x.jsonl').read_bytes()))
        return path

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', broken)
    with pytest.raises(UserError, match=r'x\.jsonl came down damaged and is removed'):
        download.download('me/mine', None, ('*.jsonl',), tmp_path / 'down')
    assert not (tmp_path / 'down/x.jsonl').exists()


def test_offline_it_says_what_to_place_where(hub, tmp_path, monkeypatch):
    def offline(*args, **options):
        raise huggingface_hub.errors.HTTPError('no route')

    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', offline)
    with pytest.raises(UserError) as caught:
        preparation.prepare('llava_pretrain', output=str(tmp_path / 'data'))
    told = 'place its chat.json, *558k.json, images.zip in a folder and say --from=FOLDER.'
    assert str(caught.value).endswith(told) and 'LLaVA-CC3M-Pretrain-595K' in str(caught.value)
    with pytest.raises(UserError, match=r"its llava_instruct_150k\.json and COCO's train2017\.zip .*--from=FOLDER"):
        preparation.prepare('llava_instruct', output=str(tmp_path / 'data'))


def test_pictures_that_the_hub_has_not_are_asked_for(hub, tmp_path):
    published, _ = hub
    rows = [{'id': f'{i}', 'image': f'{i:012d}.jpg', 'conversations': asked('<image>?')} for i in range(40)]
    (published / 'llava_instruct_150k.json').write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"place COCO's train2017\.zip .*downloads/llava_instruct and run this again"):
        preparation.prepare('llava_instruct', output=str(tmp_path / 'data'))
    members = {f'train2017/{i:012d}.jpg': data for i, data in enumerate(pictures(40))}
    write_zip(tmp_path / 'data/downloads/llava_instruct/train2017.zip', members)
    assert preparation.prepare('llava_instruct', output=str(tmp_path / 'data'))['pictures'] == 40


# Text for stage 1 ----------------------------------------------------------------------------------------------------


def tokens(tokenizer, seed, n=2000, dtype=np.uint16):
    ids = np.random.default_rng(seed).integers(5, tokenizer.size, n).astype(dtype)
    ids[::50] = tokenizer.end_of_text
    return ids


def opened(output, tokenizer, split='train', *overrides):
    place = [f'data.path={output}', 'data.source=fineweb_edu', 'data.tokenizer=gpt2', 'data.length=32']
    return text.token_shards(parse('pretrain', *place, *overrides), tokenizer, split)


def test_published_shards_are_used_where_they_lie(tmp_path, tokenizer):
    raw = tmp_path / 'raw'
    raw.mkdir()
    for seed, name in enumerate(('val_000000', 'train_000001', 'train_000002')):
        np.save(raw / f'edufineweb_{name}.npy', tokens(tokenizer, seed))
    made = preparation.prepare('fineweb_edu', str(raw), str(tmp_path / 'data'))
    assert (made['train_tokens'], made['val_tokens']) == (4000, 2000)
    assert [file.name for file in stamps(tmp_path / 'data')] == ['source.json']  # nothing is written again
    train, (validation,) = opened(tmp_path / 'data', tokenizer), opened(tmp_path / 'data', tokenizer, 'validation')
    assert all(isinstance(shard, np.memmap) for shard in train)
    assert [np.array_equal(a, tokens(tokenizer, s)) for a, s in zip(train, (1, 2), strict=True)] == [True, True]
    assert np.array_equal(validation, tokens(tokenizer, 0))
    for where, patterns in ((raw, ['*_train_*']), (tmp_path, None)):  # some of a folder; and a folder beside it
        (tmp_path / 'beside').mkdir(exist_ok=True)
        np.save(tmp_path / 'beside/a.npy', tokens(tokenizer, 3))
        with pytest.raises(UserError, match='put those to learn from, and no others, into one folder'):
            fineweb_edu.prepare(where, tmp_path / 'other', patterns, 'gpt2', 1, '', None)
    np.save(raw / 'edufineweb_train_000001.npy', np.full(100, tokenizer.size, np.uint16))
    with pytest.raises(UserError, match='made with another tokenizer'):
        opened(tmp_path / 'data', tokenizer)


@pytest.mark.parametrize('llm_c', [False, True])
def test_bin_shards(tmp_path, tokenizer, llm_c):
    for seed, name in enumerate(('val', 'train')):
        ids, head = tokens(tokenizer, seed), np.zeros(256, np.int32)
        head[:3] = text.LLM_C, 1, len(ids)
        (tmp_path / f'{name}.bin').write_bytes((head.tobytes() if llm_c else b'') + ids.tobytes())
    config = parse('pretrain', 'data.source=shards', f'data.path={tmp_path}', 'data.tokenizer=gpt2', 'data.length=32')
    (train,), (validation,) = (text.token_shards(config, tokenizer, split) for split in ('train', 'validation'))
    assert np.array_equal(train, tokens(tokenizer, 1)) and np.array_equal(validation, tokens(tokenizer, 0))
    rows = packing.TextRows([train], config, tokenizer, 0)
    expected = rows[3]
    rows.__setstate__(rows.__getstate__())  # as a data worker opens it
    assert isinstance(rows.shards[0], np.memmap) and np.array_equal(rows[3]['tokens'], expected['tokens'])
    file = tmp_path / 'train.bin'
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match=r'train\.bin (should hold 2000 tokens|holds \d+ bytes)'):
        text.token_shards(config, tokenizer, 'train')


@pytest.fixture
def documents(tmp_path):
    """Three parquet files of 100 documents each in row groups of 30, two documents empty."""
    import random

    rng = random.Random(0)
    texts = [sentence(rng) + f' {i}' for i in range(300)]
    texts[17], texts[18] = None, ' '
    for i in range(3):
        rows = [{'text': said, 'id': 'x', 'score': 3.5} for said in texts[100 * i : 100 * i + 100]]
        schema = {'text': pyarrow.string(), 'id': pyarrow.string(), 'score': pyarrow.float64()}
        write_parquet(tmp_path / f'raw/{i:03d}_00000.parquet', rows, schema, 30)
    return tmp_path / 'raw', texts


def held_out(said):
    """The rule of the 1%, written a second time."""
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:4], 'big') % 100 == 0


def check_shards(output, texts, tokenizer_folder):
    tokenizer = Tokenizer(tokenizer_folder)
    kept = [said for said in texts if said and said.strip()]
    for split, val in (('train', False), ('validation', True)):
        shards = np.concatenate(opened(output, Tokenizer(output / 'fineweb_edu/tokenizer'), split))
        wanted = tokenizer.encode_documents([said for said in kept if held_out(said) == val])
        assert shards.dtype == np.uint16 and np.array_equal(shards, wanted)


def without_beam(monkeypatch):
    """As if Apache Beam were not installed; transformers looks for packages by the same door, which stays open."""
    util = types.SimpleNamespace(find_spec=lambda name: None)
    monkeypatch.setattr(fineweb_edu, 'importlib', types.SimpleNamespace(util=util))


@pytest.mark.parametrize('workers', [1, 2])
def test_parquet_is_tokenized_the_same_by_any_number_of_processes(
    documents, tmp_path, tokenizer_folder, monkeypatch, workers
):
    without_beam(monkeypatch)
    monkeypatch.setattr(fineweb_edu, 'DOCUMENTS', 60)
    raw, texts = documents
    made = preparation.prepare(
        'fineweb_edu', str(raw), str(tmp_path / 'data'), tokenizer=str(tokenizer_folder), workers=workers
    )
    assert (made['rows'], made['bad'], made['tokenizer']) == (300, 2, str(tokenizer_folder))
    shards = sorted(file.name for file in (tmp_path / 'data/fineweb_edu').glob('*train*'))
    assert shards == [f'edufineweb_train_{i:06d}.npy' for i in range(5)]
    check_shards(tmp_path / 'data', texts, tokenizer_folder)


def test_a_beam_pipeline_tokenizes_the_same(documents, tmp_path, tokenizer_folder, monkeypatch):
    pytest.importorskip('apache_beam', reason="needs Apache Beam: pip install -e '.[beam]'")
    monkeypatch.setattr(fineweb_edu, 'DOCUMENTS', 60)
    raw, texts = documents
    preparation.prepare('fineweb_edu', str(raw), str(tmp_path / 'data'), tokenizer=str(tokenizer_folder), workers=2)
    check_shards(tmp_path / 'data', texts, tokenizer_folder)


def test_a_large_vocabulary_takes_32_bits(documents, tmp_path, tokenizer, monkeypatch):
    class Large:
        size = 65_537
        encode_documents = staticmethod(lambda texts: tokenizer.encode_documents(texts) + 65_000)

    monkeypatch.setattr(fineweb_edu, '_tokenizer', lambda folder: Large)
    file = str(documents[0] / '000_00000.parquet')
    fineweb_edu.write_shards((0, [(file, 0)], str(tmp_path)))
    shard = np.load(tmp_path / 'edufineweb_train_000000.npy')
    assert shard.dtype == np.uint32 and shard[0] == tokenizer.end_of_text + 65_000


def test_text_of_another_tokenizer_is_refused(documents, tmp_path, tokenizer, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(fineweb_edu, 'tokenize', lambda *args: {'train_tokens': 1, 'val_tokens': 1})
    preparation.prepare('fineweb_edu', str(documents[0]), str(tmp_path / 'data'), tokenizer=str(tokenizer_folder))
    other = types.SimpleNamespace(digest='other', size=tokenizer.size, end_of_text=tokenizer.end_of_text)
    with pytest.raises(UserError, match=r'was tokenized with .*another tokenizer than this run has'):
        opened(tmp_path / 'data', other)
    with pytest.raises(UserError, match='fineweb_edu is not prepared in'):
        opened(tmp_path, tokenizer)


def test_text_mistakes_are_one_sentence(tmp_path, tokenizer_folder, monkeypatch):
    write_parquet(tmp_path / 'raw/x.parquet', [{'words': 'a'}], {'words': pyarrow.string()})
    options = {'tokenizer': str(tokenizer_folder)}
    with pytest.raises(UserError, match=r'x\.parquet has no column text: words'):
        preparation.prepare('fineweb_edu', str(tmp_path / 'raw'), str(tmp_path / 'data'), **options)
    assert not (tmp_path / 'data/fineweb_edu').exists()
    without_beam(monkeypatch)
    write_parquet(tmp_path / 'raw/x.parquet', [{'text': 'a'}], {'text': pyarrow.string()})
    with pytest.raises(UserError, match='--beam needs Apache Beam'):
        preparation.prepare(
            'fineweb_edu', str(tmp_path / 'raw'), str(tmp_path / 'data'), beam='--runner=DirectRunner', **options
        )
