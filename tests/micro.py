"""Small models, runs and configs that the tests share: they compile in seconds, and their weights are random.

config() divides over every mesh of eight devices. odd_config() has sizes that differ from each other and that mistake
no axis for another.
"""

import contextlib
import functools
import pathlib
import shutil
import types

import chex
import jax
import numpy as np
import pytest

from nanovision_jax import config as configs
from nanovision_jax import config_checks, models, stages
from nanovision_jax.data import batch as batches
from nanovision_jax.data import pipeline
from nanovision_jax.data.tokenizer import Tokenizer
from nanovision_jax.parallel import hardware
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.runs import checkpoint, lineage
from nanovision_jax.runs import config_file as runconfig
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.training import optim, resume, start, step

STAGES = tuple(stages.STAGES)
# All that building a model asks of a tokenizer: for config(), and for odd_config().
TOKENIZER = types.SimpleNamespace(size=120, image=119)
ODD = types.SimpleNamespace(size=101, image=97)


def config(stage, run_dir='runs/none'):
    """Width 32, two layers, pictures of 16 pixels that become four tokens, eight rows of 32 tokens."""
    vision = configs.Vision(image_size=16, patch_size=8, width=32, layers=2, heads=4, ffn=64)
    text = configs.Text(width=32, layers=2, heads=4, ffn=64, embed=32)
    model = configs.Model(layers=2, width=32, heads=4, ffn=64, positions=128, vision=vision, text=text)
    data = configs.Data(batch_size=8, length=32, slots=2)
    optim = configs.Optim(learning_rate=1e-2, end_learning_rate=1e-3, warmup=2)
    return configs.Config(stage=stage, size='micro', run_dir=str(run_dir), model=model, data=data, optim=optim)


def odd_config(stage, run_dir='runs/none', positions=61):
    """Width 42, three layers, images of 21 pixels that become nine tokens, two rows of 29 tokens; float32."""
    vision = configs.Vision(image_size=21, patch_size=7, width=22, layers=3, heads=2, ffn=29)
    text = configs.Text(width=26, layers=2, heads=2, ffn=31, embed=19)
    model = configs.Model(layers=3, width=42, heads=3, ffn=53, positions=positions, vision=vision, text=text)
    data = configs.Data(length=29, slots=3, batch_size=2)
    return configs.Config(stage=stage, run_dir=str(run_dir), dtype='float32', model=model, data=data)


def params(cfg, tokenizer=TOKENIZER, seed=0):
    """(graphdef, parameters): numpy arrays, every leaf random, norms (round 1) and biases too, so that each matters."""
    graphdef, shapes = models.abstract(cfg, tokenizer.size, tokenizer.image)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return (0.2 * rng.standard_normal(leaf.shape, leaf.dtype) + (path[-1].key == 'scale')).astype(leaf.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(draw, shapes)


def model(cfg, tokenizer=TOKENIZER, seed=0):
    """The same as jax arrays on one device, as inference.load puts them: what one compiled serves the other."""
    graphdef, drawn = params(cfg, tokenizer, seed)
    return graphdef, jax.device_put(drawn, jax.devices()[0])


def greedy(graphdef, params, ids, pictures, n, never):
    """The n likeliest tokens after a prompt, but for `never`, by our cached decoding. pictures: [M, …] or None."""
    graphdef, params = models.unstack(graphdef, params)

    @jax.jit
    def start(params, ids, pictures):
        model = models.merge(graphdef, params)
        decoder = models.decoder_of(model)
        x = decoder.embed(ids) if pictures is None else model.embed(ids, model.image_features(pictures))
        x, cache = decoder.extend(x, jax.numpy.zeros(1, int), decoder.empty_cache(1, ids.shape[1] + n))
        return decoder.logits(x[:, -1:])[0, 0], cache

    @jax.jit
    def extend(params, token, column, cache):
        decoder = models.decoder_of(models.merge(graphdef, params))
        x, cache = decoder.extend(decoder.embed(token), column[None], cache)
        return decoder.logits(x)[0, 0], cache

    scores, cache = start(params, np.asarray(ids)[None], None if pictures is None else np.asarray(pictures)[None])
    found = []
    for column in range(len(ids), len(ids) + n):
        scores = np.array(scores)
        scores[list(never)] = -np.inf
        found.append(int(scores.argmax()))
        scores, cache = extend(params, np.array([[found[-1]]]), np.int32(column), cache)
    return found


def double(params):
    """Parameters as numpy arrays in float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def batch(cfg, seed=0):
    """A batch in which rows, and so the parts of an accumulated step, learn from unequally many tokens."""
    made = batches.fake_batch(cfg, TOKENIZER.size, seed)
    if 'weights' in made:
        rows, length = made['weights'].shape
        made['weights'] *= np.arange(length) < length - 2 * np.arange(rows)[:, None]
    return made


# Runs ----------------------------------------------------------------------------------------------------------------


def family(folder, tiny_family):
    """A family of runs with the tokenizer of tiny_family, and its tiny_world as data."""
    if not (tiny_family / 'tokenizer').exists():
        pipeline.family_tokenizer(run_config('pretrain', tiny_family))
    shutil.copytree(tiny_family / 'tokenizer', folder / 'tokenizer')  # makes the folder
    (folder / 'data').symlink_to(tiny_family / 'data')
    return folder


def run_config(stage, family, **fields):
    """A run of a few steps in a family; `fields` are config fields with __ for the dot, as in data__workers=2."""
    cfg = config(stage, family / stage)
    cfg.steps, cfg.data.vocab_size, cfg.data.length = 4, 384, 40 if stage == 'clip' else 128
    cfg.data.path = str((family / 'data').resolve())  # the same for a copy of the family
    cfg.checkpoint.every, cfg.log.every, cfg.eval.every, cfg.eval.batches = 2, 1, 4, 1
    for name, value in fields.items():
        configs.put(cfg, name.replace('__', '.'), value)
    configs.fill(cfg)
    start.inherit(cfg, {name.replace('__', '.') for name in fields})
    config_checks.check(cfg)
    return cfg


def run_folder(cfg, tokenizer, params=None):
    """The run folder of a config as training leaves it, of a model that never learned, or of `params`. Its path."""
    mesh = parallel.make_mesh(configs.Mesh(), jax.devices()[:1])
    lineage.begin(cfg, tokenizer, [], mesh, 'float32', {}, {}, 0)
    resume.write_run(cfg, tokenizer, [])
    writer = checkpoint.Checkpoints(cfg.run_dir, keep=1)
    writer.save(7, jax.device_put(params) if params else model(cfg, tokenizer)[1], {'count': np.zeros(())}, {})
    writer.wait()
    lineage.end(cfg, 7, {}, 0)
    return pathlib.Path(cfg.run_dir)


def restamp(run_dir):
    """Lets a run's checkpoints be those of the config and the tokenizer that it has now."""
    for at in runfolder.whole_steps(run_dir):
        told = runfolder.manifest(run_dir, at)
        content = {name: told[name] for name in told if name not in ('files', 'digest')}
        content['beside'] = runfolder.beside(run_dir)
        runfolder.write_manifest(runfolder.Paths(run_dir).checkpoint(at), content)


def parent_run(family, stage, cfg=None):
    """The run folder of a stage in a family, for another stage to start from. Returns its path."""
    return run_folder(cfg or run_config(stage, family), Tokenizer(family / 'tokenizer'))


def read(run_dir, at=None):
    """{'params', 'optimizer'} of a run's newest checkpoint, or of another, as numpy arrays."""
    cfg = runconfig.read(run_dir)
    tokenizer = Tokenizer(pathlib.Path(run_dir) / 'tokenizer')
    mesh = parallel.make_mesh(configs.Mesh(), jax.devices()[:1])
    state = step.abstract_state(cfg, tokenizer, optim.make_optimizer(cfg.optim, cfg.steps), mesh)[1]
    at = at or runfolder.newest(run_dir)
    return jax.device_get({item: checkpoint.restore(run_dir, at, item, state[item]) for item in state})


def assert_same(found, wanted):
    """Two trees have the same leaves, bit for bit: 0 is not -0."""
    chex.assert_trees_all_equal_shapes_and_dtypes(found, wanted)
    as_bytes = functools.partial(jax.tree.map, lambda leaf: np.frombuffer(np.asarray(leaf).tobytes(), np.uint8))
    chex.assert_trees_all_equal(as_bytes(found), as_bytes(wanted))


@contextlib.contextmanager
def traced_at_most(n):
    """Within it, models are traced at most `n` times: each jitted function merges its model once a trace."""
    chex.clear_trace_counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, 'merge', chex.assert_max_traces(models.merge, n))
        yield


def quicken(patch):
    """For tests that train: nothing is optimized or measured."""
    jax.config.update('jax_disable_most_optimizations', True)
    patch.setattr(hardware, 'peak_flops', lambda: (1e12, 'a figure for tests'))
