"""The benchmarks: what they print is what they measured, and PyTorch's side does the same work as ours."""

import importlib
import json
import os
import pathlib
import runpy
import subprocess
import sys
import types

import jax
import micro
import numpy as np
import pytest
from conftest import ROOT

from nanovision_jax import config as configs
from nanovision_jax import models
from nanovision_jax.data.batch import fake_batch
from nanovision_jax.errors import UserError
from nanovision_jax.parallel import hardware
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.training import optim
from nanovision_jax.training.step import abstract_state, make_train_step


@pytest.mark.parametrize('stage', ['pretrain', 'vision_instruct'])
def test_the_benchmark_of_the_step_prints_what_it_measured(stage, monkeypatch, capsys):
    monkeypatch.setattr(hardware, 'peak_flops', lambda: (1e12, 'a figure for tests'))
    small = ['data.batch_size=8', 'data.length=64', 'data.slots=2', 'data.vocab_size=128', 'model.layers=1']
    small += ['model.width=32', 'model.heads=2', 'model.ffn=32', 'model.positions=64', 'dtype=float32']
    small += ['model.vision.image_size=16', 'model.vision.patch_size=8', 'model.vision.layers=2']
    argv = [f'--config={ROOT}/configs/{stage}.py:tiny', '--steps=3', *(f'--config.{field}' for field in small)]
    runpy.run_path(str(ROOT / 'scripts/benchmarks/train.py'))['main'](argv)
    found = json.loads(capsys.readouterr().out)
    names = 'stage size parameters batch attention remat accumulate step_seconds tokens_per_second images_per_second '
    names += 'mfu mfu_of compile_seconds peak_device_bytes loss devices versions'
    assert list(found) == names.split() and found['parameters'] > 1e4
    assert (found['stage'], found['size'], found['mfu_of']) == (stage, 'tiny', 'a figure for tests')
    assert found['batch']['tokens'] == [8, 64] and ('images' in found['batch']) == (stage == 'vision_instruct')
    assert found['images_per_second'] == pytest.approx(
        16 / found['step_seconds'] * ('images' in found['batch']), rel=0.05
    )
    assert found['tokens_per_second'] > 0 and found['mfu'] >= 0 and found['compile_seconds'] > 0
    assert 3 < found['loss'] < 7  # of 128 words, nearly: log(128) is 4.9
    assert found['versions'].keys() == {'jax', 'optax'}


def test_pytorchs_step_is_the_same_step(monkeypatch):
    """From our parameters the decoder of torch_step.py comes to our losses, through two steps of AdamW."""
    torch = pytest.importorskip('torch')
    monkeypatch.syspath_prepend(ROOT / 'scripts/benchmarks')
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    peer = importlib.import_module('torch_step')
    cfg, size = micro.config('pretrain'), micro.TOKENIZER.size
    cfg.optim = configs.Optim('adamw', 1e-2, 1e-2, warmup=0.0, weight_decay=0.5, clip_norm=0.1)
    graphdef, params = micro.params(cfg)
    model, host = peer.Decoder(cfg.model, size), fake_batch(cfg, size)
    host['segments'] = np.ones_like(host['segments'])  # theirs does not keep documents apart
    batch = [torch.from_numpy(host[name]).long() for name in ('tokens', 'targets', 'positions')]

    theirs = {'embedding.weight': params['embedding']['embedding'], 'head.weight': params['head']['kernel'].T}
    theirs |= {f'norm.{new}': params['norm'][old] for new, old in (('weight', 'scale'), ('bias', 'bias'))}
    for i, block in enumerate(models.merge(*models.unstack(graphdef, params)).blocks):
        for norm in ('attention_norm', 'ffn_norm'):
            theirs |= {f'blocks.{i}.{norm}.weight': getattr(block, norm).scale[...]}
            theirs |= {f'blocks.{i}.{norm}.bias': getattr(block, norm).bias[...]}
        width = cfg.model.width
        theirs[f'blocks.{i}.qkv.weight'] = block.qkv.kernel[...].reshape(width, 3 * width).T
        theirs[f'blocks.{i}.out.weight'] = block.out.kernel[...].reshape(width, width).T
        theirs[f'blocks.{i}.out.bias'] = block.out.bias[...]
        theirs |= {f'blocks.{i}.{name}.weight': getattr(block, name).kernel[...].T for name in ('ffn_in', 'ffn_out')}
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in theirs.items()})

    optimizer = optim.make_optimizer(cfg.optim, 10)
    step = make_train_step(cfg, graphdef, optimizer, None)
    state = {'params': params, 'optimizer': optimizer.init(params)}
    peer_step, losses = peer.make_step(cfg, model, 'eager'), []
    for parts in (1, 2, 1):
        state, metrics = step(state, host)
        losses.append((float(metrics['loss']), float(peer_step(batch, parts))))
    assert losses[0][0] > losses[1][0] + 0.01 > losses[2][0] + 0.02
    for ours, pytorchs in losses:
        assert pytorchs == pytest.approx(ours, rel=2e-5)


def test_the_benchmark_compares_with_the_faster_side_of_pytorch(monkeypatch, capsys):
    main = runpy.run_path(str(ROOT / 'scripts/benchmarks/train.py'))['main']
    speeds = {'train.py': [30, 50, 40], '--mode=eager': [10, 30, 20], '--mode=compile': [25, 5, 15]}
    asked = []

    def run(command, **_):
        kind = next(part for part in (*command[2:3], pathlib.Path(command[1]).name) if part in speeds)
        asked.append((kind, command[-1]))
        told = f'noise\n{json.dumps({"tokens_per_second": speeds[kind].pop(0), "loss": 1.0})}\n'
        return subprocess.CompletedProcess(command, 0, told)

    monkeypatch.setattr(subprocess, 'run', run)
    main([f'--config={ROOT}/configs/pretrain.py:tiny', '--peer=torch', '--steps=2'])
    found = json.loads(capsys.readouterr().out)
    assert asked == 3 * [(kind, '--steps=2') for kind in ('train.py', '--mode=eager', '--mode=compile')]
    assert found['ours']['turns'] == [30, 50, 40] and found['torch compile']['tokens_per_second'] == 15
    assert found['ratio'] == 2.0  # 40 to 20


@pytest.mark.parametrize(
    ('argv', 'why'),
    [
        (['--peer=tensorflow'], '--peer is torch'),
        (['--mode=quick'], '--mode is eager or compile'),
        (['--mode=eager', '--config.optim.name=muon'], 'PyTorch has pretrain and sft'),
    ],
)
def test_the_benchmark_of_the_step_says_what_it_cannot_do(argv, why, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'scripts/benchmarks')
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    name = 'train' if '--peer=tensorflow' in argv else 'torch_step'
    if name == 'torch_step':
        pytest.importorskip('torch')
    with pytest.raises(UserError, match=why):
        importlib.import_module(name).main([f'--config={ROOT}/configs/pretrain.py:tiny', *argv])


def test_the_benchmark_of_the_data_prints_what_it_measured():
    """In a process of its own, where there is no jax; its counts hold, its speeds are numbers."""
    argv = ['--examples=200', '--plan=3000', '--repeats=1']
    program = (
        'import runpy, sys; sys.modules["jax"] = None\n'  # grain takes it where it is
        f'runpy.run_path({str(ROOT / "scripts/benchmarks/data.py")!r})["main"]({argv!r})'
    )
    done = subprocess.run(
        [sys.executable, '-c', program], capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-500:]
    *lines, found = done.stdout.splitlines()
    found = json.loads(found)
    assert len(lines) > 25 and all(len(line) >= 80 for line in lines)
    sizes, alone, plan = found['images_per_second_and_core'], found['index']['alone'], found['plan']
    assert sizes.keys() == {'224', '336'} and all(sizes['224'][way] > 0 for way in ('pil', 'exact', 'draft'))
    assert found['megabytes_tokenized_per_second_and_core']['trained'].keys() == {'text', 'documents', 'conversations'}
    assert found['index']['examples'] == 200 and 180 <= alone['of_train'] < 200
    assert found['index']['as_it_comes']['of_train'] == alone['of_train'] and alone['examples_per_second'] > 0
    assert plan['examples'] == 3000 and 3000 / 6 < plan['rows'] < 3000 / 4  # rows hold some five
    packed = found['packing']
    assert all(0.9 < used['tokens'] <= 1 for used in packed.values()) and packed['captions']['image slots'] > 0.99


def test_the_benchmark_of_the_data_reads_batches_of_a_config(llava_folder, tmp_path):
    (tmp_path / 'micro.py').write_text(
        'from nanovision_jax.config import Data, base_config\n'
        'def get_config(size):\n'
        '    config = base_config("sft", size)\n'
        f'    config.run_dir = {str(tmp_path / "runs/sft")!r}\n'
        f'    path = {str(llava_folder / "instruct.json")!r}\n'
        '    config.data = Data("conversations", path, vocab_size=300, batch_size=4, length=64, too_long="drop")\n'
        '    return config\n'
    )
    speed = runpy.run_path(str(ROOT / 'scripts/benchmarks/data.py'))['measure_pipeline'](f'{tmp_path}/micro.py:tiny', 3)
    assert speed['tokens_per_second'] == pytest.approx(64 * speed['rows_per_second'], rel=0.02)
    assert speed['rows_per_second'] == pytest.approx(4 * speed['batches_per_second'], rel=0.02)


@pytest.mark.parametrize('arg, told', [('--example=5', 'unknown argument'), ('--examples=0', 'above 0')])
def test_a_mistake_in_the_data_benchmark_is_one_sentence(arg, told):
    with pytest.raises(UserError, match=told):
        runpy.run_path(str(ROOT / 'scripts/benchmarks/data.py'))['main']([arg])


@pytest.mark.parametrize('stage', ['pretrain', 'vision_instruct'])
def test_the_benchmark_of_decoding_prints_what_it_measured(stage, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / 'scripts/benchmarks')
    small = ['data.vocab_size=128', 'model.layers=1', 'model.width=32', 'model.heads=2', 'model.ffn=32']
    small += ['data.length=64', 'model.positions=64', 'model.vision.layers=2']
    small += ['model.vision.image_size=16', 'model.vision.patch_size=8']
    argv = [f'--config={ROOT}/configs/{stage}.py:tiny', '--tokens=20', *(f'--config.{field}' for field in small)]
    main = runpy.run_path(str(ROOT / 'scripts/benchmarks/decode.py'))['main']
    sizes = {}
    for weights in ('', 'int8'):
        main([*argv, f'--weights={weights}'])
        found = json.loads(capsys.readouterr().out)
        assert list(found) == ['tokens', 'weights', 'prompt', 'batch', 'bytes_of_weights', 'devices', 'versions']
        assert (found['tokens'], len(found['prompt'])) == (20, 16 + 4 * (stage == 'vision_instruct'))
        for batch in found['batch'].values():
            assert list(batch) == ['first_token_ms', 'tokens_per_second', 'decode_tokens_per_second']
            assert batch['first_token_ms'] > 0 and batch['tokens_per_second'] > 0
        assert list(found['batch']) == ['1', '16'] and found['versions'].keys() == {'jax'}
        sizes[weights] = found['bytes_of_weights']
    assert sizes['int8'] < 0.4 * sizes['']


@pytest.mark.parametrize(
    ('argv', 'why'),
    [
        (['--run=a', '--tokens=1'], '--tokens takes a number above 1'),
        (['--run=a', '--weights=int4'], 'weights takes bfloat16, int8 or nothing'),
        (['--run=a', '--peer=torch'], '--peer is transformers'),
        (['--run=a', '--config=b'], '--config=b does not go with --run'),
        ([], 'say --config=FILE'),
    ],
)
def test_the_benchmark_of_decoding_says_what_it_cannot_do(argv, why, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'scripts/benchmarks')
    with pytest.raises(UserError, match=why):
        runpy.run_path(str(ROOT / 'scripts/benchmarks/decode.py'))['main'](argv)


def test_a_checkpoint_s_cost_is_that_of_its_state(tmp_path):
    measure = runpy.run_path(str(ROOT / 'scripts/benchmarks/checkpoint.py'))['measure']
    found = measure('pretrain', 'tiny', 1, tmp_path)
    assert found.keys() == {'bytes', 'stall', 'written', 'proven', 'restored'}
    config = configs.base_config('pretrain', 'tiny')
    mesh = parallel.make_mesh(configs.Mesh(), jax.devices()[:1])
    words, optimizer = types.SimpleNamespace(size=1024, image=5), optim.make_optimizer(config.optim, 1000)
    shapes = abstract_state(config, words, optimizer, mesh)[1]
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    assert 0.7 * state < found['bytes'] < 1.2 * state  # compressed: what has one value, as counts do, takes little
    assert not list(tmp_path.iterdir())


@pytest.fixture
def seeds(tmp_path, monkeypatch):
    """(seeds.main in a folder of its own, the commands that it gave): a stub leaves behind what they would."""
    bench = runpy.run_path(str(ROOT / 'scripts/benchmarks/seeds.py'))
    monkeypatch.setitem(bench['main'].__globals__, 'ROOT', tmp_path)
    given = []

    def run(command, cwd, **_):
        option = dict(arg.split('=', 1) for arg in command[3:])
        given.append(' '.join(command[2:]))
        if command[2].endswith('train'):
            folder = cwd / 'runs' / option['--config.name'] / pathlib.Path(option['--config'].split(':')[0]).stem
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / 'lineage.json').exists():
                (folder / 'lineage.json').write_text('{}')
        else:
            folder, split = pathlib.Path(option['--run']), option['--split']
            share = (0.5 if split == 'heldout' else 0.9) + 0.1 * int(folder.parent.name[-1])
            part = '' if split == 'validation' else f'-{split}'
            (folder / 'eval').mkdir(exist_ok=True)
            told = {'accuracy': share, 'by_kind': {'shape': {'accuracy': share / 2}}}
            (folder / f'eval/vqa{part}-limit{option["--limit"]}.json').write_text(json.dumps(told))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, 'run', run)
    return bench['main'], given


def test_seeds_are_trained_evaluated_and_told(seeds, tmp_path, capsys):
    main, given = seeds
    main(['--seeds=2', '--config.steps=5'])
    trained = [line for line in given if '.train ' in line]
    assert len(trained) == 10 and len(given) == 14
    options = '--config=configs/clip.py:tiny --config.name=tiny-seed1 --config.seed=1 --config.steps=5'
    assert trained[5] == f'nanovision_jax.train {options}'
    lines = capsys.readouterr().out.splitlines()
    assert '| validation | all | 95.0 | 7.1 | 90.0 to 100.0 | 90.0, 100.0 |' in lines
    assert '| heldout | shape | 27.5 | 3.5 | 25.0 to 30.0 | 25.0, 30.0 |' in lines
    given.clear()
    main(['--seeds=2', '--config.steps=5'])
    assert len(given) == 10  # what is finished says so itself; evaluations are kept
    later = (tmp_path / 'runs/tiny-seed1/vision_instruct/lineage.json').stat().st_mtime + 60
    os.utime(tmp_path / 'runs/tiny-seed1/vision_instruct/lineage.json', (later, later))
    given.clear()
    main(['--seeds=2'])
    assert len([line for line in given if '.evaluate ' in line]) == 2


def test_seeds_of_some_stages_take_the_others_from_a_family(seeds, tmp_path, capsys):
    main, given = seeds
    for part in ('clip', 'sft', 'data', 'tokenizer'):
        (tmp_path / 'family' / part).mkdir(parents=True)
    main(['--seeds=1', '--name=new', '--stages=vision_pretrain,vision_instruct', f'--parents={tmp_path}/family'])
    family = tmp_path / 'runs/new-seed0'
    assert [line.split()[1] for line in given[:2]] == [
        '--config=configs/vision_pretrain.py:tiny',
        '--config=configs/vision_instruct.py:tiny',
    ]
    assert (family / 'clip').resolve() == tmp_path / 'family/clip' and (family / 'data').is_symlink()
    assert not (family / 'pretrain').exists() and not (family / 'vision_pretrain').is_symlink()
    assert '| heldout | all | 50.0 |  | 50.0 to 50.0 | 50.0 |' in capsys.readouterr().out


def test_each_seed_may_have_parents_of_its_own(seeds, tmp_path):
    for seed in (0, 1):
        (tmp_path / f'family-seed{seed}/clip').mkdir(parents=True)
    parents = f'--parents={tmp_path}/family-seed{{}}'
    seeds[0](['--seeds=2', '--name=new', '--stages=vision_instruct', parents])
    for seed in (0, 1):
        assert (tmp_path / f'runs/new-seed{seed}/clip').resolve() == tmp_path / f'family-seed{seed}/clip'
    with pytest.raises(UserError, match=r'new-seed0/clip is not of .*family-seed1: choose another --name'):
        seeds[0](['--seeds=1', '--name=new', '--stages=vision_instruct', f'--parents={tmp_path}/family-seed1'])


@pytest.mark.parametrize(
    ('argv', 'why'),
    [
        (['--seeds=0'], 'above 0'),
        (['--stages=vision_instruct'], '--parents=FAMILY'),
        (['--stages=clip', '--parents=a'], 'ends with vision_instruct'),
        (['--stages=clap,vision_instruct'], "no stage 'clap'"),
        (['--seed=1'], 'unknown argument'),
    ],
)
def test_a_mistake_with_seeds_is_one_sentence(argv, why, seeds):
    with pytest.raises(UserError, match=why):
        seeds[0](argv)
    assert seeds[1] == []


def test_a_probe_reads_what_is_there_and_not_what_is_not():
    fit = runpy.run_path(str(ROOT / 'scripts/benchmarks/probe.py'))['fit']
    rng = np.random.default_rng(0)
    labels, noise = rng.integers(0, 4, 600), rng.normal(size=(600, 10))
    told = np.concatenate([noise, np.eye(4)[labels] + 0.1 * noise[:, :4]], axis=1)
    assert (fit(told[:400], labels[:400], 4)(told[400:]) == labels[400:]).mean() > 0.98
    assert (fit(noise[:400], labels[:400], 4)(noise[400:]) == labels[400:]).mean() < 0.4


@pytest.mark.parametrize('stage', ['clip', 'vision_instruct'])
def test_probes_tell_of_every_layer(stage, tiny_family, tmp_path, capsys):
    family = micro.family(tmp_path / 'family', tiny_family)
    sizes = {'model__vision__image_size': 60, 'model__vision__patch_size': 10}
    micro.parent_run(family, stage, micro.run_config(stage, family, **sizes))
    main = runpy.run_path(str(ROOT / 'scripts/benchmarks/probe.py'))['main']
    main([f'--run={family / stage}', '--train=120', '--test=20'])
    rows = [line.split(' | ') for line in capsys.readouterr().out.splitlines() if line.count(' | ') == 4]
    layers = ['| pixels', '| tower', '| tower, mean of all patches']
    layers += ['| projector', '| decoder, before the answer', '| answer'] * (stage == 'vision_instruct')
    assert {row[0] for row in rows} == set(layers) and len(rows) == 3 * len(layers)
    assert all('% (' in cell for row in rows for cell in row[2:])
