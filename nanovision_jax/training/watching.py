"""What is watched at each evaluation beside the loss: a few answers, where they look, and tasks on a few questions.

All of it is the model as it is then, asked as chat and evaluate ask it; nothing of it is in the training step.
"""

import contextlib
import math
import pathlib
import tempfile

import jax
import numpy as np

from nanovision_jax import config as configs
from nanovision_jax.data import conversation
from nanovision_jax.data.images import load as load_image
from nanovision_jax.errors import UserError
from nanovision_jax.evals import base
from nanovision_jax.evals import run as tasks
from nanovision_jax.inference import looking, prompt
from nanovision_jax.inference.run import Run
from nanovision_jax.parallel import hosts
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.stages import stage_of
from nanovision_jax.training.log import Log

SAMPLES = 2  # answers that are shown, and looked into


def watch(config, step: int, graphdef, params: dict, data, log: Log) -> dict[str, float]:
    """Shows samples, and returns what is measured of the model: {metric: value}. data: the loop's RunData."""
    if not stage_of(config).decodes:
        return {}
    if hosts.several():  # the first answers, alone
        params, alone = hosts.fetch(params), parallel.make_mesh(configs.Mesh(), [hosts.first_device()])
        if not hosts.is_first():
            return {}
        params = jax.device_put(params, hosts.first_device())
    with jax.set_mesh(alone) if hosts.several() else contextlib.nullcontext():
        run = Run(config, step, graphdef, params, data.tokenizer)
        samples = show_samples(config, run, data, log)
        return look(run, samples, log) | ask(config, run, log)


# A few answers, and where they look ----------------------------------------------------------------------------------


def show_samples(config, run: Run, data, log: Log) -> list[tuple]:
    """Shows a few validation prompts and the answers to them. Returns [(Prompt, the ids that were said)]."""
    count = data.validation.rows_per_epoch() if _is_text(config) else len(data.validation.index.rows)
    try:
        found = [validation_prompt(config, data, i) for i in range(min(SAMPLES, count))]
    except conversation.BadExample as error:
        log.say(f'  no samples are shown: {error}')
        return []
    said = [[] for _ in found]
    for chunk in run.engine.generate([one for one, _ in found], 32):
        for ids, further in zip(said, chunk, strict=True):
            ids += further
    for (_, text), ids in zip(found, said, strict=True):
        log.say(f'  {text[-70:]!r} → {data.tokenizer.decode(ids).strip()!r}')
    return [(one, ids) for (one, _), ids in zip(found, said, strict=True)]


def validation_prompt(config, data, i: int) -> tuple[prompt.Prompt, str]:
    """(Prompt, its text) of the i-th validation example: its first question, or the beginning of its text."""
    tokenizer, rows = data.tokenizer, data.validation
    if _is_text(config):
        text = tokenizer.decode(rows[i]['tokens'][:24])
        return prompt.text_prompt(tokenizer, text), text
    example = rows.source[rows.index.rows[i]]
    question = example.messages[: 1 + (example.messages[0]['role'] == 'system')]
    shown = 0 if isinstance(question[-1]['content'], str) else sum(map(conversation.is_image, question[-1]['content']))
    images = [load_image(encoded) for encoded in example.images[:shown]]
    return prompt.chat_prompt(config, tokenizer, question, images), conversation.text_of(question[-1])


def look(run: Run, samples: list[tuple], log: Log) -> dict[str, float]:
    """How much the samples' answers look at their images, and how loud images are among words.

    image_attention: the share of an answer token's attention that its images have, the mean of layers and heads;
    image_entropy: how evenly it is spread over the patches, from 0, one of them, to 1, all alike. image_norm and
    word_norm: the mean norm of what stands in the place of a patch and of a token.
    """
    shares, norms = [], []
    for one, said in samples:
        if one.images and said:
            model = run.engine.definition, run.engine.params
            shares.append(looking.looks(*model, run.tokenizer.image, one, said))
            norms.append(looking.norms(*model, run.tokenizer.image, one))
    if not shares:
        return {}
    spread = [share / np.maximum(share.sum(axis=-1, keepdims=True), 1e-9) for share in shares]
    entropy = [-(x * np.log(np.maximum(x, 1e-9))).sum(axis=-1) / math.log(x.shape[-1]) for x in spread]
    images, words = np.mean(norms, axis=0)
    found = {
        'image_attention': float(np.mean([share.sum(axis=-1).mean() for share in shares])),
        'image_entropy': float(np.mean([one.mean() for one in entropy])),
        'image_norm': float(images),
        'word_norm': float(words),
    }
    log.say(
        f'  {found["image_attention"]:.0%} of the attention is on the picture, spread {found["image_entropy"]:.2f} of '
        f'evenly; a patch is {images / words:.0f} times as long as a word'
    )
    return found


# Tasks ---------------------------------------------------------------------------------------------------------------


def check_tasks(config):
    """Raises UserError where eval.tasks cannot be asked of the run, before any time is spent."""
    stage, data = stage_of(config), config.eval.data
    for name in _tasks(config):
        if name in base.BENCHMARKS and not (data and pathlib.Path(data).is_dir()):
            raise UserError(f'eval.data names no folder with the published files of {name}: {data!r}.')
        base.check_options(config.run_dir, name, data=_data(config, name))
        sees = name == 'vqa' or (name in base.BENCHMARKS and tasks.benchmark_of(name).sees)
        if not stage.decodes or (sees and not stage.sees):
            raise UserError(f'eval.tasks: {name} cannot be asked of stage {config.stage}, which has no such model.')


def ask(config, run: Run, log: Log) -> dict[str, float]:
    """{eval/TASK: its headline} of eval.limit questions, always the same, for each of eval.tasks."""
    found = {}
    for name in _tasks(config):
        with tempfile.TemporaryDirectory() as kept:
            place = pathlib.Path(kept)
            result, _ = tasks.asked(run, name, _data(config, name), place, config.eval.limit, controls='none')
        found[f'eval/{name}'] = result.score()
        log.say(f'  {result.summary()}')
    return found


def _data(config, name):
    """Where a task's questions are; None: in the run's own data, whatever folder the others have."""
    return config.eval.data if name in base.BENCHMARKS else None


def _tasks(config):
    return [name.strip() for name in config.eval.tasks.split(',') if name.strip()]


def _is_text(config):
    return stage_of(config).data == 'text'
