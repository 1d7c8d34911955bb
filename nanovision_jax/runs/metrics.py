"""metrics.jsonl: what was logged as a run went on, and TensorBoard's copy of it."""

import json
import sys

from nanovision_jax.runs.folder import Paths, read_lines, write_lines


class Metrics:
    """Appends to metrics.jsonl, and to TensorBoard if asked. After a resume, lines past `start` are dropped first.

    Lines that cannot be written, on a full disk say, are kept, said once, and written with the next that can be.
    writes: of several hosts one does; the others know what it has written.
    """

    def __init__(self, run_dir, to='', start=0, writes=True):
        self.file, self._writes = Paths(run_dir).metrics, writes
        kept = [line for line in read_metrics(self.file) if line['step'] <= start]
        if writes:
            write_lines(self.file, kept)  # a half-written last line is gone too: the next one would be glued to it
        self.last = next((line for line in reversed(kept) if 'tokens' in line), {'tokens': 0, 'seconds': 0.0})
        self.evaluated = {line['step'] for line in kept if 'eval_loss' in line}
        self._board, self._unwritten, self._size = None, [], self.file.stat().st_size
        if to == 'tensorboard' and writes:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(run_dir / 'tensorboard'))

    def write(self, **values):
        """Appends one object; numbers other than `step` go to TensorBoard too."""
        self.evaluated |= {values['step']} if 'eval_loss' in values else set()
        if not self._writes:
            return
        self._unwritten.append(json.dumps(values) + '\n')
        self.flush()
        if self._board:
            for name, value in values.items():
                if isinstance(value, (int, float)) and name != 'step':
                    self._board.add_scalar(name, value, values['step'])

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
