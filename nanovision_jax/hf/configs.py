"""config.json of published decoders and towers, in and out; and where a model's files are. No jax is imported here."""

import pathlib

import huggingface_hub

from nanovision_jax.config import Model, Vision, options
from nanovision_jax.errors import UserError
from nanovision_jax.runs.config_file import hub_id
from nanovision_jax.runs.folder import read_json

DECODERS = ('llama', 'qwen2', 'qwen3', 'gpt_neox')  # architectures of decoders, as config.json calls them
TOWERS = ('clip', 'siglip')
_SCALING = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')


# Where a model's files are --------------------------------------------------------------------------------------------


def model_folder(source, files: str = 'config.json and model.safetensors') -> pathlib.Path:
    """The folder of a model: `source` itself, or the hub's files of that id (see runconfig.hub_id), downloaded once.

    Raises UserError for what is neither; it names the `files` that a folder must hold.
    """
    source = str(source)
    if (name := hub_id(source)) is None:
        folder = pathlib.Path(source).expanduser()
        if folder.is_dir():
            return folder
        raise UserError(f'{source!r} is no folder: name one that holds {files}, or a hub id as OWNER/NAME.')
    try:
        wanted = ['*.json', '*.safetensors', 'merges.txt', 'tokenizer.model', '*.jinja']
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except (huggingface_hub.errors.HFValidationError, huggingface_hub.errors.HTTPError, OSError) as error:
        raise UserError(
            f'{source!r} is no folder here, and as a hub id it gives no model ({type(error).__name__}: not there, or '
            f'the hub is out of reach): check the name. Offline, place {files} in a folder and name that.'
        ) from error


def decoder_folder(source) -> pathlib.Path:
    """The folder of a decoder: a folder, or the hub's files of an id. Raises UserError for what is neither."""
    return model_folder(source, 'config.json, model.safetensors and tokenizer.json')


def tower_folder(source) -> pathlib.Path:
    """The same of a tower."""
    return model_folder(source, 'config.json, preprocessor_config.json and model.safetensors')


# Decoders -------------------------------------------------------------------------------------------------------------


def decoder_config(theirs: dict, where: pathlib.Path) -> dict:
    """The fields of config.Model that a decoder's config.json (a dict) sets; `where` it was found is for the error.

    Raises UserError for another architecture, and for what our decoder cannot represent.
    """
    architecture = theirs.get('model_type')
    if architecture not in DECODERS:
        raise UserError(
            f'{where} holds a {architecture!r} model: a decoder is llama (SmolLM2 too), qwen2, qwen3, or gpt_neox as '
            'we write it.'
        )
    rope = theirs.get('rope_scaling') or theirs.get('rope_parameters') or {}  # in transformers' order
    kind = rope.get('rope_type', rope.get('type', 'default'))
    neox, act = architecture == 'gpt_neox', theirs.get('hidden_act', 'silu')
    partial = theirs.get('rotary_pct', rope.get('partial_rotary_factor', 1.0))
    refused = {
        f'rope type {kind!r}': kind not in (('default',) if neox else ('default', 'llama3')),
        f'hidden_act {act!r}': act != ('relu' if neox else 'silu'),
        'a sliding window': bool(theirs.get('use_sliding_window')),
        'a parallel residual (use_parallel_residual)': neox and bool(theirs.get('use_parallel_residual', True)),
        f'rotary positions on {partial} of a head': neox and partial != 1.0,
        'no bias on the attention output (attention_bias)': neox and not theirs.get('attention_bias', True),
        'a bias in the feed-forward layer': bool(theirs.get('mlp_bias')),
        'a bias on the attention output': architecture in ('llama', 'qwen3') and bool(theirs.get('attention_bias')),
    }
    if any(refused.values()):
        raise UserError(f'{where} has {next(n for n, bad in refused.items() if bad)}, which our decoder lacks.')
    theta = rope.get('rope_theta') or theirs.get('rope_theta') or theirs.get('rotary_emb_base') or 1e4
    fields = dict(
        layers=theirs['num_hidden_layers'], width=theirs['hidden_size'], heads=theirs['num_attention_heads'],
        ffn=theirs['intermediate_size'], positions=theirs['max_position_embeddings'], rope_theta=float(theta),
        tied=bool(theirs.get('tie_word_embeddings', False)),
    )  # fmt: skip
    if neox:
        return fields | dict(flavour='gpt', epsilon=theirs.get('layer_norm_eps', 1e-5))
    size = 128 if architecture == 'qwen3' else theirs['hidden_size'] // theirs['num_attention_heads']
    return fields | dict(
        flavour='llama', epsilon=theirs.get('rms_norm_eps', 1e-6),
        kv_heads=theirs.get('num_key_value_heads') or theirs['num_attention_heads'],
        head_dim=theirs.get('head_dim') or size, qkv_bias=architecture == 'qwen2', qk_norm=architecture == 'qwen3',
        rope_scaling=tuple(float(rope[name]) for name in _SCALING) if kind == 'llama3' else (),
    )  # fmt: skip


def read_decoder_config(folder: pathlib.Path) -> dict:
    """decoder_config() of a folder."""
    return decoder_config(read_json(folder / 'config.json'), folder)


def architecture_of(model: Model) -> str:
    """The name of the architecture that a config.Model is written as. Raises UserError if there is none."""
    if model.flavour == 'gpt':
        return 'gpt_neox'
    if model.qkv_bias and model.qk_norm:
        raise UserError(
            'no published architecture has both model.qkv_bias and model.qk_norm: this model cannot be written.'
        )
    return 'qwen3' if model.qk_norm else 'qwen2' if model.qkv_bias else 'llama'


def decoder_json(model: Model, vocab_size: int) -> dict:
    """A decoder's config.json of a config.Model; tokens and dtype are for the caller to add."""
    architecture = architecture_of(model)
    rope = {'rope_type': 'default', 'rope_theta': model.rope_theta}
    shared = dict(
        model_type=architecture, vocab_size=vocab_size, hidden_size=model.width, intermediate_size=model.ffn,
        num_hidden_layers=model.layers, num_attention_heads=model.heads, max_position_embeddings=model.positions,
        tie_word_embeddings=model.tied, use_cache=True,
    )  # fmt: skip
    if architecture == 'gpt_neox':
        return {'architectures': ['GPTNeoXForCausalLM']} | shared | dict(
            hidden_act='relu', layer_norm_eps=model.epsilon, use_parallel_residual=False, attention_bias=True,
            attention_dropout=0.0, hidden_dropout=0.0, rotary_pct=1.0, rotary_emb_base=model.rope_theta,
            rope_parameters=rope | {'partial_rotary_factor': 1.0},
        )  # fmt: skip
    if model.rope_scaling:
        rope |= {'rope_type': 'llama3'} | dict(zip(_SCALING, model.rope_scaling, strict=True))
        rope['original_max_position_embeddings'] = int(rope['original_max_position_embeddings'])
    return {'architectures': [f'{architecture.capitalize()}ForCausalLM']} | shared | dict(
        hidden_act='silu', rms_norm_eps=model.epsilon, num_key_value_heads=model.kv_heads or model.heads,
        head_dim=model.head_size, attention_bias=False, attention_dropout=0.0, rope_parameters=rope,
        rope_theta=model.rope_theta,
    )  # fmt: skip


# Towers ---------------------------------------------------------------------------------------------------------------


def vision_config(folder: pathlib.Path) -> Vision:
    """The config.Vision of a folder with a CLIP or SigLIP model, whole or the tower alone, and its preprocessing.

    Raises UserError for another architecture, and for preprocessing that we do not do.
    """
    config, image = read_json(folder / 'config.json'), _preprocessor(folder)
    config = config['vision_config'] if config.get('model_type') == 'llava' else config
    kind = str(config.get('model_type', '')).removesuffix('_vision_model').replace('siglip2', 'siglip')
    if kind not in TOWERS:
        raise UserError(f'{folder} holds a {config.get("model_type")!r} model: a tower is {" or ".join(TOWERS)}.')
    theirs = _DEFAULTS[kind] | config.get('vision_config', config)
    activation = {'gelu_pytorch_tanh': 'gelu_tanh'}.get(theirs['hidden_act'], theirs['hidden_act'])
    activations = options(Vision)['activation'].metadata['choices']
    if activation not in activations:
        raise UserError(f'{folder} wants hidden_act {theirs["hidden_act"]!r}: there are {", ".join(activations)}.')
    if 'num_patches' in theirs:
        raise UserError(f'{folder} is a NaFlex tower, which has no fixed resolution: take a fixed one.')
    size, stretched = theirs['image_size'], isinstance(image['size'], dict) and 'height' in image['size']
    if image.get('do_pad'):
        fit = 'pad'
    elif stretched:  # nothing is left to be cropped then
        fit = 'stretch'
    elif image.get('do_center_crop', kind == 'clip'):
        fit = 'crop'
    elif kind == 'siglip':
        fit = 'stretch'
    else:
        raise UserError(f'{folder} neither crops (do_center_crop) nor stretches its images to a square.')
    for name in ('size',) if fit == 'stretch' else ('size', 'crop_size'):
        wanted = image.get(name, size)
        if set(wanted.values() if isinstance(wanted, dict) else [wanted]) != {size}:
            raise UserError(f'{folder} has {name} {wanted} for a tower of {size} pixels: they must be equal.')
    return Vision(
        kind=kind, image_size=size, patch_size=theirs['patch_size'], width=theirs['hidden_size'],
        layers=theirs['num_hidden_layers'], heads=theirs['num_attention_heads'], ffn=theirs['intermediate_size'],
        activation=activation, epsilon=theirs['layer_norm_eps'], fit=fit,
        resample={2: 'bilinear', 3: 'bicubic'}[image['resample']],
        mean=tuple(image['image_mean']), std=tuple(image['image_std']),
    )  # fmt: skip


def tower_json(vision: Vision) -> dict:
    """The way back: a tower's config.json of a config.Vision."""
    alone = {'vision_use_head': False} if vision.kind == 'siglip' else {}  # without its pooling head
    return alone | dict(
        model_type=f'{vision.kind}_vision_model', image_size=vision.image_size, patch_size=vision.patch_size,
        hidden_size=vision.width, num_hidden_layers=vision.layers, num_attention_heads=vision.heads,
        intermediate_size=vision.ffn, layer_norm_eps=vision.epsilon, num_channels=3, attention_dropout=0.0,
        hidden_act={'gelu_tanh': 'gelu_pytorch_tanh'}.get(vision.activation, vision.activation),
    )  # fmt: skip


# What config.json leaves out where it has this value.
_DEFAULTS = {
    'clip': dict(image_size=224, patch_size=32, hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    | dict(intermediate_size=3072, hidden_act='quick_gelu', layer_norm_eps=1e-5),
    'siglip': dict(image_size=224, patch_size=16, hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    | dict(intermediate_size=3072, hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6),
}


def _preprocessor(folder):
    """What preprocessor_config.json says, or the newer processor_config.json."""
    file = folder / 'preprocessor_config.json'
    content = read_json(file) if file.is_file() else read_json(folder / 'processor_config.json').get('image_processor')
    missing = {'size', 'image_mean', 'image_std', 'resample'} - set(content or {})
    if missing:
        raise UserError(f'{folder} does not say how images are prepared: {", ".join(sorted(missing))} missing.')
    if content['resample'] not in (2, 3):
        raise UserError(f'{file} wants resample {content["resample"]}: there are 2 (bilinear) and 3 (bicubic).')
    return content
