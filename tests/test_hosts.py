"""Several hosts on loopback are as one: the same rows, each read once, the same losses, one writer."""

import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import jax
import micro
import numpy as np
import pytest
from conftest import ROOT
from processes import logged, until

from nanovision_jax.errors import UserError
from nanovision_jax.parallel import hosts
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.runs.metrics import read_metrics
from nanovision_jax.stages import STAGES

RUN = dict(steps=6, checkpoint__every=3, optim__name='muon')


def free_port():
    """Of two free ports one after the other, the first."""
    while True:
        with socket.socket() as first, contextlib.suppress(OSError), socket.socket() as second:
            first.bind(('127.0.0.1', 0))
            second.bind(('127.0.0.1', first.getsockname()[1] + 1))
            return first.getsockname()[1]


@contextlib.contextmanager
def started(family, stage, count=2, slow=False, mistake=None, **fields):
    """`count` hosts that train a stage, each a process; what they say is in FAMILY/log-INDEX."""
    port, found = free_port(), []
    env = os.environ | {'PYTHONPATH': str(ROOT), 'FIELDS': json.dumps(RUN | fields), 'COUNT': str(count)}
    env |= ({'SLOW': '1'} if slow else {}) | ({} if mistake is None else {'MISTAKE': str(mistake)})
    with contextlib.ExitStack() as logs:
        for index in range(count):
            command = [sys.executable, f'{ROOT}/tests/hosts_driver.py', family, index, port, stage]
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


def train(family, stage, **options):
    """Trains a stage on several hosts to their end."""
    with started(family, stage, **options) as found:
        assert [process.wait(180) for process in found] == [0] * len(found), logs(family)


def rows(family, stage):
    """Which rows each host read for training."""
    return [list(map(int, file.read_text().split())) for file in sorted(family.glob(f'rows-{stage}-*'))]


def told(run, *names):
    return [[line[name] for name in names if name in line] for line in read_metrics(run / 'metrics.jsonl')]


@pytest.fixture(scope='module')
def families(family, tmp_path_factory):
    """(trained by two hosts of four devices, by one of eight): sft, as the others' fixture made what is before it."""
    made = [shutil.copytree(family, tmp_path_factory.mktemp('hosts') / 'x', symlinks=True) for _ in range(2)]
    for folder, count in zip(made, (2, 1), strict=True):
        train(folder, 'sft', count=count)
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


@pytest.mark.slow
@pytest.mark.parametrize('flavour', ['gpt', 'llama'])
@pytest.mark.parametrize(
    'mesh', [{}, {'mesh__data': 1, 'mesh__fsdp': 8}, {'mesh__data': 2, 'mesh__fsdp': 2, 'mesh__tensor': 2}], ids=str
)
def test_every_stage_learns_on_two_hosts_what_it_learns_on_one(mesh, flavour, tiny_family, tmp_path):
    """With GPT's blocks the losses alone: their ReLU has a corner, at which a gradient jumps.

    Hosts sum in another order than one process, so parameters differ by 1e-7. On one machine, in one step of 90, one
    activation of 65,536 was 8e-8 here and -4e-7 there, and the norm differed by 2e-4; one process gives both norms,
    bit by bit, for the two sets of parameters.
    """
    mesh, compared = mesh | {'model__flavour': flavour}, ('loss', 'eval_loss', 'grad_norm')[: 2 + (flavour == 'llama')]
    both, one = (micro.family(tmp_path / name, tiny_family) for name in ('both', 'one'))
    for folder, count in ((both, 2), (one, 1)):
        for stage in micro.STAGES:
            train(folder, stage, count=count, **mesh)
    for stage in micro.STAGES:
        read, alone = rows(both, stage), rows(one, stage)[0]
        assert sorted(set(read[0] + read[1]) & set(range(48))) == sorted(set(alone) & set(range(48))) == list(range(48))
        assert not set(read[0]) & set(read[1])
        assert told(both / stage, 'step', 'tokens') == told(one / stage, 'step', 'tokens'), stage
        losses = [np.concatenate(told(folder / stage, *compared)) for folder in (both, one)]
        np.testing.assert_allclose(*losses, rtol=1e-5, err_msg=stage)
        records = [runfolder.read_lineage(folder / stage) for folder in (both, one)]
        assert records[0]['frozen_before'] == records[0]['frozen_after'] and records[0]['finished'] == 6


@pytest.mark.slow
def test_two_hosts_have_the_gradients_of_one(tiny_family, tmp_path):
    """After a step of plain descent at an enormous rate the parameters that learn are their gradients, but for 1e-6."""
    still = dict(steps=1, optim__name='sgd', optim__learning_rate=1e6, optim__warmup=0.0, optim__weight_decay=0.0)
    both, one = (micro.family(tmp_path / name, tiny_family) for name in ('both', 'one'))
    for stage in micro.STAGES:
        for folder, count in ((both, 2), (one, 1)):
            for parent in {'vision_pretrain': ('sft', 'clip'), 'clip': ()}.get(stage, STAGES[stage].parents[:1]):
                shutil.rmtree(folder / parent, ignore_errors=True)  # what was learned there at that rate
                micro.parent_run(folder, parent)
            train(folder, stage, count=count, optim__clip_norm=1e9, **still)
        found, wanted = (jax.tree.leaves_with_path(micro.read(run / stage)['params']) for run in (both, one))
        for (path, leaf), (_, other) in zip(found, wanted, strict=True):
            scale = np.abs(other).max()
            np.testing.assert_allclose(leaf, other, atol=1e-5 * scale, rtol=0, err_msg=f'{stage} {path}')
        assert max(np.abs(other).max() for _, other in wanted) > 1e3, stage


@pytest.mark.slow
@pytest.mark.parametrize('kept', ['bf16', 'int8'])
def test_two_hosts_keep_the_features_that_one_keeps(kept, tiny_family, tmp_path):
    both, one = (micro.family(tmp_path / name, tiny_family) for name in ('both', 'one'))
    for folder, count in ((both, 2), (one, 1)):
        for parent in ('sft', 'clip'):
            micro.parent_run(folder, parent)
        train(folder, 'vision_pretrain', count=count, data__cache_features=kept)
    made = [sorted((folder / 'features').glob('*/*.npy')) for folder in (both, one)]
    assert len(made[0]) == {'bf16': 1, 'int8': 2}[kept]
    for here, there in zip(*made, strict=True):
        assert here.parent.name == there.parent.name and here.read_bytes() == there.read_bytes()
    losses = [np.concatenate(told(folder / 'vision_pretrain', 'loss', 'eval_loss')) for folder in (both, one)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_host_that_is_killed_ends_the_other_and_both_go_on(families, family, tmp_path):
    folder = shutil.copytree(family, tmp_path / 'x', symlinks=True)
    with started(folder, 'sft', slow=True) as found:
        until(lambda: runfolder.whole_steps(folder / 'sft'))
        found[1].kill()
        assert found[0].wait(60) == 75, logs(folder)
    said = logs(folder)
    assert 'error: host 1: it is gone, one of 2' in said or 'error: the runtime has aborted' in said, said
    assert 'Traceback' not in said, said
    train(folder, 'sft')
    micro.assert_same(micro.read(folder / 'sft'), micro.read(families[0] / 'sft'))
    assert told(folder / 'sft', 'step', 'loss') == told(families[0] / 'sft', 'step', 'loss')


@pytest.mark.slow
def test_a_signal_to_one_host_stops_all_at_one_step(families, family, tmp_path):
    folder = shutil.copytree(family, tmp_path / 'x', symlinks=True)
    with started(folder, 'sft', slow=True, checkpoint__every=50) as found:
        until(lambda: logged(folder / 'sft', 1))
        found[1].send_signal(signal.SIGTERM)
        assert [process.wait(60) for process in found] == [75, 75], logs(folder)
    stopped = runfolder.newest(folder / 'sft')
    assert 1 <= stopped < 6 and f'stopped by signal 15 at step {stopped}' in logs(folder)
    assert 'Traceback' not in logs(folder) and 'it is gone' not in logs(folder), logs(folder)
    train(folder, 'sft', count=1, checkpoint__every=50)  # one process goes on with what two have saved
    losses = [np.concatenate(told(run / 'sft', 'loss')) for run in (folder, families[0])]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_data_that_one_host_cannot_read_ends_all_and_loses_no_step(runs, own):
    with started(runs, 'vision_instruct', slow=True, steps=30, checkpoint__every=50, **own.fields) as found:
        until(lambda: logged(runs / 'vision_instruct', 2))
        own.images.rename(own.images.parent / 'aside')
        assert [process.wait(60) for process in found] == [2, 2], logs(runs)
    assert runfolder.newest(runs / 'vision_instruct') >= 2
    assert 'cannot read on' in logs(runs) and 'Traceback' not in logs(runs)


@pytest.mark.slow
def test_a_mistake_that_one_host_makes_alone_ends_all_with_its_code(family, tmp_path):
    folder = shutil.copytree(family, tmp_path / 'x', symlinks=True)
    with started(folder, 'sft', slow=True, steps=200, mistake=1) as found:
        assert [process.wait(60) for process in found] == [2, 2], logs(folder)
    assert logs(folder).count('error: host 1: its own disk is wrong.') == 2 and 'Traceback' not in logs(folder)


@pytest.mark.slow
def test_a_mistake_on_one_host_ends_all_with_its_code(family, tmp_path):
    folder = shutil.copytree(family, tmp_path / 'x', symlinks=True)
    with started(folder, 'sft', optim__learning_rate=1e30, optim__max_skipped=1, optim__name='sgd') as found:
        assert [process.wait(60) for process in found] == [2, 2], logs(folder)
    assert 'training has diverged' in logs(folder) and 'Traceback' not in logs(folder)


def test_the_channel_takes_its_hosts_and_nobody_else():
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(hosts.Channel, hosts.Cluster(f'127.0.0.1:{port}', 2, 0))
        for said in (b'GET / HTTP/1.1\r\n\r\n', b'7\n', b'0\n', b''):
            until(lambda said=said: _knock(port + 1, said))
        channels = [pool.submit(hosts.Channel, hosts.Cluster(f'127.0.0.1:{port}', 2, 1)).result(60), first.result(60)]
        told = list(pool.map(lambda channel: channel.gather([channel.cluster.index]), channels))
        assert told == [[[0], [1]]] * 2
        list(pool.map(lambda channel: channel.close(), channels))


def _knock(port, said):
    with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port), timeout=1) as link:
        link.sendall(said)
        return True
    return False


@pytest.mark.parametrize('way_out', ['10.0.0.7', None])
def test_a_machine_whose_name_means_itself_is_reached_by_its_way_out(way_out, monkeypatch):
    class Out(contextlib.nullcontext):
        def connect(self, address):
            if way_out is None:
                raise OSError('no network')

        def getsockname(self):
            return way_out, 1

        def __enter__(self):
            return self

    monkeypatch.setattr(hosts.socket, 'gethostbyname', lambda _: '127.0.1.1')
    monkeypatch.setattr(hosts.socket, 'socket', lambda *_: Out())
    assert hosts.own_address() == (way_out or '127.0.1.1')
    monkeypatch.setattr(hosts.socket, 'gethostbyname', lambda _: '10.1.1.1')
    assert hosts.own_address() == '10.1.1.1'


def test_find_takes_flags_then_the_environment():
    slurm = {'SLURM_STEP_NUM_TASKS': '4', 'SLURM_PROCID': '3', 'SLURM_STEP_NODELIST': 'gpu[007-009,012],x'}
    slurm |= {'SLURM_JOB_ID': '5001', 'SLURM_STEP_TASKS_PER_NODE': '1(x4)', 'SLURM_LOCALID': '0'}
    assert hosts.find(environment={}) is None and hosts.find(environment=slurm | {'SLURM_STEP_NUM_TASKS': '1'}) is None
    assert hosts.find(environment=slurm) == ('gpu007:63442', 4, 3, None)
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
