"""Several hosts on loopback are as one: the same rows, each read once, the same losses, one writer."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys

import micro
import numpy as np
import pytest
from conftest import ROOT

from nanovision_jax.errors import UserError
from nanovision_jax.parallel import hosts
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.runs.metrics import read_metrics

RUN = dict(steps=6, checkpoint__every=3, optim__name='muon')


def free_port():
    """Of two free ports one after the other, the first."""
    while True:
        with socket.socket() as first, contextlib.suppress(OSError), socket.socket() as second:
            first.bind(('127.0.0.1', 0))
            second.bind(('127.0.0.1', first.getsockname()[1] + 1))
            return first.getsockname()[1]


@contextlib.contextmanager
def started(family, cache, *stages, count=2, slow=False, **fields):
    """`count` hosts that train stages, each a process; what they say is in FAMILY/log-INDEX."""
    port, found = free_port(), []
    env = os.environ | {'PYTHONPATH': str(ROOT), 'FIELDS': json.dumps(RUN | fields), 'COUNT': str(count)}
    env |= {'SLOW': '1'} if slow else {}
    with contextlib.ExitStack() as logs:
        for index in range(count):
            command = [sys.executable, f'{ROOT}/tests/hosts_driver.py', family, cache, index, port, *stages]
            log = logs.enter_context(open(family / f'log-{index}', 'a'))
            found.append(subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=env))
        try:
            yield found
        finally:
            for process in found:
                process.kill()
                process.wait()


def logs(family):
    return '\n'.join(file.read_text()[-4000:] for file in sorted(family.glob('log-*')))


def train(family, cache, *stages, **options):
    """Trains stages on several hosts to their end."""
    with started(family, cache, *stages, **options) as found:
        assert [process.wait(180) for process in found] == [0] * len(found), logs(family)


def rows(family, stage):
    """Which rows each host read for training."""
    return [list(map(int, file.read_text().split())) for file in sorted(family.glob(f'rows-{stage}-*'))]


def told(run, *names):
    return [[line[name] for name in names if name in line] for line in read_metrics(run / 'metrics.jsonl')]


@pytest.fixture(scope='module')
def families(family, cache, tmp_path_factory):
    """(trained by two hosts of four devices, by one of eight): sft, as the others' fixture made what is before it."""
    made = [shutil.copytree(family, tmp_path_factory.mktemp('hosts') / 'x', symlinks=True) for _ in range(2)]
    for folder, count in zip(made, (2, 1), strict=True):
        train(folder, cache, 'sft', count=count)
    return made


def test_each_row_is_read_once_and_by_one_host(families):
    both, one = (rows(folder, 'sft') for folder in families)
    assert len(both) == 2 and not set(both[0]) & set(both[1]) and len(set(both[0])) == len(both[0])
    assert set(range(48)) <= set(both[0] + both[1]) and set(range(48)) <= set(one[0])
    assert {row % 8 for row in both[0]} == {0, 1, 2, 3} and {row % 8 for row in both[1]} == {4, 5, 6, 7}


def test_two_hosts_learn_what_one_learns(families):
    both, one = (folder / 'sft' for folder in families)
    assert told(both, 'step', 'tokens') == told(one, 'step', 'tokens')
    losses = [np.concatenate(told(run, 'loss', 'eval_loss', 'grad_norm')) for run in (both, one)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    params = [micro.read(run)['params'] for run in (both, one)]
    for found, wanted in zip(*map(micro.jax.tree.leaves, params), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    records = [runfolder.read_lineage(run) for run in (both, one)]
    assert records[0]['finished'] == 6 and records[0]['rows'] == records[1]['rows']
    assert runfolder.newest(both) == 6 and 'Traceback' not in logs(both.parent)


def test_find_takes_flags_then_the_environment():
    slurm = {'SLURM_STEP_NUM_TASKS': '4', 'SLURM_PROCID': '3', 'SLURM_STEP_NODELIST': 'gpu[007-009,012],x'}
    slurm |= {'SLURM_JOB_ID': '5001', 'SLURM_STEP_TASKS_PER_NODE': '1(x4)', 'SLURM_LOCALID': '0'}
    assert hosts.find(environment={}) is None and hosts.find(environment=slurm | {'SLURM_STEP_NUM_TASKS': '1'}) is None
    assert hosts.find(environment=slurm) == ('gpu007:62441', 4, 3, None)
    shared = slurm | {'SLURM_STEP_TASKS_PER_NODE': '8(x4)', 'SLURM_LOCALID': '5'}
    assert hosts.find(environment=shared).local == [5]
    assert hosts.find('a:1', 2, 1, environment={}) == ('a:1', 2, 1, None)
    told = {'JAX_COORDINATOR_ADDRESS': 'b:2', 'JAX_NUM_PROCESSES': '3', 'JAX_PROCESS_ID': '0'}
    assert hosts.find(environment=told) == ('b:2', 3, 0, None)
    mpi = {
        'OMPI_COMM_WORLD_SIZE': '2',
        'OMPI_COMM_WORLD_RANK': '1',
        'OMPI_MCA_orte_hnp_uri': '7.0;tcp://10.0.0.1,10.1.0.1:3',
    }
    assert hosts.find(environment=mpi)[:3] == ('10.0.0.1:61440', 2, 1)
    for wrong in (('a', 2, 1), ('a:1', 0, 0), ('a:1', 2, 2), ('a:1', 2, -1)):
        with pytest.raises(UserError, match='several processes need --coordinator'):
            hosts.find(*wrong, environment={})
