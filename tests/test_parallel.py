"""Meshes: what is refused, what is split, and that no mesh changes a gradient."""

import functools
import re
import types

import jax
import micro
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nanovision_jax import config as configs
from nanovision_jax import models
from nanovision_jax.data.pairs import Captions
from nanovision_jax.errors import UserError
from nanovision_jax.models import vlm
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.training import optim, step

MESHES = {
    'data8': configs.Mesh(8, 1, 1),
    'fsdp8': configs.Mesh(1, 8, 1),
    'data2-fsdp2-tensor2': configs.Mesh(2, 2, 2),
    'data4-tensor2': configs.Mesh(4, 1, 2),
    'fsdp2-tensor4': configs.Mesh(1, 2, 4),
}


VOCABULARY = types.SimpleNamespace(size=50261, image=50260)


# The mesh ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('sizes', 'shape'),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 8, 1), (1, 8, 1)), ((4, 1, -1), (4, 1, 2))],
)
def test_minus_one_takes_what_is_left(sizes, shape):
    mesh = parallel.make_mesh(configs.Mesh(*sizes))
    assert tuple(mesh.shape[axis] for axis in parallel.AXES) == shape


@pytest.mark.parametrize(('sizes', 'used'), [((6, 1, 1), 6), ((-1, 3, 1), 6), ((2, 2, 1), 4), ((8, 2, 1), 16)])
def test_a_mesh_that_does_not_use_every_device_is_refused(sizes, used):
    with pytest.raises(UserError, match=f'uses {used} of 8 devices'):
        parallel.make_mesh(configs.Mesh(*sizes))


@pytest.mark.parametrize('sizes', [(-1, -1, 1), (0, 8, 1), (-2, 1, 1)])
def test_axes_are_numbers_and_at_most_one_is_open(sizes):
    with pytest.raises(UserError, match='one of them may be -1'):
        parallel.make_mesh(configs.Mesh(*sizes))


@pytest.mark.parametrize(
    ('rows', 'sizes', 'shape'),
    [
        (36, (-1, 1, 1), (4, 1, 1)),
        (36, (-1, 2, 1), (2, 2, 1)),
        (36, (-1, 1, 2), (4, 1, 2)),
        (40, (-1, 1, 1), (8, 1, 1)),
        (7, (-1, 1, 1), (1, 1, 1)),
        (9, (-1, 2, 1), (4, 2, 1)),
    ],
)
def test_as_many_devices_are_used_as_divide_the_rows(rows, sizes, shape, capsys):
    """Where none does, all are taken, and check_divides() says so."""
    mesh = parallel.make_mesh(configs.Mesh(*sizes), rows=rows)
    assert tuple(mesh.shape.values()) == shape
    used = int(np.prod(shape))
    assert capsys.readouterr().out.startswith(f'using {used} of 8 devices: {rows} rows' if used < 8 else '')


@pytest.mark.parametrize(
    ('field', 'value', 'sizes', 'axis'),
    [
        ('model.heads', 6, (1, 2, 4), 'tensor'),
        ('model.ffn', 66, (1, 2, 4), 'tensor'),
        ('model.width', 36, (1, 8, 1), 'fsdp'),
        ('model.vision.heads', 2, (1, 2, 4), 'tensor'),
        ('model.vision.width', 36, (1, 8, 1), 'fsdp'),
        ('data.batch_size', 12, (8, 1, 1), 'data × fsdp'),
        ('optim.accumulate', 2, (4, 2, 1), 'data × fsdp'),
    ],
)
def test_what_a_mesh_does_not_divide_is_named(field, value, sizes, axis):
    cfg, mesh = micro.config('vision_instruct'), parallel.make_mesh(configs.Mesh(*sizes))
    parallel.check_divides(cfg, mesh, micro.TOKENIZER.size)
    part, _, name = field.rpartition('.')
    setattr(configs.get(cfg, part), name, value)
    named = 'data.batch_size' if field == 'optim.accumulate' else field
    with pytest.raises(UserError, match=rf'{axis}.* does not divide {named}, which is \d+\.$'):
        parallel.check_divides(cfg, mesh, micro.TOKENIZER.size)


def test_a_vocabulary_that_tensor_does_not_divide_is_named():
    cfg, mesh = micro.config('pretrain'), parallel.make_mesh(configs.Mesh(1, 1, 3), jax.devices()[:3])
    cfg.model.heads = cfg.model.ffn = 3
    with pytest.raises(UserError, match='tensor is 3 and does not divide the padded vocabulary, which is 128'):
        parallel.check_divides(cfg, mesh, micro.TOKENIZER.size)


def test_a_stage_is_only_asked_about_the_parts_it_has():
    mesh = parallel.make_mesh(configs.Mesh(1, 8, 1))
    for stage, absent in (('clip', 'model'), ('pretrain', 'vision'), ('vision_instruct', 'text')):
        cfg = micro.config(stage)
        (cfg.model if absent == 'model' else getattr(cfg.model, absent)).width = 20
        parallel.check_divides(cfg, mesh, micro.TOKENIZER.size)


# Shardings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('stage', micro.STAGES)
def test_fsdp_splits_every_large_leaf_and_its_moments(stage):
    cfg, mesh = configs.base_config(stage, 'd20'), parallel.make_mesh(configs.Mesh(1, 8, 1))
    cfg.data.length = 77
    shapes = step.abstract_state(cfg, VOCABULARY, optim.make_optimizer(cfg.optim, 10), mesh)[1]
    parts = {}
    for path, leaf in jax.tree.leaves_with_path(shapes):
        parts[parallel.path_name(path)] = leaf.size // np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=int)
        small = leaf.size < 300_000  # the tower's positions are the largest of what each device has whole
        assert parts[parallel.path_name(path)] == 8 or small, f'{parallel.path_name(path)} {leaf.shape} is not split'
    moments = [name for name in parts if name.startswith('optimizer') and re.search(r'/(mu|nu)/', name)]
    trained = jax.tree.leaves(step.partition(cfg, shapes['params'])[0])
    assert len(moments) == 2 * len(trained)
    for name in moments:
        assert parts[name] == parts['params/' + re.split('/(?:mu|nu)/', name)[1]]


def test_matrices_into_a_layer_and_out_of_it_are_split_the_other_way_round():
    """Both the same way round gave wrong gradients on a mesh of all three axes (jax 0.10)."""
    cfg, mesh = configs.base_config('pretrain', 'd20'), parallel.make_mesh(configs.Mesh(2, 2, 2))
    blocks = step.abstract_state(cfg, VOCABULARY, optim.make_optimizer(cfg.optim, 10), mesh)[1]['params']['blocks']
    assert blocks['ffn_in']['kernel'].sharding.spec == P(None, 'fsdp', 'tensor')
    assert blocks['ffn_out']['kernel'].sharding.spec == P(None, 'tensor', 'fsdp')


# Gradients -----------------------------------------------------------------------------------------------------------


@functools.cache
def gradients(stage, sizes, accumulate=1, flavour='gpt', contrastive='softmax', rows_of_captions=0):
    """(loss, gradients) of one batch on a mesh of `sizes`, as numpy arrays."""

    def of(cfg, graphdef, placed, batch):
        return jax.jit(step.make_gradients(cfg, graphdef))(*step.partition(cfg, placed), batch)

    return on_mesh(of, stage, sizes, accumulate, flavour, contrastive, rows_of_captions)


def evaluated(stage, sizes, accumulate, rows_of_captions=0):
    """The held-out loss of the same batch."""

    def of(cfg, graphdef, placed, batch):
        return step.make_eval_step(cfg, graphdef)(placed, batch)

    total, count = on_mesh(of, stage, sizes, accumulate, 'gpt', 'softmax', rows_of_captions)
    return total / count


def on_mesh(of, stage, sizes, accumulate, flavour, contrastive, rows_of_captions):
    """What of(config, graphdef, parameters, batch) gives on a mesh of `sizes`, as numpy arrays."""
    cfg = micro.config(stage)
    cfg.optim.accumulate, cfg.model.contrastive = accumulate, contrastive
    if flavour == 'llama':  # with everything that its kin have
        cfg.model.flavour, cfg.model.kv_heads, cfg.model.qkv_bias, cfg.model.qk_norm = 'llama', 4, True, True
        cfg.model.heads, cfg.model.head_dim = 8, 8
    graphdef, params = micro.params(cfg)
    mesh = parallel.make_mesh(configs.Mesh(*sizes), jax.devices()[: int(np.prod(sizes))])
    batch = micro.batch(cfg)
    if rows_of_captions:
        pairs = zip(batch['images'], batch['tokens'], batch['segments'], strict=True)
        half = cfg.data.length // 2  # so that two find room in any row
        pairs = [{'images': images, 'ids': tokens[segments > 0][:half]} for images, tokens, segments in pairs]
        batch = Captions(cfg.data.length, rows_of_captions, sizes[0] * sizes[1], accumulate)(pairs)
        assert (batch['segments'].max(axis=1) > 1).any()
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, parallel.shardings(params, mesh))
        return jax.device_get(of(cfg, graphdef, placed, parallel.put_batch(batch, mesh)))


def assert_equal(found, wanted):
    """Both losses and every leaf of both gradients are equal within float32's rounding."""
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for (path, leaf), expected in zip(jax.tree.leaves_with_path(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        error, limit = np.abs(leaf - expected).max(), max(1e-6, 1e-5 * np.abs(expected).max())
        assert error <= limit, f'{parallel.path_name(path)} is off by {error}, and {limit} is allowed'


@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('stage', ['clip', 'pretrain', 'vision_pretrain', 'vision_instruct'])
def test_gradients_are_those_of_one_device(stage, mesh):
    sizes = tuple(getattr(MESHES[mesh], axis) for axis in parallel.AXES)
    found = gradients(stage, sizes)
    assert_equal(found, gradients(stage, (1, 1, 1)))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found[1]))


@pytest.mark.parametrize('sizes', [(1, 4, 1), (2, 2, 1)])
def test_gradients_are_the_same_where_the_tower_takes_a_few_slots_at_once(monkeypatch, sizes):
    monkeypatch.setattr(vlm, 'LEAST', 9)
    assert_equal(gradients.__wrapped__('vision_instruct', sizes), gradients('vision_instruct', (1, 1, 1)))


@pytest.mark.parametrize('mesh', ['fsdp8', 'data2-fsdp2-tensor2', 'fsdp2-tensor4'])
def test_gradients_of_the_other_flavour_are_those_of_one_device(mesh):
    sizes = tuple(getattr(MESHES[mesh], axis) for axis in parallel.AXES)
    found = gradients('pretrain', sizes, flavour='llama')
    assert_equal(found, gradients('pretrain', (1, 1, 1), flavour='llama'))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found[1]))


@pytest.mark.parametrize('stage', micro.STAGES)
def test_accumulated_gradients_are_those_of_the_whole_batch(stage):
    """Though each of the four parts learns from another number of tokens, and compares only two pictures."""
    if stage != 'clip':
        learned = micro.batch(micro.config(stage))['weights'].sum(1).reshape(-1, 4).sum(0)
        assert len(set(learned)) == 4
    assert_equal(gradients(stage, (1, 1, 1), accumulate=4), gradients(stage, (1, 1, 1)))


@pytest.mark.parametrize(
    'stage, sizes', [('pretrain', (1, 2, 1)), ('clip', (1, 2, 1)), ('clip', (2, 1, 1)), ('clip', (2, 2, 1))]
)
def test_accumulated_gradients_of_a_mesh_are_those_of_one_device(stage, sizes):
    assert_equal(gradients(stage, sizes, accumulate=8 // (sizes[0] * sizes[1])), gradients(stage, (1, 1, 1)))


@pytest.mark.parametrize('sizes, accumulate', [((1, 1, 1), 2), ((2, 1, 1), 1), ((1, 2, 2), 2)])
def test_gradients_of_packed_captions_are_those_of_one_device_in_one_part(sizes, accumulate):
    packed = {'rows_of_captions': 4}
    assert_equal(gradients('clip', sizes, accumulate, **packed), gradients('clip', (1, 1, 1), **packed))


@pytest.mark.parametrize(
    'stage, sizes, accumulate, rows',
    [('clip', (1, 1, 1), 4, 4), ('clip', (2, 2, 1), 2, 0), ('vision_instruct', (1, 1, 1), 4, 0),
     ('vision_instruct', (2, 2, 1), 2, 0)],
)  # fmt: skip
def test_the_loss_of_an_evaluation_in_parts_is_that_of_the_whole(stage, sizes, accumulate, rows):
    found = evaluated(stage, sizes, accumulate, rows)
    np.testing.assert_allclose(found, gradients(stage, (1, 1, 1), rows_of_captions=rows)[0], rtol=1e-5)


@pytest.mark.parametrize('stage', ['clip', 'vision_instruct'])
def test_evaluation_holds_one_part_at_a_time(stage):
    """Of eight parts it makes a loop of eight turns, and of one none."""
    cfg = micro.config(stage)
    graphdef, params = micro.params(cfg)
    for cfg.optim.accumulate in (1, 8):
        looped = jax.make_jaxpr(step.make_eval_step(cfg, graphdef))(params, micro.batch(cfg))
        assert ('length=8' in str(looped)) == (cfg.optim.accumulate == 8)


def test_siglips_loss_accumulates_over_the_whole_batch_too():
    kept = {'contrastive': 'sigmoid'}
    assert_equal(gradients('clip', (1, 1, 1), accumulate=4, **kept), gradients('clip', (1, 1, 1), **kept))


def test_activations_stay_split_by_rows():
    """FSDP without constraints on activations gives the same numbers and sends ten times the bytes."""
    cfg, mesh = micro.config('pretrain'), parallel.make_mesh(configs.Mesh(1, 8, 1))
    graphdef, params = micro.params(cfg)
    with jax.set_mesh(mesh):
        batch = parallel.put_batch(micro.batch(cfg), mesh)
        placed = jax.device_put(params, parallel.shardings(params, mesh))

        def forward(params, batch):
            return models.merge(graphdef, params)(batch['tokens'], batch['positions'], batch['segments'])

        step = jax.jit(forward).lower(placed, batch).compile()
    gathered = re.findall(r'(\w+\[[\d,]*\])\S* all-gather', step.as_text())
    assert gathered and not [shape for shape in gathered if shape.startswith('f32[8,32,')], gathered
    assert step.output_shardings.shard_shape((8, 32, 128)) == (1, 32, 128)
