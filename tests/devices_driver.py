"""The quickstart's five stages, two steps each, on some tiny_world of few pictures. Run by test_devices.py.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/devices_driver.py FAMILY
"""

import pathlib
import sys

from nanovision_jax import train
from nanovision_jax.data.datasets import tiny_world

ROOT = pathlib.Path(__file__).parent.parent
tiny_world.EXAMPLES = {
    'scenes': {'train': 400, 'validation': 160, 'heldout': 24},
    'text': {'train': 400, 'validation': 40},
    'chat': {'train': 200, 'validation': 40},
}
for stage in ('clip', 'pretrain', 'sft', 'vision_pretrain', 'vision_instruct'):
    fields = {'run_dir': f'{sys.argv[1]}/{stage}', 'steps': 2, 'eval.batches': 1}
    overrides = [f'--config.{name}={value}' for name, value in fields.items()]
    train.main([f'--config={ROOT}/configs/{stage}.py:tiny', *overrides])
