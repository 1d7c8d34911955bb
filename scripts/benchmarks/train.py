"""Times the training step of a stage on random batches: no data, no checkpoints, only the step.

    python scripts/benchmarks/train.py --config=configs/pretrain.py:tiny [--config.data.batch_size=8 …] [--steps=20]
    python scripts/benchmarks/train.py --config=configs/pretrain.py:d4 --peer=torch

Prints one JSON object: tokens/s, images/s, MFU (full-attention convention), compile seconds, peak memory where the
device tells, devices and versions. On CPU the MFU is the share of a matrix product's speed measured in the same run: a
ratio. --peer has PyTorch take the same step, eager and compiled (torch_step.py), the sides as processes in turn, three
times; the ratio is of median tokens/s, to the faster one. Takes jax, flax, optax, numpy and jaxtyping, and torch for
the peer.
"""

import contextlib
import json
import pathlib
import runpy
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import optax

from nanovision_jax import config as configs
from nanovision_jax.config_checks import check
from nanovision_jax.data.batch import fake_batch
from nanovision_jax.errors import UserError
from nanovision_jax.parallel import hardware, huge_pages
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.training import fit, meter, optim
from nanovision_jax.training.step import init_state

TURNS = 3


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
    check(config)
    steps = configs.parse_value('--steps', int, steps)
    if steps < 1:
        raise UserError(f'--steps takes a number above 0, not {steps}.')
    return config, steps


def vocab_size(config):
    """Of GPT-2's tokenizer with our special tokens, unless the config says less."""
    return 50_261 if config.data.tokenizer == 'gpt2' else config.data.vocab_size


def measure(config, steps):
    """What main() prints, of `steps` steps."""
    mesh = parallel.make_mesh(config.mesh, rows=config.data.batch_size // config.optim.parts)
    size = vocab_size(config)
    vocabulary = Vocabulary(size, image=size - 1)
    parallel.check_divides(config, mesh, size)
    optimizer, host = optim.make_optimizer(config.optim, steps + 2), fake_batch(config, size)
    with jax.set_mesh(mesh):
        with contextlib.redirect_stdout(sys.stderr):  # what the config left open is settled as training does
            program = fit.settle(config, vocabulary, optimizer, mesh)
        step, compiled = program.step, program.seconds
        state, batch = init_state(config, vocabulary, optimizer, program.shapes), parallel.put_batch(host, mesh)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state['params']))
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - start)
    second, tokens = statistics.median(seconds), int((host['segments'] > 0).sum())
    images = host['images'].reshape(-1, *host['images'].shape[-3:]).shape[0] if 'images' in host else 0
    learned = int(host['weights'].sum()) if 'weights' in host else tokens
    peak, source = hardware.peak_flops()
    return {
        'stage': config.stage,
        'size': config.size,
        'parameters': parameters,
        'batch': {name: list(value.shape) for name, value in host.items()},
        'attention': config.model.attention,
        'remat': config.model.remat,
        'accumulate': config.optim.accumulate,
        'step_seconds': round(second, 4),
        'tokens_per_second': round(tokens / second),
        'images_per_second': round(images / second, 1),
        'mfu': round(meter.step_flops(config, size, tokens, images, learned) / second / peak, 4),
        'mfu_of': source,
        'compile_seconds': round(compiled, 1),
        'peak_device_bytes': hardware.peak_memory(),
        'loss': float(metrics['loss']),
        'devices': f'{jax.device_count()} × {jax.devices()[0].device_kind}',
        'versions': {'jax': jax.__version__, 'optax': optax.__version__},
    }


def process(*arguments):
    """The last line that Python prints, run with these arguments in a process of its own."""
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f'{" ".join(arguments)} failed.')
    return done.stdout.splitlines()[-1]


def beside_torch(argv):
    """All sides, as processes in turn: {side: its median turn, 'ratio': of tokens/s to PyTorch's better side}."""
    peer = str(pathlib.Path(__file__).with_name('torch_step.py'))
    sides = {'ours': [__file__], 'torch eager': [peer, '--mode=eager'], 'torch compile': [peer, '--mode=compile']}
    turns = {side: [] for side in sides}
    for _ in range(TURNS):
        for side, command in sides.items():
            turns[side].append(json.loads(process(*command, *argv)))
            print(f'{side}: {turns[side][-1]["tokens_per_second"]:,} tokens/s', file=sys.stderr)
    speeds = {side: [turn['tokens_per_second'] for turn in found] for side, found in turns.items()}
    middle = {side: statistics.median(found) for side, found in speeds.items()}
    best = max(speed for side, speed in middle.items() if side != 'ours')
    told = {
        side: found[0] | {'tokens_per_second': middle[side], 'turns': speeds[side]} for side, found in turns.items()
    }
    return told | {'ratio': round(middle['ours'] / best, 3)}


def command(main):
    """Runs the main(argv) of a benchmark as a command, with huge pages, as training has them."""
    huge_pages.use()
    if {'--help', '-h'} & set(sys.argv):
        print(sys.modules['__main__'].__doc__)
        return
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)


def main(argv):
    """The command: see the module's docstring."""
    rest = [arg for arg in argv if not arg.startswith('--peer')]
    config, steps = read(rest)
    if rest == argv:
        print(json.dumps(measure(config, steps)))
    elif '--peer=torch' in argv:
        print(json.dumps(beside_torch(rest)))
    else:
        raise UserError('--peer is torch.')


if __name__ == '__main__':
    command(main)
