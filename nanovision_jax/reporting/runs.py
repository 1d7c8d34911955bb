"""What run folders tell: configs, logs, lineage and results. No jax is imported here."""

import collections
import dataclasses
import math
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from nanovision_jax import config as configs
from nanovision_jax.errors import UserError
from nanovision_jax.evals.base import Result, read_results
from nanovision_jax.runs import config_file as runconfig
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.runs.metrics import read_metrics
from nanovision_jax.stages import STAGES


@dataclasses.dataclass
class Run:
    """What a run folder tells about its stage; empty where a file is missing. name: as the report calls it."""

    name: str
    folder: pathlib.Path
    config: configs.Config | None
    metrics: list[dict]
    lineage: dict

    def all(self, name: str) -> list:
        """The logged values of that name."""
        return [line[name] for line in self.metrics if name in line]

    def series(self, name: str, over: str = 'step', scale: float = 1) -> list[tuple[float, float]]:
        """(x, value) of what was logged under that name and is finite; x may be any other name that grows.

        Where a line lacks x, as those of evaluations do, it follows from the lines before and after.
        """
        points = [(line['step'], scale * line[name]) for line in self.metrics if _finite(line.get(name))]
        if over == 'step' or not points:
            return points
        known = {line['step']: line[over] for line in self.metrics if _finite(line.get(over))}
        if not known:
            return []
        xs = np.interp([step for step, _ in points], list(known), list(known.values()))
        return [(float(x), value) for x, (_, value) in zip(xs, points, strict=True)]


def _finite(value):
    return isinstance(value, int | float) and math.isfinite(value)


def is_run(folder: pathlib.Path) -> bool:
    """Whether a folder holds a run."""
    paths = runfolder.Paths(folder)
    return any(file.is_file() for file in (paths.config, paths.metrics, paths.lineage))


def open_run(folder: pathlib.Path, name: str = '') -> Run:
    """The Run of a folder. Raises UserError where there is none."""
    if not is_run(folder):
        raise UserError(f'{folder} is no run: give a run folder, such as runs/tiny/vision_instruct.')
    config = runconfig.read(folder) if runfolder.Paths(folder).config.exists() else None
    lineage, metrics = runfolder.read_lineage(folder), read_metrics(runfolder.Paths(folder).metrics)
    return Run(name or folder.resolve().name, folder, config, metrics, lineage)


def open_runs(folder: pathlib.Path) -> list[Run]:
    """The Runs of a family folder in the order of the stages, or the one of a run folder.

    Raises UserError for another folder.
    """
    if is_run(folder):
        return [open_run(folder)]
    runs = [open_run(folder / stage) for stage in STAGES if is_run(folder / stage)]
    if not runs:
        raise UserError(f'{folder} holds no run: give a run folder, or a family, with {", ".join(STAGES)} in it.')
    return runs


def results(runs: list[Run], *tasks: str) -> Iterator[tuple[Run, str, Result]]:
    """Every (Run, part, Result) of tasks, the validation split's first; a part of what is there whole is left out."""
    for run_ in runs:
        found = [(part, result) for part, result in read_results(run_.folder) if result.task in tasks]
        whole = {(result.task, part) for part, result in found}
        for part, result in found:
            of = re.sub('-?limit.*', '', part) or 'validation'
            if of == part or (result.task, of) not in whole:
                yield run_, part, result


def rows_of(run_: Run, part: str, result: Result) -> list[dict]:
    """The rows of a result, question by question, that were scored: others tell why they were left out."""
    file = runfolder.result_file(runfolder.Paths(run_.folder).results, result.task, part)
    return [row for row in runfolder.read_lines(file.with_suffix('.jsonl')) if 'answer' in row or 'scores' in row]


def parameters(run_: Run) -> tuple[int, int] | None:
    """How many parameters a run has and trains, from the shapes that its checkpoint lists; None without one."""
    sizes = collections.Counter()
    for file in [*runfolder.Paths(run_.folder).checkpoints.glob('*/params/_METADATA')][:1]:
        for leaf in runfolder.read_json(file)['tree_metadata'].values():
            sizes[leaf['key_metadata'][0]['key']] += math.prod(leaf['value_metadata']['write_shape'])
    learn = sum(n for part, n in sizes.items() if part not in run_.lineage.get('frozen_before', ()))
    return (sizes.total(), learn) if sizes else None


def devices(run_: Run) -> int | None:
    """On how many devices a run was trained; None where it is not told, or the sessions differ."""
    told = {session['devices'].split()[0] for session in run_.lineage.get('sessions', ()) if 'devices' in session}
    count = told.pop() if len(told) == 1 else ''
    return int(count) if count.isdigit() else None
