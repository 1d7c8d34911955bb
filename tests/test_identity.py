"""What rows say of themselves: the same where row i is the same, whatever folder it lies in; else what differs."""

import shutil
import zipfile

import pytest
from conftest import parse

from nanovision_jax.data import packing, pipeline

SIZES, WEIGHTS = (1000, 60, 300), (0.7, 0.1, 0.2)


def identity(folder, stage, tokenizer, *overrides, split='train', name='x.json'):
    place = [f'run_dir={folder}/runs/{stage}', f'data.path={folder}/{name}', 'data.source=conversations']
    place = [f'run_dir={folder}/runs/{stage}', f'data.path={folder}', 'data.source=text'] if name == '' else place
    config = parse(stage, 'data.length=128', *place, *overrides)
    return pipeline.open_rows(config, tokenizer, split)[0].identity()


@pytest.fixture
def kept(llava_folder, tmp_path):
    """A folder with conversations, pictures and a text: moved, changed, and asked who it is."""
    folder = tmp_path / 'kept'
    folder.mkdir()
    shutil.copy(llava_folder / 'pretrain.json', folder / 'x.json')
    shutil.copy(llava_folder / 'images.zip', folder / 'images.zip')
    (folder / 'play.txt').write_text('the cat sees a dog\n' * 500)
    return folder


@pytest.mark.parametrize('stage, name', [('vision_pretrain', 'x.json'), ('clip', 'x.json'), ('pretrain', '')])
def test_moved_rows_keep_their_identity(kept, tokenizer, stage, name):
    before = identity(kept, stage, tokenizer, name=name)
    assert set(before) == {'data', 'order', 'packing'} and all(len(text) < 200 for text in before.values())
    indexed = sorted(file.name for file in (kept / 'runs/data').iterdir())
    moved = kept.rename(kept.parent / 'moved')
    assert identity(moved, stage, tokenizer, name=name) == before
    assert sorted(file.name for file in (moved / 'runs/data').iterdir()) == indexed  # nothing is read again
    assert not any(str(kept.parent) in text for text in before.values())


@pytest.mark.parametrize('stage', ['vision_pretrain', 'clip', 'pretrain'])
@pytest.mark.parametrize('override, part', [('seed=5', 'order'), ('data.length=100', 'packing')])
def test_a_changed_config_changes_its_part_of_the_identity(kept, tokenizer, stage, override, part):
    name = '' if stage == 'pretrain' else 'x.json'
    one, other = identity(kept, stage, tokenizer, name=name), identity(kept, stage, tokenizer, override, name=name)
    changed = {key for key in one if one[key] != other[key]}
    assert part in changed and changed <= ({part, 'order'} if stage == 'pretrain' else {part})  # windows are fewer


def test_slots_augmentation_and_reduced_pictures_are_packing(kept, tokenizer):
    for stage, override in (
        ('vision_pretrain', 'data.slots=7'),
        ('vision_pretrain', 'data.open_rows=17'),
        ('clip', 'data.augment=True'),
        ('clip', 'data.draft=True'),
    ):
        one, other = identity(kept, stage, tokenizer), identity(kept, stage, tokenizer, override)
        assert [key for key in one if one[key] != other[key]] == ['packing']


def test_changed_data_changes_the_identity(kept, tokenizer):
    """A word, a picture of the zip, of a folder, a text, and which examples are bad."""

    def data(stage='vision_pretrain', **options):
        return identity(kept, stage, tokenizer, **options)['data']

    seen = [data()]
    (kept / 'x.json').write_text((kept / 'x.json').read_text().replace('cat', 'cow', 1))
    seen.append(data())
    with zipfile.ZipFile(kept / 'images.zip') as file:
        members = {name: file.read(name) for name in file.namelist()}
        file.extractall(kept / 'pictures')
    name, other = list(members)[:2]
    members[name] = members[other]
    with zipfile.ZipFile(kept / 'images.zip', 'w') as file:
        for key, value in members.items():
            file.writestr(key, value)
    seen.append(data())
    (kept / 'images.zip').unlink()
    (kept / 'pictures').rename(kept / 'images')
    seen.append(data())
    (kept / 'images' / name).write_bytes(members[other])
    seen.append(data())
    texts = [data('pretrain', name='')]
    (kept / 'play.txt').write_text('the dog sees a cat\n' * 499)
    texts.append(data('pretrain', name=''))
    assert len(set(seen)) == 5 and len(set(texts)) == 2


def test_a_mixture_has_its_shares_in_its_order():
    orders = [packing.Mixed(SIZES, weights, 3).identity() for weights in (WEIGHTS, (0.6, 0.2, 0.2))]
    orders += [packing.Mixed((1000, 61, 300), WEIGHTS, 3).identity(), packing.Mixed(SIZES, WEIGHTS, 4).identity()]
    orders.append(packing.Mixed(SIZES, WEIGHTS, 3, shuffle=False).identity())
    assert len(set(orders)) == 5 and packing.Mixed(SIZES, WEIGHTS, 3).identity() == orders[0]
