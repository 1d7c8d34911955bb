"""metrics.jsonl: what was logged as a run went on; trackers.py has where else it goes."""

import json
import sys

from nanovision_jax.runs.folder import Paths, read_lines, write_lines


class Metrics:
    """Appends to metrics.jsonl, and tells trackers. After a resume, lines past `start` are dropped first.

    Lines that cannot be written, on a full disk say, are kept, said once, and written with the next that can be.
    writes: of several hosts one does; the others know what it has written.
    """

    def __init__(self, run_dir, start=0, writes=True, trackers=()):
        self.file, self._writes = Paths(run_dir).metrics, writes
        kept = [line for line in read_metrics(self.file) if line['step'] <= start]
        if writes:
            write_lines(self.file, kept)  # a half-written last line is gone too: the next one would be glued to it
        self.last = next((line for line in reversed(kept) if 'tokens' in line), {'tokens': 0, 'seconds': 0.0})
        self.evaluated = {line['step'] for line in kept if 'eval_loss' in line}
        self._trackers, self._unwritten, self._size = trackers, [], self.file.stat().st_size

    def write(self, **values):
        """Appends one object; its numbers go to trackers too, by its step."""
        self.evaluated |= {values['step']} if 'eval_loss' in values else set()
        if not self._writes:
            return
        self._unwritten.append(json.dumps(values) + '\n')
        self.flush()
        numbers = {name: x for name, x in values.items() if isinstance(x, int | float) and name != 'step'}
        for tracker in self._trackers:
            tracker.write(values['step'], numbers)

    def close(self):
        """Writes what could not be written yet, and ends what trackers hold open."""
        self.flush()
        for tracker in self._trackers:
            tracker.close()

    def flush(self):
        """Writes the lines that could not be written yet, if there are any and it can."""
        if not self._unwritten:
            return
        try:
            data = ''.join(self._unwritten).encode()
            with open(self.file, 'r+b') as file:  # which makes no folder anew that was removed
                file.truncate(self._size)  # without what was begun of a line and could not be ended
                file.seek(self._size)
                file.write(data)
            self._size, self._unwritten = self._size + len(data), []
        except OSError as error:
            if len(self._unwritten) == 1:
                why = f'{self.file} cannot be written ({error.strerror})'
                print(f'{why}; its lines are kept until it can', file=sys.stderr)


def read_metrics(file):
    """The objects of a metrics.jsonl, which all have a step; a line cut off by a crash is left out."""
    return [line for line in read_lines(file) if isinstance(line.get('step'), int)]
