"""Published files, found and read as they are: JSON, JSON lines and parquet, row by row."""

import pathlib

from nanovision_jax.data.conversation import BadExample
from nanovision_jax.data.folders import data_files
from nanovision_jax.data.formats import RowFile, open_parquet, row_of
from nanovision_jax.errors import UserError


def find(folder, patterns, together=False):
    """The files of a folder, at any depth, that match `patterns`, in name order; what we wrote ourselves left out.

    Raises UserError for none and, unless they are read `together`, for files of several patterns: one of them would be
    left out, and often they hold the same rows.
    """
    folder = pathlib.Path(folder)
    if folder.is_file():
        return [folder]
    every = data_files(folder)
    found = {pattern: [file for file in every if file.relative_to(folder).match(pattern)] for pattern in patterns}
    found = {pattern: files for pattern, files in found.items() if files}
    if not found:
        raise UserError(f'{folder} holds no {" and no ".join(patterns)}: say with --from=FOLDER where the files are.')
    if len(found) > 1 and not together:
        (pattern, first), (_, second) = ((pattern, files[0].name) for pattern, files in list(found.items())[:2])
        raise UserError(
            f"{folder} holds {first} and {second}, of which one kind is read: say which, as in --files='{pattern}'."
        )
    return sorted({file for files in found.values() for file in files})


def count_rows(files):
    """How many rows the files hold, for a progress bar."""
    return sum(open_parquet(f).metadata.num_rows if f.suffix == '.parquet' else len(RowFile(f)) for f in files)


def read_rows(file, columns=()):
    """The rows of a JSON list, of JSON lines or of a parquet file (only `columns`, where given), one by one.

    A row that is no JSON, or not UTF-8, comes as None. Raises UserError where the whole file cannot be read.
    """
    yield from _parquet_rows(file, columns) if file.suffix == '.parquet' else RowFile(file)


def _parquet_rows(file, columns):
    parquet = open_parquet(file)
    wanted = [name for name in columns if name in parquet.schema_arrow.names] or None
    try:
        for group in range(parquet.num_row_groups):  # images: a row group may be a gigabyte, a file many
            for batch in parquet.iter_batches(64, [group], wanted, use_threads=False):
                yield from _batch_rows(batch)
    except (OSError, ValueError) as error:
        raise UserError(f'{file} is damaged: {str(error).splitlines()[0]}.') from error


def _batch_rows(batch):
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [_row_or_none(batch, i) for i in range(len(batch))]


def _row_or_none(batch, i):
    try:
        return row_of(batch, i)
    except BadExample:
        return None
