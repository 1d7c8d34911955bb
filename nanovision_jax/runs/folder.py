"""A run's files: written whole or not at all, read with one sentence where they are damaged, found from anywhere.

    <run>/config.json, lineage.json, metrics.jsonl, tokenizer/, eval/, and of what was left out
    <run>/bad_rows.jsonl, bad_steps.jsonl, skipped.jsonl
    <run>/checkpoints/<step>/{params,optimizer}/   and manifest.json, the sha256 of every file in them

A path in a run's files is relative to the run (it begins with ./ or ../), or absolute where the user gave it so and it
lies outside the run's family, or the address of something in a store. So a family may be moved, and opened from any
folder. No jax is imported here.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import sys
import time

from nanovision_jax.caches import is_url
from nanovision_jax.errors import UserError

MANIFEST = 'manifest.json'


class Paths:
    """Where the files of the run in `run_dir` lie."""

    def __init__(self, run_dir):
        self.folder = folder = pathlib.Path(run_dir)
        self.config = folder / 'config.json'
        self.lineage = folder / 'lineage.json'
        self.metrics = folder / 'metrics.jsonl'
        self.bad_rows = folder / 'bad_rows.jsonl'
        self.bad_steps = folder / 'bad_steps.jsonl'
        self.skipped = folder / 'skipped.jsonl'
        self.tokenizer = folder / 'tokenizer'
        self.checkpoints = folder / 'checkpoints'
        self.results = folder / 'eval'

    def checkpoint(self, step, item=''):
        """The folder of a checkpoint, or of an item in it: params or optimizer."""
        return self.checkpoints / str(step) / item

    def manifest(self, step):
        """The file that proves a checkpoint."""
        return self.checkpoint(step) / MANIFEST


# Whole files ---------------------------------------------------------------------------------------------------------


def write_whole(file, text: str):
    """Writes a text file under another name first: whoever reads it finds the old content or the new, never a part.

    A file that holds the text already is left alone.
    """
    file, data = pathlib.Path(file), text.encode()
    with contextlib.suppress(OSError):
        if file.stat().st_size == len(data) and file.read_bytes() == data:
            return
    with whole(file) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def whole(file):
    """A path to write to, which becomes `file` when all went well; else nothing is left of it.

    Each process has its own, so several may write the same file. It is on the disk before it gets its name, so that a
    power failure leaves no name without content.
    """
    file = pathlib.Path(file)
    partial = file.with_name(f'{file.name}.{os.getpid()}.part')
    try:
        yield partial
        flush(partial)
        os.replace(partial, file)
        flush(file.parent)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial(folder, untouched: float = 0):
    """Removes what processes that were killed while they wrote have left in a folder: see whole().

    untouched: and that nobody has written to for so many seconds, where processes of other machines may write too.
    """
    for partial in pathlib.Path(folder).glob('*.*.part'):
        with contextlib.suppress(FileNotFoundError, ValueError):
            age = time.time() - partial.stat().st_mtime
            if partial.is_file() and age >= untouched and not lives(int(partial.name.split('.')[-2])):
                partial.unlink()


def lives(process: int) -> bool:
    """Whether a process of this machine runs, or has not been seen to its end."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def copy_whole(folder, target):
    """Copies the files of a folder that are not there yet, each whole or not at all."""
    for file in sorted(file for file in pathlib.Path(folder).rglob('*') if file.is_file()):
        copy = pathlib.Path(target) / file.relative_to(folder)
        if not copy.is_file() or file_digest(copy) != file_digest(file):
            copy.parent.mkdir(parents=True, exist_ok=True)
            with whole(copy) as partial:
                shutil.copyfile(file, partial)


def flush(path):
    """Sees that a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of a folder, some file systems cannot
            raise
    finally:
        os.close(handle)


class Object(dict):
    """A JSON object of `file`; a key that is asked for and missing is a UserError."""

    file = ''

    def __missing__(self, key):
        raise UserError(f'{self.file} lacks {key!r}: it is damaged, or not what it is taken for.')


def read_json(file) -> Object:
    """The JSON object in a file, as an Object (nested ones too). Raises UserError where there is none."""
    kind = type('Object', (Object,), {'file': file})
    try:
        content = json.loads(pathlib.Path(file).read_text(encoding='utf-8'), object_hook=kind)
    except (OSError, ValueError, RecursionError) as error:
        missing = isinstance(error, FileNotFoundError)
        raise UserError(f'{file} is {"missing" if missing else "damaged: it holds no JSON"}.') from error
    if not isinstance(content, dict):
        raise UserError(f'{file} is damaged: it holds no JSON object.')
    return content


def read_lines(file):
    """Yields the objects of a JSON-lines file, none where there is no file; a line that is cut or damaged is none."""
    if not pathlib.Path(file).exists():
        return
    with open(file, encoding='utf-8', errors='replace') as lines:
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(found := json.loads(line), dict):
                    yield found


def write_lines(file, rows):
    """Writes objects as a JSON-lines file, whole as write_whole() does."""
    write_whole(file, ''.join(json.dumps(row) + '\n' for row in rows))


# Paths ---------------------------------------------------------------------------------------------------------------


def portable(path, run_dir) -> str:
    """A path as the files of the run in `run_dir` keep it: relative to the run, or absolute (see above)."""
    if is_url(str(path)):
        return str(path)
    path, run_dir = os.path.expanduser(str(path)), os.path.abspath(run_dir)
    here = os.path.abspath(path)
    family = os.path.join(os.path.dirname(run_dir), '')
    if os.path.isabs(path) and not here.startswith(family):
        return path
    relative = os.path.relpath(here, run_dir)
    return relative if relative.startswith('.') else f'./{relative}'


def is_portable(path: str) -> bool:
    """Whether portable() wrote this path. Older runs kept paths relative to the folder they were trained from."""
    return path in ('.', '..') or path.startswith(('./', '../', '/')) or is_url(path)


def resolve(path: str, run_dir, origin: str = '') -> str:
    """The way back: a path that a file of the run in `run_dir` holds, as a path from here.

    origin: the folder that the paths of an older run are relative to (see origin_of).
    """
    return path if is_url(path) else os.path.normpath(os.path.join(run_dir if is_portable(path) else origin, path))


def origin_of(run_dir, recorded):
    """The folder that an older run was trained from: `run_dir` without its end, which its config recorded."""
    here, end = os.path.abspath(run_dir), os.path.join(os.sep, os.path.normpath(recorded))
    return (here.removesuffix(end) or os.sep) if here.endswith(end) and not os.path.isabs(recorded) else ''


def read_lineage(run_dir) -> dict:
    """lineage.json of a run, with the places of its parents as they are from here; {} where there is none."""
    file = Paths(run_dir).lineage
    record = read_json(file) if file.exists() else {}
    for name in ('parents', 'sessions'):
        entries = record.get(name, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f'{file} is damaged: its {name} are no list of objects.')
    for parent in record.get('parents', []):
        parent['run'] = locate(run_dir, parent['run'])
    return record


def locate(run_dir, path: str) -> str:
    """A parent's place as lineage.json holds it, as a path from here. Older runs kept it as it was given."""
    if is_portable(path):
        return resolve(path, run_dir)
    beside = pathlib.Path(run_dir).parent / os.path.basename(path)
    return path if os.path.exists(path) or not beside.exists() else str(beside)


def result_file(folder, task: str, part: str) -> pathlib.Path:
    """Where the result of an evaluation lies in a folder of results: <task>.json, or of another part than validation
    <task>-<part>.json. Its rows are beside it, as .jsonl."""
    return pathlib.Path(folder) / (f'{task}.json' if part == 'validation' else f'{task}-{part}.json')


# Checkpoints, as far as a manifest proves them -----------------------------------------------------------------------


def file_digest(file) -> str:
    """The sha256 of a file, in hex."""
    with open(file, 'rb') as handle:
        return hashlib.file_digest(handle, 'sha256').hexdigest()


def weights_digest(source: pathlib.Path) -> str:
    """The sha256, in hex, of a file of weights, or over those of a folder's safetensors."""
    if source.is_file():
        return file_digest(source)
    digests = map(file_digest, sorted(source.glob('*.safetensors')))
    return hashlib.sha256(''.join(digests).encode()).hexdigest()


def whole_steps(run_dir) -> list[int]:
    """The steps whose checkpoint has a manifest, newest first."""
    manifests = Paths(run_dir).checkpoints.glob(f'*/{MANIFEST}')
    return sorted((int(m.parent.name) for m in manifests if m.parent.name.isdigit()), reverse=True)


def manifest(run_dir, step: int) -> dict:
    """The manifest of one checkpoint."""
    return json.loads(Paths(run_dir).manifest(step).read_text())


def write_manifest(folder, content: dict):
    """Writes manifest.json, which proves a checkpoint: `content`, the sha256 of every file, and a digest of all this.

    Files are on the disk before it is written, so a folder that has it is whole.
    """
    digests = {}
    for name in _files(folder):
        flush(folder / name)
        digests[name] = file_digest(folder / name)
    content = content | {'files': digests}
    write_whole(folder / MANIFEST, json.dumps(content | {'digest': _proof(content)}, indent=1) + '\n')


def _files(folder):
    """The names of the files in a checkpoint's folder, but for the manifest and what a system hides there."""
    names = (str(file.relative_to(folder)) for file in folder.rglob('*') if file.is_file())
    return sorted(name for name in names if name != MANIFEST and not os.path.basename(name).startswith('.'))


def _proof(content):
    """The digest of a manifest without its own."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def damage(run_dir, step, item=''):
    """The first file of a checkpoint that is not what its manifest says, or None. item: params or optimizer alone."""
    folder = Paths(run_dir).checkpoint(step)
    try:
        told = manifest(run_dir, step)
        proof = told.pop('digest', None)  # older ones have none
        if told['step'] != step or proof not in (None, _proof(told)):
            return folder / MANIFEST
        part = f'{item}/' if item else ''
        wanted = {name: digest for name, digest in told['files'].items() if name.startswith(part)}
        if not any(name.startswith('params/') for name in told['files']):
            return folder / MANIFEST
        for name in sorted(wanted.keys() | {name for name in _files(folder) if name.startswith(part)}):
            if not (folder / name).is_file() or file_digest(folder / name) != wanted.get(name):
                return folder / name
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return folder / MANIFEST
    return None


def beside(run_dir) -> dict[str, str]:
    """{file: sha256} of what parameters mean nothing without: config.json and the tokenizer's files."""
    paths = Paths(run_dir)
    files = [paths.config, *sorted(file for file in paths.tokenizer.rglob('*') if file.is_file())]
    return {str(file.relative_to(paths.folder)): file_digest(file) for file in files if file.is_file()}


def check_beside(run_dir, step: int):
    """Raises UserError where config.json or the tokenizer is not what a checkpoint was written with.

    A run that went on with another config (--resume) has that one too: lineage.json knows it. Older manifests say
    nothing of it.
    """
    later = {session['config'] for session in read_lineage(run_dir).get('sessions', []) if 'config' in session}
    found = beside(run_dir)
    for name, digest in manifest(run_dir, step).get('beside', {}).items():
        if found.get(name) != digest and (name != 'config.json' or found.get(name) not in later):
            file = Paths(run_dir).folder / name
            what = 'was changed' if name in found else 'is missing'
            raise UserError(f'{file} {what} after checkpoint {step} was written: bring it back as it was.')


def newest(run_dir, item='', say=lambda text: print(text, file=sys.stderr)):
    """The newest step whose files are what its manifest says; what is passed over is said. None if there is none.

    item: params or optimizer, to read and prove the files of that alone.
    Raises UserError if there are checkpoints and all are damaged.
    """
    steps = whole_steps(run_dir)
    for step in steps:
        if (bad := damage(run_dir, step, item)) is None:
            return step
        say(f'warning: {bad} is damaged, so checkpoint {step} is not used')
    if steps:
        raise UserError(f'every checkpoint in {run_dir} is damaged.')
    return None
