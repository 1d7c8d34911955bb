"""One pass over a source before training: the length of every example, and which examples cannot be used.

Rows are planned from these lengths, so that what a row holds never depends on how it is read. The pass decodes every
image once, unless the source says that this was done; its result is kept in the family's data folder. In memory it
holds ten bytes an example, and of the examples themselves only those that are looked at.
"""

import array
import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import time
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32
from tqdm import tqdm

from nanovision_jax.data import conversation
from nanovision_jax.data import images as image_files
from nanovision_jax.data.workers import Workers, cores, ordered_map
from nanovision_jax.errors import UserError
from nanovision_jax.runs.folder import read_lines, whole
from nanovision_jax.stages import stage_of

BLOCK = 64  # examples a process takes at once
MOST_WORKERS = 32  # processes of a pass: each opens the source, and may hold half a GiB of a parquet file
# Seconds: how long a pass is timed, and how much must be left of it for processes, which take two to start, to pay.
TIMED, LEFT = 1, 10
DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)  # what reading an index may raise
WHOLE, SHORTENED, CUT, DROPPED = range(4)  # what is done to a conversation so that it fits into a row


@dataclasses.dataclass
class Index:
    """One split of a source, as a stage sees it.

    `key`: of the source as it was looked at; `rows`, `lengths`, `images`: int32 arrays over the usable examples of the
    split; `asked`: how many examples it has; `left_out`: {row, reason} of those that cannot be used; `bad`: the same of
    all splits; `dropped`: how many have a first answer too long for a row, and are left out for it; `cut`:
    how many such answers are cut; `shortened`: how many conversations end earlier, with their last answer that fits.
    """

    key: str
    rows: np.ndarray
    lengths: np.ndarray
    images: np.ndarray
    bad: list[dict]
    asked: int
    left_out: list[dict]
    dropped: int = 0
    cut: int = 0
    shortened: int = 0

    def told(self, length):
        """What became of conversations that do not fit into a row of `length` tokens, as lines of text."""
        what = {
            f'a first answer beyond data.length={length} and are left out': self.dropped,
            f'a first answer beyond data.length={length} and learn its beginning': self.cut,
            f'more than data.length={length} and data.slots hold, and end with the last that fits': self.shortened,
        }
        return [
            f'{count:,} of {self.asked:,} conversations ({count / self.asked:.1%}) have {text}'
            for text, count in what.items()
            if count
        ]

    @property
    def reasons(self):
        """{kind of reason: how many of the split were left out for it}, the commonest first."""
        return dict(_count(self.left_out).most_common())


def encode_example(example, config, tokenizer) -> tuple[Int32[np.ndarray, ' n'], Bool[np.ndarray, ' n'], list[bytes]]:
    """(ids, learned, images) of an example as this stage sees it: a caption for clip, else a conversation.

    A conversation is cut to fit a row; `images` are the first ones of example.images, which its ids have places for.
    """
    return _encode(example, config, tokenizer)[:3]


def _encode(example, config, tokenizer):
    """(ids, learned, images, what was done to make it fit: WHOLE, SHORTENED or CUT)."""
    data, stage = config.data, stage_of(config)
    if stage.data == 'pairs':
        if len(example.images) != 1:
            raise conversation.BadExample(f'{len(example.images)} images where {stage.name} needs one')
        if not example.caption.strip():
            raise conversation.BadExample('no caption')
        words = tokenizer.encode(example.caption)[: data.length - 2]
        ids = np.array([tokenizer.end_of_text, *words, tokenizer.end], np.int32)
        return ids, np.ones(len(ids), bool), example.images, WHOLE
    slots, patches = data.slots if stage.sees else 0, config.model.vision.patches
    whole = encoded = conversation.encode(example.messages, tokenizer, [patches] * len(example.images))
    # Of some templates the last answer is written otherwise than those before it: it is another one then.
    long = data.length + 1 if tokenizer.template.opening else math.inf
    while len(encoded.ends) > 1 and (encoded.ends[-1] > long or encoded.images[-1] > slots):
        messages = conversation.first_answers(example.messages, len(encoded.ends) - 1)
        encoded = conversation.encode(messages, tokenizer, [patches] * encoded.images[-2])
    ids, learned, kept = conversation.fit(encoded, data.length, cut=data.too_long == 'cut')
    if kept > slots:
        raise conversation.BadExample(f'{kept} images for {slots} slots')
    done = CUT if len(ids) < encoded.ends[0] else SHORTENED if len(ids) < len(whole.ids) else WHOLE
    return ids, learned, example.images[:kept], done


def build_index(source, config, tokenizer, split: str, lost: frozenset = frozenset()) -> Index:
    """The Index of one split of a source.

    lost: examples whose pictures a run that goes on could not read any more. If nothing else has changed since, it is
    the index of before: the run leaves these out by itself, and has the rows that it began with.
    Raises UserError if over 1% of the examples are bad, if more have a first answer beyond data.length than
    data.too_long allows, or if none is left.
    """
    vision, data = config.model.vision, config.data
    bounds = ('MAX_PIXELS', 'MAX_SIDE', 'MAX_ASPECT', 'MAX_BYTES', 'FORMATS')
    limits = tuple(getattr(image_files, name) for name in bounds)
    words = tokenizer.digest, tokenizer.template.digest
    shape = data.length, data.slots, vision.patches, data.too_long == 'cut'

    def digest(of):
        return hashlib.sha256(repr((8, of, words, config.stage, shape, limits)).encode()).hexdigest()[:16]

    made = pathlib.Path(config.family) / 'data' / f'index-{config.stage}-{digest(source.key)}.npz'
    file = (lost and _of_before(made.parent, config.stage, source, digest, lost)) or made
    if not file.exists():
        _scan(source, config, tokenizer, file)
    try:
        lengths, images, sides, fits, bad, *looked_at = _saved(file)
    except DAMAGE as error:
        print(f'{file} is damaged ({error}), and is made again')
        file.unlink()
        file = made
        _scan(source, config, tokenizer, file)
        lengths, images, sides, fits, bad, *looked_at = _saved(file)
    key = looked_at[0] if looked_at else source.key  # older ones do not say
    place = f'{source.name} {data.path}'.strip()
    if len(bad) > 0.01 * (asked := int(((lengths >= 0) | (fits == DROPPED)).sum())):
        told = '; '.join(f'{n} × {reason}' for reason, n in _count(bad).most_common(3))
        listed = f'{_list_of_bad(file)} lists them'
        raise UserError(f'{len(bad)} of {asked} examples of {place} are bad (at most 1% may be): {told}. {listed}.')
    _check_dropped(int((fits == DROPPED).sum()), asked, data, place)
    in_split = sides == (split == 'validation') if source.mixes_splits else np.ones(len(sides), bool)
    rows = np.flatnonzero((lengths > 0) & in_split).astype(np.int32)
    if not len(rows):
        why = ''
        if split == 'validation' and source.mixes_splits and asked:
            why = f': of {asked} examples 5% should be, by a hash of picture or question, and none is; more are needed'
        raise UserError(f'no {split} example in {place} for stage {config.stage}{why}.')
    left_out = [row for row, here in zip(bad, in_split[lengths == 0], strict=True) if here]
    dropped, cut, shortened = (int((fits[in_split] == done).sum()) for done in (DROPPED, CUT, SHORTENED))
    asked = len(rows) + len(left_out) + dropped
    return Index(key, rows, lengths[rows], images[rows], bad, asked, left_out, dropped, cut, shortened)


def _saved(file):
    """(lengths, images, sides, fits, bad) of a file and the list beside it, and then what _seen() was."""
    with open(file, 'rb') as opened, np.load(opened) as saved:
        found = [saved[name] for name in ('lengths', 'pictures', 'sides', 'fits')]
        found.append(list(read_lines(_list_of_bad(file))))
        if len(found[-1]) != (count := int((found[0] == 0).sum())):
            raise ValueError(f'{_list_of_bad(file).name} lists {len(found[-1])} bad rows of {count}')
        return found + ([str(saved['key']), str(saved['base']), saved['stamps']] if 'key' in saved else [])


def _seen(source):
    """{key, base, stamps}: what a source was when it was looked at; see Source.stamps."""
    base, stamps = source.stamps or ('', np.empty(0, np.uint64))
    return {'key': source.key, 'base': base, 'stamps': stamps}


def _of_before(folder, stage, source, digest, lost):
    """The oldest index from which a source now differs in the pictures of `lost` examples alone; None for none."""
    now = _seen(source)
    for file in sorted(folder.glob(f'index-{stage}-*.npz'), key=lambda file: file.stat().st_mtime):
        with contextlib.suppress(*DAMAGE):
            key, base, stamps = _saved(file)[5:] or ('', '', ())
            same = base and base == now['base'] and file.stem.endswith(digest(key))
            if same and lost.issuperset(np.flatnonzero(stamps != now['stamps'])):
                return file
    return None


def _check_dropped(dropped, asked, data, place):
    """Raises UserError if more examples are too long than data.too_long allows."""
    most = {'': 0.05, 'refuse': 0}.get(data.too_long, 1)
    if dropped > most * asked:
        allowed = 'none may have' if most == 0 else f'up to {most:.0%} are left out by themselves'
        raise UserError(
            f'{dropped} of {asked} examples of {place} ({dropped / asked:.1%}) have a first answer that does not fit '
            f'into data.length={data.length} ({allowed}): raise data.length, or say what becomes of them, with '
            'data.too_long=drop or data.too_long=cut.'
        )


def join(indices: list[Index], sizes: list[int]) -> Index:
    """The Index of sources one after the other, of `sizes` examples each."""
    starts = np.cumsum([0, *sizes])
    return Index(
        ' and '.join(index.key for index in indices),
        np.concatenate([index.rows + start for index, start in zip(indices, starts, strict=False)]).astype(np.int32),
        np.concatenate([index.lengths for index in indices]),
        np.concatenate([index.images for index in indices]),
        [row for index in indices for row in index.bad],
        sum(index.asked for index in indices),
        [row for index in indices for row in index.left_out],
        *(sum(getattr(index, name) for index in indices) for name in ('dropped', 'cut', 'shortened')),
    )


class _Look(NamedTuple):
    """What one look at an example finds."""

    length: int  # inputs of a row that it fills; 0: it is bad, -1: it is left out without being bad
    images: int = 0
    validation: bool = False  # of a source that holds every split
    done: int = WHOLE
    bad: dict | None = None  # {row, reason}


def _scan(source, config, tokenizer, file):
    """Looks at every example of a source, and writes what is found to `file` and the list of bad rows."""
    lengths, counts, validation, fits = array.array('i'), array.array('i'), bytearray(), bytearray()
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial, whole(_list_of_bad(file)) as listed:
        with (
            open(listed, 'w') as bad_rows,
            contextlib.closing(_looks(source, config, tokenizer)) as blocks,
            tqdm(total=len(source), desc='reading', leave=False, mininterval=1) as bar,
        ):
            for block in blocks:
                for look in block:
                    lengths.append(look.length)
                    counts.append(look.images)
                    validation.append(look.validation)
                    fits.append(look.done)
                    if look.bad:
                        bad_rows.write(json.dumps(look.bad) + '\n')
                bar.update(len(block))
        with open(partial, 'wb') as opened:  # the names in the file are those of older indices
            np.savez(
                opened,
                lengths=np.frombuffer(lengths, np.int32),
                pictures=np.frombuffer(counts, np.int32),
                sides=np.frombuffer(validation, bool),
                fits=np.frombuffer(fits, np.uint8),
                **_seen(source),
            )


def _looks(source, config, tokenizer):
    """Yields a list of _Look for each BLOCK of examples, in order: found here or, where much is left, in processes."""
    total, workers = len(source), min(cores(), MOST_WORKERS)
    look_at, starts = functools.partial(_look_at, source, config, tokenizer), iter(range(0, total, BLOCK))
    began = time.monotonic()
    for start in starts:
        yield look_at(start)
        seconds, done = time.monotonic() - began, start + BLOCK
        if workers > 1 and seconds >= TIMED and seconds * (total - done) > LEFT * done:
            break
    else:
        return
    with Workers(look_at, workers) as pool:
        yield from ordered_map(pool, pool.call, starts, 2 * workers)


def _look_at(source, config, tokenizer, start):
    return [_look(source, i, config, tokenizer) for i in range(start, min(start + BLOCK, len(source)))]


def _look(source, i, config, tokenizer):
    """The _Look at example i."""
    example = None
    try:
        example = source[i]
        if source.text_only and example.images:
            return _Look(-1)
        ids, _, kept, done = _encode(example, config, tokenizer)
        if not source.decoded:
            for data in kept:
                image_files.load(data, 1)  # of a JPEG as little as shows its damage
    except conversation.TooLong:
        return _Look(-1, validation=_is_validation(source, i, example), done=DROPPED)
    except conversation.BadExample as error:
        bad = {'row': source.number(i), 'reason': str(error)}
        return _Look(0, validation=_is_validation(source, i, example), bad=bad)
    # A row of T tokens holds T + 1 ids: the last one is only ever a target.
    return _Look(len(ids) - 1, len(kept), _is_validation(source, i, example), done)


def _is_validation(source, i, example):
    """Whether a source that holds every split has example i in validation; `example` is None if it cannot be read."""
    if not source.mixes_splits:
        return False
    return (source.split_of(example) if example else source.likely_split_of(i)) == 'validation'


def _list_of_bad(file):
    """Where the bad rows of an index are listed, one {row, reason} a line."""
    return file.with_name(f'{file.stem}.bad_rows.jsonl')


def _count(bad):
    return collections.Counter(conversation.kind_of(row['reason']) for row in bad)
