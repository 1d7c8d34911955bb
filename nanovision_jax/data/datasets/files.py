"""Published files, read as they are: JSON, JSON lines and parquet row by row, pictures by name out of zip files."""

import collections
import pathlib

from nanovision_jax.data.conversation import BadExample
from nanovision_jax.data.folders import data_files
from nanovision_jax.data.formats import RowFile
from nanovision_jax.data.images import ImageStore
from nanovision_jax.errors import UserError

ENDINGS = ('.jpg', '.jpeg', '.png', '.webp', '.gif')  # what a picture may be called, whatever the row calls it


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

    A row that is no JSON comes as None. Raises UserError where the whole file cannot be read.
    """
    yield from _parquet_rows(file, columns) if file.suffix == '.parquet' else RowFile(file)


def _parquet_rows(file, columns):
    parquet = open_parquet(file)
    wanted = [name for name in columns if name in parquet.schema_arrow.names] or None
    try:
        for group in range(parquet.num_row_groups):  # pictures: a row group may be a gigabyte, a file many
            for batch in parquet.iter_batches(64, [group], wanted, use_threads=False):
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f'{file} is damaged: {str(error).splitlines()[0]}.') from error


def open_parquet(file):
    """A pyarrow ParquetFile. Raises UserError for what is none."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f'{file} is no parquet file that can be read: {str(error).splitlines()[0]}.') from error


def picture_reader(folder):
    """A function that gives the bytes of a picture by the name a row has for it; it raises BadExample for none.

    The folder is as downloaded: pictures lie in it under their names (below images/ or COCO's folder too), or in the
    zip files in it or one folder down, which are not unpacked. A name that ends in .jpg finds the same picture as .gif
    or .png, and the other way round: the format is in the bytes, the ending only in the name (OCR-VQA).
    """
    folder = pathlib.Path(folder)
    folder = folder.parent if folder.is_file() else folder
    loose = [
        ImageStore(folder / sub) for sub in ('', 'images', 'train2017', 'coco/train2017') if (folder / sub).is_dir()
    ]
    zips, members = [], collections.defaultdict(list)  # stem → [(parts of its path, zip, member)]
    for file in sorted([*folder.glob('*.zip'), *folder.glob('*/*.zip')]):
        zips.append(ImageStore(file))
        inside = file.relative_to(folder).with_suffix('').parts
        for member in zips[-1].names():
            path = pathlib.PurePosixPath(member)
            if path.suffix.lower() in ENDINGS:
                members[path.stem].append(((*inside, *path.parts[:-1]), zips[-1], member))

    def read(name):
        path = pathlib.PurePosixPath(name)
        # GQA and Visual Genome have pictures of the same name: every folder that the row names must be on the way.
        fitting = [found for found in members.get(path.stem, ()) if _within(path.parts[:-1], found[0])]
        if fitting:
            _, store, member = min(fitting, key=lambda found: (not found[2].endswith(name), len(found[0]), found[2]))
            return store.read(member)
        for ending in (path.suffix, *ENDINGS) if path.name else ():
            for store in loose:
                try:
                    return store.read(str(path.with_suffix(ending)))
                except BadExample as error:
                    if 'missing' not in str(error):
                        raise
        raise BadExample(f'missing image {name!r}')

    return read


def _within(wanted, parts):
    """Whether `wanted` is in `parts`, in order, with others between."""
    parts = iter(parts)
    return all(part in parts for part in wanted)
