"""AI2D: diagrams of school science, the test split (arXiv:1603.07396).

Read from the Hub's tables (question, options, answer as an option's number, image). Asked and scored as lmms-eval's
ai2d: an answer's letter is one that stands at its beginning with a full stop, else the answer whole, without case and
punctuation. Two questions about one diagram have a copy each, so that they count as of two images in the interval.
"""

import functools
import re

from nanovision_jax.evals import letters
from nanovision_jax.evals.benchmark import Benchmark, Question
from nanovision_jax.evals.published import find, image_of, made, read_rows
from nanovision_jax.evals.scoring import plain


def read(folder, _):
    """The questions of the test split."""
    found = []
    for file in find(folder, 'test*.parquet', '*ai2d*.parquet'):
        told = 'a question of AI2D has question, options and answer'
        found += made(file, read_rows(file), functools.partial(_question, folder, file), told)
    return found


def _question(folder, file, place, row):
    options, answer = tuple(row['options']), int(row['answer'])
    if not 0 <= answer < len(options):
        raise ValueError
    return Question(f'{file.name}-{place}', row['question'], answer, image_of(file, folder, place), options=options)


def asked(question):
    """As lmms-eval's ai2d asks."""
    return f'{question.text}\n{letters.lettered(question.options)}{letters.LETTER}'


def is_right(answer: str, letter: str) -> bool:
    """Whether an answer says a letter."""
    found = re.match(r'\s*([A-Z])\.', answer)
    return plain(found[1] if found else answer.strip()) == letter.lower()


TASK = Benchmark(
    'ai2d',
    read,
    letters.ways(asked, lambda question: question.text, is_right),
    letters.HEADLINE,
    letters.guessing,
)
