"""Bits per byte of held-out text: the compression a language model reaches, whatever its tokenizer.

Tokens are scored as the run was trained, in windows of its length. Special tokens are scored and stand for no bytes.
"""

import copy
import functools
import math

import jax
import numpy as np
import optax
from tqdm import tqdm

from nanovision_jax import models
from nanovision_jax.data import packing, text
from nanovision_jax.errors import UserError
from nanovision_jax.evals.base import Compression
from nanovision_jax.stages import stage_of

BATCH = 16
AT_ONCE = 1024  # tokens whose scores are in memory


@functools.partial(jax.jit, static_argnames='graphdef')
def losses(graphdef, params, batch):
    """The loss of every target of a batch, in nats: float32 [B, T]."""
    decoder = models.decoder_of(models.merge(graphdef, params))
    hidden = decoder.hidden(batch['tokens'], batch['positions'], batch['segments'])

    def loss(of):
        return optax.softmax_cross_entropy_with_integer_labels(decoder.logits(of[0][None, None])[0, 0], of[1])

    flat = hidden.reshape(-1, hidden.shape[-1]), batch['targets'].ravel()
    return jax.lax.map(loss, flat, batch_size=AT_ONCE).reshape(batch['targets'].shape)


def run(model_run, split='validation', data=None, limit=None):
    """(Compression, no rows) of a run's held-out text, or of the file `data`; n counts tokens.

    limit: at most this many windows. asked is n and left_out is empty: text that cannot be read is a UserError. `other`
    counts the tokens that fill no window.
    """
    config = copy.deepcopy(model_run.config)
    tokenizer = model_run.tokenizer
    stage = stage_of(config)
    if not stage.decodes:
        raise UserError(f'bpb takes a run with a decoder: a {stage.name} run compares pictures with captions.')
    if split == 'heldout':
        raise UserError('text has no heldout split: bpb scores validation (or train).')
    if data:
        files = text.text_files(data)
        texts = [text.read_text(file) for file in files]
        config.data.path = data
        shards = [tokenizer.encode_documents(texts)]
    elif stage.data != 'text' and config.data.source != 'tiny_world':
        raise UserError(f'{config.run_dir} was not trained on text: say which to score, with --data=FILE.')
    else:
        shards = text.token_shards(config, tokenizer, split)
    rows = packing.TextRows(shards, config, tokenizer, seed=0, shuffle=False)
    count = min(rows.rows_per_epoch(), limit or rows.rows_per_epoch())
    nats = tokens = size = 0
    for start in tqdm(range(0, count, BATCH), 'bpb', unit='batch'):
        row_numbers = [min(i, count - 1) for i in range(start, start + BATCH)]  # the last batch repeats its last row
        laid = [rows[i] for i in row_numbers]
        batch = {name: np.stack([row[name] for row in laid]) for name in laid[0]}
        kept = min(BATCH, count - start)
        nats += float(np.asarray(losses(model_run.graphdef, model_run.params, batch))[:kept].sum())
        tokens += batch['targets'][:kept].size
        size += int(tokenizer.byte_lengths[batch['targets'][:kept]].sum())
    scored = rows.rows_per_epoch() * config.data.length
    other = {
        'token behind the last whole window': sum(max(0, len(shard) - 1) for shard in shards) - scored,
        'token beyond the limit': scored - tokens,
    }
    return Compression(
        'bpb',
        tokens,
        size,
        nats / tokens,
        asked=tokens,
        left_out={},
        other={what: count for what, count in other.items() if count},
        bits_per_byte=nats / math.log(2) / size,
    ), []
