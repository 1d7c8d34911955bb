"""Locks: one writer a run, one maker of what a family of runs shares.

A lock is a file that a process holds with flock: the system lets it go when the process ends, however it does. It says
who holds it, and is gone when it is let go. No jax is imported here.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket

from nanovision_jax.errors import UserError

# What a file system without flock says; there nothing is locked, as before.
MISSING = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def held(file, what: str, wait: bool = False):
    """Holds a lock while the context lasts. what: what it is about, as in 'the run runs/tiny/sft'.

    wait: until whoever has it is done, which is said; else that raises UserError, and says who it is.
    """
    file = pathlib.Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with _taken(file, what, wait) as opened:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
        opened.truncate(0)
        opened.write(json.dumps({'process': os.getpid(), 'host': socket.gethostname(), 'since': now}) + '\n')
        opened.flush()
        try:
            yield
        finally:
            file.unlink(missing_ok=True)  # while it is held: who waits sees that another file is needed


def _taken(file, what, wait):
    """The file, opened and locked."""
    while True:
        opened = open(file, 'a+', encoding='utf-8')  # noqa: SIM115
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(opened)
            if not wait:
                opened.close()
                raise UserError(
                    f'{what} is in use by {holder}: wait until that is done, or choose another --config.name.'
                ) from None
            print(f'waiting for {holder}, which works on {what}', flush=True)
            fcntl.flock(opened, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in MISSING:
                raise
            print(f'{file.parent} cannot be locked ({error.strerror}): see that nothing else writes there')
            return opened
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(opened.fileno()), os.stat(file)):
                return opened
        opened.close()  # whoever held it has removed it


def _holder(opened):
    """Who has a lock, in words."""
    opened.seek(0)
    try:
        told = json.loads(opened.read())
        return f'process {told["process"]} on {told["host"]} since {told["since"]}'
    except (ValueError, KeyError, TypeError):
        return 'another process'
