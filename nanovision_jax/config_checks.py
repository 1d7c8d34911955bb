"""What a config may not be: mistakes are found before any time is spent. No jax is imported."""

import math

from nanovision_jax.config import UNKNOWN, Config, get, options
from nanovision_jax.data import catalog
from nanovision_jax.errors import UserError, nearest
from nanovision_jax.runs import trackers
from nanovision_jax.stages import stage_of


def check(config: Config):
    """Raises UserError where a field is out of its bounds or fields contradict each other, before any time is spent."""
    check_values(config)
    check_model(config)
    m, d, o = config.model, config.data, config.optim
    if config.steps == 0 and config.epochs == 0:
        raise UserError('how long? Set steps above 0, or steps=0 and epochs above 0.')
    if stage_of(config).decodes and d.length > m.positions:
        raise UserError(f'data.length {d.length} is beyond model.positions {m.positions}.')
    if d.batch_size % o.parts:
        raise UserError(f'data.batch_size {d.batch_size} does not divide into optim.accumulate={o.accumulate} parts.')
    trackers.names(config.log.to)
    _check_data(config)


def check_values(config: Config):
    """Raises UserError where a value is none of its field's choices, out of its bounds, or no finite number."""
    for name, field in options(Config).items():
        value, limits = get(config, name), field.metadata
        if limits['choices'] and value not in limits['choices']:
            raise UserError(f'{name} is {value!r}.{nearest(value, limits["choices"])}')
        numbers = value if isinstance(value, tuple) else [value] if isinstance(value, int | float) else []
        if not all(math.isfinite(number) for number in numbers):
            raise UserError(f'{name} is {value}, and must be finite.')
        if limits['above'] is not None and value <= limits['above']:
            raise UserError(f'{name} is {value}, and must be above {limits["above"]}.')
        if limits['least'] is not None and value < limits['least']:
            raise UserError(f'{name} is {value}, and must not be below {limits["least"]}.')
        if limits['below'] is not None and value >= limits['below']:
            raise UserError(f'{name} is {value}, and must be below {limits["below"]}.')


def check_model(config: Config):
    """Raises UserError where the sizes of a model do not go together."""
    m = config.model
    for name, part in (('model', m), ('model.vision', m.vision), ('model.text', m.text)):
        if part.width % part.heads and not (part is m and m.head_dim):
            raise UserError(f'{name}.width {part.width} is not a multiple of {name}.heads {part.heads}.')
    llama_only = [n for n in ('kv_heads', 'head_dim', 'qkv_bias', 'qk_norm', 'rope_scaling') if getattr(m, n)]
    if m.flavour == 'gpt' and llama_only:
        raise UserError(f"model.{llama_only[0]} is for model.flavour 'llama'.")
    if m.heads % (m.kv_heads or m.heads):
        raise UserError(f'model.heads {m.heads} is not a multiple of model.kv_heads {m.kv_heads}.')
    if len(m.rope_scaling) not in (0, 4):
        raise UserError('model.rope_scaling takes four numbers: factor, low and high frequency factor, context.')
    if m.head_size % 2:
        raise UserError(
            f'heads of {m.head_size} cannot be rotated in pairs (RoPE): make model.width / model.heads even.'
        )
    if m.vision.image_size % m.vision.patch_size:
        raise UserError(
            f'model.vision.image_size {m.vision.image_size} is not a multiple of patch_size {m.vision.patch_size}.'
        )


def _check_data(config):
    """Raises UserError where the stage cannot learn from what data.source and data.mixture name."""
    d = config.data
    part, known = d.named, (*catalog.OWN_SOURCES, *catalog.SETS)
    if part.name == UNKNOWN:
        raise UserError('data.source is unknown: say what to learn from, as in --config.data.source=conversations.')
    if part.name not in known and not d.mixture:
        raise UserError(f'data.source is {part.name!r}.{nearest(part.name, known)}')
    if part.subset and part.name not in catalog.SETS:
        raise UserError(f'data.source {d.source!r}: only prepared sets are taken in part.')
    if d.cache_features and not stage_of(config).sees:
        raise UserError(
            f'data.cache_features keeps what a frozen tower makes of pictures: stage {config.stage} has no such tower.'
        )
    if d.cache_features and d.augment:
        raise UserError('data.cache_features keeps one view of a picture, and data.augment makes new ones: choose one.')
    learns = stage_of(config).data
    if d.mixture and learns == 'text':
        raise UserError(
            f'data.mixture mixes conversations: stage {config.stage} learns from text, one data.source of it.'
        )
    names = [part.name for part in d.prepared] or [part.name]
    if learns != 'text' and (text := {'text', *catalog.TOKENS} & set(names)):
        raise UserError(f'stage {config.stage} learns from conversations: data.source {text.pop()!r} is for pretrain.')
    if learns == 'text' and {'conversations', *catalog.CONVERSATIONS} & set(names):
        raise UserError(f"stage {config.stage} learns from text: set data.source to 'fineweb_edu', 'text' or 'shards'.")
    blind = [name for name in names if name in catalog.SETS and not catalog.SETS[name].has_images]
    if learns == 'pairs' and blind:
        raise UserError(f'stage {config.stage} learns from pictures with captions: {blind[0]} has none.')
    if part.name != 'tiny_world' and not d.path:
        raise UserError(f'data.source {d.source!r} needs data.path: the file or folder to read.')
