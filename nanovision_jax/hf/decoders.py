"""Decoders: GPT-NeoX, which our first flavour is written as; Llama, SmolLM2, Qwen2 and Qwen3, which the second one is.

Our GPT in GPT-NeoX's terms: no parallel residual, rotary positions on the whole head, ReLU, and zeros for the biases
that we do not have. Our rotary positions turn neighbouring numbers of a head, theirs turn the two halves of a head
against each other, so queries and keys are reordered; nothing else changes.
"""

from typing import NamedTuple

import numpy as np

from nanovision_jax.errors import UserError
from nanovision_jax.hf.weights import (
    HEADS_BIAS,
    INTO_HEADS,
    LINEAR,
    OUT_OF_HEADS,
    SAME,
    Layout,
    find,
    give,
    open_weights,
    read_json,
    take,
)


class Family(NamedTuple):
    """How a family names its tensors: `base` leads all but the output layer; `zero` are those that must be zeros."""

    table: dict
    base: str
    embedding: str
    head: str
    zero: tuple[str, ...] = ()


def _halves(size):
    """For each place of a head of `size` in halves, its place in interleaved pairs."""
    return np.arange(size).reshape(-1, 2).T.reshape(-1)


def _neox_qkv_there(x):  # [D, 3, N, H] ↔ [N·3·H, D]
    x, size = x.transpose(2, 1, 3, 0), x.shape[-1]
    turned = np.stack([_halves(size), _halves(size), np.arange(size)])
    return x[:, np.arange(3)[:, None], turned].reshape(-1, x.shape[-1])


def _neox_qkv_here(x, shape):
    width, _, heads, size = shape
    back = np.argsort(_halves(size))
    x = x.reshape(heads, 3, size, width)[:, np.arange(3)[:, None], np.stack([back, back, np.arange(size)])]
    return x.transpose(3, 1, 0, 2)


_LLAMA = {
    'blocks/attention_norm/scale': ('layers.{}.input_layernorm.weight', SAME),
    'blocks/q/kernel': ('layers.{}.self_attn.q_proj.weight', INTO_HEADS),
    'blocks/q/bias': ('layers.{}.self_attn.q_proj.bias', HEADS_BIAS),
    'blocks/kv/kernel': (tuple(f'layers.{{}}.self_attn.{n}_proj.weight' for n in 'kv'), INTO_HEADS),
    'blocks/kv/bias': (tuple(f'layers.{{}}.self_attn.{n}_proj.bias' for n in 'kv'), HEADS_BIAS),
    'blocks/q_norm/scale': ('layers.{}.self_attn.q_norm.weight', SAME),
    'blocks/k_norm/scale': ('layers.{}.self_attn.k_norm.weight', SAME),
    'blocks/out/kernel': ('layers.{}.self_attn.o_proj.weight', OUT_OF_HEADS),
    'blocks/ffn_norm/scale': ('layers.{}.post_attention_layernorm.weight', SAME),
    'blocks/ffn_gate/kernel': ('layers.{}.mlp.gate_proj.weight', LINEAR),
    'blocks/ffn_in/kernel': ('layers.{}.mlp.up_proj.weight', LINEAR),
    'blocks/ffn_out/kernel': ('layers.{}.mlp.down_proj.weight', LINEAR),
    'norm/scale': ('norm.weight', SAME),
}
_NEOX = {
    'blocks/attention_norm/scale': ('layers.{}.input_layernorm.weight', SAME),
    'blocks/attention_norm/bias': ('layers.{}.input_layernorm.bias', SAME),
    'blocks/qkv/kernel': ('layers.{}.attention.query_key_value.weight', Layout(_neox_qkv_there, _neox_qkv_here)),
    'blocks/out/kernel': ('layers.{}.attention.dense.weight', OUT_OF_HEADS),
    'blocks/out/bias': ('layers.{}.attention.dense.bias', SAME),
    'blocks/ffn_norm/scale': ('layers.{}.post_attention_layernorm.weight', SAME),
    'blocks/ffn_norm/bias': ('layers.{}.post_attention_layernorm.bias', SAME),
    'blocks/ffn_in/kernel': ('layers.{}.mlp.dense_h_to_4h.weight', LINEAR),
    'blocks/ffn_out/kernel': ('layers.{}.mlp.dense_4h_to_h.weight', LINEAR),
    'norm/scale': ('final_layer_norm.weight', SAME),
    'norm/bias': ('final_layer_norm.bias', SAME),
}
_NEOX_ZERO = ('layers.*.attention.query_key_value.bias', 'layers.*.mlp.*.bias')
_LLAMA_FAMILY = Family(_LLAMA, 'model.', 'embed_tokens.weight', 'lm_head.weight')
FAMILIES = {
    'llama': _LLAMA_FAMILY,
    'qwen2': _LLAMA_FAMILY,
    'qwen3': _LLAMA_FAMILY,
    'gpt_neox': Family(_NEOX, 'gpt_neox.', 'embed_in.weight', 'embed_out.weight', _NEOX_ZERO),
}
_SCALING = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
# Buffers that older files hold: rotary frequencies and causal masks.
_BUFFERS = ('*rotary_emb.inv_freq', '*attention.bias', '*attention.masked_bias')


# In ------------------------------------------------------------------------------------------------------------------


def decoder_config(theirs, where) -> dict:
    """The fields of config.Model that a decoder's config.json (a dict) sets; `where` it was found is for the error.

    Raises UserError for another family, and for what our decoder cannot represent.
    """
    family = theirs.get('model_type')
    if family not in FAMILIES:
        raise UserError(
            f'{where} holds a {family!r} model: a decoder is llama (SmolLM2 too), qwen2, qwen3, or gpt_neox as we '
            'write it.'
        )
    rope = theirs.get('rope_parameters') or theirs.get('rope_scaling') or {}
    kind = rope.get('rope_type', rope.get('type', 'default'))
    neox, act = family == 'gpt_neox', theirs.get('hidden_act', 'silu')
    partial = theirs.get('rotary_pct', rope.get('partial_rotary_factor', 1.0))
    refused = {
        f'rope type {kind!r}': kind not in (('default',) if neox else ('default', 'llama3')),
        f'hidden_act {act!r}': act != ('relu' if neox else 'silu'),
        'a sliding window': bool(theirs.get('use_sliding_window')),
        'a parallel residual (use_parallel_residual)': neox and bool(theirs.get('use_parallel_residual', True)),
        f'rotary positions on {partial} of a head': neox and partial != 1.0,
        'no bias on the attention output (attention_bias)': neox and not theirs.get('attention_bias', True),
        'a bias in the feed-forward layer': bool(theirs.get('mlp_bias')),
        'a bias on the attention output': family in ('llama', 'qwen3') and bool(theirs.get('attention_bias')),
    }
    if any(refused.values()):
        raise UserError(f'{where} has {next(n for n, bad in refused.items() if bad)}, which our decoder lacks.')
    theta = theirs.get('rope_theta') or theirs.get('rotary_emb_base') or rope.get('rope_theta', 1e4)
    fields = dict(
        layers=theirs['num_hidden_layers'], width=theirs['hidden_size'], heads=theirs['num_attention_heads'],
        ffn=theirs['intermediate_size'], positions=theirs['max_position_embeddings'], rope_theta=float(theta),
        tied=bool(theirs.get('tie_word_embeddings', False)),
    )  # fmt: skip
    if neox:
        return fields | dict(flavour='gpt', epsilon=theirs.get('layer_norm_eps', 1e-5))
    size = 128 if family == 'qwen3' else theirs['hidden_size'] // theirs['num_attention_heads']
    return fields | dict(
        flavour='llama', epsilon=theirs.get('rms_norm_eps', 1e-6),
        kv_heads=theirs.get('num_key_value_heads') or theirs['num_attention_heads'],
        head_dim=theirs.get('head_dim') or size, qkv_bias=family == 'qwen2', qk_norm=family == 'qwen3',
        rope_scaling=tuple(float(rope[name]) for name in _SCALING) if kind == 'llama3' else (),
    )  # fmt: skip


def find_decoder(source):
    """The folder of a decoder: a folder, or the hub's files of an id. Raises UserError for what is neither."""
    return find(source, 'config.json, model.safetensors and tokenizer.json')


def read_decoder_config(folder) -> dict:
    """decoder_config() of a folder."""
    return decoder_config(read_json(folder / 'config.json'), folder)


def read_decoder(folder, shapes, vocab_size):
    """take_decoder() of a folder."""
    family = FAMILIES[read_json(folder / 'config.json')['model_type']]
    return take_decoder(open_weights(folder), family, shapes, vocab_size)


def take_decoder(weights, family, shapes, vocab_size):
    """The parameters (nested dicts like `shapes`) of a decoder out of its weights, for `vocab_size` tokens.

    family: a Family, its names as they stand in this file. Rows of tokens that the file does not know are drawn at
    random round the mean of the others; padded rows are zero. Raises UserError where they do not fit.
    """
    body = weights.part(family.base)
    weights.refuse(weights.unknown([family.head, *(family.base + name for name in body.tensors)]))
    rest = {name: part for name, part in shapes.items() if name not in ('embedding', 'head')}
    params = take(body, family.table, rest, (family.embedding, family.head, *_BUFFERS), family.zero)
    shape = shapes['embedding']['embedding'].shape
    params['embedding'] = {'embedding': _rows(body, family.embedding, shape, vocab_size)}
    if 'head' in shapes:
        params['head'] = {'kernel': _rows(weights, family.head, shape, vocab_size).T}
    return params


def _rows(weights, name, shape, vocab_size):
    """A table float32 [padded V, D] = `shape` out of a file's rows [their V, D]."""
    if name not in weights.tensors:
        weights.refuse([f'{weights.prefix}{name} is missing'])
    (padded, width), rows = shape, weights.tensors[name].read()
    if rows.shape[1:] != (width,):
        weights.refuse([f'{weights.prefix}{name} is {list(rows.shape)}, of width {width}'])
    noise = np.random.default_rng(0).standard_normal((padded, width), np.float32)
    table = rows.mean(0) + 0.1 * rows.std() * noise
    table[: len(rows)] = rows[:padded]
    table[vocab_size:] = 0
    return table


# Out -----------------------------------------------------------------------------------------------------------------


def family_of(model):
    """The name of the family that a config.Model is written as. Raises UserError if there is none."""
    if model.flavour == 'gpt':
        return 'gpt_neox'
    if model.qkv_bias and model.qk_norm:
        raise UserError('no published family has both model.qkv_bias and model.qk_norm: this model cannot be written.')
    return 'qwen3' if model.qk_norm else 'qwen2' if model.qkv_bias else 'llama'


def give_decoder(params, family, vocab_size):
    """The way back: {their name: array}, without the padded rows. family: a Family, named as the file shall have it."""
    rest = {name: part for name, part in params.items() if name not in ('embedding', 'head')}
    tensors = give(rest, family.table, family.base)
    for name in list(tensors):
        if family.zero and name.endswith(('query_key_value.weight', 'dense_h_to_4h.weight', 'dense_4h_to_h.weight')):
            tensors[name.replace('.weight', '.bias')] = np.zeros(len(tensors[name]), np.float32)
    tensors[family.base + family.embedding] = np.asarray(params['embedding']['embedding'])[:vocab_size]
    if 'head' in params:
        tensors[family.head] = np.asarray(params['head']['kernel']).T[:vocab_size]
    return tensors


def decoder_json(model, vocab_size) -> dict:
    """A decoder's config.json of a config.Model; tokens and dtype are for the caller to add."""
    family = family_of(model)
    rope = {'rope_type': 'default', 'rope_theta': model.rope_theta}
    shared = dict(
        model_type=family, vocab_size=vocab_size, hidden_size=model.width, intermediate_size=model.ffn,
        num_hidden_layers=model.layers, num_attention_heads=model.heads, max_position_embeddings=model.positions,
        tie_word_embeddings=model.tied, use_cache=True,
    )  # fmt: skip
    if family == 'gpt_neox':
        return {'architectures': ['GPTNeoXForCausalLM']} | shared | dict(
            hidden_act='relu', layer_norm_eps=model.epsilon, use_parallel_residual=False, attention_bias=True,
            attention_dropout=0.0, hidden_dropout=0.0, rotary_pct=1.0, rotary_emb_base=model.rope_theta,
            rope_parameters=rope | {'partial_rotary_factor': 1.0},
        )  # fmt: skip
    if model.rope_scaling:
        rope |= {'rope_type': 'llama3'} | dict(zip(_SCALING, model.rope_scaling, strict=True))
        rope['original_max_position_embeddings'] = int(rope['original_max_position_embeddings'])
    return {'architectures': [f'{family.capitalize()}ForCausalLM']} | shared | dict(
        hidden_act='silu', rms_norm_eps=model.epsilon, num_key_value_heads=model.kv_heads or model.heads,
        head_dim=model.head_size, attention_bias=False, attention_dropout=0.0, rope_parameters=rope,
        rope_theta=model.rope_theta,
    )  # fmt: skip
