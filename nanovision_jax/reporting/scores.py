"""Of a report, what was measured: tables with intervals and controls, confusions of answers, the worst questions."""

import collections
import itertools
from typing import NamedTuple

import numpy as np

from nanovision_jax.evals.base import BENCHMARKS, Accuracy, Scores, interval, told_part, told_score
from nanovision_jax.reporting.runs import Run, results, rows_of

KINDS, GROUPS = 16, 24  # rows of a table at most
FEW = 9  # different answers that a kind of question may want for its confusions to be shown
WORST = 8
CONTROLS = {
    'blank': 'with grey pictures',
    'shuffled': 'with those of other questions',
    'reordered': 'with the options in another order',
}


class Answered(NamedTuple):
    """A question that was scored, from 0 to 1. given: the answer; wanted: one that is right."""

    kind: str
    image: str
    question: str
    wanted: str
    given: str
    score: float


def chapter(runs: list[Run]):
    """Blocks: questions about pictures, benchmarks, held-out text."""
    for run_, part, result in results(runs, 'vqa'):
        rows = [
            Answered(r['kind'], r['image'], r['question'], r['reference'], r['answer'], r['correct'])
            for r in rows_of(run_, part, result)
        ]
        yield from evaluation(run_, part, result, rows)
        yield from mistakes(rows)
    if found := list(results(runs, *BENCHMARKS)):
        yield 'heading', 'Benchmarks'
        yield from benchmarks(found)
        for run_, part, result in found:
            yield from benchmark(run_, part, result)
    if found := list(results(runs, 'bpb')):
        yield 'heading', 'Held-out text'
        rows = [
            (f'{r.name}, {told_part(s)}', f'{b.n:,}', f'{b.loss:.3f}', f'{b.bits_per_byte:.3f}') for r, s, b in found
        ]
        yield 'table', ('Run, text', 'Tokens', 'Loss (nats a token)', 'Bits per byte'), rows


# Questions about pictures ---------------------------------------------------------------------------------------------


def headline(run_: Run, part: str, result: Accuracy) -> str:
    """The result of an evaluation in a sentence."""
    (low, high), n = result.interval, f'{result.n:,} questions about pictures ({told_part(part)})'
    return f'{run_.name} answers {result.accuracy:.1%} of {n} right (95% interval {low:.1%} to {high:.1%}).'


def evaluation(run_: Run, part: str, result: Accuracy, rows: list[Answered]):
    """Blocks: accuracy by kind, what becomes of it without the images, and what that means."""
    yield 'heading', f'Questions about pictures: {run_.name}, {told_part(part)}'
    yield 'text', headline(run_, part, result), ''
    if told := result.coverage():
        yield 'text', f'Questions {told}.', 'note'
    kinds = sorted(result.by_kind.items(), key=lambda item: -item[1]['n'])
    ranges = {kind: interval(*zip(*((r.score, r.image) for r in some), strict=True)) for kind, some in _by_kind(rows)}
    lines = []
    for kind, r in sorted(kinds[:KINDS]):
        low, high = ranges.get(kind, (None, None))
        lines.append((
            kind,
            f'{r["n"]:,}',
            f'{r["accuracy"]:.1%}',
            '–' if low is None else f'{100 * low:.1f} to {100 * high:.1f}',
            (r['accuracy'], r['chance'], low, high),
            *(f'{r[x]:.1%}' for x in ('chance', 'blank', 'shuffled')),
        ))  # fmt: skip
    yield 'table', ('Kind', 'Questions', 'Accuracy', '95% interval', '', 'Chance', 'Blank', 'Shuffled'), lines
    note = 'Chance, the mark in a bar, is the score of always giving the kind’s commonest answer.'
    note += ' Blank and Shuffled are the scores with grey pictures, and with those of other questions.'
    note += ' A description counts by the share of its parts that are right.' if 'description' in dict(kinds) else ''
    if part.startswith('heldout'):
        note += ' In heldout are the pairs of colour and shape that training never shows.'
    note += f' {len(kinds) - KINDS} rarer kinds are left out.' if len(kinds) > KINDS else ''
    yield 'text', note, 'note'
    right = result.accuracy
    lines = [('as they are', f'{right:.1%}', (right, 0, *result.interval), '')]
    for name, share in result.controls.items():
        lines.append((name, f'{share:.1%}', (share, 0), f'{100 * (share - right):+.1f} points'.replace('-', '−')))
    yield 'table', ('Pictures', 'Accuracy', '', 'Difference'), lines
    yield 'text', result.verdict(), 'verdict'


# Benchmarks -----------------------------------------------------------------------------------------------------------


def benchmarks(found: list[tuple[Run, str, Scores]]):
    """Blocks: a table with a line for each result: its headline, its interval, baselines and controls."""
    names = [*dict.fromkeys(name for *_, result in found for name in result.controls)]
    lines = []
    for run_, part, result in found:
        low, high = (told_score(x, result.headline) for x in result.interval)
        base = max(result.baselines.items(), key=lambda item: item[1], default=None)
        controls = [result.controls[name][result.headline] if name in result.controls else None for name in names]
        lines.append((
            f'{result.task} {result.headline}, {run_.name}{_part(part)}',
            told_score(result.metrics[result.headline], result.headline),
            f'{low.removesuffix("%")} to {high.removesuffix("%")}',
            f'{result.n:,}' + (f' of {result.drawn_of:,}' if result.drawn_of else ''),
            f'{told_score(base[1], result.headline)} ({base[0]})' if base else '–',
            *('–' if value is None else told_score(value, result.headline) for value in controls),
        ))  # fmt: skip
    header = ('Benchmark, run', 'Score', '95% interval', 'Questions', 'Without a model')
    yield 'table', (*header, *(name.capitalize() for name in names)), lines
    note = 'Without a model is the best of what guessing and always giving one answer score.'
    told = [f'{name} {CONTROLS[name]}' for name in names if name in CONTROLS]
    yield 'text', note + (f' The same questions are asked again: {", ".join(told)}.' if told else ''), 'note'


def benchmark(run_: Run, part: str, result: Scores):
    """Blocks: all of one result that the table of all does not tell, where there is any."""
    rows, headline_ = answered(result, rows_of(run_, part, result)), result.headline
    wrong = list(mistakes(rows))
    if not (len(result.metrics) > 1 or result.groups or result.verdict() or wrong):
        return
    yield 'subheading', f'{result.task}, {run_.name}{_part(part)}'
    if told := result.coverage():
        yield 'text', f'Questions {told}.', 'note'
    if len(result.metrics) > 1:
        controls = list(result.controls)
        lines = [
            (name, told_score(value, name), *(told_score(result.controls[c][name], name) for c in controls))
            for name, value in result.metrics.items()
        ]
        yield 'table', ('Metric', 'Score', *(name.capitalize() for name in controls)), lines
    groups = sorted(result.groups.items(), key=lambda item: item[1][headline_])
    if groups:
        lines = []
        for name, row in groups[:GROUPS]:
            value = row[headline_]
            bar = (value, 0) if _is_share(value) else ''
            lines.append((name, f'{row["n"]:,}', told_score(value, headline_), bar))
        yield 'table', ('Group, worst first', 'Questions', headline_, ''), lines
        if len(groups) > GROUPS:
            yield 'text', f'{len(groups) - GROUPS} better groups are left out.', 'note'
    if told := result.verdict():
        yield 'text', told, 'verdict'
    yield from wrong


def _part(part):
    """What is asked of a benchmark, where that is not all of it."""
    told = told_part(part).removeprefix('validation split').removeprefix(', ')
    return f' ({told})' if told else ''


def answered(result: Scores, rows: list[dict]) -> list[Answered]:
    """The questions of a benchmark, if all of them are answered in words and scored from 0 to 1; else none."""
    found = []
    for row in rows:
        wanted = row['wanted'][:1] if isinstance(row['wanted'], list) else [row['wanted']]
        ways = [way for way in row.values() if isinstance(way, dict) and isinstance(way.get('answer'), str)]
        score = row['scores'].get(result.headline)
        if not (wanted and isinstance(wanted[0], str) and ways and score is not None and _is_share(score)):
            return []
        said, image = ways[0], row['image'] or row['id']
        question = row.get('question') or said['prompt']  # which results of before have alone
        found.append(Answered(row['group'] or '', image, question, wanted[0], said['answer'], score))
    return found


def _is_share(value):
    return 0 <= value <= 1


# What goes wrong ------------------------------------------------------------------------------------------------------


def mistakes(rows: list[Answered]):
    """Blocks: which answers are given instead of which, and the questions that go wrong most often."""
    tables = [table for kind, some in _by_kind(rows) if (table := confusion(kind, some))]
    if tables:
        yield 'text', 'Answers wanted (lines) and given (columns), of the kinds that have few.', ''
        yield 'confusions', tables
    if found := worst(rows):
        yield 'text', 'Questions that went wrong most often:', ''
        yield 'words', ('Question', 'Commonest wrong answer', 'Instead of', 'Asked', 'Right'), found


def confusion(kind: str, rows: list[Answered]) -> tuple | None:
    """(kind, answers given, [(answer wanted, counts)]); None where many answers are wanted, one alone, or all is right.

    Answers that are wanted nowhere are one column.
    """
    pairs = collections.Counter((_plain(row.wanted), _plain(row.given)) for row in rows)
    wanted = [name for name, _ in collections.Counter(_plain(row.wanted) for row in rows).most_common()]
    if not 1 < len(wanted) <= FEW or all(a == b for a, b in pairs):
        return None
    others = [(a, sum(n for (w, b), n in pairs.items() if w == a and b not in wanted)) for a in wanted]
    given = [*wanted, 'else'] if any(n for _, n in others) else wanted
    lines = [(a, [pairs[a, b] for b in wanted] + [n] * (len(given) > len(wanted))) for a, n in others]
    return kind, given, lines


def worst(rows: list[Answered]) -> list[tuple]:
    """Lines: the questions that lost most points, over all images that they were asked about."""
    lines = []
    of_question = collections.defaultdict(list)
    for row in rows:
        of_question[row.question].append(row)
    lost = {question: sum(1 - row.score for row in some) for question, some in of_question.items()}
    for question in sorted((q for q in lost if lost[q] > 0), key=lambda q: (-lost[q], q))[:WORST]:
        some = of_question[question]
        (wanted, given), n = collections.Counter((r.wanted, r.given) for r in some if r.score < 1).most_common(1)[0]
        times = f' ({n} times)' if n > 1 else ''
        right = f'{np.mean([row.score for row in some]):.0%}'
        lines.append((_cut(question), f'{_cut(given)}{times}', _cut(wanted), f'{len(some):,}', right))
    return lines


def _by_kind(rows):
    return [(kind, list(some)) for kind, some in itertools.groupby(sorted(rows, key=_kind), key=_kind)]


def _kind(row):
    return row.kind


def _plain(text):
    return _cut(' '.join(text.lower().split()).rstrip('.') or 'nothing', 24)


def _cut(text, most=120):
    text = ' '.join(text.split())
    return text if len(text) <= most else f'{text[:most]}…'
