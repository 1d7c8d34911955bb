"""checkpoint.mirror: a run that goes on elsewhere, from an object store, with the bits it would have had."""

import shutil
import threading

import fsspec
import micro
import pytest

from nanovision_jax.errors import UserError
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.runs import mirror
from nanovision_jax.runs.metrics import read_metrics
from nanovision_jax.training import loop as train

pytestmark = pytest.mark.usefixtures('unsampled')


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(mirror, 'PAUSE', 0.01)
    yield
    fsspec.filesystem('memory').store.clear()


def config(family, place, **fields):
    fields = dict(steps=6, checkpoint__every=2, checkpoint__mirror=place, name=family.name) | fields
    return micro.run_config('sft', family, **fields)


def as_before(run, wanted):
    micro.assert_same(micro.read(run), micro.read(wanted))
    kept = [[line.get(k) for k in ('step', 'loss', 'eval_loss')] for line in read_metrics(run / 'metrics.jsonl')]
    assert kept == [
        [line.get(k) for k in ('step', 'loss', 'eval_loss')] for line in read_metrics(wanted / 'metrics.jsonl')
    ]


class Killed(BaseException):
    """The machine is gone."""


def trains_until(step, cfg, monkeypatch):
    """Trains until a step's checkpoint is in the mirror, and no further."""
    save = train.checkpoint.Checkpoints.save

    def saves(self, at, *args):
        save(self, at, *args)
        if at == step:
            self.wait()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train.checkpoint.Checkpoints, 'save', saves)
        with pytest.raises(Killed):
            train.train(cfg)


@pytest.mark.parametrize('store', ['memory', pytest.param('s3', marks=pytest.mark.slow)])
def test_a_run_goes_on_elsewhere_bit_for_bit(store, family, tmp_path, monkeypatch, request):
    place = request.getfixturevalue('bucket') if store == 's3' else 'memory://runs/mine'
    here, there, alone = (tmp_path / name / 'x' for name in ('here', 'there', 'alone'))
    for folder in (here, alone):
        shutil.copytree(family, folder, symlinks=True)
    train.train(config(alone, ''))
    trains_until(4, config(here, place), monkeypatch)
    shutil.copytree(family, there, symlinks=True)
    cfg = config(there, place)
    mirror.fetch(cfg)
    assert runfolder.newest(there / 'sft') == 4
    train.train(cfg)
    as_before(there / 'sft', alone / 'sft')
    # And the mirror holds all that a third machine needs, and no more than was kept.
    third = tmp_path / 'third' / 'x'
    mirror.fetch(config(shutil.copytree(family, third, symlinks=True), place))
    as_before(third / 'sft', alone / 'sft')
    assert runfolder.read_lineage(third / 'sft')['finished'] == 6
    files, root = fsspec.core.url_to_fs(f'{place}/x/sft')
    assert mirror._steps(files, root) == runfolder.whole_steps(there / 'sft') == [6, 4]


def test_what_a_stage_starts_from_is_fetched_without_its_optimizer(family, tmp_path):
    here, there = tmp_path / 'here' / 'x', tmp_path / 'there' / 'x'
    shutil.copytree(family, here, symlinks=True)
    train.train(config(here, 'memory://m'))
    (there).mkdir(parents=True)
    fields = dict(checkpoint__mirror='memory://m', name='x', init_from='../sft')
    cfg = micro.run_config('vision_pretrain', here, **fields)
    cfg.run_dir = str(there / 'vision_pretrain')
    mirror.fetch(cfg)
    assert runfolder.newest(there / 'sft', 'params') == 6 and runfolder.check_beside(there / 'sft', 6) is None
    assert (
        not list(there.glob('sft/checkpoints/*/optimizer')) and runfolder.read_lineage(there / 'sft')['finished'] == 6
    )


def test_a_store_that_fails_is_tried_again_and_no_failure_of_the_run(family, tmp_path, monkeypatch, capsys):
    folder, failing = shutil.copytree(family, tmp_path / 'x', symlinks=True), threading.Event()
    memory = type(fsspec.filesystem('memory'))
    put, tries = memory.put_file, []

    def puts(self, local, remote, **options):
        tries.append(remote)
        if failing.is_set() or len(tries) in (1, 5, 9):
            raise OSError('503 slow down')
        put(self, local, remote, **options)

    monkeypatch.setattr(memory, 'put_file', puts)
    train.train(config(folder, 'memory://m'))
    said = capsys.readouterr().err
    assert 'not copied to memory://m/x/sft (503 slow down); it is tried again' in said and 'is behind' not in said
    files, root = fsspec.core.url_to_fs('memory://m/x/sft')
    assert mirror._steps(files, root) == [6, 4]
    failing.set()
    train.train(config(folder, 'memory://other'))  # it is finished, and there is nothing but to copy it
    assert 'memory://other/x/sft is behind' in capsys.readouterr().err


def test_a_manifest_is_the_last_that_comes_both_ways(family, tmp_path, monkeypatch):
    """A machine that is lost amid a copy leaves no checkpoint that cannot be gone on from."""
    folder = shutil.copytree(family, tmp_path / 'x', symlinks=True)
    memory, seen = type(fsspec.filesystem('memory')), {'put_file': [], 'get_file': []}
    for name, found in seen.items():
        done = getattr(memory, name)

        def noted(self, source, target, done=done, found=found, **options):
            found.append(str(target if found is seen['put_file'] else source))
            done(self, source, target, **options)

        monkeypatch.setattr(memory, name, noted)
    train.train(config(folder, 'memory://m', steps=2))
    other = shutil.copytree(family, tmp_path / 'other' / 'x', symlinks=True)
    mirror.fetch(config(other, 'memory://m', steps=2))
    for found in seen.values():
        first = next(i for i, name in enumerate(found) if name.endswith('/manifest.json'))
        before = {name.rpartition('/')[2] for name in found[:first]}
        assert {'config.json', 'lineage.json', 'metrics.jsonl', 'tokenizer.json'} <= before


def test_a_mirror_keeps_a_whole_checkpoint_until_it_has_a_newer_one(family, tmp_path, monkeypatch):
    """Also where a checkpoint is removed here while it is copied; and parts of copies that were cut off go."""
    folder = shutil.copytree(family, tmp_path / 'x', symlinks=True)
    cfg = config(folder, 'memory://m', checkpoint__keep=3)
    train.train(cfg)
    run, (files, root) = folder / 'sft', fsspec.core.url_to_fs('memory://m/x/sft')
    assert mirror._steps(files, root) == [6, 4, 2]
    newer = shutil.copytree(run / 'checkpoints/6', run / 'checkpoints/8')
    for step in (4, 6):
        shutil.rmtree(run / f'checkpoints/{step}')
    copies, put = mirror.Mirror(cfg), mirror.Mirror._put

    def gone(self, file, name):
        if 'checkpoints/8' in name and newer.exists():
            newer.rename(tmp_path / 'aside')
        put(self, file, name)

    def no_bucket(self, file, name):
        raise FileNotFoundError('The specified bucket does not exist')

    with monkeypatch.context() as patch:
        patch.setattr(mirror.Mirror, '_put', no_bucket)
        with pytest.raises(FileNotFoundError, match='bucket'):  # which is said, and tried again
            copies._copy()

    with monkeypatch.context() as patch:
        patch.setattr(mirror.Mirror, '_put', gone)
        copies._copy()
    assert mirror._steps(files, root) == [6, 4, 2] and copies._new.is_set()
    files.pipe(f'{root}/checkpoints/7/params/half', b'x')
    (tmp_path / 'aside').rename(newer)
    copies._copy()
    assert mirror._steps(files, root) == [8, 2] and not files.find(f'{root}/checkpoints/7')


def test_what_a_mirror_holds_is_not_mixed_with_another_run(family, tmp_path):
    folder = shutil.copytree(family, tmp_path / 'x', symlinks=True)
    train.train(config(folder, 'memory://m'))
    other = shutil.copytree(family, tmp_path / 'other' / 'x', symlinks=True)
    train.train(config(other, '', steps=4, seed=5))
    with pytest.raises(UserError, match='holds another run than'):
        mirror.fetch(config(other, 'memory://m'))
    before = (other / 'sft/lineage.json').read_text()
    cfg = config(other, 'memory://m')
    cfg.stage, cfg.run_dir = 'vision_pretrain', str(other / 'vision_pretrain')  # would start from the run that is here
    mirror.fetch(cfg)
    assert (other / 'sft/lineage.json').read_text() == before and runfolder.whole_steps(other / 'sft') == [4, 2]
    with pytest.raises(UserError, match='holds this run: remove it there'):
        mirror.fetch(config(folder, 'memory://m'), anew=True)
    with pytest.raises(UserError, match=r"'nothing://x' cannot be opened"):
        mirror.fetch(config(folder, 'nothing://x'))
    mirror.fetch(config(folder, 'memory://empty'))
