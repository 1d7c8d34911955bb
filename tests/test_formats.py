"""Files of rows: what is found in them, whatever their size, and what is no row."""

import json
import random
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from nanovision_jax.data import formats, preparation
from nanovision_jax.data.conversation import BadExample
from nanovision_jax.data.datasets import files
from nanovision_jax.data.folders import data_files
from nanovision_jax.errors import UserError


def rows_of(n, seed=0):
    """Rows with all that may mislead a reader: brackets, quotes and commas in strings, numbers, any alphabet."""
    rng = random.Random(seed)
    said = ['naïve', '你好', '😀', '[{"a": ', '"],', '\\', '\u2028', '\x85', ',', 'x' * 50]
    return [
        {'id': i, 'n': rng.choice([1.5, -3, 1e-9, None, True]), 'a': [''.join(rng.choices(said, k=rng.randint(0, 9)))]}
        for i in range(n)
    ]


@pytest.mark.parametrize('window', [1, 7, 64, 1 << 20])
@pytest.mark.parametrize('indent, ascii', [(None, True), (None, False), (1, False)])
def test_a_list_is_read_in_windows(tmp_path, monkeypatch, window, indent, ascii):
    monkeypatch.setattr(formats, '_WINDOW', window)
    rows = rows_of(60)
    for mark in ('', '\ufeff', ' \n'):
        (tmp_path / 'x.json').write_text(mark + json.dumps(rows, indent=indent, ensure_ascii=ascii) + '\n')
        file = formats.RowFile(tmp_path / 'x.json')
        assert len(file) == 60 and list(file) == rows
        assert [file[i] for i in reversed(range(60))] == rows[::-1]


@pytest.mark.parametrize('end', ['', '\n', '\r\n\r\n'])
def test_lines_are_read_where_they_lie(tmp_path, end):
    rows = rows_of(60)
    text = '\n\n'.join(json.dumps(row, ensure_ascii=False) for row in rows) + end
    for mark in ('', '\ufeff', '\n'):
        (tmp_path / 'x.jsonl').write_text(mark + text, newline='')
        assert list(formats.RowFile(tmp_path / 'x.jsonl')) == rows


@pytest.mark.parametrize('text', ['', ' \n', '[]', ' [ ]', '[\n]\n'])
def test_no_rows(tmp_path, text):
    (tmp_path / 'x.json').write_text(text)
    assert list(formats.RowFile(tmp_path / 'x.json')) == []


def test_what_is_no_row_is_bad_and_the_others_are_read(tmp_path):
    deep = b'[' * 100_000 + b']' * 100_000
    (tmp_path / 'x.jsonl').write_bytes(b'{"a": 1}\n{"a": \n{"a": "\xe9"}\n' + deep + b'\n{"a": 2}')
    file = formats.RowFile(tmp_path / 'x.jsonl')
    assert list(file) == [{'a': 1}, None, None, None, {'a': 2}]
    for i, reason in ((1, 'no JSON'), (2, 'not UTF-8'), (3, 'no JSON')):
        with pytest.raises(BadExample, match=reason):
            file[i]
    (tmp_path / 'x.json').write_bytes(b'[{"a": 1}, {"a": "\xe9"}, 3]')
    assert list(formats.RowFile(tmp_path / 'x.json')) == [{'a': 1}, None, 3]


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r'none\.json cannot be read: No such file'):
        formats.RowFile(tmp_path / 'none.json')
    (tmp_path / 'x.json').write_bytes(b'[' * 100_000)
    with pytest.raises(UserError, match='neither a JSON list nor JSON lines: what begins at byte 2 is no JSON'):
        formats.RowFile(tmp_path / 'x.json')


@pytest.mark.parametrize('window', [7, 1 << 20])
@pytest.mark.parametrize(
    'text, byte',
    [('[{}]\n[{}]', 6), ('[{}]garbage', 5), ('[{}]  ' + ' ' * 99 + '\n]', 107), ('[]\n{}', 4), (' [ ]x', 5)],
)
def test_nothing_follows_a_list(tmp_path, monkeypatch, window, text, byte):
    """`cat a.json b.json`: the rows of b would be dropped without a word."""
    monkeypatch.setattr(formats, '_WINDOW', window)
    (tmp_path / 'x.json').write_text(text)
    with pytest.raises(UserError, match=rf'x\.json goes on behind the end of its JSON list, at byte {byte}: write one'):
        formats.RowFile(tmp_path / 'x.json')


def broken_parquet(file, said):
    """A parquet file of conversations with a column `note` of these bytes, which pyarrow takes for strings unseen."""
    notes = pyarrow.array(said, pyarrow.binary()).view(pyarrow.string())
    turn = [{'from': 'human', 'value': 'a?'}, {'from': 'gpt', 'value': 'b'}]
    table = pyarrow.table({'conversations': [turn] * len(said), 'note': notes})
    pyarrow.parquet.write_table(table, file)


@pytest.mark.parametrize('bad', [0, 1, 2])
def test_a_string_of_parquet_that_is_not_utf8_is_a_bad_row(tmp_path, bad):
    said = [b'x', b'y', b'z']
    said[bad] = b'caf\xe9'
    broken_parquet(tmp_path / 'x.parquet', said)
    rows = formats.open_rows(tmp_path / 'x.parquet')
    for read in (list(rows), list(files.read_rows(tmp_path / 'x.parquet'))):
        assert [row and row['note'] for row in read] == [None if i == bad else 'xyz'[i] for i in range(3)]
    with pytest.raises(BadExample, match='a row that is not UTF-8'):
        rows[bad]
    assert rows[2 - bad if bad != 1 else 0]['note']


def test_a_row_that_is_not_utf8_is_listed_where_a_set_is_prepared(tmp_path):
    broken_parquet(tmp_path / 'x.parquet', [b'x', b'\xe9'])
    with pytest.raises(UserError, match=r'1 of 2 rows .* are bad .*: 1 × a row that is no'):
        preparation.prepare('chat', str(tmp_path), str(tmp_path / 'out'))
    notes = pyarrow.array([b'x', b'\xe9'], pyarrow.binary()).view(pyarrow.string())
    texts = pyarrow.StructArray.from_arrays([notes, notes], ['user', 'assistant'])
    pyarrow.parquet.write_table(
        pyarrow.table({'texts': pyarrow.ListArray.from_arrays([0, 1, 2], texts)}), tmp_path / 'x.parquet'
    )
    with pytest.raises(UserError, match=r'1 of 2 rows .* are bad .*: 1 × a row that is not UTF-8'):
        preparation.prepare('cauldron', str(tmp_path), str(tmp_path / 'out'))


def test_hidden_files_are_no_data(tmp_path):
    """Jupyter's copies, macOS' twins and the hub's cache, at any depth; a hidden folder that is named is read."""
    folder = tmp_path / '.data'
    hidden = ('.ipynb_checkpoints/a-checkpoint.txt', '._a.txt', 'deep/._b.txt', 'deep/.git/c.txt')
    for name in ('a.txt', 'deep/b.txt', *hidden):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('x')
    assert data_files(folder) == [folder / 'a.txt', folder / 'deep/b.txt']


def test_a_row_takes_sixteen_bytes(tmp_path):
    row = {'a': 'b' * 90}
    (tmp_path / 'x.jsonl').write_text((json.dumps(row) + '\n') * 20_000)
    tracemalloc.start()
    try:
        rows = formats.RowFile(tmp_path / 'x.jsonl')
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(rows) == 20_000 and rows[19_999] == row
    assert 16 <= held / len(rows) < 20  # two numbers, and what an array keeps free
