"""tiny_world's words: captions, questions with answers, conversations and documents about a scene."""

from nanovision_jax.data.datasets.tiny_world_scenes import COLOURS, PLACES, SEEN, SHAPES, UNSEEN, Thing, pick

KINDS = ('colour', 'shape', 'size', 'place', 'count', 'existence', 'comparison', 'description')  # training adds 'thing'
NUMBERS = ('none', 'one', 'two', 'three')
RELATIONS = ('to the left of', 'to the right of', 'above', 'below')

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
    'thing': (
        'Describe {ref}.',
        'Tell me about {ref}.',
        'What can you say about {ref}?',
        'What is {ref} like?',
    ),
    'description': (
        'Describe the picture.',
        'What is in the picture?',
        'What does the picture show?',
        'Tell me what you can see.',
    ),
}
# How often a training conversation draws a kind. To answer, a model must find one thing among several, and each kind of
# question learns its own way of finding. Telling all of one thing ('thing') teaches one way for all of them.
# Comparisons are learned last, as they need two places.
_WEIGHTED_KINDS = ('comparison',) * 6 + ('thing',) * 5 + ('place',) * 4 + ('existence',) * 3
_WEIGHTED_KINDS += ('colour', 'shape', 'size', 'count', 'count', 'description')
_LIMITS = dict.fromkeys((*KINDS, 'thing'), 2) | {'place': 3, 'description': 1}

_FACTS = (
    'The {colour} {shape} is {size}.',
    'The {colour} {shape} is in the {place}.',
    'The thing in the {place} is {name}.',
    'In the {place} there is {name}.',
    'The {shape} in the {place} is {size} and {colour}.',
)
_PEOPLE = ('Mia', 'Tom', 'Ada', 'Ben', 'Zoe', 'Sam', 'Lily', 'Max', 'Ruth', 'Omar')
OPENINGS = (
    'Imagine a picture: {}.',
    'Here is a picture in words: {}.',
    'My picture shows this: {}.',
    'Think of this picture: {}.',
)


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


def caption(things, rng):
    """Every thing with its size, colour, shape and place; the order and the wording vary."""
    things = [things[i] for i in rng.permutation(len(things))]
    listed = _join([f'{_name(thing)} in the {thing.place}' for thing in things])
    number = f'{NUMBERS[len(things)]} thing{"s" * (len(things) > 1)}'
    bare = '; '.join(f'{thing.size} {thing.colour} {thing.shape}, {thing.place}' for thing in things)
    return pick(
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


def short_caption(things, rng):
    """Every thing's shape with one or none of its other properties.

    Contrastive learning looks no further than it must: where captions tell everything, colours and places are enough
    to tell a batch's pictures apart, and no shape is learned.
    """
    told = pick(rng, ('', '', 'colour', 'size', 'place'))
    things = [things[i] for i in rng.permutation(len(things))]
    if told == 'place':
        return _join([f'{_a(thing.shape)} in the {thing.place}' for thing in things])
    return _join([_a(f'{getattr(thing, told)} {thing.shape}' if told else thing.shape) for thing in things])


def describe(things: list[Thing]) -> str:
    """The right answer where all is asked: 'A small red circle in the top left and ...', in reading order."""
    return _sentence(_join([f'{_name(thing)} in the {thing.place}' for thing in things]))


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
    return pick(rng, [relation for relation in RELATIONS if _holds(first, relation, second)])


def _references(kind, thing, things):
    """Expressions that point at this thing alone, without naming what the question asks for."""
    only_colour = sum(other.colour == thing.colour for other in things) == 1
    only_shape = sum(other.shape == thing.shape for other in things) == 1
    options = [_full(thing)] * {'size': 2, 'place': 2, 'thing': 1}.get(kind, 0)
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
    wanted = pick(rng, [count for count in (0, 0, 1, 2, 2, 2, 3, 3, 3) if count in counts.values()])
    return pick(rng, [noun for noun, count in counts.items() if count == wanted]), wanted


def _absent(things, rng, heldout=False):
    """A pair that the scene lacks; where it can, it mostly recombines a colour and a shape of the scene."""
    present = [thing.pair for thing in things]
    colours, shapes = zip(*present, strict=True)
    shared = ([], [], [])
    for colour, shape in UNSEEN if heldout else SEEN:
        if (colour, shape) not in present:
            shared[(colour in colours) + (shape in shapes)].append((colour, shape))
    wanted = 2 if heldout else pick(rng, (2, 2, 2, 2, 2, 2, 2, 0))
    return pick(rng, next(shared[level] for level in (wanted, 2, 1, 0) if shared[level]))


def _kinds(things):
    """The kinds that a scene has questions of: one thing has nothing to be compared with."""
    return [kind for kind in KINDS if kind != 'comparison' or len(things) > 1]


def _ask(kind, things, rng, yes, heldout=False):
    """One question of a kind: (what fills its template, the answer). yes: the answer, where it is yes or no."""
    focus = pick(rng, [thing for thing in things if thing.pair in UNSEEN] if heldout else things)
    if kind in ('colour', 'shape', 'size', 'place', 'thing'):
        # A heldout size or place question names the whole unseen pair, whatever else would do.
        by_name = heldout and kind in ('size', 'place')
        reference = _full(focus) if by_name else pick(rng, _references(kind, focus, things))
        return {'ref': reference}, describe([focus]) if kind == 'thing' else _sentence(getattr(focus, kind))
    if kind == 'count':
        noun, count = _count(things, rng, focus if heldout else None)
        return {'noun': noun}, _sentence(NUMBERS[count])
    if kind == 'existence':
        pair = focus.pair if yes else _absent(things, rng, heldout)
        return {'name': _a(' '.join(pair))}, 'Yes.' if yes else 'No.'
    if kind == 'comparison':
        first, second = focus, pick(rng, [thing for thing in things if thing != focus])
        if rng.random() < 0.5:
            first, second = second, first
        relation = _relation(first.place, second.place, yes, rng)
        return {'a': _full(first), 'relation': relation, 'b': _full(second)}, 'Yes.' if yes else 'No.'
    return {}, describe(things)


def _worded(kind, slots, rng):
    return pick(rng, _QUESTIONS[kind]).format(**slots)


def turns(things, rng, n):
    """n different questions of mixed kinds, each (kind, question, answer), in random order."""
    # So many existence and comparison questions have enough different ones even if all the answers are 'Yes.'.
    left = _LIMITS | {'existence': len(things), 'comparison': (0, 2, 3)[len(things) - 1]}
    turns, asked = [], set()
    while len(turns) < n:
        kind, yes, key = pick(rng, _WEIGHTED_KINDS), rng.random() < 0.5, None
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


def exam(things, rng, heldout):
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


def messages(turns, first_content):
    """Turns as messages; the first user message has its own content (with the picture or the description)."""
    messages = []
    for i, (kind, question, answer) in enumerate(turns):
        messages.append({'role': 'user', 'content': question if i else first_content})
        messages.append({'role': 'assistant', 'content': answer, 'kind': kind})
    return messages


# Documents.


def _fact(things, rng):
    """One true sentence about a scene."""
    thing, form = pick(rng, things), rng.random()
    if form < 0.15:
        noun, count = _count(things, rng)
        one = noun.removesuffix('es') if noun == 'crosses' else noun.removesuffix('s')
        words = {0: f'are no {noun}', 1: f'is one {one}'}.get(count, f'are {NUMBERS[count]} {noun}')
        return f'There {words}.'
    if form < 0.25:
        return f'There is no {" ".join(_absent(things, rng))}.'
    others = [other for other in things if other != thing]
    if form < 0.6 and others:
        other = pick(rng, others)
        relation = _relation(thing.place, other.place, True, rng)
        reason = f'{_full(thing)} is in the {thing.place} and {_full(other)} is in the {other.place}, so '
        return _sentence(f'{pick(rng, ("", reason))}{_full(thing)} is {relation} {_full(other)}')
    return pick(rng, _FACTS).format(**thing._asdict(), name=_name(thing))


def _lesson(rng):
    """One true sentence about the places of any scene."""
    place, other = (PLACES[i] for i in rng.permutation(9)[:2])
    return f'The {place} is {_relation(place, other, True, rng)} the {other}.'


def document(things, rng):
    """A paragraph of facts, a story with talk, or lines of questions and answers, about one scene."""
    form = pick(rng, ('facts', 'story', 'lines'))
    who, other = (_PEOPLE[i] for i in rng.permutation(len(_PEOPLE))[:2])
    if form == 'story':
        steps = [f'{_name(things[i])} in the {things[i].place}' for i in rng.permutation(len(things))]
        verb = pick(rng, ('draws', 'paints', 'sees'))
        if verb == 'sees':
            pieces = [f'{who} looks at a picture that {other} cannot see. {who} sees {_join(steps)}.']
        else:
            pieces = [f'{who} {verb} a picture. First {who} {verb} {steps[0]}.']
            pieces += [f'Then {who} {verb} {step}.' for step in steps[1:]]
        line = pick(
            rng,
            (
                f'{other} asks: {{}} {who} answers: {{}}',
                f'"{{}}" asks {other}. {who} says: "{{}}"',
            ),
        )
    else:
        pieces = [pick(rng, OPENINGS).format(caption(things, rng))]
        line = pick(rng, ('Question: {} Answer: {}', 'Q: {} A: {}'))
    n_words, asked = int(rng.integers(60, 91)), set()
    while len(' '.join(pieces).split()) < n_words:
        chance = rng.random()
        if chance < 0.1:
            piece = _lesson(rng)
        elif form == 'facts' or (form == 'story' and chance < 0.4):
            piece = _fact(things, rng)
        else:
            kind = pick(rng, _kinds(things))
            slots, answer = _ask(kind, things, rng, rng.random() < 0.5)
            if (kind, *slots.values()) in asked:
                continue
            asked.add((kind, *slots.values()))
            piece = line.format(_worded(kind, slots, rng), answer)
        if piece not in pieces:
            pieces.append(piece)
    return ('\n' if form == 'lines' else ' ').join(pieces)
