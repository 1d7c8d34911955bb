"""Trains 3,000 steps, and writes every 250 what the process holds to FAMILY/seen: python long_driver.py FAMILY"""

import ctypes
import json
import os
import pathlib
import sys
import threading

import jax
import micro
import pytest

from nanovision_jax import cli
from nanovision_jax.training import loop as train

jax.config.update('jax_num_cpu_devices', 1)  # of more, XLA's threads may wait for each other for ever
family = pathlib.Path(sys.argv[1])
micro.quicken(pytest.MonkeyPatch())
validate = train.validate


def look(config, step, *args):
    found = validate(config, step, *args)
    ctypes.CDLL(None).malloc_trim(0)  # of glibc: what is resident is what is held, without 100 MB that are free again
    with open('/proc/self/statm') as file:
        resident = int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    held = {'resident': resident, 'threads': threading.active_count(), 'files': len(os.listdir('/proc/self/fd'))}
    with open(family / 'seen', 'a') as file:
        file.write(json.dumps({'step': step} | held) + '\n')
    return found


train.validate = look


def main(_):
    fields = dict(steps=3000, checkpoint__every=100, eval__every=250, log__every=50)
    train.train(micro.run_config('vision_instruct', family, **fields))


cli.run(main)
