"""tiny_world: small rendered scenes with conversations, and texts about the same world, as a TFDS data set.

A scene holds one to three things on a 3 x 3 grid. Everything about an example (the scene, the picture, the words) is a
pure function of (seed, content, split, index), so nothing is downloaded and the same call gives the same bytes.

Contents and their splits:
    scenes: pictures with a caption and a conversation; train, validation, heldout.
    text:   paragraphs, stories and question lines about imagined scenes; train, validation.
    chat:   conversations about a scene that the user describes in words; train, validation.

Held-out rule: seven of the 48 colour-shape pairs (`heldout_pairs`) appear nowhere in train and validation, whether in a
picture or in words. See `TinyWorld`.
"""

import dataclasses
import functools
import io
import itertools
import json
import pathlib
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from nanovision_jax.data.datasets import tiny_world_words as words
from nanovision_jax.data.datasets.builders import Info, build
from nanovision_jax.data.datasets.tiny_world_scenes import PIXELS, Thing, choose_scene, pick, render
from nanovision_jax.data.workers import Workers, cores, ordered_map

EXAMPLES = {
    'scenes': {'train': 40_000, 'validation': 1_000, 'heldout': 1_000},
    'text': {'train': 20_000, 'validation': 500},
    'chat': {'train': 10_000, 'validation': 500},
}
BLOCK, WORTH_PROCESSES = 64, 5_000  # examples a process draws at once, and from how many on there are processes
# The id of a stream is part of the random seed, so the order of the streams must not change.
_STREAMS = tuple((content, split) for content, splits in EXAMPLES.items() for split in splits)


def scene(split: str, index: int, seed: int = 0, content: str = 'scenes') -> list[Thing]:
    """The things of one example in reading order: one to three, each in a cell and a colour-shape pair of its own."""
    return choose_scene(_rng(content, split, index, seed), split == 'heldout')


def example(split: str, index: int, seed: int = 0) -> dict:
    """One example of the scenes: id, image (PNG bytes), caption, conversation (a list of messages)."""
    rng = _rng('scenes', split, index, seed)
    things = choose_scene(rng, split == 'heldout')
    png = io.BytesIO()
    Image.fromarray(render(things, rng)).save(png, 'PNG', compress_level=3)
    caption = words.caption(things, rng) if rng.random() < 0.4 else words.short_caption(things, rng)
    if split == 'train':
        # Few questions on many pictures: the answers of a long conversation are told by its other questions.
        turns = words.turns(things, rng, int(rng.integers(1, 4)))
    else:
        turns = words.exam(things, rng, split == 'heldout')
    content = [{'type': 'image'}, {'type': 'text', 'text': turns[0][1]}]
    if rng.random() < 0.2:
        content.reverse()
    return {
        'id': f'{split}-{index:05d}',
        'image': png.getvalue(),
        'caption': caption,
        'conversation': words.messages(turns, content),
    }


def text(split: str, n_documents: int, seed: int = 0) -> list[str]:
    """The first documents of the text corpus, 60 to 120 words each; they never mention an unseen pair."""
    return [_text(split, index, seed) for index in range(n_documents)]


def chats(split: str, n: int, seed: int = 0) -> list[list[dict]]:
    """The first conversations without a picture: the user describes a scene, then asks three to six questions."""
    return [_chat(split, index, seed) for index in range(n)]


@dataclasses.dataclass(eq=False)
class TinyWorldConfig(tfds.core.BuilderConfig):
    """What to build: one of the contents of EXAMPLES, examples per split (None: those of EXAMPLES), and the seed."""

    content: str = 'scenes'
    examples: dict[str, int] | None = None
    seed: int = 0


class TinyWorld(tfds.core.GeneratorBasedBuilder):
    """Rendered scenes of simple things with captions and conversations, and texts and chats about the same world.

    Held-out rule: pair k of 0..6 joins colour (3k + 4) mod 8 with shape k mod 6, which makes 7 of the 48 colour-shape
    pairs. They never appear in a train or validation split: not in a picture, caption, question (the ones answered
    'No.' included), answer or text. Every heldout scene holds at least one thing of such a pair, and every heldout
    question is about one: the thing asked about, one of the two compared, or the pair whose existence is asked. The
    plain count and the description are asked of a scene that holds one.
    """

    VERSION = tfds.core.Version('2.0.0')
    BUILDER_CONFIGS: ClassVar = [TinyWorldConfig(name=content, content=content) for content in EXAMPLES]

    def _info(self) -> Info:
        conversation = tfds.features.Text(doc='JSON: a list of messages')
        features = {
            'scenes': {
                'image': tfds.features.Image(shape=(PIXELS, PIXELS, 3), encoding_format='png'),
                'caption': tfds.features.Text(),
                'conversation': conversation,
            },
            'text': {'text': tfds.features.Text()},
            'chat': {'conversation': conversation},
        }[self.builder_config.content]
        return Info(
            builder=self,
            description=TinyWorld.__doc__,
            features=tfds.features.FeaturesDict({'id': tfds.features.Text()} | features),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        config = self.builder_config
        sizes = config.examples or EXAMPLES[config.content]
        return {split: self._generate_examples(split, n) for split, n in sizes.items()}

    def _generate_examples(self, split, n):
        content, seed = self.builder_config.content, self.builder_config.seed
        if content == 'scenes':
            for row in _examples(split, n, seed):
                picture = {'image': io.BytesIO(row['image']), 'conversation': json.dumps(row['conversation'])}
                yield row['id'], row | picture
            return
        for index in range(n):
            row = {'id': f'{split}-{index:05d}'}
            if content == 'text':
                row['text'] = _text(split, index, seed)
            else:
                row['conversation'] = json.dumps(_chat(split, index, seed))
            yield row['id'], row


def _examples(split, n, seed):
    """Yields the first n examples of the scenes: drawn in processes where they are worth starting."""
    draw, starts = functools.partial(_block, split, n, seed), range(0, n, BLOCK)
    if n < WORTH_PROCESSES or cores() == 1:
        yield from itertools.chain.from_iterable(map(draw, starts))
        return
    with Workers(draw, cores()) as pool:
        yield from itertools.chain.from_iterable(ordered_map(pool, pool.call, starts, 2 * cores()))


def _block(split, n, seed, start):
    return [example(split, index, seed) for index in range(start, min(start + BLOCK, n))]


def open_rows(folder, content: str, split: str):
    """The rows of one split of a content, as TFDS reads them; the data set is made in `folder` at the first call."""
    builder = TinyWorld(config=content, data_dir=folder, file_format='array_record')
    if not pathlib.Path(builder.data_dir).exists():
        print(f'making tiny_world/{content} in {folder} (once)')
        build(builder)
    decoders = {'image': tfds.decode.SkipDecoding()} if content == 'scenes' else None
    return builder.as_data_source(split, decoders=decoders)


def _rng(content, split, index, seed):
    return np.random.default_rng([seed, _STREAMS.index((content, split)), index])


def _text(split, index, seed):
    rng = _rng('text', split, index, seed)
    return words.document(choose_scene(rng, heldout=False), rng)


def _chat(split, index, seed):
    rng = _rng('chat', split, index, seed)
    things = choose_scene(rng, heldout=False)
    opening = pick(rng, words.OPENINGS).format(words.caption(things, rng))
    turns = words.turns(things, rng, int(rng.integers(3, 7)))
    return words.messages(turns, f'{opening} {turns[0][1]}')
