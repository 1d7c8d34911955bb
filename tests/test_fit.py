"""What a compiled step takes, what it sends, and the choices that make it fit."""

import collections
import contextlib
import re
import types

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nanovision_jax import config as configs
from nanovision_jax.errors import UserError
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.training import fit, optim, step

VOCABULARY = types.SimpleNamespace(size=128, image=127)


def mesh_of(*sizes):
    return parallel.make_mesh(configs.Mesh(*sizes), jax.devices()[: int(np.prod(sizes))])


def settled(cfg, mesh, memory, monkeypatch=None, peaks=()):
    """(the Program, (remat, parts) of every program compiled); peaks stand for what the compiler says of each."""
    compiled, compile_step = [], fit.compile_step

    def watched(config, *args):
        compiled.append((config.model.remat, config.optim.accumulate))
        if not peaks:
            return compile_step(config, *args)
        peak = peaks[len(compiled) - 1]
        if peak is None:
            raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: too large')
        memory = types.SimpleNamespace(peak_memory_in_bytes=peak, temp_size_in_bytes=0)
        step = types.SimpleNamespace(memory_analysis=lambda: memory)
        return fit.Program(None, {}, step, 0.0)

    with jax.set_mesh(mesh):
        optimizer = optim.make_optimizer(cfg.optim, 10)
        if monkeypatch:
            monkeypatch.setattr(fit, 'compile_step', watched)
        return fit.settle(cfg, VOCABULARY, optimizer, mesh, memory), compiled


# What is compiled ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('stage', 'products'), [('vision_pretrain', 0), ('vision_instruct', 1)])
def test_a_frozen_output_layer_gets_no_gradient(stage, products):
    cfg, mesh = micro.config(stage), mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        optimizer = optim.make_optimizer(cfg.optim, 10)
        graphdef, shapes = step.abstract_state(cfg, VOCABULARY, optimizer, mesh)
        made = step.make_train_step(cfg, graphdef, optimizer, step.shardings_of(shapes))
        text = made.lower(shapes, fit.abstract_batch(cfg, mesh, VOCABULARY.size)).as_text()
    assert len(re.findall(r'dot_general.*-> tensor<256x128xf32>', text)) == 1  # the scores of all tokens
    assert len(re.findall(r'dot_general.*-> tensor<32x128xf32>', text)) == products  # width by vocabulary


# The choices ---------------------------------------------------------------------------------------------------------


def open_config(stage='pretrain'):
    """A config that leaves everything to settle()."""
    cfg = micro.config(stage)
    cfg.model.attention = cfg.model.remat = 'auto'
    cfg.optim.accumulate = 0
    return cfg


def test_what_fits_as_it_is_stays_as_it_is(monkeypatch, capsys):
    cfg = open_config()
    program, compiled = settled(cfg, mesh_of(1, 1, 1), 2**40, monkeypatch)
    assert compiled == [('none', 1)]
    assert (cfg.model.attention, cfg.model.remat, cfg.optim.accumulate) == ('xla', 'none', 1)
    said = capsys.readouterr().out
    assert 'attention: xla (no other kernel runs on cpu)' in said
    assert 'of 1024.0 GiB a device, with model.remat=none and optim.accumulate=1' in said
    batch = parallel.put_batch(micro.batch(cfg), mesh_of(1, 1, 1))
    memory = program.step.memory_analysis()
    assert program.peak >= memory.argument_size_in_bytes + memory.temp_size_in_bytes > 0
    assert program.step.in_avals[0][1]['tokens'].shape == batch['tokens'].shape


def test_what_is_asked_for_is_not_settled(monkeypatch):
    cfg = open_config()
    cfg.model.remat, cfg.optim.accumulate = 'full', 2
    assert settled(cfg, mesh_of(1, 1, 1), 1, monkeypatch, peaks=[2**40])[1] == [('full', 2)]
    cfg.optim.accumulate = 0
    _, compiled = settled(cfg, mesh_of(1, 1, 1), 10**12, monkeypatch, peaks=[1])
    assert compiled == [('full', 1)]


CANDIDATES = [
    fit._Candidate('none', 1, bytes=80, time=1.0),
    fit._Candidate('dots', 1, bytes=50, time=1.05),
    fit._Candidate('full', 1, bytes=25, time=1.3),
    fit._Candidate('full', 8, bytes=10, time=1.5),
]


@pytest.mark.parametrize(
    ('peaks', 'wanted'),
    [
        ([85], [('none', 1)]),
        ([87, 70], [('none', 1), ('dots', 1)]),
        ([120, None, 40], [('none', 1), ('dots', 1), ('full', 1)]),  # None: the compiler itself gives up
        ([300, 35], [('none', 1), ('full', 8)]),  # what it says of one corrects the estimate of the next
        ([120, 110, 100], [('none', 1), ('dots', 1), ('full', 1)]),  # three at most, and the last stands
        ([120, 110, None], [('none', 1), ('dots', 1), ('full', 1)]),
    ],
)
def test_a_step_that_the_compiler_finds_too_large_is_followed_by_a_smaller_one(peaks, wanted, monkeypatch):
    cfg, found = open_config(), contextlib.nullcontext()
    monkeypatch.setattr(fit, '_candidates', lambda *_: CANDIDATES)
    if peaks[-1] is None:
        found = pytest.raises(UserError, match=r'model\.remat=full .*: split parameters')
    with found:
        compiled = settled(cfg, mesh_of(1, 1, 1), 100, monkeypatch, peaks)[1]
        assert compiled == wanted
    assert (cfg.model.remat, cfg.optim.accumulate) == wanted[-1]


def test_parts_divide_the_rows_of_a_device(monkeypatch):
    cfg = open_config()
    mesh = mesh_of(2, 2, 1)  # two rows a device, of eight
    _, compiled = settled(cfg, mesh, 1, monkeypatch, [2**40] * 3)
    assert {parts for _, parts in compiled} <= {1, 2}


def test_split_parameters_are_rather_recomputed_with_than_gathered_again():
    cfg = configs.base_config('pretrain', 'd20')
    cfg.data.batch_size, cfg.data.length, cfg.optim.accumulate = 256, 1024, 0
    for sizes, second in (((8, 1, 1), ('none', 2)), ((1, 8, 1), ('dots', 1))):
        found = [(c.remat, c.parts) for c in fit._candidates(cfg, VOCABULARY, mesh_of(*sizes))]
        assert found[:2] == [('none', 1), second]


@pytest.mark.parametrize('stage', ['pretrain', 'vision_instruct', 'clip'])
def test_the_estimate_grows_with_what_is_kept(stage):
    fixed, by_part = fit.estimate(open_config(stage), VOCABULARY, mesh_of(1, 1, 1))
    assert 0 < by_part['full'] < by_part['dots'] < by_part['none'] and fixed > 0


def test_a_step_on_features_has_no_tower_in_it(capsys):
    cfg, texts = micro.config('vision_instruct'), {}
    for kept in ('', 'bf16', 'int8'):
        cfg.data.cache_features = kept
        texts[kept] = settled(cfg, mesh_of(1, 1, 1), None)[0].step.as_text()
    assert {kept: (bool(re.search(r'\btower\b', text)), '(projector)' in text) for kept, text in texts.items()} == {
        '': (True, True),
        'bf16': (False, True),
        'int8': (False, True),
    }


# What a program sends ------------------------------------------------------------------------------------------------


def test_collectives_are_counted_by_kind_dtype_and_turns_of_loops():
    mesh = mesh_of(8, 1, 1)

    def local(x):
        def turn(_, x):
            return jax.lax.pcast(jax.lax.psum(x, 'data') / 8, 'data', to='varying')

        gathered = jax.lax.all_gather(x.astype(jnp.bfloat16), 'data')
        return jax.lax.fori_loop(0, 5, turn, x) + gathered.astype(jnp.float32).sum()

    program = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P('data'), out_specs=P('data')))
    found = fit.collectives(program.lower(jnp.zeros((8, 1024))).compile().as_text())
    assert found['all-reduce', 'f32'] == (5, 5 * 1024 * 4)
    gathered = {kind: sent for kind, sent in found.items() if kind[0] == 'all-gather'}
    assert sum(sent.times for sent in gathered.values()) == 1


@pytest.mark.parametrize('step', [1, 2])
def test_a_loop_turns_as_often_as_its_counter_takes(step):
    """TPU programs send the parts of a matrix while they multiply, two a turn."""
    text = f"""
%body (c: (f32[4], u32[])) -> (f32[4], u32[]) {{
  %more = u32[] constant({step})
  %c = (f32[4], u32[]) parameter(0)
  %i = u32[] get-tuple-element(%c), index=1
  %next = u32[] add(%i, %more), metadata={{op_name="a"}}
  %x = f32[4] get-tuple-element(%c), index=0
  %sent = f32[4] collective-permute(%x), channel_id=1
  ROOT %both = (f32[4], u32[]) tuple(%sent, /*index=1*/%next)
}}

%condition (c: (f32[4], u32[])) -> pred[] {{
  %c = (f32[4], u32[]) parameter(0)
  %most = u32[]{{:T(128)}} constant(4)
  %i = u32[] get-tuple-element(%c), index=1
  ROOT %less = pred[] compare(%i, %most), direction=LT
}}

ENTRY %main (p: f32[4]) -> f32[4] {{
  %loop = (f32[4], u32[]) while(%start), condition=%condition, body=%body
}}
"""
    assert fit.collectives(text) == {('collective-permute', 'f32'): (4 // step, 16 * 4 // step)}


def test_what_is_sent_while_other_work_goes_on_is_counted_by_its_results():
    """As programs for accelerators have it: an operation begins with its operands and ends with its results."""
    text = """
ENTRY %main (p: f32[4]) -> f32[4] {
  %a = ((bf16[2,3], bf16[5]), (bf16[16,3], bf16[40])) all-gather-start(%p, %q), dimensions={0}
  %b = (f32[2], f32[16], u32[], u32[]) all-gather-start(%p), dimensions={0}
  %c = ((f32[16]), f32[2]) reduce-scatter-start(%p), dimensions={0}
  %d = (f32[3], f32[5]) all-reduce-start(%p, %q), to_apply=%add
}
"""
    assert fit.collectives(text) == {
        ('all-gather', 'bf16'): (1, 2 * (48 + 40)),
        ('all-gather', 'f32'): (1, 4 * 16),
        ('reduce-scatter', 'f32'): (1, 4 * 2),
        ('all-reduce', 'f32'): (1, 4 * 8),
    }


@pytest.mark.parametrize('accumulate', [1, 4])
def test_gradients_are_reduced_once_over_copies_of_the_model(accumulate):
    cfg, mesh = micro.config('pretrain'), mesh_of(2, 1, 1)
    cfg.dtype, cfg.optim.accumulate = 'bfloat16', accumulate
    with jax.set_mesh(mesh):
        program = fit.compile_step(cfg, VOCABULARY, optim.make_optimizer(cfg.optim, 10), mesh)
    parameters = sum(x.size for x in jax.tree.leaves(program.shapes['params']))
    sent = fit.collectives(program.step.as_text())
    assert set(sent) == {('all-reduce', 'f32')}
    assert sent['all-reduce', 'f32'].bytes == 4 * parameters + 2 * 4  # and the loss and its count


def test_gradients_of_pairs_in_parts_are_reduced_once_and_embeddings_gathered():
    cfg, mesh = micro.config('clip'), mesh_of(2, 1, 1)
    cfg.optim.accumulate = 4
    with jax.set_mesh(mesh):
        program = fit.compile_step(cfg, VOCABULARY, optim.make_optimizer(cfg.optim, 10), mesh)
    parameters = sum(x.size for x in jax.tree.leaves(program.shapes['params']))
    sent = fit.collectives(program.step.as_text())
    assert sent['all-reduce', 'f32'].bytes == 4 * parameters + 4  # and the loss; its count is known
    assert sent['all-gather', 'f32'].bytes == 2 * 4 * cfg.data.batch_size * cfg.model.text.embed


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradients_are_reduced_in_the_dtype_that_is_asked_for(dtype, monkeypatch):
    """As traced: a CPU's programs know no sum in bfloat16."""
    cfg, mesh = micro.config('pretrain'), mesh_of(2, 1, 1)
    cfg.optim.reduce_dtype = dtype
    monkeypatch.setattr(step, 'platform', lambda: 'tpu')
    graphdef, params = micro.params(cfg)
    with jax.set_mesh(mesh):
        traced = jax.make_jaxpr(step.make_gradients(cfg, graphdef))(*step.partition(cfg, params), micro.batch(cfg))
    sums = [line for line in str(traced).splitlines() if ' psum' in line and '=' in line]
    kinds = collections.Counter(re.findall(r':(\w+)\[', ' '.join(line.partition('=')[0] for line in sums)))
    short = {'float32': 'f32', 'bfloat16': 'bf16'}[dtype]
    assert kinds[short] - 2 * (dtype == 'float32') == len(jax.tree.leaves(params))
