"""MMLU: 57 subjects, questions with four options, of which the model says the letter (arXiv:2009.03300).

Published by its authors as data/{dev,test}/<subject>_{dev,test}.csv, and as tables of the Hub (cais/mmlu). Asked as
lm-eval asks it, behind the first five questions of the subject's dev part with their answers; --shots says another
number.
"""

import collections
import csv
import io

from nanovision_jax.errors import UserError
from nanovision_jax.evals import scoring
from nanovision_jax.evals.benchmark import Benchmark, Question, Request, Way
from nanovision_jax.evals.published import find, read_rows, read_text

LETTERS = ('A', 'B', 'C', 'D')
SHOTS = 5


def read(folder, options):
    """The questions of the test part, with the examples that go before them."""
    shots = options.get('shots', SHOTS)
    if not 0 <= shots <= 5:
        raise UserError(f'--shots takes 0 to 5 for mmlu, whose dev part has five questions a subject, not {shots}.')
    examples, found = _of_subjects(folder, 'dev') if shots else {}, []
    for subject, rows in _of_subjects(folder, 'test').items():
        if len(examples.get(subject, ())) < shots:
            raise UserError(f'{folder} has no {shots} examples of {subject}: it takes the dev part, or --shots=0.')
        text = f'The following are multiple choice questions (with answers) about {subject.replace("_", " ")}.\n\n'
        for question, choices, answer in examples.get(subject, [])[:shots]:
            text += f'{asked(question, choices)} {LETTERS[answer]}\n\n'
        for number, (question, choices, answer) in enumerate(rows):
            name, given = f'{subject}-{number}', {'before': text}
            found.append(Question(name, question, answer, group=subject, options=choices, given=given))
    return found


def _of_subjects(folder, part):
    """{subject: [(question, options, number of the answer)]} of a part."""
    found = collections.defaultdict(list)
    for file in find(folder, f'*_{part}.csv', f'all/{part}*.parquet', f'*/{part}*.parquet', f'{part}*.parquet'):
        for row in _read_csv(file, part) if file.suffix == '.csv' else read_rows(file):
            try:
                subject, question, choices, answer = (
                    row['subject'],
                    row['question'].strip(),
                    row['choices'],
                    row['answer'],
                )
                if len(choices) != 4 or answer not in range(4):
                    raise ValueError
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f'{file}: a question of MMLU has four choices and an answer: {row!r:.80}.') from error
            found[subject].append((question, tuple(choices), answer))
    return found


def _read_csv(file, part):
    """The rows of an author's file, which has no header, as the Hub has them."""
    for row in csv.reader(io.StringIO(read_text(file), newline='')):
        if row:
            subject, answer = file.name.removesuffix(f'_{part}.csv'), row[-1].strip()
            answer = LETTERS.index(answer) if answer in LETTERS else None
            yield {'subject': subject, 'question': row[0], 'choices': row[1:-1], 'answer': answer}


def asked(question, options):
    """A question with its options, as lm-eval writes it."""
    lines = [f'{letter}. {option}' for letter, option in zip(LETTERS, options, strict=True)]
    return '\n'.join([question, *lines, 'Answer:'])


def request(question):
    """As lm-eval's mmlu asks."""
    text = question.given['before'] + asked(question.text, question.options)
    return Request(text, LETTERS, chat=False, delimiter=' ')


TASK = Benchmark(
    'mmlu',
    read,
    (Way('likelihood', request, scoring.choice),),
    'accuracy (sum)',
    scoring.guessing,
    scoring.centred,
    sees=False,
    shots=SHOTS,
)
