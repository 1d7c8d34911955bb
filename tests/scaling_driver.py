"""Prints what a step sends and holds on each mesh of so many virtual devices: python scaling_driver.py DEVICES MESHES

MESHES is JSON: a list of [data, fsdp, tensor]. Bytes are of one device.
"""

import json
import math
import sys

import jax
import micro

from nanovision_jax import config as configs
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.training import fit, optim

devices, meshes = int(sys.argv[1]), json.loads(sys.argv[2])
jax.config.update('jax_num_cpu_devices', devices)
jax.config.update('jax_disable_most_optimizations', True)


def bytes_of(leaf):
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


for sizes in meshes:
    cfg = micro.config('pretrain')
    cfg.model = configs.Model(layers=2, width=256, heads=8, ffn=512, positions=128)
    cfg.data.batch_size = devices
    mesh = parallel.make_mesh(configs.Mesh(*sizes))
    with jax.set_mesh(mesh):
        program = fit.compile_step(cfg, micro.TOKENIZER, optim.make_optimizer(cfg.optim, 10), mesh)
    found = {f'{kind} {dtype}': sent.bytes for (kind, dtype), sent in fit.collectives(program.step.as_text()).items()}
    state = jax.tree.leaves(program.shapes)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in state)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(program.shapes['params']))
    held = sum(map(bytes_of, state))
    print(json.dumps({'sent': found, 'held': held, 'whole': whole, 'parameters': parameters}), flush=True)
