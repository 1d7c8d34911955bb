"""Files of weights in Hugging Face's layout: which are read, how our arrays lie in them, what does not fit.

An architecture is a table: our parameter, its names in their files, and how its axes turn. Only safetensors are read,
never a pickle; names in a file are looked up in the table, never used as paths.
"""

import fnmatch
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nanovision_jax.errors import UserError
from nanovision_jax.parallel.mesh import path_name
from nanovision_jax.runs.folder import read_json


class Layout(NamedTuple):
    """How one of our arrays lies in a file of theirs: to_hf(ours), and back with from_hf(theirs, shape of ours)."""

    to_hf: Callable
    from_hf: Callable


SAME = Layout(lambda x: x, lambda x, shape: x.reshape(shape))
LINEAR = Layout(lambda x: x.T, lambda x, shape: x.T.reshape(shape))  # [in, out] ↔ torch's [out, in]
INTO_HEADS = Layout(lambda x: x.reshape(x.shape[0], -1).T, LINEAR.from_hf)  # [D, N, H] ↔ [N·H, D]
OUT_OF_HEADS = Layout(lambda x: x.reshape(-1, x.shape[-1]).T, LINEAR.from_hf)  # [N, H, D] ↔ [D, N·H]
HEADS_BIAS = Layout(lambda x: x.reshape(-1), SAME.from_hf)  # [N, H] ↔ [N·H]


PREFIXES = ('module.', '_orig_mod.', 'base_model.model.')
LISTED = 10  # complaints in a message


def _patch_to_hf(x):  # [p·p·3, D] ↔ a convolution's [D, 3, p, p]
    side = round((x.shape[0] // 3) ** 0.5)
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


PATCH = Layout(_patch_to_hf, lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape))


class Tensor(NamedTuple):
    """A tensor in a file: its shape, and `read()`, which gives it in float32."""

    shape: tuple[int, ...]
    read: Callable[[], Float32[np.ndarray, '...']]


class Weights:
    """The tensors of a file or folder by name, or those whose name begins with `prefix`, named without it."""

    def __init__(self, where, tensors: dict[str, Tensor], prefix=''):
        self.where, self.tensors, self.prefix = where, tensors, prefix

    def part(self, prefix):
        """The tensors whose names begin with `prefix`, under the rest of their names."""
        found = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
        return Weights(self.where, found, self.prefix + prefix)

    def refuse(self, complaints):
        """Raises UserError if anything is wrong: it lists LISTED complaints, and counts the others."""
        if complaints:
            told = '; '.join(complaints[:LISTED])
            more = f'; and {len(complaints) - LISTED} more' if len(complaints) > LISTED else ''
            raise UserError(f'the weights in {self.where} do not fit: {told}{more}.')

    def unknown(self, known, ignored=()):
        """A complaint for each name that is not in `known` and matches none of the patterns `ignored`."""
        names = sorted(self.tensors.keys() - set(known))
        return [
            f'{self.prefix}{n} is unknown' for n in names if not any(fnmatch.fnmatch(n, pattern) for pattern in ignored)
        ]


def open_weights(folder: pathlib.Path) -> Weights:
    """The tensors of model.safetensors in a folder, or of the shards that its index names.

    Raises UserError where there are none, for a pickle, and for a damaged file.
    """
    index = folder / 'model.safetensors.index.json'
    if (folder / 'model.safetensors').is_file():
        files = [folder / 'model.safetensors']
    elif index.is_file():
        shards = sorted(set(read_json(index).get('weight_map', {}).values()))
        if any(pathlib.PurePath(str(shard)).name != shard for shard in shards):
            raise UserError(f'{index} names a file outside its folder.')
        files = [folder / shard for shard in shards]
    else:
        pickles = [file.name for pattern in ('*.bin', '*.pt', '*.pth') for file in folder.glob(pattern)]
        why = f'only {pickles[0]}, a pickle, which could run any code' if pickles else 'nothing'
        raise UserError(f'{folder} holds {why}: weights are read from model.safetensors, or shards with an index.')
    tensors = {}
    for file in files:
        try:
            opened = safe_open(file, 'flax')
        except (OSError, SafetensorError) as error:
            raise UserError(f'{file} is missing or damaged.') from error
        for name in opened.keys():  # noqa: SIM118 - no mapping
            shape = tuple(opened.get_slice(name).get_shape())
            tensors[name] = Tensor(shape, lambda o=opened, n=name: np.asarray(o.get_tensor(n).astype(jnp.float32)))
    return Weights(folder, without_prefixes(tensors))


def without_prefixes(tensors: dict) -> dict:
    """{name: tensor} without what DistributedDataParallel, torch.compile and peft put before every name."""
    while prefix := next((p for p in PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def write_weights(tensors: dict[str, np.ndarray], folder: pathlib.Path, dtype: str = 'float32'):
    """Writes {name: array} to model.safetensors in a folder, in `dtype`."""
    tensors = {
        name: np.ascontiguousarray(np.asarray(array).astype(jnp.dtype(dtype))) for name, array in tensors.items()
    }
    save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})  # transformers wants to be told so


def from_hf(weights: Weights, table: dict, shapes: dict, ignored=(), zero=()) -> dict:
    """Our parameters (nested dicts like `shapes`) out of their weights, by an architecture's table.

    Layers are stacked. Names that match `ignored` are left alone, those that match `zero` may hold nothing but zeros.
    Raises UserError that lists all that is missing, too much, of another shape or not zero.
    """
    wanted = {}  # {their name: the shape it must have}
    for path, leaf in jax.tree.leaves_with_path(shapes):
        ours = path_name(path)
        if ours.startswith('blocks/') and leaf.shape[0] > (held := len(weights.tensors)):
            weights.refuse([f'config.json tells of {leaf.shape[0]:,} layers, and there are {held:,} tensors in all'])
        names = _names(table, ours, leaf.shape)
        piece = jax.ShapeDtypeStruct(_piece(ours, leaf.shape, len(names[0])), jnp.float32)
        shape = jax.eval_shape(table[ours][1].to_hf, piece).shape
        wanted |= {name: shape for parts in names for name in parts}
    weights.refuse([*_misfits(weights, wanted), *weights.unknown(wanted, (*ignored, *zero)), *_not_zero(weights, zero)])
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _read(weights, table, path_name(path), leaf), shapes)


def _misfits(weights, wanted):
    """A complaint for each wanted tensor that is missing or of another shape."""
    for name, shape in wanted.items():
        if name not in weights.tensors:
            yield f'{weights.prefix}{name} is missing'
        elif weights.tensors[name].shape != shape:
            yield f'{weights.prefix}{name} is {list(weights.tensors[name].shape)} and not {list(shape)}'


def _not_zero(weights, patterns):
    """A complaint for each tensor that must be zero and is not."""
    for name in sorted(weights.tensors):
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns) and weights.tensors[name].read().any():
            yield f'{weights.prefix}{name} is not zero, which our model cannot represent'


def _read(weights, table, ours, leaf):
    """One of our arrays: the tensors of every layer, of query, key and value where they are apart, as one."""
    names = _names(table, ours, leaf.shape)
    layout, shape = table[ours][1], _piece(ours, leaf.shape, len(names[0]))
    layers = []
    for parts in names:
        pieces = [layout.from_hf(weights.tensors[name].read(), shape) for name in parts]
        layers.append(np.stack(pieces, axis=-3) if len(pieces) > 1 else pieces[0])
    return np.stack(layers) if ours.startswith('blocks/') else layers[0]


def to_hf(params: dict, table: dict, prefix: str = '') -> dict[str, np.ndarray]:
    """The way back: our parameters (nested dicts) as {their name: float32 array}, by an architecture's table."""
    tensors = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        ours, leaf = path_name(path), np.asarray(leaf)
        layout, names = table[ours][1], _names(table, ours, leaf.shape)
        for layer, theirs in zip(leaf if ours.startswith('blocks/') else [leaf], names, strict=True):
            pieces = np.moveaxis(layer, -3, 0) if len(theirs) > 1 else [layer]
            tensors |= {prefix + name: layout.to_hf(piece) for name, piece in zip(theirs, pieces, strict=True)}
    return tensors


def _names(table, ours, shape):
    """Their names of one of our arrays: a list over layers of lists over the parts of which ours is made."""
    theirs = table[ours][0]
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    return [[name.format(layer) for name in theirs] for layer in range(shape[0] if ours.startswith('blocks/') else 1)]


def _piece(ours, shape, parts):
    """The shape of what one of their tensors holds of ours: of one layer, and of query, key or value."""
    shape = shape[1:] if ours.startswith('blocks/') else shape
    return (*shape[:-3], *shape[-2:]) if parts > 1 else shape
