"""WinoGrande: to which of two names a pronoun's place belongs (arXiv:1907.10641).

Published by its authors as dev.jsonl, and as tables of the Hub (winogrande_xl). Asked as lm-eval asks it, by partial
evaluation (arXiv:1806.02847): each option stands in the sentence, and what is scored is the rest of it, the same for
both. So there is nothing to divide by: sums alone are compared.
"""

import numpy as np

from nanovision_jax.errors import UserError
from nanovision_jax.evals import scoring
from nanovision_jax.evals.benchmark import Benchmark, Question, Request, Way
from nanovision_jax.evals.published import find, read_rows


def read(folder, _):
    """The questions of the development part."""
    found = []
    for file in find(folder, 'dev.jsonl', 'winogrande_xl/validation*.parquet', '*validation*.parquet'):
        for row in read_rows(file):
            try:
                before, blank, behind = row['sentence'].partition('_')
                options, answer = (row['option1'], row['option2']), ('1', '2').index(row['answer'])
                if not blank:
                    raise ValueError
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(
                    f'{file}: a question of WinoGrande has a sentence with _, option1, option2 and an answer: '
                    f'{row!r:.80}.'
                ) from error
            given, name = {'behind': behind.strip()}, row.get('qID', str(len(found)))
            found.append(Question(name, before, answer, options=options, given=given))
    return found


def request(question):
    """As lm-eval's winogrande asks."""
    return Request(question.text, question.options, chat=False, delimiter=' ', after=question.given['behind'])


def score(question, likely):
    """Whether the sentence is likelier to end as it does behind the option wanted."""
    return {'accuracy (sum)': float(np.argmax(likely.sums) == question.answer)}


TASK = Benchmark(
    'winogrande',
    read,
    (Way('likelihood', request, score),),
    'accuracy (sum)',
    scoring.guessing,
    scoring.centred,
    sees=False,
)
