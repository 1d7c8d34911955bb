"""Schedules and optimizers."""

import jax
import optax

from nanovision_jax.parallel.mesh import path_name
from nanovision_jax.training import muon


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
        update = optax.partition({'muon': muon.muon(rate, cfg.weight_decay), 'adamw': update}, _labels)
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), update)


def _labels(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: 'muon' if muon.is_matrix(path) else 'adamw', params)
