"""PIQA: which of two ways reaches a goal, by likelihood (arXiv:1911.11641).

Published by its authors as valid.jsonl with valid-labels.lst, and as tables of the Hub that have both. Asked as lm-eval
asks it.
"""

from nanovision_jax.errors import UserError
from nanovision_jax.evals import scoring
from nanovision_jax.evals.benchmark import Benchmark, Question, Request, Way
from nanovision_jax.evals.published import find, read_rows, read_text


def read(folder, _):
    """The questions of the validation part."""
    found = []
    for file in find(folder, 'valid.jsonl', 'validation*.parquet', '*valid*.jsonl'):
        rows, labels = read_rows(file), file.with_name(f'{file.stem}-labels.lst')
        if labels.is_file():
            wanted = read_text(labels).split()
            if len(wanted) != len(rows):
                raise UserError(f'{labels} has {len(wanted):,} labels for {len(rows):,} questions.')
            rows = [row | {'label': label} for row, label in zip(rows, wanted, strict=True)]
        for row in rows:
            try:
                goal, options, answer = row['goal'], (row['sol1'], row['sol2']), int(row['label'])
                if answer not in (0, 1):
                    raise ValueError
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f'{file}: a question of PIQA has goal, sol1, sol2, and a label, in {labels.name} or beside them: '
                    f'{row!r:.80}.'
                ) from error
            found.append(Question(str(len(found)), goal, answer, options=options))
    return found


def request(question):
    """As lm-eval's piqa asks."""
    return Request(f'Question: {question.text}\nAnswer:', question.options, chat=False, delimiter=' ')


TASK = Benchmark(
    'piqa',
    read,
    (Way('likelihood', request, scoring.choice),),
    'accuracy (per character)',
    scoring.guessing,
    scoring.centred,
    sees=False,
)
