"""Files of conversations as a source."""

import array
import hashlib
import pathlib
import threading

import numpy as np

from nanovision_jax.data import formats
from nanovision_jax.data.conversation import BadExample, split_of
from nanovision_jax.data.image_names import NamedImages, fetch, name_of
from nanovision_jax.data.images import ImageStore
from nanovision_jax.data.sources.base import Example, Source
from nanovision_jax.errors import UserError


class Conversations(Source):
    """A file of conversations (JSON, JSON lines or parquet; formats.py tells the forms), and the images they name.

    Images are in the zip or folder `images`, or where image_names.py looks for them around the file. All rows are here,
    whatever their split (see conversation.split_of). Raises UserError where there is no such file.
    """

    mixes_splits = True

    def __init__(self, path, images='', text_only=False):
        self.path, self.images, self.text_only = str(path), str(images), text_only
        self._lock, self._rows, self._images, self._known = threading.Lock(), None, None, None
        if not pathlib.Path(path).is_file():
            raise UserError(f'no conversations at {path}: data.path is a JSON, JSON lines or parquet file.')
        if images:
            ImageStore(images)  # a wrong path is answered now, not as so many missing images

    def __reduce__(self):
        return Conversations, (self.path, self.images, self.text_only)

    @property
    def key(self) -> str:
        """As Source.key."""
        return self._seen()[0]

    @property
    def stamps(self):
        """As Source.stamps."""
        return self._seen()[1:]

    def _seen(self):
        """(key, what it is without the pictures that lie loose, the number of each row)."""
        if self._known is None:
            with open(self.path, 'rb') as file:
                digest = hashlib.file_digest(file, 'sha256').hexdigest()
            images, rows = self.images_by_name(), self.rows()
            stamp, numbers = hashlib.sha256(images.stamp()), array.array('Q')
            zipped = stamp.hexdigest()
            for row in rows:
                of_row = images.stamp_of(_names(row))
                stamp.update(of_row)
                numbers.append(int.from_bytes(hashlib.sha256(of_row).digest()[:8], 'little'))
            key = f'conversations {digest} {stamp.hexdigest()} {self.text_only}'
            stamps = np.frombuffer(numbers, np.uint64)[self._numbers]
            self._known = key, f'conversations {digest} {zipped} {self.text_only}', stamps
        return self._known

    def images_by_name(self) -> NamedImages:
        """Where the names of images are looked up."""
        with self._lock:
            if self._images is None:
                self._images = NamedImages(self.images or pathlib.Path(self.path).parent)
        return self._images

    def rows(self):
        """The rows of the file, read when they are asked for. Row i here is number(i) of them."""
        with self._lock:
            if self._rows is None:
                rows = formats.open_rows(self.path)
                if self.text_only:
                    kept = (n for n, row in enumerate(rows) if not formats.has_images(row))
                    self._numbers = np.fromiter(kept, np.int64)
                else:
                    self._numbers = np.arange(len(rows))
                self._rows = rows
        return self._rows

    def __len__(self):
        self.rows()
        return len(self._numbers)

    def number(self, i):
        """Which row of the file is row i here: with text_only, those with an image are not."""
        self.rows()
        return int(self._numbers[i])

    def _read(self, i):
        number = self.number(i)
        row = self.rows()[number]
        messages, references = formats.read_row(row)
        names = [name_of(reference, f'{number}-{k}') for k, reference in enumerate(references)]
        return Example(str(row.get('id', i)), messages, [], names), references

    def without_images(self, i: int) -> Example | None:
        """As Source.without_images."""
        try:
            return self._read(i)[0]
        except BadExample:
            return None

    def __getitem__(self, i):
        example, references = self._read(i)
        example.images = [fetch(reference, self.images_by_name()) for reference in references]
        return example

    def split_of(self, example: Example) -> str:
        """As conversation.split_of tells."""
        return split_of(example.messages, example.images)

    def likely_split_of(self, i: int) -> str:
        """By the row's content, as its image is not there to ask."""
        try:
            row = repr(self.rows()[self.number(i)])
        except BadExample:
            row = str(i)
        return split_of([{'role': 'user', 'content': row}], [])


def _names(row):
    """The images that a row names, of those that are looked up."""
    try:
        references = formats.read_row(row)[1]
    except BadExample:
        references = ()
    return [name for reference in references if (name := name_of(reference, None))]
