"""One pass over a source before training: the length of every example, and which examples cannot be used.

Rows are planned from these lengths, so that what a row holds never depends on how it is read. The pass decodes every
picture once, unless the source says that this was done; its result is kept in the family's data folder. In memory it
holds nine bytes an example, and of the examples themselves only those that are looked at.
"""

import array
import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib

import numpy as np
from tqdm import tqdm

from nanovision_jax.data import conversation, images
from nanovision_jax.errors import UserError

BLOCK = 64  # examples a thread takes at once


@dataclasses.dataclass
class Index:
    """One split of a source, as a stage sees it.

    `rows`, `lengths`, `pictures`: int32 arrays over the usable examples of the split; `asked`: how many examples it
    has; `left_out`: {row, reason} of those that cannot be used; `bad`: the same of all splits of the source.
    """

    rows: np.ndarray
    lengths: np.ndarray
    pictures: np.ndarray
    bad: list[dict]
    asked: int
    left_out: list[dict]

    @property
    def reasons(self):
        """{kind of reason: how many of the split were left out for it}, the commonest first."""
        return dict(_count(self.left_out).most_common())


def encode_example(example, config, tokenizer):
    """(ids, learned, pictures) of an example as this stage sees it: a caption for clip, else a conversation.

    A conversation is cut to fit a row; `pictures` are the first ones of example.images, which its ids have places for.
    """
    data = config.data
    vision = config.stage.startswith('vision')
    if config.stage == 'clip':
        if len(example.images) != 1:
            raise conversation.BadExample(f'{len(example.images)} images where clip needs one')
        if not example.caption.strip():
            raise conversation.BadExample('no caption')
        words = tokenizer.encode(example.caption)[: data.length - 2]
        ids = np.array([tokenizer.end_of_text, *words, tokenizer.end], np.int32)
        return ids, np.ones(len(ids), bool), example.images
    slots, patches = data.slots if vision else 0, config.model.vision.patches
    encoded = conversation.encode(example.messages, tokenizer, patches, len(example.images))
    ids, learned, kept = conversation.fit(encoded, data.length)
    if kept > slots:
        raise conversation.BadExample(f'{kept} images for {slots} slots')
    return ids, learned, example.images[:kept]


def build_index(source, config, tokenizer, split):
    """The Index of one split of a source. Raises UserError if over 1% of the examples are bad, or none is left."""
    vision, data = config.model.vision, config.data
    limits = images.MAX_PIXELS, images.MAX_SIDE, images.MAX_ASPECT, images.MAX_BYTES
    words = tokenizer.digest, tokenizer.template.digest
    parts = (6, source.key, words, config.stage, data.length, data.slots, vision.patches, limits)
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    file = pathlib.Path(config.family) / 'data' / f'index-{config.stage}-{digest}.npz'
    if not file.exists():
        _scan(source, config, tokenizer, file)
    with np.load(file) as saved:
        lengths, pictures, sides = saved['lengths'], saved['pictures'], saved['sides']
    listed = _list_of_bad(file)
    place = ' '.join([getattr(source, 'name', ''), data.path]).strip()
    if (count := int((lengths == 0).sum())) > 0.01 * (asked := int((lengths >= 0).sum())):
        told = '; '.join(f'{n} × {reason}' for reason, n in _count(_read(listed)).most_common(3))
        raise UserError(
            f'{count} of {asked} examples of {place} are bad (at most 1% may be): {told}. {listed} lists them.'
        )
    bad = list(_read(listed))
    on_side = sides == (split == 'validation') if hasattr(source, 'side') else np.ones(len(sides), bool)
    rows = np.flatnonzero((lengths > 0) & on_side).astype(np.int32)
    if not len(rows):
        raise UserError(f'no {split} example in {place} for stage {config.stage}.')
    left_out = [row for row, here in zip(bad, on_side[lengths == 0], strict=True) if here]
    return Index(rows, lengths[rows], pictures[rows], bad, len(rows) + len(left_out), left_out)


def join(indices, sizes):
    """The Index of sources one after the other, of `sizes` examples each."""
    starts = np.cumsum([0, *sizes])
    return Index(
        np.concatenate([index.rows + start for index, start in zip(indices, starts, strict=False)]).astype(np.int32),
        np.concatenate([index.lengths for index in indices]),
        np.concatenate([index.pictures for index in indices]),
        [row for index in indices for row in index.bad],
        sum(index.asked for index in indices),
        [row for index in indices for row in index.left_out],
    )


def _scan(source, config, tokenizer, file):
    def is_held_out(i, example):
        if not hasattr(source, 'side'):
            return False
        return (source.side(example) if example else source.likely_side(i)) == 'validation'

    def look(i):
        example = None
        try:
            example = source[i]
            if getattr(source, 'text_only', False) and example.images:
                return -1, 0, False, None  # not for this stage, and not bad
            ids, _, pictures = encode_example(example, config, tokenizer)
            for data in () if getattr(source, 'decoded', False) else pictures:
                images.load(data)
        except conversation.BadExample as error:
            row = {'row': source.number(i) if hasattr(source, 'number') else i, 'reason': str(error)}
            return 0, 0, is_held_out(i, example), row
        # A row of T tokens holds T + 1 ids: the last one is only ever a target.
        return len(ids) - 1, len(pictures), is_held_out(i, example), None

    def look_at(block):
        return [look(i) for i in block]

    lengths, pictures, sides = array.array('i'), array.array('i'), bytearray()
    workers, total = os.cpu_count(), len(source)
    blocks = (range(start, min(start + BLOCK, total)) for start in range(0, total, BLOCK))
    file.parent.mkdir(parents=True, exist_ok=True)
    partial, listed = (file.with_name(f'{file.stem}.{os.getpid()}{ending}') for ending in ('.part.npz', '.part'))
    try:
        with (
            open(listed, 'w') as bad_rows,
            concurrent.futures.ThreadPoolExecutor(workers) as pool,
            tqdm(total=total, desc='reading', leave=False, mininterval=1) as bar,
        ):
            for block in ordered_map(pool, look_at, blocks, 2 * workers):
                for length, count, held_out, bad in block:
                    lengths.append(length)
                    pictures.append(count)
                    sides.append(held_out)
                    if bad:
                        bad_rows.write(json.dumps(bad) + '\n')
                bar.update(len(block))
        np.savez(
            partial,
            lengths=np.frombuffer(lengths, np.int32),
            pictures=np.frombuffer(pictures, np.int32),
            sides=np.frombuffer(sides, bool),
        )
        listed.rename(_list_of_bad(file))
        partial.rename(file)
    finally:
        for left in (listed, partial):
            left.unlink(missing_ok=True)


def _list_of_bad(file):
    """Where the bad rows of an index are listed, one {row, reason} a line."""
    return file.with_name(f'{file.stem}.bad_rows.jsonl')


def _count(bad):
    return collections.Counter(conversation.kind_of(row['reason']) for row in bad)


def _read(listed):
    with open(listed) as rows:
        yield from map(json.loads, rows)


def ordered_map(pool, function, items, ahead):
    """map() over a pool, results in order, with at most `ahead` items taken before their results are wanted."""
    items = iter(items)
    waiting = collections.deque(pool.submit(function, item) for item in itertools.islice(items, ahead))
    while waiting:
        done = waiting.popleft().result()
        for item in itertools.islice(items, 1):
            waiting.append(pool.submit(function, item))
        yield done
