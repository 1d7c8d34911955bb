"""Locks: one writer a run, one maker of what a family of runs shares.

A lock is a file that a process holds with flock: the system lets it go when the process ends, however it does. Where a
file system has no flock, it is a file that only one can make, and whose time says that its maker lives. It says who
holds it, and is gone when it is let go. No jax is imported here.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import tempfile
import threading
import time

from nanovision_jax.errors import UserError
from nanovision_jax.runs.folder import lives

# What a file system without flock says.
MISSING = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
BEAT, LOST = 5, 60  # seconds, where there is no flock: between signs of life, and without one until a lock is nobody's


def of_run(run_dir):
    """Holds a run while the context lasts: one process trains it. The lock lies beside it."""
    folder = pathlib.Path(run_dir)
    return held(folder.parent / f'.{folder.name}.lock', f'the run {folder}', other='--config.name')


@contextlib.contextmanager
def held(file, what: str, wait: bool = False, other: str = ''):
    """Holds a lock while the context lasts. what: what it is about, as in 'the run runs/tiny/sft'.

    wait: until whoever has it is done, which is said; else that raises UserError, and says who it is, and which option
    (`other`) takes one elsewhere.
    """
    file = pathlib.Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        opened = _flocked(file, what, wait, other)
    except OSError as error:
        if error.errno not in MISSING:
            raise
        file.unlink(missing_ok=True)
        with _made(file.with_name(f'{file.name}.held'), what, wait, other):
            yield
        return
    with opened:
        opened.truncate(0)
        opened.write(_told())
        opened.flush()
        try:
            yield
        finally:
            file.unlink(missing_ok=True)  # while it is held: who waits sees that another file is needed


def _flocked(file, what, wait, other):
    """The file, opened and locked."""
    while True:
        opened = open(file, 'a+', encoding='utf-8')  # noqa: SIM115
        try:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _refuse_or_wait(_told_by(opened), what, wait, other)
                fcntl.flock(opened, fcntl.LOCK_EX)
        except BaseException:
            opened.close()
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(opened.fileno()), os.stat(file)):
                return opened
        opened.close()  # whoever held it has removed it


def _told_by(opened):
    """What the holder of an open file says, which it may be just about to write."""
    for _ in range(20):
        opened.seek(0)
        if text := opened.read():
            return text
        time.sleep(0.02)
    return ''


@contextlib.contextmanager
def _made(file, what, wait, other):
    """Holds a lock where there is no flock: a file that only one can make, and that gives signs of life."""
    said = False
    while not _make(file):
        if _is_lost(file):
            with contextlib.suppress(FileNotFoundError):
                os.rename(file, file.with_name(f'{file.name}.{socket.gethostname()}.{os.getpid()}'))
                file.with_name(f'{file.name}.{socket.gethostname()}.{os.getpid()}').unlink()
            continue
        if not said:
            _refuse_or_wait(_read(file), what, wait, other)
            said = True
        time.sleep(BEAT / 5)
    ended = threading.Event()

    def beat():
        while not ended.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(file)

    threading.Thread(target=beat, daemon=True, name='lock').start()
    try:
        yield
    finally:
        ended.set()
        file.unlink(missing_ok=True)


def _make(file):
    """Whether the file was made, by this process."""
    try:
        with open(file, 'x', encoding='utf-8') as made:
            made.write(_told())
        return True
    except FileExistsError:
        return False


def _is_lost(file):
    """Whether the process that made the file is gone: it runs no more, or gives no sign of life from elsewhere."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        told = json.loads(_read(file))
        if told['host'] == socket.gethostname():
            return not lives(told['process'])
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent) as now:  # by the clock of the file system
            return os.fstat(now.fileno()).st_mtime - file.stat().st_mtime > LOST
    except FileNotFoundError:
        return False


def _read(file):
    try:
        return file.read_text(encoding='utf-8')
    except FileNotFoundError:
        return ''


def _told():
    """Who has the lock, as the file says it."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    return json.dumps({'process': os.getpid(), 'host': socket.gethostname(), 'since': now}) + '\n'


def _refuse_or_wait(text, what, wait, other):
    """Says who has the lock, and that it is waited for; or raises UserError."""
    try:
        told = json.loads(text)
        holder = f'process {told["process"]} on {told["host"]} since {told["since"]}'
    except (ValueError, KeyError, TypeError):
        holder = 'another process'
    if not wait:
        instead = f', or choose another {other}' if other else ''
        raise UserError(f'{what} is in use by {holder}: wait until that is done{instead}.')
    print(f'waiting for {holder}, which works on {what}', flush=True)
