"""One page about a run, a family of runs, or several runs beside each other.

    python -m nanovision_jax.report runs/tiny                            the family: report.html and report.md in it
    python -m nanovision_jax.report runs/tiny/sft                        one run, as train writes it at its end
    python -m nanovision_jax.report runs/a/sft runs/b/sft [--output=F]   what differs, curves, paired scores

The page needs no other file, no network and no scripts. What there is nothing to tell of is left out. A chat.jsonl in
the folder of a family ({image, question, answer} a line) is shown too. A comparison goes into the folder in which all
of the runs lie, unless --output names another; a report there that is no comparison is left alone.
"""

from nanovision_jax.cli import Parser, run
from nanovision_jax.errors import UserError


def main(argv):
    """The command: see the module's docstring."""
    parser = Parser(prog='python -m nanovision_jax.report', description=__doc__)
    parser.add_argument('run', nargs='+', help='a family, such as runs/tiny; a run folder; or run folders to compare')
    parser.add_argument('--price', type=float, metavar='DOLLARS', help='an hour of one device: the costs are told')
    parser.add_argument(
        '--words', metavar='PICTURE', help='tell which words the patches of this picture are like; opens the model'
    )
    parser.add_argument('--output', metavar='FOLDER', help='where a comparison goes')
    args = parser.parse(argv)
    if args.price is not None and not 0 <= args.price < float('inf'):
        raise UserError(f'--price takes dollars an hour and device, not {args.price}.')
    several = len(args.run) > 1
    if args.output and not several:
        raise UserError('--output is for comparisons: the report of a run or a family lies in its folder.')
    if args.words and several:
        raise UserError('--words is for the report of one run or family, not for comparisons.')
    words = ()
    if args.words:
        from nanovision_jax.reporting.words import chapter  # loads jax

        words = tuple(chapter(args.run[0], args.words))
    from nanovision_jax.reporting import comparison, family  # reads pictures and data sets

    if several:
        print(f'written: {comparison.write(args.run, args.output, args.price)}')
    else:
        print(f'written: {family.write(args.run[0], args.price, words)}')


if __name__ == '__main__':
    run(main)
