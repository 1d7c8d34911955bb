"""The batch contract: what a training step gets, as a dict of numpy arrays. Takes numpy, ml_dtypes and jaxtyping.

Axes: B rows, T tokens a row (data.length), M image slots a row (data.slots), S side of an image in pixels, P patches,
E tower width, R rows of packed captions.

Text and vision stages:
    tokens     int32   [B, T]           inputs; image tokens in runs as long as an image has features
    targets    int32   [B, T]           the token after each input
    weights    float32 [B, T]           1 where the target is learned, else 0
    segments   int32   [B, T]           which example of its row a token belongs to, from 1; 0 is padding
    positions  int32   [B, T]           a token's place in its example, from 0
    images     uint8   [B, M, S, S, 3]  vision stages only: the row's images in the order of their runs, then zeros
with data.cache_features, instead of images:
    features   bfloat16 [B, M, P, E]    what the tower makes of each; int8 where 'int8' is asked for, and with it
    scales     float32 [B, M, P]        what each patch's features are to be multiplied by
Contrastive stages:
    images     uint8   [B, S, S, 3]
    tokens     int32   [R, T]           their captions, packed: see pairs.Captions
    segments   int32   [R, T]           as above
    positions  int32   [R, T]           as above
    ends       int32   [B]              where each caption's last token is, counted over all rows
What rows left out, since it cannot be read any more (skipped() takes it out again):
    skipped    uint8   [n]              [[row, example, reason], …] as JSON; not there where it is nothing
"""

import json

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Int32, Shaped, UInt8

from nanovision_jax.stages import stage_of

# (ids [n], learned [n], pictures as empty_slots() has them); anonymous axes: the examples of a row differ in length.
Example = tuple[Int32[np.ndarray, ' _'], Bool[np.ndarray, ' _'], list[dict]]


def empty_slots(count: int, vision, kept: str = '') -> dict[str, Shaped[np.ndarray, '...']]:
    """What a batch holds of `count` pictures, by name, empty. vision: config.Vision; kept: as data.cache_features."""
    if not kept:
        return {'images': np.zeros((count, vision.image_size, vision.image_size, 3), np.uint8)}
    dtype = np.int8 if kept == 'int8' else ml_dtypes.bfloat16
    features = {'features': np.zeros((count, vision.patches, vision.width), dtype)}
    return features | ({'scales': np.zeros((count, vision.patches), np.float32)} if kept == 'int8' else {})


def pack(examples: list[Example], length: int, slots: dict | None = None) -> dict[str, Shaped[np.ndarray, '...']]:
    """One row of a batch out of examples, (ids, learned, pictures) each, which it must have room for.

    An example of n ids becomes n - 1 inputs and their targets. slots: the row's empty_slots(), which are filled; none
    for a row of text.
    """
    row = {name: np.zeros(length, np.int32) for name in ('tokens', 'targets', 'segments', 'positions')}
    row |= {'weights': np.zeros(length, np.float32)} | (slots or {})
    start = slot = 0
    for number, (ids, learned, pictures) in enumerate(examples, 1):
        stop = start + len(ids) - 1
        row['tokens'][start:stop], row['targets'][start:stop] = ids[:-1], ids[1:]
        row['weights'][start:stop] = learned[1:]
        row['segments'][start:stop] = number
        row['positions'][start:stop] = np.arange(stop - start)
        for picture in pictures:
            for name, value in picture.items():
                row[name][slot] = value
            slot += 1
        start = stop
    return row


def stack(rows: list[dict]) -> dict[str, Shaped[np.ndarray, '...']]:
    """A batch of rows, and of what they left out."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != 'skipped'} | left_out(rows)


def left_out(rows: list[dict]) -> dict[str, UInt8[np.ndarray, ' n']]:
    """What rows left out, each a list of [row, example, reason], as a batch has it."""
    skipped = [entry for row in rows for entry in row.get('skipped', ())]
    return {'skipped': np.frombuffer(json.dumps(skipped).encode(), np.uint8)} if skipped else {}


def skipped(batch: dict) -> list[list]:
    """[[row, example, reason], …] of what a batch's rows left out. It is taken out of the batch."""
    return json.loads(batch.pop('skipped').tobytes()) if 'skipped' in batch else []


def fake_batch(config, vocab_size: int = 512, seed: int = 0) -> dict[str, Shaped[np.ndarray, '...']]:
    """A valid batch of the stage's shapes with random content: for tests, benchmarks and planning.

    Ids below `vocab_size`; image runs are marked with the id vocab_size - 1. Two examples a row, half of which is
    learned; of text all is.
    """
    rng = np.random.default_rng(seed)
    data, vision, stage = config.data, config.model.vision, stage_of(config)
    b, t, s = data.batch_size, data.length, vision.image_size
    if stage.data == 'pairs':  # one caption a row
        images, places = rng.integers(0, 256, (b, s, s, 3), np.uint8), np.arange(t, dtype=np.int32)
        tokens, ends = rng.integers(0, vocab_size, (b, t), np.int32), rng.integers(0, t, b, np.int32)
        inside = places <= ends[:, None]
        text = {'tokens': tokens * inside, 'segments': inside.astype(np.int32), 'positions': places * inside}
        return {'images': images, **text, 'ends': ends + t * np.arange(b, dtype=np.int32)}
    slots = data.slots if stage.sees else 0
    rows = []
    for _ in range(b):
        examples = []
        for images in (slots - slots // 2, slots // 2):
            ids = rng.integers(0, vocab_size - 1, t // 2 + 1, np.int32)
            ids[1 : 1 + images * vision.patches] = vocab_size - 1
            learned = np.arange(t // 2 + 1) > (0 if stage.data == 'text' else t // 4)
            drawn = empty_slots(images, vision, data.cache_features)
            drawn = {name: _random(rng, empty.shape, empty.dtype) for name, empty in drawn.items()}
            pictures = [{name: values[i] for name, values in drawn.items()} for i in range(images)]
            examples.append((ids, learned, pictures))
        rows.append(pack(examples, t, empty_slots(slots, vision, data.cache_features) if slots else None))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _random(rng, shape, dtype):
    """Random pixels or features."""
    if dtype == np.uint8:
        return rng.integers(0, 256, shape, np.uint8)
    return rng.integers(-127, 128, shape, np.int8) if dtype == np.int8 else rng.random(shape, np.float32).astype(dtype)
