"""Evaluates a run on held-out data.

    python -m nanovision_jax.evaluate --run=runs/tiny/vision_instruct --task=vqa [--split=heldout]
    python -m nanovision_jax.evaluate --run=runs/tiny/pretrain --task=bpb [--data=FILE]

Writes RUN/eval/<task>.json and, with one object a question, RUN/eval/<task>.jsonl; another split's files are named
<task>-<split>. What cannot be asked, as its picture cannot be read or it is longer than the context, is left out, and
counted. If this is more than 1%, nothing is scored or written unless --allow-missing is given.
"""

import importlib
import pathlib

from nanovision_jax.errors import Parser, UserError, check_writable, nearest, run
from nanovision_jax.evals import base
from nanovision_jax.runs.folder import Paths

TASKS = tuple(base.RESULTS)


def evaluate(run_dir, task, split='validation', data=None, images=None, output=None, limit=None, allow_missing=False):
    """Runs a task on a run folder, writes its files, and returns the result.

    Raises UserError before anything is written: the files of an earlier evaluation stay.
    """
    if task not in TASKS:
        raise UserError(f'no task {task!r}.{nearest(task, TASKS)}')
    if split not in base.SPLITS:
        raise UserError(f'no split {split!r}.{nearest(split, base.SPLITS)}')
    if limit is not None and limit < 1:
        raise UserError(f'--limit takes a number above 0, not {limit}.')
    if task != 'vqa' and (images or allow_missing):
        raise UserError(f'{"--images" if images else "--allow-missing"} is for vqa: {task} reads text alone.')
    if images and not data:
        raise UserError('--images is where the pictures of --data are: it takes --data too.')
    folder = pathlib.Path(output or Paths(run_dir).results)
    if output or folder.parent.is_dir():  # else there is no run, which is said below
        check_writable(folder)
    from nanovision_jax.inference.run import load

    module = importlib.import_module(f'nanovision_jax.evals.{task}')
    options = {'images': images, 'allow_missing': allow_missing} if task == 'vqa' else {}
    result, rows = module.run(load(run_dir), split=split, data=data, limit=limit, **options)
    base.write_result(result, rows, folder, split)
    return result


def main(argv):
    """The command: see the module's docstring."""
    parser = Parser(prog='python -m nanovision_jax.evaluate', description=__doc__)
    parser.add_argument('--run', required=True, help='a run folder')
    parser.add_argument('--task', required=True, help=' or '.join(TASKS))
    parser.add_argument('--split', default='validation', help='validation (default), or heldout for tiny_world')
    parser.add_argument(
        '--data', help='a file to evaluate on, instead of the held-out part of what the run learned from'
    )
    parser.add_argument('--images', help='the zip or folder of pictures that --data names')
    parser.add_argument('--output', help='where the results go (default: RUN/eval)')
    parser.add_argument('--limit', type=int, help='at most this many questions (vqa) or windows (bpb)')
    parser.add_argument('--allow-missing', action='store_true', help='score the rest if over 1% cannot be asked (vqa)')
    args = vars(parser.parse(argv))
    print('\n'.join(evaluate(args.pop('run'), args.pop('task'), **args).lines()))


if __name__ == '__main__':
    run(main)
