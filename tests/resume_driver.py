"""Trains stages one after the other, slowly enough to be disturbed: python resume_driver.py FAMILY STAGE …

The environment says what is otherwise: FAULT makes one thing take long (start, compiling, evaluation, sampling or
saving), the third batch's weights nan or inf, or reading a picture hang ("hang 7.jpg"); FIELDS is JSON of config
fields, as run_config() takes them; TRIES is how often a checkpoint is tried; RESUME goes on with another config;
DEVICES is how many there are.
"""

import json
import os
import pathlib
import sys
import time

import jax
import micro
import numpy as np
import pytest

from nanovision_jax import cli
from nanovision_jax.data import pipeline
from nanovision_jax.data.images import ImageStore
from nanovision_jax.runs import checkpoint
from nanovision_jax.training import fit, prefetch, watching
from nanovision_jax.training import loop as train

jax.config.update('jax_num_cpu_devices', int(os.environ.get('DEVICES', 8)))


def slowly(*args):
    for item in prefetched(*args):
        yield item
        time.sleep(0.1)


def long(owner, name):
    function = getattr(owner, name)

    def taken(*args, **kwargs):
        print('it takes long', flush=True)
        time.sleep(60 if name != '_finish' else 1)
        return function(*args, **kwargs)

    setattr(owner, name, taken)


def poisoned(weight):
    def spoiled(rows, *args, **options):
        for number, made in enumerate(batches(rows, *args, **options), 1):
            yield made | {'weights': made['weights'] * weight} if number == 3 and rows.shuffled.shuffle else made

    batches, pipeline.batches = pipeline.batches, spoiled


prefetched, prefetch.prefetch = prefetch.prefetch, slowly
faults = {
    'start': (train, 'open_data'),
    'compiling': (fit, 'settle'),
    'evaluation': (train, 'validate'),
    'sampling': (watching, 'watch'),
    'saving': (checkpoint.Checkpoints, '_finish'),
}
if os.environ.get('FAULT') != 'sampling':
    watching.watch = lambda *_: {}
if (fault := os.environ.get('FAULT')) in ('nan', 'inf'):
    poisoned(np.float32(fault))
elif fault and fault.startswith('hang '):
    read = ImageStore.read
    ImageStore.read = lambda self, name: (name == fault[5:] and time.sleep(600)) or read(self, name)
elif fault:
    long(*faults[fault])
checkpoint.TRIES = int(os.environ.get('TRIES', checkpoint.TRIES))
fields = dict(steps=9, checkpoint__every=3, optim__name='muon') | json.loads(os.environ.get('FIELDS', '{}'))
family, *stages = sys.argv[1:]
micro.quicken(pytest.MonkeyPatch())


def main(_):
    for stage in stages:
        train.train(micro.run_config(stage, pathlib.Path(family), **fields), resume='RESUME' in os.environ)


cli.run(main)
