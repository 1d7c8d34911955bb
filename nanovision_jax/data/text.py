"""Text for pretraining: files and tiny_world's texts, tokenized once; published token shards, memory-mapped."""

import hashlib
import json
import pathlib
import re

import numpy as np
from jaxtyping import Int, Shaped

from nanovision_jax.data.catalog import TOKENS
from nanovision_jax.data.datasets import tiny_world
from nanovision_jax.data.folders import data_files
from nanovision_jax.errors import UserError
from nanovision_jax.runs.folder import file_digest, whole, write_whole

_HOW = 'convert it first, as in iconv -f {} -t UTF-8 OLD > NEW'
HELD_OUT = 0.05  # the end of every text file is kept out of training
LLM_C = 20240520  # the first int32 of an llm.c shard: 256 of them, the third the number of tokens, come before them


def text_files(path) -> list[pathlib.Path]:
    """The text file, or the files of a folder (*.txt, *.md), in name order."""
    path = pathlib.Path(path)
    files = [file for file in data_files(path) if file.suffix in ('.txt', '.md')] if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f'no text at {path}: data.path is a text file or a folder of .txt and .md files.')
    return files


def read_text(file) -> str:
    r"""The text of a file in UTF-8, with or without a byte order mark; line ends become \n.

    Raises UserError for another encoding, and for what is no text.
    """
    try:
        text = decode(pathlib.Path(file).read_bytes(), file)
    except OSError as error:
        raise UserError(f'{file} cannot be read: {error.strerror}.') from error
    return text.replace('\r\n', '\n').replace('\r', '\n')


def decode(data: bytes, file) -> str:
    """The bytes of a file as text, in UTF-8. Raises UserError that says which byte is not, and how to convert it."""
    check_text(data[:4096], file)
    mark = b'\xef\xbb\xbf' if data.startswith(b'\xef\xbb\xbf') else b''
    try:
        return data[len(mark) :].decode('utf-8')
    except UnicodeDecodeError as error:
        raise UserError(
            f'{file} is not UTF-8 text: byte {len(mark) + error.start + 1} is 0x{error.object[error.start]:02x}; '
            f'if it is text, {_HOW.format("ISO-8859-1")}, or whatever it is in.'
        ) from error


def check_text(head: bytes, file):
    """Raises UserError where a file's first bytes are those of UTF-16, or of no text at all."""
    if head.startswith((b'\xff\xfe', b'\xfe\xff')) or b'\0' in head:
        at = 0 if head[0] in (0xFE, 0xFF) else head.index(b'\0')
        raise UserError(
            f'{file} is not UTF-8 text: byte {at + 1} is 0x{head[at]:02x}, as in UTF-16 or in a file that is no text; '
            f'if it is text, {_HOW.format("UTF-16")}.'
        )


def read_texts(config, split: str) -> list[str]:
    """The documents of a split: tiny_world's, or files without their last 5% (which are the validation split)."""
    if config.data.source == 'tiny_world':
        return [row['text'].decode() for row in tiny_world.open_rows(config.data.local_path, 'text', split)]
    texts = []
    for file in text_files(config.data.local_path):
        text = read_text(file)
        end = int(len(text) * (1 - HELD_OUT))
        near = end - len(text) // 50  # a text may have no line break for long: it is not given away as held out
        cut = text.rfind('\n', near, end) + 1 or text.rfind(' ', near, end) + 1 or end
        texts.append(text[:cut] if split == 'train' else text[cut:])
    return [text for text in texts if text.strip()]


def token_shards(config, tokenizer, split: str) -> list[Int[np.ndarray, ' _']]:
    """The split's token arrays: 1-D unsigned, documents led by <|endoftext|>, memory-mapped."""
    return (
        _open_shards(config, tokenizer, split)
        if config.data.named.name in TOKENS
        else [_tokenized(config, tokenizer, split)]
    )


def key(config, tokenizer, split: str) -> str:
    """What a split's tokens depend on, as text; not where the files lie, so that data may be moved."""
    if config.data.source == 'tiny_world':
        stamp = f'tiny_world {tiny_world.TinyWorld.VERSION}'
    else:
        if config.data.named.name in TOKENS:
            files = _split_files(config, tokenizer, split)
        else:
            files = text_files(config.data.local_path)
        stamps = [(file, file.stat()) for file in files]
        stamp = repr([(_name(config, file), stat.st_size, stat.st_mtime_ns) for file, stat in stamps])
    return f'{stamp} {tokenizer.digest} {split}'


def _name(config, file):
    """A file's name in data.path."""
    folder = pathlib.Path(config.data.local_path)
    return file.relative_to(folder).as_posix() if folder in file.parents else file.name


def _tokenized(config, tokenizer, split):
    digest = hashlib.sha256(key(config, tokenizer, split).encode()).hexdigest()[:16]
    file = pathlib.Path(config.family) / 'data' / f'text-{split}-{digest}.npy'
    proof = file.with_suffix('.sha256')
    if file.exists() and proof.exists() and proof.read_text() != file_digest(file):
        print(f'{file} is damaged, and is made again')
        file.unlink()
    if not file.exists():
        texts = read_texts(config, split)
        if not texts:
            raise UserError(f'no {split} text at {config.data.path}.')
        file.parent.mkdir(parents=True, exist_ok=True)
        tokens = tokenizer.encode_documents(texts).astype(np.uint16 if tokenizer.size <= 1 << 16 else np.uint32)
        proof.unlink(missing_ok=True)
        with whole(file) as partial, open(partial, 'wb') as opened:
            np.save(opened, tokens)
        write_whole(proof, file_digest(file))
    return open_shard(file)


def open_shard(file) -> Shaped[np.ndarray, '...']:
    """The tokens of one file, memory-mapped: .npy, or .bin (uint16) as nanoGPT writes it or, with a header, llm.c."""
    file = pathlib.Path(file)
    if file.suffix != '.bin':
        try:
            return np.load(file, mmap_mode='r', allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f'{file} is no .npy file that can be read: {error}.') from error
    size, start = file.stat().st_size, 0
    head = np.fromfile(file, np.int32, 3)
    if len(head) == 3 and head[0] == LLM_C:
        start = 256 * 4
        if size != start + 2 * head[2]:
            raise UserError(f'{file} should hold {head[2]} tokens and holds {(size - start) / 2:g}: it is damaged.')
    if size % 2 or size <= start:
        raise UserError(f'{file} holds {size} bytes: a .bin shard is one uint16 after the other.')
    return np.memmap(file, np.uint16, 'r', offset=start)


def shard_files(folder) -> list[pathlib.Path]:
    """The token files of a folder, in name order; or the file itself."""
    path = pathlib.Path(folder)
    return sorted([*path.glob('*.npy'), *path.glob('*.bin')]) if path.is_dir() else [path]


def _shard_folder(config, tokenizer):
    """Where the shards lie: data.path, or where the prepared set says."""
    if config.data.named.name == 'shards':
        return pathlib.Path(config.data.local_path)
    home = pathlib.Path(config.data.local_path) / 'fineweb_edu'
    try:
        made = json.loads((home / 'source.json').read_text())
    except OSError as error:
        raise UserError(
            f'fineweb_edu is not prepared in {config.data.path}: run python -m nanovision_jax.prepare fineweb_edu '
            f'--output={config.data.path}.'
        ) from error
    if made.get('tokenizer_digest', tokenizer.digest) != tokenizer.digest:
        raise UserError(
            f'{home} was tokenized with {made["tokenizer"]!r}, another tokenizer than this run has: set data.tokenizer '
            'to it, or prepare the text again.'
        )
    return home / made['shards']


def is_held_out(file: pathlib.Path) -> bool:
    """Whether a shard's name has the word val or validation in it."""
    return re.search(r'(^|[^a-z])val(idation)?([^a-z]|$)', file.stem.lower()) is not None


def _split_files(config, tokenizer, split):
    """The files of a split of published shards (FineWeb-Edu-10B-Tokens-NPY: edufineweb_{train,val}_NNNNNN.npy).

    Files that is_held_out() tells by their names are the validation split; without any, the last file is.
    """
    path = _shard_folder(config, tokenizer)
    files = shard_files(path)
    if not files or not files[0].is_file():
        raise UserError(f'no token shards at {path}: it is an .npy or .bin file or a folder of them.')
    validation = [f for f in files if is_held_out(f)] or files[-1:]
    files = validation if split == 'validation' else [f for f in files if f not in validation]
    if not files:
        raise UserError(f'{path} holds nothing but held-out shards: training needs one beside them.')
    return files


def _open_shards(config, tokenizer, split):
    """The shards of a split. Raises UserError for what is none, and for tokens of another tokenizer."""
    shards = []
    for file in _split_files(config, tokenizer, split):
        shard = open_shard(file)
        if shard.ndim != 1 or shard.dtype.kind != 'u' or not shard.size:
            raise UserError(f'{file} is {shard.dtype} {list(shard.shape)}: a token shard is 1-D and unsigned.')
        head = np.asarray(shard[:1_000_000])
        if tokenizer.end_of_text not in head or head.max() >= tokenizer.size:
            raise UserError(
                f'{file} was made with another tokenizer: its documents must be led by <|endoftext|> = '
                f'{tokenizer.end_of_text} and its ids stay below {tokenizer.size}; it starts with '
                f'{int(head[0])} and reaches {int(head.max())}. Set data.tokenizer to the one it was made with.'
            )
        shards.append(shard)
    return shards
