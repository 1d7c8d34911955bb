"""Decoders: GPT-NeoX, which our first flavour is written as; Llama, SmolLM2, Qwen2 and Qwen3, which the second one is.

Our GPT in GPT-NeoX's terms: no parallel residual, rotary positions on the whole head, ReLU, and zeros for the biases
that we do not have. Our rotary positions turn neighbouring numbers of a head, theirs turn the two halves of a head
against each other, so queries and keys are reordered; nothing else changes.
"""

import pathlib
from typing import NamedTuple

import numpy as np

from nanovision_jax.hf.weights import (
    HEADS_BIAS,
    INTO_HEADS,
    LINEAR,
    OUT_OF_HEADS,
    SAME,
    Layout,
    Weights,
    from_hf,
    open_weights,
    to_hf,
)
from nanovision_jax.runs.folder import read_json


class Architecture(NamedTuple):
    """How an architecture names its tensors: `base` leads all but the output layer's; `zero` must hold zeros."""

    table: dict
    base: str
    embedding: str
    head: str
    zero: tuple[str, ...] = ()


def _pairs_to_halves(size):
    """For each place of a head whose rotary pairs are its halves, its place where they are neighbours."""
    return np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])


def _neox_qkv_to_hf(x):
    """[D, 3, N, H] → [N·3·H, D]: a head's query, key and value side by side, queries and keys in halves."""
    halves, same = _pairs_to_halves(x.shape[-1]), np.arange(x.shape[-1])
    return _reorder(x.transpose(2, 1, 3, 0), [halves, halves, same]).reshape(-1, x.shape[0])


def _neox_qkv_from_hf(x, shape):
    """The way back, to `shape`, [D, 3, N, H]."""
    width, _, heads, size = shape
    pairs, same = np.argsort(_pairs_to_halves(size)), np.arange(size)
    return _reorder(x.reshape(heads, 3, size, width), [pairs, pairs, same]).transpose(3, 1, 0, 2)


def _reorder(x, orders):
    """[N, 3, H, D] with the places of each head's query, key and value in the three `orders`."""
    return x[:, np.arange(3)[:, None], np.stack(orders)]


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
    'blocks/qkv/kernel': ('layers.{}.attention.query_key_value.weight', Layout(_neox_qkv_to_hf, _neox_qkv_from_hf)),
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
_LLAMA_LIKE = Architecture(_LLAMA, 'model.', 'embed_tokens.weight', 'lm_head.weight')
ARCHITECTURES = {
    'llama': _LLAMA_LIKE,
    'qwen2': _LLAMA_LIKE,
    'qwen3': _LLAMA_LIKE,
    'gpt_neox': Architecture(_NEOX, 'gpt_neox.', 'embed_in.weight', 'embed_out.weight', _NEOX_ZERO),
}
# Matrices of GPT-NeoX whose biases a file must hold, and we do not have.
_BIASED = ('query_key_value.weight', 'dense_h_to_4h.weight', 'dense_4h_to_h.weight')
# Buffers that older files hold: rotary frequencies and causal masks.
_BUFFERS = ('*rotary_emb.inv_freq', '*attention.bias', '*attention.masked_bias')


# In ------------------------------------------------------------------------------------------------------------------


def read_decoder(folder: pathlib.Path, shapes: dict, vocab_size: int) -> dict:
    """decoder_from_hf() of a folder."""
    architecture = ARCHITECTURES[read_json(folder / 'config.json')['model_type']]
    return decoder_from_hf(open_weights(folder), architecture, shapes, vocab_size)


def decoder_from_hf(weights: Weights, architecture: Architecture, shapes: dict, vocab_size: int) -> dict:
    """The parameters (nested dicts like `shapes`) of a decoder out of its weights, for `vocab_size` tokens.

    architecture: its names as they stand in this file. Rows of tokens that the file does not know are drawn at
    random round the mean of the others; padded rows are zero. Raises UserError where they do not fit.
    """
    body = weights.part(architecture.base)
    weights.refuse(weights.unknown([architecture.head, *(architecture.base + name for name in body.tensors)]))
    rest = {name: part for name, part in shapes.items() if name not in ('embedding', 'head')}
    ignored = (architecture.embedding, architecture.head, *_BUFFERS)
    params = from_hf(body, architecture.table, rest, ignored, architecture.zero)
    shape = shapes['embedding']['embedding'].shape
    params['embedding'] = {'embedding': _rows(body, architecture.embedding, shape, vocab_size)}
    if 'head' in shapes:
        params['head'] = {'kernel': _rows(weights, architecture.head, shape, vocab_size).T}
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


def decoder_to_hf(params: dict, architecture: Architecture, vocab_size: int) -> dict[str, np.ndarray]:
    """The way back: {their name: array}, without the padded rows, named as `architecture` says."""
    rest = {name: part for name, part in params.items() if name not in ('embedding', 'head')}
    tensors = to_hf(rest, architecture.table, architecture.base)
    for name in list(tensors):
        if architecture.zero and name.endswith(_BIASED):
            tensors[name.replace('.weight', '.bias')] = np.zeros(len(tensors[name]), np.float32)
    tensors[architecture.base + architecture.embedding] = np.asarray(params['embedding']['embedding'])[:vocab_size]
    if 'head' in params:
        tensors[architecture.head] = np.asarray(params['head']['kernel']).T[:vocab_size]
    return tensors
