"""Stopped anywhere and gone on with, a run ends with the very bits of one that was never stopped."""

import os
import shutil
import signal
import subprocess
import sys
import time

import micro
import pytest
from conftest import ROOT

from nanovision_jax.data import packing, pipeline
from nanovision_jax.errors import Failure
from nanovision_jax.runs import checkpoint
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.runs.metrics import read_metrics
from nanovision_jax.training import loop as train
from nanovision_jax.training import verify, watching

pytestmark = pytest.mark.usefixtures('quick')
STEPS = 9
RUN = dict(steps=STEPS, checkpoint__every=3, optim__name='muon')  # Muon's state, and AdamW's for what Muon leaves


@pytest.fixture(scope='module')
def parents(tmp_path_factory, tiny_family):
    """A family whose vision_pretrain never learned."""
    family = micro.family(tmp_path_factory.mktemp('parents'), tiny_family)
    micro.parent_run(family, 'vision_pretrain')
    return family


class Crash(Exception):
    """The power failed."""


@pytest.fixture(scope='module')
def go(parents, tmp_path_factory):
    """A function that trains vision_instruct and returns (its folder, digests of the batches it was given).

    `crash_at` is a step whose checkpoint is never written, as the power fails just then.
    """

    def go(folder=None, crash_at=None, **fields):
        family = folder.parent if folder else tmp_path_factory.mktemp('family')
        if not folder:
            shutil.copytree(parents, family, symlinks=True, dirs_exist_ok=True)
        cfg, seen = micro.run_config('vision_instruct', family, **RUN | fields), []

        def watched(rows, *args, **options):
            for batch in batches(rows, *args, **options):
                if isinstance(rows, packing.PackedRows) and rows.shuffled.shuffle:  # those to learn from
                    seen.append(checkpoint.tree_digest(batch))
                yield batch

        def save(self, step, *args):
            if step == crash_at:
                self.wait()
                raise Crash
            write(self, step, *args)

        batches, write = pipeline.batches, checkpoint.Checkpoints.save
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(watching, 'watch', lambda *_: {})
            patch.setattr(pipeline, 'batches', watched)
            patch.setattr(checkpoint.Checkpoints, 'save', save)
            try:
                train.train(cfg)
            except Crash:
                assert crash_at
            else:
                assert not crash_at
        return family / 'vision_instruct', seen

    return go


@pytest.fixture(scope='module')
def whole(go):
    """(folder, batches) of a run that was never stopped."""
    return go()


@pytest.fixture(scope='module')
def went(go):
    """The folder of a run that crashed as it was to save its end."""
    return go(crash_at=9)[0]


def assert_as(folder, wanted):
    """Parameters and optimizer are those of the run that was never stopped, and so are the lines of metrics."""
    micro.assert_same(micro.read(folder, STEPS), micro.read(wanted, STEPS))
    lines = [read_metrics(run / 'metrics.jsonl') for run in (folder, wanted)]
    told = [
        [[line.get(k) for k in ('step', 'loss', 'eval_loss', 'tokens', 'grad_norm')] for line in run] for run in lines
    ]
    assert told[0] == told[1]
    seconds = [line['seconds'] for line in lines[0] if 'loss' in line]
    assert seconds == sorted(seconds)


def test_the_runs_cross_the_end_of_an_epoch(whole, parents):
    cfg = micro.run_config('vision_instruct', parents)
    rows, _ = pipeline.open_rows(cfg, pipeline.family_tokenizer(cfg))
    assert rows.rows_per_epoch() < 6 * 8  # so one ends behind step 3, from which some runs go on, and before step 6
    assert len(set(whole[1])) == len(whole[1]) > STEPS


def test_crashed_twice_it_ends_the_same(whole, go):
    folder, first = go(crash_at=6)
    assert runfolder.newest(folder) == 3
    _, second = go(folder, crash_at=9)
    assert runfolder.newest(folder) == 6
    _, third = go(folder)
    assert_as(folder, whole[0])
    for seen, start in ((first, 0), (second, 3), (third, 6)):  # read ahead, so more than were used
        n = min(len(seen), len(whole[1]) - start)
        assert seen[:n] == whole[1][start : start + n] and n >= 3


@pytest.fixture
def crashed(went, tmp_path):
    """A run that has the checkpoints 3 and 6."""
    family = shutil.copytree(went.parent, tmp_path / 'family', symlinks=True)
    assert runfolder.whole_steps(family / 'vision_instruct') == [6, 3]
    return family / 'vision_instruct'


def test_a_last_checkpoint_that_is_damaged_is_done_again(whole, crashed, go, capsys):
    files = (crashed / 'checkpoints' / '6' / 'params').rglob('*')
    file = max(files, key=lambda file: file.is_file() and file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 8
    file.write_bytes(data)
    go(crashed)
    told = capsys.readouterr()
    assert f'{file} is damaged, so checkpoint 6 is not used' in told.err
    assert f'goes on from {crashed}, step 3' in told.out
    assert_as(crashed, whole[0])


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(whole, crashed, go):
    (crashed / 'checkpoints' / '6' / 'manifest.json').unlink()
    go(crashed, data__workers=2)
    assert_as(crashed, whole[0])


@pytest.mark.slow
def test_evaluation_changes_nothing(whole, go):
    folder, seen = go(eval__every=1, eval__batches=2)
    lines = read_metrics(folder / 'metrics.jsonl')
    assert sum('eval_loss' in line for line in lines) == STEPS
    micro.assert_same(micro.read(folder), micro.read(whole[0]))
    n = min(len(seen), len(whole[1]))
    assert seen[:n] == whole[1][:n]


@pytest.mark.slow
def test_with_features_from_disk_it_ends_the_same_too(go, whole, capsys):
    fields = {'data__cache_features': 'bf16'}
    alone, (folder, _) = go(**fields)[0], go(crash_at=6, **fields)
    shutil.rmtree(folder.parent / 'features')  # they are made again
    go(folder, data__workers=2, **fields)
    assert_as(folder, alone)
    lines = [read_metrics(run / 'metrics.jsonl') for run in (alone, whole[0])]
    losses, plain = ([line['loss'] for line in run if 'loss' in line] for run in lines)
    assert losses != plain and losses == pytest.approx(plain, rel=1e-2)


# Real signals to a real process --------------------------------------------------------------------------------------


def drive(family, *stages, until=None, send=None):
    """Trains stages in a process of its own, which is sent a signal once until() is true. Returns its exit code."""
    command = [sys.executable, f'{ROOT}/tests/resume_driver.py', str(family), *stages]
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    with open(family / 'log', 'a') as log, subprocess.Popen(command, stdout=log, stderr=log, env=env) as process:
        while process.poll() is None:
            if until and until():
                process.send_signal(send)
                until = None
            time.sleep(0.002)
    return process.returncode


def logged(folder, step):
    """Whether a run has logged a step."""
    return any(line['step'] >= step for line in read_metrics(folder / 'metrics.jsonl'))


def saving(folder, step):
    """Whether a run is in the middle of writing a checkpoint."""
    return any(folder.glob(f'checkpoints/{step}*')) and not (folder / f'checkpoints/{step}/manifest.json').exists()


def test_terminated_it_saves_and_killed_it_goes_on(whole, parents, tmp_path):
    family = shutil.copytree(parents, tmp_path / 'family', symlinks=True)
    run = family / 'vision_instruct'
    code = drive(family, 'vision_instruct', until=lambda: logged(run, 4), send=signal.SIGTERM)
    assert code == 75, (family / 'log').read_text()
    stopped = runfolder.newest(run)
    assert 4 <= stopped < 9 and read_metrics(run / 'metrics.jsonl')[-1]['step'] == stopped
    assert (
        f'stopped by signal 15 at step {stopped}; the same command goes on from there' in (family / 'log').read_text()
    )
    code = drive(family, 'vision_instruct', until=lambda: saving(run, 9), send=signal.SIGKILL)
    assert code == -signal.SIGKILL and runfolder.newest(run) in (6, stopped)
    assert drive(family, 'vision_instruct') == 0, (family / 'log').read_text()
    assert_as(run, whole[0])


@pytest.mark.slow
def test_every_stage_killed_twice_ends_as_if_never_killed(tiny_family, tmp_path, monkeypatch):
    """Once before its first checkpoint, once in the middle of writing one."""
    monkeypatch.setattr(watching, 'watch', lambda *_: {})
    killed, alone = (micro.family(tmp_path / name, tiny_family) for name in ('killed', 'alone'))
    for stage in micro.STAGES:
        run = killed / stage
        for until in (lambda: logged(run, 1), lambda: saving(run, 6)):
            assert drive(killed, *micro.STAGES, until=until, send=signal.SIGKILL) == -signal.SIGKILL
            assert runfolder.newest(run) in (None, 3)
    assert drive(killed, *micro.STAGES) == 0, (killed / 'log').read_text()
    for stage in micro.STAGES:
        train.train(micro.run_config(stage, alone, **RUN))
        assert_as(killed / stage, alone / stage)


def test_steps_are_verified_bit_by_bit(go, capsys, monkeypatch):
    folder, _ = go()
    cfg = micro.run_config('vision_instruct', folder.parent, **RUN)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob('*')}
    capsys.readouterr()
    verify.verify(cfg, 3)  # checkpoints 6 and 9 are there
    said = capsys.readouterr().out
    assert '3 steps from step 6 on, taken twice: bit-equal' in said
    assert 'what 3 steps make of checkpoint 6, and checkpoint 9: bit-equal' in said
    verify.verify(cfg, 2)
    assert '2 steps from step 9 on, taken twice: bit-equal' in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in folder.rglob('*')} == before
    batches, calls = pipeline.batches, []

    def otherwise(rows, *args, **options):
        calls.append(0)
        for batch in batches(rows, *args, **options):
            yield batch | {'tokens': batch['tokens'] ^ (len(calls) == 2)}

    monkeypatch.setattr(pipeline, 'batches', otherwise)
    with pytest.raises(Failure, match=r'2 steps from step 9 on, taken twice: \d+ of \d+ arrays differ \(\S*decoder/'):
        verify.verify(cfg, 2)
