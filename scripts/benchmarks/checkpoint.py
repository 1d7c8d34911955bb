"""What a checkpoint costs: how long a save holds the loop up, its bytes, and the seconds to prove and to restore it.

    python scripts/benchmarks/checkpoint.py [--size=d12] [--stage=pretrain] [--times=3] [--folder=.]

The state has the shapes of the recipe and random numbers; medians of --times saves. --folder: on which disk.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time
import types

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from nanovision_jax import config as configs  # noqa: E402
from nanovision_jax.parallel import mesh as parallel  # noqa: E402
from nanovision_jax.runs import checkpoint  # noqa: E402
from nanovision_jax.runs import folder as runfolder  # noqa: E402
from nanovision_jax.training import optim  # noqa: E402
from nanovision_jax.training.step import abstract_state  # noqa: E402


def measure(stage: str, size: str, times: int, place: str) -> dict:
    """{bytes, and medians of seconds: stall, written, proven, restored} of a stage's state."""
    config = configs.base_config(stage, size)
    words = types.SimpleNamespace(size=50304 if size not in configs.TINY else 1024, image=5)
    optimizer = optim.make_optimizer(config.optim, 1000)
    mesh = parallel.make_mesh(configs.Mesh(), jax.devices()[:1])
    shapes = abstract_state(config, words, optimizer, mesh)[1]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    random = [
        jax.random.normal(key, x.shape, x.dtype)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else jnp.zeros(x.shape, x.dtype)
        for key, x in zip(keys, leaves, strict=True)
    ]
    state = jax.block_until_ready(
        jax.device_put(jax.tree.unflatten(tree, random), jax.tree.map(lambda x: x.sharding, shapes))
    )
    seconds = {name: [] for name in ('stall', 'written', 'proven', 'restored')}

    def timed(name, call, *args):
        began = time.perf_counter()
        result = jax.block_until_ready(call(*args))
        seconds[name].append(time.perf_counter() - began)
        return result

    with tempfile.TemporaryDirectory(dir=place) as run, checkpoint.Checkpoints(run, keep=1) as writer:
        for step in range(1, times + 2):  # the first compiles
            timed('stall', writer.save, step, state['params'], state['optimizer'], {'position': 0})
            timed('written', writer.wait)
            assert timed('proven', runfolder.damage, run, step) is None
            timed('restored', lambda at: [checkpoint.restore(run, at, item, shapes[item]) for item in shapes], step)
        files = runfolder.Paths(run).checkpoint(step)
        size = sum(file.stat().st_size for file in files.rglob('*') if file.is_file())
    return {'bytes': size} | {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def main(argv=None):
    """The command: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--stage', default='pretrain')
    parser.add_argument('--size', default='d12')
    parser.add_argument('--times', type=int, default=3)
    parser.add_argument('--folder', default='.')
    args = parser.parse_args(argv)
    print(json.dumps(measure(args.stage, args.size, args.times, args.folder), indent=1))


if __name__ == '__main__':
    main()
