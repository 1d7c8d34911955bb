"""Trains one stage of the road.

    python -m nanovision_jax.train --config=configs/pretrain.py:tiny [--config.optim.learning_rate=1e-3 …]

Stages: clip, pretrain, sft, vision_pretrain, vision_instruct; each starts from the run of the one before, which it
finds beside its own run folder. A run that is already there goes on where it stopped, if its config is the same; else
say
  --resume     go on with the new config from the newest checkpoint
  --anew       start again; the old run is kept under another name
  --profile=N  write a trace of N steps to RUN/profile, which ui.perfetto.dev and XProf open
  --verify=N   take N steps from a checkpoint twice, say whether they are bit-equal, and save none
At its end a run's report is in its folder: report.html.

On several hosts the same command is run on each, with one file system. Slurm's and Open MPI's environment is
understood, and JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; else say
  --coordinator=HOST:PORT  of the first; the port behind it must be free too. auto: as jax finds it, on TPU pods
  --processes=N --process=I  how many there are, and which this is, from 0 on
"""

import sys
import time

from nanovision_jax import cli
from nanovision_jax.parallel import huge_pages
from nanovision_jax.training.stopping import StopOnSignal

BEGAN = time.perf_counter()


def main(argv):
    """The command: see the module's docstring."""
    sys.stdout.reconfigure(line_buffering=True)  # a log that is followed as it grows
    options = dict(resume=False, anew=False, profile=0, verify=0, coordinator='', processes=0, process=-1)
    config, flags = cli.parse(argv, __doc__, **options)
    where = [flags.pop(name) for name in ('coordinator', 'processes', 'process')]
    with StopOnSignal() as stop:
        if steps := flags.pop('verify'):
            from nanovision_jax.training.verify import verify

            return verify(config, steps)
        from nanovision_jax.parallel import hosts  # jax loads once the command line is read
        from nanovision_jax.training.loop import train

        folder = train(config, **flags, began=BEGAN, stop=stop, cluster=hosts.find(*where))
        if hosts.is_first():
            from nanovision_jax.reporting.family import write_after

            write_after(folder)


if __name__ == '__main__':
    huge_pages.use()
    cli.run(main)
