"""Mistakes that a user can mend, and the exit codes of every command.

0: it is done. 1: a failure, ours or the machine's. 2: a mistake in what was given, in one sentence. 75: told to stop by
SIGTERM, SIGHUP or SIGUSR1, or another host is gone, and 130 by Ctrl-C: the same command goes on. 141: the reader of the
output went away.
"""

import contextlib
import difflib
import os
import pathlib
import sys
import tempfile

FAILURE, MISTAKE, GO_ON, INTERRUPTED, UNREAD = 1, 2, 75, 130, 141  # 75 is the system's "try again" (EX_TEMPFAIL)


class UserError(Exception):
    """A mistake in what we were given: one sentence saying what is wrong, where, and what to do. Exit code 2."""

    code = MISTAKE


class Failure(UserError):
    """What the machine failed at, a full disk say, in one sentence. Exit code 1."""

    code = FAILURE


class Stuck(Failure):
    """A Failure of something that still hangs: the process ends without waiting for it."""


def leave(code: int):
    """Ends the process here: Python's own end crashes where a signal came within jax's work, and may wait for threads.

    Data workers see it, and end too.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a signal may have come while it was written to
            stream.flush()
    os._exit(code)


def nearest(word, choices):
    """' Did you mean …?' for the choice most like `word`, or all choices if none is alike."""
    choices = sorted(map(str, choices))
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.5)
    if close:
        return f' Did you mean {close[0]!r}?'
    return f' There are: {", ".join(choices)}.' if choices else ''


def check_writable(folder):
    """Raises UserError if nothing can be written into a folder, which need not exist yet. Leaves nothing behind.

    Called before the work whose result goes there, so that none is lost.
    """
    folder = pathlib.Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f'{folder} cannot be a folder: {there} is none.')
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f'{folder} cannot be written: nothing can be made in {there} ({error.strerror}).') from error
