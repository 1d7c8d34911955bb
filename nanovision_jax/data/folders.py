"""Which files of a folder are data: all but what this project wrote there itself."""

import os
import pathlib

# A folder that holds one of these groups is a run, a set that was prepared, a family of runs, or a tokenizer of one.
MARKS = (
    ('lineage.json',),
    ('dataset_info.json', 'features.json'),
    ('tokenizer/source.json',),
    ('tokenizer.json', 'source.json'),
)


def data_files(folder):
    """The files of a folder at any depth, in name order, as paths.

    Left out are lists of bad rows, the folders below it that MARKS tells are our own output, and what is hidden, at any
    depth: the hub's .cache, Jupyter's .ipynb_checkpoints, macOS' ._ files.
    """
    found, folder = [], pathlib.Path(folder)
    for place, folders, names in os.walk(folder):
        place = pathlib.Path(place)
        folders[:] = [name for name in folders if not name.startswith('.') and not _is_ours(place / name)]
        names = [name for name in names if not name.startswith('.') and not name.endswith('bad_rows.jsonl')]
        found += [place / name for name in names if (place / name).is_file()]
    return sorted(found)


def _is_ours(folder):
    return any(all((folder / name).is_file() for name in marks) for marks in MARKS)
