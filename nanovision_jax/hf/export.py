"""A run folder as a folder that plain `transformers` opens, without code of ours.

Text runs become GPTNeoXForCausalLM, Qwen2, Qwen3 or LlamaForCausalLM; vision runs LlavaForConditionalGeneration. With
the weights come tokenizer, chat template, processor, generation config, model card, and nanovision_jax.json (the run's
config), with which the way back is exact.
"""

import json
import pathlib
import shutil

from nanovision_jax.data import templates
from nanovision_jax.data.tokenizer import Tokenizer
from nanovision_jax.errors import UserError
from nanovision_jax.hf import card, configs, decoders, llava
from nanovision_jax.hf.weights import write_weights
from nanovision_jax.runs.config_file import public
from nanovision_jax.runs.folder import file_digest, read_json
from nanovision_jax.stages import stage_of

CONFIG = 'nanovision_jax.json'
TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', templates.FILE)  # the last is not always there


def export(run, output: pathlib.Path, dtype: str = 'float32'):
    """Writes a run (inference.run.Run) to the folder `output`, which must not exist yet.

    Raises UserError for a clip run, which has no decoder, and for a folder that is there.
    """
    config, tokenizer, model = run.config, run.tokenizer, run.config.model
    if not stage_of(config).decodes:
        raise UserError(f'{config.run_dir} is a clip run: only runs with a decoder are written as Hugging Face models.')
    if output.exists():
        raise UserError(f'{output} exists: name a folder that does not.')
    vision = stage_of(config).sees
    tokens = dict(bos_token_id=tokenizer.end_of_text, eos_token_id=tokenizer.end, pad_token_id=tokenizer.end_of_text)
    if vision:
        content = llava.llava_json(model, tokenizer.size, tokenizer.image)
        content['text_config'] |= tokens | {'dtype': dtype}
        content['vision_config']['dtype'] = dtype
        tensors = llava.llava_to_hf(run.params, model, tokenizer.size)
    else:
        content = configs.decoder_json(model, tokenizer.size)
        architecture = decoders.ARCHITECTURES[content['model_type']]
        tensors = decoders.decoder_to_hf(run.params, architecture, tokenizer.size)
    files = {'config.json': content | tokens | {'dtype': dtype}}
    files['generation_config.json'] = tokens | dict(
        eos_token_id=list(tokenizer.stops),  # as our engine stops
        do_sample=False, max_new_tokens=256,
    )  # fmt: skip
    if vision:
        image = tokenizer.decode([tokenizer.image], special=True)
        files['processor_config.json'], files['preprocessor_config.json'] = llava.processor_json(model.vision, image)
    partial = output.with_name(output.name + '.part')  # what is interrupted must not look finished
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_weights(tensors, partial, dtype)
    for name, value in files.items():
        (partial / name).write_text(json.dumps(value, indent=2) + '\n')
    copy_tokenizer(tokenizer.folder, partial)
    ours = {'step': run.step, 'config': public(config), 'sha256': digests(partial)}
    (partial / CONFIG).write_text(json.dumps(ours, indent=2) + '\n')
    (partial / 'README.md').write_text(card.card(run, content['architectures'][0]))
    partial.rename(output)


def digests(folder: pathlib.Path) -> dict[str, str]:
    """{name: sha256} of what an export's meaning hangs on: weights and tokenizer."""
    return {file.name: file_digest(file) for file in sorted([*folder.glob('*.safetensors'), folder / 'tokenizer.json'])}


def check_digests(folder: pathlib.Path, told: dict[str, str]):
    """Raises UserError where the weights or the tokenizer of an export are not what was written."""
    for name, digest in told.items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise UserError(
                f'{folder / name} is not what was written: it is damaged, or was changed. Write the folder again or, '
                f'to read it as one that we did not write, remove {CONFIG}.'
            )


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> Tokenizer:
    """Copies a tokenizer folder of ours, whatever its age, and returns it opened.

    The Jinja text is the one that follows from its template now; a batch is padded on the left, where its rows begin:
    generate() would go on behind padding on the right.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
    settings = read_json(target / 'tokenizer_config.json') | {'padding_side': 'left'}
    (target / 'tokenizer_config.json').write_text(json.dumps(settings, indent=2) + '\n')
    tokenizer = Tokenizer(target)
    jinja = tokenizer.template.jinja(tokenizer.controls)
    (target / 'chat_template.jinja').write_text(jinja, encoding='utf-8')
    return tokenizer
