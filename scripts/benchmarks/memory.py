"""What the training step of a config takes on hardware that need not be there: memory, collectives, compile time.

    python scripts/benchmarks/memory.py --config=configs/pretrain.py --topology=v5e:2x4 [--config.mesh.fsdp=8 …]

Compiled on any Linux machine, for the chips of a topology as Cloud TPU names it (v5e:1x1, v5e:2x4, v6e:2x4) or for the
GPUs of one machine (a100:8, h100:8, of 80 GB). TPUs take libtpu (pip install -e .[tpu]); GPUs take no driver, only
pip install jax-cuda12-plugin==JAX_VERSION nvidia-cuda-nvcc-cu12, of jax's own version. Nothing is tuned for such GPUs,
as tuning runs kernels: memory and collectives hold, speed does not follow. Without --topology: for the devices at hand.

What the config leaves open is settled as training would. The vision stages see through a ViT-L/14 at 224, as published
towers are. Nothing is allocated. Prints one JSON object, and on stderr what was settled; bytes are of one device. Takes
jax, flax, optax, numpy and jaxtyping, no more.
"""

import contextlib
import json
import os
import sys
from typing import NamedTuple

os.environ.setdefault('JAX_PLATFORMS', 'cpu' if any(arg.startswith('--topology') for arg in sys.argv) else '')

import jax
from jax.experimental import topologies
from train import Vocabulary, command, read, vocab_size

from nanovision_jax.config import Vision
from nanovision_jax.errors import UserError
from nanovision_jax.parallel import hardware
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.stages import stage_of
from nanovision_jax.training import fit, optim

TOWER = Vision(image_size=224, patch_size=14, width=1024, layers=24, heads=16, ffn=4096)  # CLIP's ViT-L/14


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


def described(gpu):
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


def devices_of(topology):
    """The devices of a topology by its name. Raises UserError where there is none, or nothing that compiles for it."""
    kind, _, size = topology.partition(':')
    alone = {'chips_per_host_bounds': (1, 1, 1)} if size == '1x1' else {}
    try:
        if kind in GPUS:
            found = topologies.get_topology_desc(
                platform='cuda', target_config=described(GPUS[kind]), topology=f'1x1x{size}'
            )
        else:
            found = topologies.get_topology_desc(topology, 'tpu', **alone)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        takes = 'jax-cuda12-plugin' if kind in GPUS else 'libtpu (pip install -e .[tpu])'
        reason = str(error).splitlines()[0]
        raise UserError(f'no topology {topology!r} ({reason}): it takes {takes}.') from error
    return list(found.devices)


def measure(config, topology):
    """What main() prints."""
    devices = devices_of(topology) if topology else jax.devices()
    if stage_of(config).sees and config.size != 'tiny':
        config.model.vision = TOWER
    if topology:
        config.dtype = 'bfloat16'
    mesh = parallel.make_mesh(config.mesh, devices, config.data.batch_size // config.optim.parts)
    size = vocab_size(config)
    parallel.check_divides(config, mesh, size)
    with jax.set_mesh(mesh), contextlib.redirect_stdout(sys.stderr):
        program = fit.settle(config, Vocabulary(size, size - 1), optim.make_optimizer(config.optim, 1000), mesh)
    memory = program.step.memory_analysis()
    sent = fit.collectives(program.step.as_text())
    return {
        'stage': config.stage,
        'devices': f'{mesh.size} × {devices[0].device_kind}',
        'mesh': dict(mesh.shape),
        'attention': config.model.attention,
        'remat': config.model.remat,
        'accumulate': config.optim.accumulate,
        'peak_bytes': program.peak,
        'state_and_batch_bytes': memory.argument_size_in_bytes,
        'memory_bytes': hardware.memory(devices[0]),
        'collectives': {f'{kind} {dtype}': sent._asdict() for (kind, dtype), sent in sorted(sent.items())},
        'compile_seconds': round(program.seconds, 1),
        'versions': {'jax': jax.__version__},
    }


def main(argv):
    """The command: see the module's docstring."""
    topology = [arg.removeprefix('--topology=') for arg in argv if arg.startswith('--topology=')]
    config, _ = read([arg for arg in argv if not arg.startswith('--topology=')])
    print(json.dumps(measure(config, *topology[-1:] or [''])))


if __name__ == '__main__':
    command(main)
