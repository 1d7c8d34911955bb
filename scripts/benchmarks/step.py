"""Times the training step of a stage on random batches: no data, no checkpoints, only the step.

    python scripts/benchmarks/step.py --config=configs/pretrain.py:tiny [--config.data.batch_size=8 …] [--steps=20]

Prints one JSON object: tokens/s, MFU (full-attention convention), compile seconds, peak memory where the device tells,
devices and versions. On CPU the MFU is the share of a matrix product's speed measured in the same run: a ratio.
"""

import json
import statistics
import sys
import time

import jax
import optax

from nanovision_jax import cli
from nanovision_jax.data import pipeline
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.training import meter, optim
from nanovision_jax.training.loop import init_state, make_train_step


class Vocabulary:
    """What the step needs to know of a tokenizer: GPT-2's size with our special tokens, unless the config says less."""

    def __init__(self, config):
        self.size = 50_261 if config.data.tokenizer == 'gpt2' else config.data.vocab_size
        self.image = self.size - 1


def main(argv):
    steps = next((int(arg.partition('=')[2]) for arg in argv if arg.startswith('--steps=')), 20)
    config, _ = cli.parse([arg for arg in argv if not arg.startswith('--steps=')], __doc__)
    mesh = parallel.make_mesh(config.mesh)
    jax.set_mesh(mesh)
    vocabulary = Vocabulary(config)
    parallel.check_divides(config, mesh, vocabulary.size)
    optimizer = optim.make_optimizer(config.optim, steps + 2)
    graphdef, state, shardings = init_state(config, vocabulary, optimizer, mesh)
    host = pipeline.fake_batch(config, vocabulary.size)
    batch = parallel.put_batch(host, mesh)
    began = time.perf_counter()
    step = make_train_step(config, graphdef, optimizer, shardings).lower(state, batch).compile()
    compiled = time.perf_counter() - began
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    second = statistics.median(seconds)
    tokens = host['tokens'].size
    pictures = host['images'].reshape(-1, *host['images'].shape[-3:]).shape[0] if 'images' in host else 0
    peak, source = meter.peak_flops()
    result = {
        'stage': config.stage,
        'size': config.size,
        'batch': {name: list(value.shape) for name, value in host.items()},
        'step_seconds': round(second, 4),
        'tokens_per_second': round(tokens / second),
        'mfu': round(meter.step_flops(config, vocabulary.size, tokens, pictures) / second / peak, 4),
        'mfu_of': source,
        'compile_seconds': round(compiled, 1),
        'peak_device_bytes': meter.peak_memory(),
        'loss': float(metrics['loss']),
        'devices': f'{jax.device_count()} × {jax.devices()[0].device_kind}',
        'versions': {'jax': jax.__version__, 'optax': optax.__version__},
    }
    print(json.dumps(result))


if __name__ == '__main__':
    main(sys.argv[1:])
