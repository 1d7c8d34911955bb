"""The cache of the tower's features: its numbers, what it depends on, and that a part of it is never taken as whole."""

import contextlib
import dataclasses
import pickle
import shutil
import types

import jax
import jax.numpy as jnp
import micro
import ml_dtypes
import numpy as np
import pytest

from nanovision_jax import config as configs
from nanovision_jax import models
from nanovision_jax.data import features, pipeline
from nanovision_jax.errors import UserError
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.runs.metrics import read_metrics
from nanovision_jax.training import features as making
from nanovision_jax.training import loop as train
from nanovision_jax.training import prefetch

KEPT = ('bf16', 'int8')
pytestmark = pytest.mark.usefixtures('quick', 'unsampled')


@pytest.fixture(scope='module')
def parents(tmp_path_factory, tiny_family):
    """A family whose sft and clip never learned."""
    family = micro.family(tmp_path_factory.mktemp('parents'), tiny_family)
    for stage in ('sft', 'clip'):
        micro.parent_run(family, stage)
    return family


@pytest.fixture
def family(parents, tmp_path):
    return shutil.copytree(parents, tmp_path / 'family', symlinks=True)


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def road(parents, tmp_path_factory, unsampled):
    """{data.cache_features: a family with both vision stages}, and the names of features folders after each stage."""
    families, folders = {}, {}
    for kept in ('', *KEPT):
        families[kept] = family = tmp_path_factory.mktemp('road') / 'family'
        shutil.copytree(parents, family, symlinks=True)
        for stage in ('vision_pretrain', 'vision_instruct'):
            train.train(micro.run_config(stage, family, steps=8, data__cache_features=kept))
            folders[kept, stage] = sorted(file.name for file in family.glob('features/*'))
    return families, folders


@pytest.mark.parametrize('stage', ['vision_pretrain', 'vision_instruct'])
@pytest.mark.parametrize('kept, close', [('bf16', 2e-3), ('int8', 2e-3)])
def test_losses_are_those_of_pictures(road, stage, kept, close):
    plain, other = (read_metrics(road[0][name] / stage / 'metrics.jsonl') for name in ('', kept))
    for name in ('loss', 'eval_loss'):
        losses, found = ([line[name] for line in lines if name in line] for lines in (plain, other))
        assert len(losses) == (8 if name == 'loss' else 2)
        assert found != losses and found == pytest.approx(losses, rel=close)


def test_the_tower_is_in_the_checkpoint_untouched(road):
    towers = [micro.read(road[0][kept] / 'vision_instruct')['params']['vision'] for kept in ('', *KEPT)]
    micro.assert_same(towers[1], towers[0])
    micro.assert_same(towers[2], towers[0])


def test_stage_4_reads_what_stage_3_made(road):
    for kept in KEPT:
        (folder,) = road[1][kept, 'vision_pretrain']
        assert len(folder) == 16  # no .part
        assert road[1][kept, 'vision_instruct'] == road[1][kept, 'vision_pretrain']
    assert road[1]['', 'vision_instruct'] == []


def test_lineage_says_what_was_read_and_other_features_are_refused(road, tmp_path):
    family = shutil.copytree(road[0]['bf16'], tmp_path / 'family', symlinks=True)
    told = runfolder.read_lineage(family / 'vision_instruct')['rows']['packing']
    assert told.endswith(", the tower's features in bf16")
    for kept in ('int8', ''):
        cfg = micro.run_config('vision_instruct', family, steps=9, data__cache_features=kept)
        with pytest.raises(UserError, match=r'other rows than it began with \(packing changed\)'):
            train.train(cfg, resume=True)


# Making them ---------------------------------------------------------------------------------------------------------


class Made:
    """A run of vision_pretrain that is about to make its features: keep() does it."""

    def __init__(self, family, **fields):
        self.config = micro.run_config('vision_pretrain', family, **{'data__cache_features': 'bf16'} | fields)
        self.tokenizer = pipeline.family_tokenizer(self.config)
        self.rows = self.opened()
        self.graphdef, self.params = micro.model(self.config, self.tokenizer)
        self.mesh = parallel.make_mesh(configs.Mesh())

    def opened(self):
        return pipeline.open_rows(self.config, self.tokenizer)[0]

    def keep(self):
        params = jax.device_put(self.params, parallel.shardings(self.params, self.mesh))
        with jax.set_mesh(self.mesh):
            return making.keep(self.config, self.rows, self.graphdef, params, self.mesh)

    def key(self):
        return making._key(self.config, self.rows, self.params['vision'])


@pytest.fixture
def made(family):
    return Made(family)


@pytest.mark.parametrize('kept, mesh', [('bf16', (8, 1, 1)), ('int8', (2, 2, 2))])
def test_a_row_holds_the_features_of_its_pictures(made, kept, mesh):
    made.config.data.cache_features, made.mesh = kept, parallel.make_mesh(configs.Mesh(*mesh))
    plain = made.opened()
    made.rows.use_features(made.keep())
    tower = jax.jit(lambda params, images: models.merge(made.graphdef, params).tower_features(images))
    for i in range(5):
        row, pictures = made.rows[i], plain[i]['images']
        shown = pictures.any(axis=(1, 2, 3))
        expected = np.asarray(tower(made.params, pictures), np.float32)[shown]
        found = row['features'].astype(np.float32)
        if kept == 'int8':
            assert row['features'].dtype == np.int8 and row['scales'].shape == (2, 4)
            assert (np.abs(row['features'][shown]).max(axis=-1) == 127).all()
            found *= row['scales'][..., None]
            bound = row['scales'][shown][..., None] * 0.51
        else:
            assert row['features'].dtype == ml_dtypes.bfloat16
            bound = np.abs(expected) * 2**-8 + 1e-5
        assert (np.abs(found[shown] - expected) <= bound).all() and shown.any()
        assert not found[~shown].any()


def test_workers_map_the_files_again(made):
    made.rows.use_features(made.keep())
    assert len(pickle.dumps(made.rows.features)) < 2000 < (made.rows.features.folder / 'features.npy').stat().st_size
    streams = [pipeline.batches(made.rows, 4, 3, workers) for workers in (0, 2)]
    for _ in range(4):
        micro.assert_same(*map(next, streams))


def test_what_runs_on_features_counts_no_picture_as_work(made):
    made.rows.use_features(made.keep())
    with jax.set_mesh(made.mesh):
        for rows, seen in ((made.rows, False), (made.opened(), True)):
            _, work = next(prefetch.prefetch(pipeline.batches(rows, 8), made.mesh))
            assert (work['images'] > 0) == seen and work['tokens'] > work['learned'] > 0


def test_another_tower_picture_or_number_is_another_cache(family):
    def key(change=None, **fields):
        run = Made(family, **fields)
        if change:
            change(run)
        return run.key()

    def shift(run):
        run.params['vision']['patch']['kernel'] = run.params['vision']['patch']['kernel'].at[0, 0].add(1e-6)

    def bad(run):
        run.rows.index = dataclasses.replace(run.rows.index, rows=run.rows.index.rows[1:])

    vision = {'fit': 'pad', 'resample': 'bilinear', 'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.4)}
    changes = [lambda run, at=at: setattr(run.config.model.vision, *at) for at in vision.items()]
    keys = [key(), key(shift), key(bad), *map(key, changes)]
    keys += [key(dtype='bfloat16'), key(data__cache_features='int8'), key(data__draft=True)]
    keys += [key(lambda run: setattr(run.rows, 'source', types.SimpleNamespace(pictures='others')))]
    assert len(set(keys)) == len(keys) and key() == keys[0] == key(seed=7, data__batch_size=16, data__open_rows=3)


class Cut(Exception):
    """The power failed."""


@contextlib.contextmanager
def cut(after):
    """A context in which the power fails at the write after so many."""
    write, count = features.Unfinished.write, iter(range(after))

    def failing(self, arrays):
        if next(count, None) is None:
            raise Cut
        write(self, arrays)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        patch.setattr(features.Unfinished, 'write', failing)
        yield


def test_interrupted_twice_they_end_the_same(family, made, capsys):
    alone = made.keep()
    wanted = (alone.folder / 'features.npy').read_bytes()
    shutil.rmtree(family / 'features')
    for done, after in ((0, 2), (32, 1), (48, None)):
        if after is None:
            folder = made.keep().folder
        else:
            with cut(after):
                made.keep()
            assert [file.name for file in alone.folder.parent.iterdir() if len(file.name) > 4] == [
                f'{alone.folder.name}.part'
            ]
        said = capsys.readouterr().out
        assert (f'{done} are there, the others are made now' in said) == (done > 0)
    assert folder == alone.folder and (folder / 'features.npy').read_bytes() == wanted
    assert [file.name for file in folder.iterdir()] == ['features.npy']
    made.keep()
    assert 'they are there' in capsys.readouterr().out


def test_what_was_written_and_not_recorded_is_made_again(made, monkeypatch):
    """Killed, a process records nothing more."""
    with cut(2), monkeypatch.context() as patch:
        patch.setattr(features.Unfinished, 'record', lambda self: None)
        made.keep()
    count = len(features.Pictures(made.rows))
    vision = made.config.model.vision
    folder = made.config.family / 'features' / made.key()
    assert features.Unfinished(folder, count, vision, 'bf16').done == 0
    assert np.asarray(made.keep().of(0)[0]['features'], np.float32).any()


def test_a_disk_without_room_is_refused_before_anything_is_made(made, monkeypatch):
    free = types.SimpleNamespace(free=10_000)
    monkeypatch.setattr(features.shutil, 'disk_usage', lambda _: free)
    count = len(features.Pictures(made.rows))
    size = count * 4 * 32 * 2
    with pytest.raises(UserError) as error:
        train.train(made.config)
    assert f'the features of {count} pictures need {size / 1e6:.3g} MB more in' in str(error.value)
    assert '0.01 MB are free' in str(error.value) and '\n' not in str(error.value)
    assert not list(made.config.family.glob('features/*'))
    assert not (made.config.family / 'vision_pretrain').exists()
    free.free = size
    made.keep()


def test_the_size_of_a_published_set_is_known(tmp_path):
    large = configs.Vision(image_size=224, patch_size=14, width=1024)
    sizes = [features.Unfinished(tmp_path / 'x', 521_000, large, kept).bytes for kept in KEPT]
    assert list(map(features.told, sizes)) == ['273 GB', '137 GB']


def test_damaged_features_are_refused(made):
    kept = made.keep()
    file = kept.folder / 'features.npy'
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r'is damaged .*: delete it, and it is made again'):
        made.keep()


def test_without_pictures_there_is_nothing_to_keep(made):
    made.rows.index.images[:] = 0
    with pytest.raises(UserError, match='no picture whose features could be kept'):
        made.keep()


def test_an_empty_patch_stays_empty():
    found = making.encode(jnp.zeros((1, 2, 3)).at[0, 1].set(jnp.array([-4.0, 1.0, 0.0])), 'int8')
    assert found['features'].tolist() == [[[0, 0, 0], [-127, 32, 0]]]
    np.testing.assert_allclose(found['scales'], [[0, 4 / 127]], rtol=1e-6)
