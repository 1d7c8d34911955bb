"""Devices that are not at hand, for which programs can be compiled all the same.

A topology is named as Cloud TPU names it (v5e:1x1, v5e:2x4, v6e:2x4), or is the GPUs of one machine (a100:8, h100:8).
TPUs take libtpu (pip install -e .[tpu]); GPUs take no driver, only pip install jax-cuda12-plugin==JAX_VERSION
nvidia-cuda-nvcc-cu12, of jax's own version.
"""

import contextlib
import os
from typing import NamedTuple

from jax.experimental import topologies

from nanovision_jax.errors import UserError

# To compile takes no chip, so another process may have loaded libtpu, which lets but one. A host's name and its kind of
# chips, for which libtpu would ask the network, are any: the topology says what is compiled for.
NO_CHIPS = {
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
}


class GPU(NamedTuple):
    """What XLA asks of a GPU that is not there, as its maker's documents say."""

    name: str  # as jax names it
    capability: int  # its first digit
    cores: int  # streaming multiprocessors
    units: int  # of float32, in a core
    shared: int  # KiB of a core, one of which a block may not have
    cache: int  # MiB
    ghz: float
    bandwidth: int  # GB/s
    memory: int = 80  # GB


GPUS = {
    'a100': GPU('NVIDIA A100-SXM4-80GB', 8, 108, 64, 164, 40, 1.41, 2039),
    'h100': GPU('NVIDIA H100 80GB HBM3', 9, 132, 128, 228, 50, 1.98, 3350),
}


def described(gpu: GPU) -> str:
    """A GPU as the text of XLA's GpuTargetConfigProto."""
    info = {
        'cuda_compute_capability': f'{{ major: {gpu.capability} }}',
        'core_count': gpu.cores,
        'fpus_per_core': gpu.units,
        'clock_rate_ghz': gpu.ghz,
        'device_memory_size': gpu.memory * 10**9,
        'memory_bandwidth': gpu.bandwidth * 10**9,
        'l2_cache_size': gpu.cache << 20,
        'shared_memory_per_core': gpu.shared << 10,
        'shared_memory_per_block_optin': gpu.shared - 1 << 10,
        # The same of every generation:
        'shared_memory_per_block': 48 << 10,
        'registers_per_core_limit': 1 << 16,
        'registers_per_block_limit': 1 << 16,
        'threads_per_warp': 32,
        'threads_per_block_limit': 1 << 10,
        'threads_per_core_limit': 1 << 11,
        'block_dim_limit_x': (1 << 31) - 1,
        'block_dim_limit_y': (1 << 16) - 1,
        'block_dim_limit_z': (1 << 16) - 1,
    }
    fields = ' '.join(f'{name}: {value}' for name, value in info.items())
    return f'platform_name: "CUDA" device_description_str: "{gpu.name}" gpu_device_info {{ {fields} }}'


def devices_of(topology: str) -> list:
    """The devices of a topology by its name. Raises UserError where there is none, or nothing that compiles for it."""
    kind, _, size = topology.partition(':')
    alone = {'chips_per_host_bounds': (1, 1, 1)} if size == '1x1' else {}
    try:
        if kind in GPUS:
            found = topologies.get_topology_desc(
                platform='cuda', target_config=described(GPUS[kind]), topology=f'1x1x{size}'
            )
        else:
            with _no_chips():
                found = topologies.get_topology_desc(topology, 'tpu', **alone)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        takes = 'jax-cuda12-plugin' if kind in GPUS else 'libtpu (pip install -e .[tpu])'
        reason = str(error).splitlines()[0]
        raise UserError(f'no topology {topology!r} ({reason}): it takes {takes}.') from error
    return list(found.devices)


@contextlib.contextmanager
def _no_chips():
    """Tells libtpu, which is loaded within, what it would look for in vain, and loudly. The environment is put back."""
    before = {name: os.environ.get(name) for name in NO_CHIPS}
    os.environ |= NO_CHIPS
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
