"""Command lines: options, a config out of --config=FILE, and the one place that turns mistakes into exit codes.

Every mistake is one sentence.
"""

import argparse
import collections
import contextlib
import errno
import gc
import io
import os
import pathlib
import select
import sys
import threading
import time

from absl import flags as absl_flags
from ml_collections import config_flags

from nanovision_jax.config import Config, base_config, fields, fill, get, parse_field, parse_value
from nanovision_jax.config import options as config_options
from nanovision_jax.config_checks import check, check_values
from nanovision_jax.errors import FAILURE, INTERRUPTED, MISTAKE, UNREAD, Stuck, UserError, leave, nearest
from nanovision_jax.runs import mirror
from nanovision_jax.training import start
from nanovision_jax.training.stopping import Unfinished

# Objects made before Python looks for garbage among them: at its 700, that is a quarter of the time jax takes to load.
RARELY = 100_000
# What an OSError with one of these says: a file is not ours to read or write; or the machine fails, not the program.
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)
PATIENCE = 10  # seconds that threads get as the process ends


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
    """Runs a command's `main(argv)`, and ends the process with a code of errors.py where it is not 0.

    A UserError becomes one sentence on stderr. So do a device that jax was told to use and does not find, a full disk,
    and files that may not be read or written. If the reader of its output goes away (`show … | head`), a command ends
    without a word, as others do.
    """
    _take_any_text()
    gc.set_threshold(RARELY)
    code = FAILURE  # of a traceback
    try:
        code = _run(main)
    except SystemExit as error:
        code = error.code
        raise
    finally:
        if any(type(thread).__module__.startswith('orbax') for thread in threading.enumerate()):
            threading.Thread(target=_leave_soon, args=(code,), daemon=True).start()
    if code:
        sys.exit(code)


def _leave_soon(code):
    """Orbax's threads may wait for minutes for what failed, and Python's end for them."""
    time.sleep(PATIENCE)
    leave(code)


def _run(main):
    """Runs main(argv), and returns the exit code."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
        return 0
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        if isinstance(error, Stuck):
            leave(error.code)
        return error.code
    except Unfinished as error:
        leave(error.code)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        stdout = sys.stdout.fileno()
        gone = select.poll()
        gone.register(stdout, 0)  # asks for nothing, so it tells of errors and of a reader that hung up alone
        if not gone.poll(0):
            raise
        # What is still buffered would be written again, and fail again, as Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
        return UNREAD
    except OSError as error:
        if error.errno not in (*REFUSED, *BROKEN):
            raise
        print(f'error: {f"{error.filename}: " * bool(error.filename)}{error.strerror}.', file=sys.stderr)
        return MISTAKE if error.errno in REFUSED else FAILURE
    except (RuntimeError, AssertionError):
        if (reason := _no_device()) is None:
            raise
        print(f'error: {reason}', file=sys.stderr)
        return MISTAKE


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
            'Quickstart in the README), or unset JAX_PLATFORMS.'
        )


# A config ------------------------------------------------------------------------------------------------------------


def parse(argv, usage='', **extra):
    """Turns `--config=FILE[:SIZE] [--config.FIELD=VALUE …]` into (Config, {option: value}).

    extra: further options and their defaults, which tell their types: a bool, a text, or a number above 0, or above a
    default below that.
    Raises UserError, one sentence, for every mistake.
    """
    if '--help' in argv or '-h' in argv:
        _help([arg for arg in argv if arg not in ('--help', '-h')], usage)
        sys.exit(0)
    given, options = split(argv, [name for name, default in extra.items() if not isinstance(default, bool)])
    for name in options:
        if name not in extra and name != 'config' and not name.startswith('config.'):
            raise UserError(
                f'unknown argument --{name}.{nearest("--" + name, ["--config", *("--" + name for name in extra)])}'
            )
    if 'config' not in options:
        raise UserError('which config? Say --config=FILE, as in --config=configs/pretrain.py:tiny.')
    path, _, size = options['config'].partition(':')
    file = pathlib.Path(path)
    if not file.is_file():
        beside = file.parent if file.parent.is_dir() else pathlib.Path('configs')
        raise UserError(f'no config file {path!r}.{nearest(path, beside.glob("*.py"))}')
    known = fields(Config)
    for name in options:
        if name.startswith('config.') and name.removeprefix('config.') not in known:
            field = name.removeprefix('config.')
            raise UserError(f'no config field {field!r}.{nearest(field, known)}')
    if 'config.size' in options:
        raise UserError(f'the size goes behind the config file: --config={path}:{options["config.size"]}.')
    if options.get('config.data.source', 'mixture') != 'mixture' and options.get('config.data.mixture'):
        raise UserError(
            'data.source and data.mixture are both given: a mixture names its sources, leave data.source out.'
        )
    chosen = extra | {name: _option(name, extra[name], options[name]) for name in extra if name in options}
    config = _read(file, size, given)
    fill(config)
    check_values(config)
    if config.checkpoint.mirror and 'anew' in chosen:  # a command that trains: what it starts from may be there
        mirror.fetch(config, chosen['anew'])
    told = start.inherit(config, _given(config, options), chosen.get('anew', False))
    check(config)
    print('\n'.join(told), end='\n' * bool(told))
    return config, chosen


def _option(name, default, text):
    value = parse_value(f'--{name}', type(default), text)
    if type(default) is int and value <= (above := min(default, 0)):
        raise UserError(f'--{name} takes a number above {above}, not {value}.')
    return value


def _given(config, options):
    """The fields that were given: on the command line and, of the model, by a config file with sizes of its own."""
    try:
        usual = base_config(config.stage, config.size)
    except UserError:  # a config file may name its size as it likes
        usual = Config()
    names = {name.removeprefix('config.') for name in options} & set(fields(Config))
    return names | {n for n in fields(Config) if n.startswith('model.') and get(config, n) != get(usual, n)}


def _help(argv, usage):
    """Prints the usage and every field: type, meaning, limits, default and, with --config=FILE, its value there."""
    config = None
    if any(arg.startswith('--config') for arg in argv):
        with contextlib.suppress(UserError):  # help is given whatever else is wrong
            given, options = split(argv)
            path, _, size = options.get('config', '').partition(':')
            if pathlib.Path(path).is_file():
                config = _read(pathlib.Path(path), size, given)
                fill(config)
                start.inherit(config, _given(config, options))
    print(usage.strip())
    print('\nFields, each overridden with --config.FIELD=VALUE:')
    for name, field in config_options(Config).items():
        kind, default, meta = fields(Config)[name], field.default, field.metadata
        limits = [f'one of {", ".join(map(repr, meta["choices"]))}'] if meta['choices'] else []
        words = {'above': 'above', 'least': 'at least', 'below': 'below'}
        limits += [f'{word} {meta[limit]}' for limit, word in words.items() if meta[limit] is not None]
        here = f'; here: {get(config, name)!r}' if config else ''
        print(f'  {name} ({kind.__name__})')
        print(f'      {meta["meaning"]}{"".join(f"; {limit}" for limit in limits)}; default: {default!r}{here}')


def split(argv, valued=()):
    """Normalises argv to ['--name=value', …] and gives it also as {name: value}. valued: others that take a value."""
    given, options, rest = [], {}, list(argv)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith('--'):
            raise UserError(f'unexpected argument {arg!r}: options start with --.')
        name, equals, value = arg[2:].partition('=')
        takes_value = name == 'config' or name.startswith('config.') or name in valued
        if not equals and takes_value:
            if not rest:
                raise UserError(f'--{name} needs a value, as in --{name}=VALUE.')
            value = rest.pop(0)
        if name.startswith('config'):
            given.append(f'--{name}={value}')
        options[name] = value if equals or takes_value else 'true'
    return given, options


def _read(file, size, given):
    """Runs the config file and applies the overrides, through ml_collections."""
    if size:
        base_config('pretrain', size)  # a size that does not exist is answered before the file is run
    overrides = sorted(given, key=lambda arg: not arg.startswith('--config='))  # absl wants the file first
    values = absl_flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=['train', *overrides])
    known = fields(Config)
    for arg in overrides:
        name, _, value = arg.removeprefix('--config').removeprefix('.').partition('=')
        if name in known:
            parse_field(name, value)
    try:
        values(['train', *overrides])
        config = values.config
    except UserError:
        raise
    except Exception as error:  # the file is somebody's program: anything may go wrong in it
        why = str(error).strip().rpartition('\n')[2]
        raise UserError(f'{file} fails: {type(error).__name__}: {why}.') from error
    if not isinstance(config, Config):
        raise UserError(f'{file} must define get_config(size) that returns a nanovision_jax.config.Config.')
    return config
