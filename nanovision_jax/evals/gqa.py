"""GQA: questions about the scene graphs of photographs, testdev balanced (arXiv:1902.09506).

Published as testdev_balanced_questions.json with images/, and as two tables of the Hub, testdev_balanced_instructions
and testdev_balanced_images. Asked and scored as lmms-eval's gqa: the answer is the one wanted, but for case and
punctuation. Groups are the kinds of its authors: query, verify, choose, logical, compare.
"""

import functools

from nanovision_jax.evals.benchmark import Benchmark, Question, Request, Way
from nanovision_jax.evals.published import find, image_of, made, read_object, read_rows
from nanovision_jax.evals.scoring import SHORT, plain

TOLD = 'a question of GQA has imageId, question and answer'


def read(folder, _):
    """The questions of testdev balanced."""
    found = []
    for file in find(folder, 'testdev_balanced_questions.json', 'testdev_balanced_instructions/*.parquet'):
        if file.suffix == '.json':
            rows = [{'id': name} | row for name, row in read_object(file).items()]
            found += made(file, rows, lambda _, row: _question(row, f'{row["imageId"]}.jpg'), TOLD)
        else:
            images = _images(folder)
            found += made(file, read_rows(file), functools.partial(_of_table, images), TOLD)
    return found


def _images(folder):
    """{an image's id: its name}, of the tables of images."""
    found = {}
    for file in find(folder, 'testdev_balanced_images/*.parquet'):
        told = 'an image of GQA has an id'
        found |= dict(made(file, read_rows(file), lambda place, row: (row['id'], image_of(file, folder, place)), told))
    return found


def _of_table(images, _, row):
    return _question(row, images.get(row['imageId'], f'{row["imageId"]}.jpg'))


def _question(row, image):
    kind = (row.get('types') or {}).get('structural') or ''
    return Question(row['id'], row['question'], row['answer'], image, kind)


def score(question, answer):
    """Exact match without case and punctuation."""
    return {'accuracy': float(plain(answer.strip()) == plain(question.answer))}


TASK = Benchmark(
    'gqa',
    read,
    (Way('generate', lambda question: Request(question.text + SHORT), score),),
    'accuracy',
    chance=lambda questions: 0.0,
    said={'always yes': 'yes'},
)
