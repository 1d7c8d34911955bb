"""Models that know nothing, made in no time: random weights, float32, prime sizes where they can be."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from nanovision_jax import config as configs
from nanovision_jax import models
from nanovision_jax.runs import checkpoint
from nanovision_jax.runs import config_file as runconfig

VOCAB, IMAGE = 101, 97


def config(stage, run_dir='runs/none', positions=61):
    """A config of a stage whose pictures are 21 pixels wide and become 9 tokens."""
    vision = configs.Vision(image_size=21, patch_size=7, width=22, layers=3, heads=2, ffn=29)
    text = configs.Text(width=26, layers=2, heads=2, ffn=31, embed=19)
    model = configs.Model(layers=3, width=42, heads=3, ffn=53, positions=positions, vision=vision, text=text)
    data = configs.Data(length=29, slots=3, batch_size=2)
    return configs.Config(stage=stage, run_dir=str(run_dir), dtype='float32', model=model, data=data)


def model(cfg, vocab_size=VOCAB, image_token=IMAGE, seed=0):
    """(graphdef, params): every leaf random, norms and biases too, so that each of them matters."""
    graphdef, shapes = models.abstract(cfg, vocab_size, image_token)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1 if path[-1].key == 'scale' else 0
        return jnp.asarray(rng.normal(mean, 0.3, leaf.shape), leaf.dtype)

    # On a device of their own choice, as inference.load puts them: what is compiled for one serves the other.
    return graphdef, jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes), jax.devices()[0])


def double(params):
    """Parameters as numpy arrays in float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def run_folder(folder, stage, tokenizer):
    """A run folder as a training run leaves it, of a model that was never trained. Returns its path."""
    folder = pathlib.Path(folder)
    cfg = config(stage, folder)
    folder.mkdir(parents=True)
    runconfig.save(cfg)
    shutil.copytree(tokenizer.folder, folder / 'tokenizer')
    writer = checkpoint.Checkpoints(folder, keep=1)
    writer.save(7, model(cfg, tokenizer.size, tokenizer.image)[1], {'count': jnp.zeros(())}, {})
    writer.wait()
    return folder
