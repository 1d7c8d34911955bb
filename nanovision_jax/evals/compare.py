"""Compares runs on the questions that all of them were asked: paired differences, with intervals.

The same questions on the same images are resampled for both, so that what is hard for both widens no interval.
"""

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from nanovision_jax.errors import UserError
from nanovision_jax.evals.base import RESULTS, Scores, interval, read_results, told_difference, told_part, told_score
from nanovision_jax.runs.folder import Paths, read_lines, result_file


class Score(NamedTuple):
    """What a run scores, and how far it is from the first run, with the 95% interval; None for the first itself."""

    run: str
    metric: str
    score: float
    difference: float | None
    interval: list[float] | None

    def told(self) -> str:
        """The score as text."""
        return told_score(self.score, self.metric)

    def change(self) -> str:
        """The difference and its interval as text; '' for the first run."""
        if self.difference is None:
            return ''
        low, high = (told_difference(end, self.metric).removesuffix(' points') for end in self.interval)
        return f'{told_difference(self.difference, self.metric)} (95%: {low} to {high})'

    def verdict(self) -> str:
        """Whether the difference may be chance; '' where it is none."""
        return 'may be chance' if self.interval and self.interval[0] <= 0 <= self.interval[1] else ''


class Paired(NamedTuple):
    """An evaluation that all runs have. n: questions that all were asked, of up to `most`."""

    task: str
    part: str
    metric: str
    n: int
    most: int
    scores: list[Score]

    def title(self) -> str:
        """What was compared, as text."""
        told = f'{self.task}, {told_part(self.part)}: {self.metric} on {self.n:,} questions'
        return told + (f' that all were asked, of up to {self.most:,}' if self.n < self.most else '')


def compare(runs: list[str], tasks: list[str] | None = None) -> Iterator[str]:
    """The lines of text that tell what paired() finds."""
    for found in paired(runs, tasks):
        yield found.title()
        for score in found.scores:
            change = ', which '.join(filter(None, [score.change(), score.verdict()]))
            yield '  '.join(filter(None, [f'  {score.told():>6}', score.run, change]))


def paired(runs: list[str], tasks: list[str] | None = None) -> Iterator[Paired]:
    """For each evaluation that all runs have, what each scores, and how far each is from the first.

    tasks: of these alone. Raises UserError where there is nothing to compare.
    """
    found = [{(result.task, part): result for part, result in read_results(pathlib.Path(run))} for run in runs]
    shared = [key for key in found[0] if all(key in other for other in found) and (not tasks or key[0] in tasks)]
    shared = [key for key in shared if result_file(Paths(runs[0]).results, *key).with_suffix('.jsonl').is_file()]
    if not shared:
        there = '; '.join(
            f'{run}: {", ".join(task for task, _ in one) or "none"}' for run, one in zip(runs, found, strict=True)
        )
        raise UserError(f'no evaluation, question by question, is in all of these runs ({there}).')
    for task, part in shared:
        headline = found[0][task, part].headline if RESULTS[task] is Scores else 'accuracy'
        scores = [_scores(run, task, part, headline) for run in runs]
        ids = [name for name in scores[0] if all(name in other for other in scores)]
        images = [scores[0][name][1] for name in ids]
        columns = [np.array([one[name][0] for name in ids]) for one in scores] if ids else []
        lines = []
        for run, values in zip(runs, columns, strict=False):
            change = None if run == runs[0] else values - columns[0]
            apart = (None, None) if change is None else (float(change.mean()), interval(change, images))
            lines.append(Score(run, headline, float(values.mean()), *apart))
        yield Paired(task, part, headline, len(ids), max(map(len, scores)), lines)


def _scores(run, task, part, headline):
    """{(id, question, image): (score, image)} of what a run was asked: an id may be but a number in a file."""
    rows = read_lines(result_file(Paths(run).results, task, part).with_suffix('.jsonl'))
    if RESULTS[task] is Scores:
        scores = [(row, row['scores'][headline], row['image'] or row['id']) for row in rows]
    else:
        scores = [(row, row['correct'], row['image']) for row in rows if 'correct' in row]
    return {(row['id'], row.get('question'), row['image']): (score, image) for row, score, image in scores}
