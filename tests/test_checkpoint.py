"""Checkpoints: bit for bit, on other meshes, damaged, interrupted, and never touching what trains."""

import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from micro import assert_same

from nanovision_jax import config as configs
from nanovision_jax.errors import Failure, UserError
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.runs import checkpoint
from nanovision_jax.runs import folder as runfolder


def tree(seed=0, mesh=None):
    """A small state, on a mesh of all devices: matrices split, the rest replicated, one leaf bfloat16."""
    rng = np.random.default_rng(seed)
    mesh = mesh or parallel.make_mesh(configs.Mesh(1, 4, 2))

    def place(shape, dtype, *spec):
        return jax.device_put(jnp.asarray(rng.normal(size=shape), dtype), NamedSharding(mesh, P(*spec)))

    decoder = {'kernel': place((16, 24), 'float32', 'fsdp', 'tensor'), 'scale': place((7,), 'float32')}
    return {'decoder': decoder, 'vision': {'position': place((5, 3), 'bfloat16')}}


def save(run_dir, *steps, keep=9):
    """Checkpoints of tree(step) as parameters and tree(100 + step) as optimizer state."""
    writer = checkpoint.Checkpoints(run_dir, keep)
    for step in steps:
        writer.save(step, tree(step), tree(100 + step), {'position': 8 * step})
    writer.wait()
    return writer


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A run with the checkpoints 1, 2 and 3: read only."""
    folder = tmp_path_factory.mktemp('saved')
    save(folder, 1, 2, 3)
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(saved, tmp_path / 'run')


def step_folder(run_dir, step):
    return run_dir / 'checkpoints' / str(step)


# Saved and read back -------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_saved_bit_for_bit(saved):
    assert runfolder.newest(saved) == 3 and runfolder.whole_steps(saved) == [3, 2, 1]
    for item, seed in (('params', 2), ('optimizer', 102)):
        wanted = tree(seed)
        found = checkpoint.restore(saved, 2, item, checkpoint.like(wanted))
        assert_same(found, wanted)
        assert [leaf.sharding for leaf in jax.tree.leaves(found)] == [leaf.sharding for leaf in jax.tree.leaves(wanted)]


def test_the_manifest_names_every_file_and_the_position(saved):
    manifest, folder = runfolder.manifest(saved, 2), step_folder(saved, 2)
    assert (manifest['step'], manifest['position']) == (2, 16)
    files = {str(file.relative_to(folder)) for file in folder.rglob('*') if file.is_file()}
    assert set(manifest['files']) == files - {'manifest.json'}
    assert {name.split('/')[0] for name in manifest['files']} >= {'params', 'optimizer'}


def test_parameters_are_read_without_the_optimizer(run):
    shutil.rmtree(step_folder(run, 3) / 'optimizer')
    assert_same(checkpoint.restore(run, 3, 'params', checkpoint.like(tree())), tree(3))


def test_a_part_of_the_parameters_can_be_read_alone(saved):
    part = {'vision': tree()['vision']}
    assert_same(checkpoint.restore(saved, 3, 'params', checkpoint.like(part)), {'vision': tree(3)['vision']})


def test_eight_devices_save_and_one_reads(saved):
    one = SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tree())
    found = checkpoint.restore(saved, 3, 'params', target)
    assert_same(found, tree(3))
    assert {leaf.sharding for leaf in jax.tree.leaves(found)} == {one}


def test_another_mesh_reads_it_too(saved):
    other = tree(mesh=parallel.make_mesh(configs.Mesh(2, 2, 2)))
    found = checkpoint.restore(saved, 3, 'params', checkpoint.like(other))
    assert_same(found, tree(3))
    assert found['decoder']['kernel'].sharding == other['decoder']['kernel'].sharding


def test_the_digest_of_a_tree_changes_with_one_bit_and_with_a_name():
    one, other = tree(), tree()
    assert checkpoint.tree_digest(one) == checkpoint.tree_digest(other)
    assert checkpoint.tree_digest({'encoder': one['decoder']}) != checkpoint.tree_digest({'decoder': one['decoder']})
    other['decoder']['scale'] = other['decoder']['scale'].at[3].mul(1 + 2e-7)
    assert checkpoint.tree_digest(one) != checkpoint.tree_digest(other)


def test_the_digest_of_a_tree_changes_with_shape_and_dtype():
    zeros = [np.zeros(shape, dtype) for shape in ((2, 3), (3, 2), (6,)) for dtype in ('float32', 'int32')]
    zeros.append(jnp.zeros((2, 6), 'bfloat16'))  # as many bytes of zero as float32 [2, 3]
    assert len({checkpoint.tree_digest({'a': leaf}) for leaf in zeros}) == len(zeros)


def test_parameters_are_proven_without_reading_the_optimizer(run, monkeypatch):
    opened, digest = [], runfolder.file_digest
    monkeypatch.setattr(runfolder, 'file_digest', lambda file: opened.append(str(file)) or digest(file))
    assert runfolder.newest(run, 'params') == 3
    assert opened and not any('/optimizer/' in name for name in opened)


# What does not fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'leaf', 'message'),
    [
        ('scale', jnp.zeros(7, 'bfloat16'), r'decoder/scale in \S+ is float32 \[7\], and bfloat16 \[7\] is wanted'),
        ('scale', jnp.zeros(8), r'decoder/scale in \S+ is float32 \[7\], and float32 \[8\] is wanted'),
        ('bias', jnp.zeros(7), r'params has no decoder/bias\.'),
    ],
)
def test_another_dtype_shape_or_name_is_refused(saved, name, leaf, message):
    target = tree()
    target['decoder'][name] = leaf
    with pytest.raises(UserError, match=message):
        checkpoint.restore(saved, 3, 'params', checkpoint.like(target))


# Damage --------------------------------------------------------------------------------------------------------------


def data_files(run_dir, step):
    return sorted(name for name in runfolder.manifest(run_dir, step)['files'])


def flip(file, at=0.5):
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 1
    file.write_bytes(data)


def test_one_flipped_bit_in_any_file_is_seen(run, capsys):
    for name in data_files(run, 3):
        file = step_folder(run, 3) / name
        whole = file.read_bytes()
        if not whole:
            continue
        flip(file)
        assert runfolder.newest(run) == 2
        assert f'{file} is damaged, so checkpoint 3 is not used' in capsys.readouterr().err
        file.write_bytes(whole)
    assert runfolder.newest(run) == 3


@pytest.mark.parametrize(
    'fault',
    [
        'truncated',
        'gone',
        'bad manifest',
        'empty manifest',
        'no manifest',
        'another step',
        'lists nothing',
        'lists no parameters',
        'edited',
        'more files',
    ],
)
def test_a_damaged_checkpoint_is_passed_over(run, fault):
    file, manifest = step_folder(run, 3) / data_files(run, 3)[-1], step_folder(run, 3) / 'manifest.json'
    told = json.loads(manifest.read_text())
    if fault == 'truncated':
        file.write_bytes(file.read_bytes()[:-1])
    elif fault == 'gone':
        file.unlink()
    elif fault == 'no manifest':
        manifest.unlink()
    elif fault == 'another step':
        shutil.rmtree(step_folder(run, 3))
        shutil.copytree(step_folder(run, 1), step_folder(run, 3))
    elif fault.startswith('lists'):  # proven in itself, and yet it proves nothing
        manifest.unlink()
        kept = shutil.move(step_folder(run, 3) / 'params', run / 'params')
        if fault == 'lists nothing':
            shutil.rmtree(step_folder(run, 3) / 'optimizer')
        runfolder.write_manifest(step_folder(run, 3), {'step': 3, 'position': 24})
        shutil.move(kept, step_folder(run, 3) / 'params')
    elif fault == 'edited':
        manifest.write_text(json.dumps(told | {'position': 25}))
    elif fault == 'more files':
        (step_folder(run, 3) / 'params' / 'other').write_text('')
    else:
        manifest.write_text('[]' if fault == 'bad manifest' else '')
    assert runfolder.newest(run) == 2


def test_what_a_system_hides_in_a_folder_is_no_damage(run):
    (step_folder(run, 3) / 'params' / '.DS_Store').write_text('')
    assert runfolder.newest(run) == 3


def test_a_manifest_of_before_it_proved_itself_is_taken(run):
    manifest = step_folder(run, 3) / 'manifest.json'
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({name: told[name] for name in ('step', 'position', 'files')}))
    assert runfolder.newest(run) == 3
    runfolder.check_beside(run, 3)


def test_what_lies_beside_a_checkpoint_is_proven_too(tmp_path):
    run = tmp_path / 'run'
    (run / 'tokenizer').mkdir(parents=True)
    files = [run / 'config.json', run / 'tokenizer' / 'tokenizer.json']
    for file in files:
        file.write_text('{"a": 1}')
    save(run, 1)
    runfolder.check_beside(run, 1)
    for file in files:
        file.write_text('{"a": 2}')
        with pytest.raises(UserError, match=rf'{file} was changed after checkpoint 1 was written: bring it back'):
            runfolder.check_beside(run, 1)
        file.unlink()
        with pytest.raises(UserError, match=rf'{file} is missing after'):
            runfolder.check_beside(run, 1)
        file.write_text('{"a": 1}')
    files[0].write_text('{"a": 2}')  # as the next session wrote it
    (run / 'lineage.json').write_text(json.dumps({'sessions': [{'config': runfolder.file_digest(files[0])}]}))
    runfolder.check_beside(run, 1)


def test_where_all_are_damaged_it_is_an_error(run):
    for step in (1, 2, 3):
        flip(step_folder(run, step) / data_files(run, step)[0])
    with pytest.raises(UserError, match=r'every checkpoint in \S+ is damaged\.'):
        runfolder.newest(run)


def test_without_checkpoints_there_is_no_newest(tmp_path):
    assert runfolder.newest(tmp_path) is None


def test_a_damaged_checkpoint_is_written_again(run):
    flip(step_folder(run, 3) / data_files(run, 3)[0])
    save(run, 3)
    assert runfolder.newest(run) == 3
    assert_same(checkpoint.restore(run, 3, 'params', checkpoint.like(tree())), tree(3))


# Keeping and replacing -----------------------------------------------------------------------------------------------


def test_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert runfolder.whole_steps(tmp_path) == [4, 3]
    assert sorted(folder.name for folder in (tmp_path / 'checkpoints').iterdir()) == ['3', '4']


def test_a_damaged_later_one_does_not_push_out_the_only_good_one(run):
    """The run went on from 1, as 2 and 3 were damaged: of what is whole, only the new one is not older."""
    save(run, 4)
    for step in (3, 4):
        flip(step_folder(run, step) / data_files(run, step)[0])
    save(run, 2, keep=1)
    assert runfolder.newest(run) == 2
    assert_same(checkpoint.restore(run, 2, 'params', checkpoint.like(tree())), tree(2))


def test_an_interrupted_save_is_ignored_and_replaced(run):
    for name in ('4', '4.orbax-checkpoint-tmp', '40.orbax-checkpoint-tmp'):
        shutil.copytree(step_folder(run, 2) / 'params', run / 'checkpoints' / name / 'params')
    assert runfolder.newest(run) == 3
    save(run, 4)
    assert runfolder.newest(run) == 4
    assert_same(checkpoint.restore(run, 4, 'optimizer', checkpoint.like(tree())), tree(104))
    assert not (run / 'checkpoints' / '4.orbax-checkpoint-tmp').exists()


def test_what_was_half_removed_or_half_written_goes_at_the_next_start(run):
    (step_folder(run, 1) / 'manifest.json').unlink()
    (run / 'checkpoints' / '7.orbax-checkpoint-tmp' / 'params').mkdir(parents=True)
    (run / 'checkpoints' / 'notes').mkdir()  # of the user's
    checkpoint.Checkpoints(run, 9)
    assert sorted(f.name for f in (run / 'checkpoints').iterdir()) == ['2', '3', 'notes']


def test_a_step_is_not_mistaken_for_one_that_begins_with_its_digits(tmp_path):
    save(tmp_path, 10, 12, 1)
    assert runfolder.whole_steps(tmp_path) == [12, 10, 1]


# While training goes on ----------------------------------------------------------------------------------------------


def test_a_save_neither_holds_nor_changes_what_trains(tmp_path):
    """The step is given the state's memory back while the background still writes."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        return jax.tree.map(lambda x: x * 1.5 + 1, state)

    def start():  # large enough that the writing outlasts a few steps
        sharding = tree()['decoder']['kernel'].sharding
        return step([{'kernel': jax.device_put(np.full((1024, 1024), i, np.float32), sharding)} for i in range(2)])

    state, writer, written = start(), checkpoint.Checkpoints(tmp_path, 9), []
    for number in range(1, 4):
        written.append(jax.tree.map(lambda x: np.array(x, copy=True), state))
        writer.save(number, *state, {})
        for _ in range(3):
            state = step(state)
    writer.wait()
    alone = start()
    for _ in range(9):
        alone = step(alone)
    assert_same(state, alone)
    for number, items in enumerate(written, 1):
        for item, wanted, like in zip(('params', 'optimizer'), items, checkpoint.like(state), strict=True):
            assert_same(checkpoint.restore(tmp_path, number, item, like), wanted)


@pytest.mark.parametrize('fault', ['folder', 'data', 'manifest', 'room', 'gone'])
def test_a_save_that_fails_is_said_and_done_again(fault, tmp_path, monkeypatch, capsys):
    run = tmp_path / 'run'
    run.mkdir()
    writer = save(run, 1)
    said = 'No space left on device'

    def full(*_, **__):
        raise OSError(28, said)

    with monkeypatch.context() as patch:
        if fault == 'folder':
            patch.setattr(checkpoint.tempfile, 'TemporaryFile', full)
        elif fault == 'data':  # as TensorStore says it, in a thread of Orbax's
            told = ValueError(f'RESOURCE_EXHAUSTED: Error writing "a": Failed: "x" [OS error 28: ENOSPC {said}]')
            patch.setattr(writer._writer, 'wait_until_finished', lambda: (_ for _ in ()).throw(told))
        elif fault == 'manifest':
            patch.setattr(checkpoint, 'write_manifest', full)
        elif fault == 'room':
            patch.setattr(checkpoint.shutil, 'disk_usage', lambda _: types.SimpleNamespace(free=100))
            said = 'it takes 0 MB, and 0 MB are free'
        else:
            run.rename(tmp_path / 'aside')
            said = 'the run folder is gone'
        assert not writer.due()
        writer.save(2, tree(2), tree(102), {})
        assert not writer.wait() and not writer.due()
        if fault == 'gone':
            assert not run.exists()
            (tmp_path / 'aside').rename(run)
    kept = 'there is none yet' if fault == 'gone' else 'the last one is step 1'
    assert f'{said}; {kept}, and the next try is in 1 s' in capsys.readouterr().err
    assert runfolder.newest(run) == 1 and [f.name for f in (run / 'checkpoints').iterdir()] == ['1']
    later = checkpoint.time.monotonic() + 2
    monkeypatch.setattr(checkpoint.time, 'monotonic', lambda: later)
    assert writer.due()
    writer.save(2, tree(2), tree(102), {})
    assert writer.wait() and not writer.due() and runfolder.newest(run) == 2


def test_after_the_last_try_it_is_a_failure(tmp_path, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(checkpoint.time, 'sleep', waited.append)
    monkeypatch.setattr(checkpoint, 'TRIES', 4)
    writer = save(tmp_path, 1)
    monkeypatch.setattr(checkpoint.shutil, 'disk_usage', lambda _: types.SimpleNamespace(free=0))

    def again():
        writer.save(2, tree(2), tree(102), {})

    again()
    with pytest.raises(Failure, match=r'try 4 of 4; the last one is step 1\.') as failed:
        writer.until_saved(again)
    assert waited == [1, 2, 4] and failed.value.code == 1 and capsys.readouterr().err.count('warning') == 3


def test_the_manifest_is_written_last(tmp_path, monkeypatch):
    seen, write = [], checkpoint.write_manifest

    def look(folder, content):
        seen.append((runfolder.newest(tmp_path), (folder / 'params').is_dir(), (folder / 'optimizer').is_dir()))
        write(folder, content)

    monkeypatch.setattr(checkpoint, 'write_manifest', look)
    save(tmp_path, 1)
    assert seen == [(None, True, True)]
    assert json.loads((step_folder(tmp_path, 1) / 'manifest.json').read_text())['step'] == 1
