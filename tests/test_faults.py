"""Faults that users met: real ones, to real processes where it takes one; nothing is lost, and all is said."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import micro
import numpy as np
import pytest
from conftest import ROOT

from nanovision_jax.data import pipeline
from nanovision_jax.errors import UserError
from nanovision_jax.runs import checkpoint, lineage, lock
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.runs.metrics import Metrics, read_metrics
from nanovision_jax.training import loop as train
from nanovision_jax.training.stopping import SIGNALS, StopOnSignal


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp() / 'compiled'
        micro.quicken(patch, folder)
        patch.setattr(train, 'show_samples', lambda *_: None)
        yield folder


@pytest.fixture(scope='module')
def family(tmp_path_factory, tiny_family, cache):
    """A family whose first stages never learned."""
    folder = micro.family(tmp_path_factory.mktemp('family'), tiny_family)
    for stage in ('pretrain', 'vision_pretrain'):
        micro.parent_run(folder, stage)
    return folder


@pytest.fixture
def runs(family, tmp_path):
    """A copy of it, to be spoiled."""
    return shutil.copytree(family, tmp_path / 'runs', symlinks=True)


@pytest.fixture(autouse=True)
def heard():
    """Signals as a terminal has them, whoever started the tests: nohup has SIGHUP ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS if number != signal.SIGINT}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# Signals -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(runs, cache, *stages, fault=''):
    """A process that trains stages, in a group of its own; its words are in runs/log."""
    command = [sys.executable, f'{ROOT}/tests/resume_driver.py', str(runs), str(cache), *stages]
    env = os.environ | {'PYTHONPATH': str(ROOT), 'FAULT': fault}
    with open(runs / 'log', 'w') as log:
        started = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        try:
            yield started
        finally:
            if started.poll() is None:
                started.kill()
            started.wait()


def until(true, seconds=60):
    """Waits until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def logged(run, step):
    return any(line['step'] >= step for line in read_metrics(run / 'metrics.jsonl'))


def log_of(runs):
    return (runs / 'log').read_text()


@pytest.mark.parametrize(
    'number, code',
    [(signal.SIGINT, 130), (signal.SIGHUP, 75), pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow)],
)
def test_a_signal_lets_the_loop_save(number, code, runs, cache):
    with process(runs, cache, 'sft') as started:
        until(lambda: logged(runs / 'sft', 2))
        os.killpg(started.pid, number)
        assert started.wait(20) == code, log_of(runs)
    stopped = runfolder.newest(runs / 'sft')
    assert 2 <= stopped < 9 and read_metrics(runs / 'sft/metrics.jsonl')[-1]['step'] == stopped
    assert f'stopped by signal {int(number)} at step {stopped}' in log_of(runs) and 'Traceback' not in log_of(runs)
    assert not list(runs.glob('.*lock'))


def test_a_signal_before_the_first_step_leaves_at_once(runs, cache):
    with process(runs, cache, 'sft', fault='start') as started:
        until(lambda: 'it takes long' in log_of(runs))
        started.send_signal(signal.SIGTERM)
        assert started.wait(10) == 75
    assert 'before the first step' in log_of(runs) and 'Traceback' not in log_of(runs)
    assert not (runs / 'sft').exists()


def test_a_signal_ends_an_evaluation_and_the_state_is_saved(runs, cache):
    with process(runs, cache, 'sft', fault='evaluation') as started:
        until(lambda: 'it takes long' in log_of(runs))
        started.send_signal(signal.SIGTERM)
        assert started.wait(10) == 75, log_of(runs)
    assert 'Traceback' not in log_of(runs)
    at = runfolder.newest(runs / 'sft')
    assert at == 4 and not any('eval_loss' in line for line in read_metrics(runs / 'sft/metrics.jsonl'))
    with process(runs, cache, 'sft') as started:  # what was missed is made good, and the end is the same
        assert started.wait(60) == 0, log_of(runs)
    lines = read_metrics(runs / 'sft/metrics.jsonl')
    assert [line['step'] for line in lines if 'eval_loss' in line] == [4, 8, 9]


def test_a_signal_with_which_the_first_batch_is_lost_takes_no_step(runs, monkeypatch, cache):
    """As when the whole group of processes is told to stop, and data workers end before their parent."""
    batches = pipeline.batches

    def ending(rows, *args):
        if rows.shuffled.shuffle:
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError('a worker was terminated')
        yield from batches(rows, *args)

    monkeypatch.setattr(pipeline, 'batches', ending)
    cfg = micro.run_config('sft', runs, steps=4)
    with pytest.raises(SystemExit) as left:
        train.train(cfg)
    assert left.value.code == 75 and runfolder.newest(cfg.run_dir) is None


def test_a_second_signal_leaves_at_once(runs, cache):
    with process(runs, cache, 'sft', fault='evaluation') as started:
        until(lambda: logged(runs / 'sft', 1))
        started.send_signal(signal.SIGSTOP)  # so that both have come before it hears the first
        started.send_signal(signal.SIGHUP)
        started.send_signal(signal.SIGTERM)
        started.send_signal(signal.SIGCONT)
        assert started.wait(10) == 75
    assert 'at once' in log_of(runs) and 'Traceback' not in log_of(runs)


def test_what_is_interruptible_ends_and_what_is_behind_it_goes_on():
    with StopOnSignal() as stop:
        stop.save_first()
        with stop.interruptible():
            assert stop.signal is None
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(5)
            raise AssertionError('not interrupted')
        assert stop.signal == signal.SIGHUP and stop.code == 75
        passed = False
        with stop.interruptible():  # a signal that came before is for the body to see
            passed = True
        assert passed
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal is None


# One writer ----------------------------------------------------------------------------------------------------------


def test_a_run_has_one_writer_and_what_is_shared_one_maker(runs, cache):
    with process(runs, cache, 'sft', fault='evaluation') as started:
        until(lambda: logged(runs / 'sft', 1))
        with pytest.raises(UserError, match=rf'the run \S+sft is in use by process {started.pid} on \S+ since'):
            train.train(micro.run_config('sft', runs, steps=9, checkpoint__every=3, optim__name='muon'))
    assert started.returncode == -signal.SIGKILL  # whose lock went with it
    cfg = micro.run_config('sft', runs, steps=9, checkpoint__every=3, optim__name='muon')
    train.train(cfg)
    assert 'finished' in runfolder.read_lineage(cfg.run_dir) and not list(runs.glob('.*lock'))


def test_who_waits_for_a_lock_gets_it(tmp_path):
    program = (
        'import sys, time\nfrom nanovision_jax.runs import lock\n'
        'with lock.held(sys.argv[1], "the thing", wait=True):\n'
        '    n = int(open(sys.argv[2]).read())\n    time.sleep(0.05)\n    open(sys.argv[2], "w").write(str(n + 1))\n'
    )
    (tmp_path / 'count').write_text('0')
    argv = [sys.executable, '-c', program, str(tmp_path / 'x' / '.lock'), str(tmp_path / 'count')]
    started = [subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(5)]
    said = [one.communicate(timeout=60)[0] for one in started]
    assert [one.returncode for one in started] == [0] * 5 and (tmp_path / 'count').read_text() == '5'
    assert any('waiting for process' in text for text in said) and not (tmp_path / 'x' / '.lock').exists()
    with lock.held(tmp_path / '.lock', 'it'), pytest.raises(UserError, match=f'it is in use by process {os.getpid()}'):
        lock.held(tmp_path / '.lock', 'it').__enter__()


# Not a number --------------------------------------------------------------------------------------------------------


def poisoned(monkeypatch, steps):
    """Lets the losses of some batches of a run, counted from 1, be no numbers."""
    batches = pipeline.batches

    def spoiled(rows, *args):
        for number, batch in enumerate(batches(rows, *args), 1):
            if number in steps and rows.shuffled.shuffle:
                batch = batch | {'weights': batch['weights'] * np.float32(np.nan)}
            yield batch

    monkeypatch.setattr(pipeline, 'batches', spoiled)


def test_a_batch_that_is_not_a_number_is_skipped_and_listed(runs, monkeypatch, cache):
    poisoned(monkeypatch, (3, 6))
    cfg = micro.run_config('sft', runs, steps=8, optim__max_skipped=2)
    train.train(cfg)
    paths = runfolder.Paths(cfg.run_dir)
    told = list(runfolder.read_lines(paths.bad_steps))
    assert [(line['step'], line['skipped']) for line in told] == [(3, True), (6, True)]
    rows, _ = pipeline.open_rows(cfg, pipeline.family_tokenizer(cfg))
    assert told[0]['examples'] == sorted({number for row in range(16, 24) for number in rows.drawn(row)})
    lines = [line for line in read_metrics(paths.metrics) if 'tokens' in line]
    assert [line.get('skipped', 0) for line in lines] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [line['step'] for line in lines if 'loss' not in line] == [3, 6]
    json.loads(paths.metrics.read_text().splitlines()[3], parse_constant=lambda text: 1 / 0)
    params = micro.read(cfg.run_dir)['params']
    assert all(np.isfinite(leaf).all() for leaf in micro.jax.tree.leaves(params))


def test_too_many_in_a_row_end_a_run_which_keeps_its_last_good_checkpoint(runs, monkeypatch, cache):
    poisoned(monkeypatch, range(5, 99))
    cfg = micro.run_config('sft', runs, steps=20, optim__max_skipped=3)
    with pytest.raises(UserError, match=r'has diverged, 3 steps in a row were skipped .* last checkpoint is step [46]'):
        train.train(cfg)
    assert runfolder.newest(cfg.run_dir) in (4, 6)


# Disk and data -------------------------------------------------------------------------------------------------------


def test_metrics_that_cannot_be_written_are_kept_until_they_can(tmp_path, capsys):
    metrics = Metrics(tmp_path)
    metrics.write(step=1, loss=1.0)
    file = tmp_path / 'metrics.jsonl'
    file.rename(tmp_path / 'aside')
    file.mkdir()
    metrics.write(step=2, loss=2.0)
    metrics.write(step=3, loss=3.0)
    assert capsys.readouterr().err.count('metrics.jsonl cannot be written (Is a directory)') == 1
    file.rmdir()
    (tmp_path / 'aside').rename(file)
    with open(file, 'a') as half:
        half.write('{"step": 2, "lo')  # what a full disk took of a line
    metrics.write(step=4, loss=4.0)
    assert [line['step'] for line in read_metrics(file)] == [1, 2, 3, 4]


def test_data_that_fails_loses_no_step(runs, monkeypatch, cache):
    batches = pipeline.batches

    def ending(rows, *args):
        for number, batch in enumerate(batches(rows, *args), 1):
            if number == 8 and rows.shuffled.shuffle:
                raise UserError('the disk with the pictures is gone.')
            yield batch

    cfg = micro.run_config('sft', runs, steps=20, checkpoint__every=50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, 'batches', ending)
        with pytest.raises(UserError, match='the disk with the pictures is gone'):
            train.train(cfg)
    at = runfolder.newest(cfg.run_dir)
    assert 1 <= at < 8 and read_metrics(runs / 'sft/metrics.jsonl')[-1]['step'] == at


def test_data_workers_that_die_are_started_again(runs, capsys, cache):
    cfg = micro.run_config('sft', runs)
    rows, _ = pipeline.open_rows(cfg, pipeline.family_tokenizer(cfg))
    wanted = pipeline.batches(rows, 8)
    found = pipeline.batches(rows, 8, workers=2)
    for number in range(60):  # some are read ahead
        micro.assert_same(next(found), next(wanted))
        if number in (2, 30):
            for child in multiprocessing.active_children():
                child.kill()
    found.close()
    assert capsys.readouterr().err.count('a data worker died') == 2
    assert not multiprocessing.active_children()


def test_an_end_that_was_cut_is_completed(runs, monkeypatch, cache):
    cfg = micro.run_config('sft', runs, steps=4)

    def killed(*_):
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'validate', killed)
        with pytest.raises(SystemExit):
            train.train(cfg)
    assert runfolder.newest(cfg.run_dir) == 4 and 'finished' not in runfolder.read_lineage(cfg.run_dir)
    train.train(cfg)
    assert runfolder.read_lineage(cfg.run_dir)['finished'] == 4
    assert [line['step'] for line in read_metrics(runs / 'sft/metrics.jsonl') if 'eval_loss' in line] == [4]


def test_what_is_being_saved_is_saved_whatever_ends_the_run(runs, monkeypatch, cache):
    finish = checkpoint.Checkpoints._finish
    monkeypatch.setattr(checkpoint.Checkpoints, '_finish', lambda self, *args: time.sleep(0.5) or finish(self, *args))
    poisoned(monkeypatch, range(3, 99))
    cfg = micro.run_config('sft', runs, steps=20, checkpoint__every=2, optim__max_skipped=1)
    with pytest.raises(UserError, match='has diverged'):
        train.train(cfg)
    assert runfolder.newest(cfg.run_dir) == 2
    assert not lineage.read_json(runfolder.Paths(cfg.run_dir).lineage).get('finished')
