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
import io
import json
import re
from typing import ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SHAPES = ('circle', 'square', 'triangle', 'diamond', 'cross', 'ring')
COLOURS = ('red', 'green', 'blue', 'yellow', 'purple', 'orange', 'white', 'black')
SIZES = ('small', 'large')
# Reading order. No place name holds another one, so that a place is found by plain text search.
PLACES = (
    'top left',
    'top middle',
    'top right',
    'middle left',
    'centre',
    'middle right',
    'bottom left',
    'bottom middle',
    'bottom right',
)
KINDS = ('colour', 'shape', 'size', 'place', 'count', 'existence', 'comparison', 'description')
NUMBERS = ('none', 'one', 'two', 'three')
RELATIONS = ('to the left of', 'to the right of', 'above', 'below')
EXAMPLES = {
    'scenes': {'train': 24_000, 'validation': 1_000, 'heldout': 1_000},
    'text': {'train': 20_000, 'validation': 500},
    'chat': {'train': 10_000, 'validation': 500},
}
PIXELS = 60
RGB = {
    'red': (215, 30, 40),
    'green': (30, 165, 60),
    'blue': (35, 75, 225),
    'yellow': (250, 230, 40),
    'purple': (155, 40, 195),
    'orange': (250, 135, 20),
    'white': (248, 248, 248),
    'black': (15, 15, 15),
}
ACROSS = {'small': (9.0, 10.0), 'large': (15.0, 16.0)}  # pixels from edge to edge

# The id of a stream is part of the random seed, so the order of the streams must not change.
_STREAMS = tuple((content, split) for content, splits in EXAMPLES.items() for split in splits)
_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
# A step of 3 through the 8 colours visits seven different ones, while the shapes go round once and a bit.
_UNSEEN = tuple((COLOURS[(3 * k + 4) % 8], SHAPES[k % 6]) for k in range(7))
_SEEN = tuple(pair for pair in _PAIRS if pair not in _UNSEEN)

_QUESTIONS = {
    'colour': (
        'What colour is {ref}?',
        'Which colour is {ref}?',
        'What is the colour of {ref}?',
        'Name the colour of {ref}.',
    ),
    'shape': (
        'What shape is {ref}?',
        'Which shape is {ref}?',
        'What is the shape of {ref}?',
        'Name the shape of {ref}.',
    ),
    'size': (
        'How big is {ref}?',
        'Is {ref} small or large?',
        'What size is {ref}?',
        'What is the size of {ref}?',
    ),
    'place': (
        'Where is {ref}?',
        'Where in the picture is {ref}?',
        'Where can you see {ref}?',
        'In which part of the picture is {ref}?',
    ),
    'count': (
        'How many {noun} are in the picture?',
        'How many {noun} are there?',
        'How many {noun} can you see?',
        'Count the {noun} in the picture.',
    ),
    'existence': (
        'Is there {name} in the picture?',
        'Can you see {name}?',
        'Does the picture show {name}?',
        'Is {name} in the picture?',
    ),
    'comparison': (
        'Is {a} {relation} {b}?',
        'In the picture, is {a} {relation} {b}?',
        'Would you say that {a} is {relation} {b}?',
        'Look at {a}. Is it {relation} {b}?',
    ),
    'description': (
        'Describe the picture.',
        'What is in the picture?',
        'What does the picture show?',
        'Tell me what you can see.',
    ),
}
# How often a training conversation draws a kind. To answer, a model must choose one thing among several. It learns that
# from one kind of question within minutes and from an even mixture hardly at all, so one kind, colour, is asked most
# and the others follow. Descriptions, which say everything of everything, teach to read a picture.
_WEIGHTED_KINDS = ('colour',) * 6 + (
    *('shape', 'shape', 'size', 'place', 'place', 'place', 'count'),
    *('existence', 'existence', 'comparison', 'comparison', 'description', 'description', 'description'),
)
_LIMITS = dict.fromkeys(KINDS, 2) | {'place': 3, 'description': 1}

_FACTS = (
    'The {colour} {shape} is {size}.',
    'The {colour} {shape} is in the {place}.',
    'The thing in the {place} is {name}.',
    'In the {place} there is {name}.',
    'The {shape} in the {place} is {size} and {colour}.',
)
_PEOPLE = ('Mia', 'Tom', 'Ada', 'Ben', 'Zoe', 'Sam', 'Lily', 'Max', 'Ruth', 'Omar')
_OPENINGS = (
    'Imagine a picture: {}.',
    'Here is a picture in words: {}.',
    'My picture shows this: {}.',
    'Think of this picture: {}.',
)


class Thing(NamedTuple):
    """One object of a scene, in the words of SIZES, COLOURS, SHAPES and PLACES."""

    size: str
    colour: str
    shape: str
    place: str

    @property
    def pair(self) -> tuple[str, str]:
        """Colour and shape: what the held-out rule is about."""
        return self.colour, self.shape


def heldout_pairs() -> tuple[tuple[str, str], ...]:
    """The seven unseen (colour, shape) pairs: no colour loses more than one pair, no shape more than two."""
    return _UNSEEN


def scene(split: str, index: int, seed: int = 0, content: str = 'scenes') -> list[Thing]:
    """The things of one example in reading order: one to three, each in a cell and a colour-shape pair of its own."""
    return _scene(_rng(content, split, index, seed), split == 'heldout')


def render(things: list[Thing], rng: np.random.Generator) -> np.ndarray:
    """Draw a scene as (60, 60, 3) uint8: muted background, soft gradient, mild noise, anti-aliased things."""
    axis = np.arange(PIXELS, dtype=np.float32) + 0.5
    # Mid grey with a tint: at least 70 levels from white and from black in every channel.
    base = (rng.uniform(95, 145) + rng.uniform(-12, 12, 3)).astype(np.float32)
    slope = rng.uniform(-15, 15, 2).astype(np.float32) * rng.integers(2)
    ramp = axis / PIXELS - 0.5
    image = base + (slope[0] * ramp[:, None] + slope[1] * ramp)[..., None]
    for thing in things:
        row, column = divmod(PLACES.index(thing.place), 3)
        half = rng.uniform(*ACROSS[thing.size]) / 2
        room = min(2.0, PIXELS / 6 - half - 0.4)
        dy, dx = rng.uniform(-room, room, 2)
        y, x = (row + 0.5) * PIXELS / 3 + dy, (column + 0.5) * PIXELS / 3 + dx
        # Nothing reaches beyond its cell, so only the cell is drawn.
        rows, columns = (slice(i * PIXELS // 3, (i + 1) * PIXELS // 3 + 1) for i in (row, column))
        distance = _distance(thing.shape, axis[columns] - np.float32(x), axis[rows, None] - np.float32(y), half)
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        colour = np.clip(np.array(RGB[thing.colour]) + rng.uniform(-10, 10, 3), 0, 255).astype(np.float32)
        image[rows, columns] += cover * (colour - image[rows, columns])
    # One noise value for all three channels keeps the PNG small.
    image += rng.integers(-1, 2, (PIXELS, PIXELS, 1))
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def describe(things: list[Thing]) -> str:
    """The one right answer to a description question: 'A small red circle in the top left and ...', reading order."""
    return _sentence(_join([f'{_name(thing)} in the {thing.place}' for thing in things]))


def description_parts(text: str) -> list[str]:
    """Split a description (or any guess at one) into a part per thing: lower case, no full stop, no article."""
    parts = re.split(r',\s+|\s+and\s+', text.strip().rstrip('.').lower())
    return [re.sub(r'^an?\s+', '', part) for part in parts]


def example(split: str, index: int, seed: int = 0) -> dict:
    """One example of the scenes: id, image (PNG bytes), caption, conversation (a list of messages)."""
    rng = _rng('scenes', split, index, seed)
    things = _scene(rng, split == 'heldout')
    png = io.BytesIO()
    Image.fromarray(render(things, rng)).save(png, 'PNG', compress_level=3)
    caption = _caption(things, rng) if rng.random() < 0.4 else _short_caption(things, rng)
    if split == 'train':
        # Few questions on many pictures: the answers of a long conversation are told by its other questions.
        turns = _turns(things, rng, int(rng.integers(1, 4)))
    else:
        turns = _exam(things, rng, split == 'heldout')
    content = [{'type': 'image'}, {'type': 'text', 'text': turns[0][1]}]
    if rng.random() < 0.2:
        content.reverse()
    return {
        'id': f'{split}-{index:05d}',
        'image': png.getvalue(),
        'caption': caption,
        'conversation': _messages(turns, content),
    }


def text(split: str, n_documents: int, seed: int = 0) -> list[str]:
    """The first documents of the text corpus, 60 to 120 words each; they never mention an unseen pair."""
    return [_document(split, index, seed) for index in range(n_documents)]


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

    VERSION = tfds.core.Version('1.0.0')
    BUILDER_CONFIGS: ClassVar = [TinyWorldConfig(name=content, content=content) for content in EXAMPLES]

    def _info(self) -> tfds.core.DatasetInfo:
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
        return tfds.core.DatasetInfo(
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
        for index in range(n):
            row = {'id': f'{split}-{index:05d}'}
            if content == 'scenes':
                row = example(split, index, seed)
                row['image'] = io.BytesIO(row['image'])
                row['conversation'] = json.dumps(row['conversation'])
            elif content == 'text':
                row['text'] = _document(split, index, seed)
            else:
                row['conversation'] = json.dumps(_chat(split, index, seed))
            yield row['id'], row


# Scenes.


def _rng(content, split, index, seed):
    return np.random.default_rng([seed, _STREAMS.index((content, split)), index])


def _pick(rng, options):
    return options[rng.integers(len(options))]


def _scene(rng, heldout):
    n = _pick(rng, (1, 1, 2, 2, 2, 3, 3, 3))
    allowed = _PAIRS if heldout else _SEEN
    pairs = []
    if heldout:
        pairs.append(_pick(rng, _UNSEEN))
        if n == 3 and rng.random() < 0.75:
            # Two seen things that would recombine into another unseen pair: a hard 'No.' for an existence question.
            colour, shape = _pick(rng, [pair for pair in _UNSEEN if pair != pairs[0]])
            pairs.append(_pick(rng, [pair for pair in _SEEN if pair[0] == colour]))
            pairs.append(_pick(rng, [pair for pair in _SEEN if pair[1] == shape]))
    while len(pairs) < n:
        colour, shape = _pick(rng, allowed)
        if pairs:
            # Things often share a colour or a shape, so that one word is not enough to tell them apart.
            other, share = _pick(rng, pairs), rng.random()
            colour = other[0] if share < 0.25 else colour
            shape = other[1] if 0.25 <= share < 0.5 else shape
        if (colour, shape) in allowed and (colour, shape) not in pairs:
            pairs.append((colour, shape))
    cells = rng.permutation(9)[:n]
    order = np.argsort(cells)
    return [Thing(_pick(rng, SIZES), *pairs[i], PLACES[cells[i]]) for i in order]


def _distance(shape, x, y, half):
    """Signed distance in pixels to the edge of a shape around (0, 0), negative inside; x: (W,), y: (H, 1)."""
    if shape == 'circle':
        return np.hypot(x, y) - half
    if shape == 'ring':
        return np.abs(np.hypot(x, y) - 0.73 * half) - 0.27 * half
    x = np.abs(x)
    if shape == 'triangle':
        # Two slanted sides that meet at the top, and a flat bottom.
        return np.maximum((2 * x - y - half) / 5**0.5, y - half)
    y = np.abs(y)
    if shape == 'square':
        return np.maximum(x, y) - half
    if shape == 'diamond':
        return (x + y - half) / 2**0.5
    arm = 0.34 * half
    return np.minimum(np.maximum(x - half, y - arm), np.maximum(x - arm, y - half))


# Words.


def _a(words):
    return f'an {words}' if words[0] in 'aeiou' else f'a {words}'


def _name(thing):
    return _a(f'{thing.size} {thing.colour} {thing.shape}')


def _full(thing):
    return f'the {thing.colour} {thing.shape}'


def _plural(shape):
    return shape + 'es' if shape.endswith('s') else shape + 's'


def _join(parts):
    return ' and '.join([part for part in (', '.join(parts[:-1]), parts[-1]) if part])


def _sentence(words):
    return words[0].upper() + words[1:] + '.'


def _caption(things, rng):
    """Every thing with its size, colour, shape and place; the order and the wording vary."""
    things = [things[i] for i in rng.permutation(len(things))]
    listed = _join([f'{_name(thing)} in the {thing.place}' for thing in things])
    number = f'{NUMBERS[len(things)]} thing{"s" * (len(things) > 1)}'
    bare = '; '.join(f'{thing.size} {thing.colour} {thing.shape}, {thing.place}' for thing in things)
    return _pick(
        rng,
        (
            listed,
            f'there is {listed}',
            f'{number}: {listed}',
            bare,
            f'{number}: {bare}',
            _join([f'in the {thing.place} {_name(thing)}' for thing in things]),
            '; '.join(f'the {thing.shape} in the {thing.place} is {thing.size} and {thing.colour}' for thing in things),
        ),
    )


def _short_caption(things, rng):
    """Every thing's shape with one or none of its other properties.

    Contrastive learning looks no further than it must: where captions tell everything, colours and places are enough
    to tell a batch's pictures apart, and no shape is learned.
    """
    told = _pick(rng, ('', '', 'colour', 'size', 'place'))
    things = [things[i] for i in rng.permutation(len(things))]
    if told == 'place':
        return _join([f'{_a(thing.shape)} in the {thing.place}' for thing in things])
    return _join([_a(f'{getattr(thing, told)} {thing.shape}' if told else thing.shape) for thing in things])


# Questions.


def _holds(place, relation, other):
    """Whether a thing in one place is, say, above a thing in another."""
    (row, column), (other_row, other_column) = (divmod(PLACES.index(name), 3) for name in (place, other))
    return {
        'to the left of': column < other_column,
        'to the right of': column > other_column,
        'above': row < other_row,
        'below': row > other_row,
    }[relation]


def _relation(place, other, holds, rng):
    """A relation that holds, or one whose opposite holds: the places always differ along its axis."""
    first, second = (place, other) if holds else (other, place)
    return _pick(rng, [relation for relation in RELATIONS if _holds(first, relation, second)])


def _references(kind, thing, things):
    """Expressions that point at this thing alone, without naming what the question asks for."""
    only_colour = sum(other.colour == thing.colour for other in things) == 1
    only_shape = sum(other.shape == thing.shape for other in things) == 1
    options = [_full(thing)] * 2 if kind in ('size', 'place') else []
    if kind != 'place':
        options.append(f'the thing in the {thing.place}')
    if kind != 'colour' and only_colour:
        options.append(f'the {thing.colour} thing')
    if kind != 'shape' and only_shape:
        options.append(f'the {thing.shape}')
    return options


def _count(things, rng, focus=None):
    """What to count (a plural) and how many there are; with a focus, only what that thing is one of."""
    if rng.random() < 0.4:
        return 'things', len(things)
    counts = {f'{colour} things': sum(thing.colour == colour for thing in things) for colour in COLOURS}
    counts |= {_plural(shape): sum(thing.shape == shape for thing in things) for shape in SHAPES}
    if focus:
        counts = {noun: counts[noun] for noun in (f'{focus.colour} things', _plural(focus.shape))}
    # Without this choice nearly every count would be none; large counts are rare, so they are preferred.
    wanted = _pick(rng, [count for count in (0, 0, 1, 2, 2, 2, 3, 3, 3) if count in counts.values()])
    return _pick(rng, [noun for noun, count in counts.items() if count == wanted]), wanted


def _absent(things, rng, heldout=False):
    """A pair that the scene lacks; where it can, it mostly recombines a colour and a shape of the scene."""
    present = [thing.pair for thing in things]
    colours, shapes = zip(*present, strict=True)
    shared = ([], [], [])
    for colour, shape in _UNSEEN if heldout else _SEEN:
        if (colour, shape) not in present:
            shared[(colour in colours) + (shape in shapes)].append((colour, shape))
    wanted = 2 if heldout else _pick(rng, (2, 2, 2, 2, 2, 2, 2, 0))
    return _pick(rng, next(shared[level] for level in (wanted, 2, 1, 0) if shared[level]))


def _kinds(things):
    """The kinds that a scene has questions of: one thing has nothing to be compared with."""
    return [kind for kind in KINDS if kind != 'comparison' or len(things) > 1]


def _ask(kind, things, rng, yes, heldout=False):
    """One question of a kind: (what fills its template, the answer). yes: the answer, where it is yes or no."""
    focus = _pick(rng, [thing for thing in things if thing.pair in _UNSEEN] if heldout else things)
    if kind in ('colour', 'shape', 'size', 'place'):
        # A heldout size or place question names the whole unseen pair, whatever else would do.
        by_name = heldout and kind in ('size', 'place')
        reference = _full(focus) if by_name else _pick(rng, _references(kind, focus, things))
        return {'ref': reference}, _sentence(getattr(focus, kind))
    if kind == 'count':
        noun, count = _count(things, rng, focus if heldout else None)
        return {'noun': noun}, _sentence(NUMBERS[count])
    if kind == 'existence':
        pair = focus.pair if yes else _absent(things, rng, heldout)
        return {'name': _a(' '.join(pair))}, 'Yes.' if yes else 'No.'
    if kind == 'comparison':
        first, second = focus, _pick(rng, [thing for thing in things if thing != focus])
        if rng.random() < 0.5:
            first, second = second, first
        relation = _relation(first.place, second.place, yes, rng)
        return {'a': _full(first), 'relation': relation, 'b': _full(second)}, 'Yes.' if yes else 'No.'
    return {}, describe(things)


def _worded(kind, slots, rng):
    return _pick(rng, _QUESTIONS[kind]).format(**slots)


def _turns(things, rng, n):
    """n different questions of mixed kinds, each (kind, question, answer), in random order."""
    # So many existence and comparison questions have enough different ones even if all the answers are 'Yes.'.
    left = _LIMITS | {'existence': len(things), 'comparison': (0, 2, 3)[len(things) - 1]}
    turns, asked = [], set()
    while len(turns) < n:
        kind, yes, key = _pick(rng, _WEIGHTED_KINDS), rng.random() < 0.5, None
        if not left[kind]:
            continue
        left[kind] -= 1
        # The answer stays while the question is drawn again; else 'No.', which has more questions, would win.
        while key is None or key in asked:
            slots, answer = _ask(kind, things, rng, yes)
            key = (kind, *slots.values())
        asked.add(key)
        turns.append((kind, _worded(kind, slots, rng), answer))
    return turns


def _exam(things, rng, heldout):
    """Four questions of four kinds; over a split every kind is asked of half of the scenes."""
    kinds = [KINDS[i] for i in rng.permutation(len(KINDS)) if KINDS[i] != 'comparison']
    # Three scenes in four have two things to compare, so two in three of these make half of all.
    if len(things) > 1 and rng.random() < 2 / 3:
        kinds.insert(int(rng.integers(4)), 'comparison')
    turns = []
    for kind in kinds[:4]:
        slots, answer = _ask(kind, things, rng, rng.random() < 0.5, heldout)
        turns.append((kind, _worded(kind, slots, rng), answer))
    return turns


def _messages(turns, first_content):
    """Turns as messages; the first user message has its own content (with the picture or the description)."""
    messages = []
    for i, (kind, question, answer) in enumerate(turns):
        messages.append({'role': 'user', 'content': question if i else first_content})
        messages.append({'role': 'assistant', 'content': answer, 'kind': kind})
    return messages


def _chat(split, index, seed):
    rng = _rng('chat', split, index, seed)
    things = _scene(rng, heldout=False)
    opening = _pick(rng, _OPENINGS).format(_caption(things, rng))
    turns = _turns(things, rng, int(rng.integers(3, 7)))
    return _messages(turns, f'{opening} {turns[0][1]}')


# Documents.


def _fact(things, rng):
    """One true sentence about a scene."""
    thing, form = _pick(rng, things), rng.random()
    if form < 0.15:
        noun, count = _count(things, rng)
        one = noun.removesuffix('es') if noun == 'crosses' else noun.removesuffix('s')
        words = {0: f'are no {noun}', 1: f'is one {one}'}.get(count, f'are {NUMBERS[count]} {noun}')
        return f'There {words}.'
    if form < 0.25:
        return f'There is no {" ".join(_absent(things, rng))}.'
    others = [other for other in things if other != thing]
    if form < 0.6 and others:
        other = _pick(rng, others)
        relation = _relation(thing.place, other.place, True, rng)
        reason = f'{_full(thing)} is in the {thing.place} and {_full(other)} is in the {other.place}, so '
        return _sentence(f'{_pick(rng, ("", reason))}{_full(thing)} is {relation} {_full(other)}')
    return _pick(rng, _FACTS).format(**thing._asdict(), name=_name(thing))


def _lesson(rng):
    """One true sentence about the places of any scene."""
    place, other = (PLACES[i] for i in rng.permutation(9)[:2])
    return f'The {place} is {_relation(place, other, True, rng)} the {other}.'


def _document(split, index, seed):
    """A paragraph of facts, a story with talk, or lines of questions and answers, about one scene."""
    rng = _rng('text', split, index, seed)
    things = _scene(rng, heldout=False)
    form = _pick(rng, ('facts', 'story', 'lines'))
    who, other = (_PEOPLE[i] for i in rng.permutation(len(_PEOPLE))[:2])
    if form == 'story':
        steps = [f'{_name(things[i])} in the {things[i].place}' for i in rng.permutation(len(things))]
        verb = _pick(rng, ('draws', 'paints', 'sees'))
        if verb == 'sees':
            pieces = [f'{who} looks at a picture that {other} cannot see. {who} sees {_join(steps)}.']
        else:
            pieces = [f'{who} {verb} a picture. First {who} {verb} {steps[0]}.']
            pieces += [f'Then {who} {verb} {step}.' for step in steps[1:]]
        line = _pick(
            rng,
            (
                f'{other} asks: {{}} {who} answers: {{}}',
                f'"{{}}" asks {other}. {who} says: "{{}}"',
            ),
        )
    else:
        pieces = [_pick(rng, _OPENINGS).format(_caption(things, rng))]
        line = _pick(rng, ('Question: {} Answer: {}', 'Q: {} A: {}'))
    n_words, asked = int(rng.integers(60, 91)), set()
    while len(' '.join(pieces).split()) < n_words:
        chance = rng.random()
        if chance < 0.1:
            piece = _lesson(rng)
        elif form == 'facts' or (form == 'story' and chance < 0.4):
            piece = _fact(things, rng)
        else:
            kind = _pick(rng, _kinds(things))
            slots, answer = _ask(kind, things, rng, rng.random() < 0.5)
            if (kind, *slots.values()) in asked:
                continue
            asked.add((kind, *slots.values()))
            piece = line.format(_worded(kind, slots, rng), answer)
        if piece not in pieces:
            pieces.append(piece)
    return ('\n' if form == 'lines' else ' ').join(pieces)
