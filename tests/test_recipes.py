"""The published recipes at full size: each step compiles for eight devices, in the memory that arithmetic says, and
for machines that are not there, as scripts/benchmarks/memory.py tells."""

import collections
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from conftest import ROOT, parse

from nanovision_jax import config as configs
from nanovision_jax import models
from nanovision_jax.models.layers import padded
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.stages import STAGES, stage_of
from nanovision_jax.training import fit, optim, step

TOKENIZER = types.SimpleNamespace(size=50261, image=50260)  # GPT-2's, and ours on top

# Parameters of each part, by hand.
DECODER = 2 * 50304 * 1280 + 20 * (12 * 1280**2 + 1280 + 4 * 1280) + 2 * 1280
PROJECTOR = 1024 * 1280 + 1280 + 1280**2 + 1280


def tower(width, layers, tokens, patch):
    """A vision tower: patches, class token, positions, two norms, and blocks with biases."""
    block = 12 * width**2 + 9 * width + 4 * width
    return patch**2 * 3 * width + width + tokens * width + 4 * width + layers * block


TEXT = 50304 * 512 + 77 * 512 + 2 * 512 + 12 * (12 * 512**2 + 13 * 512)
COUNTS = {  # (all, those that learn)
    'clip': 2 * (tower(768, 12, 197, 16) + TEXT + 768 * 512 + 512 * 512 + 1,),
    'pretrain': (DECODER, DECODER),
    'sft': (DECODER, DECODER),
    'vision_pretrain': (tower(1024, 24, 257, 14) + PROJECTOR + DECODER, PROJECTOR),
    'vision_instruct': (tower(1024, 24, 257, 14) + PROJECTOR + DECODER, PROJECTOR + DECODER),
}


def recipe(stage, size='d20'):
    """The config of a stage at its reference size; what sees, sees through a ViT-L/14."""
    cfg = parse(stage, 'dtype=bfloat16', size=size)
    if stage.startswith('vision'):
        cfg.model.vision = configs.Vision(image_size=224, patch_size=14, width=1024, layers=24, heads=16, ffn=4096)
    return cfg


@pytest.mark.parametrize('devices', [1, 2, 4, 8])
@pytest.mark.parametrize('size', ['tiny', 'ltiny', 'd2', 'd20', 'l20'])
@pytest.mark.parametrize('stage', STAGES)
def test_every_recipe_runs_on_as_many_devices(stage, size, devices):
    cfg = parse(stage, size=size)
    rows = cfg.data.batch_size // cfg.optim.parts
    mesh = parallel.make_mesh(cfg.mesh, jax.devices()[:devices], rows)
    parallel.check_divides(cfg, mesh, TOKENIZER.size)
    assert mesh.size == (4 if rows == 36 and devices == 8 else devices)


def abstract(cfg, optimizer, mesh):
    """(graphdef, state, batch) as shapes with shardings; nothing is allocated."""
    graphdef, state = step.abstract_state(cfg, TOKENIZER, optimizer, mesh)
    return graphdef, state, fit.abstract_batch(cfg, mesh)


def per_device(tree):
    """Bytes that a tree of shapes takes on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def test_the_reference_model_has_522_million_parameters():
    assert DECODER == 522_124_800
    assert tower(1024, 24, 257, 14) == 303_179_776  # openai/clip-vit-large-patch14's


@pytest.mark.parametrize('stage', COUNTS)
def test_parameters_are_as_many_as_counted_by_hand(stage):
    params = models.abstract(recipe(stage), TOKENIZER.size, TOKENIZER.image)[1]
    for part, wanted in zip((params, step.partition(recipe(stage), params)[0]), COUNTS[stage], strict=True):
        assert sum(leaf.size for leaf in jax.tree.leaves(part)) == wanted


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['pretrain', 'sft', 'vision_pretrain', 'vision_instruct'])
def test_a_decoder_of_llamas_kind_is_as_large_and_compiles_for_eight_devices(stage):
    cfg = recipe(stage, 'l20')
    optimizer, mesh = optim.make_optimizer(cfg.optim, 1000), parallel.make_mesh(configs.Mesh(8, 1, 1))
    with jax.set_mesh(mesh):
        parallel.check_divides(cfg, mesh, TOKENIZER.size)
        program = fit.compile_step(cfg, TOKENIZER, optimizer, mesh)
    params = program.shapes['params']
    decoder = sum(leaf.size for leaf in jax.tree.leaves(params.get('decoder', params)))
    assert decoder == 2 * 50304 * 1280 + 20 * (4 * 1280**2 + 3 * 1280 * 3456 + 2 * 1280) + 1280
    assert decoder == pytest.approx(DECODER, rel=0.01) and program.peak > 0


@pytest.mark.parametrize(
    ('stage', 'mesh'),
    [*((stage, configs.Mesh(8, 1, 1)) for stage in COUNTS), ('vision_instruct', configs.Mesh(1, 8, 1))],
)
def test_the_step_compiles_for_eight_devices(stage, mesh, record_property):
    cfg = recipe(stage)
    optimizer, mesh, began = optim.make_optimizer(cfg.optim, 1000), parallel.make_mesh(mesh), time.perf_counter()
    with jax.set_mesh(mesh):
        parallel.check_divides(cfg, mesh, TOKENIZER.size)
        graphdef, state, batch = abstract(cfg, optimizer, mesh)
        lowered = step.make_train_step(cfg, graphdef, optimizer, step.shardings_of(state)).lower(state, batch)
        compiled = lowered.compile()
    if stage_of(cfg).decodes:  # nowhere are the logits of all rows of a device, in any layout
        rows, length, vocabulary = cfg.data.batch_size // 8, cfg.data.length, padded(TOKENIZER.size)
        shapes = f'{rows},{length},{vocabulary}', f'{rows * length},{vocabulary}', f'{vocabulary},{rows * length}'
        assert not [shape for shape in shapes if f'[{shape}]' in compiled.as_text()]
    memory = compiled.memory_analysis()
    record_property('seconds', round(time.perf_counter() - began, 1))
    # Parameters and two moments of what learns, float32, and the batch: all there is beside the step's own work.
    every, learning = COUNTS[stage]
    if mesh.shape['data'] == 8:  # each device has all of it
        assert per_device(state) == pytest.approx(4 * every + 8 * learning, rel=1e-6)
    else:
        assert (4 * every + 8 * learning) / 8 < per_device(state) < (4 * every + 8 * learning) / 8 * 1.01
    assert memory.argument_size_in_bytes == pytest.approx(per_device(state) + per_device(batch), rel=0.01)
    assert memory.alias_size_in_bytes == pytest.approx(per_device(state), rel=0.01)  # the old state becomes the new


# On machines that are not there --------------------------------------------------------------------------------------


TEXT_AND_VISION = ('pretrain', 'sft', 'vision_pretrain', 'vision_instruct')
SPARE = 2 << 30  # bytes
needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='takes libtpu: pip install -e .[tpu]')
needs_cuda = pytest.mark.skipif(
    not importlib.util.find_spec('jax_cuda12_plugin'), reason='takes jax-cuda12-plugin and nvidia-cuda-nvcc-cu12'
)
MACHINES = [
    *(pytest.param(chips, marks=needs_libtpu) for chips in ('v5e:2x4', 'v6e:2x4')),
    *(pytest.param(gpus, marks=needs_cuda) for gpus in ('a100:8', 'h100:8')),
]


def measured(stage, topology, *options):
    """What the benchmark prints of a step, compiled in a process of its own."""
    command = [sys.executable, 'scripts/benchmarks/memory.py', f'--config=configs/{stage}.py', f'--topology={topology}']
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    environment = os.environ | {'PYTHONPATH': paths, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stderr[-500:], done.stdout)
    return json.loads(done.stdout)


def assert_reduced_once(found):
    """All that devices send each other are the gradients of what learns, in float32; the loss and its count."""
    assert list(found['collectives']) == ['all-reduce f32']
    assert found['collectives']['all-reduce f32']['bytes'] == pytest.approx(4 * COUNTS[found['stage']][1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('stage', TEXT_AND_VISION)
@pytest.mark.parametrize('machine', MACHINES)
def test_the_recipes_fit_eight_devices_and_reduce_their_gradients_once(machine, stage):
    found = measured(stage, machine)
    assert found['peak_bytes'] <= found['memory_bytes'] - SPARE
    assert found['attention'] == ('splash' if 'TPU' in found['devices'] else 'pallas')
    assert_reduced_once(found)


@pytest.mark.slow
@pytest.mark.parametrize('machine', MACHINES)
def test_in_parts_gradients_are_reduced_once_too(machine):
    found = measured('pretrain', machine, '--config.optim.accumulate=8')
    assert found['accumulate'] == 8
    assert_reduced_once(found)


@pytest.mark.slow
@pytest.mark.parametrize('machine', MACHINES)
def test_recomputing_blocks_a_step_takes_six_gib_beside_its_state(machine):
    found = measured('pretrain', machine, '--config.model.remat=full', '--config.optim.accumulate=1')
    assert found['peak_bytes'] - found['state_and_batch_bytes'] <= 6 << 30


SPLIT = ('--config.mesh.data=1', '--config.mesh.fsdp=8')


@pytest.mark.slow
@needs_cuda
@pytest.mark.parametrize('stage', TEXT_AND_VISION)
def test_split_parameters_are_gathered_twice_at_most_and_reduced_once(stage):
    """In bf16, but for the embedding, which is gathered once in float32."""
    found, (every, learned) = measured(stage, 'a100:8', *SPLIT), COUNTS[stage]
    sent, numbers = collections.Counter(), collections.Counter()
    for name, each in found['collectives'].items():
        kind, dtype = name.split()
        sent[kind] += each['bytes']
        numbers[kind] += each['bytes'] / (2 if dtype == 'bf16' else 4)  # places of pictures are s32
    assert found['accumulate'] == 1 and sent['all-gather'] <= 2 * 2 * every
    # What is scattered is an eighth on each device.
    assert 8 * numbers['reduce-scatter'] + numbers['all-reduce'] == pytest.approx(learned, rel=1e-3)


@pytest.mark.slow
@needs_libtpu
def test_on_tpus_split_parameters_are_sent_thrice_at_most():
    """The blocks go around in parts, gathered and reduced; the embedding and the output layer are reduced whole."""
    found, every = measured('pretrain', 'v6e:2x4', *SPLIT), COUNTS['pretrain'][0]
    sent = {name: each['bytes'] for name, each in found['collectives'].items()}
    assert sent['all-gather bf16'] + sent['collective-permute bf16'] <= 3 * 2 * every
    assert sent['all-reduce f32'] == pytest.approx(4 * 2 * 50304 * 1280, rel=1e-3)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize('stage', ['sft', 'vision_pretrain', 'vision_instruct'])
def test_the_notebooks_fit_the_chip_that_colab_lends(stage):
    """With d20's decoder, which has more parameters than the published one that the first of them names."""
    notebook = (ROOT / 'scripts' / 'colab' / f'{stage}.ipynb').read_text()
    options = re.search(r'%env OPTIONS=(.*)\\n', notebook)[1].split()
    found = measured(stage, 'v5e:1x1', *options)
    assert f'--config.optim.accumulate={found["accumulate"]}' in options
    assert found['peak_bytes'] <= found['memory_bytes'] - SPARE
