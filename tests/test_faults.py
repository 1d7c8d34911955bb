"""Faults that users met: real ones, to real processes where it takes one; nothing is lost, and all is said."""

import contextlib
import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import micro
import numpy as np
import pytest
from conftest import ROOT
from processes import log_of, logged, process, until

from nanovision_jax.data import batch, pipeline
from nanovision_jax.data.images import ImageStore
from nanovision_jax.errors import Stuck, UserError
from nanovision_jax.runs import checkpoint, lineage, lock
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.runs.metrics import Metrics, read_metrics
from nanovision_jax.runs.skips import Skips
from nanovision_jax.training import loop as train
from nanovision_jax.training.stopping import StopOnSignal

pytestmark = pytest.mark.usefixtures('unsampled', 'heard')


# Signals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'number, code',
    [(signal.SIGINT, 130), (signal.SIGHUP, 75), pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow)],
)
def test_a_signal_lets_the_loop_save(number, code, runs):
    with process(runs, 'sft') as started:
        until(lambda: logged(runs / 'sft', 2))
        os.killpg(started.pid, number)
        assert started.wait(20) == code, log_of(runs)
    stopped = runfolder.newest(runs / 'sft')
    assert 2 <= stopped < 9 and read_metrics(runs / 'sft/metrics.jsonl')[-1]['step'] == stopped
    assert f'stopped by signal {int(number)} at step {stopped}' in log_of(runs) and 'Traceback' not in log_of(runs)
    assert not list(runs.glob('.*lock'))


def test_a_signal_before_the_first_step_leaves_at_once(runs):
    with process(runs, 'sft', fault='start') as started:
        until(lambda: 'it takes long' in log_of(runs))
        started.send_signal(signal.SIGTERM)
        assert started.wait(10) == 75
    assert 'before the first step' in log_of(runs) and 'Traceback' not in log_of(runs)
    assert not (runs / 'sft').exists()


def test_a_signal_ends_an_evaluation_and_the_state_is_saved(runs):
    with process(runs, 'sft', fault='evaluation') as started:
        until(lambda: 'it takes long' in log_of(runs))
        started.send_signal(signal.SIGTERM)
        assert started.wait(10) == 75, log_of(runs)
    assert 'Traceback' not in log_of(runs)
    at = runfolder.newest(runs / 'sft')
    assert at == 4 and not any('eval_loss' in line for line in read_metrics(runs / 'sft/metrics.jsonl'))
    with process(runs, 'sft') as started:  # what was missed is made good, and the end is the same
        assert started.wait(60) == 0, log_of(runs)
    lines = read_metrics(runs / 'sft/metrics.jsonl')
    assert [line['step'] for line in lines if 'eval_loss' in line] == [4, 8, 9]


def test_a_signal_with_which_the_first_batch_is_lost_takes_no_step(runs, monkeypatch):
    """As when the whole group of processes is told to stop, and data workers end before their parent."""
    batches = pipeline.batches

    def ending(rows, *args, **options):
        if rows.shuffled.shuffle:
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError('a worker was terminated')
        yield from batches(rows, *args, **options)

    monkeypatch.setattr(pipeline, 'batches', ending)
    cfg = micro.run_config('sft', runs, steps=4)
    with pytest.raises(SystemExit) as left:
        train.train(cfg)
    assert left.value.code == 75 and runfolder.newest(cfg.run_dir) is None


def test_a_second_signal_leaves_at_once(runs):
    with process(runs, 'sft', fault='evaluation') as started:
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


def test_a_signal_that_another_thread_takes_wakes_the_one_that_waits():
    """The system gives a signal to any thread; Python's handlers run in the main one, which may sleep on."""
    with StopOnSignal() as stop:
        stop.save_first()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            began = time.monotonic()
            with stop.interruptible():
                os.kill(os.getpid(), signal.SIGHUP)
                time.sleep(30)
            assert stop.signal == signal.SIGHUP and time.monotonic() - began < 10
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


# One writer ----------------------------------------------------------------------------------------------------------


def test_a_run_has_one_writer_and_what_is_shared_one_maker(runs):
    with process(runs, 'sft', fault='evaluation') as started:
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


def no_flock(*_):
    raise OSError(errno.ENOLCK, 'No locks available')


def test_without_flock_a_file_with_signs_of_life_is_the_lock(tmp_path, monkeypatch, capsys):
    file = tmp_path / '.lock.held'
    monkeypatch.setattr(lock.fcntl, 'flock', no_flock)
    monkeypatch.setattr(lock, 'BEAT', 0.05)
    with lock.held(tmp_path / '.lock', 'it'):
        told = json.loads(file.read_text())
        assert told['process'] == os.getpid() and not (tmp_path / '.lock').exists()
        with pytest.raises(UserError, match=f'it is in use by process {os.getpid()}'):
            lock.held(tmp_path / '.lock', 'it').__enter__()
        file.write_text(json.dumps(told | {'host': 'elsewhere'}))  # where its process cannot be asked for
        os.utime(file, (0, 0))
        until(lambda: file.stat().st_mtime > 1, 5)
        with pytest.raises(UserError, match=r'it is in use by process .* on elsewhere'):
            lock.held(tmp_path / '.lock', 'it').__enter__()
        waits = lock.held(tmp_path / '.lock', 'it', wait=True)
        done = threading.Thread(target=waits.__enter__)
        done.start()
        until(lambda: 'waiting for process' in capsys.readouterr().out, 5)
        assert done.is_alive()
    done.join(5)
    assert not done.is_alive() and file.exists()
    waits.__exit__(None, None, None)
    for gone in (told | {'process': 2**22 + 1}, told | {'host': 'elsewhere'}):
        file.write_text(json.dumps(gone))
        os.utime(file, (0, 0))
        with lock.held(tmp_path / '.lock', 'it'):
            assert json.loads(file.read_text())['process'] == os.getpid()
    assert not list(tmp_path.glob('.*'))


# Not a number --------------------------------------------------------------------------------------------------------


def poisoned(monkeypatch, steps):
    """Lets the losses of some batches of a run, counted from 1, be no numbers."""
    batches = pipeline.batches

    def spoiled(rows, *args, **options):
        for number, made in enumerate(batches(rows, *args, **options), 1):
            if number in steps and rows.shuffled.shuffle:
                made = made | {'weights': made['weights'] * np.float32(np.nan)}
            yield made

    monkeypatch.setattr(pipeline, 'batches', spoiled)


def test_a_batch_that_is_not_a_number_is_skipped_and_listed(runs, monkeypatch):
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


def test_too_many_in_a_row_end_a_run_which_keeps_its_last_good_checkpoint(runs, monkeypatch):
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


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    gone, now = subprocess.Popen([sys.executable, '-c', '']), time.time()
    gone.wait()
    names = [f'a.json.{gone.pid}.part', f'a.json.{os.getpid()}.part', 'tokenizer.part', 'a.json', f'b.{gone.pid}.part']
    for name in names:
        (tmp_path / name).write_text('half')
    os.utime(tmp_path / names[-1], (now - 90, now - 90))
    runfolder.remove_partial(tmp_path, untouched=60)
    assert {file.name for file in tmp_path.iterdir()} == set(names[:-1])
    runfolder.remove_partial(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == set(names[1:-1])
    runfolder.remove_partial(tmp_path / 'none')


def test_data_that_fails_loses_no_step(runs, monkeypatch):
    batches = pipeline.batches

    def ending(rows, *args, **options):
        for number, made in enumerate(batches(rows, *args, **options), 1):
            if number == 8 and rows.shuffled.shuffle:
                raise UserError('the disk with the pictures is gone.')
            yield made

    cfg = micro.run_config('sft', runs, steps=20, checkpoint__every=50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, 'batches', ending)
        with pytest.raises(UserError, match='the disk with the pictures is gone'):
            train.train(cfg)
    at = runfolder.newest(cfg.run_dir)
    assert 1 <= at < 8 and read_metrics(runs / 'sft/metrics.jsonl')[-1]['step'] == at


def test_an_evaluation_that_fails_loses_no_step(runs, monkeypatch):
    def failing(*_):
        raise UserError('the disk with the pictures is gone.')

    cfg = micro.run_config('sft', runs, steps=20, checkpoint__every=50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'validate', failing)
        with pytest.raises(UserError, match='the disk with the pictures is gone'):
            train.train(cfg)
    assert runfolder.newest(cfg.run_dir) == 4
    assert [line['step'] for line in read_metrics(runs / 'sft/metrics.jsonl')] == [1, 2, 3, 4]


@pytest.fixture
def started(monkeypatch):
    """The processes that are started, each a subprocess.Popen."""
    begun, start = [], subprocess.Popen.__init__
    monkeypatch.setattr(
        subprocess.Popen, '__init__', lambda self, *a, **k: (begun.append(self), start(self, *a, **k))[1]
    )
    return begun


def test_data_workers_that_die_are_started_again(runs, capsys, started):
    cfg = micro.run_config('sft', runs)
    rows, _ = pipeline.open_rows(cfg, pipeline.family_tokenizer(cfg))
    wanted = pipeline.batches(rows, 8)
    found = pipeline.batches(rows, 8, workers=2)
    for number in range(60):  # some are read ahead
        micro.assert_same(next(found), next(wanted))
        if number in (2, 30):
            for child in started[-2:]:
                child.kill()
    found.close()
    assert capsys.readouterr().err.count('a data worker died') == 2
    assert len(started) == 6 and all(child.returncode is not None for child in started)


def opened(cfg):
    return pipeline.open_rows(cfg, pipeline.family_tokenizer(cfg))[0]


def drawn_first(rows, n):
    """The examples of the first rows, in their order."""
    return [number for row in range(n) for number in rows.drawn(row)]


def taken(rows, n, **options):
    with contextlib.closing(pipeline.batches(rows, 4, **options)) as stream:
        return [next(stream) for _ in range(n)]


def test_pictures_that_vanish_or_break_leave_empty_places_in_their_rows(runs, own):
    cfg, images = micro.run_config('vision_instruct', runs, **own.fields), own.images
    rows = opened(cfg)
    whole = taken(rows, 2)
    gone, broken, *_ = drawn_first(rows, 8)
    (images / f'{gone}.jpg').rename(images / 'aside')
    (images / f'{broken}.jpg').write_bytes(b'nothing')
    found = taken(opened_again := copy.copy(rows), 2, workers=2)
    told = [entry for made in found for entry in batch.skipped(made)]
    assert [entry[1:] for entry in told] == [
        [gone, f"missing image '{gone}.jpg'"],
        [broken, 'image does not decode'],
    ]
    row = told[0][0]
    kept = [number for number in rows.drawn(row) if number not in (gone, broken)]
    assert found[0]['segments'][row].max() == len(kept)
    assert found[0]['images'][row].any(axis=(1, 2, 3)).sum() == len(kept)
    # What was left out is left out again, whatever reads it, and though the file is back.
    (images / 'aside').rename(images / f'{gone}.jpg')
    opened_again.skips = {tuple(entry[:2]) for entry in told}
    for one, other in zip(found, taken(opened_again, 2), strict=True):
        micro.assert_same(one, other)
    assert (whole[0]['weights'].sum(axis=1) >= found[0]['weights'].sum(axis=1)).all()


def test_a_pair_that_cannot_be_read_has_another_in_its_place(runs, own):
    cfg, images = micro.run_config('clip', runs, **own.fields), own.images
    rows = opened(cfg)
    whole, third = taken(copy.copy(rows), 2), drawn_first(rows, 8)[2]
    rows._start()  # has read nothing yet
    (images / f'{third}.jpg').unlink()
    found = taken(rows, 2)
    assert batch.skipped(found[0]) == [[2, third, f"missing image '{third}.jpg'"]] and not batch.skipped(found[1])
    same = [np.array_equal(one, other) for one, other in zip(whole[0]['images'], found[0]['images'], strict=True)]
    assert same == [True, True, False, True]
    micro.assert_same(whole[1], found[1])
    everywhere = [image.tobytes() for made in (*whole, found[0]) for image in made['images']]
    assert len(set(everywhere)) == 9  # and it is none of those beside it


@pytest.mark.parametrize('back', [True, False])
def test_a_run_goes_on_without_pictures_that_vanish_and_repeats_that(back, runs, own, monkeypatch):
    whole, images = micro.run_config('vision_instruct', runs, steps=6, **own.fields), own.images
    batches = pipeline.batches

    def losing(rows, *args, **options):
        for number, made in enumerate(batches(rows, *args, **options)):
            if number == 1 and rows.shuffled.shuffle:
                for example in drawn_first(rows, 60)[-2:]:
                    (images / f'{example}.jpg').rename(images / f'{example}.aside')
            yield made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, 'batches', losing)
        train.train(whole)
    told = list(runfolder.read_lines(runs / 'vision_instruct/skipped.jsonl'))
    assert told and all(line['reason'].startswith('missing image') for line in told)
    # From the middle on, with the pictures back or not: the same rows go without them, and all ends alike.
    wanted = micro.read(whole.run_dir)
    shutil.rmtree(runs / 'vision_instruct/checkpoints/6')
    for file in images.glob('*.aside') if back else ():
        file.rename(file.with_suffix('.jpg'))
    record = json.loads((runs / 'vision_instruct/lineage.json').read_text())
    (runs / 'vision_instruct/lineage.json').write_text(json.dumps(record | {'finished': None}))
    train.train(whole)
    micro.assert_same(micro.read(whole.run_dir), wanted)
    assert list(runfolder.read_lines(runs / 'vision_instruct/skipped.jsonl')) == told


def test_more_than_one_in_a_hundred_end_a_run(tmp_path, capsys):
    (tmp_path / 'skipped.jsonl').write_text('{"row": 1, "example": 5, "reason": "x"}\n{"row": 2, "exa')
    skips = Skips(tmp_path, 200)
    assert skips.known == {(1, 5)}
    skips.add([[1, 5, 'x'], [3, 5, 'missing'], [4, 6, 'missing']])
    assert capsys.readouterr().err.count('goes without') == 2
    with pytest.raises(UserError, match=r'3 of 200 examples cannot be read any more .* the last: gone'):
        skips.add([[5, 7, 'gone']])
    assert Skips(tmp_path, 200).known == {(1, 5), (3, 5), (4, 6), (5, 7)}


def test_a_file_that_hangs_is_named(runs, own, monkeypatch):
    cfg = micro.run_config('vision_instruct', runs, **own.fields)
    rows = opened(cfg)
    which = drawn_first(rows, 4)[1]
    read = ImageStore.read
    monkeypatch.setattr(ImageStore, 'read', lambda self, n: (n == f'{which}.jpg' and time.sleep(30)) or read(self, n))
    with pytest.raises(Stuck, match=rf'hangs for more than 0.5 s \(data.timeout\) at example {which}, {which}.jpg'):
        taken(rows, 1, timeout=0.5)


def test_data_workers_that_stand_still_are_started_again(runs, capsys, started):
    cfg = micro.run_config('sft', runs)
    rows, _ = pipeline.open_rows(cfg, pipeline.family_tokenizer(cfg))
    wanted = pipeline.batches(rows, 8)
    found = pipeline.batches(rows, 8, workers=2, timeout=5)
    for number in range(20):
        micro.assert_same(next(found), next(wanted))
        if number == 2:
            for child in started:
                child.send_signal(signal.SIGSTOP)
    found.close()
    assert capsys.readouterr().err.count('data workers stood still, and they begin again at row') == 1
    assert len(started) == 4 and all(child.returncode is not None for child in started)


def test_an_end_that_was_cut_is_completed(runs, monkeypatch):
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


def test_what_is_being_saved_is_saved_whatever_ends_the_run(runs, monkeypatch):
    finish = checkpoint.Checkpoints._finish
    monkeypatch.setattr(checkpoint.Checkpoints, '_finish', lambda self, *args: time.sleep(0.5) or finish(self, *args))
    poisoned(monkeypatch, range(3, 99))
    cfg = micro.run_config('sft', runs, steps=20, checkpoint__every=2, optim__max_skipped=1)
    with pytest.raises(UserError, match='has diverged'):
        train.train(cfg)
    assert runfolder.newest(cfg.run_dir) == 2
    assert not lineage.read_json(runfolder.Paths(cfg.run_dir).lineage).get('finished')
