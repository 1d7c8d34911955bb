"""The stages of the road, a row each.

A new stage is a row here, an objective (training/objectives.py) if it needs a new one, and a file in configs/.
No jax is imported here: command lines, data and reports read this table too.
"""

import re
from typing import NamedTuple


class Stage(NamedTuple):
    """What distinguishes one stage of training from the others."""

    name: str
    parents: tuple[str, ...]  # stages it may start from, the usual one first; a run of the same stage always qualifies
    model: str  # clip (two towers), decoder, or vlm (tower, projector, decoder)
    data: str  # text, pairs (image, caption), chat (no images), captions or conversations (with images)
    objective: str  # the name of a loss in training/objectives.py
    trains: str  # a regular expression: parameters whose path it matches from the start learn, the others are frozen

    @property
    def sees(self):
        """Whether its decoder reads images."""
        return self.model == 'vlm'

    @property
    def decodes(self):
        """Whether its model has a decoder."""
        return self.model != 'clip'

    @property
    def answers(self):
        """Whether it learns to answer, rather than to continue text."""
        return self.decodes and self.data != 'text'

    def learns(self, path):
        """Whether the parameter at `path`, as in 'decoder/blocks/qkv/kernel', learns in this stage."""
        return re.match(self.trains, path) is not None


_ROWS = (
    Stage('clip', (), 'clip', 'pairs', 'contrastive', ''),
    Stage('pretrain', (), 'decoder', 'text', 'next_token', ''),
    Stage('sft', ('pretrain',), 'decoder', 'chat', 'next_token', ''),
    Stage('vision_pretrain', ('sft', 'pretrain'), 'vlm', 'captions', 'next_token', 'projector/'),
    Stage('vision_instruct', ('vision_pretrain',), 'vlm', 'conversations', 'next_token', '(projector|decoder)/'),
)
STAGES = {row.name: row for row in _ROWS}


def stage_of(config):
    """The Stage of a config.Config."""
    return STAGES[config.stage]
