"""Where else than in metrics.jsonl a run's numbers go: --config.log.to=tensorboard,wandb,trackio.

Each is a package that is imported when it is asked for, and is told the run's name, its config, and numbers by step.
None but W&B sends anything anywhere, and W&B is kept from it by WANDB_MODE=offline; Trackio's database is of this
machine, unless TRACKIO_SPACE_ID names a Space.
"""

import importlib
import pathlib
import sys

from nanovision_jax.errors import UserError

PACKAGES = {'tensorboard': 'tensorboardX', 'wandb': 'wandb', 'trackio': 'trackio'}
NAMES = (*PACKAGES, 'jsonl')  # which is always written: a run that goes on reads it


def names(to: str) -> list[str]:
    """The trackers that log.to names. Raises UserError for one that is none, or whose package is not there."""
    found = [name.strip() for name in to.split(',') if name.strip()]
    for name in found:
        if name not in NAMES:
            raise UserError(f'log.to knows {", ".join(NAMES)}, with commas between, and not {name!r}.')
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(f"log.to={name} needs a package more: pip install 'nanovision_jax[{name}]'.")
    return [name for name in dict.fromkeys(found) if name in PACKAGES]


def opened(to: str, run_dir: pathlib.Path, config: dict) -> list:
    """A tracker for each name in log.to. config: the run's, as {dotted name: value}."""
    return [TRACKERS[name](pathlib.Path(run_dir), config) for name in names(to)]


class TensorBoard:
    """Event files in RUN/tensorboard, by tensorboardX."""

    def __init__(self, run_dir, config):
        import tensorboardX

        self.writer = tensorboardX.SummaryWriter(str(run_dir / 'tensorboard'))
        self.writer.add_text('config', '\n'.join(f'    {name} = {value!r}' for name, value in config.items()))

    def write(self, step: int, numbers: dict):
        """The numbers of a step."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self):
        """Writes what is left."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases: the family is its project, and a run that goes on is the same one there."""

    def __init__(self, run_dir, config):
        import wandb

        place = run_dir.resolve()
        identity = f'{place.parent.name}-{place.name}'
        self.run = wandb.init(
            project=place.parent.name, name=place.name, id=identity, resume='allow', dir=str(run_dir), config=config
        )

    def write(self, step, numbers):
        """The numbers of a step."""
        self.run.log(numbers, step=step)

    def close(self):
        """Waits until all is sent, or written where it is offline."""
        import wandb

        self.run.finish()
        try:
            wandb.teardown()  # finish() returns before W&B's own process has written its file
        except SystemExit as ended:  # that one failed, and this one did not
            print(
                f'warning: W&B ended with code {ended.code}: what it has of this run may not be whole', file=sys.stderr
            )


class Trackio:
    """A run of Trackio, in its database on this machine."""

    def __init__(self, run_dir, config):
        import trackio

        place = run_dir.resolve()
        self.run = trackio.init(project=place.parent.name, name=place.name, resume='allow', config=config, embed=False)

    def write(self, step, numbers):
        """The numbers of a step."""
        self.run.log(numbers, step=step)

    def close(self):
        """Writes what is left."""
        self.run.finish()


TRACKERS = {'tensorboard': TensorBoard, 'wandb': Wandb, 'trackio': Trackio}
