"""What a run will need: plans against figures by hand, against compiled steps, and the command."""

import importlib.util
import os
import subprocess
import sys
import types

import jax
import jax.experimental.topologies
import micro
import pytest
from conftest import ROOT, parse

from nanovision_jax import plan as verb
from nanovision_jax.errors import UserError
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.planning import estimate, machines, text, topologies
from nanovision_jax.training import fit, optim

PRETRAIN = ROOT / 'configs' / 'pretrain.py'
ROAD = ('clip', 'pretrain', 'sft', 'vision_pretrain', 'vision_instruct')


def planned(stage='pretrain', hardware='a100-80gx8', *overrides, size='d20', **options):
    return estimate.plan(parse(stage, *overrides, size=size), machines.parse(hardware), **options)


def test_the_reference_s_pretraining_takes_the_hours_and_dollars_that_it_published():
    """About 6 hours and $90 on eight A100 at 52.1% of their peak, its own figure."""
    plan = planned(mfu=0.521)
    assert plan.parameters == plan.learned == 522_124_800
    assert plan.flops / plan.tokens == pytest.approx(3.060e9, rel=1e-3)
    assert plan.steps * plan.tokens == 35_000 * 262_144
    assert plan.hours == pytest.approx(9.175e9 * 3.060e9 / (0.521 * 8 * 312e12) / 3600, rel=1e-3)
    assert 5.7 < plan.hours < 6.3 and 80 < plan.dollars < 95


@pytest.mark.parametrize('stage', ROAD)
def test_what_is_held_adds_up_and_is_split(stage):
    one, split = (planned(stage, 'h100x8', *mesh) for mesh in ([], ['mesh.data=1', 'mesh.fsdp=8']))
    assert sum(one.parts.values()) == one.peak and one.fits and one.most_rows >= one.rows >= 1
    for name in ('parameters', 'optimizer', 'gradients'):
        assert split.parts[name] == pytest.approx(one.parts[name] / 8, rel=1e-6)
    held = one.parts['parameters'] / (4 + 2), one.parts['optimizer'] / 8, one.parts['gradients'] / 4
    assert held == pytest.approx((one.parameters, one.learned, one.learned))


def test_what_does_not_fit_is_said_and_what_would():
    plan = planned('pretrain', 'rtx4090x1', 'data.length=1024', size='d40')
    assert not plan.fits and plan.most_rows == 0
    told = '\n'.join(text.lines([plan]))
    assert 'DOES NOT FIT' in told and 'not one row of 1024 tokens fits: split the model with mesh.fsdp' in told
    small = planned('pretrain', 'rtx4090x1')
    assert small.fits and small.config.optim.accumulate > 1 and small.rows <= small.most_rows


@pytest.mark.parametrize('sizes', [(8, 1, 1), (1, 8, 1), (2, 4, 1)])
def test_what_is_sent_is_what_the_compiled_step_sends(sizes):
    cfg = micro.config('pretrain')
    mesh = jax.make_mesh(sizes, parallel.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        program = fit.compile_step(cfg, micro.TOKENIZER, optim.make_optimizer(cfg.optim, 10), mesh)
    learned = sum(leaf.size for leaf in jax.tree.leaves(program.shapes['params']))
    n, found = sizes[0], fit.collectives(program.step.as_text())
    if sizes == (8, 1, 1):  # all-reduced once: a ring sends each byte 2·(n-1)/n times
        reduced = found['all-reduce', 'f32'].bytes
        assert estimate.sent(cfg, learned, learned, mesh) == pytest.approx(2 * (n - 1) / n * reduced, rel=0.01)
        return
    # CPU programs gather bfloat16 as float32: twice the bytes. What is small is not split, and sent otherwise.
    gathered = sum(one.bytes for (kind, _), one in found.items() if kind == 'all-gather')
    by_count = 2 * (sizes[1] - 1) / sizes[1] * learned * 4
    assert by_count == pytest.approx(gathered, rel=0.35), found


def test_what_is_split_sends_frozen_parameters_too_and_more_in_parts():
    split = ['mesh.data=1', 'mesh.fsdp=8']
    frozen = planned('vision_pretrain', 'h100x8', *split)
    assert frozen.sent == pytest.approx(7 / 8 * (2 * 2 * frozen.parameters + 4 * frozen.learned))
    whole, parts = (planned('pretrain', 'h100x8', *split, f'optim.accumulate={n}') for n in (1, 4))
    assert parts.sent == pytest.approx(4 * whole.sent) and estimate.scaling(whole) == []
    over = planned('pretrain', 'h100x64')
    assert f'{over.sent / 50e9 * 1e3:.1f} ms at 50 GB/s' in '\n'.join(text.lines([over]))


def test_more_chips_lose_what_they_send_by_hand():
    plan = planned('pretrain', 'h100x8')
    spans = {count: (seconds, share) for count, seconds, share in estimate.scaling(plan)}
    inside = 2 * 7 / 8 * 522_124_800 * 4 / 450e9
    assert spans[8][0] == pytest.approx(inside)
    between = 2 * 127 / 128 * 522_124_800 * 4 / 8 / 50e9
    assert spans[1024][0] == pytest.approx(inside + between)
    assert spans[8][1] == 1 and spans[1024][1] == pytest.approx(plan.step / (plan.step + between))
    assert [share for _, share in spans.values()] == sorted((share for _, share in spans.values()), reverse=True)
    assert [count for count, *_ in estimate.scaling(planned('pretrain', 'rtx4090x1'))] == []


def test_hardware_is_known_by_name_or_given():
    assert machines.parse('tpu-v6e-8').chip.topology == 'v6e' and machines.parse('cpu').chip is None
    own = machines.parse('ownx4', price=2.0, flops=100, memory=40)
    assert (own.count, own.chip.flops, own.chip.memory, own.chip.price) == (4, 1e14, 40, 2.0)
    assert machines.parse('h100x2', price=0.5).chip.price == 0.5
    for wrong, why in {
        'gtx1080x2': 'no hardware',
        'h100': 'how many',
        'h100x0': 'how many',
        'tpu-v5e-3': 'no slice of 3',
        'ownx4': 'no hardware',
    }.items():
        with pytest.raises(UserError, match=why):
            machines.parse(wrong)


def test_machines_that_are_not_there_are_described_to_the_compiler(monkeypatch):
    asked = []

    def topology(name='', platform=None, **options):
        asked.append((name, platform, options))
        told = {name: os.environ.get(name) for name in topologies.NO_CHIPS}
        assert told == (topologies.NO_CHIPS if platform == 'tpu' else dict.fromkeys(told) | own)
        return types.SimpleNamespace(devices=('one', 'two'))

    monkeypatch.setattr(jax.experimental.topologies, 'get_topology_desc', topology)
    own = {'TPU_WORKER_HOSTNAMES': 'a,b'}
    for name in topologies.NO_CHIPS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'a,b')
    assert topologies.devices_of('v5e:2x4') == topologies.devices_of('h100:2') == ['one', 'two']
    topologies.devices_of('v5e:1x1')
    chips, (_, platform, options), chip = asked
    assert {name: os.environ[name] for name in topologies.NO_CHIPS if name in os.environ} == own
    assert chips == ('v5e:2x4', 'tpu', {}) and chip == ('v5e:1x1', 'tpu', {'chips_per_host_bounds': (1, 1, 1)})
    assert platform == 'cuda' and options['topology'] == '1x1x2'
    text = options['target_config']
    assert 'NVIDIA H100 80GB HBM3' in text and 'cuda_compute_capability: { major: 9 }' in text
    assert 'shared_memory_per_block_optin: 232448' in text and text.count('{') == text.count('}') == 2


@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='takes libtpu: pip install -e .[tpu]')
def test_for_a_real_chip_it_is_compiled_while_another_process_has_libtpu():
    program = 'from nanovision_jax.planning.topologies import devices_of; print(len(devices_of("v5e:2x4")), flush=True)'
    command = [sys.executable, '-c', f'{program}; input()']
    options = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.PIPE) | dict(text=True, cwd=ROOT)
    with subprocess.Popen(command, **options) as first, subprocess.Popen(command, **options) as second:
        said = [process.stdout.readline() for process in (first, second)]  # neither has ended
        rest = [process.communicate('\n') for process in (first, second)]
    assert said == ['8\n', '8\n'] and rest == [('', '')] * 2  # nor has anything else to say


@pytest.mark.parametrize(('name', 'takes'), [('a100:8', 'it takes jax-cuda12-plugin'), ('v9:2x4', 'it takes libtpu')])
def test_a_machine_that_nothing_compiles_for_is_a_sentence(name, takes, monkeypatch):
    def missing(*_, **__):
        raise NotImplementedError('no such thing\nmore')

    monkeypatch.setattr(jax.experimental.topologies, 'get_topology_desc', missing)
    with pytest.raises(UserError, match=rf"^no topology '{name}' \(no such thing\): {takes}"):
        topologies.devices_of(name)


def test_the_command_plans_the_road(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    verb.main([f'--config={PRETRAIN}', '--hardware=h100x8', '--road', '--mfu=0.5', '--price=2'])
    told = capsys.readouterr().out
    verb.main(
        ['--config', str(PRETRAIN), '--hardware=ownx8', '--flops=9', '--memory=80', '--road', '--config.steps=77']
    )
    own = capsys.readouterr().out
    assert own.count(' 77 steps') == 5 and '$' not in own and 'no price known' in own
    assert all(f'\n{stage}: ' in told for stage in ROAD) and 'all 5 stages: ' in told and '50% MFU assumed' in told
    assert '$2.00 a chip and hour' in told and 'DOES NOT FIT' not in told
    for argv, why in {
        (): 'which hardware',
        ('--hardware=h100x8', '--measure'): 'say --hardware=cpu',
        ('--hardware=h100x8', '--mfu=2'): 'share of the peak',
        ('--hardware=h100x8', '--price=x'): 'takes a number',
        ('--hardware=h100x8', '--flops=9'): 'of h100 are known',
        ('--hardware=h100x8', '--price=-2'): 'takes a number above 0',
        ('--hardware=ownx8', '--flops=inf'): 'takes a number above 0',
        ('--hardware=ownx8', '--flops=9', '--memory=nan'): '--memory takes a number',
        ('--hardware=h100x6',): 'does not divide data.batch_size',
    }.items():
        with pytest.raises(UserError, match=why):
            verb.main([f'--config={PRETRAIN}', *argv])


def test_on_the_cpu_at_hand_the_step_is_compiled_and_measured(capsys):
    cfg = micro.config('sft')
    cfg.steps, cfg.data.source, cfg.data.vocab_size = 100, 'tiny_world', 120
    cfg.mesh.data = -1
    plan = estimate.plan(cfg, machines.parse('cpu'), measured=True)
    assert plan.compiled == 'the devices at hand' and plan.source == '10 steps measured' and plan.step > 0
    assert plan.hours == plan.step * 100 / 3600 and plan.dollars == 0 and plan.process > plan.peak > 0
    assert sum(plan.parts.values()) >= plan.peak
    assert isinstance(plan.config, types.SimpleNamespace) or plan.config is not cfg  # what was asked for is left alone
    with pytest.raises(UserError, match=r'say --config\.steps'):
        estimate.steps_of(micro.config('sft'))


def test_pictures_that_training_keeps_are_memory_of_its_process():
    cfg = micro.config('clip')
    cfg.data.source, cfg.model.vision.image_size = 'tiny_world', 60
    picture = 60 * 60 * 3
    for cfg.steps, pictures in ((10, 80), (100_000, 40_000)):  # of 8 a step; there are 40,000
        kept = estimate.process_of(cfg, 0, 8) - estimate.process_of(cfg, 0, 0)
        assert pictures * picture < kept < 1.1 * pictures * picture
    cfg.model.vision.image_size = 224  # too many to be kept
    assert estimate.process_of(cfg, 0, 8) == estimate.process_of(cfg, 0, 0)
