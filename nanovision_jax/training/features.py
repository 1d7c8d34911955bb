"""Fills the cache of the frozen tower's features (data/features.py) before the vision stages read it."""

import contextlib
import hashlib
import time

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped
from tqdm import tqdm

from nanovision_jax import models
from nanovision_jax.data import pipeline
from nanovision_jax.data.features import Features, Pictures, Unfinished, told
from nanovision_jax.errors import UserError
from nanovision_jax.parallel import hosts
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.runs import lock
from nanovision_jax.runs.checkpoint import tree_digest

FORMAT = 1  # of the files; another one makes all features anew
SECONDS = 5  # between records of what is on disk: what an interruption costs


def keep(config, rows, graphdef, params: dict, mesh) -> Features:
    """The features of all pictures of packed rows as data.cache_features says; made first where they are not there.

    What was begun goes on where it stopped. Of several hosts each reads its part, and the first writes. Raises
    UserError where there is no room for them, or no picture.
    """
    kept, pictures = config.data.cache_features, Pictures(rows)
    if not len(pictures):
        raise UserError('there is no picture whose features could be kept: leave out data.cache_features.')
    folder = config.family / 'features' / _key(config, rows, params['vision'])
    with contextlib.ExitStack() as stack:
        if hosts.is_first():
            stack.enter_context(lock.held(folder.parent / '.lock', f'the features in {folder.parent}', wait=True))
        hosts.gather(None)  # from here on they are made here, or were by other runs
        made = Unfinished(folder, len(pictures), config.model.vision, kept)
        what = f'features: {made.count:,} pictures in {kept}, {told(made.bytes)}, in {folder}'
        if folder.exists():
            print(f'{what}: they are there')
        else:
            made.check_room()
            print(f'{what}: {made.done:,} are there, the others are made now' if made.done else f'{what}: made now')
            _make(config, made, pictures, graphdef, params, mesh)
        hosts.gather(None)
    return Features(folder, kept, rows.index.images)


def _key(config, rows, tower) -> str:
    """A digest of all that features depend on: the tower, how it computes, and which pictures it gets, how prepared."""
    which = hashlib.sha256(rows.index.rows.tobytes() + rows.index.images.tobytes()).hexdigest()
    numbers = config.data.cache_features, models.compute_dtype(config.dtype).name
    of = FORMAT, numbers, tree_digest(tower), config.model.vision, rows.draft, rows.source.pictures, which
    return hashlib.sha256(repr(of).encode()).hexdigest()[:16]


def _make(config, made: Unfinished, pictures: Pictures, graphdef, params: dict, mesh):
    """Runs the tower over the pictures that are not done."""
    size, began, first = config.data.batch_size // config.optim.parts * config.data.slots, time.monotonic(), made.done
    step = jax.jit(
        lambda params, images: encode(models.merge(graphdef, params).tower_features(images), config.data.cache_features)
    )
    bar = tqdm(
        total=made.count,
        initial=made.done,
        desc='features',
        unit='picture',
        mininterval=1,
        disable=not hosts.is_first(),
    )
    how = size, made.done, config.data.workers, config.data.timeout, parallel.own_rows(mesh, size)
    with contextlib.closing(pipeline.batches(pictures, *how)) as batches:
        found = (step(params, parallel.put_batch(batch, mesh)['images']) for batch in batches)
        following, recorded = next(found), began
        with bar, made.opened() if hosts.is_first() else contextlib.nullcontext():
            while made.done < made.count:
                current, following = following, next(found)  # the device works while the disk does
                made.write(hosts.fetch(current))
                bar.update(made.done - bar.n)
                if hosts.is_first() and time.monotonic() - recorded > SECONDS:
                    made.record()
                    recorded = time.monotonic()
    if hosts.is_first():
        made.finish()
    seconds = time.monotonic() - began
    print(f'features: made in {seconds:.0f} s, {(made.count - first) / seconds:,.0f} pictures/s')


def encode(features: Float[Array, 'N P E'], kept: str) -> dict[str, Shaped[Array, 'N P *E']]:
    """Features as a batch holds them: bfloat16, or int8 with the scale that brings a patch's largest one to 127."""
    if kept == 'bf16':
        return {'features': features.astype(jnp.bfloat16)}
    features = features.astype(jnp.float32)
    scales = jnp.abs(features).max(axis=-1) / 127
    values = jnp.round(features / jnp.where(scales == 0, 1, scales)[..., None])
    return {'features': values.astype(jnp.int8), 'scales': scales}
