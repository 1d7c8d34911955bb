"""Checkpoints: Orbax writes them, a manifest proves them.

    checkpoints/<step>/params        all parameters, frozen ones too
    checkpoints/<step>/optimizer     the optimizer's state; what only reads parameters never opens it
    checkpoints/<step>/manifest.json the sha256 of every file, written last: a step without it is not whole

Orbax does not notice a flipped bit and casts dtypes in silence, hence the manifest and the checks here.
"""

import contextlib
import hashlib
import json
import pathlib
import shutil
import sys
import threading

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from nanovision_jax.errors import UserError
from nanovision_jax.parallel import hosts
from nanovision_jax.parallel.mesh import path_name
from nanovision_jax.runs.folder import MANIFEST, Paths, file_digest, whole_steps, write_whole


class Checkpoints:
    """Writes a run's checkpoints in the background, keeping the newest `keep`."""

    def __init__(self, run_dir, keep):
        self.folder, self.keep = Paths(pathlib.Path(run_dir).absolute()).checkpoints, keep
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread, self._error = None, None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        """Waits until everything is on disk; what is raised already comes before an error of that."""
        try:
            self.wait()
        except UserError as error:
            if kind is None:
                raise
            print(f'error: {error}', file=sys.stderr)

    def save(self, step: int, params: dict, optimizer, extra: dict):
        """Starts writing `params` and `optimizer` (trees of arrays; None: none); `extra` goes into the manifest.

        Returns once the arrays are copied. An error in the background is raised by the next save() or wait().
        """
        self.wait()
        if jax.default_backend() == 'cpu':  # Orbax would write from the very buffers that the next step is given
            params, optimizer = _copy((params, optimizer))
        for stale in [self.folder / str(step), *self.folder.glob(f'{step}.*')]:
            shutil.rmtree(stale, ignore_errors=True)  # unfinished or damaged: a whole one would not be written again
        trees = {'params': params} | ({} if optimizer is None else {'optimizer': optimizer})
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        self._writer.save(self.folder / str(step), args=ocp.args.Composite(**items))
        self._thread = threading.Thread(target=self._finish, args=(step, extra))
        self._thread.start()

    def _finish(self, step, extra):
        try:
            self._writer.wait_until_finished()
            if hosts.is_first():
                write_manifest(self.folder / str(step), {'step': step} | extra)
                # A later one is damaged, else the run had gone on from it; it must not push out a good one.
                for old in [s for s in whole_steps(self.folder.parent) if s <= step][self.keep :]:
                    (self.folder / str(old) / MANIFEST).unlink()  # from here on it does not count
                    shutil.rmtree(self.folder / str(old))
        except Exception as error:  # raised on the thread that trains
            self._error = error

    def wait(self):
        """Waits until everything is on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise UserError(f'a checkpoint could not be written to {self.folder}: {error}') from error


@jax.jit
def _copy(tree):  # one program: leaf by leaf, each shape would be compiled
    return jax.tree.map(jnp.copy, tree)


def write_manifest(folder, content):
    """Writes manifest.json: `content` and the sha256 of every file in the folder. The rename makes it whole."""
    files = sorted(file for file in folder.rglob('*') if file.is_file())
    digests = {str(file.relative_to(folder)): file_digest(file) for file in files}
    write_whole(folder / MANIFEST, json.dumps(content | {'files': digests}, indent=1) + '\n')


def restore(run_dir, step: int, item: str, target):
    """Reads `item` ('params' or 'optimizer') of a checkpoint into the shapes, dtypes and shardings of `target`.

    target: a tree of jax.ShapeDtypeStruct, of all that was saved or a part of it. Raises UserError where a
    leaf is missing or has another shape or dtype.
    """
    folder = Paths(pathlib.Path(run_dir).absolute()).checkpoint(step, item)
    if not folder.is_dir():
        raise UserError(f'{run_dir} has no {item} at step {step}: a converted run is a start for others (init_from).')
    # The handler itself: an ocp.Checkpointer would warn, at each reading, of a file that only whole checkpoints have.
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        saved = {path_name(p): leaf for p, leaf in jax.tree.leaves_with_path(reader.metadata(folder).tree)}
        wanted = {path_name(p): leaf for p, leaf in jax.tree.leaves_with_path(target)}
        for name, leaf in wanted.items():
            if name not in saved:
                raise UserError(f'{folder} has no {name}.')
            if (tuple(saved[name].shape), saved[name].dtype) != (tuple(leaf.shape), leaf.dtype):
                was, now = saved[name], leaf
                raise UserError(
                    f'{name} in {folder} is {was.dtype} {list(was.shape)}, and {now.dtype} {list(now.shape)} is wanted.'
                )
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        wanted = ocp.args.PyTreeRestore(item=target, restore_args=arguments, partial_restore=True)
        return reader.restore(folder, args=wanted)


def like(tree):
    """The ShapeDtypeStructs, shardings included, of a tree of arrays: a target for restore()."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def tree_digest(tree) -> str:
    """A digest over every leaf's name, shape, dtype and bytes: equal exactly when two trees are, bit for bit."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        digest.update(f'{path_name(path)} {leaf.dtype} {list(leaf.shape)} '.encode())
        digest.update(jax.device_get(leaf).tobytes())
    return f'2:{digest.hexdigest()}'


def former_tree_digest(tree) -> str:
    """What tree_digest() was before shape and dtype belonged to it: lineage.json of older runs holds it."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        digest.update(path_name(path).encode())
        digest.update(jax.device_get(leaf).tobytes())
    return digest.hexdigest()
