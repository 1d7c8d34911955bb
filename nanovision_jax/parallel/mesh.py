"""The mesh, and which axis of which array is split over it. The models know nothing of this.

Axes: `data` copies the model, `fsdp` splits parameters and the batch (arXiv:2304.11277), `tensor` splits matrix
products (arXiv:1909.08053). Matrices into a layer are P(fsdp, tensor), matrices out of it P(tensor, fsdp): with both
the same way round, jax 0.10 gave wrong gradients on a mesh that uses all three axes.
"""

import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nanovision_jax import config as configs
from nanovision_jax.errors import UserError
from nanovision_jax.models.layers import padded
from nanovision_jax.stages import stage_of

PARTS = {  # the parts of a config that give each kind of model its widths
    'clip': ('model.vision', 'model.text'),
    'decoder': ('model',),
    'vlm': ('model', 'model.vision'),
}
AXES = ('data', 'fsdp', 'tensor')
BATCH = P(('data', 'fsdp'))

# (end of the parameter's path, spec). Blocks are stacked: their first axis is the layer. The rest is replicated.
RULES = (
    (r'blocks/qkv/kernel', P(None, 'fsdp', None, 'tensor', None)),
    (r'blocks/qkv/bias', P(None, None, 'tensor', None)),
    (r'blocks/q/kernel', P(None, 'fsdp', 'tensor', None)),
    (r'blocks/q/bias', P(None, 'tensor', None)),
    (r'blocks/kv/kernel', P(None, 'fsdp', None, 'tensor', None)),
    (r'blocks/kv/bias', P(None, None, 'tensor', None)),
    (r'blocks/out/kernel', P(None, 'tensor', None, 'fsdp')),
    (r'blocks/ffn_(in|gate)/kernel', P(None, 'fsdp', 'tensor')),
    (r'blocks/ffn_in/bias', P(None, 'tensor')),
    (r'blocks/ffn_out/kernel', P(None, 'tensor', 'fsdp')),
    (r'embedding/embedding', P('tensor', 'fsdp')),
    (r'head/kernel', P('fsdp', 'tensor')),
    (r'projector/first/kernel', P('fsdp', 'tensor')),
    (r'projector/second/kernel', P('tensor', 'fsdp')),
    (r'patch/kernel', P(None, 'fsdp')),
    (r'(vision|text)_projection/kernel', P('fsdp', None)),
)


def make_mesh(sizes, devices: list | None = None, rows: int | None = None) -> jax.sharding.Mesh:
    """A (data, fsdp, tensor) mesh over all devices. `sizes` is a config.Mesh; -1 takes what the others leave.

    rows: how many go through at once. data=-1 takes as many devices as divide them, and says which it leaves idle.
    Raises UserError if the product does not use every device.
    """
    devices = devices or jax.devices()
    shape = [getattr(sizes, axis) for axis in AXES]
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise UserError(f'mesh {dict(zip(AXES, shape, strict=True))}: axes are 1 or more, and one of them may be -1.')
    known = int(np.prod([n for n in shape if n != -1]))
    if sizes.data == -1 and rows and known <= len(devices):
        copies = len(devices) // known
        halves = (n for n in range(copies, 0, -1) if copies % n == 0)  # a TPU's slice cannot be any number of chips
        dividing = next((n for n in halves if rows % (n * sizes.fsdp) == 0), copies)
        if dividing < copies and jax.process_count() == 1:
            print(
                f'using {dividing * known} of {len(devices)} devices: {rows} rows do not divide by '
                f'{copies * sizes.fsdp}; another data.batch_size would use them all'
            )
            devices = devices[: dividing * known]
    shape = [len(devices) // known if n == -1 else n for n in shape]
    if int(np.prod(shape)) != len(devices):
        raise UserError(
            f'mesh {dict(zip(AXES, shape, strict=True))} uses {int(np.prod(shape))} of {len(devices)} devices: '
            'the product of its axes must be all of them (set one axis to -1).'
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_divides(config, mesh: jax.sharding.Mesh, vocab_size: int):
    """Raises UserError where an axis of the mesh does not divide what it splits."""
    shape, model, data = dict(mesh.shape), config.model, config.data
    rows = shape['data'] * shape['fsdp']
    splits = [('data.batch_size', data.batch_size // config.optim.parts, rows, 'data × fsdp (per accumulated part)')]
    widths = {name: configs.get(config, name) for name in PARTS[stage_of(config).model]}
    for name, part in widths.items():
        splits += [(f'{name}.{f}', getattr(part, f), shape['tensor'], 'tensor') for f in ('heads', 'ffn')]
        splits += [(f'{name}.width', part.width, shape['fsdp'], 'fsdp')]
    if 'model' in widths and model.flavour == 'llama':
        splits += [('model.kv_heads', model.kv_heads or model.heads, shape['tensor'], 'tensor')]
    splits += [('the padded vocabulary', padded(vocab_size), shape['tensor'], 'tensor')]
    for name, value, parts, axis in splits:
        if value % parts:
            raise UserError(f'mesh axis {axis} is {parts} and does not divide {name}, which is {value}.')


def path_name(path) -> str:
    """A tree path as 'blocks/qkv/kernel'."""
    return '/'.join(str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key)))) for key in path)


def shardings(tree, mesh: jax.sharding.Mesh):
    """The NamedSharding of every leaf of a parameter tree, or of an optimizer state made of such trees."""

    def rule(path, leaf):
        name = path_name(path)
        for pattern, spec in RULES:
            if re.search(pattern + '$', name) and len(spec) <= len(leaf.shape):
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(rule, tree)


def own_shards(mesh: jax.sharding.Mesh) -> list[int]:
    """Which of the equal shares of a batch, one for each place of data × fsdp, this host's devices hold."""
    places = mesh.devices.reshape(-1, mesh.shape['tensor'])
    return [n for n, place in enumerate(places) if any(d.process_index == jax.process_index() for d in place)]


def own_rows(mesh: jax.sharding.Mesh, batch_size: int) -> list[int]:
    """Which rows of a batch this host's devices hold."""
    size = batch_size // (mesh.shape['data'] * mesh.shape['fsdp'])
    return [row for shard in own_shards(mesh) for row in range(shard * size, (shard + 1) * size)]


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Numpy batch to device arrays, rows split over data and fsdp. Of several hosts each has its own_rows()."""
    sharding, own = NamedSharding(mesh, BATCH), own_shards(mesh)
    shards = mesh.shape['data'] * mesh.shape['fsdp']

    def put(value):
        rows = len(value) // len(own)

        def share(index):
            at = own.index((index[0].start or 0) // rows)
            return value[at * rows : (at + 1) * rows]

        return jax.make_array_from_callback((rows * shards, *value.shape[1:]), sharding, share)

    if jax.process_count() == 1:
        return {name: jax.device_put(value, sharding) for name, value in batch.items()}
    return {name: put(value) for name, value in batch.items()}
