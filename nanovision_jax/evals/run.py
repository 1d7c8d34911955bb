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
    if task in base.BENCHMARKS:
        return _benchmark(run, task, pathlib.Path(caches.local(data)), folder, limit, **options)
    options = {'images': images and caches.local(images), 'allow_missing': allow_missing} if task == 'vqa' else {}
    if data:
        for place in stores.conversations(data, images or '', shown=task == 'vqa'):
            stores.fetched(place)
        data = caches.local(data)
    else:
        stores.fetch(run.config)
    result, rows = TASKS[task].run(run, split=split, data=data, limit=limit, **options)
    base.write_result(result, rows, folder, base.part_of(split, data, limit))
    return result


def benchmark_of(name: str) -> benchmark.Benchmark:
    """The Benchmark of a name."""
    module, _, attribute = MODULES.get(name, f'{name}.TASK').partition('.')
    return getattr(importlib.import_module(f'nanovision_jax.evals.{module}'), attribute)


def _benchmark(run, name, data, folder, limit, controls=None, **options):
    if not data.is_dir():
        raise UserError(f'no folder {data}: --data is where the published files of {name} are.')
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f'{name}.answers'
    result, rows = benchmark.run(
        benchmark_of(name), asking.Asker(run, Pictures(data), kept), data, limit, controls or 'auto', options
    )
    base.write_result(result, rows, folder, base.part_of(limit=limit, shots=options.get('shots')))
    kept.unlink()
    return result
