"""Text for pretraining: files with their last 5% held out, tiny_world's texts, published token shards."""

import pathlib

import numpy as np
import pytest
from conftest import parse

from nanovision_jax.data import packing, text
from nanovision_jax.data.datasets import tiny_world
from nanovision_jax.errors import UserError


def line(i):
    return f'the cat sees {i:04d} dogs'


@pytest.fixture
def lines(tmp_path):
    """A file of 1000 lines, each of which says which it is, and its config."""
    file = tmp_path / 'play.txt'
    file.write_text(''.join(line(i) + '\n' for i in range(1000)))
    return file, parse(
        'pretrain', 'data.source=text', f'data.path={file}', f'run_dir={tmp_path}/runs/x', 'data.length=32'
    )


def read(config, tokenizer, split):
    """The split as the rows of one epoch hold it, in order, as text."""
    rows = packing.TextRows(text.token_shards(config, tokenizer, split), config, tokenizer, 0, shuffle=False)
    read = [rows[i] for i in range(rows.rows_per_epoch())]
    return tokenizer.decode(np.concatenate([*(row['tokens'] for row in read), read[-1]['targets'][-1:]]))


def test_a_text_without_line_breaks_is_not_held_out_whole(tmp_path):
    """A title and one paragraph: 5% are held out, and not all behind the last line break."""
    words = ' '.join(f'word{i}' for i in range(400))
    (tmp_path / 'a.txt').write_text(f'Title\n\n{words}\n')
    (tmp_path / 'b.txt').write_text('x' * 1000)
    config = parse('pretrain', 'data.source=text', f'data.path={tmp_path}', f'run_dir={tmp_path}/runs/pretrain')
    train, held = (text.read_texts(config, split) for split in ('train', 'validation'))
    assert [a + b for a, b in zip(train, held, strict=True)] == [f'Title\n\n{words}\n', 'x' * 1000]
    assert all(0.04 < len(b) / len(a + b) < 0.08 for a, b in zip(train, held, strict=True))
    assert train[0].endswith(' ')


def test_the_end_of_a_file_is_held_out(lines):
    file, config = lines
    (train,), (validation,) = text.read_texts(config, 'train'), text.read_texts(config, 'validation')
    assert train + validation == file.read_text()
    assert 50 <= len(validation.splitlines()) <= 51 and validation.splitlines()[-1] == line(999)


def test_no_training_row_holds_what_is_held_out(lines, tokenizer):
    _, config = lines
    held_out = text.read_texts(config, 'validation')[0].splitlines()
    train, validation = read(config, tokenizer, 'train'), read(config, tokenizer, 'validation')
    assert sum(said in train for said in held_out) == 0
    assert sum(line(i) in train for i in range(900)) > 890
    assert sum(said in validation for said in held_out) > 40
    assert sum(line(i) in validation for i in range(900)) == 0


def test_every_file_of_a_folder_gives_its_end(tmp_path):
    (tmp_path / 'deep').mkdir()
    for name, word in {'b.txt': 'b', 'a.md': 'a', 'deep/c.txt': 'c', 'd.json': 'd'}.items():
        (tmp_path / name).write_text('\n'.join(f'{word}{i}' for i in range(100)))
    config = parse('pretrain', 'data.source=text', f'data.path={tmp_path}')
    train, validation = text.read_texts(config, 'train'), text.read_texts(config, 'validation')
    assert [said.split()[0] for said in train] == ['a0', 'b0', 'c0']
    assert [said.split()[-1] for said in validation] == ['a99', 'b99', 'c99']
    assert not {word for said in train for word in said.split()} & {
        word for said in validation for word in said.split()
    }


def test_a_file_of_one_line_is_split_too(tmp_path):
    (tmp_path / 'a.txt').write_text('ab' * 500)
    config = parse('pretrain', 'data.source=text', f'data.path={tmp_path}/a.txt')
    assert [len(said) for said in text.read_texts(config, 'train')] == [950]
    assert [len(said) for said in text.read_texts(config, 'validation')] == [50]


@pytest.mark.parametrize(
    'data, told',
    {
        'naïve'.encode('latin-1') * 9: r'byte 3 is 0xef; if it is text, convert it first, as in iconv -f ISO-8859-1',
        '\ufeffnaïve'.encode() + b'\xe9': r'byte 10 is 0xe9',
        'naïve'.encode('utf-16'): r'byte 1 is 0xff, as in UTF-16 .* iconv -f UTF-16 -t UTF-8',
        'naïve'.encode('utf-16-le'): r'byte 2 is 0x00, as in UTF-16',
        'naïve'.encode('utf-16-be'): r'byte 1 is 0x00, as in UTF-16',
        b'PAR1\x15\x04\x15\x00' + bytes(range(256)): r'byte 8 is 0x00, .* a file that is no text',
        b'PAR1' + bytes(range(1, 256)): r'byte 132 is 0x80',
    }.items(),
    ids=repr,
)
def test_what_is_no_utf8_is_refused_by_name(tmp_path, data, told):
    file = tmp_path / 'a.txt'
    file.write_bytes(data)
    for path in (file, tmp_path):
        with pytest.raises(UserError, match=rf'a\.txt is not UTF-8 text: {told}') as caught:
            text.read_texts(parse('pretrain', 'data.source=text', f'data.path={path}'), 'train')
        assert '\n' not in str(caught.value)


def test_a_byte_order_mark_and_other_line_ends_are_no_text(tmp_path):
    (tmp_path / 'a.txt').write_bytes('\ufeffnaïve\r\n你好\rend'.encode())
    assert text.read_text(tmp_path / 'a.txt') == 'naïve\n你好\nend'


def test_our_own_output_is_no_text(tmp_path):
    """A folder in which runs lie too: their reports and cards are never learned from."""
    (tmp_path / 'a.md').write_text('mine')
    for name in ('tiny/tokenizer/source.json', 'tiny/report.md', 'export/lineage.json', 'export/README.md'):
        (tmp_path / 'runs' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'runs' / name).write_text('{}')
    assert text.text_files(tmp_path) == [tmp_path / 'a.md']


def test_no_text_is_one_sentence(tmp_path, tokenizer):
    for path in (tmp_path, tmp_path / 'none.txt'):
        with pytest.raises(UserError, match='no text at'):
            text.read_texts(parse('pretrain', 'data.source=text', f'data.path={path}'), 'train')
    (tmp_path / 'empty.txt').write_text(' \n\n')
    config = parse('pretrain', 'data.source=text', f'data.path={tmp_path}', f'run_dir={tmp_path}/runs/x')
    with pytest.raises(UserError, match='no train text at'):
        text.token_shards(config, tokenizer, 'train')


def test_text_is_tokenized_once(lines, tokenizer, monkeypatch):
    file, config = lines
    (first,) = text.token_shards(config, tokenizer, 'train')
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), 'encode_documents', None)
        (again,) = text.token_shards(config, tokenizer, 'train')
    assert isinstance(again, np.memmap) and (first == again).all() and first.dtype == np.uint16
    assert tokenizer.decode(first) == text.read_texts(config, 'train')[0].strip()
    file.write_text(file.read_text() + 'and more\n' * 100)
    assert len(text.token_shards(config, tokenizer, 'train')[0]) > len(first)


def test_a_large_vocabulary_takes_32_bits(lines, tokenizer):
    _, config = lines

    class Large:
        digest, size = 'large', 65_537
        encode_documents = staticmethod(lambda texts: tokenizer.encode_documents(texts) + 65_000)

    (tokens,) = text.token_shards(config, Large, 'train')
    assert tokens.dtype == np.uint32
    assert (tokens == text.token_shards(config, tokenizer, 'train')[0].astype(np.int64) + 65_000).all()


def test_tiny_worlds_texts(tiny_config, tokenizer):
    config = tiny_config('pretrain')
    for split, n in (('train', 96), ('validation', 16)):
        assert sorted(text.read_texts(config, split)) == sorted(tiny_world.text(split, n))
        (tokens,) = text.token_shards(config, tokenizer, split)
        assert (tokens == tokenizer.end_of_text).sum() == n and tokens[0] == tokenizer.end_of_text


# Shards --------------------------------------------------------------------------------------------------------------


def shard(tokenizer, n=500, seed=0, dtype=np.uint16):
    tokens = np.random.default_rng(seed).integers(5, tokenizer.size, n).astype(dtype)
    tokens[::50] = tokenizer.end_of_text
    return tokens


def shards_config(path):
    return parse('pretrain', 'data.source=shards', f'data.path={path}', 'data.tokenizer=gpt2', 'data.length=32')


def save(folder, tokenizer, *names):
    for seed, name in enumerate(names):
        np.save(folder / name, shard(tokenizer, seed=seed))


def seeds_of(shards, tokenizer):
    """Which of the saved shards these are."""
    return [next(s for s in range(9) if (one == shard(tokenizer, seed=s)).all()) for one in shards]


def test_a_shard_is_held_out_by_a_word_of_its_name():
    held = ['val', 'a_val_0001', 'Validation-1', 'edu.val.3', 'x-val2']
    for name in (*held, 'retrieval_000', 'medieval_1', 'evaluation', 'values_3', 'train'):
        assert text.is_held_out(pathlib.Path(f'{name}.npy')) == (name in held)


def test_val_shards_are_held_out(tmp_path, tokenizer):
    save(tmp_path, tokenizer, 'a_train_000001.npy', 'b_val_000000.npy', 'c_train_000002.npy')
    config = shards_config(tmp_path)
    assert seeds_of(text.token_shards(config, tokenizer, 'train'), tokenizer) == [0, 2]
    assert seeds_of(text.token_shards(config, tokenizer, 'validation'), tokenizer) == [1]
    assert isinstance(text.token_shards(config, tokenizer, 'train')[0], np.memmap)


def test_without_val_shards_the_last_is_held_out(tmp_path, tokenizer):
    save(tmp_path, tokenizer, 'a.npy', 'b.npy', 'c.npy')
    config = shards_config(tmp_path)
    assert seeds_of(text.token_shards(config, tokenizer, 'train'), tokenizer) == [0, 1]
    assert seeds_of(text.token_shards(config, tokenizer, 'validation'), tokenizer) == [2]


def test_one_shard_is_not_enough(tmp_path, tokenizer):
    save(tmp_path, tokenizer, 'a.npy')
    with pytest.raises(UserError, match='nothing but held-out shards'):
        text.token_shards(shards_config(tmp_path), tokenizer, 'train')
    with pytest.raises(UserError, match='no token shards at'):
        text.token_shards(shards_config(tmp_path / 'none'), tokenizer, 'train')


def other_tokenizer(tokenizer):
    """What shards look like that another tokenizer made."""
    mine = shard(tokenizer)
    reaching = mine.copy()
    reaching[7] = tokenizer.size
    return {'no <|endoftext|>': np.maximum(mine, 5), 'ids beyond the vocabulary': reaching}


@pytest.mark.parametrize('how', ['no <|endoftext|>', 'ids beyond the vocabulary'])
def test_shards_of_another_tokenizer_are_refused(tmp_path, tokenizer, how):
    save(tmp_path, tokenizer, 'a.npy', 'z.npy')
    text.token_shards(shards_config(tmp_path), tokenizer, 'train')
    np.save(tmp_path / 'a.npy', other_tokenizer(tokenizer)[how])
    with pytest.raises(UserError, match=r'a\.npy was made with another tokenizer.*Set data\.tokenizer'):
        text.token_shards(shards_config(tmp_path), tokenizer, 'train')


@pytest.mark.parametrize(
    'array',
    [np.zeros(9, np.int32), np.zeros((3, 3), np.uint16), np.zeros(9, np.float32), np.zeros(0, np.uint16)],
    ids=str,
)
def test_what_is_no_shard_is_refused(tmp_path, tokenizer, array):
    save(tmp_path, tokenizer, 'a.npy', 'z.npy')
    np.save(tmp_path / 'a.npy', array)
    with pytest.raises(UserError, match='a token shard is 1-D and unsigned'):
        text.token_shards(shards_config(tmp_path), tokenizer, 'train')


def test_a_broken_shard_is_refused(tmp_path, tokenizer):
    save(tmp_path, tokenizer, 'a.npy', 'z.npy')
    whole = (tmp_path / 'a.npy').read_bytes()
    objects = np.array([{}], object)
    np.save(tmp_path / 'objects.npy', objects, allow_pickle=True)  # a pickle could run anything
    for data in (b'', b'hello', whole[:60], whole[:300], (tmp_path / 'objects.npy').read_bytes()):
        (tmp_path / 'a.npy').write_bytes(data)
        with pytest.raises(UserError, match=r'a\.npy is no \.npy file'):
            text.token_shards(shards_config(tmp_path), tokenizer, 'train')
