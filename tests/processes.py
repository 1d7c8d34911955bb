"""Processes that train, to be disturbed: what the tests of faults share."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time

from conftest import ROOT

from nanovision_jax.runs.metrics import read_metrics


@contextlib.contextmanager
def process(family, *stages, fault='', log=None, tries=None, resume=False, devices=8, **fields):
    """A process of resume_driver.py, in a group of its own. What it says is in `log`, or log_of() has it."""
    command = [sys.executable, f'{ROOT}/tests/resume_driver.py', str(family), *stages]
    env = os.environ | {'PYTHONPATH': str(ROOT), 'FAULT': fault, 'FIELDS': json.dumps(fields), 'DEVICES': str(devices)}
    env |= ({'TRIES': str(tries)} if tries else {}) | ({'RESUME': '1'} if resume else {})
    with open(log or family / 'log', 'w') as log:
        started = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        try:
            yield started
        finally:
            if started.poll() is None:
                started.kill()
            started.wait()


def log_of(family):
    return (family / 'log').read_text()


def until(true, seconds=60):
    """Waits until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def logged(run, step):
    return any(line['step'] >= step for line in read_metrics(run / 'metrics.jsonl'))


def children(process):
    """The ids of the processes that a process has started, where a system has /proc."""
    return [
        int(pid)
        for file in pathlib.Path(f'/proc/{process.pid}/task').glob('*/children')
        for pid in file.read_text().split()
    ]
