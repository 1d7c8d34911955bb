"""The training loop, the same for every stage, in acts from top to bottom."""

import collections
import datetime
import functools
import gc
import itertools
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tqdm import tqdm

from nanovision_jax import models
from nanovision_jax.data import conversation, images, pipeline
from nanovision_jax.errors import UserError, check_writable
from nanovision_jax.inference import engine
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.runs import checkpoint, lineage
from nanovision_jax.runs import config_file as runconfig
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.stages import stage_of
from nanovision_jax.training import meter, objectives, optim
from nanovision_jax.training import start as starts

# ---------------------------------------------------------------------------------------------------------------------
# The state and the step
# ---------------------------------------------------------------------------------------------------------------------


def split_params(stage, params):
    """(what learns, what is frozen): two dicts of the model's top-level parts."""
    names = objectives.TRAINS[stage] or tuple(params)
    return {k: v for k, v in params.items() if k in names}, {k: v for k, v in params.items() if k not in names}


def init_state(config, tokenizer, optimizer, mesh, sources=(), start=0):
    """(graphdef, state, shardings): {'params', 'optimizer'}, each leaf born where its sharding says.

    It is read from the run's checkpoint `start`; or, for a new run, from its sources, and what they lack is random.
    """

    def new_params():
        return nnx.to_pure_dict(nnx.state(models.build(config, tokenizer.size, tokenizer.image, nnx.Rngs(config.seed))))

    def new_optimizer(params):
        return optimizer.init(split_params(config.stage, params)[0])

    graphdef, params = models.abstract(config, tokenizer.size, tokenizer.image)
    shapes = {'params': params, 'optimizer': jax.eval_shape(new_optimizer, params)}
    shardings = parallel.shardings(shapes, mesh)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    if start:
        state = {item: checkpoint.restore(config.run_dir, start, item, target[item]) for item in target}
        return graphdef, state, shardings
    params = target['params']
    for source in sources:
        params = source.load(params, tokenizer.size)
    missing = [k for k, part in params.items() if isinstance(jax.tree.leaves(part)[0], jax.ShapeDtypeStruct)]
    where = {k: shardings['params'][k] for k in missing}
    params = params | jax.jit(lambda: {k: new_params()[k] for k in missing}, out_shardings=where)()
    opt_state = jax.jit(new_optimizer, out_shardings=shardings['optimizer'])(params)
    return graphdef, {'params': params, 'optimizer': opt_state}, shardings


def make_gradients(config, graphdef):
    """A function (trained, frozen, batch) → (loss, gradients) of the mean loss, over optim.accumulate parts."""
    n = config.optim.accumulate

    def total(trained, frozen, batch):
        return objectives.loss(config.stage, models.merge(graphdef, trained | frozen), batch)

    def whole(trained, frozen, batch):
        (loss, count), grads = jax.value_and_grad(total, has_aux=True)(trained, frozen, batch)
        return loss / count, jax.tree.map(lambda g: g / count, grads)

    def parts_of(batch):
        # Row i goes to part i mod n, so that each part is spread over all devices as the batch is.
        return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 0), batch)

    def in_parts(trained, frozen, batch):
        def add(so_far, part):
            (loss, count), grads = jax.value_and_grad(total, has_aux=True)(trained, frozen, part)
            return jax.tree.map(jnp.add, so_far, (loss, count, grads)), None

        zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
        (loss, count, grads), _ = jax.lax.scan(add, zero, parts_of(batch))
        return loss / count, jax.tree.map(lambda g: g / count, grads)

    def pairs_in_parts(trained, frozen, batch):
        """Every picture is compared with the captions of all parts, as in GradCache (arXiv:2101.06983)."""

        def embed(trained, part):
            model = models.merge(graphdef, trained | frozen)
            return model.embed(part['images'], part['tokens'], part['ends'])

        def loss_of(trained, embedded):
            model = models.merge(graphdef, trained | frozen)
            return model.loss(model.logits(*(x.reshape(-1, x.shape[-1]) for x in embedded)))

        def add(so_far, part_and_slope):
            part, slope = part_and_slope
            _, pull = jax.vjp(lambda trained: embed(trained, part), trained)
            return jax.tree.map(jnp.add, so_far, pull(slope)[0]), None

        parts = parts_of(batch)
        embedded = jax.lax.map(lambda part: embed(trained, part), parts)
        loss, (direct, slopes) = jax.value_and_grad(loss_of, (0, 1))(trained, embedded)
        return loss, jax.lax.scan(add, direct, (parts, slopes))[0]

    if n == 1:
        return whole
    return pairs_in_parts if stage_of(config).objective == 'contrastive' else in_parts


def make_train_step(config, graphdef, optimizer, shardings):
    """The jitted step (state, batch) → (state, {loss, grad_norm}); the old state's memory becomes the new one's."""
    gradients = make_gradients(config, graphdef)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state, batch):
        trained, frozen = split_params(config.stage, state['params'])
        loss, grads = gradients(trained, frozen, batch)
        with jax.named_scope('optimizer'):
            updates, opt_state = optimizer.update(grads, state['optimizer'], trained)
            trained = optax.apply_updates(trained, updates)
        return {'params': trained | frozen, 'optimizer': opt_state}, {'loss': loss, 'grad_norm': optax.tree.norm(grads)}

    return train_step


def make_eval_step(config, graphdef):
    """The jitted (params, batch) → (sum of losses, their number)."""
    return jax.jit(lambda params, batch: objectives.loss(config.stage, models.merge(graphdef, params), batch))


# ---------------------------------------------------------------------------------------------------------------------
# The run folder
# ---------------------------------------------------------------------------------------------------------------------


def open_run(config, resume, anew):
    """The step to go on from (0 for a new run), after checking what the run folder holds.

    Raises UserError if it holds another config and neither `resume` nor `anew` says what to do, and for a run that
    cannot go on: a converted one, or one whose config is lost.
    """
    folder = pathlib.Path(config.run_dir)
    if folder.exists() and anew:
        kept = next(f'{folder}.{n}' for n in itertools.count(1) if not os.path.exists(f'{folder}.{n}'))
        folder.rename(kept)
        print(f'the run that was in {folder} is kept as {kept}')
        return 0
    steps = runfolder.whole_steps(folder)
    if not (folder / 'config.json').exists():
        if steps:
            raise UserError(f'{folder} has checkpoints but no config.json: bring it back, or start again with --anew.')
        return 0
    if steps and not (folder / 'checkpoints' / str(steps[0]) / 'optimizer').is_dir():
        raise UserError(
            f'{folder} is a converted run, without an optimizer to go on with: start another run from it, with '
            f'--config.init_from={folder} and another --config.name.'
        )
    before = runconfig.read(folder)
    changed = runconfig.differences(before, config)
    if changed and not resume:
        raise UserError(
            f'{folder} holds a run with another config ({", ".join(changed)} differ): '
            'say --resume to go on with the new one, --anew to start again, or choose another --config.name.'
        )
    if steps and (told := [name for name in starts.WHERE if name in changed]):
        raise UserError(
            f'{", ".join(told)} would change in {folder}, which goes on from its own checkpoint: where a run started '
            'stays as it was; leave it out, or choose another --config.name.'
        )
    return runfolder.newest(folder) or 0


def write_run(config, tokenizer, bad):
    """Writes what a run folder holds beside checkpoints and metrics."""
    folder = pathlib.Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    runconfig.save(config)
    shutil.copytree(tokenizer.folder, folder / 'tokenizer', dirs_exist_ok=True)
    if bad:
        (folder / 'bad_rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in bad))
        print(f'{len(bad)} bad examples are left out, listed in {folder / "bad_rows.jsonl"}')


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(config, resume=False, anew=False):
    """Runs a stage to its end (or to the next signal), and returns the run folder."""
    folder, sources = pathlib.Path(config.run_dir), []
    if anew or not starts.is_run(folder):  # what is missing is said before anything is moved or made
        sources = starts.find(config, anew=True)
        starts.check(config, sources)
        for source in sources:
            source.prove()
    start = open_run(config, resume, anew)
    if config.steps and start >= config.steps:
        print(f'{folder} is finished: {start} of {config.steps} steps')
        return folder
    check_writable(folder)
    mesh = parallel.make_mesh(config.mesh, rows=config.data.batch_size // config.optim.accumulate)
    with jax.set_mesh(mesh), StopOnSignal() as stop:
        return _train(config, folder, start, sources, mesh, stop)


def _train(config, folder, start, sources, mesh, stop):
    # Data -------------------------------------------------------------------------------------------------------------
    print(f'{config.stage} goes on from {folder}, step {start}' if start else '\n'.join(starts.lines(config, sources)))
    known = folder / 'tokenizer' if start else next((s.tokenizer for s in sources if s.tokenizer), None)
    tokenizer = pipeline.family_tokenizer(config, known)
    parallel.check_divides(config, mesh, tokenizer.size)
    rows, bad = pipeline.open_rows(config, tokenizer)
    held_out, _ = pipeline.open_rows(config, tokenizer, 'validation')
    steps = config.steps or max(1, round(config.epochs * rows.rows_per_epoch() / config.data.batch_size))
    if start >= steps:
        print(f'{folder} is finished: {start} of {steps} steps')
        return folder
    used = ', '.join(f'{share:.1%} of {what}' for what, share in rows.efficiency().items())
    print(f'{config.stage}: {steps} steps of {config.data.batch_size} rows; packing uses {used}')

    # State ------------------------------------------------------------------------------------------------------------
    optimizer = optim.make_optimizer(config.optim, steps)
    graphdef, state, shardings = init_state(config, tokenizer, optimizer, mesh, sources, start)
    frozen = split_params(config.stage, state['params'])[1]
    dtype = models.compute_dtype(config.dtype).name
    digests = lineage.begin(config, tokenizer, sources, mesh, dtype, frozen, rows.identity(), start)
    write_run(config, tokenizer, bad)
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (state['params'], frozen)]
    print(f'{sizes[0]:,} parameters, {sizes[0] - sizes[1]:,} of them learn; mesh {dict(mesh.shape)}')

    # Compile ----------------------------------------------------------------------------------------------------------
    # The position in the data is counted in rows: with another batch size it goes on at the same row.
    first = runfolder.manifest(folder, start)['position'] if start else 0
    stream = prefetch(pipeline.batches(rows, config.data.batch_size, first, config.data.workers), mesh)
    batch, work = next(stream)
    began = time.perf_counter()
    # Compiled ahead: a batch of another shape is an error then, never a silent recompilation.
    train_step = make_train_step(config, graphdef, optimizer, shardings).lower(state, batch).compile()
    print(f'compiled the step in {time.perf_counter() - began:.1f} s')
    eval_step = make_eval_step(config, graphdef)

    # Loop -------------------------------------------------------------------------------------------------------------
    writer = checkpoint.Checkpoints(folder, config.checkpoint.keep)
    log = meter.Metrics(folder, config.log.to, start)
    peak, peak_source = meter.peak_flops()
    print(f'MFU is of {peak:.3g} FLOP/s ({peak_source}); full-attention convention, padding not counted')
    rate = optim.schedule(config.optim, steps)
    stop.listen()
    gc.collect()
    gc.freeze()  # what lives this long lives on: collecting it again and again would stall the loop
    bar = tqdm(total=steps, initial=start, desc=config.stage, unit='step', mininterval=0.5)
    total_tokens, window = log.last['tokens'], collections.Counter()  # window: work since the last log line
    waiting = None  # metrics of a step whose log line is due, read one step later: the device never waits for it

    def log_line(step, metrics, window, total_tokens):
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        seconds, elapsed = clock.lap()  # only now: the step was still running when it was dispatched
        if not math.isfinite(values['loss']) or not math.isfinite(values['grad_norm']):
            raise UserError(
                f'the loss is {values["loss"]} and the gradient norm {values["grad_norm"]} at step {step}: training '
                f'has diverged. The last checkpoint is step {next(iter(runfolder.whole_steps(folder)), 0)}; '
                'try a lower optim.learning_rate.'
            )
        speed = window['tokens'] / seconds
        mfu = meter.step_flops(config, tokenizer.size, window['tokens'], window['pictures']) / seconds / peak
        learning_rate = float(rate(step - 1))
        log.write(
            step=step, **values, learning_rate=learning_rate, tokens=total_tokens,
            tokens_per_second=speed, mfu=mfu, seconds=elapsed,
        )  # fmt: skip
        left = datetime.timedelta(seconds=round((steps - step) * seconds / window['steps']))
        bar.set_postfix_str(f'loss {values["loss"]:.3f}', refresh=False)
        bar.write(
            f'step {step}/{steps}  loss {values["loss"]:.4f}  lr {learning_rate:.2e}  grad {values["grad_norm"]:.2f}  '
            f'{speed:,.0f} tokens/s  MFU {mfu:.1%}  {left} left',
            file=sys.stdout,
        )

    clock = meter.Clock(log.last['seconds'])
    for step in range(start + 1, steps + 1):
        with jax.transfer_guard('disallow'):
            state, metrics = train_step(state, batch)
        window.update(work | {'steps': 1})
        total_tokens += work['tokens']
        if waiting:
            log_line(*waiting)
            waiting = None
        batch, work = next(stream)
        bar.update()
        last = step == steps or stop.signal is not None
        saving = step % config.checkpoint.every == 0 or last
        evaluating = step % config.eval.every == 0 or step == steps
        if step % config.log.every == 0 or saving:  # what goes on from a checkpoint goes on from its line
            waiting, window = (step, metrics, window, total_tokens), collections.Counter()
        if (saving or evaluating) and waiting:
            log_line(*waiting)  # the device is waited for here, so that the pause below counts no training
            waiting = None
        with clock.paused():
            if saving:
                position = first + (step - start) * config.data.batch_size
                writer.save(step, state['params'], state['optimizer'], {'position': position})
            if evaluating:
                evaluate(config, step, eval_step, state['params'], held_out, mesh, log, bar)
                if stage_of(config).decodes:
                    show_samples(config, graphdef, state['params'], tokenizer, held_out, bar)
        if last:
            break
    bar.close()
    writer.wait()
    if stop.signal is not None and step < steps:
        print(f'stopped by signal {stop.signal} at step {step}; the same command goes on from there')
        sys.exit(128 + stop.signal)

    # End --------------------------------------------------------------------------------------------------------------
    after = {
        name: checkpoint.tree_digest(part) for name, part in split_params(config.stage, state['params'])[1].items()
    }
    assert after == digests, f'frozen parts changed: {after} != {digests}'
    lineage.end(config, step, after, meter.peak_memory())
    print(f'finished: {folder}')
    return folder


def prefetch(batches, mesh, ahead=2):
    """Device batches, `ahead` of them on their way, each with its {tokens, pictures} of work (padding not counted)."""

    def put():
        for batch in batches:
            if 'segments' in batch:
                work = {'tokens': int((batch['segments'] > 0).sum()), 'pictures': 0}
                if 'images' in batch:
                    work['pictures'] = int(batch['images'].any(axis=(2, 3, 4)).sum())
            else:
                work = {'tokens': int((batch['ends'] + 1).sum()), 'pictures': len(batch['ends'])}
            yield parallel.put_batch(batch, mesh), work

    queue, source = collections.deque(), put()
    while True:
        while len(queue) <= ahead:
            queue.append(next(source))
        yield queue.popleft()


def evaluate(config, step, eval_step, params, held_out, mesh, log, bar):
    """Mean loss over the same held-out batches each time; a stream of its own, so training data is untouched."""
    stream = pipeline.batches(held_out, config.data.batch_size)
    total = count = 0.0
    for batch in itertools.islice(stream, config.eval.batches):
        loss, n = eval_step(params, parallel.put_batch(batch, mesh))
        total, count = total + float(loss), count + float(n)
    index = None if stage_of(config).data == 'text' else held_out.index
    left_out = len(index.left_out) + index.dropped if index else 0
    log.write(step=step, eval_loss=total / count, left_out=left_out)
    without = f', without {left_out} examples that cannot be used' if left_out else ''
    bar.write(f'step {step}  eval loss {total / count:.4f} on held-out data{without}', file=sys.stdout)


def show_samples(config, graphdef, params, tokenizer, held_out, bar, n=2):
    """A few held-out prompts answered by the model as it is now."""
    n = min(n, held_out.rows_per_epoch() if stage_of(config).data == 'text' else len(held_out.index.rows))
    prompts, asked = zip(*(held_out_prompt(config, tokenizer, held_out, i) for i in range(n)), strict=True)
    answers = engine.Engine(config, graphdef, params, tokenizer).answer(prompts, max_new_tokens=32)
    for text, answer in zip(asked, answers, strict=True):
        bar.write(f'  {text[-70:]!r} → {answer.strip()!r}', file=sys.stdout)


def held_out_prompt(config, tokenizer, held_out, i):
    """(Prompt, its text) of the i-th held-out example: its first question, or the beginning of its text."""
    if stage_of(config).data == 'text':
        text = tokenizer.decode(held_out[i]['tokens'][:24])
        return engine.text_prompt(tokenizer, text), text
    example = held_out.source[held_out.index.rows[i]]
    question = example.messages[: 1 + (example.messages[0]['role'] == 'system')]
    shown = 0 if isinstance(question[-1]['content'], str) else sum(map(conversation.is_image, question[-1]['content']))
    pictures = [images.load(data) for data in example.images[:shown]]
    return engine.chat_prompt(config, tokenizer, question, pictures), conversation.text_of(question[-1])


class StopOnSignal:
    """A context that remembers SIGTERM or SIGINT, so that the loop can save and leave; a second one kills as usual."""

    def __init__(self):
        self.signal, self._before = None, {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self):
        """From here on signals are remembered; before, they end the process as usual."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)

    def _remember(self, number, _):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
