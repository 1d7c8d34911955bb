"""The energy that this process's devices take, where a counter tells: NVML of a GPU, RAPL of a CPU's packages.

A TPU tells nothing. RAPL is read from Linux's powercap, whose files root alone may read, unless they are given away.
"""

import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax

POWERCAP = pathlib.Path('/sys/class/powercap')


class Counter(NamedTuple):
    """Joules since some time; where they reach `wraps`, they begin at 0 again."""

    read: Callable[[], float]
    wraps: float = float('inf')


class Meter:
    """Joules that one device of this process takes, the mean over them, from now on and beyond what is `so_far`."""

    def __init__(self, so_far: float = 0.0):
        self.total, self._counters, self._last = so_far, [], []
        self._counters = _tried(counters) or []
        self._last = self._read()

    def joules(self) -> float | None:
        """The sum until now; None where nothing tells. RAPL's counters wrap within the hour: to be asked more often."""
        now = self._read()
        for (_, wraps), before, after in zip(self._counters, self._last, now, strict=True):
            self.total += (after - before if after >= before else after - before + wraps) / jax.local_device_count()
        self._last = now
        return self.total if self._counters else None

    def _read(self):
        found = _tried(lambda: [counter.read() for counter in self._counters])
        if found is None:
            self._counters = self._last = []
        return found or []


def _tried(function):
    """What a function returns, or None: whatever a driver has to say, no run ends for want of this number."""
    try:
        return function()
    except Exception:
        return None


def counters() -> list[Counter]:
    """One for each of this process's GPUs, or each package of this machine's CPU. Raises what the driver raises."""
    devices = jax.local_devices()
    return {'gpu': _of_gpus, 'cpu': _of_packages}.get(devices[0].platform, lambda _: [])(devices)


def _of_gpus(devices):
    import pynvml

    pynvml.nvmlInit()
    visible, found = os.environ.get('CUDA_VISIBLE_DEVICES'), []
    for device in devices:
        name = visible.split(',')[device.local_hardware_id] if visible else str(device.local_hardware_id)
        handle_of = pynvml.nvmlDeviceGetHandleByIndex if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID
        handle = handle_of(int(name) if name.isdigit() else name)
        found.append(Counter(lambda handle=handle: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3))
    return found


def _of_packages(_):
    zones = [zone for zone in POWERCAP.glob('intel-rapl:*') if (zone / 'name').read_text().startswith('package')]
    return [  # AMD's have that name too; packages are beside their parts, which they contain
        Counter(lambda zone=zone: int((zone / 'energy_uj').read_text()) / 1e6, _wraps(zone)) for zone in zones
    ]


def _wraps(zone):
    return int((zone / 'max_energy_range_uj').read_text()) / 1e6
