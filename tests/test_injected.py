"""The faults that users meet, injected into real processes and real files; bash scripts/test.sh --faults runs these.

Each ends as promised: with the same bits, or in one sentence and with the exit code of errors.py; never with a
traceback, and never later than it should. test_faults.py has the quick ones.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import micro
import numpy as np
import pytest
from conftest import ROOT
from processes import children, logged, process, until

import nanovision_jax
from nanovision_jax.data import pipeline
from nanovision_jax.errors import UserError
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.runs.metrics import read_metrics
from nanovision_jax.training import loop as train

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.usefixtures('unsampled', 'heard')]
STEPS = 9


@pytest.fixture(scope='module')
def whole(family, tmp_path_factory):
    """An sft run that nothing disturbed; read only."""
    folder = shutil.copytree(family, tmp_path_factory.mktemp('whole') / 'runs', symlinks=True)
    with process(folder, 'sft') as started:
        assert started.wait(120) == 0
    return folder / 'sft'


@pytest.fixture
def log(tmp_path):
    return tmp_path / 'log'


def told(run):
    """What metrics.jsonl says of the steps, but for how long they took."""
    kept = ('step', 'loss', 'grad_norm', 'learning_rate', 'tokens', 'eval_loss')
    return [{name: line[name] for name in kept if name in line} for line in read_metrics(run / 'metrics.jsonl')]


def is_whole(run, whole):
    micro.assert_same(micro.read(run), micro.read(whole))
    assert told(run) == told(whole)
    assert runfolder.read_lineage(run)['finished'] == STEPS
    assert not list(run.parent.glob('.*lock*')) and not list(run.rglob('*.part'))
    assert all((folder / 'manifest.json').is_file() for folder in (run / 'checkpoints').iterdir())


def ends(started, code, log, says=''):
    """It ends with a code, in a sentence without a traceback."""
    assert started.wait(90) == code, log.read_text()
    said = log.read_text()
    assert 'Traceback' not in said and says in said, said


# Killed and told to stop ---------------------------------------------------------------------------------------------


def test_twenty_kills(runs, whole, log):
    rng, at = random.Random(0), []
    for _ in range(20):
        with process(runs, 'sft', log=log) as started:
            before = len(log.read_text())
            until(lambda: len(log.read_text()) > before or started.poll() is not None)  # jax is loaded by then
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(rng.uniform(0, 5))
            at.append(runfolder.whole_steps(runs / 'sft')[:1])
    with process(runs, 'sft', log=log) as started:
        ends(started, 0, log)
    is_whole(runs / 'sft', whole)


@pytest.mark.parametrize('moment', ['start', 'compiling', 'loop', 'evaluation', 'sampling', 'saving'])
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_every_signal_at_every_moment(number, moment, runs, whole, log):
    with process(runs, 'sft', fault=moment.replace('loop', ''), log=log) as started:
        if moment == 'loop':
            until(lambda: logged(runs / 'sft', 2))
        else:
            until(lambda: 'it takes long' in log.read_text())
        os.killpg(started.pid, number)
        began = time.monotonic()
        ends(started, 130 if number == signal.SIGINT else 75, log, f'stopped by signal {int(number)}')
        assert time.monotonic() - began < 10
    with process(runs, 'sft', log=log) as started:
        ends(started, 0, log)
    is_whole(runs / 'sft', whole)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_signal_to_a_group_with_data_workers(workers, runs, log):
    with process(runs, 'vision_instruct', log=log, data__workers=workers) as started:
        until(lambda: logged(runs / 'vision_instruct', 2))
        os.killpg(started.pid, signal.SIGTERM)
        ends(started, 75, log)
    assert runfolder.newest(runs / 'vision_instruct') >= 2
    with process(runs, 'vision_instruct', log=log) as started:
        ends(started, 0, log)


# Disk ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, family):
    """The family on a disk of 8 MB."""
    place = tmp_path / 'small'
    place.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=8m', 'none', place], capture_output=True).returncode:
        pytest.skip('a disk can be mounted by root alone, or within `unshare -rm`')
    yield shutil.copytree(family, place / 'runs', symlinks=True)
    subprocess.run(['umount', '-l', place], check=True)


def fill(place):
    with contextlib.suppress(OSError), open(place / 'filling', 'wb', buffering=0) as file:
        while True:
            file.write(b'x' * 4096)


@pytest.mark.parametrize('step', [1, 5])
def test_a_full_disk_with_room_again(step, small, whole, log):
    with process(small, 'sft', log=log) as started:
        until(lambda: logged(small / 'sft', step))
        fill(small)
        until(lambda: 'the next try is in' in log.read_text())
        time.sleep(3)
        assert started.poll() is None
        (small / 'filling').unlink()
        ends(started, 0, log, 'a checkpoint could not be written to')
    (small / 'log').unlink(missing_ok=True)
    micro.assert_same(micro.read(small / 'sft', STEPS), micro.read(whole))
    assert told(small / 'sft') == told(whole)


def test_a_full_disk_for_good(small, whole, log):
    with process(small, 'sft', log=log, tries=3) as started:
        until(lambda: runfolder.whole_steps(small / 'sft'))
        fill(small)
        ends(started, 1, log, 'That was try 3 of 3; the last one is step')
    with process(small, 'sft', log=log, tries=3) as started:  # nor does a start on it
        assert started.wait(90) == 1 and 'Traceback' not in log.read_text(), log.read_text()
    (small / 'filling').unlink()
    with process(small, 'sft', log=log) as started:
        ends(started, 0, log)
    is_whole(small / 'sft', whole)


def test_no_file_may_grow(runs, whole, log):
    with process(runs, 'sft', log=log, tries=2) as started:
        until(lambda: 'starts from' in log.read_text())
        limits = ['prlimit', f'--pid={started.pid}', f'--fsize={100 << 10}']  # 100 KiB: the parameters take more
        subprocess.run(limits, check=True)
        ends(started, 1, log, 'That was try 2 of 2')
    with process(runs, 'sft', log=log) as started:
        ends(started, 0, log)
    micro.assert_same(micro.read(runs / 'sft'), micro.read(whole))


def test_a_run_folder_that_cannot_be_written_for_a_while(small, whole, log):
    with process(small, 'sft', log=log) as started:
        until(lambda: logged(small / 'sft', 1))
        subprocess.run(['mount', '--bind', small / 'sft', small / 'sft'], check=True)
        subprocess.run(['mount', '-o', 'remount,ro,bind', small / 'sft'], check=True)
        until(lambda: 'the next try is in' in log.read_text())
        time.sleep(3)
        subprocess.run(['umount', '-l', small / 'sft'], check=True)
        ends(started, 0, log, 'Read-only file system')
    micro.assert_same(micro.read(small / 'sft', STEPS), micro.read(whole))


@pytest.mark.parametrize('back', [True, False])
def test_a_run_folder_that_is_gone_is_not_made_anew(back, runs, whole, log):
    with process(runs, 'sft', log=log, tries=None if back else 3) as started:
        until(lambda: runfolder.whole_steps(runs / 'sft'))
        (runs / 'sft').rename(runs / 'aside')
        until(lambda: 'the next try is in' in log.read_text() or started.poll() is not None)
        assert not (runs / 'sft').exists()
        if back:
            (runs / 'aside').rename(runs / 'sft')
            ends(started, 0, log, 'the run folder is gone')
            micro.assert_same(micro.read(runs / 'sft', STEPS), micro.read(whole))
            return
        ends(started, 1, log, 'That was try 3 of 3')
    assert not (runs / 'sft').exists()


# Damage --------------------------------------------------------------------------------------------------------------


def damaged(file, how):
    data = file.read_bytes()
    if how == 'flipped':
        middle = len(data) // 3
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else b'x')
    elif how == 'cut':
        file.write_bytes(data[: len(data) // 2])
    elif how == 'emptied':
        file.write_bytes(b'')
    elif how == 'list':
        file.write_text('[' * 20000 + ']' * 20000)
    else:
        file.unlink()


@pytest.mark.parametrize('how', ['flipped', 'cut', 'emptied', 'gone', 'list'])
def test_every_file_of_a_run_is_right_or_refused(how, whole, tmp_path):
    wanted = {step: micro.read(whole, step)['params'] for step in runfolder.whole_steps(whole)}
    files = sorted(str(file.relative_to(whole)) for file in whole.rglob('*') if file.is_file())
    assert len(files) > 30
    for name in files:
        run = shutil.copytree(whole, tmp_path / 'sft')
        damaged(run / name, how)
        try:
            opened = nanovision_jax.load(run)
            micro.assert_same(micro.jax.device_get(opened.params), wanted[opened.step])
            assert opened.step == STEPS or name.startswith('checkpoints/9/'), name
            assert not name.startswith(('config.json', 'tokenizer/')), name
        except UserError as error:
            assert '\n' not in str(error), name
            assert name.startswith(('config.json', 'lineage.json', 'tokenizer/')), name
        shutil.rmtree(run)


@pytest.mark.parametrize('how', ['flipped', 'cut', 'emptied', 'gone', 'list'])
def test_what_lies_beside_checkpoints_stops_going_on_in_a_sentence(how, whole, tmp_path):
    files = ['config.json', 'lineage.json', 'metrics.jsonl', 'tokenizer/tokenizer.json', 'tokenizer/source.json']
    files += ['checkpoints/9/manifest.json', '../tokenizer/tokenizer.json', '../tokenizer/source.json']
    for name in files:
        family = shutil.copytree(whole.parent, tmp_path / 'runs', symlinks=True)
        damaged(family / 'sft' / name, how)
        for stage, steps in (('sft', 10), ('vision_pretrain', 1)):
            try:
                cfg = micro.run_config(stage, family, steps=steps, optim__name='muon', checkpoint__every=3)
                cfg.init_from = str(family / 'sft') if stage != 'sft' else ''
                train.find_sources(cfg) if stage != 'sft' else train.train(cfg, resume=True)
            except UserError as error:
                assert '\n' not in str(error), (name, stage)
        shutil.rmtree(family)


@pytest.mark.parametrize('how', ['flipped', 'cut', 'emptied'])
@pytest.mark.parametrize('stage, pattern', [('sft', 'index-sft-*.npz'), ('pretrain', 'text-train-*.npy')])
def test_index_and_tokens_are_made_again_or_refused(stage, pattern, how, runs):
    data = (runs / 'data').resolve()
    (runs / 'data').unlink()
    shutil.copytree(data, runs / 'data')
    shutil.rmtree(runs / stage, ignore_errors=True)
    train.train(micro.run_config(stage, runs, steps=2))
    wanted, files = told(runs / stage), list((runs / 'data').glob(pattern))
    assert files
    for file in files:
        damaged(file, how)
    try:
        train.train(micro.run_config(stage, runs, steps=2), anew=True)
        assert told(runs / stage) == wanted
    except UserError as error:
        assert '\n' not in str(error)


# Two at once ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('again', range(5))
def test_two_at_once(again, runs, whole, tmp_path):
    logs = [tmp_path / 'one', tmp_path / 'two']
    with process(runs, 'sft', log=logs[0]) as one, process(runs, 'sft', log=logs[1]) as two:
        codes = sorted([one.wait(90), two.wait(90)])
    said = ''.join(log.read_text() for log in logs)
    assert codes == [0, 2] and 'is in use by process' in said and 'Traceback' not in said, said
    is_whole(runs / 'sft', whole)


def test_two_stages_side_by_side_make_one_tokenizer(runs, tmp_path):
    shutil.rmtree(runs / 'tokenizer')
    shutil.rmtree(runs / 'pretrain')
    logs = [tmp_path / 'one', tmp_path / 'two']
    fields = dict(data__vocab_size=384)
    first = process(runs, 'pretrain', log=logs[0], **fields)
    with first as one, process(runs, 'clip', log=logs[1], **fields) as two:
        ends(one, 0, logs[0])
        ends(two, 0, logs[1])
    digests = {
        runfolder.file_digest(run / 'tokenizer' / 'tokenizer.json') for run in (runs, runs / 'clip', runs / 'pretrain')
    }
    assert len(digests) == 1


# Not a number --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('rate', ['1e6', '1e30'])
def test_a_rate_that_diverges_keeps_nothing_that_is_not_finite(rate, runs, log):
    fields = dict(optim__learning_rate=float(rate), optim__max_skipped=2, optim__warmup=0, optim__name='sgd')
    with process(runs, 'sft', log=log, **fields) as started:
        # With clipped gradients 1e6 is nonsense, and said to leap, but finite.
        ends(started, 2 if rate == '1e30' else 0, log, 'diverged' if rate == '1e30' else 'finished')
    for step in runfolder.whole_steps(runs / 'sft'):
        for leaf in micro.jax.tree.leaves(micro.read(runs / 'sft', step)['params']):
            assert np.isfinite(leaf).all()


@pytest.mark.parametrize('fault', ['nan', 'inf'])
def test_a_batch_that_is_not_finite_changes_nothing(fault, runs, log):
    with process(runs, 'sft', fault=fault, log=log) as started:
        ends(started, 0, log)
    assert [line['step'] for line in runfolder.read_lines(runs / 'sft/bad_steps.jsonl')] == [3]
    assert all(np.isfinite(leaf).all() for leaf in micro.jax.tree.leaves(micro.read(runs / 'sft')['params']))


def test_a_rate_that_is_not_finite_is_refused(runs):
    with pytest.raises(UserError, match='learning_rate'):
        micro.run_config('sft', runs, optim__learning_rate=float('inf'))


# Data ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('change', ['order', 'words', 'pictures'])
def test_data_that_changes_while_a_run_is_stopped_is_refused(change, runs, own):
    train.train(micro.run_config('vision_instruct', runs, steps=2, **own.fields))
    if change == 'pictures':
        (own.images / '7.jpg').write_bytes((own.images / '8.jpg').read_bytes())
    else:
        other = own.rows[-1] | {'conversations': own.rows[-1]['conversations'] * 2}
        own.file.write_text(json.dumps(own.rows[::-1] if change == 'order' else [*own.rows[:-1], other]))
    with pytest.raises(UserError, match=r'would go on with other rows than it began with \(data'):
        train.train(micro.run_config('vision_instruct', runs, steps=4, **own.fields), resume=True)


def seen_last(runs, own, n):
    """The pictures that the n-th row holds, which is read when the first have been learned from."""
    cfg = micro.run_config('vision_instruct', runs, **own.fields)
    rows, _ = pipeline.open_rows(cfg, pipeline.family_tokenizer(cfg))
    return [own.images / f'{example}.jpg' for example in rows.drawn(n)]


@pytest.mark.parametrize('back', [False, True])
@pytest.mark.parametrize('workers', [0, 2])
def test_pictures_that_vanish_as_a_run_goes(workers, back, runs, own, log):
    last, fields = seen_last(runs, own, 119), dict(steps=15, checkpoint__every=5, data__workers=workers) | own.fields
    run, aside = runs / 'vision_instruct', own.images.parent / 'aside'
    aside.mkdir()
    with process(runs, 'vision_instruct', log=log, **fields) as started:
        until(lambda: logged(run, 2))
        last[0].rename(aside / last[0].name)
        last[-1].write_bytes(last[-1].read_bytes()[:99])
        ends(started, 0, log, f'goes without example {last[0].stem}')
    told = list(runfolder.read_lines(run / 'skipped.jsonl'))
    assert {(line['row'], line['example']) for line in told} == {(119, int(file.stem)) for file in (last[0], last[-1])}
    wanted = micro.read(run)
    shutil.rmtree(run / 'checkpoints/15')
    if back:
        (aside / last[0].name).rename(last[0])
    with process(runs, 'vision_instruct', log=log, **fields) as started:
        ends(started, 0, log)
    micro.assert_same(micro.read(run), wanted)
    assert list(runfolder.read_lines(run / 'skipped.jsonl')) == told


def test_all_pictures_vanish(runs, own, log):
    run, fields = runs / 'vision_instruct', dict(steps=40, checkpoint__every=30) | own.fields
    with process(runs, 'vision_instruct', log=log, **fields) as started:
        until(lambda: logged(run, 2))
        own.images.rename(own.images.parent / 'aside')
        ends(started, 2, log, 'images is gone')
    at = runfolder.newest(run)
    assert at >= 2 and read_metrics(run / 'metrics.jsonl')[-1]['step'] == at
    (own.images.parent / 'aside').rename(own.images)
    with process(runs, 'vision_instruct', log=log, **fields) as started:
        ends(started, 0, log)


def test_a_picture_becomes_a_pipe_that_nobody_writes_to(runs, own, log):
    last, fields = seen_last(runs, own, 119)[0], dict(steps=15, data__timeout=3) | own.fields
    with process(runs, 'vision_instruct', log=log, **fields) as started:
        until(lambda: logged(runs / 'vision_instruct', 2))
        last.unlink()
        os.mkfifo(last)
        ends(started, 0, log, f'goes without example {last.stem}')


def test_a_picture_that_hangs(runs, own, log):
    last = seen_last(runs, own, 119)[0]
    fields = dict(steps=40, checkpoint__every=30, data__timeout=3) | own.fields
    with process(runs, 'vision_instruct', fault=f'hang {last.name}', log=log, **fields) as started:
        ends(started, 1, log, f'reading hangs for more than 3 s (data.timeout) at example {last.stem}, {last.name}')
    assert runfolder.newest(runs / 'vision_instruct') >= 2


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP])
def test_data_workers_that_end_or_stand_still(number, runs, whole, log):
    with process(runs, 'sft', log=log, data__workers=2, data__timeout=4) as started:
        until(lambda: logged(runs / 'sft', 1))
        for worker in children(started):
            os.kill(worker, number)
        ends(started, 0, log)
    micro.assert_same(micro.read(runs / 'sft'), micro.read(whole))
    assert told(runs / 'sft') == told(whole)


# Going on otherwise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'otherwise',
    [
        dict(data__workers=2),
        dict(devices=1),
        dict(mesh__data=1, mesh__fsdp=8),
        dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2),
        dict(devices=4, optim__accumulate=2),
    ],
    ids=str,
)
def test_killed_it_goes_on_with_other_devices_and_workers(otherwise, runs, whole, log):
    run = runs / 'sft'
    with process(runs, 'sft', log=log) as started:
        until(lambda: runfolder.whole_steps(run))
    with process(runs, 'sft', log=log, resume=True, **otherwise) as started:
        ends(started, 0, log)
    assert [line['tokens'] for line in told(run) if 'tokens' in line] == [
        line['tokens'] for line in told(whole) if 'tokens' in line
    ]
    losses = [[line['loss'] for line in told(at) if 'loss' in line] for at in (run, whole)]
    np.testing.assert_allclose(*losses, rtol=1e-4)  # bf16, summed in another order


def test_killed_it_goes_on_with_larger_batches_at_its_row(runs, log):
    run = runs / 'sft'
    with process(runs, 'sft', log=log) as started:
        until(lambda: runfolder.whole_steps(run))
    at = runfolder.newest(run)
    with process(runs, 'sft', log=log, resume=True, data__batch_size=16) as started:
        ends(started, 0, log)
    assert runfolder.manifest(run, STEPS)['position'] == at * 8 + (STEPS - at) * 16


# Long ----------------------------------------------------------------------------------------------------------------


def test_three_thousand_steps_leave_nothing_behind(runs, tmp_path):
    """Resident memory, threads, files and temporary folders, from step 1,000 on."""
    temporary = tmp_path / 'temporary'
    temporary.mkdir()
    command = [sys.executable, f'{ROOT}/tests/long_driver.py', str(runs)]
    # One arena of glibc for all threads: each other one keeps the last buffer of a step that its thread freed (20 MB
    # here), which `malloc_trim` does not give back, and which thread runs a step is chance.
    env = os.environ | {'TMPDIR': str(temporary), 'PYTHONPATH': str(ROOT), 'MALLOC_ARENA_MAX': '1'}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = {line['step']: line for line in map(json.loads, (runs / 'seen').read_text().splitlines())}
    before, after = ([seen[step] for step in range(start, start + 1001, 250)] for start in (1000, 2000))
    for what, most in (('resident', 1.01), ('threads', 1.2), ('files', 1.2)):  # a save may be under way
        assert max(at[what] for at in after) < most * max(at[what] for at in before), seen
    assert not list(temporary.iterdir())
    assert len(list((runs / 'vision_instruct/checkpoints').iterdir())) == 2
