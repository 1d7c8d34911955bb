"""Files of weights in Hugging Face's layout: which are read, how our arrays lie in them, what does not fit.

A family is a table: our parameter, its names there, and how its axes turn. Only safetensors are read, never a pickle;
names in a file are looked up in the table, never used as paths.
"""

import fnmatch
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from nanovision_jax.errors import UserError
from nanovision_jax.parallel.mesh import path_name
from nanovision_jax.runs.config_file import hub_id
from nanovision_jax.runs.folder import read_json


class Layout(NamedTuple):
    """How one of our arrays lies in a file: `there(ours)`, and back with `here(theirs, shape of ours)`."""

    there: Callable
    here: Callable


SAME = Layout(lambda x: x, lambda x, shape: x.reshape(shape))
LINEAR = Layout(lambda x: x.T, lambda x, shape: x.T.reshape(shape))  # [in, out] ↔ torch's [out, in]
INTO_HEADS = Layout(lambda x: x.reshape(x.shape[0], -1).T, LINEAR.here)  # [D, N, H] ↔ [N·H, D]
OUT_OF_HEADS = Layout(lambda x: x.reshape(-1, x.shape[-1]).T, LINEAR.here)  # [N, H, D] ↔ [D, N·H]
HEADS_BIAS = Layout(lambda x: x.reshape(-1), SAME.here)  # [N, H] ↔ [N·H]


PREFIXES = ('module.', '_orig_mod.', 'base_model.model.')
LISTED = 10  # complaints in a message


def _patch_there(x):  # [p·p·3, D] ↔ a convolution's [D, 3, p, p]
    side = round((x.shape[0] // 3) ** 0.5)
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


PATCH = Layout(_patch_there, lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape))


def find(source, files='config.json and model.safetensors') -> pathlib.Path:
    """The folder of a model: `source` itself, or the hub's files of that id (see runconfig.hub_id), downloaded once.

    Raises UserError for what is neither; it names the `files` that a folder must hold.
    """
    source = str(source)
    if (name := hub_id(source)) is None:
        folder = pathlib.Path(source).expanduser()
        if folder.is_dir():
            return folder
        raise UserError(f'{source!r} is no folder: name one that holds {files}, or a hub id as OWNER/NAME.')
    import huggingface_hub

    try:
        wanted = ['*.json', '*.safetensors', 'merges.txt', 'tokenizer.model', '*.jinja']
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except (huggingface_hub.errors.HFValidationError, huggingface_hub.errors.HfHubHTTPError, OSError) as error:
        raise UserError(
            f'{source!r} is no folder here, and as a hub id it gives no model ({type(error).__name__}: not there, or '
            f'the hub is out of reach): check the name. Offline, place {files} in a folder and name that.'
        ) from error


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

    def unknown(self, known, beside=()):
        """A complaint for each name that is not in `known` and matches none of the patterns `beside`."""
        names = sorted(self.tensors.keys() - set(known))
        return [f'{self.prefix}{n} is unknown' for n in names if not any(fnmatch.fnmatch(n, b) for b in beside)]


def open_weights(folder) -> Weights:
    """The tensors of model.safetensors in a folder, or of the shards that its index names.

    Raises UserError where there are none, for a pickle, and for a damaged file.
    """
    from safetensors import SafetensorError, safe_open

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


def without_prefixes(tensors):
    """{name: tensor} without what DistributedDataParallel, torch.compile and peft put before every name."""
    while prefix := next((p for p in PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def write_weights(tensors, folder, dtype='float32'):
    """Writes {name: array} to model.safetensors in a folder, in `dtype`."""
    from safetensors.numpy import save_file

    tensors = {
        name: np.ascontiguousarray(np.asarray(array).astype(jnp.dtype(dtype))) for name, array in tensors.items()
    }
    save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})  # transformers wants to be told so


def take(weights, table, shapes, beside=(), zero=()):
    """Our parameters (nested dicts like `shapes`) out of a file, by a family's table.

    Layers are stacked. Names that match `beside` are left alone, those that match `zero` may hold nothing but zeros.
    Raises UserError that lists all that is missing, too much, of another shape or not zero.
    """
    leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(shapes)}
    parts = {ours: _names(table, ours, leaf.shape) for ours, leaf in leaves.items()}
    wrong, used = [], set()
    for ours, leaf in leaves.items():
        shape = _piece(ours, leaf.shape, len(parts[ours][0]))
        wanted = jax.eval_shape(table[ours][1].there, jax.ShapeDtypeStruct(shape, jnp.float32)).shape
        for name in (name for names in parts[ours] for name in names):
            used.add(name)
            if name not in weights.tensors:
                wrong.append(f'{weights.prefix}{name} is missing')
            elif weights.tensors[name].shape != wanted:
                wrong.append(f'{weights.prefix}{name} is {list(weights.tensors[name].shape)} and not {list(wanted)}')
    wrong += weights.unknown(used, (*beside, *zero))
    for name in sorted(weights.tensors.keys() - used):
        if any(fnmatch.fnmatch(name, pattern) for pattern in zero) and weights.tensors[name].read().any():
            wrong.append(f'{weights.prefix}{name} is not zero, which our model cannot represent')
    weights.refuse(wrong)

    def build(path, leaf):
        ours = path_name(path)
        here, shape = table[ours][1].here, _piece(ours, leaf.shape, len(parts[ours][0]))
        layers = [[here(weights.tensors[name].read(), shape) for name in names] for names in parts[ours]]
        layers = [np.stack(pieces, axis=-3) if len(pieces) > 1 else pieces[0] for pieces in layers]
        return np.stack(layers) if ours.startswith('blocks/') else layers[0]

    return jax.tree_util.tree_map_with_path(build, shapes)


def give(params, table, prefix=''):
    """The way back: our parameters (nested dicts) as {their name: float32 array}, by a family's table."""
    tensors = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        ours, leaf = path_name(path), np.asarray(leaf)
        there, names = table[ours][1].there, _names(table, ours, leaf.shape)
        for layer, theirs in zip(leaf if ours.startswith('blocks/') else [leaf], names, strict=True):
            pieces = np.moveaxis(layer, -3, 0) if len(theirs) > 1 else [layer]
            tensors |= {prefix + name: there(piece) for name, piece in zip(theirs, pieces, strict=True)}
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
