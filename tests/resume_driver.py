"""Trains stages one after the other, slowly enough to be killed: python resume_driver.py FAMILY CACHE STAGE …

The environment's FAULT makes one thing longer: `evaluation` the validation of step 8, `start` what comes before it all.
"""

import os
import pathlib
import sys
import time

import jax
import micro
import pytest

from nanovision_jax import cli
from nanovision_jax.training import loop as train

jax.config.update('jax_num_cpu_devices', 8)


def slowly(*args):
    for item in prefetch(*args):
        yield item
        time.sleep(0.1)


def long(function):
    def taken(*args, **kwargs):
        print('it takes long', flush=True)
        time.sleep(60)
        return function(*args, **kwargs)

    return taken


prefetch, train.prefetch, train.show_samples = train.prefetch, slowly, lambda *_: None
if os.environ.get('FAULT') == 'evaluation':
    train.validate = long(train.validate)
if os.environ.get('FAULT') == 'start':
    train.open_data = long(train.open_data)
family, cache, *stages = sys.argv[1:]
micro.quicken(pytest.MonkeyPatch(), cache)


def main(_):
    for stage in stages:
        train.train(micro.run_config(stage, pathlib.Path(family), steps=9, checkpoint__every=3, optim__name='muon'))


cli.run(main)
