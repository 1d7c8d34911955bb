"""metrics.jsonl: what was logged as a run went on, and TensorBoard's copy of it."""

import json

from nanovision_jax.runs.folder import Paths, read_lines, write_lines


class Metrics:
    """Appends to metrics.jsonl, and to TensorBoard if asked. After a resume, lines past `start` are dropped first."""

    def __init__(self, run_dir, to='', start=0):
        self.file = Paths(run_dir).metrics
        kept = [line for line in read_metrics(self.file) if line['step'] <= start]
        write_lines(self.file, kept)  # a half-written last line is gone too: the next one would be glued to it
        self.last = next((line for line in reversed(kept) if 'loss' in line), {'tokens': 0, 'seconds': 0.0})
        self._board = None
        if to == 'tensorboard':
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(run_dir / 'tensorboard'))

    def write(self, **values):
        """Appends one object; numbers other than `step` go to TensorBoard too."""
        with open(self.file, 'a') as file:
            file.write(json.dumps(values) + '\n')
        if self._board:
            for name, value in values.items():
                if isinstance(value, (int, float)) and name != 'step':
                    self._board.add_scalar(name, value, values['step'])


def read_metrics(file):
    """The objects of a metrics.jsonl; a last line cut off by a crash is left out."""
    return list(read_lines(file))
