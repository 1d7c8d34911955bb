"""Data in an object store: fetched once, whole or not at all, and learned from as if it lay here."""

import json
import pathlib

import fsspec
import micro
import pytest
from PIL import Image

from nanovision_jax import caches
from nanovision_jax.data import pipeline, stores
from nanovision_jax.errors import UserError
from nanovision_jax.runs import config_file, folder

MEMORY = fsspec.filesystem('memory')


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(stores, 'PAUSES', (0.01, 0.01))
    yield tmp_path / 'cache' / 'nanovision_jax' / 'data' / 'memory'
    MEMORY.store.clear()
    MEMORY.pseudo_dirs[:] = ['']


@pytest.fixture
def own(tmp_path):
    """A folder as people have them: conversations, their pictures, and what lies beside."""
    made = tmp_path / 'own'
    (made / 'images' / 'a').mkdir(parents=True)
    for i in range(6):
        Image.new('RGB', (8, 8), (40 * i, 0, 0)).save(made / 'images' / 'a' / f'{i}.png')
    turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'a red one'}]
    rows = [{'id': str(i), 'image': f'a/{i}.png', 'conversations': turns} for i in range(6)]
    (made / 'chat.json').write_text(json.dumps(rows))
    (made / '.DS_Store').write_bytes(b'x')
    (made / 'notes.txt').write_text('of mine')
    return made


@pytest.fixture
def stored(own):
    """The same in a store."""
    MEMORY.put(f'{own}/', '/bucket/own/', recursive=True)
    return 'memory://bucket/own'


def files(place):
    return {str(file.relative_to(place)): file.read_bytes() for file in place.rglob('*') if file.is_file()}


def config(family, path, stage='vision_instruct', **fields):
    return micro.run_config(stage, family, data__source='conversations', data__path=path, **fields)


def test_rows_of_a_store_are_those_of_a_folder(own, stored, home, tiny_family, tmp_path, capsys):
    family = micro.family(tmp_path / 'family', tiny_family)
    here, there = (config(family, f'{place}/chat.json') for place in (own, stored))
    stores.fetch(there)
    assert files(home / 'bucket' / 'own') == {n: data for n, data in files(own).items() if n != '.DS_Store'}
    assert f'fetching {stored} into' in capsys.readouterr().out
    rows = [pipeline.open_rows(cfg, pipeline.family_tokenizer(cfg))[0] for cfg in (here, there)]
    micro.assert_same(rows[1][0], rows[0][0])
    assert rows[0][0]['images'].any()
    stores.fetch(here)  # a path of this machine is left alone
    assert here.data.local_path == here.data.path


def test_what_is_here_is_not_asked_for_again(stored, home, monkeypatch):
    stores.fetched(stored)
    MEMORY.rm('/bucket', recursive=True)
    with monkeypatch.context() as patch:
        patch.setattr(stores, '_listed', None)
        assert stores.fetched(stored) == str(home / 'bucket' / 'own')
        stores.fetched(f'{stored}/chat.json')  # a part of what is here
    folder.shutil.rmtree(home / 'bucket' / 'own')
    with pytest.raises(UserError, match='there is nothing at memory://bucket/own'):
        stores.fetched(stored)


def test_a_fetch_that_is_cut_goes_on(stored, home, monkeypatch):
    """What came whole stays; what a store drops for a moment is asked for again."""
    get, asked = type(MEMORY).get_file, []

    def failing(self, name, target, **options):
        asked.append(name)
        if name.endswith('3.png') or (name.endswith('1.png') and asked.count(name) == 1):
            pathlib.Path(target).write_bytes(b'hal')
            raise OSError('the line is dead')
        get(self, name, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(MEMORY), 'get_file', failing)
        with pytest.raises(UserError, match=r'cannot be fetched \(the line is dead\): the same command goes on'):
            stores.fetched(stored)
    assert asked.count('/bucket/own/images/a/3.png') == 3 and asked.count('/bucket/own/images/a/1.png') == 2
    assert not list(home.rglob('*.part')) and not list(home.rglob('.own.fetched'))
    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(type(MEMORY), 'get_file', lambda self, name, *args: (asked.append(name), get(self, name, *args)))
        stores.fetched(stored)
    assert '/bucket/own/images/a/3.png' in asked and len(asked) < 8
    assert len(files(home / 'bucket' / 'own')) == 8


def test_a_file_that_comes_short_is_no_file(stored, home, monkeypatch):
    monkeypatch.setattr(type(MEMORY), 'get_file', lambda self, name, target, **_: pathlib.Path(target).write_bytes(b''))
    with pytest.raises(UserError, match=r'came with 0 of \d+ bytes'):
        stores.fetched(f'{stored}/chat.json')
    assert not (home / 'bucket' / 'own' / 'chat.json').exists()


def test_what_is_fetched_for_a_stage(own, stored):
    chat = f'{stored}/chat.json'
    assert stores.conversations(chat, '') == [stored] and stores.conversations(chat, '', shown=False) == [chat]
    assert stores.conversations(chat, f'{stored}/images.zip') == [chat, f'{stored}/images.zip']
    assert stores.conversations(str(own / 'chat.json'), stored) == [str(own / 'chat.json'), stored]


@pytest.mark.parametrize('place', ['memory://', 'memory://../x', 'memory://a/../../x'])
def test_what_names_nothing_is_refused(place):
    with pytest.raises(UserError, match='names nothing in a store'):
        caches.local(place)


def test_names_that_would_leave_the_cache_are_refused(stored, monkeypatch, home):
    info = {'name': '/bucket/own/../../x', 'size': 1}
    monkeypatch.setattr(type(MEMORY), 'find', lambda *_, **__: {info['name']: info})
    with pytest.raises(UserError, match='which is no name of a file here'):
        stores.fetched(stored)
    assert not list(home.rglob('x'))


def test_a_store_that_is_not_known_or_too_large_is_refused_in_a_sentence(stored, monkeypatch):
    with pytest.raises(UserError, match=r'cannot be opened .*: install the extra \[cloud\]'):
        stores.fetched('nosuch://bucket/x')
    monkeypatch.setattr(stores.shutil, 'disk_usage', lambda _: type('Usage', (), {'free': 3}))
    with pytest.raises(UserError, match='make room, or set XDG_CACHE_HOME'):
        stores.fetched(stored)


def test_a_run_keeps_the_address(stored, tiny_family, tmp_path):
    cfg = config(micro.family(tmp_path / 'family', tiny_family), f'{stored}/chat.json', data__images='memory://b/more')
    pathlib.Path(cfg.run_dir).mkdir()
    config_file.save(cfg)
    again = config_file.read(cfg.run_dir)
    assert (again.data.path, again.data.images) == (cfg.data.path, cfg.data.images)
    assert config_file.differences(again, cfg) == []


def test_the_time_of_a_file_is_the_store_s(stored):
    file = pathlib.Path(stores.fetched(f'{stored}/chat.json'))
    created = MEMORY.info('/bucket/own/chat.json')['created'].timestamp()
    assert file.stat().st_mtime == pytest.approx(created, abs=1e-3)
    assert stores._changed({'mtime': '2026-01-02T03:04:05Z'}) == 1767323045 * 10**9
    assert stores._changed({'updated': 'no time'}) == stores._changed({}) == 0


@pytest.mark.slow
def test_an_s3_bucket_is_read(own, bucket, home):
    files_of_s3 = fsspec.filesystem('s3')
    files_of_s3.put(f'{own}/', 'runs/own/', recursive=True)
    fetched = pathlib.Path(stores.fetched('s3://runs/own'))
    assert files(fetched) == {n: data for n, data in files(own).items() if n != '.DS_Store'}
    said = files_of_s3.info('runs/own/chat.json')['LastModified'].timestamp()
    assert (fetched / 'chat.json').stat().st_mtime == pytest.approx(said, abs=1e-3)
    assert stores.fetched('s3://runs/own/images/a/3.png') == str(fetched / 'images' / 'a' / '3.png')
    with pytest.raises(UserError, match='there is nothing at s3://runs/other'):
        stores.fetched('s3://runs/other')
