"""CORE of DCLM (arXiv:2406.11794): 22 tasks for models that complete text, as nanochat evaluates them.

Read from its eval_bundle: core.yaml, eval_meta_data.csv and eval_data/. There are three kinds: of several
continuations, or of several contexts of one continuation (`schema`), the one with the least mean loss per token is
chosen, and a continuation in `language_modeling` is right where each of its tokens is the likeliest. Accuracy is
centred, (accuracy - chance) / (1 - chance), and CORE is the mean of this over the tasks.
"""

import random

import numpy as np
import yaml

from nanovision_jax.errors import UserError
from nanovision_jax.evals.benchmark import Benchmark, Question, Request, Way
from nanovision_jax.evals.published import find, read_rows

KINDS = ('multiple_choice', 'schema', 'language_modeling')


def read(folder, _):
    """The questions of all tasks, each with the examples before it."""
    (place, *_), (chances, *_) = find(folder, 'core.yaml'), find(folder, 'eval_meta_data.csv')
    try:
        chance = {row['Eval Task']: float(row['Random baseline']) / 100 for row in read_rows(chances)}
        tasks, found = list(yaml.safe_load(place.read_text())['icl_tasks']), []
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f'{place} and {chances.name} do not say what CORE is made of: {error}.') from error
    for task in tasks:
        try:
            name, kind, shots = task['label'], task['icl_task_type'], task['num_fewshot'][0]
            between, uri = task.get('continuation_delimiter', ' '), task['dataset_uri']
            given = {'kind': kind, 'between': between, 'chance': chance[name]}
            if kind not in KINDS:
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f'{place}: a task that is none of CORE: {task!r:.120}.') from error
        file = place.parent / 'eval_data' / uri
        if not file.is_file():
            raise UserError(f'{file} is missing: {place.name} names it.')
        rows = read_rows(file)
        random.Random(1337).shuffle(rows)  # examples are drawn by the place in this order
        for number, row in enumerate(rows):
            others = [other for other in range(len(rows)) if other != number]
            try:
                drawn = random.Random(1234 + number).sample(others, shots) if shots else []
                before = ''.join(f'{_with_answer(rows[other], kind, between)}\n\n' for other in drawn)
                found.append(_question(f'{name}-{number}', row, kind, name, given | {'before': before}))
            except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
                raise UserError(
                    f'{file}: no question of the kind {kind}, with {shots} others as examples: {row!r:.80}.'
                ) from error
    return found


def _question(name, row, kind, group, given):
    if kind == 'multiple_choice':
        return Question(name, row['query'], row['gold'], '', group, tuple(row['choices']), given)
    given = given | {'continuation': row['continuation']}
    if kind == 'schema':
        return Question(name, '', row['gold'], '', group, tuple(row['context_options']), given)
    return Question(name, row['context'].strip(), row['continuation'], '', group, given=given)


def _with_answer(row, kind, between):
    """A question with its answer, as it stands before another."""
    if kind == 'multiple_choice':
        return row['query'] + between + row['choices'][row['gold']]
    if kind == 'schema':
        return row['context_options'][row['gold']] + between + row['continuation']
    return row['context'].strip() + between + row['continuation']


def request(question):
    """As nanochat asks: whole texts, which begin a document."""
    given = question.given
    common = {'chat': False, 'document': True, 'delimiter': given['between']}
    if given['kind'] == 'multiple_choice':
        return Request(given['before'] + question.text, question.options, scored='differ', **common)
    if given['kind'] == 'schema':
        return Request(given['before'], question.options, after=given['continuation'], scored='share', **common)
    return Request(given['before'] + question.text, (given['continuation'],), **common)


def score(question, likely):
    """Whether the answer is right."""
    if question.given['kind'] == 'language_modeling':
        return {'accuracy': float(likely.greedy[0])}
    return {'accuracy': float(np.argmax(likely.sums / np.maximum(1, likely.tokens)) == question.answer)}


def centred(questions, scores):
    """Of each question, centred, and weighed so that every task counts alike: their mean is CORE."""
    groups = [question.group for question in questions]
    _, task, counts = np.unique(groups, return_inverse=True, return_counts=True)
    chance = np.array([question.given['chance'] for question in questions])
    return (scores['accuracy'] - chance) / (1 - chance) * len(questions) / (len(counts) * counts[task])


def metrics(questions, scores):
    """CORE, and the mean of the tasks' accuracies, not centred; of one task, its own."""
    count = len({question.group for question in questions})
    per_task = [
        np.mean(
            [value for question, value in zip(questions, scores['accuracy'], strict=True) if question.group == name]
        )
        for name in sorted({question.group for question in questions})
    ]
    name = 'accuracy' if count == 1 else 'accuracy, mean of tasks'
    return {'CORE': float(centred(questions, scores).mean()), name: float(np.mean(per_task))}


TASK = Benchmark(
    'core',
    read,
    (Way('likelihood', request, score),),
    'CORE',
    lambda questions: 0.0,
    metrics,
    sees=False,
    each=centred,
)
