"""Errors a user can mend, and the one place that turns them into a sentence and an exit code."""

import argparse
import collections
import difflib
import errno
import io
import os
import pathlib
import select
import sys
import tempfile

# What an OSError with one of these says is wrong with the machine, not with the program.
MACHINE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """A mistake in what we were given: one sentence saying what is wrong, where, and what to do. Exit code 2."""


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


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UserErrors: one sentence instead of the usage text."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        """Raises the complaint instead of printing the usage."""
        raise UserError(f'{message}. See --help.')

    def parse(self, argv):
        """Parses argv; an unknown option is answered with the nearest right one, and none may be given twice."""
        given = collections.Counter(arg.partition('=')[0] for arg in argv)
        for name, action in self._option_string_actions.items():
            if given[name] > 1 and isinstance(action, argparse._StoreAction):
                raise UserError(f'{name} is given {given[name]} times: it takes one value.')
        args, unknown = self.parse_known_args(argv)
        if unknown:
            raise UserError(
                f'unknown argument {unknown[0]!r}.{nearest(unknown[0].split("=")[0], self._option_string_actions)}'
            )
        return args


def run(main):
    """Runs a command's `main(argv)`; a UserError becomes one sentence on stderr and exit code 2.

    So do a device that jax was told to use and does not find, a full disk, and files that may not be read or written.
    If the reader of its output goes away (`show … | head`), a command ends without a word, as others do: code 141.
    """
    _take_any_text()
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        _end(error)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        stdout = sys.stdout.fileno()
        gone = select.poll()
        gone.register(stdout, 0)  # asks for nothing, so it tells of errors and of a reader that hung up alone
        if not gone.poll(0):
            raise
        # What is still buffered would be written again, and fail again, as Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
        sys.exit(141)
    except OSError as error:
        if error.errno not in MACHINE:
            raise
        _end(f'{error.filename}: {error.strerror}.' if error.filename else f'{error.strerror}.')
    except (RuntimeError, AssertionError):
        if (reason := _no_device()) is None:
            raise
        _end(reason)


def _end(reason):
    print(f'error: {reason}', file=sys.stderr)
    sys.exit(2)


def _take_any_text():
    r"""Makes the standard streams take what their encoding has not.

    Written, a character that the terminal lacks is shown by its number, as in \u2192: no answer is lost, and nothing
    ends for it. Read, a byte that is no character becomes a surrogate, which is refused where the text is used.
    """
    for stream, errors in (
        (sys.stdout, 'backslashreplace'),
        (sys.stderr, 'backslashreplace'),
        (sys.stdin, 'surrogateescape'),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _no_device():
    """Why jax has no device, in a sentence; None where it has one, or was not needed."""
    jax = sys.modules.get('jax')
    try:
        if jax is not None:
            jax.devices()
        return None
    except (RuntimeError, AssertionError) as error:  # an AssertionError, with no words, for cuda without its plugin
        why = str(error).partition(' (set JAX_PLATFORMS')[0].rstrip('.')
        wanted = os.environ.get('JAX_PLATFORMS', '')
        return (
            f'jax finds no device for JAX_PLATFORMS={wanted!r}{why and f" ({why})"}: install what it needs (see '
            'Install in the README), or unset JAX_PLATFORMS.'
        )
