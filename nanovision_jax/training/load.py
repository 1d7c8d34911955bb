"""Reads the parameters that a run starts from, out of checkpoints and published weights."""

import jax

from nanovision_jax.errors import UserError
from nanovision_jax.hf import decoders, towers
from nanovision_jax.runs import checkpoint
from nanovision_jax.training.start import Run


def load_parameters(sources, params: dict, vocab_size: int) -> dict:
    """`params` (nested dicts of jax.ShapeDtypeStruct with shardings) with every source's part read into it.

    sources: see start.find(), proven. What no source has stays as it was. Raises UserError where a source does not fit
    or is not finite.
    """
    for source in sources:
        target = params[source.target] if source.target else params
        read = _from_run(source, target) if isinstance(source, Run) else _published(source, target, vocab_size)
        if not checkpoint.finite(read):
            raise UserError(f'{source} holds parameters that are NaN or infinite: its training had diverged.')
        params = params | {source.target: read} if source.target else read
    return params


def _from_run(source, target):
    wrapped = {source.part: target} if source.part else target
    read = checkpoint.restore(source.folder, source.step, 'params', checkpoint.like(wrapped))
    return read[source.part] if source.part else read


def _published(source, target, vocab_size):
    if source.part == 'vision':
        read = towers.tower_weights(source.folder, target)
    else:
        read = decoders.read_decoder(source.folder, target, vocab_size)
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), read, target)
