"""Whether and where a run goes on, and what its folder holds beside checkpoints and metrics."""

import itertools
import os
import pathlib

from nanovision_jax.errors import UserError
from nanovision_jax.parallel import hosts
from nanovision_jax.runs import config_file as runconfig
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.training import start as starts


def open_run(config, resume: bool, anew: bool) -> int:
    """The step to go on from (0 for a new run), after checking what the run folder holds.

    Raises UserError if it holds another config and neither `resume` nor `anew` says what to do, and for a run that
    cannot go on: a converted one, or one whose config is lost.
    """
    folder, paths = pathlib.Path(config.run_dir), runfolder.Paths(config.run_dir)
    if resume and anew:
        raise UserError('--resume goes on with a run and --anew starts it again: say one of them.')
    if folder.exists() and anew:
        kept = next(f'{folder}.{n}' for n in itertools.count(1) if not os.path.exists(f'{folder}.{n}'))
        folder.rename(kept)
        print(f'the run that was in {folder} is kept as {kept}')
        return 0
    steps = runfolder.whole_steps(folder)
    if not paths.config.exists():
        if steps:
            raise UserError(f'{folder} has checkpoints but no config.json: bring it back, or start again with --anew.')
        return 0
    if steps and not paths.checkpoint(steps[0], 'optimizer').is_dir():
        raise UserError(
            f'{folder} is a converted run, without an optimizer to go on with: start another run from it, with '
            f'--config.init_from={folder} and another --config.name.'
        )
    if steps and not paths.lineage.exists():
        raise UserError(f'{folder} has checkpoints but no lineage.json: bring it back, or start again with --anew.')
    at = runfolder.newest(folder) or 0
    if at:
        runfolder.check_beside(folder, at)
    saved = runconfig.read(folder)
    config.model.remat = saved.model.remat if config.model.remat == 'auto' else config.model.remat
    config.optim.accumulate = config.optim.accumulate or saved.optim.accumulate  # what was settled stays so
    changed = runconfig.differences(saved, config)
    if changed and not resume:
        raise UserError(
            f'{folder} holds a run with another config ({", ".join(changed)} differ): '
            'say --resume to go on with the new one, --anew to start again, or choose another --config.name.'
        )
    if steps and (moved := [name for name in starts.WHERE if name in changed]):
        raise UserError(
            f'{", ".join(moved)} would change in {folder}, which goes on from its own checkpoint: where a run started '
            'stays as it was; leave it out, or choose another --config.name.'
        )
    return at


def write_run(config, tokenizer, bad: list[dict]):
    """Writes what a run folder holds beside checkpoints and metrics: config, tokenizer, the list of bad examples."""
    if not hosts.is_first():
        return
    paths = runfolder.Paths(config.run_dir)
    paths.folder.mkdir(parents=True, exist_ok=True)
    runconfig.save(config)
    runfolder.copy_whole(tokenizer.folder, paths.tokenizer)
    if bad:
        runfolder.write_lines(paths.bad_rows, bad)
        print(f'{len(bad)} bad examples are left out, listed in {paths.bad_rows}')
