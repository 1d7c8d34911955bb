"""Runs a task on a run folder."""

import pathlib

from nanovision_jax import caches
from nanovision_jax.data import stores
from nanovision_jax.evals import base, bpb, vqa
from nanovision_jax.inference.run import load
from nanovision_jax.runs.folder import Paths

TASKS = {'bpb': bpb, 'vqa': vqa}


def evaluate(
    run_dir, task, split='validation', data=None, images=None, output=None, limit=None, allow_missing=False
) -> base.Result:
    """Runs a task on a run folder, writes its files, and returns the result.

    Raises UserError before anything is written: the files of an earlier evaluation stay.
    """
    base.check_options(run_dir, task, split, data, images, output, limit, allow_missing)
    options = {'images': images and caches.local(images), 'allow_missing': allow_missing} if task == 'vqa' else {}
    run = load(run_dir)
    if data:
        for place in stores.conversations(data, images or '', shown=task == 'vqa'):
            stores.fetched(place)
        data = caches.local(data)
    else:
        stores.fetch(run.config)
    result, rows = TASKS[task].run(run, split=split, data=data, limit=limit, **options)
    base.write_result(result, rows, pathlib.Path(output or Paths(run_dir).results), split)
    return result
