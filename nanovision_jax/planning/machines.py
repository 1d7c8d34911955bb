"""What hardware can do and costs: the one table of it that plans are made from.

Peaks and what a program may take of the memory are of parallel/datasheets.py. Prices are list prices on demand, a
chip and hour, as they were in the year SEEN; they were not looked up again since, and --price says another.
"""

import re
from typing import NamedTuple

from nanovision_jax.errors import UserError, nearest
from nanovision_jax.parallel.datasheets import GPU_SHARE, MEMORY, PEAK

SEEN = '2025'


class Chip(NamedTuple):
    """One accelerator."""

    flops: float  # peak, bf16
    memory: float  # GiB that a program may take
    link: float  # GB/s a direction to the other chips of its host or slice
    network: float  # GB/s a direction and chip to other hosts; 0: there are none
    host: int  # chips a host, or a slice whose chips are linked
    price: float  # dollars an hour
    source: str
    topology: str = ''  # as Cloud TPU calls it: the step can be compiled for it

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu compiles for it."""
        return bool(self.topology)


CHIPS = {
    'a100-80g': Chip(
        PEAK['A100'], GPU_SHARE * 79.1, 300, 25, 8, 1.79, 'NVIDIA A100 data sheet; NVLink 3; Lambda, 8 × A100 SXM'
    ),
    'h100': Chip(
        PEAK['H100'], GPU_SHARE * 79.1, 450, 50, 8, 2.99, 'NVIDIA H100 SXM data sheet; NVLink 4; Lambda, 8 × H100 SXM'
    ),
    'h200': Chip(PEAK['H200'], GPU_SHARE * 140, 450, 50, 8, 3.99, 'NVIDIA H200 data sheet; NVLink 4; RunPod, H200 SXM'),
    'rtx4090': Chip(165e12, GPU_SHARE * 23.5, 25, 0, 1, 0.69, 'NVIDIA Ada whitepaper, float32 sums; PCIe 4; RunPod'),
    'l4': Chip(
        PEAK['L4'], GPU_SHARE * 22.5, 25, 0, 1, 0.71, 'NVIDIA L4 data sheet; PCIe 4; Google Cloud g2-standard-4'
    ),
    'tpu-v5e': Chip(
        PEAK['TPU v5e'], MEMORY['TPU v5 lite'], 200, 6, 256, 1.20, 'Google Cloud TPU v5e; ICI 1,600 Gbit/s', 'v5e'
    ),
    'tpu-v6e': Chip(
        PEAK['TPU v6e'], MEMORY['TPU v6 lite'], 400, 12, 256, 2.70, 'Google Cloud TPU v6e; ICI 3,200 Gbit/s', 'v6e'
    ),
}
SHAPES = {1: '1x1', 4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}  # of TPU slices


class Machine(NamedTuple):
    """So many chips of a kind; `chip` is None for the CPU at hand."""

    name: str
    chip: Chip | None
    count: int


def parse(text: str, price: float | None = None, flops: float = 0, memory: float = 0) -> Machine:
    """The Machine of a name: a100-80gx8, h100x8, tpu-v5e-8, cpu; or ownx4 with its TFLOP/s and GiB.

    price: dollars an hour and chip, instead of the table's. Raises UserError for another name.
    """
    if text == 'cpu':
        return Machine('cpu', None, 1)
    kind, count = (re.fullmatch(r'(.+?)[x-](\d+)', text) or re.fullmatch('(.*)()', text)).groups()
    if kind == 'own' and flops > 0 and memory > 0:
        chip = Chip(flops * 1e12, memory, 25, 12, 8, price or 0.0, 'given')
    elif kind in CHIPS:
        if flops or memory:
            raise UserError(f'--flops and --memory are for --hardware=ownxN: those of {kind} are known.')
        chip = CHIPS[kind]
    else:
        names = [f'{name}{"-8" if chip.is_tpu else "x8"}' for name, chip in CHIPS.items()]
        own = ' Other hardware is ownxN with --flops (TFLOP/s) and --memory (GiB).'
        raise UserError(f'no hardware {text!r}.{nearest(text, [*names, "cpu"])}{own}')
    if not count or int(count) < 1:
        raise UserError(f'how many? Say --hardware={kind}{"-" if chip.is_tpu else "x"}8.')
    if chip.is_tpu and int(count) not in SHAPES:
        raise UserError(f'no slice of {count} {kind}: there are {", ".join(map(str, SHAPES))}.')
    return Machine(text, chip._replace(price=chip.price if price is None else price), int(count))
