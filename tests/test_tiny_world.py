"""tiny_world: determinism, the held-out rule, right answers, balance, pictures, and the build through TFDS."""

import io
import json
import re
import sys
import tempfile
from collections import Counter, defaultdict

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

from nanovision_jax.data.datasets import builders
from nanovision_jax.data.datasets import tiny_world as tw
from nanovision_jax.data.datasets import tiny_world_scenes as scenes
from nanovision_jax.data.datasets import tiny_world_words as words

SPLITS = {'train': 2500, 'validation': 1000, 'heldout': 1000}
WORDS_SPLITS = ('train', 'validation')
N_WORDS = 300
UNSEEN = set(scenes.heldout_pairs())
C, S, P, Z = ('|'.join(names) for names in (scenes.COLOURS, scenes.SHAPES, scenes.PLACES, scenes.SIZES))
REFERENCE = re.compile(rf'\bthe (?:thing in the (?:{P})|(?:{C}) thing|(?:{C}) (?:{S})|(?:{S}))\b')
SIZE, COLOUR, SHAPE, PLACE = rf'(?P<size>{Z})', rf'(?P<colour>{C})', rf'(?P<shape>{S})', rf'(?P<place>{P})'
FACTS = (
    rf'The {COLOUR} {SHAPE} is {SIZE}\.',
    rf'The {COLOUR} {SHAPE} is in the {PLACE}\.',
    rf'The thing in the {PLACE} is a {SIZE} {COLOUR} {SHAPE}\.',
    rf'In the {PLACE} there is a {SIZE} {COLOUR} {SHAPE}\.',
    rf'The {SHAPE} in the {PLACE} is {SIZE} and {COLOUR}\.',
)


@pytest.fixture(scope='module')
def examples():
    return {split: [tw.example(split, i) for i in range(n)] for split, n in SPLITS.items()}


def user_text(message):
    if isinstance(message['content'], str):
        return message['content']
    return ' '.join(part['text'] for part in message['content'] if part['type'] == 'text')


def turns(conversation):
    """(kind, question, answer) of each turn."""
    assert [message['role'] for message in conversation] == ['user', 'assistant'] * (len(conversation) // 2)
    pairs = zip(conversation[::2], conversation[1::2], strict=True)
    return [(answer['kind'], user_text(question), answer['content']) for question, answer in pairs]


def all_turns(examples, split):
    for i, row in enumerate(examples[split]):
        things = tw.scene(split, i)
        for turn in turns(row['conversation']):
            yield things, *turn


def pairs_in(text):
    """Every (colour, shape) that a text states, in either order of the words."""
    found = set(re.findall(rf'\b({C})\W+({S})(?:e?s)?\b', text.lower()))
    late = rf'\b({S})(?: in the (?:{P}))?(?:,| is| that is)(?: (?:{Z})(?: and|,))? ({C})\b'
    return found | {(colour, shape) for shape, colour in re.findall(late, text.lower())}


def row_and_column(place):
    row = 0 if 'top' in place else 2 if 'bottom' in place else 1
    return row, 0 if 'left' in place else 2 if 'right' in place else 1


def matches(reference, things):
    """The things that an expression such as 'the red thing' may mean."""
    if ' in the ' in reference:
        return [t for t in things if reference.endswith(f' in the {t.place}')]
    named_by = set(reference.split()) - {'the', 'thing'}
    return [t for t in things if named_by <= {t.colour, t.shape}]


def stands(first, relation, second):
    (row, column), (other_row, other_column) = row_and_column(first.place), row_and_column(second.place)
    distance = {
        'to the left of': other_column - column,
        'to the right of': column - other_column,
        'above': other_row - row,
        'below': row - other_row,
    }[relation]
    assert distance != 0, 'the two do not differ along this axis'
    return distance > 0


def named(question):
    return re.search(rf'\ban? ({C}) ({S})\b', question).groups()


def count_of(noun, things):
    if noun in ('thing', 'things'):
        return len(things)
    colour = re.fullmatch(rf'({C}) things?', noun)
    if colour:
        return sum(t.colour == colour[1] for t in things)
    shape = {'crosses': 'cross', **{f'{s}s': s for s in scenes.SHAPES}, **{s: s for s in scenes.SHAPES}}[noun]
    return sum(t.shape == shape for t in things)


def right_answer(kind, question, things):
    if kind in ('colour', 'shape', 'size', 'place'):
        (reference,) = REFERENCE.findall(question)
        (thing,) = matches(reference, things)
        # The question must not give its own answer away.
        assert kind == 'size' or getattr(thing, kind) not in question
        return f'{getattr(thing, kind)}.'.capitalize()
    if kind == 'count':
        noun = re.search(r'(?:How many|Count the) (.*?) (?:are|can|in)\b', question)[1]
        return ('None.', 'One.', 'Two.', 'Three.')[count_of(noun, things)]
    if kind == 'existence':
        return 'Yes.' if any(t.pair == named(question) for t in things) else 'No.'
    if kind == 'comparison':
        (first,), (second,) = (matches(reference, things) for reference in REFERENCE.findall(question))
        return 'Yes.' if stands(first, re.search('|'.join(words.RELATIONS), question)[0], second) else 'No.'
    if kind == 'thing':
        (reference,) = REFERENCE.findall(question)
        (thing,) = matches(reference, things)
        return right_answer('description', '', [thing])
    assert kind == 'description'
    order = sorted(things, key=lambda t: row_and_column(t.place))
    parts = [f'a {t.size} {t.colour} {t.shape} in the {t.place}' for t in order]
    answer = {1: '{}', 2: '{} and {}', 3: '{}, {} and {}'}[len(parts)].format(*parts)
    return answer[0].upper() + answer[1:] + '.'


def test_same_call_gives_the_same_example_and_another_seed_another():
    for split in SPLITS:
        assert tw.example(split, 7, seed=3) == tw.example(split, 7, seed=3)
        rows = [tw.example(split, 7, seed=3), tw.example(split, 8, seed=3), tw.example(split, 7, seed=4)]
        assert len({row['image'] for row in rows}) == len({str(row['conversation']) for row in rows}) == 3
    assert tw.example('train', 7)['image'] != tw.example('validation', 7)['image']
    for make in (tw.text, tw.chats):
        assert make('train', 20)[:8] == make('train', 8)
        assert make('train', 8, seed=1) != make('train', 8) != make('validation', 8)


def test_heldout_pairs_are_balanced():
    assert len(scenes.heldout_pairs()) == len(UNSEEN) == 7
    colours, shapes = zip(*scenes.heldout_pairs(), strict=True)
    assert max(Counter(colours).values()) == 1
    assert max(Counter(shapes).values()) == 2
    assert set(shapes) == set(scenes.SHAPES)


@pytest.mark.parametrize('content', tw.EXAMPLES)
@pytest.mark.parametrize('split', WORDS_SPLITS)
def test_no_unseen_pair_in_a_seen_scene(content, split):
    pairs = {t.pair for i in range(N_WORDS) for t in tw.scene(split, i, content=content)}
    assert not pairs & UNSEEN
    assert len(pairs) == 41  # every seen pair is reached


def test_pairs_in_finds_every_form_of_a_pair():
    # The searches below are only worth something if the search itself finds what it looks for.
    assert pairs_in('Is there a white circle in the picture?') == {('white', 'circle')}
    assert pairs_in('the ring in the top left is small and yellow') == {('yellow', 'ring')}
    assert pairs_in('small red cross, top left; large red square, centre') == {('red', 'cross'), ('red', 'square')}


def test_no_unseen_pair_in_seen_words(examples):
    lines = {split: [] for split in SPLITS}
    for split in SPLITS:
        for row in examples[split]:
            lines[split] += [row['caption'], *(f'{q} {a}' for _, q, a in turns(row['conversation']))]
    for split in WORDS_SPLITS:
        lines[split] += tw.text(split, N_WORDS)
        lines[split] += [f'{q} {a}' for chat in tw.chats(split, N_WORDS) for _, q, a in turns(chat)]
    found = {split: set().union(*map(pairs_in, told)) for split, told in lines.items()}
    assert len(found['train']) == len(found['validation']) == 41
    assert not (found['train'] | found['validation']) & UNSEEN
    assert found['heldout'] >= UNSEEN


def test_no_question_and_answer_join_an_unseen_pair(examples):
    # 'What colour is the circle?' 'White.' states a pair that no single text holds.
    chats = [turn for split in WORDS_SPLITS for chat in tw.chats(split, N_WORDS) for turn in turns(chat)]
    pictures = [turn[1:] for split in WORDS_SPLITS for turn in all_turns(examples, split)]
    joined = set()
    for kind, question, answer in chats + pictures:
        reference = (REFERENCE.findall(question) or [''])[-1]
        if kind == 'colour' and ' in the ' not in reference:
            joined.add((answer.lower()[:-1], reference.split()[-1]))
        elif kind == 'shape' and ' in the ' not in reference:
            joined.add((reference.split()[1], answer.lower()[:-1]))
    assert len(joined) == 41
    assert not joined & UNSEEN


def test_every_heldout_question_is_about_an_unseen_pair(examples):
    for things, kind, question, _ in all_turns(examples, 'heldout'):
        unseen = [t for t in things if t.pair in UNSEEN]
        assert unseen
        if kind == 'existence':
            assert named(question) in UNSEEN
        elif kind == 'count':
            noun = re.search(r'(?:How many|Count the) (.*?) (?:are|can|in)\b', question)[1]
            assert any(count_of(noun, [t]) for t in unseen)
        elif kind != 'description':
            asked = [t for reference in REFERENCE.findall(question) for t in matches(reference, things)]
            assert any(t in unseen for t in asked)


@pytest.mark.parametrize('split', SPLITS)
def test_answers_are_right_and_references_unique(examples, split):
    kinds = Counter()
    for things, kind, question, answer in all_turns(examples, split):
        kinds[kind] += 1
        assert answer == right_answer(kind, question, things), (question, things)
    assert min(kinds[kind] for kind in words.KINDS) > 100


def test_chat_answers_follow_from_the_description():
    for i, chat in enumerate(tw.chats('train', N_WORDS)):
        things = tw.scene('train', i, content='chat')
        opening, *rest = turns(chat)
        # The first message holds the description, a full stop and the question.
        description, first = opening[1].split('. ', 1)
        for thing in things:
            assert all(word in description for word in thing)
        for kind, question, answer in [(opening[0], first, opening[2]), *rest]:
            assert answer == right_answer(kind, question, things), (question, things)


def test_text_says_only_true_things():
    checked = Counter()
    place = f'({P})'
    for i, document in enumerate(tw.text('train', N_WORDS)):
        things = tw.scene('train', i, content='text')
        assert 60 <= len(document.split()) <= 120
        assert pairs_in(document) >= {t.pair for t in things}
        for verb, noun in re.findall(r'There (is one|are no|are two|are three) ([a-z ]+)\.', document):
            wanted = {'is one': 1, 'are no': 0, 'are two': 2, 'are three': 3}[verb]
            assert count_of(noun, things) == wanted
            assert noun.endswith('s') == (verb != 'is one') or noun == 'cross'
            checked['count'] += 1
        for fact in FACTS:
            for found in re.finditer(fact, document):
                assert any(found.groupdict().items() <= t._asdict().items() for t in things), found[0]
                checked[fact] += 1
        for pair in re.findall(rf'There is no ({C}) ({S})\.', document):
            assert pair not in [t.pair for t in things]
            checked['absent'] += 1
        for line in re.findall(
            rf'(the (?:{C}) (?:{S}) is (?:{"|".join(words.RELATIONS)}) [a-z ]+)\.', document, re.IGNORECASE
        ):
            first, second = REFERENCE.findall(line.lower())
            relation = re.search('|'.join(words.RELATIONS), line)[0]
            assert stands(*matches(first, things), relation, *matches(second, things))
            checked['relation'] += 1
        for lesson in re.findall(rf'The {place} is ({"|".join(words.RELATIONS)}) the {place}\.', document):
            first, relation, second = lesson
            assert stands(scenes.Thing('', '', '', first), relation, scenes.Thing('', '', '', second))
            checked['lesson'] += 1
        for question, answer in re.findall(r'(?:Question|Q): (.*) (?:Answer|A): (.*)', document):
            kinds = [kind for kind in words.KINDS if asks(kind, question)]
            assert answer == right_answer(kinds[0], question, things)
            checked['line'] += 1
    assert min(checked[name] for name in ('count', 'absent', 'relation', 'lesson', 'line', *FACTS)) > 10


def asks(kind, question):
    """Whether a question is of a kind, by its wording."""
    return re.search(
        {
            'colour': r'\bcolour\b',
            'shape': r'\bshape\b',
            'size': r'\b(big|size|small)\b',
            'place': r'^(Where|In which part)\b',
            'count': r'^(How many|Count)\b',
            'existence': rf'\ban? ({C})\b',
            'comparison': '|'.join(words.RELATIONS),
            'description': r'^(Describe|What is in|What does|Tell)\b',
        }[kind],
        question,
    )


@pytest.mark.parametrize('split', SPLITS)
def test_yes_and_no_are_balanced(examples, split):
    answers = defaultdict(Counter)
    for _, kind, _, answer in all_turns(examples, split):
        answers[kind][answer] += 1
    for kind in ('existence', 'comparison'):
        assert set(answers[kind]) == {'Yes.', 'No.'}
        assert answers[kind].total() > 400
        assert 0.45 < answers[kind]['Yes.'] / answers[kind].total() < 0.55


def test_training_answers_cover_their_values(examples):
    answers = defaultdict(Counter)
    for _, kind, _, answer in all_turns(examples, 'train'):
        answers[kind][answer.lower()[:-1]] += 1
    values = {
        'colour': scenes.COLOURS,
        'shape': scenes.SHAPES,
        'size': scenes.SIZES,
        'place': scenes.PLACES,
        'count': words.NUMBERS,
    }
    for kind, named in values.items():
        assert set(answers[kind]) == set(named)
        assert min(answers[kind].values()) > 0.4 * answers[kind].total() / len(named)


def test_many_denied_pairs_recombine_what_the_scene_holds(examples):
    hard = Counter()
    for things, kind, question, answer in all_turns(examples, 'train'):
        if kind == 'existence' and answer == 'No.':
            colour, shape = named(question)
            hard[any(t.colour == colour for t in things) and any(t.shape == shape for t in things)] += 1
    assert hard[True] > 0.3 * hard.total()


def test_training_conversations(examples):
    firsts, image_last = Counter(), 0
    for row in examples['train']:
        asked = turns(row['conversation'])
        assert 1 <= len(asked) <= 4
        assert len({question for _, question, _ in asked}) == len(asked)
        counts = Counter(kind for kind, _, _ in asked)
        assert counts['description'] <= 1
        firsts[asked[0][0]] += 1
        types = [part['type'] for part in row['conversation'][0]['content']]
        assert sorted(types) == ['image', 'text']
        image_last += types[1] == 'image'
    assert set(firsts) == {*words.KINDS, 'thing'}
    assert 0.15 < image_last / len(examples['train']) < 0.25


@pytest.mark.parametrize('split', ['validation', 'heldout'])
def test_evaluation_asks_every_kind_alike(examples, split):
    kinds = Counter(kind for _, kind, _, _ in all_turns(examples, split))
    assert set(kinds) == set(words.KINDS)
    assert kinds.total() == 4 * SPLITS[split]
    assert all(0.11 < kinds[kind] / kinds.total() < 0.14 for kind in words.KINDS)


@pytest.mark.parametrize('split', SPLITS)
def test_captions_tell_the_truth_about_every_thing(examples, split):
    told = Counter()
    for i, row in enumerate(examples[split][:400]):
        things, caption = tw.scene(split, i), row['caption']
        assert 1 <= len(things) <= 3
        assert len({t.place for t in things}) == len({t.pair for t in things}) == len(things)
        assert Counter(re.findall(rf'\b({S})\b', caption)) == Counter(t.shape for t in things)
        pieces = re.split(r' and (?=an? |in )|[;,] (?=an? |in |small |large |the )|: ', caption)
        # What is told of one thing is told of all: no property, one, or every one.
        names = [
            name for name, said in (('size', Z), ('colour', C), ('place', P)) if re.search(rf'\b({said})\b', caption)
        ]
        told[tuple(names)] += 1
        for t in things:
            assert any(all(getattr(t, name) in piece for name in ['shape', *names]) for piece in pieces), caption
    assert set(told) == {(), ('size',), ('colour',), ('place',), ('size', 'colour', 'place')}
    assert 0.3 < told['size', 'colour', 'place'] / told.total() < 0.5


def test_a_description_is_the_right_answer():
    assert words.describe(tw.scene('train', 0)) == right_answer('description', '', tw.scene('train', 0))


def likest(mask):
    """The shape whose outline, drawn by Pillow into the same box, overlaps a mask most."""
    height, width = mask.shape
    overlap = {}
    for shape in scenes.SHAPES:
        image = Image.new('1', (400, 400))
        draw = ImageDraw.Draw(image)
        if shape in ('circle', 'ring'):
            draw.ellipse((0, 0, 399, 399), fill=1)
        if shape == 'ring':
            draw.ellipse((110, 110, 290, 290), fill=0)
        corners = {
            'square': ((0, 0), (400, 0), (400, 400), (0, 400)),
            'triangle': ((200, 0), (400, 400), (0, 400)),
            'diamond': ((200, 0), (400, 200), (200, 400), (0, 200)),
        }
        if shape in corners:
            draw.polygon(corners[shape], fill=1)
        if shape == 'cross':
            draw.rectangle((130, 0, 270, 399), fill=1)
            draw.rectangle((0, 130, 399, 270), fill=1)
        drawn = np.asarray(image.convert('L').resize((width, height), Image.Resampling.BOX)) > 127
        overlap[shape] = (drawn & mask).sum() / (drawn | mask).sum()
    return max(overlap, key=overlap.get)


@pytest.mark.parametrize('split', ['train', 'heldout'])
def test_picture_shows_the_scene(examples, split):
    rgb = np.array([scenes.RGB[colour] for colour in scenes.COLOURS])
    seen = set()
    for i, row in enumerate(examples[split][:150]):
        image = Image.open(io.BytesIO(row['image']))
        assert (image.size, image.mode, image.format) == ((60, 60), 'RGB', 'PNG')
        pixels = np.asarray(image).astype(int)
        background = np.median(pixels, (0, 1))
        near = np.abs(pixels[:, :, None] - rgb).max(-1) <= 25  # (60, 60, colours)
        things = {t.place: t for t in tw.scene(split, i)}
        for place in scenes.PLACES:
            rows, columns = (slice(round(k * 60 / 3), round((k + 1) * 60 / 3)) for k in row_and_column(place))
            cell = near[rows, columns]
            if place not in things:
                assert not cell.any()
                continue
            thing = things[place]
            counts = cell.sum((0, 1))
            assert counts.argmax() == scenes.COLOURS.index(thing.colour)
            assert counts.max() >= 15
            # Pixels on the thing's side of halfway from the background to its colour.
            step = rgb[counts.argmax()] - background
            mask = (pixels[rows, columns] - background) @ step > step @ step / 2
            ys, xs = np.nonzero(mask)
            across = max(np.ptp(ys), np.ptp(xs)) + 1
            assert 8 <= across <= 11 if thing.size == 'small' else 13 <= across <= 17
            assert likest(mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]) == thing.shape
            seen.add((thing.size, thing.shape))
    assert len(seen) == len(scenes.SIZES) * len(scenes.SHAPES)


def build(tmp_path, content, sizes):
    config = tw.TinyWorldConfig(name=f'few_{content}', content=content, examples=sizes, seed=5)
    builder = tw.TinyWorld(data_dir=tmp_path, config=config, file_format='array_record')
    builders.build(builder)
    assert {split: info.num_examples for split, info in builder.info.splits.items()} == sizes
    return builder


def test_scenes_build_and_read_without_tensorflow(tmp_path):
    sizes = {'train': 6, 'validation': 3, 'heldout': 2}
    builder = build(tmp_path, 'scenes', sizes)
    for split, n in sizes.items():
        source = builder.as_data_source(split=split, decoders={'image': tfds.decode.SkipDecoding()})
        rows = {row['id'].decode(): row for row in (source[i] for i in range(len(source)))}
        assert len(rows) == n
        for i in range(n):
            made = tw.example(split, i, seed=5)
            row = rows[made['id']]
            assert row['image'] == made['image']
            assert row['caption'].decode() == made['caption']
            assert json.loads(row['conversation']) == made['conversation']
    assert 'tensorflow' not in sys.modules


def test_what_processes_draw_is_what_is_drawn_here(monkeypatch):
    monkeypatch.setattr(tw, 'WORTH_PROCESSES', 100)
    monkeypatch.setattr(tw, 'cores', lambda: 2)
    started, plain = [], tw.Workers
    monkeypatch.setattr(tw, 'Workers', lambda *arguments: started.append(arguments[1]) or plain(*arguments))
    few, many = (list(tw._examples('train', n, seed=5)) for n in (99, 150))
    assert started == [2] and many == [tw.example('train', i, seed=5) for i in range(150)] and few == many[:99]


def test_text_and_chats_build(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
    (tmp_path / 'temporary').mkdir()
    sizes = {'train': 5, 'validation': 2}
    for content, make, read in (('text', tw.text, bytes.decode), ('chat', tw.chats, json.loads)):
        builder = build(tmp_path, content, sizes)
        field = 'text' if content == 'text' else 'conversation'
        for split, n in sizes.items():
            source = builder.as_data_source(split=split)
            rows = {source[i]['id'].decode(): read(source[i][field]) for i in range(len(source))}
            assert [rows[f'{split}-{i:05d}'] for i in range(n)] == make(split, n, seed=5)
    assert not list((tmp_path / 'temporary').iterdir())  # where TFDS leaves a folder each time a set is made
    assert not (tmp_path / 'downloads').exists()


def test_default_configs():
    assert [config.name for config in tw.TinyWorld.BUILDER_CONFIGS] == ['scenes', 'text', 'chat']
    assert all(config.content == config.name for config in tw.TinyWorld.BUILDER_CONFIGS)
