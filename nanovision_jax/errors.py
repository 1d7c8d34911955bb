"""Errors a user can mend, and the one place that turns them into a sentence and an exit code."""

import argparse
import difflib
import os
import select
import sys


class UserError(Exception):
    """A mistake in what we were given: one sentence saying what is wrong, where, and what to do. Exit code 2."""


def nearest(word, choices):
    """' Did you mean …?' for the choice most like `word`, or all choices if none is alike."""
    choices = sorted(map(str, choices))
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.5)
    if close:
        return f' Did you mean {close[0]!r}?'
    return f' There are: {", ".join(choices)}.' if choices else ''


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UserErrors: one sentence instead of the usage text."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        """Raises the complaint instead of printing the usage."""
        raise UserError(f'{message}. See --help.')

    def parse(self, argv):
        """Parses argv; an unknown option is answered with the nearest right one."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            raise UserError(
                f'unknown argument {unknown[0]!r}.{nearest(unknown[0].split("=")[0], self._option_string_actions)}'
            )
        return args


def run(main):
    """Runs a command's `main(argv)`; a UserError becomes one sentence on stderr and exit code 2.

    If the reader of its output goes away (`show … | head`), a command ends without a word, as others do: code 141.
    """
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
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
