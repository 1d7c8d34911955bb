"""How much chance is in a recipe: trains it with several seeds, evaluates each, and tells mean and spread.

    python scripts/benchmarks/seeds.py --seeds=3 [--name=tiny] [--config.optim.learning_rate=2e-3 …]
    python scripts/benchmarks/seeds.py --seeds=3 --stages=vision_instruct --parents=runs/tiny --name=other
    python scripts/benchmarks/seeds.py --seeds=3 --stages=vision_instruct --parents=runs/tiny-seed{} --name=other

Seed K trains in runs/NAME-seedK, all five stages of the quickstart, or --stages of them; the others are then those of
--parents, whose data are read too; {} in it stands for K, so that two recipes differ in nothing else. Overrides go to
every stage that is trained. What is finished is skipped, and what was interrupted goes on: the same command ends what a
kill cut off.

Prints a table in Markdown, in percent: the mean over seeds, the standard deviation of one seed (n - 1), the lowest and
the highest, and each; of all questions and of each kind, of `validation` and of `heldout`.
"""

import json
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from nanovision_jax.cli import Parser, run  # noqa: E402
from nanovision_jax.errors import UserError  # noqa: E402
from nanovision_jax.evals.base import part_of  # noqa: E402
from nanovision_jax.runs.folder import Paths, result_file  # noqa: E402

STAGES = ('clip', 'pretrain', 'sft', 'vision_pretrain', 'vision_instruct')
QUESTIONS = {'validation': 2400, 'heldout': 1200}  # as many as the quickstart asks


def command(module: str, *options: str):
    """Runs a command of the package; where it fails, this one ends with its code."""
    print('python -m', f'nanovision_jax.{module}', *options, file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, '-m', f'nanovision_jax.{module}', *options], cwd=ROOT, stdout=sys.stderr)
    if done.returncode:
        sys.exit(done.returncode)


def borrow(family: pathlib.Path, parents: pathlib.Path, stages):
    """Links what is not trained into a family: the stages of another one, its data and its tokenizer.

    Raises UserError where the family has them of somewhere else.
    """
    family.mkdir(parents=True, exist_ok=True)
    for name in (*[stage for stage in STAGES if stage not in stages], 'data', 'tokenizer'):
        source, link = (parents / name).resolve(), family / name
        if (link.exists() or link.is_symlink()) and link.resolve() != source:
            raise UserError(f'{link} is not of {parents}: choose another --name, or remove {family}.')
        if source.exists() and not link.exists():
            link.symlink_to(source, target_is_directory=True)


def scores(run_dir: pathlib.Path) -> dict[tuple[str, str], float]:
    """{(split, 'all' or a kind): share that is right} of a vision_instruct run, evaluated where it was not yet."""
    found = {}
    for split, limit in QUESTIONS.items():
        file = result_file(run_dir / 'eval', 'vqa', part_of(split, limit=limit))
        if not file.exists() or file.stat().st_mtime < Paths(run_dir).lineage.stat().st_mtime:
            command('evaluate', f'--run={run_dir}', '--task=vqa', f'--split={split}', f'--limit={limit}')
        result = json.loads(file.read_text())
        found[split, 'all'] = result['accuracy']
        found |= {(split, kind): row['accuracy'] for kind, row in result['by_kind'].items()}
    return found


def table(found: list[dict[tuple[str, str], float]]) -> list[str]:
    """Lines of Markdown. found: the scores() of each seed."""
    lines = ['| split | questions | mean | sd | lowest to highest | each |', '|---|---|---|---|---|---|']
    for split, kind in found[0]:
        values = [100 * scores[split, kind] for scores in found]
        spread = f'{statistics.stdev(values):.1f}' if len(values) > 1 else ''
        each = ', '.join(f'{value:.1f}' for value in values)
        reach = f'{min(values):.1f} to {max(values):.1f}'
        lines.append(f'| {split} | {kind} | {statistics.mean(values):.1f} | {spread} | {reach} | {each} |')
    return lines


def main(argv):
    """The command: see the module's docstring."""
    overrides = [arg for arg in argv if arg.startswith('--config.')]
    parser = Parser(prog='seeds.py', description=__doc__)
    parser.add_argument('--seeds', type=int, default=3, help='so many, from 0 on (default: 3)')
    parser.add_argument('--name', default='tiny', help='runs are runs/NAME-seedK (default: tiny)')
    parser.add_argument('--stages', default=','.join(STAGES), help='with commas between (default: all five)')
    parser.add_argument('--parents', help='whose other stages, data and tokenizer are taken; {} is the seed')
    args = parser.parse([arg for arg in argv if arg not in overrides])
    stages = [stage for stage in STAGES if stage in args.stages.split(',')]
    if args.seeds < 1:
        raise UserError('--seeds takes a number above 0.')
    if unknown := set(args.stages.split(',')) - set(STAGES):
        raise UserError(f'no stage {unknown.pop()!r}: there are {", ".join(STAGES)}.')
    if 'vision_instruct' not in stages:
        raise UserError('--stages ends with vision_instruct: that is what is asked.')
    if args.parents is None and len(stages) < len(STAGES):
        raise UserError('--stages leaves some out: say --parents=FAMILY, whose these are.')
    found = []
    for seed in range(args.seeds):
        family = ROOT / 'runs' / f'{args.name}-seed{seed}'
        if args.parents:
            borrow(family, pathlib.Path(args.parents.replace('{}', str(seed))), stages)
        for stage in stages:
            options = [f'--config=configs/{stage}.py:tiny', f'--config.name={family.name}', f'--config.seed={seed}']
            command('train', *options, *overrides)
        found.append(scores(family / 'vision_instruct'))
    print(f'{args.name}, seeds 0 to {args.seeds - 1}:\n', *table(found), sep='\n')


if __name__ == '__main__':
    run(main)
