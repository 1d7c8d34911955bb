"""Reads the files that benchmarks are published in: JSON, JSON lines, CSV and TSV, Parquet; with images of their own.

A table of the Hub has the bytes of its images in a column: Images keeps where they are, and reads them when asked.
"""

import collections
import csv
import functools
import io
import itertools
import json
import pathlib
import re
import tempfile
import weakref

import pyarrow
import pyarrow.parquet

from nanovision_jax.data.conversation import BadExample
from nanovision_jax.data.images import ImageStore
from nanovision_jax.errors import UserError

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp')
_OF_TABLE = re.compile(r'(.+\.parquet)#(\d+)(?:#(.+))?')


def find(folder: pathlib.Path, *patterns: str) -> list[pathlib.Path]:
    """The files of the first pattern that has any, at any depth, in name order. Raises UserError where none has."""
    for pattern in patterns:
        if files := sorted(file for file in pathlib.Path(folder).rglob(pattern) if file.is_file()):
            return files
    raise UserError(f'{folder} has no {" or ".join(patterns)}: --data is the folder of the published files.')


def read_rows(file: pathlib.Path) -> list[dict]:
    """The rows of a table, without the bytes of images. Raises UserError, with the line, for what is none."""
    try:
        if file.suffix == '.parquet':
            return _read_parquet(file)
        text = read_text(file)
        if file.suffix in ('.csv', '.tsv'):
            return list(csv.DictReader(io.StringIO(text, newline=''), delimiter='\t' if file.suffix == '.tsv' else ','))
        if text.lstrip().startswith('['):
            return json.loads(text)
        return [json.loads(line) for line in text.split('\n') if line.strip()]
    except (ValueError, OSError, csv.Error) as error:
        raise UserError(f'{file} cannot be read: {error}.') from error


def read_text(file: pathlib.Path) -> str:
    """What a text file says. Raises UserError for one that is not UTF-8."""
    try:
        return file.read_text(encoding='utf-8-sig')
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f'{file} cannot be read: {error}.') from error


def _read_parquet(file):
    schema = pyarrow.parquet.read_schema(file)
    columns = [name for name in schema.names if not _holds_bytes(schema.field(name).type)]
    return pyarrow.parquet.read_table(file, columns=columns).to_pylist()


def _holds_bytes(kind):
    if pyarrow.types.is_struct(kind):
        return any(_holds_bytes(field.type) for field in kind)
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


class Pictures:
    """The images of a benchmark's folder, by name: of files and zip files at any depth, and of Parquet tables.

    A file's name is its own, or ends as its path does: val2014/a.jpg. Of a table it is FILE#ROW, and FILE#ROW#COLUMN
    where the column is not `image`. What was read of tables lies in a temporary file from then on: their images, of
    tens of gigabytes in some sets, are asked for again and again, in any order.
    """

    def __init__(self, folder):
        self.path, self._places = pathlib.Path(folder), {}
        self._kept = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this object is
        weakref.finalize(self, self._kept.close)
        self._group, self._held = None, None  # the images of a table's row group that was read last

    @functools.cached_property
    def _stores(self):
        """{name of a file: [(what holds it, its name there)]}."""
        found = collections.defaultdict(list)
        for file in sorted(self.path.rglob('*')):
            if file.suffix == '.zip':
                store = ImageStore(file)
                for name in store.names():
                    found[name.rsplit('/', 1)[-1]].append((store, name))
            elif file.suffix.lower() in SUFFIXES:
                found[file.name].append((ImageStore(self.path), str(file.relative_to(self.path))))
        return found

    def read(self, name: str) -> bytes:
        """The bytes of an image. Raises BadExample where there is none of that name, or several that are unpacked."""
        if match := _OF_TABLE.fullmatch(name):
            return self._of_table(name, match[1], int(match[2]), match[3] or 'image')
        places = [place for place in self._stores[name.rsplit('/', 1)[-1]] if f'/{place[1]}'.endswith(f'/{name}')]
        if len(places) > 1:  # unpacked beside its zip file
            places = [place for place in places if place[0].path.is_dir()]
        if len(places) != 1:
            raise BadExample(f'no image {name!r}, or several, below {self.path}')
        store, inside = places[0]
        return store.read(inside)

    def _of_table(self, name, file, row, column):
        if name not in self._places:
            try:
                encoded = self._row(file, row, column)
            except (pyarrow.ArrowException, OSError, KeyError, IndexError) as error:
                raise BadExample(f'row {row} of {file} has no image in its column {column!r}: {error}') from error
            encoded = encoded['bytes'] if isinstance(encoded, dict) else encoded
            if not encoded:
                raise BadExample(f'no image in row {row} of {file}')
            self._places[name] = self._kept.seek(0, 2), len(encoded)
            self._kept.write(encoded)
        start, size = self._places[name]
        self._kept.seek(start)
        return self._kept.read(size)

    def _row(self, file, row, column):
        """A value of a table, of which one row group is in memory."""
        with pyarrow.parquet.ParquetFile(self.path / file) as table:
            sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            group = next(group for group, end in enumerate(itertools.accumulate(sizes)) if row < end)
            if self._group != (file, group, column):
                self._held = table.read_row_group(group, [column])[column]
                self._group = file, group, column
        return self._held[row - sum(sizes[:group])].as_py()


def image_of(file: pathlib.Path, folder: pathlib.Path, row: int, column: str = 'image') -> str:
    """The name by which Pictures knows the image of a table's row."""
    return f'{file.relative_to(folder)}#{row}' + ('' if column == 'image' else f'#{column}')


def with_image(file: pathlib.Path, column: str = 'image') -> list[bool]:
    """Of each row of a table whether it has an image."""
    return pyarrow.parquet.read_table(file, columns=[column])[column].is_valid().to_pylist()


def read_object(file: pathlib.Path) -> dict:
    """What a file of one JSON object holds. Raises UserError for what is none."""
    try:
        found = json.loads(read_text(file))
    except ValueError as error:
        raise UserError(f'{file} cannot be read: {error}.') from error
    if not isinstance(found, dict):
        raise UserError(f'{file} holds no JSON object.')
    return found


def made(file: pathlib.Path, rows, make, told: str) -> list:
    """[make(place, row)] of a file's rows, without None. Raises UserError, which says `told`, for what is no row."""
    found = []
    for place, row in enumerate(rows):
        try:
            found.append(make(place, row))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f'{file}: {told}: {row!r:.80}.') from error
    return [one for one in found if one is not None]
