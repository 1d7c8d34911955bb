"""How a command line becomes one Config; every mistake is one sentence."""

import pathlib
import sys

from nanovision_jax.config import Config, base_config, check, fields, fill, get
from nanovision_jax.errors import UserError, nearest


def parse(argv, usage='', flags=()):
    """Turns `--config=FILE[:SIZE] [--config.FIELD=VALUE …]` into (Config, {flag: bool}).

    `flags` are the names of further boolean options. Raises UserError, one sentence, for every mistake.
    """
    if '--help' in argv or '-h' in argv:
        print(usage.strip())
        print('\nFields, each overridden with --config.FIELD=VALUE:')
        print('\n'.join(f'  {name:30} {kind.__name__}' for name, kind in fields(Config).items()))
        sys.exit(0)
    given, options = _split(argv)
    for name in options:
        if name not in flags and name != 'config' and not name.startswith('config.'):
            raise UserError(
                f'unknown argument --{name}.{nearest("--" + name, ["--config", *("--" + f for f in flags)])}'
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
    for name in flags:
        _check_type(name, bool, options.get(name, 'false'))
    config = _read(file, size, given)
    chosen = {name: get(config, name) for name in (o.removeprefix('config.') for o in options) if name in known}
    fill(config)
    for name, value in chosen.items():
        if get(config, name) != value:
            raise UserError(
                f'{name} is {value!r} on the command line, and {get(config, name)!r} in the published weights '
                f'({config.model.decoder or config.model.tower}), which fix it: leave it out.'
            )
    check(config)
    return config, {name: options.get(name, 'false').lower() in ('true', '1') for name in flags}


def _split(argv):
    """Normalises argv to ['--name=value', …] and gives it also as {name: value}."""
    given, options, rest = [], {}, list(argv)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith('--'):
            raise UserError(f'unexpected argument {arg!r}: options start with --.')
        name, equals, value = arg[2:].partition('=')
        if not equals and (name == 'config' or name.startswith('config.')):
            if not rest:
                raise UserError(f'--{name} needs a value, as in --{name}=VALUE.')
            value = rest.pop(0)
        if name.startswith('config'):
            given.append(f'--{name}={value}')
        options[name] = value if equals or name.startswith('config') else 'true'
    return given, options


def _read(file, size, given):
    """Runs the config file and applies the overrides, through ml_collections."""
    from absl import flags as absl_flags
    from ml_collections import config_flags

    if size:
        base_config('pretrain', size)  # a size that does not exist is answered before the file is run
    overrides = sorted(given, key=lambda arg: not arg.startswith('--config='))  # absl wants the file first
    values = absl_flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=['train', *overrides])
    known = fields(Config)
    for arg in overrides:
        name, _, value = arg.removeprefix('--config').removeprefix('.').partition('=')
        if name in known:
            _check_type(f'config.{name}', known[name], value)
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


def _check_type(name, kind, text):
    """Refuses a value that is not of the field's type, in one sentence."""
    count = 4 if name.endswith('rope_scaling') else 3
    try:
        if kind is bool:
            if text.lower() not in ('true', 'false', '1', '0'):
                raise ValueError
        elif kind in (int, float):
            kind(text)
        elif kind is tuple and len([float(n) for n in text.strip('()').split(',')]) != count:
            raise ValueError
    except ValueError:
        wanted = f'{"three" if count == 3 else "four"} numbers' if kind is tuple else kind.__name__
        raise UserError(f'--{name} takes {wanted}, not {text!r}.') from None
