"""One page about a family of runs: what was trained, how well it answers, and where it came from.

    python -m nanovision_jax.report runs/tiny

Writes report.html, which needs no other file and no network, and its text twin report.md into the folder. What a family
does not have is left out. A chat.jsonl in the folder ({image, question, answer} a line) is shown too.
"""

from nanovision_jax.cli import Parser, run


def main(argv):
    """The command: see the module's docstring."""
    parser = Parser(prog='python -m nanovision_jax.report', description=__doc__)
    parser.add_argument('family', help='the folder that holds the run folders, such as runs/tiny')
    family = parser.parse(argv).family
    from nanovision_jax.reporting import blocks  # reads pictures and data sets

    print(f'written: {blocks.write(family)}')


if __name__ == '__main__':
    run(main)
