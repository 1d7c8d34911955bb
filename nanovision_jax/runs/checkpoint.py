"""Checkpoints: Orbax writes them, a manifest proves them.

    checkpoints/<step>/params        all parameters, frozen ones too
    checkpoints/<step>/optimizer     the optimizer's state; what only reads parameters never opens it
    checkpoints/<step>/manifest.json the sha256 of every file, of config and tokenizer, and its own; written last

Orbax does not notice a flipped bit and casts dtypes in silence, hence the manifest and the checks here.
"""

import contextlib
import errno
import hashlib
import logging
import pathlib
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from nanovision_jax.errors import Failure, UserError
from nanovision_jax.parallel import hosts
from nanovision_jax.parallel.mesh import path_name
from nanovision_jax.runs.folder import MANIFEST, Paths, beside, whole_steps, write_manifest

TRIES = 10  # to write a checkpoint; each pause is twice the one before, from a second on: eight and a half minutes


class Checkpoints:
    """Writes a run's checkpoints in the background, keeping the newest `keep`.

    A checkpoint that cannot be written, on a full disk say, is no end: that is said, what was written of it is removed,
    and due() tells when to save again; after TRIES in a row it is a Failure. Whatever else happens, whole ones stay.
    written: is called when one is whole.
    """

    def __init__(self, run_dir, keep, written: Callable | None = None):
        self.run_dir, self.keep = pathlib.Path(run_dir).absolute(), keep
        self.folder, self._written = Paths(self.run_dir).checkpoints, written
        self.beside = beside(self.run_dir)
        self.pause, self._failures, self._again = 0.0, 0, 0.0  # seconds to the next try; failed ones; when it is time
        self._thread, self._error, self._writer = None, None, _writer()
        self._remove_partial()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        """Waits for what is being written. That it cannot be is said, and comes before no other error."""
        try:
            self.wait()
        except UserError as error:
            if kind is None:
                raise
            print(f'error: {error}', file=sys.stderr)

    def due(self) -> bool:
        """Whether the last save failed and it is time for another one. It waits for nothing: ask after each step."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        return self._failures > 0 and time.monotonic() >= self._again

    def save(self, step: int, params: dict, optimizer, extra: dict):
        """Starts writing `params` and `optimizer` (trees of arrays; None: none); `extra` goes into the manifest.

        Returns once the arrays are copied. Raises Failure where it was the last of TRIES that failed.
        """
        self.wait()
        trees = {'params': params} | ({} if optimizer is None else {'optimizer': optimizer})
        try:
            self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(trees)))
            for stale in [self.folder / str(step), *self.folder.glob(f'{step}.*')] if hosts.is_first() else ():
                shutil.rmtree(stale, ignore_errors=True)  # damaged: a whole one would not be written again
            if jax.default_backend() == 'cpu':  # Orbax would write from the very buffers that the next step is given
                trees = _copy(trees)
            items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
            self._writer.save(self.folder / str(step), args=ocp.args.Composite(**items))
        except Exception as error:
            self._fail(error)
            return
        self._thread = threading.Thread(target=self._finish, args=(step, extra))
        self._thread.start()

    def wait(self) -> bool:
        """Waits until what is being written is on disk. Whether the last save is; else it is to be tried again."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            error, self._error = self._error, None
            if error is not None:
                self._fail(error)
            else:
                self.pause, self._failures = 0.0, 0
        return not self._failures

    def until_saved(self, save: Callable):
        """Waits until the last save is on disk; as long as it is not, `save` is called to save again."""
        while not self.wait():
            time.sleep(self.pause)
            save()

    def _check_room(self, size):
        """Raises OSError where a checkpoint of `size` bytes cannot be written. Orbax would hang where it makes none."""
        if not self.run_dir.is_dir():
            raise OSError(errno.ENOENT, 'the run folder is gone')  # and is not made anew
        self.folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder):
            pass
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise OSError(errno.ENOSPC, f'it takes {size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free')

    def _finish(self, step, extra):
        try:
            self._writer.wait_until_finished()
            if hosts.is_first():
                write_manifest(self.folder / str(step), {'step': step, **extra, 'beside': self.beside})
        except Exception as error:  # for the thread that trains
            self._error = error
            return
        # A later one is damaged, else the run had gone on from it; it must not push out a good one.
        for old in [s for s in whole_steps(self.run_dir) if s <= step][self.keep :] if hosts.is_first() else ():
            with contextlib.suppress(OSError):  # else it is removed another time
                (self.folder / str(old) / MANIFEST).unlink()  # from here on it does not count
                shutil.rmtree(self.folder / str(old))
        if self._written:
            self._written()

    def _fail(self, error):
        """Says that a save failed, and when the next try is. Raises Failure after the last one."""
        self._failures += 1
        self.pause = 2.0 ** (self._failures - 1)
        self._again = time.monotonic() + self.pause
        self._writer = _writer()  # threads of the other one may wait for ever
        self._remove_partial()
        why = f'a checkpoint could not be written to {self.folder}: {_reason(error)}'
        kept = next(iter(whole_steps(self.run_dir)), None)
        kept = 'there is none yet' if kept is None else f'the last one is step {kept}'
        tries = 1 if hosts.several() else TRIES  # hosts that try again at other times would wait for each other
        if self._failures == tries:
            raise Failure(f'{why}. That was try {tries} of {tries}; {kept}.') from error
        print(f'warning: {why}; {kept}, and the next try is in {self.pause:.0f} s', file=sys.stderr, flush=True)

    def _remove_partial(self):
        """Removes what was begun and has no manifest. Only one process writes a run (lock.py)."""
        if hosts.is_first() and self.folder.is_dir():
            for folder in self.folder.iterdir():
                if folder.name.partition('.')[0].isdigit() and not (folder / MANIFEST).exists():
                    shutil.rmtree(folder, ignore_errors=True)


def _writer():
    """Orbax's, which tells of its failures in a sentence of ours, not in tracebacks: its own, and TensorStore's."""
    logging.getLogger('absl').addFilter(_not_orbax)
    logging.getLogger('asyncio').addFilter(_not_tensorstore)
    if sys.unraisablehook is not _unraisable:
        _unraisable.before, sys.unraisablehook = sys.unraisablehook, _unraisable
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())


def _not_orbax(record):
    return 'orbax' not in record.pathname


def _not_tensorstore(record):
    """Of many files that could not be written, the first has said so: the others' errors are asked for by nobody."""
    return not (record.exc_info and 'OCDBT' in str(record.exc_info[1]))


def _unraisable(what):
    """What TensorStore's threads have to tell of those files comes when nobody listens any more."""
    if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == 'Event loop is closed'):
        _unraisable.before(what)


def _reason(error):
    """Why something could not be written, in a few words."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    said = re.search(r'\[OS error \d+: (?:[A-Z]+ )?([^]]+)]', str(error))
    return said.group(1) if said else (str(error).splitlines() or [type(error).__name__])[0][:200]


@jax.jit
def _copy(tree):  # one program: leaf by leaf, each shape would be compiled
    return jax.tree.map(jnp.copy, tree)


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


@jax.jit
def finite(tree) -> jax.Array:
    """Whether every number of a tree is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def tree_digest(tree) -> str:
    """A digest over every leaf's name, shape, dtype and bytes: equal exactly when two trees are, bit for bit."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        digest.update(f'{path_name(path)} {leaf.dtype} {list(leaf.shape)} '.encode())
        digest.update(hosts.fetch(leaf).tobytes())
    return f'2:{digest.hexdigest()}'


def former_tree_digest(tree) -> str:
    """What tree_digest() was before shape and dtype belonged to it: lineage.json of older runs holds it."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        digest.update(path_name(path).encode())
        digest.update(jax.device_get(leaf).tobytes())
    return digest.hexdigest()
