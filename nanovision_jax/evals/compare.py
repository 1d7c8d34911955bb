"""Compares runs on the questions that all of them were asked: paired differences, with intervals.

The same questions on the same images are resampled for both, so that what is hard for both widens no interval.
"""

import pathlib
from collections.abc import Iterator

import numpy as np

from nanovision_jax.errors import UserError
from nanovision_jax.evals.base import RESULTS, Scores, interval, read_results, told_part
from nanovision_jax.runs.folder import Paths, read_lines, result_file


def compare(runs: list[str], tasks: list[str] | None = None) -> Iterator[str]:
    """Lines: for each evaluation that all runs have, what each scores, and how far each is from the first.

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
        most = max(map(len, scores))
        yield f'{task}, {told_part(part)}: {headline} on {len(ids):,} questions' + (
            f' that all were asked, of up to {most:,}' if len(ids) < most else ''
        )
        if not ids:
            continue
        images = [scores[0][name][1] for name in ids]
        columns = [np.array([one[name][0] for name in ids]) for one in scores]
        for run, values in zip(runs, columns, strict=True):
            yield f'  {values.mean():6.1%}  {run}' + (
                _difference(values - columns[0], images) if run != runs[0] else ''
            )


def _difference(differences, images):
    low, high = interval(differences, images)
    told = f'  {100 * differences.mean():+.1f} points (95% interval {100 * low:+.1f} to {100 * high:+.1f})'
    return told + ('' if low > 0 or high < 0 else ', which may be chance')


def _scores(run, task, part, headline):
    """{id: (score, image)} of the questions that a run was asked."""
    rows = read_lines(result_file(Paths(run).results, task, part).with_suffix('.jsonl'))
    if RESULTS[task] is Scores:
        return {row['id']: (row['scores'][headline], row['image'] or row['id']) for row in rows}
    return {row['id']: (row['correct'], row['image']) for row in rows if 'correct' in row}
