"""Times the training step of a stage on random batches: no data, no checkpoints, only the step.

    python scripts/benchmarks/step.py --config=configs/pretrain.py:tiny [--config.data.batch_size=8 …] [--steps=20]

Prints one JSON object: tokens/s, MFU (full-attention convention), compile seconds, peak memory where the device tells,
devices and versions. On CPU the MFU is the share of a matrix product's speed measured in the same run: a ratio.
Takes jax, flax, optax, numpy and jaxtyping, no more.
"""

import contextlib
import json
import pathlib
import runpy
import statistics
import sys
import time
from typing import NamedTuple

import jax
import optax

from nanovision_jax import config as configs
from nanovision_jax.data.batch import fake_batch
from nanovision_jax.errors import UserError
from nanovision_jax.parallel import hardware
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.training import fit, meter, optim
from nanovision_jax.training.step import init_state


class Vocabulary(NamedTuple):
    """What the step needs to know of a tokenizer."""

    size: int
    image: int


def read(argv):
    """(Config, steps) of a command line. It is read here, as ml_collections is not needed to run a step."""
    options = dict(arg.removeprefix('--').partition('=')[::2] for arg in argv)
    file, _, size = options.pop('config', '').partition(':')
    if not pathlib.Path(file).is_file():
        raise UserError(f'no config file {file!r}: say --config=FILE, as in --config=configs/pretrain.py:tiny.')
    config, steps = runpy.run_path(file)['get_config'](*([size] if size else [])), options.pop('steps', '20')
    for name, value in options.items():
        name = name.removeprefix('config.')
        configs.put(config, name, configs.parse_field(name, value))
    configs.fill(config)
    configs.check(config)
    steps = configs.parse_value('--steps', int, steps)
    if steps < 1:
        raise UserError(f'--steps takes a number above 0, not {steps}.')
    return config, steps


def measure(config, steps):
    """What main() prints, of `steps` steps."""
    mesh = parallel.make_mesh(config.mesh, rows=config.data.batch_size // config.optim.parts)
    # GPT-2's tokenizer with our special tokens, unless the config says less.
    size = 50_261 if config.data.tokenizer == 'gpt2' else config.data.vocab_size
    vocabulary = Vocabulary(size, image=size - 1)
    parallel.check_divides(config, mesh, size)
    optimizer, host = optim.make_optimizer(config.optim, steps + 2), fake_batch(config, size)
    with jax.set_mesh(mesh):
        with contextlib.redirect_stdout(sys.stderr):  # what the config left open is settled as training does
            program = fit.settle(config, vocabulary, optimizer, mesh)
        step, compiled = program.step, program.seconds
        state, batch = init_state(config, vocabulary, optimizer, program.shapes), parallel.put_batch(host, mesh)
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - start)
    second, tokens = statistics.median(seconds), host['tokens'].size
    images = host['images'].reshape(-1, *host['images'].shape[-3:]).shape[0] if 'images' in host else 0
    learned = int(host['weights'].sum()) if 'weights' in host else tokens
    peak, source = hardware.peak_flops()
    return {
        'stage': config.stage,
        'size': config.size,
        'batch': {name: list(value.shape) for name, value in host.items()},
        'step_seconds': round(second, 4),
        'tokens_per_second': round(tokens / second),
        'mfu': round(meter.step_flops(config, size, tokens, images, learned) / second / peak, 4),
        'mfu_of': source,
        'compile_seconds': round(compiled, 1),
        'peak_device_bytes': hardware.peak_memory(),
        'loss': float(metrics['loss']),
        'devices': f'{jax.device_count()} × {jax.devices()[0].device_kind}',
        'versions': {'jax': jax.__version__, 'optax': optax.__version__},
    }


def main(argv):
    """The command: see the module's docstring."""
    if {'--help', '-h'} & set(argv):
        print(__doc__)
        return
    print(json.dumps(measure(*read(argv))))


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
