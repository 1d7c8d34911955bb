"""What the frozen tower makes of pictures, kept on disk (data.cache_features): read instead of the pictures.

    runs/<name>/features/<key>/features.npy  [N, P, E]  int8, or the bits of bfloat16 as uint16
                               scales.npy    [N, P]     float32, with int8: what each patch's features are multiplied by

N pictures in the order of an index, P patches, E tower width. training/features.py makes them and knows the key, which
names all that they depend on. While they are made the folder is called <key>.part, and its file `done` says how many
pictures are there; renamed, it is whole.
"""

import contextlib
import os
import pathlib
import shutil

import ml_dtypes
import numpy as np

from nanovision_jax.data import images as image_files
from nanovision_jax.data.batch import empty_slots
from nanovision_jax.data.conversation import BadExample
from nanovision_jax.errors import UserError
from nanovision_jax.runs.folder import write_whole


class Pictures:
    """The pictures of packing.PackedRows one by one, in the order of their index; beyond the last they are black."""

    def __init__(self, rows):
        self.source, self.index, self.vision, self.draft = rows.source, rows.index, rows.config.model.vision, rows.draft
        self.ends = np.cumsum(rows.index.images)

    def __len__(self):
        return int(self.ends[-1])

    def reading(self, n):
        """As packing.Examples.reading()."""
        yield f'picture {n} of {len(self)}'
        self[n]

    def __getitem__(self, n):
        if n >= len(self):
            return {name: slots[0] for name, slots in empty_slots(1, self.vision).items()}
        k = int(np.searchsorted(self.ends, n, side='right'))
        number = n - int(self.ends[k] - self.index.images[k])
        try:
            encoded = self.source[self.index.rows[k]].images[number]
            return {'images': image_files.decode(encoded, self.vision, self.draft)}
        except (BadExample, IndexError) as error:
            raise UserError(f'picture {number + 1} of example {self.index.rows[k]} cannot be read: {error}.') from error


class Features:
    """The features of the pictures of an index, memory-mapped. kept: as data.cache_features.

    counts: how many pictures each example has. Raises UserError where a file is missing or cut off.
    """

    def __init__(self, folder: pathlib.Path, kept: str, counts):
        self.folder, self.kept, self.counts = folder, kept, counts
        self._ends = np.cumsum(counts)
        names = ('features', 'scales') if kept == 'int8' else ('features',)
        try:
            self._arrays = {name: np.load(folder / f'{name}.npy', mmap_mode='r') for name in names}
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f'{folder} is damaged ({error}): delete it, and it is made again.') from error
        if kept == 'bf16':
            self._arrays['features'] = self._arrays['features'].view(ml_dtypes.bfloat16)

    def __reduce__(self):  # a data worker maps the files again
        return Features, (self.folder, self.kept, self.counts)

    def of(self, k: int) -> list[dict[str, np.ndarray]]:
        """What a batch holds of each picture of example k, by name."""
        pictures = range(self._ends[k] - self.counts[k], self._ends[k])
        return [{name: array[n] for name, array in self._arrays.items()} for n in pictures]


class Unfinished:
    """Features that are being made: of `count` pictures, in `folder` once they are whole; `done` are there already."""

    def __init__(self, folder: pathlib.Path, count: int, vision, kept: str):
        self.folder, self.part, self.count = folder, pathlib.Path(f'{folder}.part'), count
        self._one, self._files = empty_slots(1, vision, kept), {}
        self._record = self.part / 'done'
        self.done = int(self._record.read_text()) if self._record.exists() else 0

    @property
    def bytes(self) -> int:
        """What all of them take on disk."""
        return self.count * sum(array.nbytes for array in self._one.values())

    def check_room(self):
        """Raises UserError if the disk has no room for those that are still to be made."""
        wanted, free = self.bytes * (self.count - self.done) // self.count, shutil.disk_usage(self.folder.parent).free
        if wanted > free:
            raise UserError(
                f'the features of {self.count:,} pictures need {told(wanted)} more in {self.folder.parent}, where '
                f'{told(free)} are free: make room, or leave out data.cache_features (int8 takes half of bf16).'
            )

    @contextlib.contextmanager
    def opened(self):
        """A context in which write() may be called; what is written when it is left is there the next time."""
        self.part.mkdir(exist_ok=True)
        with contextlib.ExitStack() as files:
            for name, one in self._one.items():
                file, dtype = self.part / f'{name}.npy', np.uint16 if one.dtype == ml_dtypes.bfloat16 else one.dtype
                if not self.done:
                    np.lib.format.open_memmap(file, 'w+', dtype, (self.count, *one.shape[1:]))
                self._files[name] = opened = files.enter_context(open(file, 'r+b'))
                opened.seek(os.path.getsize(file) - (self.count - self.done) * one.nbytes)
            try:
                yield
            finally:
                self.record()

    def write(self, arrays: dict[str, np.ndarray]):
        """Adds the features of the next pictures; those beyond the last are left out. Not opened(), it only counts."""
        new = min(len(arrays['features']), self.count - self.done)
        for name, file in self._files.items():  # not through a memory map: a full disk is an error here, not a signal
            file.write(arrays[name][:new].tobytes())
        self.done += new

    def record(self):
        """Puts on disk what was written, and then how many are there."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        write_whole(self._record, str(self.done))

    def finish(self):
        """Makes it whole."""
        assert self.done == self.count
        self._record.unlink()
        self.part.rename(self.folder)


def told(count: int) -> str:
    """A number of bytes as text."""
    return f'{count / 1e9:.3g} GB' if count >= 1e9 else f'{count / 1e6:.3g} MB'
