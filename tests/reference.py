"""The models once more, in plain numpy and float64, written from DESIGN.md: one example at a time, nothing packed.

Parameters are the nested dicts of the real models. Axes: T length, N heads, H head dim, D width, P patches.
"""

import math

import numpy as np


def layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p['scale'] + p['bias']


def rope(x, positions, theta):
    """x [T, N, H]: each pair (2i, 2i + 1) is a complex number, turned by position · theta^(-2i/H)."""
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(
        1j * positions[:, None, None] * theta ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    )
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def attention(x, p, causal, turn=lambda x: x):
    """Multi-head attention over x [T, D]; `turn` rotates queries and keys."""
    q, k, v = np.einsum('td,dcnh->ctnh', x, p['qkv']['kernel']) + p['qkv'].get('bias', np.zeros(1))[:, None]
    scores = np.einsum('tnh,snh->nts', turn(q), turn(k)) / math.sqrt(q.shape[-1])
    if causal:
        scores[:, ~np.tri(len(x), dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum('nts,snh,nhd->td', weights, v, p['out']['kernel']) + p['out']['bias']


def layers(blocks, count):
    """The first `count` blocks of a stack, one by one."""
    if isinstance(blocks, dict):
        split = {name: list(layers(part, count)) for name, part in blocks.items()}
        return [{name: parts[i] for name, parts in split.items()} for i in range(count)]
    return list(blocks[:count])


def decoder(p, x, theta=1e6):
    """Logits [T, V] of embedded tokens x [T, D]."""
    for block in layers(p['blocks'], len(p['blocks']['out']['bias'])):
        normed = layer_norm(x, block['attention_norm'])
        x = x + attention(normed, block, True, lambda y: rope(y, np.arange(len(y)), theta))
        hidden = layer_norm(x, block['ffn_norm']) @ block['ffn_in']['kernel']
        x = x + np.maximum(hidden, 0) @ block['ffn_out']['kernel']
    return layer_norm(x, p['norm']) @ p['head']['kernel']


def clip_blocks(blocks, x, count, causal):
    for block in layers(blocks, count):
        x = x + attention(layer_norm(x, block['attention_norm']), block, causal)
        hidden = layer_norm(x, block['ffn_norm']) @ block['ffn_in']['kernel'] + block['ffn_in']['bias']
        x = x + hidden / (1 + np.exp(-1.702 * hidden)) @ block['ffn_out']['kernel'] + block['ffn_out']['bias']
    return x


def tower(p, cfg, picture, count):
    """Hidden states [P + 1, D] of a picture uint8 [size, size, 3] after `count` layers, the class token first."""
    pixels = (picture / 255 - np.array(cfg.mean)) / np.array(cfg.std)
    n, side = cfg.patch_size, cfg.image_size // cfg.patch_size
    patches = [
        pixels[i * n : (i + 1) * n, j * n : (j + 1) * n].reshape(-1) @ p['patch']['kernel']
        for i in range(side)
        for j in range(side)
    ]
    x = np.stack([p['class_token'], *patches]) + p['position']
    return clip_blocks(p['blocks'], layer_norm(x, p['norm_in']), count, causal=False)


def text_tower(p, tokens):
    """States [T, D] of a caption."""
    x = p['embedding']['embedding'][tokens] + p['position'][: len(tokens)]
    return layer_norm(clip_blocks(p['blocks'], x, len(p['blocks']['out']['bias']), causal=True), p['norm'])


def projector(p, features):
    """Two layers with the exact GELU, x · Φ(x), between them; or one."""
    x = features @ p['first']['kernel'] + p['first']['bias']
    if 'second' not in p:
        return x
    x = x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    return x @ p['second']['kernel'] + p['second']['bias']


def contrastive(pictures, captions):
    """CLIP's loss of scaled similarities: both ways' cross-entropy with the pair's other half, averaged."""
    total, n = 0.0, len(pictures)
    similarity = pictures @ captions.T
    for i in range(n):
        total -= similarity[i, i] - math.log(np.exp(similarity[i]).sum())
        total -= similarity[i, i] - math.log(np.exp(similarity[:, i]).sum())
    return total / (2 * n)
