"""Joules from counters of a CPU's packages and of GPUs, as Linux and NVML tell them, and what becomes of them."""

import sys
import types

import jax
import pytest

from nanovision_jax.parallel import energy

DEVICES = jax.local_device_count()


def write(zone, joules):
    (zone / 'energy_uj').write_text(f'{round(joules * 1e6)}\n')


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages of 262 kJ, one of which contains a part, beside the whole board's."""
    zones = {}
    for folder, name in (('0', 'package-0'), ('0:0', 'core'), ('1', 'package-1'), ('2', 'psys')):
        zones[name] = zone = tmp_path / f'intel-rapl:{folder}'
        zone.mkdir()
        (zone / 'name').write_text(f'{name}\n')
        (zone / 'max_energy_range_uj').write_text('262143000000\n')
        write(zone, 1000)
    monkeypatch.setattr(energy, 'POWERCAP', tmp_path)
    return zones


def test_packages_are_counted_once_and_beyond_their_end(packages):
    meter = energy.Meter(so_far=7.0)
    assert meter.joules() == 7
    write(packages['package-0'], 1000 + 3 * DEVICES)
    write(packages['package-1'], 1000 + 5 * DEVICES)
    write(packages['core'], 9000)
    write(packages['psys'], 9000)
    assert meter.joules() == pytest.approx(7 + 3 + 5)
    write(packages['package-0'], 0)
    assert meter.joules() == pytest.approx(7 + 3 + 5 + (262143 - 1000 - 3 * DEVICES) / DEVICES)


def test_what_may_not_be_read_tells_nothing(packages, monkeypatch):
    meter = energy.Meter()
    for zone in packages.values():
        (zone / 'energy_uj').unlink()
    assert meter.joules() is None and energy.Meter().joules() is None
    monkeypatch.setattr(energy, 'POWERCAP', packages['core'] / 'none')
    assert energy.Meter().joules() is None


@pytest.mark.parametrize(('visible', 'asked'), [(None, [0, 1]), ('2,3', [2, 3]), ('GPU-a,GPU-b', ['GPU-a', 'GPU-b'])])
def test_gpus_are_those_that_jax_sees(visible, asked, monkeypatch):
    told, handles = dict.fromkeys(asked, 5000), []  # millijoules

    def handle(name):
        handles.append(name)
        return name

    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=told.__getitem__,
    )
    monkeypatch.setitem(sys.modules, 'pynvml', nvml)
    gpus = [types.SimpleNamespace(platform='gpu', local_hardware_id=i) for i in range(2)]
    monkeypatch.setattr(jax, 'local_devices', lambda: gpus)
    monkeypatch.setattr(jax, 'local_device_count', lambda: 2)
    if visible is None:
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    else:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    meter = energy.Meter()
    assert handles == asked
    told.update({asked[0]: 9000, asked[1]: 7000})
    assert meter.joules() == pytest.approx(3)
    del told[asked[0]]  # a GPU that fell off the bus
    assert meter.joules() is None


def test_without_its_package_a_gpu_tells_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pynvml', None)
    monkeypatch.setattr(jax, 'local_devices', lambda: [types.SimpleNamespace(platform='gpu', local_hardware_id=0)])
    assert energy.Meter().joules() is None
