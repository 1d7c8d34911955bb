"""What a device can do: its peak FLOP/s, its memory, and how much of that was used."""

import os
import re
import time

import jax
import jax.numpy as jnp

from nanovision_jax.parallel import hosts

# Dense bf16 matrix products, FLOP/s per device, from the makers' data sheets. Device kinds as jax names them.
PEAK = {
    'A100': 312e12,
    'H100': 989e12,
    'H100 PCIe': 756e12,
    'H100 NVL': 835e12,
    'GH200': 989e12,
    'H200': 989e12,
    'B200': 2250e12,
    'L4': 121e12,
    'L40S': 362e12,
    'T4': 65e12,
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5p': 459e12,
    'TPU v5': 459e12,
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
}

# GiB that a program may take of devices that are not at hand. Kinds as jax names them. Of a GPU that is three quarters,
# unless the environment's XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
MEMORY = {
    'TPU v5 lite': 15.75,
    'TPU v6 lite': 31.25,
    'NVIDIA A100-SXM4-80GB': 0.75 * 79.1,
    'NVIDIA H100 80GB HBM3': 0.75 * 79.1,
}


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
