"""Trains stages one after the other, slowly enough to be killed: python resume_driver.py FAMILY CACHE STAGE …"""

import pathlib
import sys
import time

import jax
import micro
import pytest

from nanovision_jax.training import loop as train

jax.config.update('jax_num_cpu_devices', 8)


def slowly(batches, mesh):
    for item in prefetch(batches, mesh):
        yield item
        time.sleep(0.1)


prefetch, train.prefetch, train.show_samples = train.prefetch, slowly, lambda *_: None
family, cache, *stages = sys.argv[1:]
micro.quicken(pytest.MonkeyPatch(), cache)
for stage in stages:
    train.train(micro.run_config(stage, pathlib.Path(family), steps=9, checkpoint__every=3, optim__name='muon'))
