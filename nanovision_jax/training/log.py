"""The log of a training run: lines on the terminal and in metrics.jsonl."""

import collections
import datetime
import math
import pathlib
import sys

import jax
from tqdm import tqdm

from nanovision_jax.errors import UserError
from nanovision_jax.parallel import hardware
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.runs.metrics import Metrics
from nanovision_jax.training import meter, optim

WAITING = 0.1  # a share of the time in which the next batch is not there, from which on a line says so


class Log:
    """A context that logs a run from step `start` to `steps`.

    A step's line is put by, and written once the next step is on its way: the device never waits for a log line.
    """

    def __init__(self, config, vocab_size: int, start: int, steps: int):
        self.config, self.vocab_size, self.steps = config, vocab_size, steps
        self.metrics = Metrics(pathlib.Path(config.run_dir), config.log.to, start)
        self.peak, source = hardware.peak_flops()
        print(f'MFU is of {self.peak:.3g} FLOP/s ({source}); full-attention convention, padding not counted')
        self.rate = optim.schedule(config.optim, steps)
        self.bar = tqdm(total=steps, initial=start, desc=config.stage, unit='step', mininterval=0.5)
        self.tokens = self.metrics.last['tokens']  # of the whole run
        self.window, self._waiting = collections.Counter(), None  # window: work since the last line
        self.clock = meter.Clock(self.metrics.last['seconds'])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def say(self, text: str):
        """Prints a line above the progress bar."""
        self.bar.write(text, file=sys.stdout)

    def count(self, work: dict):
        """Counts a step and its work, {tokens, learned, images}."""
        self.window.update(work | {'steps': 1})
        self.tokens += work['tokens']
        self.bar.update()

    def waited(self, seconds: float):
        """Counts seconds in which the next batch was not there yet."""
        self.window['waited'] += seconds

    def put_by(self, step: int, metrics: dict):
        """Remembers a step's metrics, which may still be on their way from the device, for flush()."""
        self._waiting = step, metrics, self.window, self.tokens
        self.window = collections.Counter()

    def flush(self):
        """Writes the line that was put by, if there is one. Raises UserError where training has diverged."""
        if self._waiting is None:
            return
        (step, metrics, window, tokens), self._waiting = self._waiting, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        seconds, elapsed = self.clock.lap()  # only now: the step was still running when it was dispatched
        self._check_finite(step, values)
        speed, rate = window['tokens'] / seconds, float(self.rate(step - 1))
        flops = meter.step_flops(
            self.config, self.vocab_size, *(window[name] for name in ('tokens', 'images', 'learned'))
        )
        measured = {'tokens': tokens, 'tokens_per_second': speed, 'mfu': flops / seconds / self.peak}
        measured['waited'] = min(1.0, window['waited'] / seconds)
        self.metrics.write(step=step, **values, learning_rate=rate, **measured, seconds=elapsed)
        left = datetime.timedelta(seconds=round((self.steps - step) * seconds / window['steps']))
        self.bar.set_postfix_str(f'loss {values["loss"]:.3f}', refresh=False)
        self.say(
            f'step {step}/{self.steps}  loss {values["loss"]:.4f}  lr {rate:.2e}  grad {values["grad_norm"]:.2f}  '
            f'{speed:,.0f} tokens/s  MFU {measured["mfu"]:.1%}  {left} left'
            + (f'  {measured["waited"]:.0%} of the time waiting for data' if measured['waited'] > WAITING else '')
        )

    def _check_finite(self, step, values):
        if not math.isfinite(values['loss']) or not math.isfinite(values['grad_norm']):
            saved = next(iter(runfolder.whole_steps(self.config.run_dir)), 0)
            raise UserError(
                f'the loss is {values["loss"]} and the gradient norm {values["grad_norm"]} at step {step}: training '
                f'has diverged. The last checkpoint is step {saved}; try a lower optim.learning_rate.'
            )
