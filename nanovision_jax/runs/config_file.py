"""config.json: the config of a run on disk, and how the configs of two runs are compared.

Its paths are portable (folder.py), so a run may be moved and opened from any folder.
"""

import dataclasses
import json
import os
import pathlib
import typing

from nanovision_jax.config import Config, fields, get, put
from nanovision_jax.config_checks import check_model, check_values
from nanovision_jax.errors import UserError
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.stages import STAGES

TRAINED = 'train'  # the tokenizer that is no path and no hub id
PATHS = ('init_from', 'data.path', 'data.images', 'eval.data')
NAMES = ('model.decoder', 'model.tower', 'data.tokenizer')  # a path, or a name that hub_id() tells from one


def hub_id(name: str) -> str | None:
    """The hub's id that a model's or tokenizer's name stands for, or None where it names a folder. The rule:

    hf:OWNER/NAME is an id of the hub; what begins with ./ ../ / or ~, and what exists, is a path; all else is an id.
    """
    if name.startswith('hf:'):
        return name.removeprefix('hf:')
    if name.startswith(('./', '../', '/', '~')) or os.path.exists(name):
        return None
    return name


def to_json(config: Config) -> str:
    """The config as text, as config.json in its run folder holds it: with portable paths (see folder.py)."""
    kept = dataclasses.asdict(config)
    for name in (*PATHS, *NAMES):
        value = get(config, name)
        path = value and (name in PATHS or (value != TRAINED and hub_id(value) is None))
        _put(kept, name, runfolder.portable(value, config.run_dir) if path else value)
    return json.dumps(kept | {'run_dir': '.'}, indent=2) + '\n'


def save(config: Config):
    """Writes config.json into config.run_dir."""
    runfolder.write_whole(runfolder.Paths(config.run_dir).config, to_json(config))


def read(run_dir) -> Config:
    """The Config of a run folder, its paths as they are from here. Raises UserError where there is none, or damaged."""
    values = runfolder.read_json(runfolder.Paths(run_dir).config)
    config = from_dict(values, run_dir)
    origin = runfolder.origin_of(run_dir, config.run_dir)
    for name in (*PATHS, *NAMES):
        value = get(config, name)
        if value and (name in PATHS or runfolder.is_portable(value) or os.path.exists(os.path.join(origin, value))):
            put(config, name, runfolder.resolve(value, run_dir, origin))
    # Where it lies, whatever the file says; '.' has no parent, which the family is.
    config.run_dir = str(run_dir) if pathlib.Path(run_dir).name not in ('', '..') else os.path.abspath(run_dir)
    if config.stage not in STAGES or 'stage' not in values:
        raise UserError(f'config.json in {run_dir} is damaged: its stage is {values.get("stage")!r}.')
    try:
        check_values(config)
        check_model(config)
    except UserError as error:
        raise UserError(f'config.json in {run_dir} is damaged: {error}') from error
    if config.data.source == 'tiny_world' and not os.path.isdir(config.data.path):
        config.data.path = str(config.family / 'data')  # it would be made where the file says
    return config


def from_dict(values: dict, where) -> Config:
    """The Config of `values`, a config.json's content as it stands. Raises UserError naming `where` it was found."""

    def build(kind, values):
        hints = typing.get_type_hints(kind)
        if not isinstance(values, dict):
            raise UserError(f'config.json in {where} is damaged: {values!r} is no group of fields.')
        if unknown := set(values) - set(hints):
            raise UserError(f'config.json in {where} has a field this version does not know: {sorted(unknown)[0]!r}.')
        made = {}
        for name, value in values.items():
            if name == 'remat' and isinstance(value, bool):
                value = 'full' if value else 'none'  # of before 2026-11-26
            if dataclasses.is_dataclass(hints[name]):
                made[name] = build(hints[name], value)
            else:
                made[name] = tuple(value) if isinstance(value, list) else value
                wanted = typing.get_origin(hints[name]) or hints[name]
                if not isinstance(made[name], int | float if wanted is float else wanted):
                    raise UserError(f'config.json in {where} is damaged: {name} is {value!r}.')
        return kind(**made)

    return build(Config, values)


def public(config: Config) -> dict:
    """The config as a dict for others to see: of every path, only its last part."""
    kept = dataclasses.asdict(config)
    for name in (*PATHS, *NAMES, 'run_dir'):
        value = get(config, name)
        if name not in NAMES or (value and hub_id(value) is None):
            _put(kept, name, os.path.basename(os.path.normpath(value)) if value else '')
    _put(kept, 'checkpoint.mirror', '')
    return kept


def _put(tree, name, value):
    *parts, field = name.split('.')
    for part in parts:
        tree = tree[part]
    tree[field] = value


def differences(old: Config, new: Config) -> list[str]:
    """Dotted names of the fields in which two runs' results may differ.

    Where a run lives, how it reads, saves, logs, evaluates, and on which mesh and by which kernels it runs may change
    between a run and its continuation.
    """
    free = (
        'name',
        'run_dir',
        'allow_unfinished_parent',
        'data.workers',
        'data.timeout',
        'checkpoint.',
        'eval.',
        'log.',
        'mesh.',
        'model.attention',
        'model.remat',
    )
    names = [name for name in fields(Config) if not name.startswith(free)]
    return [name for name in names if not equal(name, get(old, name), get(new, name))]


def equal(name: str, a, b) -> bool:
    """Whether two values of a field are the same; a path may be written in two ways."""
    paths = name in PATHS or (name in NAMES and TRAINED not in (a, b))
    return a == b or (paths and bool(a and b) and os.path.abspath(a) == os.path.abspath(b))
