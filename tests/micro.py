"""The five stages at a size that compiles in a second and divides over every mesh of eight devices."""

import types

import jax
import numpy as np

from nanovision_jax import config as configs
from nanovision_jax import models
from nanovision_jax.data import pipeline

STAGES = configs.STAGES
TOKENIZER = types.SimpleNamespace(size=120, image=119)  # all that building a model asks of one


def config(stage, run_dir='runs/none'):
    """Width 32, two layers, pictures of 16 pixels that become four tokens, eight rows of 32 tokens."""
    vision = configs.Vision(image_size=16, patch_size=8, width=32, layers=2, heads=4, ffn=64)
    text = configs.Text(width=32, layers=2, heads=4, ffn=64, embed=32)
    model = configs.Model(layers=2, width=32, heads=4, ffn=64, positions=128, vision=vision, text=text)
    data = configs.Data(batch_size=8, length=32, slots=2)
    optim = configs.Optim(learning_rate=1e-2, end_learning_rate=1e-3, warmup=2)
    return configs.Config(stage=stage, size='micro', run_dir=str(run_dir), model=model, data=data, optim=optim)


def params(cfg, seed=0):
    """(graphdef, parameters): numpy arrays, every leaf random, norms and biases too."""
    graphdef, shapes = models.abstract(cfg, TOKENIZER.size, TOKENIZER.image)
    rng = np.random.default_rng(seed)
    return graphdef, jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, leaf.dtype), shapes)


def batch(cfg, seed=0):
    """A batch in which rows, and so the parts of an accumulated step, learn from unequally many tokens."""
    made = pipeline.fake_batch(cfg, TOKENIZER.size, seed)
    if 'weights' in made:
        rows, length = made['weights'].shape
        made['weights'] *= np.arange(length) < length - 2 * np.arange(rows)[:, None]
    return made
