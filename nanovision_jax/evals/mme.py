"""MME: two questions of yes or no about each image, in fourteen categories (arXiv:2306.13394).

Published as a folder a category, flat or with images/ and questions_answers_YN/, of images and of .txt files of lines
`question<tab>answer`; and as tables of the Hub. Asked as lmms-eval asks: `Please answer yes or no.` makes way for
what is said in every task. It is yes or no where one stands in the first four characters of an answer.

A category scores 100 × accuracy + 100 × accuracy+, the share of images of which both questions are right; perception
sums ten of them (to 2,000), cognition four (to 800). An image that lost one of its questions is in neither.
"""

import collections
import functools

import numpy as np

from nanovision_jax.evals.benchmark import Benchmark, Question, Request, Way
from nanovision_jax.evals.published import SUFFIXES, find, image_of, made, read_rows, read_text
from nanovision_jax.evals.scoring import SHORT

PERCEPTION = ['existence', 'count', 'position', 'color', 'posters', 'celebrity', 'scene', 'landmark', 'artwork', 'OCR']
COGNITION = ['commonsense_reasoning', 'numerical_calculation', 'text_translation', 'code_reasoning']
ASKED = ' Please answer yes or no.'


def read(folder, _):
    """The questions of every category that is there."""
    files = [file for file in folder.rglob('*.txt') if _category(file) in PERCEPTION + COGNITION]  # no models' answers
    found, images = [], {}
    for file in sorted(files) or find(folder, 'test*.parquet', '*mme*.parquet'):
        if file.suffix == '.txt':
            lines = [line for line in read_text(file).splitlines() if line.strip()]
            make, told = functools.partial(_of_line, folder, file), 'a line of MME is question, tab, answer'
        else:
            lines, make = read_rows(file), functools.partial(_of_table, folder, file, images)
            told = 'a question of MME has question_id, question, answer and category'
        found += made(file, lines, make, told)
    return found


def _category(file):
    return file.parent.parent.name if file.parent.name == 'questions_answers_YN' else file.parent.name


def _of_line(folder, file, place, line):
    question, answer = line.split('\t')
    beside = file.parent.parent / 'images' if file.parent.name == 'questions_answers_YN' else file.parent
    names = [beside / f'{file.stem}{suffix}' for suffix in SUFFIXES]
    image = next((name for name in names if name.is_file()), names[0]).relative_to(folder)
    return _question(f'{_category(file)}/{file.stem}-{place}', question, answer, str(image), _category(file))


def _of_table(folder, file, images, place, row):
    image = images.setdefault((row['category'], row['question_id']), image_of(file, folder, place))  # rows are in pairs
    name = f'{row["category"]}/{row["question_id"]}-{file.name}-{place}'
    return _question(name, row['question'], row['answer'], image, row['category'])


def _question(name, text, answer, image, category):
    answer = answer.lower().strip().replace('.', '')
    if answer not in ('yes', 'no'):
        raise ValueError
    return Question(name, text.strip().replace(ASKED, ''), answer, image, category)


def said(answer: str) -> str:
    """yes, no or other, by lmms-eval's rule."""
    text = answer.lower().strip().replace('.', '')
    if len(text) == 1:
        return {'y': 'yes', 'n': 'no'}.get(text, 'other')
    return next((word for word in ('yes', 'no') if word in text[:4]), 'other')


def score(question, answer):
    """Whether it is right, and whether it is neither yes nor no."""
    return {'accuracy': float(said(answer) == question.answer), 'neither yes nor no': float(said(answer) == 'other')}


def metrics(questions, scores):
    """Accuracy of the questions, accuracy+ of the images, and the sums of the categories that are there."""
    images = collections.defaultdict(list)
    for question, right in zip(questions, scores['accuracy'], strict=True):
        images[question.group, question.image].append(right)
    pairs = {key: rights for key, rights in images.items() if len(rights) == 2}
    found = {name: float(scores[name].mean()) for name in ('accuracy', 'neither yes nor no')}
    found['accuracy+'] = float(np.mean([min(rights) for rights in pairs.values()])) if pairs else 0.0
    for name, categories in (('perception', PERCEPTION), ('cognition', COGNITION)):
        each = [[pair for (group, _), pair in pairs.items() if group == category] for category in categories]
        if any(each):
            found[name] = float(sum(100 * np.mean(part) + 100 * np.min(part, axis=1).mean() for part in each if part))
    return found


TASK = Benchmark(
    'mme',
    read,
    (Way('generate', lambda question: Request(question.text + SHORT), score),),
    'accuracy',
    chance=lambda questions: 0.5,
    metrics=metrics,
    said={'always yes': 'yes'},
)
