"""skipped.jsonl: examples that could not be read any more as a run went on, and the rows that go without them."""

import json
import sys

from nanovision_jax.errors import UserError
from nanovision_jax.parallel import hosts
from nanovision_jax.runs.folder import Paths, read_lines, write_lines

MOST = 0.01  # of the examples
LISTED = 10  # are said; all are in the file


class Skips:
    """The file, of a run with `examples` examples. known: {(row, example)}, which a run that goes on leaves out again.

    So rows are the same on another machine, or once a picture is back. anew: what is known is of an attempt without a
    checkpoint, whose rows may have been others.
    """

    def __init__(self, run_dir, examples: int, anew: bool = False):
        self.file, self.examples = Paths(run_dir).skipped, examples
        if anew and hosts.is_first():
            self.file.unlink(missing_ok=True)
        lines = [] if anew else _lines(self.file)
        if lines and hosts.is_first():
            write_lines(self.file, lines)  # without the half of a line that a crash left
        self.known = {(line['row'], line['example']) for line in lines}

    def add(self, found: list[list]):
        """Adds [row, example, reason] of each. Raises UserError where it is more than MOST of the examples by now."""
        new = [entry for entry in found if tuple(entry[:2]) not in self.known]
        if not new:
            return
        if hosts.is_first():
            with open(self.file, 'a', encoding='utf-8') as file:
                for row, example, reason in new:
                    file.write(json.dumps({'row': row, 'example': example, 'reason': reason}) + '\n')
            for row, example, reason in new[: max(0, LISTED - len(self.known))]:
                print(f'row {row} goes without example {example}: {reason} ({self.file})', file=sys.stderr)
        self.known |= {(row, example) for row, example, _ in new}
        lost = len({example for _, example in self.known})
        if lost > MOST * self.examples:
            raise UserError(
                f'{lost} of {self.examples} examples cannot be read any more (at most {MOST:.0%} may be), the last: '
                f'{new[-1][2]}. {self.file} lists them; bring them back, and the same command goes on.'
            )


def lost_examples(run_dir) -> frozenset:
    """The examples of a run's skipped.jsonl."""
    return frozenset(line['example'] for line in _lines(Paths(run_dir).skipped))


def _lines(file):
    """What the file holds, but for what is damaged."""
    return [line for line in read_lines(file) if line.keys() >= {'row', 'example'}]
