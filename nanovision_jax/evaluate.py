"""Evaluates a run on held-out data, and on published benchmarks.

    python -m nanovision_jax.evaluate --run=runs/tiny/vision_instruct --task=vqa [--split=heldout]
    python -m nanovision_jax.evaluate --run=runs/tiny/pretrain --task=bpb [--data=FILE]
    python -m nanovision_jax.evaluate --run=RUN --task=pope,mme --data=FOLDER [--limit=N] [--controls=all]
    python -m nanovision_jax.evaluate --compare RUN RUN [RUN …] [--task=vqa]

Writes RUN/eval/<task>.json and, with one object a question, RUN/eval/<task>.jsonl. What was not the whole of the run's
validation data says so in its name: <task>-<split>, <task>-of-<the data's file>, <task>-limit<N>. A benchmark's FOLDER
holds its published files, at any depth; one that was cut off goes on with the questions that are left.

What cannot be asked, as its picture cannot be read or it is longer than the context, is left out, and counted. For vqa
nothing is scored or written if this is more than 1%, unless --allow-missing is given.

--compare evaluates nothing: of the questions that all runs were asked it tells each run's score, and the paired
difference from the first run's, with its 95% interval.
"""

from nanovision_jax.cli import Parser, run
from nanovision_jax.errors import UserError
from nanovision_jax.evals import base
from nanovision_jax.evals.compare import compare


def main(argv):
    """The command: see the module's docstring."""
    parser = Parser(prog='python -m nanovision_jax.evaluate', description=__doc__)
    parser.add_argument('--run', help='a run folder')
    parser.add_argument('--compare', nargs='+', metavar='RUN', help='run folders whose results are compared')
    parser.add_argument('--task', help=f'one or more, with commas between: {", ".join(base.RESULTS)}')
    parser.add_argument('--split', default='validation', help='validation (default), train, or heldout for tiny_world')
    parser.add_argument(
        '--data',
        help='a file to evaluate on, instead of the held-out part of what the run learned from; the folder of '
        'a benchmark',
    )
    parser.add_argument('--images', help='the zip or folder of pictures that --data names')
    parser.add_argument('--output', help='where the results go (default: RUN/eval)')
    parser.add_argument('--limit', type=int, help='at most this many questions, or windows (bpb)')
    parser.add_argument('--allow-missing', action='store_true', help='score the rest if over 1%% cannot be asked (vqa)')
    parser.add_argument(
        '--controls',
        choices=('all', 'none'),
        help='ask a benchmark again with blank and swapped images and options '
        'in another order, or do not (default: up to 500 questions)',
    )
    parser.add_argument('--shots', type=int, help='examples before each question of a benchmark that takes some')
    args = vars(parser.parse(argv))
    run_dir, runs, named = args.pop('run'), args.pop('compare'), args.pop('task')
    tasks = [name.strip() for name in (named or '').split(',') if name.strip()]
    if runs:
        if run_dir or len(runs) < 2 or any(parser.get_default(name) != value for name, value in args.items()):
            raise UserError('--compare takes two runs or more, and --task.')
        print('\n'.join(compare(runs, tasks)))
        return
    for name, given in (('run', run_dir), ('task', tasks)):
        if not given:
            raise UserError(f'--{name} is missing: say --run=RUN --task=TASK, or --compare RUN RUN.')
    for task in tasks:
        base.check_options(run_dir, task, **args)
    from nanovision_jax.evals.run import evaluate  # jax loads once the command line is read

    for task in tasks:
        print('\n'.join(evaluate(run_dir, task, **args).lines()))


if __name__ == '__main__':
    run(main)
