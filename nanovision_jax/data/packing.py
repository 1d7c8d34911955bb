"""Rows of fixed shape: packed conversations, and windows of text. Images with captions are in pairs.py.

A rows object is an endless sequence: rows[i] is a dict of numpy arrays, a pure function of (seed, i). Epoch after epoch
follows, each in an order of its own, so the position in the data is one integer. rows.identity() tells what row i
depends on: rows of equal identities have the same row i.
"""

import contextlib
import functools
import hashlib
import os
import threading

import numpy as np
from jaxtyping import Int

from nanovision_jax.data import batch
from nanovision_jax.data import images as image_files
from nanovision_jax.data.catalog import bounds
from nanovision_jax.data.conversation import BadExample
from nanovision_jax.data.index import encode_example
from nanovision_jax.data.text import open_shard
from nanovision_jax.errors import UserError
from nanovision_jax.stages import stage_of

CHUNK = 1 << 16  # examples whose numbers are Python's own at a time: those are quicker to ask, and take more memory
DRAFT = ', large JPEGs at a part of their size'
MEMORY, OVERHEAD = 1 << 30, 500  # bytes that examples may take once they are read; what an example takes in any case


def plan(
    order: Int[np.ndarray, ' n'],
    lengths: Int[np.ndarray, ' all'],
    images: Int[np.ndarray, ' all'],
    length: int,
    slots: int,
    open_rows: int = 16,
) -> list[list[int]]:
    """Puts examples, in `order`, into rows of at most `length` tokens and `slots` images: a list of index lists.

    First fit among the last `open_rows` rows. lengths, images: of every example, whether it is in `order` or not.
    """
    done, rows, tokens, pictures = [], [], [], []  # tokens, pictures: what is free in each of `rows`
    for start in range(0, len(order), CHUNK):
        part = order[start : start + CHUNK]
        for i, need, seen in zip(part.tolist(), lengths[part].tolist(), images[part].tolist(), strict=True):
            for place, left in enumerate(tokens):
                if left >= need and pictures[place] >= seen:
                    break
            else:
                if len(rows) == open_rows:
                    fullest = tokens.index(min(tokens))
                    done.append(rows.pop(fullest))
                    del tokens[fullest], pictures[fullest]
                place = len(rows)
                rows.append([])
                tokens.append(length)
                pictures.append(slots)
            rows[place].append(i)
            tokens[place] -= need
            pictures[place] -= seen
    return done + rows


class Shuffled:
    """Endless epochs over n things: `self.at(i)` is (epoch, thing), each epoch in an order of its own."""

    def __init__(self, n, seed, shuffle=True):
        self.n, self.seed, self.shuffle, self._orders = n, seed, shuffle, {}

    def order(self, epoch):
        """A permutation of range(n): a pure function of (seed, epoch)."""
        if not self.shuffle:
            return np.arange(self.n)
        orders = self._orders  # threads may be an epoch or two apart: a race only computes an order twice, the same
        if epoch not in orders:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
            self._orders = orders = {epoch: order} | {e: o for e, o in orders.items() if e == epoch - 1}
        return orders[epoch]

    def span(self, start, stop):
        """The things of draws start to stop."""
        first = start // self.n
        orders = [self.order(epoch) for epoch in range(first, (stop - 1) // self.n + 1)]
        return np.concatenate(orders)[start - first * self.n : stop - first * self.n]

    def at(self, i):
        """(epoch, thing) of the i-th draw."""
        epoch, index = divmod(int(i), self.n)
        return epoch, int(self.order(epoch)[index])

    def identity(self):
        """What the order depends on, as text."""
        return f'{self.n} examples, ' + (f'shuffled with seed {self.seed}' if self.shuffle else 'in order')


class Mixed(Shuffled):
    """Endless epochs over several sets of things, numbered one after the other, in shares.

    sizes: how many of each; weights: the share of each in every epoch; they add up to 1. An epoch is as long as the set
    that runs out first lasts; the others go on in the next one where they stopped, so that nothing is drawn a second
    time before all of its set was.
    """

    def __init__(self, sizes, weights, seed, shuffle=True):
        epoch = min(size / weight for size, weight in zip(sizes, weights, strict=True))
        self.counts = [max(1, int(epoch * weight + 1e-6)) for weight in weights]
        self.starts = np.cumsum([0, *sizes])
        self.parts = [Shuffled(size, seed * len(sizes) + i, shuffle) for i, size in enumerate(sizes)]
        self.shares = ', '.join(f'{weight:.6g} of {size}' for size, weight in zip(sizes, weights, strict=True))
        super().__init__(sum(self.counts), seed, shuffle)

    def identity(self):
        """What the order depends on, as text."""
        return f'{super().identity()}, mixed as {self.shares}'

    def order(self, epoch):
        """Which things an epoch draws, in order: a pure function of (seed, epoch)."""
        orders = self._orders
        if epoch not in orders:
            drawn = [
                start + part.span(epoch * count, (epoch + 1) * count)
                for start, part, count in zip(self.starts, self.parts, self.counts, strict=False)
            ]
            # Without shuffling every stretch has each set's share too.
            places = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
            order = np.argsort(places, kind='stable')
            if self.shuffle:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
            order = np.concatenate(drawn)[order]
            self._orders = orders = {epoch: order} | {e: o for e, o in orders.items() if e == epoch - 1}
        return orders[epoch]


def data_identity(rows):
    """What the examples of rows depend on, as a digest: their source, the tokenizer, and which of them are bad."""
    parts = (rows.index.key, rows.tokenizer.digest, [row['row'] for row in rows.index.bad])
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class Examples:
    """Rows out of the examples of a source, which `_read` reads by their number in the index.

    What is read is kept where all of it takes no more than MEMORY, in all data workers together: the second epoch of a
    small set costs nothing.

    An example that cannot be read any more as the run goes on, though it could be when the index was made, is left out
    of its row, which says so under 'skipped': [[row, example, reason]], by its number in the source. skips: such
    (row, example) of before, which are left out again, whatever has become of them.
    """

    def __init__(self, source, index, config, tokenizer, shuffled):
        self.source, self.index, self.config, self.tokenizer = source, index, config, tokenizer
        self.shuffled = shuffled
        self.draft, self.skips = config.data.draft and shuffled.shuffle, set()
        self._start()

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if not name.startswith('_')}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start()

    def _start(self):
        """Makes what a data worker has of its own: the names with a leading underscore."""
        vision, workers = self.config.model.vision, max(1, self.config.data.workers)
        pictures = int(self.index.images.sum()) * vision.image_size**2 * 3
        size = OVERHEAD * len(self.index.rows) + 5 * int(self.index.lengths.sum()) + pictures
        self._example = functools.cache(self._read) if size * workers <= MEMORY else self._read

    def _encode(self, k):
        """(ids, learned, images as they lie) of an example. Raises BadExample where it is not what it was."""
        ids, learned, images = encode_example(self.source[self.index.rows[k]], self.config, self.tokenizer)
        if (len(ids) - 1, len(images)) != (self.index.lengths[k], self.index.images[k]):
            raise BadExample('the example is not what it was when the run began')
        return ids, learned, images

    def _or_skip(self, i, k, read, skipped):
        """[read(k)] for row i; or [], and why in the list `skipped` if that is new."""
        number = int(self.index.rows[k])
        if (i, number) in self.skips:
            return []
        try:
            return [read(k)]
        except BadExample as error:
            skipped.append([i, number, str(error)])
            return []

    def reading(self, i):
        """Yields the name of each example of row i, and then reads it: to find out which one hangs."""
        for k in self.examples(i):
            example = self.source.without_images(self.index.rows[k])
            yield ', '.join([f'example {self.index.rows[k]}', *(example.names if example else ())])
            with contextlib.suppress(BadExample):
                self._read(k)


class PackedRows(Examples):
    """Conversations packed into rows of config.data.length tokens and, in the vision stages, data.slots images.

    features: the features.Features (see there) that are read instead of pictures, if use_features() was called.
    """

    def __init__(self, source, index, config, tokenizer, shuffled):
        self.slots = config.data.slots if stage_of(config).sees else 0
        self.features = None
        super().__init__(source, index, config, tokenizer, shuffled)

    def _start(self):
        super()._start()
        self._plans, self._starts, self._lock = {}, [0], threading.Lock()

    def use_features(self, features):
        """From here on rows hold features.Features instead of pictures."""
        self.features = features
        self._start()  # what was read has pictures

    def epoch(self, epoch):
        """The plan of one epoch: a list of rows, each a list of examples."""
        if epoch not in self._plans:
            kept = {e: p for e, p in self._plans.items() if e == epoch - 1}
            order, data = self.shuffled.order(epoch), self.config.data
            lengths, images = self.index.lengths, self.index.images
            self._plans = kept | {epoch: plan(order, lengths, images, data.length, self.slots, data.open_rows)}
        return self._plans[epoch]

    def examples(self, i):
        """Which examples row i holds."""
        with self._lock:
            while self._starts[-1] <= i:
                self._starts.append(self._starts[-1] + len(self.epoch(len(self._starts) - 1)))
            epoch = int(np.searchsorted(self._starts, i, side='right')) - 1
            return self.epoch(epoch)[i - self._starts[epoch]]

    def _read(self, k):
        """(ids, learned, pictures) of an example, as batch.pack() takes them."""
        ids, learned, images = self._encode(k)
        if self.features:
            return ids, learned, self.features.of(k)
        vision = self.config.model.vision
        return ids, learned, [{'images': image_files.decode(data, vision, self.draft)} for data in images]

    def __getitem__(self, i):
        kept = self.features.kept if self.features else ''
        slots = batch.empty_slots(self.slots, self.config.model.vision, kept) if self.slots else None
        found, skipped = [], []
        for k in self.examples(int(i)):
            found += self._or_skip(int(i), k, self._example, skipped)
        row = batch.pack(found, self.config.data.length, slots)
        return row | ({'skipped': skipped} if skipped else {})

    def drawn(self, i):
        """The numbers, in their source, of the examples that row i holds."""
        return [int(self.index.rows[k]) for k in self.examples(int(i))]

    def rows_per_epoch(self):
        """Rows in the first epoch."""
        return len(self.epoch(0))

    def efficiency(self):
        """Which share of tokens, and of image slots, the first epoch's rows use."""
        rows, drawn = self.rows_per_epoch(), self.shuffled.order(0)
        used = {'tokens': float(self.index.lengths[drawn].sum() / (rows * self.config.data.length))}
        if self.slots:
            used['image slots'] = float(self.index.images[drawn].sum() / (rows * self.slots))
        return used

    def identity(self):
        """{'data', 'order', 'packing'}: short texts, all equal only where row i is."""
        packing = f'rows of {self.config.data.length} tokens, {self.config.data.open_rows} open'
        packing += ', long first answers are cut' * (self.config.data.too_long == 'cut')
        if self.slots:
            packing += f', {self.slots} slots, {self.config.model.vision.patches} tokens a picture'
            packing += DRAFT * self.draft
        if self.features:
            packing += f", the tower's features in {self.features.kept}"
        return {'data': data_identity(self), 'order': self.shuffled.identity(), 'packing': packing}


class TextRows:
    """Windows of T tokens over token arrays (int, 1-D, documents led by <|endoftext|>); a document is a segment.

    subset: as in '[:10%]', of the windows; key: what the shards depend on, as text.key() tells. Raises UserError for an
    id beyond the vocabulary: the device would clamp it in silence.
    """

    def __init__(self, shards, config, tokenizer, seed, shuffle=True, subset='', key=''):
        self.shards, self.config, self.tokenizer, self.key, self.skips = shards, config, tokenizer, key, set()
        self.windows = np.array([max(0, len(shard) - 1) // config.data.length for shard in shards])
        self.first, stop = bounds(subset, int(self.windows.sum()))
        if self.first >= stop:
            raise UserError(
                f'{config.data.path}{subset}, or the part of it that is held out, holds less text than one row of '
                f'{config.data.length} tokens: give more text, or lower data.length.'
            )
        self.shuffled = Shuffled(stop - self.first, seed, shuffle)

    def __getstate__(self):  # a data worker maps the files again: pickled, a memory map would be all of its bytes
        return self.__dict__ | {'shards': [getattr(shard, 'filename', None) or shard for shard in self.shards]}

    def __setstate__(self, state):
        shards = [open_shard(s) if isinstance(s, str | os.PathLike) else s for s in state['shards']]
        self.__dict__.update(state, shards=shards)

    def __getitem__(self, i):
        window = self.first + self.shuffled.at(i)[1]
        shard = int(np.searchsorted(np.cumsum(self.windows), window, side='right'))
        start = (window - int(self.windows[:shard].sum())) * self.config.data.length
        ids = np.asarray(self.shards[shard][start : start + self.config.data.length + 1])
        if ids.max() >= self.tokenizer.size:
            raise UserError(
                f'token id {ids.max()} in {self.config.data.path}: the tokenizer has {self.tokenizer.size}.'
            )
        ids = ids.astype(np.int32)
        tokens, length = ids[:-1], len(ids) - 1
        first = np.append(0, np.flatnonzero(tokens == self.tokenizer.end_of_text))
        starts = np.zeros(length, np.int64)
        starts[first] = first
        return {
            'tokens': tokens,
            'targets': ids[1:],
            'weights': np.ones(length, np.float32),
            'segments': (1 + np.cumsum((tokens == self.tokenizer.end_of_text) & (np.arange(length) > 0))).astype(
                np.int32
            ),
            'positions': (np.arange(length) - np.maximum.accumulate(starts)).astype(np.int32),
        }

    def reading(self, i):
        """As Examples.reading()."""
        yield f'window {self.drawn(i)[0]} of {self.config.data.path}'
        self[i]

    def drawn(self, i):
        """The number of the window that row i is."""
        return [self.first + self.shuffled.at(i)[1]]

    def rows_per_epoch(self):
        """Windows in all shards."""
        return self.shuffled.n

    def efficiency(self):
        """Every token of a window is learned from."""
        return {'tokens': 1.0}

    def identity(self):
        """{'data', 'order', 'packing'}: short texts, all equal only where row i is."""
        return {
            'data': hashlib.sha256(self.key.encode()).hexdigest()[:16],
            'order': f'{self.shuffled.identity()}, the first is window {self.first}',
            'packing': f'windows of {self.config.data.length} tokens',
        }
