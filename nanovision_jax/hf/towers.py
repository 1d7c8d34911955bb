"""CLIP's and SigLIP's vision towers."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from nanovision_jax.config import Vision
from nanovision_jax.data import images
from nanovision_jax.errors import UserError
from nanovision_jax.hf.weights import (
    HEADS_BIAS,
    INTO_HEADS,
    LINEAR,
    OUT_OF_HEADS,
    PATCH,
    SAME,
    find,
    open_weights,
    read_json,
    take,
)
from nanovision_jax.models.clip import ACTIVATIONS, VisionTower

# Our name: (their names, layout). {} is the layer; three names are the parts of one of ours, in our order.
_BLOCK = {
    'blocks/attention_norm/scale': ('encoder.layers.{}.layer_norm1.weight', SAME),
    'blocks/attention_norm/bias': ('encoder.layers.{}.layer_norm1.bias', SAME),
    'blocks/qkv/kernel': (tuple(f'encoder.layers.{{}}.self_attn.{n}_proj.weight' for n in 'qkv'), INTO_HEADS),
    'blocks/qkv/bias': (tuple(f'encoder.layers.{{}}.self_attn.{n}_proj.bias' for n in 'qkv'), HEADS_BIAS),
    'blocks/out/kernel': ('encoder.layers.{}.self_attn.out_proj.weight', OUT_OF_HEADS),
    'blocks/out/bias': ('encoder.layers.{}.self_attn.out_proj.bias', SAME),
    'blocks/ffn_norm/scale': ('encoder.layers.{}.layer_norm2.weight', SAME),
    'blocks/ffn_norm/bias': ('encoder.layers.{}.layer_norm2.bias', SAME),
    'blocks/ffn_in/kernel': ('encoder.layers.{}.mlp.fc1.weight', LINEAR),
    'blocks/ffn_in/bias': ('encoder.layers.{}.mlp.fc1.bias', SAME),
    'blocks/ffn_out/kernel': ('encoder.layers.{}.mlp.fc2.weight', LINEAR),
    'blocks/ffn_out/bias': ('encoder.layers.{}.mlp.fc2.bias', SAME),
}
TOWERS = {
    'clip': _BLOCK
    | {
        'patch/kernel': ('embeddings.patch_embedding.weight', PATCH),
        'class_token': ('embeddings.class_embedding', SAME),
        'position': ('embeddings.position_embedding.weight', SAME),
        'norm_in/scale': ('pre_layrnorm.weight', SAME),  # spelled so in the published files
        'norm_in/bias': ('pre_layrnorm.bias', SAME),
        'norm_out/scale': ('post_layernorm.weight', SAME),
        'norm_out/bias': ('post_layernorm.bias', SAME),
    },
    'siglip': _BLOCK
    | {
        'patch/kernel': ('embeddings.patch_embedding.weight', PATCH),
        'patch/bias': ('embeddings.patch_embedding.bias', SAME),
        'position': ('embeddings.position_embedding.weight', SAME),
        'norm_out/scale': ('post_layernorm.weight', SAME),
        'norm_out/bias': ('post_layernorm.bias', SAME),
    },
}
# What a file holds beside the tower: the text half of a whole model, its projections, SigLIP's pooling head.
BESIDE = (
    *('text_model.*', 'visual_projection.*', 'text_projection.*', 'logit_scale', 'logit_bias'),
    *('*embeddings.position_ids', 'head.*'),
)


def find_tower(source):
    """The folder of a tower: a folder, or the hub's files of an id. Raises UserError for what is neither."""
    return find(source, 'config.json, preprocessor_config.json and model.safetensors')


def vision_config(folder) -> Vision:
    """The config.Vision of a folder with a CLIP or SigLIP model, whole or the tower alone, and its preprocessing.

    Raises UserError for another family, and for preprocessing that we do not do.
    """
    config, picture = read_json(folder / 'config.json'), _preprocessor(folder)
    config = config['vision_config'] if config.get('model_type') == 'llava' else config
    family = str(config.get('model_type', '')).removesuffix('_vision_model').replace('siglip2', 'siglip')
    if family not in TOWERS:
        raise UserError(f'{folder} holds a {config.get("model_type")!r} model: a tower is {" or ".join(TOWERS)}.')
    theirs = _DEFAULTS[family] | config.get('vision_config', config)
    activation = {'gelu_pytorch_tanh': 'gelu_tanh'}.get(theirs['hidden_act'], theirs['hidden_act'])
    if activation not in ACTIVATIONS:
        raise UserError(f'{folder} wants hidden_act {theirs["hidden_act"]!r}: there are {", ".join(ACTIVATIONS)}.')
    if 'num_patches' in theirs:
        raise UserError(f'{folder} is a NaFlex tower, which has no fixed resolution: take a fixed one.')
    size, stretched = theirs['image_size'], isinstance(picture['size'], dict) and 'height' in picture['size']
    if picture.get('do_pad'):
        fit = 'pad'
    elif picture.get('do_center_crop', family == 'clip'):
        fit = 'crop'
    elif stretched or family == 'siglip':
        fit = 'stretch'
    else:
        raise UserError(f'{folder} neither crops (do_center_crop) nor stretches its pictures to a square.')
    for name in ('size',) if fit == 'stretch' else ('size', 'crop_size'):
        wanted = picture.get(name, size)
        if set(wanted.values() if isinstance(wanted, dict) else [wanted]) != {size}:
            raise UserError(f'{folder} has {name} {wanted} for a tower of {size} pixels: they must be equal.')
    return Vision(
        kind=family, image_size=size, patch_size=theirs['patch_size'], width=theirs['hidden_size'],
        layers=theirs['num_hidden_layers'], heads=theirs['num_attention_heads'], ffn=theirs['intermediate_size'],
        activation=activation, epsilon=theirs['layer_norm_eps'], fit=fit,
        resample={2: 'bilinear', 3: 'bicubic'}[picture['resample']],
        mean=tuple(picture['image_mean']), std=tuple(picture['image_std']),
    )  # fmt: skip


def tower_json(vision) -> dict:
    """The way back: a tower's config.json of a config.Vision."""
    alone = {'vision_use_head': False} if vision.kind == 'siglip' else {}  # without its pooling head
    return alone | dict(
        model_type=f'{vision.kind}_vision_model', image_size=vision.image_size, patch_size=vision.patch_size,
        hidden_size=vision.width, num_hidden_layers=vision.layers, num_attention_heads=vision.heads,
        intermediate_size=vision.ffn, layer_norm_eps=vision.epsilon, num_channels=3, attention_dropout=0.0,
        hidden_act={'gelu_tanh': 'gelu_pytorch_tanh'}.get(vision.activation, vision.activation),
    )  # fmt: skip


# What the families' config.json leaves out where it is so.
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
        raise UserError(f'{folder} does not say how pictures are prepared: {", ".join(sorted(missing))} missing.')
    if content['resample'] not in (2, 3):
        raise UserError(f'{file} wants resample {content["resample"]}: there are 2 (bilinear) and 3 (bicubic).')
    return content


def tower_weights(folder, shapes):
    """The parameters (nested dicts like `shapes`) of a tower from a folder. Raises UserError where they do not fit."""
    return take_tower(open_weights(folder), vision_config(folder).kind, shapes)


def take_tower(weights, kind, shapes):
    """The same out of weights already opened. kind: clip or siglip."""
    if not (tower := weights.part('vision_model.')).tensors:
        return take(weights, TOWERS[kind], shapes, BESIDE)
    weights.refuse(weights.unknown([f'vision_model.{n}' for n in tower.tensors], BESIDE))
    return take(tower, TOWERS[kind], shapes, BESIDE)


def load_vision_tower(source, layer: int = -2, dtype=jnp.float32):
    """(tower, preprocess) of a CLIP or SigLIP model: a folder, or a Hugging Face id.

    tower(pixels float32 [B, H, W, 3]) → [B, P, D]: patch tokens after layer `layer`, counted as transformers counts
    hidden_states, without class token and final norm. preprocess(PIL pictures) → pixels.
    Raises UserError for another family, and for weights that do not fit.
    """
    folder = find_tower(source)
    cfg = vision_config(folder)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VisionTower(cfg, dtype, nnx.Rngs(0))))
    params = jax.device_put(tower_weights(folder, nnx.to_pure_dict(state)))  # once, not at each call
    run = jax.jit(lambda params, pixels: nnx.merge(graphdef, params).features(pixels, layer))

    def preprocess(pictures) -> Float[Array, 'B H W 3']:
        prepared = np.stack([images.prepare(images.to_rgb(picture), cfg) for picture in pictures])
        return (prepared / np.float32(255) - np.float32(cfg.mean)) / np.float32(cfg.std)

    return lambda pixels: run(params, pixels), preprocess
