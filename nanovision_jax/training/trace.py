"""A trace of a few steps, which ui.perfetto.dev and XProf open."""

import pathlib

import jax

WARM = 3  # steps before the trace begins: what is read or compiled once is through by then


class Trace:
    """A context that traces `steps` steps of a run into its folder profile/; 0 traces none."""

    def __init__(self, run_dir, steps: int):
        self.folder, self.steps, self.running = pathlib.Path(run_dir) / 'profile', steps, False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()  # the run was over before

    def before_step(self, done: int, state: dict):
        """Called before every step, of which `done` were taken."""
        if self.steps and done == WARM:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.running = True
        elif self.running and done == WARM + self.steps:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self):
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
            print(f'a trace is in {self.folder}: open perfetto_trace.json.gz in ui.perfetto.dev')
