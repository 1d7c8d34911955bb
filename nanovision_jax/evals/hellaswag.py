"""HellaSwag: which of four endings goes on, by likelihood (arXiv:1905.07830).

Published by its authors as hellaswag_val.jsonl, and as tables of the Hub. Asked as lm-eval asks it, cleaned of
the marks of WikiHow.
"""

import re

from nanovision_jax.errors import UserError
from nanovision_jax.evals import scoring
from nanovision_jax.evals.benchmark import Benchmark, Question, Request, Way
from nanovision_jax.evals.published import find, read_rows


def read(folder, _):
    """The questions of the validation part."""
    found = []
    for file in find(folder, 'hellaswag_val.jsonl', 'validation*.parquet', '*val*.jsonl'):
        for row in read_rows(file):
            try:
                text = f'{row["activity_label"]}: {row["ctx_a"]} {row["ctx_b"].capitalize()}'
                endings, answer = tuple(map(cleaned, row['endings'])), int(row['label'])
                if answer not in range(len(endings)):
                    raise ValueError
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(
                    f'{file}: a question of HellaSwag has activity_label, ctx_a, ctx_b, endings and label: {row!r:.80}.'
                ) from error
            found.append(Question(str(len(found)), cleaned(text), answer, options=endings))
    return found


def cleaned(text: str) -> str:
    """A text without what WikiHow has in brackets: [title] begins a sentence, the rest goes."""
    text = re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. '))
    return text.replace('  ', ' ')


def request(question):
    """As lm-eval's hellaswag asks."""
    return Request(question.text, question.options, chat=False, delimiter=' ')


TASK = Benchmark(
    'hellaswag',
    read,
    (Way('likelihood', request, scoring.choice),),
    'accuracy (per character)',
    scoring.guessing,
    scoring.centred,
    sees=False,
)
