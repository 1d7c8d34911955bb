"""What is asked of a scheduler (scheduler.py), and what it tells."""

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nanovision_jax.inference.engine import Prompt
from nanovision_jax.inference.sampling import Sampling


class Heard(NamedTuple):
    """What a request is told: further tokens, and in the end why there are no more.

    scores: of each token (log-probability, [(alternative, its log-probability) …]) where they were asked for.
    finish: '' while it goes on; 'stop', 'length', 'deadline', 'cancelled', or 'error: …'.
    """

    tokens: list[int]
    scores: list[tuple] | None = None
    finish: str = ''


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt that is to be continued. hear: called with what Heard is, in the scheduler's thread.

    scored: whether tokens come with their log-probabilities; echo: the prompt's too, first. deadline: by
    time.monotonic(). guide: what allows tokens (see guide.py), if not all are.
    """

    prompt: Prompt
    hear: Callable[[Heard], None]
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    most: int = 256
    scored: bool = False
    echo: bool = False
    deadline: float = float('inf')
    guide: object = None
    cancelled: str = ''  # what its `finish` is to be
    asked: float = dataclasses.field(default_factory=time.monotonic)
    heard: int = 0
    digests: list[bytes] = dataclasses.field(default_factory=list)  # of its images
    keys: np.ndarray | None = None  # what tells the tokens of its prompt apart

    def cancel(self, why: str = 'cancelled'):
        """Ends it within a turn; the first reason counts."""
        self.cancelled = self.cancelled or why


class Full(Exception):
    """The queue has no room for a request."""
