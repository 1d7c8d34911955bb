"""Schedules and optimizers."""

import re

import jax
import optax
from optax import contrib

from nanovision_jax.parallel.mesh import path_name

# What Muon takes as matrices: (end of the parameter's path, axes in, axes out). The other axes (layers; queries, keys
# and values) count matrices of their own. The layers next to pixels, words and logits stay with AdamW.
MATRICES = (
    (r'blocks/(qkv|kv)/kernel', -4, (-2, -1)),
    (r'blocks/q/kernel', -3, (-2, -1)),
    (r'blocks/out/kernel', (-3, -2), -1),
    (r'blocks/ffn_(in|gate|out)/kernel', -2, -1),
    (r'projector/(first|second)/kernel', -2, -1),
)


def schedule(cfg, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warmup from 0, then cosine or linear to end_learning_rate. cfg: config.Optim."""
    warmup = min(steps, round(cfg.warmup * steps if cfg.warmup < 1 else cfg.warmup))
    decay = max(1, steps - warmup)
    if cfg.schedule == 'cosine':
        tail = optax.cosine_decay_schedule(cfg.learning_rate, decay, cfg.end_learning_rate / cfg.learning_rate)
    else:
        tail = optax.linear_schedule(cfg.learning_rate, cfg.end_learning_rate, decay)
    return optax.join_schedules([optax.linear_schedule(0.0, cfg.learning_rate, max(1, warmup)), tail], [warmup])


def decayed(params) -> dict:
    """Which leaves get weight decay: the matrices (kernels), never norms, biases, embeddings, positions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).endswith('kernel'), params)


def matrix_axes(params) -> dict:
    """Each leaf's axes as Muon takes them (optax.contrib.MuonDimensionNumbers), None where AdamW stays in charge."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _axes(path_name(path)), params)


def _axes(name):
    for pattern, axes_in, axes_out in MATRICES:
        if re.search(pattern + '$', name):
            return contrib.MuonDimensionNumbers(axes_in, axes_out)
    return None


def make_optimizer(cfg, steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW (arXiv:1711.05101), Muon or plain SGD, with the schedule. cfg: config.Optim.

    Muon (Keller Jordan, 2024) steps by orthogonal matrices, so that a direction that the loss seldom names moves as far
    as one that it names all the time. Scaled as in arXiv:2502.16982, it takes AdamW's learning rates.
    """
    rate = schedule(cfg, steps)
    update = optax.adamw(rate, cfg.b1, cfg.b2, weight_decay=cfg.weight_decay, mask=decayed)
    if cfg.name == 'sgd':
        update = optax.sgd(rate)
    elif cfg.name == 'muon':
        muon = contrib.muon(
            rate, weight_decay=cfg.weight_decay, consistent_rms=0.2, muon_weight_dimension_numbers=matrix_axes
        )
        update = optax.partition({'muon': muon, 'adamw': update}, _labels)
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), update)


def _labels(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: 'muon' if _axes(path_name(path)) else 'adamw', params)
