"""Evaluates a run on held-out data.

    python -m nanovision_jax.evaluate --run=runs/tiny/vision_instruct --task=vqa [--split=heldout]
    python -m nanovision_jax.evaluate --run=runs/tiny/pretrain --task=bpb [--data=FILE]

Writes RUN/eval/<task>.json and, with one object a question, RUN/eval/<task>.jsonl; another split's files are named
<task>-<split>. What cannot be asked, as its picture cannot be read or it is longer than the context, is left out, and
counted. If this is more than 1%, nothing is scored or written unless --allow-missing is given.
"""

from nanovision_jax.cli import Parser, run
from nanovision_jax.evals import base


def main(argv):
    """The command: see the module's docstring."""
    parser = Parser(prog='python -m nanovision_jax.evaluate', description=__doc__)
    parser.add_argument('--run', required=True, help='a run folder')
    parser.add_argument('--task', required=True, help=' or '.join(base.RESULTS))
    parser.add_argument('--split', default='validation', help='validation (default), train, or heldout for tiny_world')
    parser.add_argument(
        '--data', help='a file to evaluate on, instead of the held-out part of what the run learned from'
    )
    parser.add_argument('--images', help='the zip or folder of pictures that --data names')
    parser.add_argument('--output', help='where the results go (default: RUN/eval)')
    parser.add_argument('--limit', type=int, help='at most this many questions (vqa) or windows (bpb)')
    parser.add_argument('--allow-missing', action='store_true', help='score the rest if over 1%% cannot be asked (vqa)')
    args = vars(parser.parse(argv))
    run_dir, task = args.pop('run'), args.pop('task')
    base.check_options(run_dir, task, **args)
    from nanovision_jax.evals.run import evaluate  # jax loads once the command line is read

    print('\n'.join(evaluate(run_dir, task, **args).lines()))


if __name__ == '__main__':
    run(main)
