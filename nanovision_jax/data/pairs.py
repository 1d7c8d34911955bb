"""Images with captions, for clip: a batch packs its captions into rows."""

import functools
import math
from typing import NamedTuple

import numpy as np

from nanovision_jax.data import images as image_files
from nanovision_jax.data.batch import left_out
from nanovision_jax.data.packing import DRAFT, Examples, data_identity, plan
from nanovision_jax.errors import UserError

TRIES = 8  # pairs that are tried for a row


class Captions(NamedTuple):
    """Makes a batch of pairs, with their captions packed into `rows` rows of `length` tokens.

    The batch is split over `shards` devices, and there into `parts` (optim.accumulate). A caption stays with its
    image: every such share has as many rows, and fills them longest caption first. Should these not be enough, the
    longest captions are halved. own: the devices whose pairs are there, if not those of all.
    """

    length: int
    rows: int
    shards: int = 1
    parts: int = 1
    own: tuple[int, ...] | None = None

    def __call__(self, pairs: list[dict]) -> dict[str, np.ndarray]:
        """Pairs of {images, ids} as a batch. As step.py splits it, row j is of part j mod `parts`."""
        each = self.rows // (self.shards * self.parts)
        own = range(self.shards) if self.own is None else self.own
        rows, share = each * self.parts * len(own), len(pairs) // len(own)
        text = {name: np.zeros((rows, self.length), np.int32) for name in ('tokens', 'segments', 'positions')}
        ends = np.zeros(len(pairs), np.int32)
        for group in range(len(own) * self.parts):
            shard, part = divmod(group, self.parts)
            before = (own[shard] - shard) * each * self.parts  # rows of devices whose pairs are not there
            members = range(shard * share + part, (shard + 1) * share, self.parts)
            captions = [pairs[i]['ids'] for i in members]
            while len(laid := longest_first([len(ids) for ids in captions], self.length)) > each:
                longest = max(range(len(captions)), key=lambda i: len(captions[i]))
                ids = captions[longest]
                captions[longest] = np.append(ids[: len(ids) // 2], ids[-1])
            for number, row in enumerate(laid):
                place, start = (shard * each + number) * self.parts + part, 0
                for segment, k in enumerate(row, 1):
                    stop = start + len(captions[k])
                    text['tokens'][place, start:stop] = captions[k]
                    text['segments'][place, start:stop] = segment
                    text['positions'][place, start:stop] = np.arange(stop - start)
                    ends[members[k]] = (before + place) * self.length + stop - 1
                    start = stop
        return {'images': np.stack([pair['images'] for pair in pairs]), **text, 'ends': ends, **left_out(pairs)}


def longest_first(lengths, room):
    """Rows of at most `room` tokens, each a list of places in `lengths`: first fit, the longest first."""
    lengths = np.asarray(lengths)
    return plan(np.argsort(-lengths, kind='stable'), lengths, np.zeros_like(lengths), room, 0, open_rows=len(lengths))


class PairRows(Examples):
    """Images with captions, for clip: images [S, S, 3], ids [n].

    captions: what makes batches of them; it is to be replaced by pack() for a mesh, or for batches in parts.
    """

    def __init__(self, source, index, config, tokenizer, shuffled):
        self.augment = config.data.augment and shuffled.shuffle
        super().__init__(source, index, config, tokenizer, shuffled)
        self.captions = self.pack()

    def _load(self, k):
        """(ids, image as it lies) of an example."""
        (ids, _, images), vision = self._encode(k), self.config.model.vision
        # What augment() leaves of a side is at least its 0.77th part.
        least = math.ceil(vision.image_size * (1.3 if self.augment else 1)) if self.draft else None
        return ids, image_files.load(images[0], least)

    def _read(self, k):
        ids, image = self._load(k)
        return {'images': image_files.prepare(image, self.config.model.vision), 'ids': ids}

    def __getitem__(self, i):
        epoch, _ = self.shuffled.at(i)
        read = functools.partial(self._augmented, epoch) if self.augment else self._example
        skipped = []
        for k in self.candidates(int(i)):
            if found := self._or_skip(int(i), k, read, skipped):
                return found[0] | ({'skipped': skipped} if skipped else {})
        raise UserError(f'{TRIES} pairs in a row cannot be read any more, at row {i}: {skipped[-1][2]}.')

    def candidates(self, i):
        """The example of row i; and those that take its place where it cannot be read: another batch has them too."""
        epoch, _ = self.shuffled.at(i)
        order, n, place = self.shuffled.order(epoch), self.shuffled.n, i % self.shuffled.n
        return [int(order[place]), *(int(order[(place + n // 2 + further) % n]) for further in range(TRIES - 1))]

    def _augmented(self, epoch, k):
        ids, image = self._load(k)
        image = image_files.augment(image, np.random.default_rng((self.shuffled.seed, epoch, k)))
        return {'images': image_files.prepare(image, self.config.model.vision), 'ids': ids}

    def examples(self, i):
        """Which example row i holds."""
        return [self.shuffled.at(i)[1]]

    def pack(self, shards: int = 1, parts: int = 1) -> Captions:
        """The Captions of batches that are split over `shards` devices, into `parts` each.

        Its rows are what the largest of sixteen random shares takes, and two standard deviations more. Held-out pairs,
        whose order may say how long they are, get a row each.
        """
        length, batch_size = self.config.data.length, self.config.data.batch_size
        size = batch_size // (shards * parts)
        if not self.shuffled.shuffle:
            return Captions(length, batch_size, shards, parts)
        lengths = self.index.lengths + 1
        drawn = np.random.default_rng(0).choice(lengths, (16, size))
        most = max(len(longest_first(share, length)) for share in drawn)
        most += math.ceil(2 * lengths.std() * size**0.5 / length)
        return Captions(length, shards * parts * min(size, most), shards, parts)

    def drawn(self, i):
        """The number, in its source, of the example that row i holds."""
        return [int(self.index.rows[k]) for k in self.examples(i)]

    def rows_per_epoch(self):
        """Pairs in all."""
        return self.shuffled.n

    def efficiency(self):
        """Which share of the captions' tokens is not padding."""
        tokens = (self.index.lengths[self.shuffled.order(0)] + 1).mean() * self.config.data.batch_size
        return {'tokens': float(tokens / (self.captions.rows * self.captions.length))}

    def identity(self):
        """{'data', 'order', 'packing'}: short texts, all equal only where row i is."""
        packing = f'captions of {self.config.data.length} tokens' + ', augmented' * self.augment + DRAFT * self.draft
        return {'data': data_identity(self), 'order': self.shuffled.identity(), 'packing': packing}
