"""The built-in data set as a source."""

import json
import threading

from nanovision_jax.data.datasets import tiny_world
from nanovision_jax.data.sources.base import Example, Source


class TinyWorldSource(Source):
    """One split of tiny_world: `view` is caption or conversation (images), or chat (text only)."""

    decoded = True  # no image can be bad: they are drawn here

    def __init__(self, folder, split: str, view: str):
        self.folder, self.split, self.view = str(folder), split, view
        self._lock, self._opened = threading.Lock(), None

    def __reduce__(self):
        return TinyWorldSource, (self.folder, self.split, self.view)

    @property
    def key(self) -> str:
        """As Source.key."""
        return f'tiny_world {tiny_world.TinyWorld.VERSION} {self.split} {self.view}'

    @property
    def pictures(self) -> str:
        """As Source.pictures: captions and conversations are about the same."""
        return f'tiny_world {tiny_world.TinyWorld.VERSION} {self.split} scenes'

    def _rows(self):
        with self._lock:
            if self._opened is None:
                self._opened = tiny_world.open_rows(
                    self.folder, 'chat' if self.view == 'chat' else 'scenes', self.split
                )
            return self._opened

    def __len__(self) -> int:
        return len(self._rows())

    def __getitem__(self, i) -> Example:
        row = self._rows()[int(i)]
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
