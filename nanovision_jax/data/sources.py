"""Where examples come from: the built-in tiny_world, prepared sets, and files of conversations.

A source is a sequence: len(source), source[i] → Example. It opens its files when first used, so that a data worker
gets only paths. Reading is thread-safe.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
import threading

import numpy as np

from nanovision_jax.data import catalog as mixture
from nanovision_jax.data import formats
from nanovision_jax.data.conversation import BadExample, side, text_of
from nanovision_jax.data.image_names import Pictures, fetch, name_of
from nanovision_jax.data.images import ImageStore
from nanovision_jax.errors import UserError
from nanovision_jax.stages import stage_of

PREPARED_VERSION = '1.0.0'  # of what conversations_builder.py writes; a folder's name


@dataclasses.dataclass
class Example:
    """A conversation (see conversation.py), the encoded pictures it speaks of, and their names."""

    id: str
    messages: list
    images: list[bytes]
    names: list[str]

    @property
    def caption(self):
        """What contrastive learning pairs with the picture: the first answer."""
        return next((text_of(m) for m in self.messages if m['role'] == 'assistant'), '')


class TinyWorld:
    """The built-in data set: `view` is caption or conversation (pictures), or chat (text only)."""

    decoded = True  # no picture can be bad: they are drawn here

    def __init__(self, folder, split, view):
        self.folder, self.split, self.view = str(folder), split, view
        self._lock, self._opened = threading.Lock(), None

    def __reduce__(self):
        return TinyWorld, (self.folder, self.split, self.view)

    @property
    def key(self):
        """What the content depends on, as text."""
        from nanovision_jax.data.datasets import tiny_world

        return f'tiny_world {tiny_world.TinyWorld.VERSION} {self.split} {self.view}'

    def _source(self):
        with self._lock:
            if self._opened is None:
                self._opened = open_tiny_world(self.folder, 'chat' if self.view == 'chat' else 'scenes', self.split)
            return self._opened

    def __len__(self):
        return len(self._source())

    def __getitem__(self, i):
        row = self._source()[int(i)]
        name = row['id'].decode()
        if self.view == 'chat':
            return Example(name, json.loads(row['conversation']), [], [])
        if self.view == 'caption':
            question = [{'type': 'image'}, {'type': 'text', 'text': 'What does this picture show?'}]
            messages = [
                {'role': 'user', 'content': question},
                {'role': 'assistant', 'content': row['caption'].decode()},
            ]
        else:
            messages = json.loads(row['conversation'])
        return Example(name, messages, [row['image']], [f'{name}.png'])


def open_tiny_world(folder, kind, split):
    """The rows of one split of tiny_world, as tfds reads them; the data set is made at the first call."""
    import tensorflow_datasets as tfds

    from nanovision_jax.data.datasets.tiny_world import TinyWorld as Builder

    builder = Builder(config=kind, data_dir=folder, file_format='array_record')
    if not pathlib.Path(builder.data_dir).exists():
        print(f'making tiny_world/{kind} in {folder} (once)')
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # tfds announces a download; there is none
            builder.download_and_prepare()
    decoders = {'image': tfds.decode.SkipDecoding()} if kind == 'scenes' else None
    return builder.as_data_source(split, decoders=decoders)


class Conversations:
    """A file of conversations (JSON, JSON lines or parquet; formats.py tells the forms), and the pictures they name.

    Pictures are in the zip or folder `images`, or where image_names.py looks for them around the file. The 5% whose
    picture (or, without one, whose first question) hashes low are the validation split: the same picture is on the same
    side in every file and stage. `side(example)` tells it; all rows are here, whatever the split.
    """

    def __init__(self, path, images='', text_only=False):
        self.path, self.images, self.text_only = str(path), str(images), text_only
        self._lock, self._rows, self._pictures, self._key = threading.Lock(), None, None, None
        if not pathlib.Path(path).is_file():
            raise UserError(f'no conversations at {path}: data.path is a JSON, JSON lines or parquet file.')
        if images:
            ImageStore(images)  # a wrong path is answered now, not as so many missing pictures

    def __reduce__(self):
        return Conversations, (self.path, self.images, self.text_only)

    @property
    def key(self):
        """What the content depends on, as text; not where it lies, so that data may be moved."""
        if self._key is None:
            with open(self.path, 'rb') as file:
                digest = hashlib.file_digest(file, 'sha256').hexdigest()
            stamp = self.pictures().stamp(name for row in self.rows() for name in _names(row))
            self._key = f'conversations {digest} {stamp} {self.text_only}'
        return self._key

    def pictures(self):
        """Where the names of pictures are looked up."""
        with self._lock:
            if self._pictures is None:
                self._pictures = Pictures(self.images or pathlib.Path(self.path).parent)
        return self._pictures

    def rows(self):
        """The rows of the file, read when they are asked for. Row i here is number(i) of them."""
        with self._lock:
            if self._rows is None:
                rows = formats.open_rows(self.path)
                if self.text_only:
                    kept = (n for n, row in enumerate(rows) if not formats.has_pictures(row))
                    self._numbers = np.fromiter(kept, np.int64)
                else:
                    self._numbers = np.arange(len(rows))
                self._rows = rows
        return self._rows

    def __len__(self):
        self.rows()
        return len(self._numbers)

    def number(self, i):
        """Which row of the file is row i here: with text_only, those with a picture are not."""
        self.rows()
        return int(self._numbers[i])

    def _told(self, i):
        number = self.number(i)
        row = self.rows()[number]
        messages, references = formats.read_row(row)
        names = [name_of(reference, f'{number}-{k}') for k, reference in enumerate(references)]
        return Example(str(row.get('id', i)), messages, [], names), references

    def told(self, i):
        """Row i without its pictures, which may be missing."""
        return self._told(i)[0]

    def __getitem__(self, i):
        example, references = self._told(i)
        example.images = [fetch(reference, self.pictures()) for reference in references]
        return example

    def side(self, example):
        """'train' or 'validation', as conversation.side tells."""
        return side(example.messages, example.images)

    def likely_side(self, i):
        """The side of a row that cannot be read, for counting: by its content, as its picture is not there to ask."""
        try:
            row = repr(self.rows()[self.number(i)])
        except BadExample:
            row = str(i)
        return side([{'role': 'user', 'content': row}], [])


def _names(row):
    """The pictures that a row names, of those that are looked up."""
    try:
        references = formats.read_row(row)[1]
    except BadExample:
        references = ()
    return [name for reference in references if (name := name_of(reference, None))]


class Prepared:
    """A set that prepare.py made: one split, or, as in '[:10%]', a part of its training split.

    With text_only the index leaves out what has a picture.
    """

    decoded = True  # every picture was, in preparation: the index need not do it again

    def __init__(self, folder, name, split, subset='', text_only=False):
        self.folder, self.name, self.split, self.subset, self.text_only = str(folder), name, split, subset, text_only
        self._lock, self._opened = threading.Lock(), None
        if not (self._home() / 'dataset_info.json').is_file():
            raise UserError(
                f'{name} is not prepared in {folder}: run python -m nanovision_jax.prepare {name} --output={folder}.'
            )

    def __reduce__(self):
        return Prepared, (self.folder, self.name, self.split, self.subset, self.text_only)

    def _home(self):
        return pathlib.Path(self.folder) / self.name / PREPARED_VERSION

    @property
    def key(self):
        """What the content depends on, as text: of the files, what TFDS and we wrote about them."""
        info, made = (self._home() / name for name in ('dataset_info.json', 'source.json'))
        told = {name: value for name, value in json.loads(made.read_text()).items() if name != 'from'}  # a folder
        digest = hashlib.sha256(info.read_bytes() + json.dumps(told, sort_keys=True).encode()).hexdigest()
        return f'{self.name} {digest} {self.split} {self.subset} {self.text_only}'

    def _source(self):
        with self._lock:
            if self._opened is None:
                import tensorflow_datasets as tfds

                from nanovision_jax.data.datasets.conversations_builder import EncodedImages

                builder = tfds.builder_from_directory(self._home())
                rows = builder.as_data_source(self.split, decoders={'images': EncodedImages()})
                self._opened = rows, range(*mixture.bounds(self.subset if self.split == 'train' else '', len(rows)))
            return self._opened

    def __len__(self):
        return len(self._source()[1])

    def number(self, i):
        """How row i is called in bad_rows.jsonl: by its id."""
        return self[i].id

    def __getitem__(self, i):
        rows, part = self._source()
        row = rows[part[int(i)]]
        name, pictures = row['id'].decode(), list(row['images'])
        return Example(name, json.loads(row['messages']), pictures, [f'{name}-{k}' for k in range(len(pictures))])


class Joined:
    """Several sources one after the other, as one."""

    def __init__(self, parts):
        self.parts = parts
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    @property
    def key(self):
        """What the content depends on, as text."""
        return ' and '.join(part.key for part in self.parts)

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, i):
        part = int(np.searchsorted(self.starts, i, side='right')) - 1
        return self.parts[part][int(i) - int(self.starts[part])]


def open_parts(config, split):
    """The prepared sets that a config names, opened."""
    if split not in ('train', 'validation'):
        raise UserError(f'prepared data has no {split} split: it has train and validation.')
    parts, text_only = mixture.parts_of(config.data), stage_of(config).data == 'chat'
    return [Prepared(config.data.path, part.name, split, part.subset, text_only) for part in parts]


def provenance(data):
    """What lineage.json says of a config's `data`; of prepared sets also what they were made from."""
    told = {'source': data.source, 'path': data.path, 'images': data.images, 'mixture': data.mixture}
    for part in mixture.parts_of(data):
        home = pathlib.Path(data.path) / part.name
        files = [file for file in (home / PREPARED_VERSION / 'source.json', home / 'source.json') if file.exists()]
        told.setdefault('prepared', {})[part.name] = [json.loads(file.read_text()) for file in files]
    return told


def open_source(config, split):
    """The conversations that a stage learns from, or, for another split, is evaluated on."""
    data, kind = config.data, stage_of(config).data
    if mixture.parts_of(data):
        opened = open_parts(config, split)
        return opened[0] if len(opened) == 1 else Joined(opened)
    if data.source == 'tiny_world':
        views = {'pairs': 'caption', 'captions': 'caption', 'conversations': 'conversation', 'chat': 'chat'}
        return TinyWorld(data.path, split, views[kind])
    if split not in ('train', 'validation'):
        raise UserError(f'{data.path} has no {split} split: conversations have train and validation.')
    return Conversations(data.path, data.images, text_only=kind == 'chat')
