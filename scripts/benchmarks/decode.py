"""Times decoding at batch 1 and 16: greedy, one prompt, exactly so many tokens, whatever they are.

    python scripts/benchmarks/decode.py --run=runs/tiny/vision_instruct [--tokens=128] [--weights=int8]
    python scripts/benchmarks/decode.py --run=runs/tiny/vision_instruct --peer=transformers
    python scripts/benchmarks/decode.py --config=configs/sft.py:d20 [--config.dtype=bfloat16 …]

The prompt is a question, about a picture where the model sees. --config takes random weights of that size, and jax,
flax, optax, numpy and jaxtyping, no more. --peer writes the run as a Hugging Face folder and has `generate` of
transformers answer the same ids, each side in a process of its own, in turn, three times; the ratio is of medians.

Prints one JSON object. Of each batch: first_token_ms (the prompt, and one token), tokens_per_second (all of them by all
the time) and decode_tokens_per_second (those after the first by the time after the first).
"""

import json
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
import train
from flax import nnx

from nanovision_jax import models
from nanovision_jax.config import parse_value
from nanovision_jax.errors import UserError
from nanovision_jax.inference.engine import Engine, Prompt
from nanovision_jax.inference.weights import check_weights, stored
from nanovision_jax.stages import stage_of

BATCHES, ROUNDS, TURNS = (1, 16), 5, 3
ENDLESS = (-1,)  # stops that no model says
QUESTION, PICTURE = 'What is in the picture?', (240, 320, 3)


def picture():
    """The picture asked about, a uint8 array."""
    return np.random.default_rng(0).integers(0, 256, PICTURE, np.uint8)


def of_run(run_dir, weights):
    """(Engine, Prompt) of a run."""
    from PIL import Image

    from nanovision_jax.inference.prompt import chat_prompt, text_prompt
    from nanovision_jax.inference.run import load

    run = load(run_dir, weights)
    stage = stage_of(run.config)
    run.engine.stops = ENDLESS
    if not stage.answers:
        return run.engine, text_prompt(run.tokenizer, QUESTION)
    pictures = [Image.fromarray(picture())] if stage.sees else []
    return run.engine, chat_prompt(run.config, run.tokenizer, [{'role': 'user', 'content': QUESTION}], pictures)


def of_config(argv, weights):
    """(Engine, Prompt) of a config's model with random weights; the question is random too."""
    config, _ = train.read(argv)
    size = train.vocab_size(config)
    graphdef, _ = models.abstract(config, size, size - 1)
    built = jax.jit(lambda: nnx.to_pure_dict(nnx.state(models.build(config, size, size - 1, nnx.Rngs(0)))))()
    engine = Engine(config, *stored(config, graphdef, built, weights), ENDLESS)
    ids, vision = np.random.default_rng(0).integers(0, size - 1, 16, np.int32), config.model.vision
    if not stage_of(config).sees:
        return engine, Prompt(ids, [])
    image = np.random.default_rng(0).integers(0, 256, (vision.image_size, vision.image_size, 3), np.uint8)
    return engine, Prompt(np.array([size - 1] * vision.patches + ids.tolist(), np.int32), [image])


def timed(generate, tokens):
    """The figures of one batch. generate(n) decodes n tokens a row and returns how many those were in all."""

    def seconds(n):
        began = time.perf_counter()
        made = generate(n)
        return made, time.perf_counter() - began

    for n in (tokens, 1):
        seconds(n)  # compiles
    rounds = [(seconds(1)[1], *seconds(tokens)) for _ in range(ROUNDS)]
    first, whole = (statistics.median(column) for column in list(zip(*rounds, strict=True))[::2])
    (made,) = {made for _, made, _ in rounds}
    return {
        'first_token_ms': round(1e3 * first, 2),
        'tokens_per_second': round(made / whole),
        'decode_tokens_per_second': round(made * (tokens - 1) / tokens / (whole - first)),
    }


def ours(engine, prompt, tokens):
    """The figures of our engine."""
    decoder = engine.params.get('decoder', engine.params)  # without a tower, which no token reads

    def generate(batch, n):
        return sum(len(row) for chunk in engine.generate([prompt] * batch, n) for row in chunk)

    return {
        'prompt': prompt.ids.tolist(),
        'batch': {str(batch): timed(lambda n, batch=batch: generate(batch, n), tokens) for batch in BATCHES},
        'bytes_of_weights': sum(leaf.nbytes for leaf in jax.tree.leaves(decoder)),
        'devices': f'{jax.device_count()} × {jax.devices()[0].device_kind}',
        'versions': {'jax': jax.__version__},
    }


def theirs(folder, prompt, tokens):
    """The figures of transformers on an exported folder. prompt: the ids."""
    import torch
    import transformers

    sees = 'vision_config' in json.loads((pathlib.Path(folder) / 'config.json').read_text())
    kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    device, dtype = ('cuda', torch.bfloat16) if torch.cuda.is_available() else ('cpu', torch.float32)
    model = kind.from_pretrained(folder, dtype=dtype).eval().to(device)
    images = {}
    if sees:
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        images = {'pixel_values': processor(picture(), return_tensors='pt')['pixel_values'].to(device, dtype)}

    def generate(batch, n):
        given = {name: value.repeat_interleave(batch, 0) for name, value in images.items()}
        ids = torch.tensor([prompt] * batch, device=device)
        given |= {'input_ids': ids, 'attention_mask': torch.ones_like(ids)}
        with torch.inference_mode():
            made = model.generate(**given, do_sample=False, min_new_tokens=n, max_new_tokens=n)
        return batch * (made.shape[1] - len(prompt))

    return {
        'batch': {str(batch): timed(lambda n, batch=batch: generate(batch, n), tokens) for batch in BATCHES},
        'devices': torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
        'versions': {'torch': torch.__version__, 'transformers': transformers.__version__},
    }


def beside_transformers(run_dir, tokens, weights):
    """Both sides, as processes in turn: {'ours', 'transformers': medians, 'ratio': of tokens/s, by batch}."""
    sides = {'ours': [], 'transformers': []}
    with tempfile.TemporaryDirectory() as folder:
        exported = f'{folder}/exported'
        train.process('-m', 'nanovision_jax.convert', '--to=hf', f'--run={run_dir}', f'--output={exported}')
        for _ in range(TURNS):
            us = train.process(__file__, f'--run={run_dir}', f'--tokens={tokens}', f'--weights={weights}')
            sides['ours'].append(json.loads(us))
            prompt = json.dumps(sides['ours'][0]['prompt'])
            them = train.process(__file__, f'--exported={exported}', f'--prompt={prompt}', f'--tokens={tokens}')
            sides['transformers'].append(json.loads(them))
    result = {}
    for name, turns in sides.items():
        figures = [turn.pop('batch') for turn in turns]
        middle = {b: {k: statistics.median(f[b][k] for f in figures) for k in figures[0][b]} for b in figures[0]}
        result[name] = turns[0] | {'batch': middle, 'turns': figures}
    us, them = result['ours']['batch'], result['transformers']['batch']
    ratio = {b: round(us[b]['tokens_per_second'] / them[b]['tokens_per_second'], 2) for b in us}
    return result | {'ratio': ratio}


def main(argv):
    """The command: see the module's docstring."""
    given = dict(arg.removeprefix('--').partition('=')[::2] for arg in argv)
    options = {name: given.pop(name, None) for name in ('run', 'peer', 'weights', 'tokens', 'exported', 'prompt')}
    rest = [f'--{name}={value}' for name, value in given.items()]
    tokens, weights = parse_value('--tokens', int, options['tokens'] or '128'), options['weights'] or ''
    check_weights(weights)
    if tokens < 2:
        raise UserError(f'--tokens takes a number above 1, not {tokens}.')
    if options['peer'] not in (None, 'transformers') or (options['peer'] and not options['run']):
        raise UserError('--peer is transformers, and takes a --run.')
    if options['run'] and rest:
        raise UserError(f'{rest[0]} does not go with --run.')
    if options['exported']:
        told = theirs(options['exported'], json.loads(options['prompt']), tokens)
    elif options['peer']:
        told = beside_transformers(options['run'], tokens, weights)
    else:
        engine, prompt = of_run(options['run'], weights) if options['run'] else of_config(rest, weights)
        told = ours(engine, prompt, tokens)
    print(json.dumps({'tokens': tokens, 'weights': weights} | told))


if __name__ == '__main__':
    train.command(main)
