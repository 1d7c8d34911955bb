"""ScienceQA-IMG: school science with an image, the test split (arXiv:2209.09513).

Published as problems.json and pid_splits.json with images/test/ID/image.png, and as tables of the Hub. Asked and scored
as lmms-eval's scienceqa_img: an answer is the letter alone, or begins with the letter and a full stop.
"""

import functools

from nanovision_jax.evals import letters
from nanovision_jax.evals.benchmark import Benchmark, Question
from nanovision_jax.evals.published import find, image_of, made, read_object, read_rows, with_image

TOLD = 'a question of ScienceQA has question, choices, answer and hint'


def read(folder, _):
    """The questions of the test split that have an image."""
    found = []
    for file in find(folder, 'problems.json', 'ScienceQA-IMG/test*.parquet', 'test*.parquet'):
        if file.suffix == '.parquet':
            rows, make = zip(read_rows(file), with_image(file), strict=True), functools.partial(_of_table, folder, file)
        else:
            problems, splits = read_object(file), read_object(find(folder, 'pid_splits.json')[0])
            rows, make = splits['test'], functools.partial(_of_problem, problems)
        found += made(file, rows, make, TOLD)
    return found


def _of_problem(problems, _, name):
    if problems[name]['image']:
        return _question(name, problems[name], f'test/{name}/{problems[name]["image"]}')


def _of_table(folder, file, place, row):
    row, has_image = row
    if has_image:
        return _question(f'{file.name}-{place}', row, image_of(file, folder, place))


def _question(name, row, image):
    options, context = tuple(row['choices']), row.get('hint')
    text = f'Context: {context}\n{row["question"]}' if context else row['question']
    if not 0 <= row['answer'] < len(options):
        raise ValueError
    return Question(str(name), text, row['answer'], image, row.get('subject') or '', options)


def asked(question):
    """As lmms-eval's scienceqa_img asks."""
    return f'{question.text}\n{letters.lettered(question.options)}{letters.LETTER}'


def is_right(answer: str, letter: str) -> bool:
    """Whether an answer says a letter."""
    said = answer.strip()
    return said.upper() == letter or (said[:1] == letter and said[1:2] == '.')


TASK = Benchmark(
    'scienceqa',
    read,
    letters.ways(asked, lambda question: question.text, is_right),
    letters.HEADLINE,
    letters.guessing,
)
