"""Takes steps of a run again, to see whether this machine gives the same bits: train --verify=N.

No step is written; what cannot be read any more is listed in skipped.jsonl, as when a run goes on.
"""

import contextlib

import jax
import numpy as np

from nanovision_jax.errors import Failure, UserError
from nanovision_jax.parallel import compile_cache
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.parallel.mesh import path_name
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.runs import lock
from nanovision_jax.training import loop, optim
from nanovision_jax.training.prefetch import stream
from nanovision_jax.training.resume import open_run

NAMED = 5  # arrays that differ, in a message


def verify(config, steps: int):
    """Takes `steps` steps twice from a checkpoint, and compares losses and states bit by bit.

    From the newest checkpoint that has another one so many steps later, with which it is compared, too; else from the
    newest. Raises UserError where there is none, and Failure where something differs.
    """
    with lock.of_run(config.run_dir):
        _verify(config, steps)


def _verify(config, steps):
    newest, folder = open_run(config, resume=False, anew=False), config.run_dir
    if not newest:
        raise UserError(f'{folder} has no checkpoint to verify steps from.')
    whole = [step for step in runfolder.whole_steps(folder) if step <= newest]
    start = next((step for step in whole if step + steps in whole), newest)
    compile_cache.use()
    mesh = parallel.make_mesh(config.mesh, rows=config.data.batch_size // config.optim.parts)
    with jax.set_mesh(mesh):
        data = loop.open_data(config, mesh, [], start)
        program = loop.compile_step(config, data, optim.make_optimizer(config.optim, data.steps), mesh)
        if config.data.cache_features:
            loop.read_features(config, data, program, loop.read_state(config, program, start), mesh)
        found = [_taken(config, data, program, mesh, start, steps) for _ in range(2)]
        saved = jax.device_get(loop.read_state(config, program, start + steps)) if start + steps in whole else None
    for step, (first, second) in enumerate(zip(found[0][0], found[1][0], strict=True), start + 1):
        print(f'step {step}  loss {first:.6f}' + ('' if first == second else f', and {second:.6f} the second time'))
    _compare(found[0][1], found[1][1], f'{steps} steps from step {start} on, taken twice')
    if saved is not None:
        _compare(found[0][1], saved, f'what {steps} steps make of checkpoint {start}, and checkpoint {start + steps}')


def _taken(config, data, program, mesh, start, steps):
    """([loss of each step], the state after them) of so many steps from a checkpoint."""
    state, losses = loop.read_state(config, program, start), []
    batches, _ = stream(config, data.rows, mesh, start)
    with contextlib.closing(batches):
        for _ in range(steps):
            state, metrics = program.step(state, next(batches)[0])
            losses.append(float(metrics['loss']))
    return losses, jax.device_get(state)


def _compare(one, other, what):
    """Says that two states are the same, bit by bit. Raises Failure where they are not."""
    leaves = jax.tree.leaves_with_path(one)
    differ = [
        path_name(path)
        for (path, leaf), theirs in zip(leaves, jax.tree.leaves(other), strict=True)
        if np.asarray(leaf).tobytes() != np.asarray(theirs).tobytes()
    ]
    if differ:
        raise Failure(f'{what}: {len(differ)} of {len(leaves)} arrays differ ({", ".join(differ[:NAMED])}, …).')
    print(f'{what}: bit-equal')
