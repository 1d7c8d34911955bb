"""The batch contract: what a training step gets, as a dict of numpy arrays. Takes numpy and jaxtyping, no more.

Axes: B rows, T tokens a row (data.length), M image slots a row (data.slots), S side of an image in pixels.

Text and vision stages:
    tokens     int32   [B, T]           inputs; image tokens in runs as long as an image has features
    targets    int32   [B, T]           the token after each input
    weights    float32 [B, T]           1 where the target is learned, else 0
    segments   int32   [B, T]           which example of its row a token belongs to, from 1; 0 is padding
    positions  int32   [B, T]           a token's place in its example, from 0
    images     uint8   [B, M, S, S, 3]  vision stages only: the row's images in the order of their runs, then zeros
Contrastive stages:
    images     uint8   [B, S, S, 3]
    tokens     int32   [B, T]           one caption a row, then zeros
    ends       int32   [B]              where each caption's last token is
"""

import numpy as np
from jaxtyping import Bool, Int32, Shaped, UInt8

from nanovision_jax.stages import stage_of

# (ids [n], learned [n], images); anonymous axes, since the examples of a row differ in length.
Example = tuple[Int32[np.ndarray, ' _'], Bool[np.ndarray, ' _'], list | UInt8[np.ndarray, '_ _ _ 3']]


def pack(examples: list[Example], length: int, slots: int = 0, size: int = 0) -> dict[str, Shaped[np.ndarray, '...']]:
    """One row of a batch out of examples, (ids, learned, images) each, which it must have room for.

    An example of n ids becomes n - 1 inputs and their targets. `slots` and `size` are M and S; without slots the row
    has no images.
    """
    row = {name: np.zeros(length, np.int32) for name in ('tokens', 'targets', 'segments', 'positions')}
    row['weights'] = np.zeros(length, np.float32)
    if slots:
        row['images'] = np.zeros((slots, size, size, 3), np.uint8)
    start = slot = 0
    for number, (ids, learned, images) in enumerate(examples, 1):
        stop = start + len(ids) - 1
        row['tokens'][start:stop], row['targets'][start:stop] = ids[:-1], ids[1:]
        row['weights'][start:stop] = learned[1:]
        row['segments'][start:stop] = number
        row['positions'][start:stop] = np.arange(stop - start)
        for image in images:
            row['images'][slot] = image
            slot += 1
        start = stop
    return row


def fake_batch(config, vocab_size: int = 512, seed: int = 0) -> dict[str, Shaped[np.ndarray, '...']]:
    """A valid batch of the stage's shapes with random content: for tests, benchmarks and planning.

    Ids below `vocab_size`; image runs are marked with the id vocab_size - 1. Two examples a row, half of which is
    learned; of text all is.
    """
    rng = np.random.default_rng(seed)
    data, vision, stage = config.data, config.model.vision, stage_of(config)
    b, t, s = data.batch_size, data.length, vision.image_size
    if stage.data == 'pairs':
        return {
            'images': rng.integers(0, 256, (b, s, s, 3), np.uint8),
            'tokens': rng.integers(0, vocab_size, (b, t), np.int32),
            'ends': rng.integers(0, t, b, np.int32),
        }
    slots = data.slots if stage.sees else 0
    rows = []
    for _ in range(b):
        examples = []
        for images in (slots - slots // 2, slots // 2):
            ids = rng.integers(0, vocab_size - 1, t // 2 + 1, np.int32)
            ids[1 : 1 + images * vision.patches] = vocab_size - 1
            learned = np.arange(t // 2 + 1) > (0 if stage.data == 'text' else t // 4)
            examples.append((ids, learned, rng.integers(0, 256, (images, s, s, 3), np.uint8)))
        rows.append(pack(examples, t, slots, s))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
