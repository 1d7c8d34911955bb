"""What a benchmark is: a file of this folder says how its questions are read, asked and scored, and no more.

    TASK = Benchmark('pope', read=questions, ways=(Way('generate', request, score),), metrics=metrics, …)

run() asks each question in every way, and again under the controls; `scoring.py` has the rules that tasks share,
`published.py` reads the files that benchmarks come in, and `asking.py` asks. No jax is imported here.
"""

import collections
import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from nanovision_jax.errors import UserError
from nanovision_jax.evals.base import Scores, interval, others

AUTO = 500  # questions up to which the controls are asked too, where nothing is said


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked. answer: what is wanted, as the task's score takes it; the number of an option where there are any.

    image: the name of its image, '' for none; what has one image goes together when an interval is made. group: of
    which the task gives results apart. given: what else the task's ways of asking or scores take.
    """

    id: str
    text: str
    answer: Any
    image: str = ''
    group: str = ''
    options: tuple[str, ...] = ()
    given: dict = dataclasses.field(default_factory=dict)


class Request(NamedTuple):
    """How a question is asked. options: what the model chooses from by likelihood; none: it answers in words.

    chat: whether `text` is a question of a conversation, or a text that the options continue; document: whether that
    text is the beginning of one. after: what is scored behind text and option, where it is not the option itself.
    scored: which tokens are: 'behind' the context, as lm-eval has it, or, as DCLM's CORE has it, those in which the
    options 'differ', or those that they 'share' at their end. unconditional: a context against which the options are
    weighed too, as in lm-eval's acc_mutual_info.
    """

    text: str
    options: tuple[str, ...] = ()
    chat: bool = True
    document: bool = False
    delimiter: str = ''  # between a text and its options, of which it is no part
    most: int = 16  # tokens of an answer in words
    unconditional: str | None = None
    after: str | None = None
    scored: str = 'behind'


class Likelihoods(NamedTuple):
    """Of each option of a Request, in natural logarithms: its own, and the numbers to divide it by."""

    sums: np.ndarray
    tokens: np.ndarray  # how many each has
    characters: np.ndarray
    greedy: np.ndarray  # whether the model would say it
    unconditional: np.ndarray | None = None


class Way(NamedTuple):
    """A way of asking, and {metric: score} of one answer: text, or Likelihoods. Names of metrics tell the way."""

    name: str
    request: Callable[[Question], Request]
    score: Callable[[Question, Any], dict[str, float]]


class Benchmark(NamedTuple):
    """A task. read: (folder, options of the command) → its questions. headline: the metric that stands for it.

    metrics: (questions, {metric: scores of each}) → {metric: value}; by default the mean of each. said: what a
    baseline always answers, by its name, beside the commonest answer. chance: what guessing scores in the headline.
    each: the headline of each question, of which it is the mean, where it is none of the scores. sees: whether every
    question has an image. shots: how many examples go before a question, for a task that takes some.
    """

    name: str
    read: Callable[[pathlib.Path, dict], Sequence[Question]]
    ways: tuple[Way, ...]
    headline: str
    chance: Callable[[Sequence[Question]], float]
    metrics: Callable[[Sequence[Question], dict[str, np.ndarray]], dict[str, float]] | None = None
    said: dict[str, str] = {}
    sees: bool = True
    each: Callable[[Sequence[Question], dict[str, np.ndarray]], np.ndarray] | None = None
    shots: int | None = None


# Running one ---------------------------------------------------------------------------------------------------------


def run(task: Benchmark, asker, folder: pathlib.Path, limit=None, controls='auto', options=None) -> tuple:
    """(Scores, rows) of a benchmark. asker: asking.Asker of a run. Raises UserError where there is nothing to ask.

    limit: about so many questions, of whole images, drawn with a fixed seed; all groups are as likely.
    """
    began, options = time.monotonic(), {name: value for name, value in (options or {}).items() if value is not None}
    if 'shots' in options and task.shots is None:
        raise UserError(f'{task.name} takes no --shots: its questions are asked without examples.')
    every = list(task.read(folder, options))
    if not every:
        raise UserError(f'{folder} holds no question of {task.name}.')
    if len({question.id for question in every}) < len(every):
        raise UserError(f'{folder}: {task.name} has two questions of one id.')
    questions, left_out = asker.askable(task, sample(every, limit))
    if not questions:
        raise UserError(f'none of {len(every):,} questions of {task.name} can be asked: {left_out}.')
    found, answers = _scored(task, asker, questions, '')
    wanted = controls == 'all' or (controls == 'auto' and len(questions) <= AUTO)
    others_ = {name: _scored(task, asker, questions, name)[0] for name in _controls(task, questions) if wanted}
    each = found[task.headline] if task.each is None else task.each(questions, found)
    images = [question.image or question.id for question in questions]
    result = Scores(
        task.name,
        len(questions),
        task.headline,
        measured(task, questions, found),
        interval(each, images),
        groups(task, questions, found),
        {name: measured(task, questions, scores) for name, scores in others_.items()},
        baselines(task, questions),
        asked=len(questions) + sum(left_out.values()),
        left_out=left_out,
        other=asker.noted(),
        drawn_of=len(every) if limit else None,
        seconds=round(time.monotonic() - began, 1),
        run=asker.lineage(),
        shots=options.get('shots', task.shots),
    )
    rows = []
    for number, question in enumerate(questions):
        row = {'id': question.id, 'image': question.image, 'group': question.group, 'question': question.text}
        row['wanted'] = question.answer
        for way in task.ways:
            prompt, answer = answers[way.name][number]
            row[way.name] = {'prompt': prompt, 'answer': _as_json(answer)}
        scores = {name: float(values[number]) for name, values in (found | {task.headline: each}).items()}
        rows.append(row | {'scores': scores})
    return result, rows


def sample(questions: list[Question], limit: int | None, seed: int = 0) -> list[Question]:
    """At most about `limit` questions in their order, of images drawn at random: pairs on one image stay together."""
    if not limit or len(questions) <= limit:
        return questions
    of_image = collections.Counter(question.image or question.id for question in questions)
    names = sorted(of_image)
    drawn, count = set(), 0
    for place in np.random.default_rng(seed).permutation(len(names)):
        if count >= limit:
            break
        drawn.add(names[place])
        count += of_image[names[place]]
    return [question for question in questions if (question.image or question.id) in drawn]


def _scored(task, asker, questions, control):
    """({metric: scores of each question}, {way: [(prompt, answer)]}) under a control."""
    asked, swapped = list(questions), {}
    if control == 'reordered':
        asked = [reordered(question, number) for number, question in enumerate(questions)]
    elif control == 'shuffled':
        swapped = others([question.image for question in questions if question.image])
    found, answers = {}, {}
    for way in task.ways:
        requests = [way.request(question) for question in asked]
        shown = [('' if control == 'blank' else swapped.get(q.image, q.image)) if q.image else None for q in asked]
        title = f'{task.name}, {way.name}' + (f', {control}' if control else '')
        answers[way.name] = asker.ask(requests, shown, title)
        scores = [way.score(q, answer) for q, (_, answer) in zip(asked, answers[way.name], strict=True)]
        found |= {name: np.array([score[name] for score in scores], float) for name in scores[0]}
    return found, answers


def _controls(task, questions):
    """The controls that a task's questions allow: images blanked, those of others, the options in another order."""
    if images := {question.image for question in questions if question.image}:
        yield 'blank'
        if len(images) > 1:
            yield 'shuffled'
    if any(_shows_order(way.request, question) for way in task.ways for question in questions):
        yield 'reordered'


def _shows_order(request, question):
    """Whether a question is asked in other words where its options are in another order."""
    return len(question.options) > 1 and request(reordered(question, 0)).text != request(question).text


def reordered(question: Question, seed: int) -> Question:
    """The question with its options in another order: each goes on by the same number of places, above 0."""
    count = len(question.options)
    if count < 2:
        return question
    by = 1 + int(np.random.default_rng(seed).integers(count - 1))
    options = tuple(question.options[(place - by) % count] for place in range(count))
    return dataclasses.replace(question, options=options, answer=(question.answer + by) % count)


def measured(task, questions, scores) -> dict[str, float]:
    """The metrics of a task, out of the scores of each question."""
    if task.metrics:
        return task.metrics(questions, scores)
    return {name: float(values.mean()) for name, values in scores.items()}


def groups(task, questions, scores) -> dict[str, dict]:
    """{group: {n, and its metrics}}; none where there is one group."""
    names = list(dict.fromkeys(question.group for question in questions))
    found = {}
    for name in names if len(names) > 1 else []:
        places = [place for place, question in enumerate(questions) if question.group == name]
        part = [questions[place] for place in places]
        found[name] = {'n': len(part)} | measured(task, part, {key: values[places] for key, values in scores.items()})
    return found


def baselines(task, questions) -> dict[str, float]:
    """What the headline is without a model: by guessing, by the commonest answer, by what a task names."""
    found = {'chance': task.chance(questions)}
    if task.each:
        return found
    if any(question.options for question in questions):
        commonest = collections.Counter(question.answer for question in questions).most_common(1)[0][1]
        return found | {'majority': commonest / len(questions)}
    way = next(way for way in task.ways if task.headline in way.score(questions[0], ''))
    texts = [text for q in questions for text in ([q.answer] if isinstance(q.answer, str) else q.answer)]
    said = task.said | {'majority': collections.Counter(texts).most_common(1)[0][0]}
    for name, text in said.items():
        found[name] = float(np.mean([way.score(question, text)[task.headline] for question in questions]))
    return found


def _as_json(answer):
    """An answer as it stands in a row."""
    if isinstance(answer, str):
        return answer
    return {name: values.tolist() for name, values in answer._asdict().items() if values is not None}
