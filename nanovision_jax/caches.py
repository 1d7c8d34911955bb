"""Where this machine keeps what lies elsewhere or can be made again, for all of a user's runs."""

import os
import pathlib

from nanovision_jax.errors import UserError


def home() -> pathlib.Path:
    """~/.cache/nanovision_jax; XDG_CACHE_HOME names another folder than ~/.cache."""
    return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'nanovision_jax'


def is_url(place) -> bool:
    """Whether a place, a text or a path, is in a store, as s3://… or gs://…"""
    return '://' in str(place)


def local(place: str) -> str:
    """Where a file or folder of a store lies on this machine once it is fetched (data/stores.py); a path as it is."""
    if not is_url(place):
        return place
    store, _, path = place.partition('://')
    parts = [part for part in path.split('/') if part]
    if not parts or {'.', '..'} & set(parts):
        raise UserError(f'{place} names nothing in a store: say it as in s3://BUCKET/FOLDER.')
    return str(home() / 'data' / store / pathlib.Path(*parts))
