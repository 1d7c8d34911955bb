"""Hugging Face weights in: CLIP's and SigLIP's vision towers; Llama, SmolLM2, Qwen2 and Qwen3 as decoders.

    from nanovision_jax.hf import load_vision_tower
    tower, preprocess = load_vision_tower('openai/clip-vit-large-patch14')
    features = tower(preprocess([picture]))        # [B, P, D]

Training takes them as --config.model.tower=… and --config.model.decoder=….

A family is a table: our parameter, its names there, and how its axes turn. Only safetensors are read, never a pickle;
names in a file are looked up in the table, never used as paths.
"""

import fnmatch
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from nanovision_jax.config import Vision
from nanovision_jax.data import images
from nanovision_jax.errors import UserError
from nanovision_jax.models.clip import ACTIVATIONS, VisionTower
from nanovision_jax.parallel import path_name


class Layout(NamedTuple):
    """How one of our arrays lies in a file: `there(ours)`, and back with `here(theirs, shape of ours)`."""

    there: Callable
    here: Callable


SAME = Layout(lambda x: x, lambda x, shape: x.reshape(shape))
LINEAR = Layout(lambda x: x.T, lambda x, shape: x.T.reshape(shape))  # [in, out] ↔ torch's [out, in]
INTO_HEADS = Layout(lambda x: x.reshape(x.shape[0], -1).T, LINEAR.here)  # [D, N, H] ↔ [N·H, D]
OUT_OF_HEADS = Layout(lambda x: x.reshape(-1, x.shape[-1]).T, LINEAR.here)  # [N, H, D] ↔ [D, N·H]
HEADS_BIAS = Layout(lambda x: x.reshape(-1), SAME.here)  # [N, H] ↔ [N·H]


def _patch_there(x):  # [p·p·3, D] ↔ a convolution's [D, 3, p, p]
    side = round((x.shape[0] // 3) ** 0.5)
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


PATCH = Layout(_patch_there, lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape))

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
_LAYER = 'model.layers.{}.'
DECODER = {
    'blocks/attention_norm/scale': (_LAYER + 'input_layernorm.weight', SAME),
    'blocks/q/kernel': (_LAYER + 'self_attn.q_proj.weight', INTO_HEADS),
    'blocks/q/bias': (_LAYER + 'self_attn.q_proj.bias', HEADS_BIAS),
    'blocks/kv/kernel': (tuple(_LAYER + f'self_attn.{n}_proj.weight' for n in 'kv'), INTO_HEADS),
    'blocks/kv/bias': (tuple(_LAYER + f'self_attn.{n}_proj.bias' for n in 'kv'), HEADS_BIAS),
    'blocks/q_norm/scale': (_LAYER + 'self_attn.q_norm.weight', SAME),
    'blocks/k_norm/scale': (_LAYER + 'self_attn.k_norm.weight', SAME),
    'blocks/out/kernel': (_LAYER + 'self_attn.o_proj.weight', OUT_OF_HEADS),
    'blocks/ffn_norm/scale': (_LAYER + 'post_attention_layernorm.weight', SAME),
    'blocks/ffn_gate/kernel': (_LAYER + 'mlp.gate_proj.weight', LINEAR),
    'blocks/ffn_in/kernel': (_LAYER + 'mlp.up_proj.weight', LINEAR),
    'blocks/ffn_out/kernel': (_LAYER + 'mlp.down_proj.weight', LINEAR),
    'norm/scale': ('model.norm.weight', SAME),
}
_VOCABULARY = {'embedding': 'model.embed_tokens.weight', 'head': 'lm_head.weight'}  # [V, D] both
# What a file holds beside the tower: the text half of a whole model, its projections, SigLIP's pooling head.
_BESIDE = (
    *('text_model.*', 'visual_projection.*', 'text_projection.*', 'logit_scale', 'logit_bias'),
    *('*embeddings.position_ids', 'vision_model.head.*', 'head.*'),
)


# Files ---------------------------------------------------------------------------------------------------------------


def find(source) -> pathlib.Path:
    """The folder of a model: `source` itself, or the hub's files of that id, downloaded once.

    Raises UserError for what is neither.
    """
    folder = pathlib.Path(source).expanduser()
    if folder.is_dir():
        return folder
    import huggingface_hub

    try:
        wanted = ['*.json', '*.safetensors', 'merges.txt', 'tokenizer.model']
        return pathlib.Path(huggingface_hub.snapshot_download(str(source), allow_patterns=wanted))
    except (huggingface_hub.errors.HFValidationError, huggingface_hub.errors.HfHubHTTPError, OSError) as error:
        raise UserError(
            f'{source!r} is no folder, and no model that the hub gives us ({type(error).__name__}). Offline, place '
            'config.json, preprocessor_config.json and model.safetensors in a folder and name that.'
        ) from error


def read_json(file) -> dict:
    """A JSON object from a file. Raises UserError if it is none."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f'{file} is missing or no JSON.') from error
    if not isinstance(content, dict):
        raise UserError(f'{file} holds no JSON object.')
    return content


class Weights:
    """The tensors of a model folder: model.safetensors, or the shards its index names. `names` are all of theirs.

    Raises UserError where there are none, for a pickle, and for a damaged file.
    """

    def __init__(self, folder):
        self.folder, self._files = folder, {}
        index = folder / 'model.safetensors.index.json'
        if (folder / 'model.safetensors').is_file():
            files = [folder / 'model.safetensors']
        elif index.is_file():
            shards = sorted(set(read_json(index).get('weight_map', {}).values()))
            if any(pathlib.PurePath(str(shard)).name != shard for shard in shards):
                raise UserError(f'{index} names a file outside its folder.')
            files = [folder / shard for shard in shards]
        else:
            pickles = [file.name for pattern in ('*.bin', '*.pt', '*.pth') for file in folder.glob(pattern)]
            why = f'only {pickles[0]}, a pickle, which could run any code' if pickles else 'nothing'
            raise UserError(f'{folder} holds {why}: weights are read from model.safetensors, or shards with an index.')
        for file in files:
            self._open(file)

    def _open(self, file):
        from safetensors import SafetensorError, safe_open

        try:
            opened = safe_open(file, 'flax')
        except (OSError, SafetensorError) as error:
            raise UserError(f'{file} is missing or damaged.') from error
        for name in opened.keys():  # noqa: SIM118 - no mapping
            self._files[name] = opened

    @property
    def names(self):
        """Every tensor's name."""
        return set(self._files)

    def shape(self, name) -> tuple[int, ...]:
        """A tensor's shape, from the header."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name) -> Float32[np.ndarray, '...']:
        """A tensor in float32."""
        return np.asarray(self._files[name].get_tensor(name).astype(jnp.float32))


def take(weights, table, shapes, prefix='', beside=()):
    """Our parameters (nested dicts like `shapes`) out of a file, by a family's table.

    Layers are stacked. Raises UserError that lists all that is missing, too much or of another shape.
    """
    parts = {}  # our name: a list over layers of lists of their names
    leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(shapes)}
    wrong, used = [], set()
    for ours, leaf in leaves.items():
        theirs, layout = table[ours]
        theirs = (theirs,) if isinstance(theirs, str) else theirs
        stacked = ours.startswith('blocks/')
        layers = range(leaf.shape[0]) if stacked else [None]
        parts[ours] = [[prefix + name.format(layer) for name in theirs] for layer in layers]
        shape = _piece(ours, leaf.shape, len(theirs))
        wanted = jax.eval_shape(layout.there, jax.ShapeDtypeStruct(shape, jnp.float32)).shape
        for name in (name for names in parts[ours] for name in names):
            used.add(name)
            if name not in weights.names:
                wrong.append(f'{name} is missing')
            elif weights.shape(name) != wanted:
                wrong.append(f'{name} is {list(weights.shape(name))} and not {list(wanted)}')
    extra = weights.names - used
    wrong += [f'{name} is unknown' for name in sorted(extra) if not any(fnmatch.fnmatch(name, b) for b in beside)]
    if wrong:
        raise UserError(f'the weights in {weights.folder} do not fit: {"; ".join(wrong)}.')

    def build(path, leaf):
        ours = path_name(path)
        here, shape = table[ours][1].here, _piece(ours, leaf.shape, len(parts[ours][0]))
        layers = [[here(weights.read(name), shape) for name in names] for names in parts[ours]]
        layers = [np.stack(pieces, axis=-3) if len(pieces) > 1 else pieces[0] for pieces in layers]
        return np.stack(layers) if ours.startswith('blocks/') else layers[0]

    return jax.tree_util.tree_map_with_path(build, shapes)


def _piece(ours, shape, parts):
    """The shape of what one of their tensors holds of ours: of one layer, and of query, key or value."""
    shape = shape[1:] if ours.startswith('blocks/') else shape
    return (*shape[:-3], *shape[-2:]) if parts > 1 else shape


# Towers --------------------------------------------------------------------------------------------------------------


def vision_config(folder) -> Vision:
    """The config.Vision of a folder with a CLIP or SigLIP model, whole or the tower alone, and its preprocessing.

    Raises UserError for another family, and for preprocessing that we do not do.
    """
    config, picture = read_json(folder / 'config.json'), _preprocessor(folder)
    family = str(config.get('model_type', '')).removesuffix('_vision_model').replace('siglip2', 'siglip')
    if family not in TOWERS:
        raise UserError(f'{folder} holds a {config.get("model_type")!r} model: a tower is {" or ".join(TOWERS)}.')
    theirs = _DEFAULTS[family] | config.get('vision_config', config)
    activation = {'gelu_pytorch_tanh': 'gelu_tanh'}.get(theirs['hidden_act'], theirs['hidden_act'])
    if activation not in ACTIVATIONS:
        raise UserError(f'{folder} wants hidden_act {theirs["hidden_act"]!r}: there are {", ".join(ACTIVATIONS)}.')
    if 'num_patches' in theirs:
        raise UserError(f'{folder} is a NaFlex tower, which has no fixed resolution: take a fixed one.')
    size = theirs['image_size']
    for name in ('size', 'crop_size') if family == 'clip' else ('size',):
        wanted = picture.get(name, size)
        if set(wanted.values() if isinstance(wanted, dict) else [wanted]) != {size}:
            raise UserError(f'{folder} has {name} {wanted} for a tower of {size} pixels: they must be equal.')
    if family == 'clip' and not picture.get('do_center_crop', True):
        raise UserError(f'{folder} does not crop its pictures (do_center_crop), as our CLIP towers do.')
    return Vision(
        kind=family, image_size=size, patch_size=theirs['patch_size'], width=theirs['hidden_size'],
        layers=theirs['num_hidden_layers'], heads=theirs['num_attention_heads'], ffn=theirs['intermediate_size'],
        activation=activation, epsilon=theirs['layer_norm_eps'], fit='crop' if family == 'clip' else 'stretch',
        resample={2: 'bilinear', 3: 'bicubic'}[picture['resample']],
        mean=tuple(picture['image_mean']), std=tuple(picture['image_std']),
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
    weights = Weights(folder)
    family = vision_config(folder).kind
    prefix = 'vision_model.' if any(name.startswith('vision_model.') for name in weights.names) else ''
    return take(weights, TOWERS[family], shapes, prefix, _BESIDE)


def load_vision_tower(source, layer: int = -2, dtype=jnp.float32):
    """(tower, preprocess) of a CLIP or SigLIP model: a folder, or a Hugging Face id.

    tower(pixels float32 [B, H, W, 3]) → [B, P, D]: patch tokens after layer `layer`, counted as transformers counts
    hidden_states, without class token and final norm. preprocess(PIL pictures) → pixels.
    Raises UserError for another family, and for weights that do not fit.
    """
    folder = find(source)
    cfg = vision_config(folder)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VisionTower(cfg, dtype, nnx.Rngs(0))))
    params = tower_weights(folder, nnx.to_pure_dict(state))
    run = jax.jit(lambda params, pixels: nnx.merge(graphdef, params).features(pixels, layer))

    def preprocess(pictures) -> Float[Array, 'B H W 3']:
        prepared = np.stack([images.prepare(images.to_rgb(picture), cfg) for picture in pictures])
        return (prepared / np.float32(255) - np.float32(cfg.mean)) / np.float32(cfg.std)

    return lambda pixels: run(params, pixels), preprocess


# Decoders ------------------------------------------------------------------------------------------------------------


def decoder_config(folder) -> dict:
    """The fields of config.Model that a folder with a Llama, SmolLM2, Qwen2 or Qwen3 model sets.

    Raises UserError for another family, and for what our decoder cannot represent.
    """
    theirs = read_json(folder / 'config.json')
    family = theirs.get('model_type')
    if family not in ('llama', 'qwen2', 'qwen3'):
        raise UserError(f'{folder} holds a {family!r} model: a decoder is llama (SmolLM2 too), qwen2 or qwen3.')
    rope = theirs.get('rope_parameters') or theirs.get('rope_scaling') or {}
    kind = rope.get('rope_type', rope.get('type', 'default'))
    refused = {
        f'rope type {kind!r}': kind not in ('default', 'llama3'),
        f'hidden_act {theirs.get("hidden_act")!r}': theirs.get('hidden_act', 'silu') != 'silu',
        'a sliding window': bool(theirs.get('use_sliding_window')),
        'a bias in the feed-forward layer': bool(theirs.get('mlp_bias')),
        'a bias on the attention output': family != 'qwen2' and bool(theirs.get('attention_bias')),
    }
    if any(refused.values()):
        raise UserError(f'{folder} has {next(n for n, bad in refused.items() if bad)}, which our decoder lacks.')
    scaling = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
    heads = theirs['num_attention_heads']
    return dict(
        flavour='llama', layers=theirs['num_hidden_layers'], width=theirs['hidden_size'], heads=heads,
        ffn=theirs['intermediate_size'], positions=theirs['max_position_embeddings'],
        rope_theta=float(theirs.get('rope_theta') or rope.get('rope_theta', 1e4)),
        epsilon=theirs.get('rms_norm_eps', 1e-6), tied=bool(theirs.get('tie_word_embeddings', False)),
        kv_heads=theirs.get('num_key_value_heads') or heads,
        head_dim=theirs.get('head_dim') or (128 if family == 'qwen3' else theirs['hidden_size'] // heads),
        qkv_bias=family == 'qwen2', qk_norm=family == 'qwen3',
        rope_scaling=tuple(float(rope[name]) for name in scaling) if kind == 'llama3' else (),
    )  # fmt: skip


def decoder_weights(folder, shapes, vocab_size):
    """The parameters (nested dicts like `shapes`) of a decoder from a folder, for `vocab_size` tokens.

    Rows of tokens that the file does not know are drawn at random round the mean of the others; padded rows are zero.
    Raises UserError where they do not fit.
    """
    weights = Weights(folder)
    rest = {name: part for name, part in shapes.items() if name not in _VOCABULARY}
    beside = (*_VOCABULARY.values(), '*rotary_emb.inv_freq')  # a tied file may hold the output layer all the same
    params = take(weights, DECODER, rest, beside=beside)
    for ours, theirs in _VOCABULARY.items():
        if ours not in shapes:
            continue
        if theirs not in weights.names:
            raise UserError(f'the weights in {folder} do not fit: {theirs} is missing.')
        rows = weights.read(theirs)
        ((leaf, like),) = shapes[ours].items()
        padded, width = like.shape if ours == 'embedding' else like.shape[::-1]
        if rows.shape[1:] != (width,):
            raise UserError(f'the weights in {folder} do not fit: {theirs} is {list(rows.shape)}, of width {width}.')
        noise = np.random.default_rng(0).standard_normal((padded, width), np.float32)
        table = rows.mean(0) + 0.1 * rows.std() * noise
        table[: len(rows)] = rows[:padded]
        table[vocab_size:] = 0
        params[ours] = {leaf: table if ours == 'embedding' else table.T}
    return params
