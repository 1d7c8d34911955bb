"""Where examples come from: the built-in tiny_world, prepared sets, and files of conversations."""

import json
import pathlib

from nanovision_jax.data.catalog import PREPARED_VERSION
from nanovision_jax.data.sources.base import Concatenated, Example, Source
from nanovision_jax.data.sources.conversations import Conversations
from nanovision_jax.data.sources.prepared import Prepared
from nanovision_jax.data.sources.tiny_world import TinyWorldSource
from nanovision_jax.errors import UserError
from nanovision_jax.stages import stage_of

__all__ = ['Concatenated', 'Conversations', 'Example', 'Prepared', 'Source', 'TinyWorldSource', 'open_source']

# What a stage's kind of data is of tiny_world.
_VIEWS = {'pairs': 'caption', 'captions': 'caption', 'conversations': 'conversation', 'chat': 'chat'}


def open_source(config, split: str) -> Source:
    """The conversations that a stage learns from, or, for another split, is evaluated on."""
    data, kind = config.data, stage_of(config).data
    if data.prepared:
        opened = open_prepared(config, split)
        return opened[0] if len(opened) == 1 else Concatenated(opened)
    if data.source == 'tiny_world':
        return TinyWorldSource(data.local_path, split, _VIEWS[kind])
    if split not in ('train', 'validation'):
        raise UserError(f'{data.path} has no {split} split: conversations have train and validation.')
    return Conversations(data.local_path, data.local_images, text_only=kind == 'chat')


def open_prepared(config, split: str) -> list[Prepared]:
    """The prepared sets that a config names, opened."""
    if split not in ('train', 'validation'):
        raise UserError(f'prepared data has no {split} split: it has train and validation.')
    text_only = stage_of(config).data == 'chat'
    return [Prepared(config.data.local_path, part.name, split, part.subset, text_only) for part in config.data.prepared]


def provenance(data) -> dict:
    """What lineage.json says of a config.Data; of prepared sets also what they were made from."""
    told = {'source': data.source, 'path': data.path, 'images': data.images, 'mixture': data.mixture}
    for part in data.prepared:
        home = pathlib.Path(data.local_path) / part.name
        files = [file for file in (home / PREPARED_VERSION / 'source.json', home / 'source.json') if file.exists()]
        told.setdefault('prepared', {})[part.name] = [json.loads(file.read_text()) for file in files]
    return told
