"""What a device can do: its peak FLOP/s, its memory, and how much of that was used."""

import os
import re
import time

import jax
import jax.numpy as jnp

from nanovision_jax.parallel import hosts
from nanovision_jax.parallel.datasheets import MEMORY, PEAK


def memory(device) -> int | None:
    """Bytes that a program may take on a device, or None where nothing says: its share of a CPU's main memory."""
    if device.platform == 'cpu':
        return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // len(jax.local_devices())
    stats = device.memory_stats() if device in jax.local_devices() else None
    if stats and 'bytes_limit' in stats:
        return stats['bytes_limit']
    return int(MEMORY[device.device_kind] * 2**30) if device.device_kind in MEMORY else None


def peak_flops() -> tuple[float, str]:
    """(FLOP/s of all devices together, where the figure comes from): a data sheet's, or a measured product's.

    On CPU one product is measured, which uses all cores of a host, however many devices they pretend to be; elsewhere a
    larger one on one device, times their number.
    """
    kind = jax.devices()[0].device_kind
    for name in sorted(PEAK, key=len, reverse=True):
        if re.search(rf'\b{name}\b', kind):
            return PEAK[name] * jax.device_count(), f'{name} data sheet, bf16'
    if jax.default_backend() == 'cpu':
        return measured_flops(1024, jnp.float32) * jax.process_count(), 'measured 1024³ float32 product'
    return measured_flops(4096, jnp.bfloat16) * jax.device_count(), 'measured 4096³ bf16 product, times the devices'


def measured_flops(n: int, dtype) -> float:
    """FLOP/s of the fastest of five n × n matrix products on the first device."""
    a = jnp.ones((n, n), dtype)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best = float('inf')
    for _ in range(5):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_memory() -> int | None:
    """The most bytes in use so far on one device, or None where the backend does not say."""
    stats = hosts.first_device().memory_stats()
    return stats.get('peak_bytes_in_use') if stats else None
