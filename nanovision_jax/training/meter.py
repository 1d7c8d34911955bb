"""Speed, and what it is a share of: tokens/s, MFU, memory; metrics.jsonl and other loggers.

MFU, full-attention convention (PaLM, arXiv:2204.02311): FLOPs per token are 6·N + 12·L·D·T, N counting the weights of
matrix products. Only what a stage does is counted: 2·N forward, 2·N more where gradients flow through, 2·N more where
weights learn. Padding is not counted as work.
"""

import contextlib
import dataclasses
import json
import re
import time

import jax
import jax.numpy as jnp

from nanovision_jax.config import Model
from nanovision_jax.models.layers import padded
from nanovision_jax.stages import stage_of

# Dense bf16 matrix products, FLOP/s per device, from the makers' data sheets. Device kinds as jax names them.
PEAK = {
    'A100': 312e12,
    'H100': 989e12,
    'H100 PCIe': 756e12,
    'H100 NVL': 835e12,
    'GH200': 989e12,
    'H200': 989e12,
    'B200': 2250e12,
    'L4': 121e12,
    'L40S': 362e12,
    'T4': 65e12,
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5p': 459e12,
    'TPU v5': 459e12,
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
}


def peak_flops():
    """(FLOP/s of all devices together, where the figure comes from): a data sheet's, or a measured product's.

    On CPU one product is measured, which uses all cores, however many devices they pretend to be; elsewhere a larger
    one on one device, times their number.
    """
    kind = jax.devices()[0].device_kind
    for name in sorted(PEAK, key=len, reverse=True):
        if re.search(rf'\b{name}\b', kind):
            return PEAK[name] * jax.device_count(), f'{name} data sheet, bf16'
    if jax.default_backend() == 'cpu':
        return measured_flops(1024, jnp.float32), 'measured 1024³ float32 product'
    return measured_flops(4096, jnp.bfloat16) * jax.device_count(), 'measured 4096³ bf16 product, times the devices'


def measured_flops(n, dtype):
    """FLOP/s of the fastest of five n × n matrix products on the first device."""
    a = jnp.ones((n, n), dtype)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best = float('inf')
    for _ in range(5):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def matmul_weights(part):
    """Weights in the matrix products of a transformer's blocks. part: config.Model, Vision or Text."""
    if getattr(part, 'flavour', '') == 'llama':
        attention = 2 * part.width * part.head_size * (part.heads + (part.kv_heads or part.heads))
        return part.layers * (attention + 3 * part.width * part.ffn)
    return part.layers * (4 * part.width**2 + 2 * part.width * part.ffn)


def attention_width(part):
    """Numbers a token of all heads together: what scores and weighted values are products of."""
    return part.heads * (part.head_size if isinstance(part, Model) else part.width // part.heads)


def step_flops(config, vocab_size, tokens, pictures):
    """Model FLOPs of a step over `tokens` decoder (or caption) tokens and `pictures` pictures."""
    model, vision = config.model, config.model.vision

    def cost(part, length, extra=0, passes=3):
        return passes * (2 * (matmul_weights(part) + extra) + 4 * part.layers * attention_width(part) * length)

    patch, seen_tokens = vision.patch_size**2 * 3 * vision.width, vision.patches + vision.class_tokens
    stage = stage_of(config)
    if stage.model == 'clip':
        towers = pictures * seen_tokens * cost(vision, seen_tokens, patch)
        return towers + tokens * cost(model.text, config.data.length)
    passes = 3 if stage.learns('decoder/blocks') else 2  # gradients flow through a frozen decoder too
    total = tokens * cost(model, config.data.length, model.width * padded(vocab_size), passes)
    if stage.sees:
        seen = dataclasses.replace(vision, layers=vision.layers - 1)  # features are taken before the last layer
        total += pictures * seen_tokens * cost(seen, seen_tokens, patch, passes=1)
    return total


def peak_memory():
    """The most bytes in use so far on one device, or None where the backend does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get('peak_bytes_in_use') if stats else None


class Clock:
    """Seconds of training: laps between log lines and the sum over the run, without evaluation and saving."""

    def __init__(self, so_far):
        self.total, self.since = so_far, time.perf_counter()

    def lap(self):
        """(seconds since the last lap, seconds in all)."""
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        self.total += seconds
        return max(seconds, 1e-9), self.total

    @contextlib.contextmanager
    def paused(self):
        """A context whose time does not count."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start


class Metrics:
    """Appends to metrics.jsonl, and to TensorBoard if asked. After a resume, lines past `start` are dropped first."""

    def __init__(self, run_dir, to='', start=0):
        self.file = run_dir / 'metrics.jsonl'
        kept = [line for line in read_metrics(self.file) if line['step'] <= start]
        partial = self.file.with_suffix('.part')
        partial.write_text(''.join(json.dumps(line) + '\n' for line in kept))
        partial.replace(self.file)  # a half-written last line is gone too: the next one would be glued to it
        self.last = next((line for line in reversed(kept) if 'loss' in line), {'tokens': 0, 'seconds': 0.0})
        self._board = None
        if to == 'tensorboard':
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(run_dir / 'tensorboard'))

    def write(self, **values):
        """Appends one object; numbers other than `step` go to TensorBoard too."""
        with open(self.file, 'a') as file:
            file.write(json.dumps(values) + '\n')
        if self._board:
            for name, value in values.items():
                if isinstance(value, (int, float)) and name != 'step':
                    self._board.add_scalar(name, value, values['step'])


def read_metrics(file):
    """The objects of a metrics.jsonl; a last line cut off by a crash is left out."""
    lines = []
    for text in file.read_text().splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
