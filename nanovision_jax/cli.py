"""How a command line becomes one Config; every mistake is one sentence."""

import contextlib
import pathlib
import sys

from absl import flags as absl_flags
from ml_collections import config_flags

from nanovision_jax.config import Config, base_config, check, check_values, fields, fill, get, parse_field, parse_value
from nanovision_jax.config import options as config_options
from nanovision_jax.errors import UserError, nearest
from nanovision_jax.training import start


def parse(argv, usage='', flags=()):
    """Turns `--config=FILE[:SIZE] [--config.FIELD=VALUE …]` into (Config, {flag: bool}).

    `flags` are the names of further boolean options. Raises UserError, one sentence, for every mistake.
    """
    if '--help' in argv or '-h' in argv:
        _help([arg for arg in argv if arg not in ('--help', '-h')], usage)
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
    if options.get('config.data.source', 'mixture') != 'mixture' and options.get('config.data.mixture'):
        raise UserError(
            'data.source and data.mixture are both given: a mixture names its sources, leave data.source out.'
        )
    chosen = {name: parse_value(f'--{name}', bool, options.get(name, 'false')) for name in flags}
    config = _read(file, size, given)
    fill(config)
    check_values(config)
    told = start.inherit(config, _given(config, options), chosen.get('anew', False))
    check(config)
    print('\n'.join(told), end='\n' * bool(told))
    return config, chosen


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
            given, options = _split(argv)
            path, _, size = options['config'].partition(':')
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
