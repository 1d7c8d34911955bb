"""Questions of your own, in JSON lines: `choices` with options that are weighed, `answers` in words.

    {"id": "1", "context": "The sky is", "options": ["blue", "green"], "answer": 0}
    {"id": "2", "question": "What colour is it?", "options": ["red", "blue"], "answer": "red", "image": "2.png"}

`context` is text that the options continue, with a blank between; `question` is a conversation's, and the options are
what may be answered. `answer` is an option or its number, from 0. For `answers` there are no options, and `answer` is
one text or several that are right. `image`, which need not be there, is a file's name in the folder; `group` gives
results apart. --data is the folder of one such file.
"""

from nanovision_jax.errors import UserError
from nanovision_jax.evals import scoring
from nanovision_jax.evals.benchmark import Benchmark, Question, Request, Way
from nanovision_jax.evals.published import find, read_rows

MOST = 64  # tokens of an answer in words


def read_choices(folder, _):
    """The questions with options."""
    return [question for file in find(folder, '*.jsonl') for question in _read(file, _choice)]


def read_answers(folder, _):
    """The questions that are answered in words."""
    return [question for file in find(folder, '*.jsonl') for question in _read(file, _answer)]


def _read(file, made):
    for number, row in enumerate(read_rows(file)):
        try:
            common = {'image': row.get('image') or '', 'group': row.get('group', '')}
            yield made(str(row.get('id', number)), row, common)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f'{file}, question {number + 1}: it lacks what a question has: {row!r:.80}.') from error


def _choice(name, row, common):
    options, answer = tuple(row['options']), row['answer']
    answer = options.index(answer) if isinstance(answer, str) else answer
    if answer not in range(len(options)) or not all(isinstance(option, str) for option in options):
        raise ValueError
    text, chat = (row['question'], True) if 'question' in row else (row['context'], False)
    if not chat and common['image']:
        raise ValueError
    return Question(name, text, answer, options=options, given={'chat': chat}, **common)


def _answer(name, row, common):
    answer = [row['answer']] if isinstance(row['answer'], str) else list(row['answer'])
    if not answer or not all(isinstance(one, str) for one in answer):
        raise ValueError
    return Question(name, row['question'], answer, **common)


def weighed(question):
    """A question with options."""
    chat = question.given['chat']
    return Request(question.text, question.options, chat=chat, delimiter='' if chat else ' ', unconditional='')


def said(question):
    """A question that is answered in words."""
    return Request(question.text, most=MOST)


def match(question, answer):
    """Whether an answer is one that is right: as it stands, as lm-eval's exact_match, and without case and signs."""
    plain = {scoring.plain(one).strip() for one in question.answer}
    found = float(scoring.plain(answer).strip() in plain)
    return {'exact match': float(answer in question.answer), 'match (plain)': found}


TASK = Benchmark(
    'choices',
    read_choices,
    (Way('likelihood', weighed, scoring.choice),),
    'accuracy (per character)',
    scoring.guessing,
    scoring.centred,
    sees=False,
)
ANSWERS = Benchmark(
    'answers',
    read_answers,
    (Way('generate', said, match),),
    'exact match',
    chance=lambda questions: 0.0,
    sees=False,
)
