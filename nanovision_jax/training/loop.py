"""The training loop, the same for every stage, in acts from top to bottom."""

import contextlib
import gc
import itertools
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from nanovision_jax import models
from nanovision_jax.data import pipeline, stores
from nanovision_jax.data.tokenizer import Tokenizer
from nanovision_jax.errors import UserError, check_writable
from nanovision_jax.parallel import compile_cache, hardware, hosts
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.runs import checkpoint, lineage, lock
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.runs.mirror import Mirror
from nanovision_jax.runs.skips import lost_examples
from nanovision_jax.stages import stage_of
from nanovision_jax.training import features, fit, optim, watching
from nanovision_jax.training import start as starts
from nanovision_jax.training.load import load_parameters
from nanovision_jax.training.log import Log
from nanovision_jax.training.meter import Startup
from nanovision_jax.training.prefetch import read_together, stream
from nanovision_jax.training.resume import open_run, write_run
from nanovision_jax.training.step import init_state, make_eval_step, partition
from nanovision_jax.training.stopping import StopOnSignal
from nanovision_jax.training.trace import Trace


def train(
    config,
    resume: bool = False,
    anew: bool = False,
    profile: int = 0,
    began: float | None = None,
    stop: StopOnSignal | None = None,
    cluster: hosts.Cluster | None = None,
) -> pathlib.Path:
    """Runs a stage to its end (or to the next signal), and returns the run folder.

    profile: so many steps are traced, into the run's folder profile. began: as Startup takes it. stop: which hears
    signals already. cluster: of which this process is one host. Raises UserError where another process trains this run.
    """
    startup = Startup(began)
    startup.reached('imports')
    folder = pathlib.Path(config.run_dir)
    check_writable(folder)
    watching.check_tasks(config)
    hearing = contextlib.nullcontext(stop) if stop else StopOnSignal()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(hearing)
        stack.enter_context(hosts.joined(cluster))
        written = None
        if hosts.is_first():
            stack.enter_context(lock.of_run(folder))
            if config.checkpoint.mirror:
                written = stack.enter_context(Mirror(config)).push
        return train_alone(config, resume, anew, profile, startup, stop, written)


def train_alone(
    config, resume: bool, anew: bool, profile: int, startup: Startup, stop: StopOnSignal, written: Callable | None
) -> pathlib.Path:
    """train(), while no other process may train this run. written: is called when a checkpoint is whole."""
    stop.clean_first()
    folder = pathlib.Path(config.run_dir)
    with hosts.first_before_others():
        if hosts.is_first():
            for place in (folder, folder / 'tokenizer'):
                runfolder.remove_partial(place)
        sources = find_sources(config) if anew or not starts.is_run(folder) else []
        start = open_run(config, resume, anew)
    ended = runfolder.read_lineage(folder).get('finished') == start
    if config.steps and start >= config.steps and ended:
        return finished(folder, start, config.steps)
    compile_cache.use()
    mesh = parallel.make_mesh(config.mesh, rows=config.data.batch_size // config.optim.parts)
    with jax.set_mesh(mesh):
        came_from = [f'{config.stage} goes on from {folder}, step {start}'] if start else starts.lines(config, sources)
        print('\n'.join(came_from))
        startup.reached('devices')
        data = open_data(config, mesh, sources, start)
        startup.reached('data')
        if start >= data.steps and ended:
            return finished(folder, start, data.steps)
        training = begin(config, data, sources, mesh, start, startup)
        step, params = run_steps(config, data, training, mesh, start, stop, startup, profile, written)
        if stop.signal is not None:  # the end, too, is completed by the same command
            hosts.part()
            print(f'stopped by signal {stop.signal} at step {step}; the same command goes on from there')
            sys.exit(stop.code)
        frozen = lineage.digests(partition(config, params)[1])
        assert frozen == training.frozen, f'frozen parts changed: {frozen} != {training.frozen}'
        lineage.end(config, step, frozen, hardware.peak_memory())
    print(f'finished: {folder}')
    return folder


def finished(folder: pathlib.Path, step: int, steps: int) -> pathlib.Path:
    """Says that there is nothing to do, and returns the run folder."""
    print(f'{folder} is finished: {step} of {steps} steps')
    return folder


# Act 1: where the run starts, and its data ---------------------------------------------------------------------------


def find_sources(config) -> list:
    """What a new run starts from, each compared with the config and proven intact, before anything is moved or made."""
    sources = starts.find(config, anew=True)
    starts.check(config, sources)
    for source in sources:
        source.prove(config.allow_unfinished_parent)
    return sources


class RunData(NamedTuple):
    """What a run learns from and is validated on: see data/pipeline.py."""

    tokenizer: Tokenizer
    rows: Any
    validation: Any
    bad: list[dict]  # examples that cannot be used
    steps: int  # of the whole run


def open_data(config, mesh, sources: list, start: int) -> RunData:
    """Opens tokenizer and rows."""
    stores.fetch(config)  # by each host for itself
    known = next((source.tokenizer for source in sources if source.tokenizer), None)
    # Stages that start side by side make tokenizer, data and index once: the second waits, and takes them.
    shared = lock.held(config.family / '.lock', f'what the runs of {config.family} share', wait=True)
    with hosts.first_before_others(), shared:
        runfolder.remove_partial(config.family / 'data', untouched=60)  # an evaluation elsewhere may write there too
        tokenizer = pipeline.family_tokenizer(config, runfolder.Paths(config.run_dir).tokenizer if start else known)
        parallel.check_divides(config, mesh, tokenizer.size)
        lost = lost_examples(config.run_dir) if start else frozenset()
        rows, bad = pipeline.open_rows(config, tokenizer, lost=lost)
        validation, _ = pipeline.open_rows(config, tokenizer, 'validation', lost)
    size, position = config.data.batch_size, runfolder.manifest(config.run_dir, start)['position'] if start else 0
    # A run that goes on with batches of another size has as many rows before it as it would have had.
    rows_in_all = config.epochs * rows.rows_per_epoch() + start * size - position
    return RunData(tokenizer, rows, validation, bad, config.steps or max(1, start, round(rows_in_all / size)))


# Act 2: the state, and the compiled step -----------------------------------------------------------------------------


class Training(NamedTuple):
    """A run that is ready for its next step."""

    graphdef: Any
    state: dict
    step: Any  # compiled
    batches: Any  # an iterator of (device batch, its work)
    first_row: int  # which row of the data these begin with
    frozen: dict  # the digests of what does not learn


def begin(config, data: RunData, sources: list, mesh, start: int, startup: Startup) -> Training:
    """Makes or reads the state, writes the run folder, and compiles the step."""
    optimizer = optim.make_optimizer(config.optim, data.steps)
    program = compile_step(config, data, optimizer, mesh)
    used = ', '.join(f'{share:.1%} of {what}' for what, share in data.rows.efficiency().items())
    print(f'{config.stage}: {data.steps} steps of {config.data.batch_size} rows; packing uses {used}')
    startup.reached('compiling')
    if start:
        state = read_state(config, program, start)
    else:
        params = load_parameters(sources, program.shapes['params'], data.tokenizer.size)
        state = init_state(config, data.tokenizer, optimizer, program.shapes, params)
    startup.reached('parameters')
    if config.data.cache_features:
        read_features(config, data, program, state, mesh)
        startup.reached('features')
    frozen = partition(config, state['params'])[1]
    dtype = models.compute_dtype(config.dtype).name
    digests = lineage.begin(config, data.tokenizer, sources, mesh, dtype, frozen, data.rows.identity(), start)
    write_run(config, data.tokenizer, data.bad)
    startup.reached('run folder')
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (state['params'], frozen)]
    print(f'{sizes[0]:,} parameters, {sizes[0] - sizes[1]:,} of them learn; mesh {dict(mesh.shape)}')
    batches, first_row = stream(config, data.rows, mesh, start)
    return Training(program.graphdef, state, program.step, batches, first_row, digests)


def compile_step(config, data: RunData, optimizer, mesh) -> fit.Program:
    """The compiled step: a batch of another shape is an error then, never a silent recompilation."""
    pairs = stage_of(config).data == 'pairs'
    program = fit.settle(config, data.tokenizer, optimizer, mesh, pack=data.rows.pack if pairs else None)
    if pairs:
        shards = mesh.shape['data'] * mesh.shape['fsdp']
        own = tuple(parallel.own_shards(mesh))
        data.rows.captions = data.rows.pack(shards, config.optim.parts)._replace(own=own)
        data.validation.captions = data.validation.pack(shards, config.optim.parts)._replace(own=own)
    return program


def read_state(config, program: fit.Program, step: int) -> dict:
    """The state of one of the run's checkpoints."""
    return {item: checkpoint.restore(config.run_dir, step, item, shape) for item, shape in program.shapes.items()}


def read_features(config, data: RunData, program: fit.Program, state: dict, mesh):
    """Lets rows hold the tower's features: those that are learned from, held-out ones are read as pictures."""
    data.rows.use_features(features.keep(config, data.rows, program.graphdef, state['params'], mesh))


# Act 3: the steps ----------------------------------------------------------------------------------------------------


def run_steps(
    config,
    data: RunData,
    training: Training,
    mesh,
    start: int,
    stop: StopOnSignal,
    startup: Startup,
    profile: int = 0,
    written: Callable | None = None,
) -> tuple[int, dict]:
    """Takes steps until the run ends or is stopped. Returns the last step and the parameters after it.

    However it ends, a checkpoint that is being written is written to its end. written: as Checkpoints takes it.
    """
    folder, state, batches = pathlib.Path(config.run_dir), training.state, training.batches
    eval_step = make_eval_step(config, training.graphdef)
    writer = checkpoint.Checkpoints(folder, config.checkpoint.keep, written)
    rows = config.data.batch_size

    def drawn(step):
        first = training.first_row + (step - start - 1) * rows
        return sorted({number for row in range(first, first + rows) for number in data.rows.drawn(row)})

    def save(step):
        if not checkpoint.finite(state):
            raise UserError(
                f'the state is not finite after step {step}, which is not saved: training has diverged. '
                'Try a lower optim.learning_rate.'
            )
        nonlocal saved
        saved, position = step, training.first_row + (step - start) * rows
        writer.save(step, state['params'], state['optimizer'], {'position': position})

    @contextlib.contextmanager
    def keeping():
        """What fails within it, data that cannot be read say, loses no step. It ends when a signal comes, too."""
        try:
            with contextlib.nullcontext() if hosts.several() else stop.interruptible():
                yield
        except Exception as error:
            if stop.signal is None:  # which ends data workers too
                if step > saved and (isinstance(error, hosts.AllFailed) or not hosts.several()):
                    log.put_by()
                    log.flush()
                    save(step)
                    writer.until_saved(lambda: save(step))
                raise

    def evaluate(step):
        with keeping():
            if stop.signal is None:
                found = validate(config, step, eval_step, state['params'], data.validation, mesh, log)
                found |= watching.watch(config, step, training.graphdef, state['params'], data, log)
                log.metrics.write(step=step, **found)

    def further():
        """The next batch, or (None, None) after a signal."""
        with keeping():
            if stop.signal is None:
                return next(batches)
        return None, None

    def is_evaluated(step):
        return step % config.eval.every == 0 or step == data.steps

    stop.save_first(agrees=hosts.several())
    gc.collect()
    gc.freeze()  # what lives this long lives on: collecting it again and again would stall the loop
    step = saved = start
    with Log(config, data.tokenizer.size, start, data.steps, drawn) as log, Trace(folder, profile) as trace:
        if start and is_evaluated(start) and start not in log.metrics.evaluated:
            with log.clock.paused():
                evaluate(start)  # it was stopped between the checkpoint and this
        with writer, contextlib.closing(batches):
            if step < data.steps:
                batch, work = further()
                startup.reached('first batch')
            while step < data.steps and stop.signal is None:
                step += 1
                trace.before_step(step - start - 1, state)
                with jax.transfer_guard('disallow'):
                    state, metrics = training.step(state, batch)
                if step == start + 1:
                    jax.block_until_ready(metrics)
                    startup.reached('step')
                    log.say(startup.told())
                log.flush()  # the line of the step before: the device never waits for it
                log.count(step, metrics, work)
                stop.agree(hosts.gather)
                evaluating = is_evaluated(step)
                if step < data.steps:
                    asked = time.perf_counter()
                    batch, work = further()
                    log.waited(time.perf_counter() - asked)
                last = step == data.steps or stop.signal is not None
                saving = step % config.checkpoint.every == 0 or last or writer.due()
                if step % config.log.every == 0 or saving or evaluating:  # what goes on from here goes on from its line
                    log.put_by()
                if saving or evaluating:
                    log.flush()
                    jax.block_until_ready(metrics)  # so that the pause below counts no training
                with log.clock.paused():
                    if saving:
                        save(step)
                    if evaluating:
                        evaluate(step)
                    if stop.signal is not None and not saving:
                        save(step)
            writer.until_saved(lambda: save(step))
    return step, state['params']


def validate(config, step: int, eval_step, params: dict, rows, mesh, log: Log) -> dict[str, float]:
    """{eval_loss, left_out} over the same validation batches each time; training data is untouched by their stream."""
    is_text = stage_of(config).data == 'text'
    total, count, left_out = 0.0, 0.0, 0 if is_text else len(rows.index.left_out) + rows.index.dropped
    own = parallel.own_rows(mesh, config.data.batch_size)
    batches = pipeline.batches(rows, config.data.batch_size, timeout=config.data.timeout, own=own)
    for batch, _, without in itertools.islice(read_together(batches), config.eval.batches):
        left_out += len(without)
        loss, n = eval_step(params, parallel.put_batch(batch, mesh))
        total, count = total + float(loss), count + float(n)
    without = f', without {left_out} examples that cannot be used' if left_out else ''
    log.say(f'step {step}  eval loss {total / count:.4f} on held-out data{without}')
    return {'eval_loss': total / count, 'left_out': left_out}
