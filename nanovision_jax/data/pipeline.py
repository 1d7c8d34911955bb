"""From a config to batches: opens tokenizer, source and rows, and lets Grain read ahead.

Nothing here imports jax; batches are dicts of numpy arrays with the shapes that batch.py tells.
"""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import queue
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from nanovision_jax.data import batch, conversation, formats, packing, pairs, sources, text
from nanovision_jax.data.catalog import TOKENS
from nanovision_jax.data.datasets import tiny_world
from nanovision_jax.data.download import tokenizer_folder
from nanovision_jax.data.index import build_index, join
from nanovision_jax.data.templates import OWN
from nanovision_jax.data.tokenizer import Tokenizer, import_tokenizer, train_tokenizer
from nanovision_jax.data.workers import ReadAhead, WorkerDied
from nanovision_jax.errors import Stuck, UserError
from nanovision_jax.runs.config_file import TRAINED, hub_id
from nanovision_jax.runs.folder import file_digest, read_json, write_whole
from nanovision_jax.stages import stage_of

RESTARTS = 3  # times in a row that data workers are started again
STARTING = 60  # seconds that they get to start


def family_tokenizer(config, inherited: pathlib.Path | None = None) -> Tokenizer:
    """The tokenizer of a family of runs, in runs/<name>/tokenizer: made by whichever stage runs first.

    inherited: the tokenizer folder of the run that this one starts from, or goes on from. A family that has none yet
    takes it over. Raises UserError where the family's is another one than `inherited` or data.tokenizer.
    """
    folder, wanted = config.family / 'tokenizer', config.data.tokenizer
    if not folder.exists():
        partial = pathlib.Path(f'{folder}.part')
        shutil.rmtree(partial, ignore_errors=True)
        if inherited:
            Tokenizer(inherited)  # what is missing or damaged is said before it is taken over
            shutil.copytree(inherited, partial)
        else:
            partial.mkdir(parents=True)
            if wanted == TRAINED:
                train_tokenizer(_tokenizer_texts(config), config.data.vocab_size, partial)
            else:
                import_tokenizer(tokenizer_folder(wanted), partial, config.data.template)
            name = wanted if hub_id(wanted) else os.path.basename(os.path.normpath(wanted))
            made_from = {'data.tokenizer': name, 'sha256': _digest(wanted)}
            if wanted == TRAINED:
                made_from['data.vocab_size'] = config.data.vocab_size
            write_whole(partial / 'source.json', json.dumps(made_from) + '\n')
        partial.rename(folder)
    opened = Tokenizer(folder)
    if inherited and Tokenizer(inherited).digest != opened.digest:
        raise UserError(
            f'{pathlib.Path(inherited).parent} was trained with another tokenizer than {folder} is now: bring that '
            'back, or choose another --config.name, which takes over the one it was trained with.'
        )
    if config.data.template == 'own' and opened.template != OWN:
        raise UserError(
            f'data.template is own, but the tokenizer in {folder} has another chat template: a name has one tokenizer. '
            'Choose another --config.name.'
        )
    if not _is_made_from(folder, wanted, config.data.template):
        made_from = _made_from(folder)['data.tokenizer']
        raise UserError(
            f'data.tokenizer is {wanted!r}, but {folder} was made from {made_from!r}: a name has one tokenizer. '
            f'Set --config.data.tokenizer={made_from}, or another --config.name.'
        )
    return opened


def _digest(wanted):
    """The sha256 of the tokenizer.json in a folder, or None where that is no folder."""
    file = pathlib.Path(wanted).expanduser() / 'tokenizer.json'
    return file_digest(file) if wanted != TRAINED and file.is_file() else None


def _made_from(folder):
    """What a family's tokenizer was made from: name, sha256 (older ones: a path alone) and, if trained, its size."""
    file = folder / 'source.json'
    return read_json(file) if file.exists() else {'data.tokenizer': ''}  # of an older converted run


def _is_made_from(folder, wanted, template):
    """Whether a family's tokenizer is what data.tokenizer asks for: by content, where it is still there to compare."""
    made_from = _made_from(folder)
    name = made_from['data.tokenizer']
    if name and (TRAINED in (name, wanted) or name == wanted):
        return name == wanted
    if not _digest(wanted):  # nothing to compare: a converted run does not say, and a folder may be gone
        return not name or os.path.basename(name) == os.path.basename(os.path.normpath(wanted))
    if made_from.get('sha256'):
        return made_from['sha256'] == _digest(wanted)
    with tempfile.TemporaryDirectory() as again:
        import_tokenizer(tokenizer_folder(wanted), again, template)
        return Tokenizer(again).digest == Tokenizer(folder).digest


def _tokenizer_texts(config):
    """What a tokenizer is trained on: everything the source has to say; or the conversations and texts beside it."""
    data = config.data
    parts = data.prepared
    if data.named.name in TOKENS:
        raise UserError('token shards come with a tokenizer: set data.tokenizer to it (gpt2 for FineWeb-Edu-10B).')
    if parts:
        for source in sources.open_prepared(config, 'train'):
            for i in range(len(source)):
                yield from map(conversation.text_of, source[i].messages)
    elif data.source == 'tiny_world':
        for kind in ('text', 'chat', 'scenes'):
            rows = tiny_world.open_rows(data.local_path, kind, 'train')
            for i in range(0, len(rows), 2 if kind == 'scenes' else 4):
                row = rows[i]
                for name in {'text', 'caption'} & set(row):
                    yield row[name].decode()
                for message in json.loads(row['conversation']) if 'conversation' in row else ():
                    yield conversation.text_of(message)
    elif data.source == 'text':
        yield from text.read_texts(config, 'train')
    else:
        own = pathlib.Path(data.local_path)
        found = [file for ending in ('json*', 'parquet') for file in own.parent.glob(f'*.{ending}')]
        beside = sorted(f for f in found if f != own and not f.name.endswith('bad_rows.jsonl'))
        for file in [own, *beside]:
            try:
                rows = formats.open_rows(file)
            except UserError:
                if file == own:
                    raise
                continue  # something else that lies there
            for row in rows:
                with contextlib.suppress(conversation.BadExample):  # the index counts and lists these
                    yield from map(conversation.text_of, formats.read_row(row)[0])


def open_rows(config, tokenizer, split: str = 'train', lost: frozenset = frozenset()) -> tuple:
    """The rows of a stage: (rows, bad), `bad` being the examples that cannot be used.

    lost: examples that a run that goes on could not read any more; see index.build_index. Training rows are shuffled by
    config.seed; those of another split come in order.
    """
    shuffle = split == 'train'
    kind = stage_of(config).data
    if kind == 'text':
        shards = text.token_shards(config, tokenizer, split)
        subset = config.data.named.subset if split == 'train' else ''
        key = text.key(config, tokenizer, split)
        return packing.TextRows(shards, config, tokenizer, config.seed, shuffle, subset, key), []
    source = sources.open_source(config, split)
    if isinstance(source, sources.Concatenated):
        indices = [build_index(part, config, tokenizer, split) for part in source.parts]
        index = join(indices, [len(part) for part in source.parts])
        weights = [part.weight for part in config.data.prepared]
        shuffled = packing.Mixed([len(part.rows) for part in indices], weights, config.seed, shuffle)
    else:
        index = build_index(source, config, tokenizer, split, lost)
        shuffled = packing.Shuffled(len(index.rows), config.seed, shuffle)
    if shuffle:
        print(''.join(f'{line}\n' for line in index.told(config.data.length)), end='')
    rows = pairs.PairRows if kind == 'pairs' else packing.PackedRows
    return rows(source, index, config, tokenizer, shuffled), index.bad


def batches(
    rows, batch_size: int, start: int = 0, workers: int = 0, timeout: float = 120, own: Sequence[int] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of `batch_size` rows from row `start` on, read ahead by threads, or by worker processes.

    own: which rows of a batch are read, those of this host; None: all.
    Batch n is rows[start + n·batch_size : …] whatever the number of workers. Workers that die, or give nothing for
    `timeout` seconds, are started again, RESTARTS times in a row. What rows leave out is in a batch, too: see
    batch.skipped(). Raises UserError for a batch in which nothing is learned, and where workers go on dying; Stuck
    where reading an example hangs.
    """
    restarts, own = 0, range(batch_size) if own is None else own
    while True:
        read = _read_ahead(rows, batch_size, own, start, workers)
        try:
            for made in _in_time(read, timeout, STARTING * bool(workers)):
                if len(own) == batch_size and 'weights' in made and not made['weights'].any():
                    why = next((reason for *_, reason in batch.skipped(made)), 'no answer in any of them')
                    raise UserError(f'nothing is learned in rows {start} and on: {why}.')
                yield made
                start, restarts = start + batch_size, 0
        except TimeoutError:
            if example := _hanging(rows, [start + i for i in own], timeout):
                raise Stuck(f'reading hangs for more than {timeout:g} s (data.timeout) at {example}.') from None
            why, what = f'nothing came for {timeout:g} s (data.timeout)', 'data workers stood still'
        except WorkerDied as error:
            why, what = str(error).rstrip('.'), 'a data worker died'
        finally:
            if not isinstance(sys.exception(), Stuck):  # which would be waited for
                read.close()
        restarts += 1
        if restarts > RESTARTS:
            raise UserError(f'data workers go on dying, at row {start} and on: {why}.')
        print(f'{what}, and they begin again at row {start}', file=sys.stderr)


def _in_time(read, timeout, more):
    """Yields what an iterator does, each within `timeout` seconds, the first `more` later. Raises TimeoutError."""
    asked, given = queue.SimpleQueue(), queue.SimpleQueue()

    def answer():
        while asked.get():
            try:
                given.put((next(read), None))
            except Exception as error:
                given.put((None, error))

    threading.Thread(target=answer, daemon=True, name='batches').start()
    try:
        while True:
            asked.put(True)
            try:
                made, error = given.get(timeout=timeout + more)
            except queue.Empty:
                raise TimeoutError from None
            if error:
                raise error
            yield made
            more = 0
    finally:
        asked.put(False)


def _hanging(rows, numbers, timeout):
    """Which example of some rows takes more than `timeout` seconds to read; None where none does."""
    at = [None]

    def read():
        for number in numbers:
            for at[0] in rows.reading(number):
                pass
        at[0] = None

    reader = threading.Thread(target=read, daemon=True, name='probe')
    reader.start()
    last = at[0]
    while reader.is_alive():
        reader.join(timeout)
        if reader.is_alive() and at[0] == last:
            return last or 'the data file'
        last = at[0]
    return None


def _read_ahead(rows, batch_size, own, start, workers):
    """An iterator over the batches from a row on, with close(): by two threads of Grain's, or by processes.

    Not by Grain's processes: what these have read when they are told to end is left in shared memory, and they take
    seconds to end.
    """
    read = functools.partial(_read_batch, rows, own)
    if workers:
        return ReadAhead(read, itertools.count(start, batch_size), workers)
    dataset = grain.MapDataset.range(start, np.iinfo(np.int32).max, batch_size).map(read)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def _read_batch(rows, own, start):
    """The rows `own` of the batch from row `start` on."""
    stacked = getattr(rows, 'captions', batch.stack)  # of pairs; rows of other stages are stacked
    return stacked([rows[start + i] for i in own])
