"""Runs tasks on a run folder."""

import importlib
import pathlib

from nanovision_jax import caches
from nanovision_jax.data import stores
from nanovision_jax.errors import UserError
from nanovision_jax.evals import asking, base, benchmark, bpb, vqa
from nanovision_jax.evals.published import Pictures
from nanovision_jax.inference.run import load
from nanovision_jax.runs.folder import Paths

TASKS = {'bpb': bpb, 'vqa': vqa}  # of the data that runs learn from
OWN = ('choices', 'answers')  # of whatever files --data has
MODULES = {  # where it is not <name>.TASK
    'arc_easy': 'arc.EASY',
    'arc_challenge': 'arc.CHALLENGE',
    'textvqa_ocr': 'textvqa.OCR',
    'answers': 'choices.ANSWERS',
}


def evaluate(
    run_dir, task, split='validation', data=None, images=None, output=None, limit=None, allow_missing=False, **options
) -> base.Result:
    """Runs a task on a run folder, writes its files, and returns the result.

    Raises UserError before anything is written: the files of an earlier evaluation stay.
    """
    base.check_options(run_dir, task, split, data, images, output, limit, allow_missing, **options)
    run, folder = load(run_dir), pathlib.Path(output or Paths(run_dir).results)
    if task == 'vqa':
        options |= {'images': images and caches.local(images), 'allow_missing': allow_missing}
    if task not in base.BENCHMARKS and data:
        for place in stores.conversations(data, images or '', shown=task == 'vqa'):
            stores.fetched(place)
    elif task not in base.BENCHMARKS:
        stores.fetch(run.config)
    result, rows = asked(run, task, data, folder, limit, split=split, **options)
    of = data if task in (*TASKS, *OWN) else None  # else the task says what was asked
    base.write_result(result, rows, folder, base.part_of(split, of, limit, options.get('shots')))
    (folder / f'{task}.answers').unlink(missing_ok=True)
    return result


def asked(
    run, task: str, data, folder: pathlib.Path, limit=None, controls=None, split='validation', **options
) -> tuple:
    """(Result, rows) of a task asked of an opened run (inference.run.Run); of benchmarks answers are kept in `folder`.

    controls: 'none' leaves them out. Raises UserError where that cannot be asked.
    """
    data = caches.local(data) if data else None
    if task not in base.BENCHMARKS:
        if data and not pathlib.Path(data).exists():
            raise UserError(f"there is no {data}: --data is what {task} asks about, where it is not the run's own.")
        given = {name: value for name, value in options.items() if value is not None}
        given |= {'controls': False} if task == 'vqa' and controls == 'none' else {}
        return TASKS[task].run(run, split=split, data=data, limit=limit, **given)
    if not pathlib.Path(data).is_dir():
        raise UserError(f'no folder {data}: --data is where the published files of {task} are.')
    folder.mkdir(parents=True, exist_ok=True)
    place = folder_of(task, data)
    asker = asking.Asker(run, Pictures(place), folder / f'{task}.answers')
    return benchmark.run(benchmark_of(task), asker, place, limit, controls or 'auto', options)


def folder_of(task: str, data) -> pathlib.Path:
    """Where the files of a benchmark are: in a folder of `data` that is named as it is, else in `data`.

    Tables of the Hub have the same names in all sets: those of several lie in a folder each.
    """
    names = (task, MODULES.get(task, task).partition('.')[0])
    return next((place for name in names if (place := pathlib.Path(data) / name).is_dir()), pathlib.Path(data))


def benchmark_of(name: str) -> benchmark.Benchmark:
    """The Benchmark of a name."""
    module, _, attribute = MODULES.get(name, f'{name}.TASK').partition('.')
    return getattr(importlib.import_module(f'nanovision_jax.evals.{module}'), attribute)
