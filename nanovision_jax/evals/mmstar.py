"""MMStar: 1,500 questions that an image is needed for, in six categories of three kinds each (arXiv:2403.20330).

Read from the Hub's table (mmstar.parquet). A question holds its options: they are told apart by their marks, `A: …, B:
…`, and put in again in another order by the control; where they cannot be told apart the letters' likelihood is taken,
and the control leaves the question as it is. Asked and scored as lmms-eval's mmstar: its `average` is that of kinds.
"""

import functools
import re

import numpy as np

from nanovision_jax.evals import letters
from nanovision_jax.evals.benchmark import Benchmark, Question
from nanovision_jax.evals.published import find, image_of, made, read_rows

LETTER = letters.LETTER.rstrip('.')  # lmms-eval has none here
MARK = re.compile(r'(?<![^\s(])\(?([A-D])[:.)]\s*')
KINDS = 'accuracy (letter), mean of kinds'


def read(folder, _):
    """The questions of the table."""
    found = []
    for file in find(folder, '*mmstar*.parquet', 'val*.parquet', 'test*.parquet'):
        told = 'a question of MMStar has index, question, answer, category and l2_category'
        found += made(file, read_rows(file), functools.partial(_question, folder, file), told)
    return found


def _question(folder, file, place, row):
    letter, text = row['answer'].strip().upper(), row['question'].strip()
    answer, (pieces, options) = 'ABCD'.index(letter), taken_apart(text)
    if answer >= len(options):
        pieces, options = (text,), ()
    given = {'kind': row['l2_category'], 'pieces': pieces, 'letters': 'ABCD'}
    return Question(str(row['index']), text, answer, image_of(file, folder, place), row['category'], options, given)


def taken_apart(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what stands before, between and behind the options of a question, its options); (text,), () if it has none."""
    marks = list(MARK.finditer(text))
    first = max((place for place, mark in enumerate(marks) if mark[1] == 'A'), default=len(marks))
    marks = marks[first:]
    if len(marks) < 2 or ''.join(mark[1] for mark in marks) != 'ABCD'[: len(marks)]:
        return (text,), ()
    pieces, options, begun = [], [], 0
    for number, mark in enumerate(marks):
        last = number + 1 == len(marks)
        held = text[mark.end() : len(text) if last else marks[number + 1].start()]
        option = held.rstrip() if last else re.sub(r',?\s*$', '', held)
        pieces.append(text[begun : mark.end()])
        options.append(option)
        begun = mark.end() + len(option)
    return (*pieces, text[begun:]), tuple(options)


def asked(question):
    """As lmms-eval's mmstar asks."""
    before, *behind = question.given['pieces']
    text = before + ''.join(option + piece for option, piece in zip(question.options, behind, strict=True))
    return text + LETTER


def alone(question):
    """The question without its options, where they could be told apart."""
    before = question.given['pieces'][0]
    return re.sub(r'\s*(?:(?:Options|Choices):?\s*)?\(?A[:.)]\s*$', '', before) if question.options else before


def said(answer: str) -> str:
    """The letter of an answer by lmms-eval's rule, '' for none.

    It is the first or the last character where this is no part of a word; else the last of what is `the answer is`
    to a letter, else of (A), of A., of A:, of A), of A and a space, and of A anywhere.
    """
    text = answer.strip()
    for sign in ',.!?;:\'"':
        text = text.strip(sign)
    inner, text = text.strip(), f' {text} '
    if inner[:1] in tuple('ABCD') and not inner[1:2].isalpha():
        return inner[0]
    if inner[-1:] in tuple('ABCD') and not inner[-2:-1].isalpha():
        return inner[-1]
    low, places = text.lower(), {}
    begun = [low.find(phrase) + len(phrase) for phrase in PHRASES if phrase in low]
    places = {max((text.find(letter, start) for start in begun), default=-1): letter for letter in 'ABCD'}
    for form in ('({})', '{}.', '{}:', '{})', '{} ', '{}'):
        if max(places) >= 0:
            break
        places = {text.rfind(form.format(letter)): letter for letter in 'ABCD'}
    return places[max(places)] if max(places) >= 0 else ''


_IS = [f'{the}{kind} is' for kind in ('answer', 'option', 'choice') for the in ('the correct ', 'correct ')]
_IS += ['the answer is', 'answer is', 'the best answer is', 'best answer is', 'the best option is', 'best option is']
_IS += ['the choice is', 'choice is', 'my answer is', 'my choice is', 'i choose', 'i select', 'i pick']
PHRASES = (*_IS, '옵션', '정답은', '답은', '답:', '答案是', '答案为', '选', '答えは')


def metrics(questions, scores):
    """The means, and that of the letter over the kinds of question."""
    kinds = np.array([question.given['kind'] for question in questions])
    right = scores[letters.HEADLINE]
    found = {name: float(values.mean()) for name, values in scores.items()}
    return found | {KINDS: float(np.mean([right[kinds == kind].mean() for kind in np.unique(kinds)]))}


TASK = Benchmark(
    'mmstar',
    read,
    letters.ways(asked, alone, lambda answer, letter: said(answer) == letter),
    letters.HEADLINE,
    letters.guessing,
    metrics,
)
