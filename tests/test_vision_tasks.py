"""Image benchmarks from their published files to their results, each asked of a stub that knows colours."""

import collections
import io
import json
import types
import zipfile

import micro
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image

import nanovision_jax
from nanovision_jax import evaluate
from nanovision_jax.data import conversation, images
from nanovision_jax.data.conversation import BadExample
from nanovision_jax.errors import UserError
from nanovision_jax.evals import base, letters, mme, mmstar
from nanovision_jax.evals import run as evaluating
from nanovision_jax.evals.published import Pictures

COLOURS = {'red': (255, 0, 0), 'green': (0, 255, 0), 'blue': (0, 0, 255), 'black': (0, 0, 0)}
NAMES = list(COLOURS)
ASKED = json.loads((ROOT / 'tests/golden/lmms_eval/asked.json').read_text(encoding='utf-8'))['asked']


def png(colour):
    buffer = io.BytesIO()
    Image.new('RGB', (21, 21), COLOURS[colour]).save(buffer, 'PNG')
    return buffer.getvalue()


def put(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))


def table(file, rows, shown=True):
    """A table of the Hub: rows, and an image to each by the row's colour."""
    rows = [dict(row) for row in rows]
    for row in rows if shown else []:
        colour = row.pop('colour')
        row['image'] = {'bytes': png(colour), 'path': None} if colour else None
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


# Folders as they are published ---------------------------------------------------------------------------------------


def mme_folder(folder):
    root = folder / 'MME_Benchmark_release_version'
    for number, colour in enumerate(NAMES):
        lines = f'Is it {colour}? Please answer yes or no.\tYes\nIs it white? Please answer yes or no.\tNo\n'
        put(root / f'color/{number:04}.txt', lines)
        put(root / f'color/{number:04}.jpg', png(colour))
        put(root / f'artwork/questions_answers_YN/{number}.txt', lines)
        put(root / f'artwork/images/{number}.png', png(colour))
        put(root / f'code_reasoning/{number:04}.txt', lines)
        put(root / f'code_reasoning/{number:04}.png', png(colour))
    put(root / 'eval_tool/LaVIN/color.txt', 'x.jpg\tIs it?\tYes\tno\n')


def mme_table(folder):
    rows = []
    for number, colour in enumerate(NAMES):
        for asked, answer in ((colour, 'Yes'), ('white', 'No')):
            text = f'Is it {asked}? Please answer yes or no.'
            row = {'question_id': f'color/{number}.png', 'question': text, 'answer': answer, 'category': 'color'}
            rows.append(row | {'colour': colour})
    table(folder / 'data/test-00000-of-00001.parquet', rows)


def mmstar_table(folder):
    rows = []
    for number, colour in enumerate(NAMES):
        options = ', '.join(f'{letter}: {name}' for letter, name in zip('ABCD', NAMES, strict=True))
        row = {'index': number, 'question': f'What colour is it?\nOptions: {options}', 'answer': 'ABCD'[number]}
        kind = {'category': 'coarse perception', 'l2_category': f'kind {number % 2}', 'meta_info': {'source': 'x'}}
        rows.append(row | kind | {'colour': colour})
    table(folder / 'mmstar.parquet', rows)


def scienceqa_folder(folder):
    problems = {}
    for number, colour in enumerate(NAMES):
        row = {'question': 'What colour is it?', 'choices': NAMES, 'answer': number, 'hint': 'Look.' * (number % 2)}
        problems[str(number)] = row | {'image': 'image.png', 'subject': 'natural science', 'split': 'test'}
        put(folder / f'images/test/{number}/image.png', png(colour))
    problems['7'] = problems['0'] | {'image': None}
    put(folder / 'problems.json', problems | {'8': problems['0']})
    put(folder / 'pid_splits.json', {'test': ['0', '1', '2', '3', '7'], 'train': ['8']})


def scienceqa_table(folder):
    rows = [
        {'question': 'What colour is it?', 'choices': NAMES, 'answer': i, 'hint': '', 'subject': 's', 'colour': colour}
        for i, colour in enumerate(NAMES)
    ]
    table(folder / 'ScienceQA-IMG/test-00000-of-00001.parquet', [*rows, rows[0] | {'colour': None}])


def ai2d_table(folder):
    rows = [
        {'question': 'What colour is it?', 'options': NAMES, 'answer': str(i), 'colour': colour}
        for i, colour in enumerate(NAMES)
    ]
    table(folder / 'data/test-00000-of-00001.parquet', rows)


def textvqa_rows():
    for number, colour in enumerate(NAMES):
        row = {'question_id': 100 + number, 'image_id': f'id{number}', 'question': 'what COLOUR is it?'}
        yield row | {'answers': [f'The {colour}.'] * 10}, colour


def textvqa_folder(folder):
    put(folder / 'TextVQA_0.5.1_val.json', {'data': [row for row, _ in textvqa_rows()]})
    words = [{'image_id': row['image_id'], 'ocr_tokens': ['STOP', 'it']} for row, _ in textvqa_rows()]
    put(folder / 'TextVQA_Rosetta_OCR_v0.2_val.json', {'data': words})
    with zipfile.ZipFile(folder / 'train_val_images.zip', 'w') as file:
        for row, colour in textvqa_rows():
            put(folder / f'train_images/{row["image_id"]}.jpg', png(colour))
            file.writestr(f'train_images/{row["image_id"]}.jpg', png('blue'))  # what is unpacked goes first


def textvqa_table(folder):
    rows = [row | {'ocr_tokens': ['STOP', 'it'], 'colour': colour} for row, colour in textvqa_rows()]
    table(folder / 'data/validation-00000-of-00001.parquet', rows)


def vqav2_rows():
    for number, colour in enumerate(NAMES):
        people = [{'answer': f'the {colour}', 'answer_confidence': 'yes', 'answer_id': i} for i in range(10)]
        row = {'question_id': 10 * number, 'image_id': number, 'question': 'What colour is it?'}
        yield row, {'question_id': 10 * number, 'answers': people, 'answer_type': 'other'}, colour


def vqav2_folder(folder):
    questions, annotations, colours = zip(*vqav2_rows(), strict=True)
    put(folder / 'v2_OpenEnded_mscoco_val2014_questions.json', {'questions': questions})
    put(folder / 'v2_mscoco_val2014_annotations.json', {'annotations': annotations})
    for number, colour in enumerate(colours):
        put(folder / f'val2014/COCO_val2014_{number:012}.jpg', png(colour))


def vqav2_table(folder):
    rows = [row | more | {'colour': colour} for row, more, colour in vqav2_rows()]
    table(folder / 'data/validation-00000-of-00001.parquet', rows)


def gqa_rows():
    for number, colour in enumerate(NAMES):
        row = {'imageId': f'n{number}', 'question': 'What colour is it?', 'answer': colour}
        yield f'2{number}', row | {'types': {'structural': 'query'}}, colour


def gqa_folder(folder):
    put(folder / 'questions1.2/testdev_balanced_questions.json', {name: row for name, row, _ in gqa_rows()})
    for _, row, colour in gqa_rows():
        put(folder / f'images/{row["imageId"]}.jpg', png(colour))


def gqa_table(folder):
    rows = [{'id': name} | row for name, row, _ in gqa_rows()]
    table(folder / 'testdev_balanced_instructions/testdev-00000-of-00001.parquet', rows, shown=False)
    images = [{'id': row['imageId'], 'colour': colour} for _, row, colour in gqa_rows()]
    table(folder / 'testdev_balanced_images/testdev-00000-of-00001.parquet', images[::-1])


def sentences(colour):
    return [f'A {colour} square.', f'it is a {colour} square on the {colour} wall']


def coco_folder(folder):
    said = [(i, text) for i, colour in enumerate(NAMES) for text in sentences(colour)]
    images = [{'id': i, 'file_name': f'{i:012}.jpg'} for i in range(len(NAMES))]
    annotations = [{'image_id': i, 'id': n, 'caption': text} for n, (i, text) in enumerate(said)]
    put(folder / 'annotations/captions_val2017.json', {'images': images, 'annotations': annotations})
    for number, colour in enumerate(NAMES):
        put(folder / f'val2017/{number:012}.jpg', png(colour))


def karpathy_folder(folder):
    rows = []
    for number, colour in enumerate(NAMES):
        said = [{'raw': text} for text in sentences(colour)]
        rows.append({'filename': f'{number}.jpg', 'filepath': 'val2014', 'split': 'test', 'sentences': said})
        put(folder / f'val2014/{number}.jpg', png(colour))
    put(folder / 'dataset_coco.json', {'images': [*rows, rows[0] | {'split': 'train', 'filename': 'x.jpg'}]})


def coco_table(folder):
    rows = [{'question_id': f'{i}.jpg', 'answer': sentences(c), 'colour': c} for i, c in enumerate(NAMES)]
    table(folder / 'data/val-00000-of-00001.parquet', rows)


def pope_folder(folder):
    for category in ('random', 'popular'):
        rows = [
            {'question_id': 2 * i + (asked == 'white'), 'image': f'{i}.jpg', 'text': f'Is it {asked}?', 'label': label}
            for i, colour in enumerate(NAMES)
            for asked, label in ((colour, 'yes'), ('white', 'no'))
        ]
        put(folder / f'coco_pope_{category}.json', '\n'.join(map(json.dumps, rows)))
    for i, colour in enumerate(NAMES):
        put(folder / f'val2014/{i}.jpg', png(colour))


def pope_table(folder):
    rows = [
        {
            'question_id': str(i),
            'question': f'Is it {c}?',
            'answer': 'yes',
            'image_source': f'x{i}',
            'category': 'random',
        }
        for i, c in enumerate(NAMES)
    ]
    table(folder / 'data/test-00000-of-00001.parquet', [row | {'colour': NAMES[i]} for i, row in enumerate(rows)])


LAYOUTS = [
    ('pope', pope_folder),
    ('pope', pope_table),
    ('mme', mme_folder),
    ('mme', mme_table),
    ('mmstar', mmstar_table),
    ('scienceqa', scienceqa_folder),
    ('scienceqa', scienceqa_table),
    ('ai2d', ai2d_table),
    ('textvqa', textvqa_folder),
    ('textvqa', textvqa_table),
    ('textvqa_ocr', textvqa_folder),
    ('textvqa_ocr', textvqa_table),
    ('vqav2', vqav2_folder),
    ('vqav2', vqav2_table),
    ('gqa', gqa_folder),
    ('gqa', gqa_table),
    ('coco_caption', coco_folder),
    ('coco_caption', karpathy_folder),
    ('coco_caption', coco_table),
]


# A model that knows colours ------------------------------------------------------------------------------------------


class Stub:
    """Answers by the mean colour of a prompt's image, or as if it were red. asked: {what it was asked: how often}."""

    def __init__(self, tokenizer, looks):
        self.tokenizer, self.looks, self.asked, self.dies = tokenizer, looks, [], None

    def read(self, prompt):
        assert (prompt.ids == self.tokenizer.image).sum() == 9 and len(prompt.images) == 1
        seen = tuple(prompt.images[0].reshape(-1, 3).mean(0).astype(int))
        colour = {value: name for name, value in COLOURS.items()}.get(seen, 'grey') if self.looks else 'red'
        text = self.tokenizer.decode(prompt.ids)
        self.asked.append((text, seen))
        return text, colour

    def answer(self, prompts, max_new_tokens):
        if self.dies is not None and len(self.asked) >= self.dies:
            raise KeyboardInterrupt
        return [self.say(*self.read(prompt)) for prompt in prompts]

    def say(self, text, colour):
        if 'caption' in text or 'Describe' in text:
            return f'A {colour} square.'
        if 'Is it ' in text:
            return 'yes' if f'Is it {colour}' in text else 'no'
        if 'letter' in text:
            found = [letter for letter in 'ABCD' if f'{letter}. {colour}' in text or f'{letter}: {colour}' in text]
            return found[0] if found else 'A'
        return colour

    def judge(self, prompts, options):
        found = []
        for prompt, ids in zip(prompts, options, strict=True):
            _, colour = self.read(prompt)
            near = [float(self.tokenizer.decode(option) == colour) - 1 for option in ids]
            found.append(
                [
                    (np.full(len(option), value), np.ones(len(option), bool))
                    for option, value in zip(ids, near, strict=True)
                ]
            )
        return found


@pytest.fixture
def model_run(tokenizer, monkeypatch):
    """A function (looks) → the stub that a run has for a model."""
    monkeypatch.setattr('nanovision_jax.evals.asking.BATCH', {'words': 4, 'options': 2})

    def use(looks=True):
        stub = Stub(tokenizer, looks)
        opened = types.SimpleNamespace(
            config=micro.odd_config('vision_instruct', positions=600),
            tokenizer=tokenizer,
            answer=stub.answer,
            engine=stub,
            step=7,
        )
        monkeypatch.setattr(evaluating, 'load', lambda run_dir: opened)
        return stub

    return use


@pytest.mark.parametrize(('task', 'make'), LAYOUTS, ids=[f'{task}-{make.__name__}' for task, make in LAYOUTS])
def test_a_published_folder_is_read_asked_and_scored(task, make, model_run, tmp_path):
    make(tmp_path / 'data')
    model_run()
    found = evaluating.evaluate(tmp_path / 'run', task, data=tmp_path / 'data')
    rows = [json.loads(line) for line in (tmp_path / f'run/eval/{task}.jsonl').read_text().splitlines()]
    best = found.metrics[found.headline]
    assert found.left_out == {} and found.n == found.asked == len(rows) == len({row['id'] for row in rows})
    assert all(row['question'] and '<|' not in row['question'] for row in rows)
    assert found.n % 4 == 0 and len({row['image'] for row in rows}) in (4, 12)
    assert best == (1.0 if task != 'coco_caption' else pytest.approx(np.mean([row['scores']['CIDEr'] for row in rows])))
    assert found.controls.keys() == {
        'blank',
        'shuffled',
        *(['reordered'] if task in ('mmstar', 'scienceqa', 'ai2d') else []),
    }
    for control in ('blank', 'shuffled'):
        assert found.controls[control][found.headline] < best
    assert found.controls.get('reordered', {found.headline: best})[found.headline] == best
    assert {'chance', 'majority'} <= found.baselines.keys() and found.baselines['chance'] < best
    assert ('always yes' in found.baselines) == (task in ('pope', 'mme', 'vqav2', 'gqa'))
    assert base.read_results(tmp_path / 'run') == [('validation', found)]
    assert found.verdict().startswith(('The model looks', '4 questions are too few'))
    assert len(found.lines()) > 5 and len(found.markdown()) > 5
    assert not (tmp_path / f'run/eval/{task}.answers').exists()


def test_several_benchmarks_lie_in_a_folder_each(model_run, tmp_path):
    """Tables of the Hub are all called test or validation."""
    mme_table(tmp_path / 'mme')
    gqa_table(tmp_path / 'gqa')
    (tmp_path / 'textvqa').mkdir()
    model_run()
    for task in ('mme', 'gqa'):
        assert evaluating.evaluate(tmp_path / 'run', task, data=tmp_path).score() == 1
    assert evaluating.folder_of('textvqa_ocr', tmp_path) == tmp_path / 'textvqa'
    assert evaluating.folder_of('pope', tmp_path) == tmp_path


@pytest.mark.parametrize('task', ['mmstar', 'scienceqa', 'ai2d'])
def test_letters_and_likelihoods_are_both_told(task, model_run, tmp_path):
    dict(LAYOUTS)[task](tmp_path / 'data')
    stub = model_run(looks=False)
    found = evaluating.evaluate(tmp_path / 'run', task, data=tmp_path / 'data')
    ways = [letters.HEADLINE, *(f'accuracy (likelihood, {by})' for by in ('sum', 'per token', 'per character'))]
    told = {name: found.metrics[name] for name in ways}
    assert told == dict.fromkeys(ways, 0.25)  # it always says red
    assert found.baselines == {'chance': 0.25, 'majority': 0.25}
    by_letter = [text for text, _ in stub.asked if 'letter' in text]
    alone = [text for text, _ in stub.asked if 'letter' not in text]
    assert by_letter and alone and not any('green' in text for text in alone)
    assert any('A. red' in text or 'A: red' in text for text in by_letter)
    assert any('A. red' not in text and 'A: red' not in text for text in by_letter)  # the control


def test_words_of_ocr_are_said_in_one_task_alone(model_run, tmp_path):
    textvqa_folder(tmp_path)
    stub = model_run()
    evaluate.main([f'--run={tmp_path}/run', '--task=textvqa,textvqa_ocr', f'--data={tmp_path}', '--controls=none'])
    said = [text for text, _ in stub.asked]
    assert len(said) == 8 and all('What colour is it?' in text for text in said)
    assert ['Reference OCR token: STOP, it\nAnswer the question using' in text for text in said] == [False] * 4 + [
        True
    ] * 4
    (tmp_path / 'TextVQA_Rosetta_OCR_v0.2_val.json').unlink()
    with pytest.raises(UserError, match=r'no TextVQA_Rosetta_OCR\*_val\.json'):
        evaluating.evaluate(tmp_path / 'run', 'textvqa_ocr', data=tmp_path)


def test_a_description_is_asked_for_as_its_file_wants(model_run, tmp_path):
    for make, wanted in (
        (coco_folder, 'Provide a one-sentence caption'),
        (karpathy_folder, 'Describe the image briefly.'),
    ):
        make(tmp_path / make.__name__)
        stub = model_run()
        evaluating.evaluate(tmp_path / 'run', 'coco_caption', data=tmp_path / make.__name__, controls='none')
        assert len(stub.asked) == 4 and all(wanted in text for text, _ in stub.asked)


@pytest.mark.parametrize('make', [mme_folder, mme_table])
def test_mme_scores_pairs(make, model_run, tmp_path):
    make(tmp_path / 'data')
    stub = model_run(looks=False)  # red images have both right; of the others the second question alone
    found = evaluating.evaluate(tmp_path / 'run', 'mme', data=tmp_path / 'data', controls='all')
    categories = 3 if make is mme_folder else 1
    assert found.metrics['accuracy'] == 5 / 8 and found.metrics['accuracy+'] == 0.25
    assert found.metrics['perception'] == 87.5 * min(2, categories)
    assert found.metrics.get('cognition') == (87.5 if categories == 3 else None)
    assert found.baselines == {'chance': 0.5, 'always yes': 0.5, 'majority': 0.5}
    assert not any('Please answer yes or no' in text for text, _ in stub.asked)
    if categories == 3:
        assert found.groups['artwork']['perception'] == 87.5 and found.groups['artwork']['n'] == 8
        assert found.groups['code_reasoning'].keys() == {
            'n',
            'accuracy',
            'neither yes nor no',
            'accuracy+',
            'cognition',
        }
        assert '  perception                           175.00' in found.lines()
    part = evaluating.evaluate(tmp_path / 'run', 'mme', data=tmp_path / 'data', limit=2)
    assert part.n == 2 and part.drawn_of == 8 * categories and part.metrics['accuracy+'] in (0.0, 1.0)


def test_an_image_that_cannot_be_read_is_left_out_and_counted(model_run, tmp_path):
    mme_folder(tmp_path)
    root = tmp_path / 'MME_Benchmark_release_version'
    (root / 'color/0001.jpg').unlink()
    put(root / 'artwork/images/2.png', b'no image')
    model_run()
    found = evaluating.evaluate(tmp_path / 'run', 'mme', data=tmp_path)
    assert (found.asked, found.n, found.left_out) == (24, 20, {'an image that cannot be read': 4})
    assert (found.metrics['accuracy'], found.metrics['perception'], found.metrics['cognition']) == (1.0, 400, 200)
    gqa_folder(tmp_path / 'gqa')
    for file in (tmp_path / 'gqa/images').iterdir():
        file.unlink()
    with pytest.raises(UserError, match='none of 4 questions of gqa can be asked'):
        evaluating.evaluate(tmp_path / 'run', 'gqa', data=tmp_path / 'gqa')


@pytest.mark.parametrize('task', ['mme', 'mmstar', 'coco_caption'])
def test_what_was_answered_is_not_asked_again(task, model_run, tmp_path):
    dict(LAYOUTS)[task](tmp_path / 'data')
    stub = model_run()
    whole = evaluating.evaluate(tmp_path / 'whole', task, data=tmp_path / 'data')
    wanted = collections.Counter(stub.asked)
    stub = model_run()
    stub.dies = 4
    with pytest.raises(KeyboardInterrupt):
        evaluating.evaluate(tmp_path / 'run', task, data=tmp_path / 'data')
    before = collections.Counter(stub.asked)
    assert (tmp_path / f'run/eval/{task}.answers').is_file() and before < wanted
    stub = model_run()
    found = evaluating.evaluate(tmp_path / 'run', task, data=tmp_path / 'data')
    assert collections.Counter(stub.asked) == wanted - before
    assert found.metrics == whole.metrics and found.controls == whole.controls


@pytest.mark.parametrize(
    ('task', 'file', 'content', 'message'),
    [
        ('mme', 'color/1.txt', 'Is it red?\tMaybe\n', r'1\.txt: a line of MME is question, tab, answer: .*Maybe'),
        ('mme', 'color/1.txt', 'Ist er grün?\tYes\n'.encode('latin-1'), r'1\.txt cannot be read: '),
        ('mme', 'other/1.txt', 'Is it red?\tYes\n', r'has no test\*\.parquet or'),
        ('gqa', 'testdev_balanced_questions.json', {'1': {'question': 'x'}}, 'a question of GQA has imageId'),
        ('gqa', 'testdev_balanced_questions.json', [], r'testdev_balanced_questions\.json holds no JSON object'),
        ('gqa', 'testdev_balanced_questions.json', '{"1"', r'cannot be read: '),
        ('textvqa', 'TextVQA_0.5.1_val.json', {}, 'has no list `data`'),
        ('vqav2', 'v2_OpenEnded_mscoco_val2014_questions.json', {}, 'has no v2_mscoco_val2014_annotations'),
        ('coco_caption', 'captions_val2017.json', {}, 'holds no question of coco_caption'),
        ('scienceqa', 'problems.json', {}, r'has no pid_splits\.json'),
    ],
)
def test_a_file_that_is_not_as_published_is_one_sentence(task, file, content, message, model_run, tmp_path):
    put(tmp_path / 'data' / file, content)
    model_run()
    with pytest.raises(UserError, match=message):
        evaluating.evaluate(tmp_path / 'run', task, data=tmp_path / 'data')


def test_images_of_a_table_are_read_once_and_in_any_order(tmp_path):
    """Of a table, which may be of half a gigabyte, one row group is in memory."""
    encoded = {name: [f'{name} {row}'.encode() for row in range(10)] for name in ('image', 'other')}
    rows = pa.table({name: [{'bytes': one, 'path': None} for one in column] for name, column in encoded.items()})
    pq.write_table(rows, tmp_path / 'a#1.parquet', row_group_size=4)
    (tmp_path / 'b#2.png').write_bytes(b'png')
    pictures = Pictures(tmp_path)
    for row in (0, 9, 3, 4, 0, 9):
        assert pictures.read(f'a#1.parquet#{row}') == encoded['image'][row]
        assert pictures.read(f'a#1.parquet#{row}#other') == encoded['other'][row]
        assert len(pictures._held) <= 4
    (tmp_path / 'a#1.parquet').write_bytes(b'no table')
    assert pictures.read('a#1.parquet#9') == encoded['image'][9] and pictures.read('b#2.png') == b'png'
    for name in ('a#1.parquet#1', 'a#1.parquet#1#none', 'none.parquet#1'):
        with pytest.raises(BadExample, match='has no image in its column'):
            pictures.read(name)


@pytest.mark.parametrize(
    ('text', 'options'),
    [
        ('What?\nOptions: A: a dog., B: a cat, C: x, y, D: none', ('a dog.', 'a cat', 'x, y', 'none')),
        ('Hint: e.g., A, B, C, D.\nQuestion: Is it?\nChoices:\n(A) no\n(B) yes', ('no', 'yes')),
        ('Which of A: and B?\nOptions: A. 1.5, B. 2.5, C. 3.5', ('1.5', '2.5', '3.5')),
        ('What?\nA:60°\nB:70°\nC:80°\nD:90°\n', ('60°', '70°', '80°', '90°')),
        ('What is in bowl A?', ()),
        ('What?\nOptions: A: this, C: that, B: none', ()),
    ],
)
def test_the_options_of_mmstar_are_taken_apart(text, options):
    assert mmstar.taken_apart(text)[1] == options
    row = {'index': 1, 'question': text, 'answer': 'A', 'category': 'c', 'l2_category': 'k'}
    folder = types.SimpleNamespace()
    file = types.SimpleNamespace(relative_to=lambda _: 'x.parquet')
    question = mmstar._question(folder, file, 0, row)
    assert mmstar.asked(question) == text.strip() + "\nAnswer with the option's letter from the given choices directly"
    assert letters.options_of(question) == (options or tuple('ABCD'))
    if options:
        assert options[1] not in mmstar.alone(question).partition('Question')[2] and not mmstar.alone(
            question
        ).endswith('A')


def test_a_real_run_is_asked_what_is_written_down(tokenizer, tmp_path):
    """Of a model that never learned: its letters are what chat says, its likelihoods those of its logits."""
    run_dir = micro.run_folder(micro.odd_config('vision_instruct', tmp_path / 'run', positions=200), tokenizer)
    ai2d_table(tmp_path / 'data')
    found = evaluating.evaluate(run_dir, 'ai2d', data=tmp_path / 'data', controls='none')
    opened, rows = nanovision_jax.load(run_dir), (run_dir / 'eval/ai2d.jsonl').read_text().splitlines()
    for number, row in enumerate(map(json.loads, rows)):
        image = Image.open(io.BytesIO(png(NAMES[number])))
        text = f'What colour is it?\n{letters.lettered(NAMES)}{letters.LETTER}'
        messages = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': text}]}]
        assert row['letter']['answer'] == opened.chat(messages, images=[image], max_new_tokens=16)
        text = 'What colour is it?\nAnswer the question using a single word or phrase.'
        messages = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': text}]}]
        ids = conversation.encode(messages, tokenizer, [opened.config.model.vision.patches], question=True).ids
        shown = images.decode(png(NAMES[number]), opened.config.model.vision)[None, None]
        for option, likely in zip(NAMES, row['likelihood']['answer']['sums'], strict=True):
            whole = [*ids, *tokenizer.encode(option)]
            logits = np.asarray(opened.logits(np.array([whole]), shown)[0], np.float64)[len(ids) - 1 : -1]
            told = logits[np.arange(len(logits)), whole[len(ids) :]] - np.log(np.exp(logits).sum(1))
            assert likely == pytest.approx(told.sum(), abs=1e-3)
    assert found.n == 4 and len({row['letter']['answer'] for row in map(json.loads, rows)}) > 1  # it does look


@pytest.mark.parametrize('task', ASKED)
def test_questions_are_asked_as_lmms_eval_asks_them(task, tmp_path):
    """With its own defaults, of rows of the Hub: what record_lmms_eval.py wrote."""
    people = {'answers': [{'answer': 'red'}] * 10} if task == 'vqav2' else {'answers': ['red'] * 10}
    rows = [row | ({} if task == 'gqa' else people | {'colour': 'red'}) for row, _ in ASKED[task]]
    if task == 'gqa':
        table(tmp_path / 'testdev_balanced_instructions/testdev-0.parquet', rows, shown=False)
        table(tmp_path / 'testdev_balanced_images/testdev-0.parquet', [{'id': '7', 'colour': 'red'}])
    else:
        name = {'mmstar': 'mmstar', 'textvqa': 'validation-0', 'textvqa_ocr': 'validation-0', 'vqav2': 'validation-0'}
        table(tmp_path / f'{name.get(task, "test-0")}.parquet', rows)
    found = evaluating.benchmark_of(task)
    questions = found.read(tmp_path, {})
    assert [found.ways[0].request(question).text for question in questions] == [text for _, text in ASKED[task]]


def test_an_image_that_lost_a_question_is_no_pair():
    questions = [mme._question(str(i), '', 'Yes', f'{i // 2}', 'count') for i in range(3)]
    found = mme.metrics(questions, {'accuracy': np.array([1.0, 0, 1]), 'neither yes nor no': np.zeros(3)})
    assert found == {'accuracy': 2 / 3, 'neither yes nor no': 0, 'accuracy+': 0, 'perception': 50}
