"""ARC, easy and challenge: grade-school science by the likelihood of the whole answer (arXiv:1803.05457).

Published as ARC-{Easy,Challenge}-Test.jsonl by its authors, and as tables of the Hub. Asked as lm-eval asks it.
"""

import functools

from nanovision_jax.errors import UserError
from nanovision_jax.evals import scoring
from nanovision_jax.evals.benchmark import Benchmark, Question, Request, Way
from nanovision_jax.evals.published import find, read_rows


def read(part, folder, _):
    """The questions of the test split."""
    patterns = f'ARC-{part}-Test.jsonl', f'ARC-{part}/test*', f'*{part}*test*'
    found = []
    for file in find(folder, *patterns):
        for row in read_rows(file):
            try:
                found.append(_question(row))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f'{file}: a question of ARC has id, question, choices and answerKey: {row!r:.80}.'
                ) from error
    return found


def _question(row):
    stem, choices = row['question'], row.get('choices')
    if isinstance(stem, dict):  # its authors' files
        stem, choices = stem['stem'], {key: [one[key] for one in stem['choices']] for key in ('text', 'label')}
    answer = list(choices['label']).index(row['answerKey'])
    return Question(row['id'], stem, answer, options=tuple(choices['text']))


def request(question):
    """As lm-eval's arc_easy asks."""
    return Request(f'Question: {question.text}\nAnswer:', question.options, chat=False, delimiter=' ')


def task(name, part):
    """One of the two."""
    read_part = functools.partial(read, part)
    return Benchmark(
        name,
        read_part,
        (Way('likelihood', request, scoring.choice),),
        'accuracy (per character)',
        scoring.guessing,
        scoring.centred,
        sees=False,
    )


EASY, CHALLENGE = task('arc_easy', 'Easy'), task('arc_challenge', 'Challenge')
