"""The work of a training step in FLOPs, and the seconds of starting and training.

MFU, full-attention convention (PaLM, arXiv:2204.02311): FLOPs per token are 6·N + 12·L·D·T, N counting the weights of
matrix products. Only what a stage does is counted: 2·N forward, 2·N more where gradients flow through, 2·N more where
weights learn. Padding is not counted as work, nor the output layer of tokens that are not learned: it is not computed.
"""

import contextlib
import dataclasses
import time

from nanovision_jax.config import Model
from nanovision_jax.models.layers import padded
from nanovision_jax.stages import stage_of


def matmul_weights(part) -> int:
    """Weights in the matrix products of a transformer's blocks. part: config.Model, Vision or Text."""
    if getattr(part, 'flavour', '') == 'llama':
        attention = 2 * part.width * part.head_size * (part.heads + (part.kv_heads or part.heads))
        return part.layers * (attention + 3 * part.width * part.ffn)
    return part.layers * (4 * part.width**2 + 2 * part.width * part.ffn)


def attention_width(part) -> int:
    """Numbers a token of all heads together: what scores and weighted values are products of."""
    return part.heads * (part.head_size if isinstance(part, Model) else part.width // part.heads)


def step_flops(config, vocab_size: int, tokens: int, images: int, learned: int | None = None) -> int:
    """Model FLOPs of a step over `tokens` decoder (or caption) tokens, of which `learned` are targets (None: all), and
    `images` images."""
    model, vision = config.model, config.model.vision

    def cost(part, length, extra=0, passes=3):
        attended = 4 * part.layers * attention_width(part) * length  # backward twice that, whatever learns
        return passes * 2 * (matmul_weights(part) + extra) + (3 if passes > 1 else 1) * attended

    patch, seen_tokens = vision.patch_size**2 * 3 * vision.width, vision.patches + vision.class_tokens
    stage = stage_of(config)
    if stage.model == 'clip':
        towers = images * seen_tokens * cost(vision, seen_tokens, patch)
        return towers + tokens * cost(model.text, config.data.length)
    passes = 3 if stage.learns('decoder/blocks') else 2  # gradients flow through a frozen decoder too
    total = tokens * cost(model, config.data.length, passes=passes)
    total += (tokens if learned is None else learned) * passes * 2 * model.width * padded(vocab_size)
    if stage.sees:
        seen = dataclasses.replace(vision, layers=vision.layers - 1)  # features are taken before the last layer
        total += images * seen_tokens * cost(seen, seen_tokens, patch, passes=1)
    return total


class Startup:
    """Where the seconds before the first step go. began: time.perf_counter() as the command began."""

    def __init__(self, began: float | None = None):
        self._began = self._last = time.perf_counter() if began is None else began
        self._stages = []

    def reached(self, stage: str):
        """Counts the seconds since the stage before for this one."""
        now = time.perf_counter()
        self._stages.append(f'{stage} {now - self._last:.1f}')
        self._last = now

    def told(self) -> str:
        """The seconds in all, and of each stage."""
        return f'first step after {self._last - self._began:.1f} s: {", ".join(self._stages)}'


class Clock:
    """Seconds of training: laps between log lines and the sum over the run, without evaluation and saving."""

    def __init__(self, so_far: float):
        self.total, self.since = so_far, time.perf_counter()

    def lap(self) -> tuple[float, float]:
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
