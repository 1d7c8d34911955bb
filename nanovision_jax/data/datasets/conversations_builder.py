"""What the published sets of conversations share: from rows to checked examples in ArrayRecord, in one pass.

A data set is a subclass with `rows()` and `example(row)`. Beside the records its folder holds bad_rows.jsonl, every
row that is left out and why, and source.json, what it was made from and how much there is. It gets its name last, when
all of that is written.
"""

import collections
import concurrent.futures
import io
import json
import os
import pathlib
import tempfile
import types

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from nanovision_jax.data import conversation
from nanovision_jax.data import images as image_files
from nanovision_jax.data.catalog import PREPARED_VERSION
from nanovision_jax.data.datasets import builders, files
from nanovision_jax.data.templates import OWN
from nanovision_jax.data.workers import ordered_map
from nanovision_jax.errors import UserError

# No ids at all: conversation.encode refuses here, before any tokenizer is known, what it would refuse in training.
_NONE = types.SimpleNamespace(template=OWN, image=-1, escape=str, tokenize=lambda spans: (np.empty(0), np.empty(0)))


class ConversationsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Conversations with pictures: id, messages (JSON, as conversation.py has them) and images (encoded, in order).

    source: the folder (or file) of published files; patterns: other files in it than PATTERNS; minimum: {rating: least
    value}; workers: threads that read and decode; made_from: what source.json is to say.
    """

    VERSION = tfds.core.Version(PREPARED_VERSION)
    PATTERNS = ()  # the files that hold the rows: those of one pattern
    TOGETHER = False  # or of all
    COLUMNS = ()  # of parquet files; () is all

    def __init__(self, *, source='', patterns=(), minimum=None, workers=0, made_from=None, **kwargs):
        self.source, self.patterns = str(source), tuple(patterns) or self.PATTERNS
        self.minimum, self.workers = minimum or {}, workers or os.cpu_count()
        self.made_from, self.left_out, self.spool = made_from or {}, 0, None
        super().__init__(**kwargs)

    def files(self):
        """The published files that hold the rows."""
        return files.find(self.source, self.patterns, self.TOGETHER)

    def rows(self):
        """Yields (key, row): every row of the published files under a name of its own, as a reader gives it."""
        folder = pathlib.Path(self.source)
        for file in self.files():
            name = file.name if file == folder else file.relative_to(folder).as_posix()
            for number, row in enumerate(files.read_rows(file, self.COLUMNS)):
                yield f'{name}:{number}', row

    def example(self, row):
        """(messages, encoded pictures) of a row. Raises BadExample."""
        raise NotImplementedError

    def _info(self):
        features = {
            'id': tfds.features.Text(),
            'messages': tfds.features.Text(doc='JSON: a list of messages'),
            'images': tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3))),
        }
        return builders.Info(
            builder=self, description=type(self).__doc__, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # prepare.py downloads
        # One pass serves both: what is held out waits in a file until the training rows are through.
        return {'train': self._generate_examples(), 'validation': self._validation()}

    def _generate_examples(self):
        folder = pathlib.Path(self.data_path)
        counts, reasons = collections.Counter(), collections.Counter()
        total = files.count_rows(self.files())
        with (
            open(folder / 'bad_rows.jsonl', 'w', encoding='utf-8') as listed,
            concurrent.futures.ThreadPoolExecutor(self.workers) as pool,
        ):
            looked = ordered_map(pool, self._look, self.rows(), 4 * self.workers)
            for key, record, split, characters, reason in tqdm(looked, self.name, total, unit='row', mininterval=1):
                counts['rows'] += 1
                if reason:
                    reasons[conversation.kind_of(reason)] += 1
                    listed.write(json.dumps({'row': key, 'reason': reason}) + '\n')
                    continue
                counts.update({split: 1, 'pictures': len(record['images']), 'characters': characters})
                if split == 'validation':
                    _put_by(self.spool, key, record)
                else:
                    yield key, _encodable(record)
        counts['bad'] = sum(reasons.values())
        self._refuse(counts, reasons, folder / 'bad_rows.jsonl')
        summary = self.made_from | counts | {'left_out': self.left_out, 'reasons': dict(sorted(reasons.items()))}
        (folder / 'source.json').write_text(json.dumps(summary, indent=1) + '\n')

    def _look(self, item):
        key, row = item
        try:
            messages, images = self.example(row)
            conversation.encode(messages, _NONE, [1] * len(images))
            for image in images:
                image_files.load(image)
        except conversation.BadExample as error:
            return key, None, None, 0, str(error)
        name = str(next((row[field] for field in ('id', 'uuid') if row.get(field) is not None), key))
        record = {'id': name, 'messages': json.dumps(messages), 'images': images}
        characters = sum(len(conversation.text_of(message)) for message in messages)
        return key, record, conversation.split_of(messages, images), characters, None

    def _refuse(self, counts, reasons, listed):
        if counts['bad'] > 0.01 * counts['rows']:
            kept = pathlib.Path(self._data_dir_root) / f'{self.name}.bad_rows.jsonl'
            kept.write_bytes(listed.read_bytes())  # the folder of a data set that is refused goes
            told = '; '.join(f'{count} × {reason}' for reason, count in reasons.most_common(3))
            raise UserError(
                f'{counts["bad"]} of {counts["rows"]} rows in {self.source} are bad (at most 1% may be): {told}. '
                f'{kept} lists them.'
            )
        for split in ('train', 'validation'):
            if not counts[split]:
                raise UserError(
                    f'no {split} example in {self.source}: of {counts["rows"]} rows in all, 5% are for validation.'
                )

    def _validation(self):
        self.spool.seek(0)
        while line := self.spool.readline():
            key, record = json.loads(line)
            record['images'] = [self.spool.read(size) for size in record['images']]
            yield key, _encodable(record)


def _put_by(spool, key, record):
    """Appends a record to a file: a line of JSON with the sizes of its pictures, then their bytes."""
    sizes = [len(image) for image in record['images']]
    spool.write(json.dumps([key, record | {'images': sizes}]).encode() + b'\n' + b''.join(record['images']))


def _encodable(record):
    return record | {'images': [io.BytesIO(image) for image in record['images']]}


def build(builder):
    """Prepares a data set, in silence but for the bar of its one pass. Whatever goes wrong, it has no folder then."""
    root = pathlib.Path(builder._data_dir_root)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=root) as builder.spool:
        builders.build(builder)
