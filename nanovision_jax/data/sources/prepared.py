"""A set that prepare.py made, as a source."""

import hashlib
import json
import pathlib
import threading

import tensorflow_datasets as tfds

from nanovision_jax.data.catalog import PREPARED_VERSION, bounds
from nanovision_jax.data.sources.base import Example, Source
from nanovision_jax.errors import UserError


class Prepared(Source):
    """One split of a prepared set of conversations or, as in '[:10%]', a part of its training split.

    Raises UserError where it is not prepared.
    """

    decoded = True  # every image was, in preparation: the index need not do it again

    def __init__(self, folder, name: str, split: str, subset: str = '', text_only: bool = False):
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
    def key(self) -> str:
        """As Source.key: of the files, what TFDS and we wrote about them."""
        info, made = (self._home() / name for name in ('dataset_info.json', 'source.json'))
        told = {name: value for name, value in json.loads(made.read_text()).items() if name != 'from'}  # a folder
        digest = hashlib.sha256(info.read_bytes() + json.dumps(told, sort_keys=True).encode()).hexdigest()
        return f'{self.name} {digest} {self.split} {self.subset} {self.text_only}'

    def _rows(self):
        with self._lock:
            if self._opened is None:
                builder = tfds.builder_from_directory(self._home())
                rows = builder.as_data_source(self.split, decoders={'images': EncodedImages()})
                self._opened = rows, range(*bounds(self.subset if self.split == 'train' else '', len(rows)))
            return self._opened

    def __len__(self) -> int:
        return len(self._rows()[1])

    def number(self, i: int) -> str:
        """What row i is called in a list of bad rows: its id."""
        return self[i].id

    def __getitem__(self, i) -> Example:
        rows, part = self._rows()
        row = rows[part[int(i)]]
        name, images = row['id'].decode(), list(row['images'])
        return Example(name, json.loads(row['messages']), images, [f'{name}-{k}' for k in range(len(images))])


class EncodedImages(tfds.decode.SkipDecoding):
    """Reads a list of images as the bytes that they are; without TensorFlow, TFDS can skip only a single one."""

    def decode_example_np(self, example):
        """The bytes."""
        return example

    decode_batch_example_np = decode_example_np
