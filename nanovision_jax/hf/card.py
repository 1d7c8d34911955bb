"""The model card of an exported run, written from what its run folder knows: lineage, recipe and results."""

import pathlib

from nanovision_jax import config as configs
from nanovision_jax.data.catalog import LICENCES
from nanovision_jax.errors import UserError
from nanovision_jax.evals.base import read_results
from nanovision_jax.runs import config_file as runconfig
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.stages import stage_of

UNKNOWN = 'not known to this card: see where the data come from'
NOT_KNOWN = 'not known'


def card(run, architecture: str) -> str:
    """The text of README.md for a run (inference.run.Run) that was exported as `architecture`."""
    config, stage = run.config, stage_of(run.config)
    vision = stage.sees
    own = runfolder.read_lineage(run.config.run_dir).get('sessions', [True])
    made = f'trained with nanovision_jax, step {run.step}' if own else 'converted by nanovision_jax'
    head = [
        '---',
        'library_name: transformers',
        f'pipeline_tag: {"image-text-to-text" if vision else "text-generation"}',
    ]
    lines = [*head, 'tags: [nanovision_jax]', '---', '', f'# {config.name}: {config.stage}', '']
    lines += [
        f'A {"vision-language" if vision else "language"} model {made}, as `{architecture}`.',
        'It is opened by plain `transformers`, without remote code:',
        '',
        '```python',
        *(_VISION_USE if vision else _continue_use(run) if not stage.answers else _TEXT_USE),
        '```',
        '',
        '## How it was trained',
        '',
        '| stage | data | licence of the data | steps | rows a step | tokens a row | learning rate | started |',
        '|---|---|---|---|---|---|---|---|',
    ]
    lines += [_stage(folder) for folder in reversed(ancestors(pathlib.Path(config.run_dir)))]
    measured = _measured(pathlib.Path(config.run_dir))
    return '\n'.join([*lines, '', '## What was measured', '', *(measured or ['Nothing yet.', ''])])


_VISION_USE = (
    'from transformers import AutoModelForImageTextToText, AutoProcessor',
    "model, processor = AutoModelForImageTextToText.from_pretrained('.'), AutoProcessor.from_pretrained('.')",
    "messages = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What is this?'}]}]",
    'text = processor.apply_chat_template(messages, add_generation_prompt=True)',
    "inputs = processor(images=picture, text=text, add_special_tokens=False, return_tensors='pt')",
    'print(processor.decode(model.generate(**inputs)[0], skip_special_tokens=True))',
)
_TEXT_USE = (
    'from transformers import AutoModelForCausalLM, AutoTokenizer',
    "model, tokenizer = AutoModelForCausalLM.from_pretrained('.'), AutoTokenizer.from_pretrained('.')",
    "messages = [{'role': 'user', 'content': 'Hello'}]",
    'text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)',
    "inputs = tokenizer(text, add_special_tokens=False, return_tensors='pt')",
    'print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))',
)


def _continue_use(run):
    """How text is continued: behind the token that leads each document."""
    text = f'{run.tokenizer.template.document}Once upon a time'
    return (
        *_TEXT_USE[:2],
        f"inputs = tokenizer({text!r}, add_special_tokens=False, return_tensors='pt')  # it continues text, no more",
        _TEXT_USE[-1],
    )


def _measured(run_dir):
    """The results of a run: scores with intervals, baselines and controls, what was left out, and whether it looks."""
    found = {runfolder.result_file('', result.task, part): result for part, result in read_results(run_dir)}
    lines = []
    for file, result in sorted(found.items()):
        lines += [f'### {file.stem}', '', *result.markdown(), '']
        lines += [line for text in (result.coverage(), result.verdict()) if text for line in (text, '')]
    return lines


def ancestors(folder: pathlib.Path) -> list[pathlib.Path]:
    """A run folder and those it came from, as far as they are there, nearest first."""
    found, waiting = [], [folder]
    while waiting:
        folder = waiting.pop(0)
        try:
            record = runfolder.read_lineage(folder)
            runconfig.read(folder)
        except UserError:  # gone or damaged: the card tells of what is left
            continue
        if folder in found or not record:
            continue
        found.append(folder)
        waiting += [pathlib.Path(parent['run']) for parent in record['parents']]
    return found


def _stage(folder):
    """One line of the table of stages."""
    config, record = runconfig.read(folder), runfolder.read_lineage(folder)
    data, optim = config.data, config.optim
    source = data.mixture or data.source
    where = pathlib.Path(data.path).name if source in ('conversations', 'text', 'shards') else ''
    known = [LICENCES.get(part.name, UNKNOWN) for part in data.prepared or [data.named]]
    foreign = [p['run'] for p in record['parents'] if p['step'] is None]
    stage = config.stage + ''.join(f', from {pathlib.Path(run).name}' for run in foreign)
    source = NOT_KNOWN if source == configs.UNKNOWN else f'{source} {where}'.strip()
    cells = stage, source, '; '.join(dict.fromkeys(known))
    if record['sessions']:
        recipe = record.get('finished', 'unfinished'), data.batch_size, data.length, optim.learning_rate
        recipe += (record['sessions'][0]['started'][:10],)
    else:  # a run that was made of somebody's weights
        recipe = (NOT_KNOWN,) * 5
    return f'| {" | ".join(map(str, (*cells, *recipe)))} |'
