"""FLOPs against the numbers of the reference model, peaks by device, and metrics.jsonl across resumes."""

import json
import types

import jax
import pytest

from nanovision_jax import config as configs
from nanovision_jax.parallel import hardware
from nanovision_jax.runs import metrics
from nanovision_jax.training import meter

D20 = configs.base_config('pretrain', 'd20')


def test_matmul_weights_of_the_reference_model():
    head = 1280 * 50304
    assert meter.matmul_weights(D20.model) + head == 457_605_120


def test_flops_of_pretraining_d20():
    assert meter.step_flops(D20, 50261, 1, 0) == pytest.approx(3.060e9, rel=1e-3)
    assert meter.step_flops(D20, 50261, 262_144, 0) == pytest.approx(262_144 * 3.060e9, rel=1e-3)
    weights, attention = 457_605_120, 20 * 1280 * 1024
    assert meter.step_flops(D20, 50261, 1, 0) == 6 * weights + 12 * attention  # the convention, to the last digit


def test_what_is_frozen_costs_less():
    """2·N forward everywhere, 2·N more where gradients flow, 2·N more where weights learn: attention has none."""
    costs = {}
    for stage in ('pretrain', 'vision_pretrain', 'vision_instruct'):
        cfg = configs.base_config(stage, 'd20')
        cfg.model.vision = configs.Vision(patch_size=14, width=1024, layers=24, heads=16, ffn=4096)
        costs[stage] = meter.step_flops(cfg, 50261, 1024, 0), meter.step_flops(cfg, 50261, 0, 1)
    assert costs['vision_instruct'][0] == costs['pretrain'][0]
    assert costs['vision_pretrain'][0] == 1024 * (4 * 457_605_120 + 12 * 20 * 1280 * 1024)
    tower = 23 * (4 * 1024**2 + 2 * 1024 * 4096) + 14**2 * 3 * 1024  # features are those before the last layer
    picture = 257 * (2 * tower + 4 * 23 * 1024 * 257)
    assert costs['vision_instruct'][1] == costs['vision_pretrain'][1] == picture
    assert costs['pretrain'][1] == 0


def test_the_output_layer_counts_for_learned_tokens_alone():
    for stage, passes in (('vision_instruct', 6), ('vision_pretrain', 4)):
        cfg = configs.base_config(stage, 'd20')
        whole, quarter = (meter.step_flops(cfg, 50261, 1024, 2, learned) for learned in (1024, 256))
        assert whole - quarter == 768 * passes * 1280 * 50304
        assert whole == meter.step_flops(cfg, 50261, 1024, 2)


def test_clip_counts_both_towers():
    cfg = configs.base_config('clip', 'd20')
    cfg.data.length = 77
    both, captions = meter.step_flops(cfg, 50261, 77, 1), meter.step_flops(cfg, 50261, 77, 0)
    vision = 12 * (4 * 768**2 + 2 * 768 * 3072) + 16**2 * 3 * 768
    assert both - captions == 197 * (6 * vision + 12 * 12 * 768 * 197)
    assert captions == 77 * (6 * 12 * (4 * 512**2 + 2 * 512 * 2048) + 12 * 12 * 512 * 77)


@pytest.mark.parametrize(
    ('kind', 'peak'),
    [
        ('NVIDIA A100-SXM4-80GB', 312e12),
        ('NVIDIA H100 80GB HBM3', 989e12),
        ('NVIDIA H100 PCIe', 756e12),
        ('NVIDIA H200', 989e12),
        ('NVIDIA GH200 480GB', 989e12),
        ('NVIDIA B200', 2250e12),
        ('NVIDIA L4', 121e12),
        ('NVIDIA L40S', 362e12),
        ('Tesla T4', 65e12),
        ('TPU v4', 275e12),
        ('TPU v5 lite', 197e12),
        ('TPU v5', 459e12),
        ('TPU v6 lite', 918e12),
    ],
)
def test_peaks_are_looked_up_by_device_kind(monkeypatch, kind, peak):
    monkeypatch.setattr(jax, 'devices', lambda: [types.SimpleNamespace(device_kind=kind)] * 8)
    monkeypatch.setattr(jax, 'device_count', lambda: 8)
    found, source = hardware.peak_flops()
    assert found == 8 * peak and 'data sheet' in source


@pytest.mark.parametrize(('kind', 'backend', 'times'), [('NVIDIA L400', 'gpu', 8), ('cpu', 'cpu', 1)])
def test_a_device_that_no_sheet_names_is_measured(monkeypatch, kind, backend, times):
    """Eight accelerators have eight times the peak of one; eight CPU devices are the same cores."""
    monkeypatch.setattr(jax, 'devices', lambda: [types.SimpleNamespace(device_kind=kind)] * 8)
    monkeypatch.setattr(jax, 'device_count', lambda: 8)
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    monkeypatch.setattr(hardware, 'measured_flops', lambda n, dtype: 1e12)
    found, source = hardware.peak_flops()
    assert found == times * 1e12 and source.startswith('measured')


@pytest.mark.parametrize(
    ('kind', 'stats', 'wanted'),
    [
        ('NVIDIA H100 80GB HBM3', {'bytes_limit': 70 << 30}, 70 << 30),
        ('NVIDIA H100 80GB HBM3', None, int(0.75 * 79.1 * 2**30)),
        ('TPU v5 lite', {}, int(15.75 * 2**30)),
        ('NVIDIA L4', {'bytes_limit': 1}, 1),
        ('NVIDIA L4', None, None),
    ],
)
def test_memory_is_what_a_device_says_or_what_is_known_of_its_kind(monkeypatch, kind, stats, wanted):
    """stats None: the device is of a topology, and cannot be asked."""
    device = types.SimpleNamespace(platform='gpu', device_kind=kind, memory_stats=lambda: stats)
    monkeypatch.setattr(jax, 'local_devices', lambda: [device] if stats is not None else [])
    assert hardware.memory(device) == wanted


def test_a_measured_product_takes_the_time_of_its_arithmetic(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(hardware.time, 'perf_counter', lambda: float(next(ticks)))  # a product a second
    assert hardware.measured_flops(8, 'float32') == 2 * 8**3


def test_heads_of_another_size_than_width_over_heads_count_as_they_are():
    """Qwen3's: 16 heads of 128 on a width of 1024."""
    cfg = configs.base_config('pretrain', 'd20')
    cfg.model = configs.Model(
        layers=28, width=1024, heads=16, ffn=3072, flavour='llama', kv_heads=8, head_dim=128, qk_norm=True
    )
    weights = 28 * (1024 * 128 * (2 * 16 + 2 * 8) + 3 * 1024 * 3072) + 1024 * 50304
    assert meter.step_flops(cfg, 50261, 1, 0) == 6 * weights + 12 * 28 * (16 * 128) * 1024


# metrics.jsonl -------------------------------------------------------------------------------------------------------


def write(folder, steps, start=0):
    log = metrics.Metrics(folder, start=start)
    for step in steps:
        log.write(step=step, loss=1.0 / step, tokens=100 * step, seconds=0.5 * step)
        if step % 3 == 0:
            log.write(step=step, eval_loss=2.0)
    return [line['step'] for line in metrics.read_metrics(folder / 'metrics.jsonl')]


def test_lines_past_the_point_of_resuming_are_dropped(tmp_path):
    assert write(tmp_path, (1, 2, 3, 4, 5)) == [1, 2, 3, 3, 4, 5]
    assert write(tmp_path, (4, 5, 6), start=3) == [1, 2, 3, 3, 4, 5, 6, 6]
    assert metrics.Metrics(tmp_path, start=6).last == {'step': 6, 'loss': 1 / 6, 'tokens': 600, 'seconds': 3.0}
    assert metrics.Metrics(tmp_path, start=0).last == {'tokens': 0, 'seconds': 0.0}
    assert (tmp_path / 'metrics.jsonl').read_text() == ''


def test_a_half_written_last_line_is_forgotten(tmp_path):
    write(tmp_path, (1, 2))
    file = tmp_path / 'metrics.jsonl'
    file.write_text(file.read_text() + '{"step": 3, "lo')
    assert [line['step'] for line in metrics.read_metrics(file)] == [1, 2]
    assert write(tmp_path, (3, 4), start=2) == [1, 2, 3, 3, 4]
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_the_seconds_before_the_first_step_are_told_by_stage(monkeypatch):
    times = iter((101.0, 103.5, 103.75))
    monkeypatch.setattr(meter.time, 'perf_counter', lambda: next(times))
    startup = meter.Startup(began=100.0)
    for stage in ('imports', 'data', 'step'):
        startup.reached(stage)
    assert startup.told() == 'first step after 3.8 s: imports 1.0, data 2.5, step 0.2'
