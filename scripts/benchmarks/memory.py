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

os.environ.setdefault('JAX_PLATFORMS', 'cpu' if any(arg.startswith('--topology') for arg in sys.argv) else '')

import jax
from train import Vocabulary, command, read, vocab_size

from nanovision_jax.config import TINY, Vision
from nanovision_jax.parallel import hardware
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.planning.topologies import devices_of
from nanovision_jax.stages import stage_of
from nanovision_jax.training import fit, optim

TOWER = Vision(image_size=224, patch_size=14, width=1024, layers=24, heads=16, ffn=4096)  # CLIP's ViT-L/14


def measure(config, topology):
    """What main() prints."""
    devices = devices_of(topology) if topology else jax.devices()
    if stage_of(config).sees and config.size not in TINY:
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
