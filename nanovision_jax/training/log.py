"""The log of a training run: lines on the terminal and in metrics.jsonl."""

import collections
import contextlib
import datetime
import json
import math
import pathlib
import sys
from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from nanovision_jax.config import Config, fields, get
from nanovision_jax.errors import UserError
from nanovision_jax.parallel import energy, hardware, hosts
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.runs import trackers
from nanovision_jax.runs.metrics import Metrics
from nanovision_jax.training import meter, optim

RECENT, LEAP = 100, 8  # a loss leaps that is twice the mean of so many, and beyond it by so many of their deviations
WAITING = 0.1  # a share of the time in which the next batch is not there, from which on a line says so


class Log:
    """A context that logs a run from step `start` to `steps`.

    A step's line is put by, and written once the next step is on its way: the device never waits for a log line.
    drawn: a function that tells the numbers of a step's examples, for those whose loss is odd.
    """

    def __init__(self, config, vocab_size: int, start: int, steps: int, drawn: Callable):
        self.config, self.vocab_size, self.steps, self.drawn = config, vocab_size, steps, drawn
        with hosts.first_before_others():
            folder, writes = pathlib.Path(config.run_dir), hosts.is_first()
            told = {name: get(config, name) for name in fields(Config)}
            self.metrics = Metrics(
                folder, start, writes, trackers.opened(config.log.to, folder, told) if writes else ()
            )
        self.peak, source = hardware.peak_flops()
        print(f'MFU is of {self.peak:.3g} FLOP/s ({source}); full-attention convention, padding not counted')
        self.rate = optim.schedule(config.optim, steps)
        quiet = not hosts.is_first()
        self.bar = tqdm(total=steps, initial=start, desc=config.stage, unit='step', mininterval=0.5, disable=quiet)
        self.tokens = self.metrics.last['tokens']  # of the whole run
        self.window, self._taken, self._waiting = collections.Counter(), [], None  # window: work since the last line
        self.skipped, self._in_a_row = self.metrics.last.get('skipped', 0), 0
        self._losses = collections.deque(maxlen=RECENT)
        self.clock = meter.Clock(self.metrics.last['seconds'])
        self.energy = energy.Meter(self.metrics.last.get('energy', 0.0))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        self.metrics.close()

    def say(self, text: str):
        """Prints a line above the progress bar."""
        self.bar.write(text, file=sys.stdout)

    def count(self, step: int, metrics: dict, work: dict):
        """Counts a step, its metrics, which may still be on their way, and its work, {tokens, learned, images}."""
        self._taken.append((step, metrics))
        self.window.update(work | {'steps': 1})
        self.tokens += work['tokens']
        self.bar.update()

    def waited(self, seconds: float):
        """Counts seconds in which the next batch was not there yet."""
        self.window['waited'] += seconds

    def put_by(self):
        """Remembers that the last step has a line, for flush(), unless it has it already."""
        if self._taken:
            self._waiting = self._taken, self.window, self.tokens
            self._taken, self.window = [], collections.Counter()

    def flush(self):
        """Writes the line that was put by, if there is one. Raises UserError where training has diverged."""
        if self._waiting is None:
            return
        (taken, window, tokens), self._waiting = self._waiting, None
        step, every = taken[-1][0], jax.device_get([metrics for _, metrics in taken])
        seconds, elapsed = self.clock.lap()  # only now: the step was still running when it was dispatched
        for (number, _), values in zip(taken, every, strict=True):
            self._look_at(number, float(values['loss']), float(values['grad_norm']), bool(values['sound']))
        # Of a skipped step there is nothing to tell; the line of a window without any other has no loss.
        sound = [values for values in every if values['sound']]
        values = {name: float(x) for name, x in sound[-1].items() if name != 'sound'} if sound else {}
        rate = float(self.rate(step - 1 - self.skipped))  # a skipped step is none of the schedule's
        speed = window['tokens'] / seconds
        flops = meter.step_flops(
            self.config, self.vocab_size, *(window[name] for name in ('tokens', 'images', 'learned'))
        )
        measured = {'tokens': tokens, 'tokens_per_second': speed, 'mfu': flops / seconds / self.peak}
        measured['waited'] = min(1.0, window['waited'] / seconds)
        measured |= {'learned': window['learned'] / window['tokens']} if 'learned' in window else {}
        measured |= {'skipped': self.skipped} if self.skipped else {}
        measured |= {'memory': memory} if (memory := hardware.peak_memory()) else {}  # of one device, in bytes
        measured |= {} if (joules := self.energy.joules()) is None else {'energy': joules}  # of one device, of the run
        self.metrics.write(step=step, **values, learning_rate=rate, **measured, seconds=elapsed)
        left = datetime.timedelta(seconds=round((self.steps - step) * seconds / window['steps']))
        loss, norm = (values.get(name, math.nan) for name in ('loss', 'grad_norm'))
        self.bar.set_postfix_str(f'loss {loss:.3f}', refresh=False)
        self.say(
            f'step {step}/{self.steps}  loss {loss:.4f}  lr {rate:.2e}  grad {norm:.2f}  '
            f'{speed:,.0f} tokens/s  MFU {measured["mfu"]:.1%}  {left} left'
            + (f'  {measured["waited"]:.0%} of the time waiting for data' if measured['waited'] > WAITING else '')
        )

    def _look_at(self, step, loss, norm, sound):
        """Lists a step that was skipped, or whose loss leaps. Raises UserError where too many in a row were skipped."""
        self._in_a_row = 0 if sound else self._in_a_row + 1
        if sound:
            recent = np.array(self._losses)
            self._losses.append(loss)
            if len(recent) < RECENT or loss < 2 * recent.mean() or loss < recent.mean() + LEAP * recent.std():
                return
        else:
            self.skipped += 1
        paths, why = runfolder.Paths(self.config.run_dir), 'leaps' if sound else 'is not finite, so the step is skipped'
        record = {'step': step, 'skipped': not sound, 'loss': str(loss), 'grad_norm': str(norm)}
        self.say(f'step {step}: the loss {why} ({loss:.4g}, gradient norm {norm:.4g}); its examples: {paths.bad_steps}')
        if hosts.is_first():
            with contextlib.suppress(OSError), open(paths.bad_steps, 'a') as file:
                file.write(json.dumps(record | {'examples': self.drawn(step)}) + '\n')
        if self._in_a_row >= self.config.optim.max_skipped:
            saved = next(iter(runfolder.whole_steps(self.config.run_dir)), 0)
            raise UserError(
                f'the loss is {loss} and the gradient norm {norm} at step {step}: training has diverged, '
                f'{self._in_a_row} steps in a row were skipped (optim.max_skipped). The last checkpoint is step '
                f'{saved}; try a lower optim.learning_rate.'
            )
