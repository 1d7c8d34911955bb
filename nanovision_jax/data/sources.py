"""Where examples come from: the built-in tiny_world, and conversations in LLaVA's JSON or JSON lines.

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

from nanovision_jax.data.conversation import BadExample, check, from_llava, text_of
from nanovision_jax.data.images import ImageStore
from nanovision_jax.errors import UserError


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
    """LLaVA's JSON list, or JSON lines with `conversations` or `messages`; pictures in a zip or a folder.

    The 5% whose picture (or, without one, whose first question) hashes low are the validation split: the same picture
    is on the same side in every file and stage. `side(example)` tells it; all rows are here, whatever the split.
    """

    def __init__(self, path, images='', text_only=False):
        self.path, self.images, self.text_only = str(path), str(images), text_only
        self._lock, self._rows, self._store = threading.Lock(), None, None
        if not pathlib.Path(path).is_file():
            raise UserError(f'no conversations at {path}: data.path is a LLaVA JSON file or JSON lines.')
        if images:
            ImageStore(images)  # a wrong path is answered now, not as so many missing pictures

    def __reduce__(self):
        return Conversations, (self.path, self.images, self.text_only)

    @property
    def key(self):
        """What the content depends on, as text."""
        stamp = []
        for path in (pathlib.Path(self.path), self.image_path()):
            if path:
                stat = path.stat()
                stamp.append(f'{path.resolve()} {stat.st_size} {stat.st_mtime_ns}')
        return f'conversations {stamp} {self.text_only}'

    def image_path(self):
        """The zip or folder of pictures: as configured, or found beside the file; None where there is none."""
        folder = pathlib.Path(self.path).parent
        for path in [self.images] if self.images else [folder / 'images.zip', folder / 'images']:
            if pathlib.Path(path).exists():
                return pathlib.Path(path)
        return None

    def rows(self):
        """The file's objects; with text_only, those without a picture."""
        with self._lock:
            if self._rows is None:
                rows = read_json(self.path)
                self._numbers = [n for n, row in enumerate(rows) if not (self.text_only and _names(row))]
                self._rows = [rows[n] for n in self._numbers]
                self._store = ImageStore(path) if (path := self.image_path()) else None
        return self._rows

    def __len__(self):
        return len(self.rows())

    def number(self, i):
        """Which row of the file is row i here."""
        return self._numbers[i] if self.rows() else i

    def __getitem__(self, i):
        row = self.rows()[int(i)]
        messages, names = messages_of(row), _names(row)
        if names and self._store is None:
            raise BadExample(f'missing image {names[0]!r}: no images.zip or images/ beside {self.path}')
        return Example(str(row.get('id', i)), messages, [self._store.read(name) for name in names], names)

    def side(self, example):
        """'train' or 'validation', from the picture's bytes or, without one, the first question."""
        content = example.images[0] if example.images else text_of(example.messages[0]).encode()
        return 'validation' if int(hashlib.sha256(content).hexdigest()[:8], 16) % 20 == 0 else 'train'


def read_json(path):
    """A JSON list, or JSON lines. Raises UserError where the file is neither."""
    try:
        text = pathlib.Path(path).read_text(encoding='utf-8-sig')
        if text.lstrip().startswith('['):
            return json.loads(text)
        # Not splitlines(): a string may hold the other line breaks of Unicode.
        return [json.loads(line) for line in text.split('\n') if line.strip()]
    except ValueError as error:
        raise UserError(f'{path} is neither a JSON list nor JSON lines: {error}.') from error


def messages_of(row):
    """The messages of one JSON object. Raises BadExample where they are none."""
    if not isinstance(row, dict):
        raise BadExample('a row that is no JSON object')
    turns = row.get('conversations') or row.get('messages') or []
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadExample('turns that are no JSON objects')
    messages = from_llava(turns) if turns and 'from' in turns[0] else turns
    check(messages)
    return messages


def _names(row):
    names = row.get('image') or row.get('images') or [] if isinstance(row, dict) else []
    return [str(name) for name in (names if isinstance(names, list) else [names])]


def open_source(config, split):
    """The conversations that a stage learns from, or, for another split, is evaluated on."""
    data, stage = config.data, config.stage
    if data.source == 'tiny_world':
        views = {'clip': 'caption', 'vision_pretrain': 'caption', 'vision_instruct': 'conversation', 'sft': 'chat'}
        return TinyWorld(data.path, split, views[stage])
    if split not in ('train', 'validation'):
        raise UserError(f'{data.path} has no {split} split: conversations have train and validation.')
    return Conversations(data.path, data.images, text_only=stage == 'sft')
