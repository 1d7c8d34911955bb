"""FineWeb-Edu for stage 1: token shards, used where they lie; or parquet with a `text` column, made into shards.

Text is tokenized by processes, or, where apache-beam is installed (`[beam]`), by a Beam pipeline, which scales to a
cluster whose workers see the same folders. Who does it changes no token.
"""

import collections
import concurrent.futures
import functools
import importlib.util
import json
import multiprocessing
import os
import pathlib
import shutil

import numpy as np
from tqdm import tqdm

from nanovision_jax.data.conversation import hashes_low
from nanovision_jax.data.datasets import files
from nanovision_jax.data.download import tokenizer_folder
from nanovision_jax.data.formats import open_parquet
from nanovision_jax.data.text import is_held_out, open_shard, shard_files
from nanovision_jax.data.tokenizer import Tokenizer, import_tokenizer
from nanovision_jax.data.workers import ordered_map
from nanovision_jax.errors import UserError
from nanovision_jax.runs.folder import whole

PATTERNS = ('*.npy', '*.bin', '*.parquet')
DOCUMENTS = 100_000  # of a shard: about 100M tokens, as published


def prepare(source, home, patterns=(), tokenizer='gpt2', workers=0, beam='', made_from=None):
    """Makes `home`: source.json, which says where the shards are, and, from text, the shards and their tokenizer.

    beam: options of the pipeline, as in '--runner=DataflowRunner …'. Returns what source.json says.
    """
    found = files.find(source, patterns or PATTERNS)
    beside = [] if found[0].suffix == '.parquet' else shard_files(found[0].parent)
    if beside and {file.resolve() for file in found} != {file.resolve() for file in beside}:
        raise UserError(
            f'{found[0].parent} holds {len(beside)} token shards, and {len(found)} were found or asked for: put '
            'those to learn from, and no others, into one folder.'
        )
    partial = home.with_name(f'{home.name}.part')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if found[0].suffix == '.parquet':
        import_tokenizer(tokenizer_folder(tokenizer), partial / 'tokenizer')
        counts = tokenize(found, partial, workers or os.cpu_count(), beam)
        digest = Tokenizer(partial / 'tokenizer').digest
        made = {'shards': '.', 'tokenizer': tokenizer, 'tokenizer_digest': digest}
    else:
        folder = found[0].parent.resolve()
        counts = collections.Counter()
        for file in found:
            counts['val_tokens' if is_held_out(file) else 'train_tokens'] += open_shard(file).size
        made = {'shards': str(folder)}
    made = (made_from or {}) | made | counts
    (partial / 'source.json').write_text(json.dumps(made, indent=1) + '\n')
    partial.rename(home)
    return made


def tokenize(parquet_files, folder, workers, beam=''):
    """Writes the shards of parquet files with a `text` column into `folder`, which holds tokenizer/; counts them.

    Documents whose hash is low, 1%, go into shards named val.
    """
    tasks = [(number, groups, str(folder)) for number, groups in enumerate(_tasks(parquet_files))]
    if importlib.util.find_spec('apache_beam'):
        _run_beam(tasks, workers, beam)
    elif beam:
        raise UserError("--beam needs Apache Beam: pip install -e '.[beam]'.")
    else:
        spawn = multiprocessing.get_context('spawn')  # tokenizers has threads, which a fork would not survive
        with concurrent.futures.ProcessPoolExecutor(min(workers, len(tasks)), spawn, _one_thread) as pool:
            done = ordered_map(pool, write_shards, tasks, 2 * workers)
            collections.deque(tqdm(done, 'fineweb_edu', len(tasks), unit='shard', mininterval=1), maxlen=0)
    counts = collections.Counter()
    for number, _, _ in tasks:
        file = folder / f'counts-{number:06d}.json'
        counts.update(json.loads(file.read_text()))
        file.unlink()
    for split in ('train', 'val'):
        if not counts[f'{split}_tokens']:
            raise UserError(f'no {split} document in {parquet_files[0].parent}: 1% of the documents are held out.')
    return counts


def _tasks(parquet_files):
    """Runs of row groups with at least DOCUMENTS documents each: [(file, row group), …]."""
    groups, documents = [], 0
    for file in parquet_files:
        parquet = open_parquet(file)
        if 'text' not in parquet.schema_arrow.names:
            raise UserError(f'{file} has no column text: {", ".join(parquet.schema_arrow.names)}.')
        for group in range(parquet.num_row_groups):
            groups.append((str(file), group))
            documents += parquet.metadata.row_group(group).num_rows
            if documents >= DOCUMENTS:
                yield groups
                groups, documents = [], 0
    if groups:
        yield groups


def write_shards(task):
    """Tokenizes one task into a train and a val shard, and counts what is in them; safe to be done twice."""
    number, groups, folder = task
    folder, tokenizer = pathlib.Path(folder), _tokenizer(folder)
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32
    tokens, counts = {'train': [], 'val': []}, collections.Counter()
    for file, group in groups:
        texts = open_parquet(file).read_row_group(group, ['text'])['text'].to_pylist()
        usable = [text for text in texts if text and text.strip()]
        counts.update(rows=len(texts), bad=len(texts) - len(usable))
        for split, documents in _splits(usable).items():
            if documents:
                tokens[split].append(tokenizer.encode_documents(documents).astype(dtype))
    for split, arrays in tokens.items():
        if arrays:
            shard = np.concatenate(arrays)
            counts[f'{split}_tokens'] = len(shard)
            with whole(folder / f'edufineweb_{split}_{number:06d}.npy') as partial, open(partial, 'wb') as file:
                np.save(file, shard)
    with whole(folder / f'counts-{number:06d}.json') as partial:
        partial.write_text(json.dumps(counts))


def _splits(texts):
    """{'train', 'val'}: the texts of each split, in order."""
    splits = {'train': [], 'val': []}
    for text in texts:
        splits['val' if hashes_low(text.encode(), 100) else 'train'].append(text)
    return splits


@functools.cache
def _tokenizer(folder):
    return Tokenizer(pathlib.Path(folder) / 'tokenizer')


def _one_thread():
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the processes are as many as the cores


def _run_beam(tasks, workers, options):
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions

    local = ['--runner=DirectRunner', '--direct_running_mode=multi_processing', f'--direct_num_workers={workers}']
    with apache_beam.Pipeline(options=PipelineOptions(options.split() or local)) as pipeline:
        _ = pipeline | apache_beam.Create(tasks) | apache_beam.Reshuffle() | apache_beam.Map(write_shards)
