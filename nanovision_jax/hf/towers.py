"""CLIP's and SigLIP's vision towers."""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from nanovision_jax.data import images
from nanovision_jax.hf.configs import tower_folder, vision_config
from nanovision_jax.hf.weights import (
    HEADS_BIAS,
    INTO_HEADS,
    LINEAR,
    OUT_OF_HEADS,
    PATCH,
    SAME,
    Weights,
    from_hf,
    open_weights,
)
from nanovision_jax.models.clip import VisionTower

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
# What a file holds besides the tower: the text half of a whole model, its projections, SigLIP's pooling head.
IGNORED = (
    *('text_model.*', 'visual_projection.*', 'text_projection.*', 'logit_scale', 'logit_bias'),
    *('*embeddings.position_ids', 'head.*'),
)


def tower_weights(folder: pathlib.Path, shapes: dict) -> dict:
    """The parameters (nested dicts like `shapes`) of a tower from a folder. Raises UserError where they do not fit."""
    return tower_from_hf(open_weights(folder), vision_config(folder).kind, shapes)


def tower_from_hf(weights: Weights, kind: str, shapes: dict) -> dict:
    """The same out of weights already opened. kind: clip or siglip."""
    if not (tower := weights.part('vision_model.')).tensors:
        return from_hf(weights, TOWERS[kind], shapes, IGNORED)
    weights.refuse(weights.unknown([f'vision_model.{n}' for n in tower.tensors], IGNORED))
    return from_hf(tower, TOWERS[kind], shapes, IGNORED)


def load_vision_tower(source, layer: int = -2, dtype=jnp.float32) -> tuple[Callable, Callable]:
    """(tower, preprocess) of a CLIP or SigLIP model: a folder, or a Hugging Face id.

    tower(pixels float32 [B, H, W, 3]) → [B, P, D]: patch tokens after layer `layer`, counted as transformers counts
    hidden_states, without class token and final norm. preprocess(PIL images) → pixels.
    Raises UserError for another architecture, and for weights that do not fit.
    """
    folder = tower_folder(source)
    cfg = vision_config(folder)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VisionTower(cfg, dtype, nnx.Rngs(0))))
    params = jax.device_put(tower_weights(folder, nnx.to_pure_dict(state)))  # once, not at each call
    run = jax.jit(lambda params, pixels: nnx.merge(graphdef, params).features(pixels, layer))

    def preprocess(given) -> Float[Array, 'B H W 3']:
        prepared = np.stack([images.prepare(images.to_rgb(image), cfg) for image in given])
        return (prepared / np.float32(255) - np.float32(cfg.mean)) / np.float32(cfg.std)

    return lambda pixels: run(params, pixels), preprocess
