"""One host of several: python hosts_driver.py FAMILY INDEX PORT STAGE

The environment says the rest: COUNT is how many hosts there are, of 8 / COUNT devices each; FIELDS is JSON of config
fields, as run_config() takes them; SLOW makes steps take a tenth of a second; MISTAKE is a host that makes one at its
third batch. Which rows were read for training is written to FAMILY/rows-STAGE-INDEX.
"""

import json
import os
import pathlib
import sys
import time

import jax
import micro
import pytest

from nanovision_jax import cli
from nanovision_jax.data import pipeline
from nanovision_jax.errors import UserError
from nanovision_jax.parallel import hosts
from nanovision_jax.training import loop as train
from nanovision_jax.training import prefetch
from nanovision_jax.training.stopping import StopOnSignal

family, index, port, stage = sys.argv[1:]
count, fields = int(os.environ.get('COUNT', 2)), json.loads(os.environ.get('FIELDS', '{}'))
jax.config.update('jax_num_cpu_devices', 8 // count)
micro.quicken(pytest.MonkeyPatch())
read_batch, prefetched = pipeline._read_batch, prefetch.prefetch


def noted(rows, own, start):
    if hasattr(rows, 'shuffled') and rows.shuffled.shuffle:  # not the pictures whose features are kept
        with open(f'{family}/rows-{rows.config.stage}-{index}', 'a') as file:
            file.write(''.join(f'{start + i}\n' for i in own))
    return read_batch(rows, own, start)


def slowly(*args):
    for number, item in enumerate(prefetched(*args)):
        if number == 3 and os.environ.get('MISTAKE') == index:
            raise UserError('its own disk is wrong.')
        yield item
        time.sleep(0.1)


pipeline._read_batch = noted
if 'SLOW' in os.environ:
    prefetch.prefetch = slowly


def main(_):
    cluster = hosts.find(f'127.0.0.1:{port}', count, int(index)) if count > 1 else None
    cfg = micro.run_config(stage, pathlib.Path(family), **fields)
    with StopOnSignal() as stop:
        train.train(cfg, resume=True, stop=stop, cluster=cluster)


cli.run(main)
