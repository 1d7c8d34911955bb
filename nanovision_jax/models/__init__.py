"""The models: decoder, CLIP towers (clip), and both joined by a projector (vlm)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from nanovision_jax.models import kernels
from nanovision_jax.models.clip import CLIP
from nanovision_jax.models.decoder import Decoder
from nanovision_jax.models.layers import Quantized, padded, platform
from nanovision_jax.models.vlm import VLM
from nanovision_jax.stages import stage_of


def compute_dtype(name: str):
    """The dtype of compute: as named, or for 'auto' bfloat16 where the hardware likes it and float32 on CPU."""
    if name == 'auto':
        name = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
    return jnp.dtype(name)


def build(config, vocab_size: int, image_token: int, rngs: nnx.Rngs) -> nnx.Module:
    """The model of a stage: CLIP, Decoder or VLM. `config` is a config.Config; what it leaves open is settled here."""
    dtype, kind = compute_dtype(config.dtype), stage_of(config).model
    remat = 'none' if config.model.remat == 'auto' else config.model.remat
    cfg = dataclasses.replace(config.model, attention=attention_kernel(config)[0], remat=remat)
    if kind == 'clip':
        return CLIP(cfg, padded(vocab_size), config.data.length, dtype, rngs)
    if kind == 'vlm':
        return VLM(cfg, vocab_size, image_token, dtype, rngs)
    return Decoder(cfg, vocab_size, dtype, rngs)


def attention_kernel(config) -> tuple[str, str]:
    """(the kernel that model.attention comes to on this hardware, why). Raises UserError for one that cannot do it."""
    model, dtype, packed = config.model, compute_dtype(config.dtype), stage_of(config).decodes
    towers = max(part.width // part.heads for part in (model.vision, model.text))
    head_size = model.head_size if packed else towers
    return kernels.choose(model.attention, platform(), dtype, packed, head_size, config.data.length)


def abstract(config, vocab_size: int, image_token: int):
    """(graphdef, parameters as ShapeDtypeStructs in nested dicts) of a stage's model; allocates nothing."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(config, vocab_size, image_token, nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


def decoder_of(model):
    """The decoder of a model that has one: the model itself, or a part of it."""
    return model.decoder if isinstance(model, VLM) else model


def merge(graphdef, params):
    """The live module of parameters in nested dicts. Shapes are not checked here: checkpoint.restore() does that.

    A Quantized kernel is multiplied with as it is; an embedding becomes the matrix that it stands for.
    """
    kernels = {}

    def plain(path, leaf):
        if not isinstance(leaf, Quantized):
            return leaf
        if path[-1].key != 'kernel':
            return leaf.matrix()
        kernels[path] = leaf
        return leaf.values

    params = jax.tree_util.tree_map_with_path(plain, params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    model = nnx.merge(graphdef, params)
    for path, leaf in kernels.items():
        module = model
        for part in path[:-1]:
            module = module[part.key] if isinstance(part.key, int) else getattr(module, part.key)
        module.dot_general = leaf.product
    return model


def unstack(graphdef, params):
    """(graphdef, params) of the same model with its decoder's blocks one by one: see Decoder.unstack()."""
    model = nnx.merge(graphdef, params)
    decoder_of(model).unstack()
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)
