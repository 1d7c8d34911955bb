"""Times what stands before the training step, on data that it makes itself: no accelerator, no jax.

    python scripts/benchmarks/data.py [--examples=50000] [--tokenizer=FOLDER] [--config=configs/sft.py:tiny]

Prints a table, and as its last line one JSON object:
    images     640 × 480 JPEGs to 224 and 336 pixels a second and core, with plain PIL, exactly and with data.draft
    tokens     MB of text tokenized a second and core, by a tokenizer trained here, and by the one in FOLDER
    index      conversations looked at a second by the index pass, in one process and as it comes, and the largest
               memory of all its processes in MiB (none where the system does not tell)
    plan       seconds to plan the rows of --plan=5000000 examples
    packing    which share of tokens, and of image slots, the rows of made-up lengths use
    pipeline   batches, rows and tokens a second of --config, whose data must be there (with tiny_world they are made)
Speeds that are compared are measured in turns, and are medians. They are of processor time where one core is meant.
"""

import contextlib
import io
import json
import os
import pathlib
import platform
import random
import runpy
import statistics
import sys
import tempfile
import threading
import time
from unittest import mock

import numpy as np
from PIL import Image, __version__

from nanovision_jax import config as configs
from nanovision_jax.config_checks import check
from nanovision_jax.data import conversation, images, index, packing, pipeline, sources, tokenizer
from nanovision_jax.errors import UserError

# What the lengths of examples are like: (median, spread of its logarithm, share with a picture, row, slots, open rows).
SETS = {
    'pages of 180 tokens': (180, 0.6, 0, 1024, 0, 16),
    'chats of 365 tokens': (365, 0.6, 0, 1024, 0, 128),
    'captions': (18, 0.4, 1, 2048, 7, 16),
    'questions about pictures': (245, 0.6, 0.9, 2048, 4, 16),
}
PATCHES = 256


def read(argv):
    """{name: value} of a command line. Raises UserError for what it does not know."""
    options = {'examples': 50_000, 'plan': 5_000_000, 'repeats': 15, 'tokenizer': '', 'config': ''}
    for arg in argv:
        name, _, value = arg.removeprefix('--').partition('=')
        if name not in options or not arg.startswith('--'):
            raise UserError(f'unknown argument {arg!r}: there are {", ".join(f"--{name}" for name in options)}.')
        kind = type(options[name])
        options[name] = configs.parse_value(f'--{name}', kind, value)
        if kind is int and options[name] < 1:
            raise UserError(f'--{name} takes a number above 0, not {value}.')
    return options


def in_turns(ways, repeats):
    """{name: median seconds of processor time} of functions that are called in turns."""
    taken = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.process_time()
            way()
            taken[name].append(time.process_time() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


# What is measured ----------------------------------------------------------------------------------------------------


def picture(seed=0, width=640, height=480):
    """A JPEG like a photograph: large shapes, and noise."""
    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(rng.integers(0, 256, (15, 20, 3), np.uint8)).resize((width, height))
    noisy = np.asarray(shapes) + rng.normal(0, 8, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, 'JPEG', quality=88)
    return buffer.getvalue()


def plain(data, size):
    """What whoever has only PIL would write: the short side to `size`, then the middle."""
    image = Image.open(io.BytesIO(data)).convert('RGB')
    short = min(image.size)
    image = image.resize([int(size * side / short) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (side - size for side in image.size)
    return np.asarray(image.crop((left // 2, top // 2, left // 2 + size, top // 2 + size)))


def measure_images(repeats):
    """{size: images a second and core of each way, and how many times plain PIL's that is}."""
    data, found = [picture(seed) for seed in range(8)], {}
    for size in (224, 336):
        vision = configs.Vision(image_size=size)
        ways = {
            'pil': lambda size=size: [plain(one, size) for one in data],
            'exact': lambda vision=vision: [images.decode(one, vision) for one in data],
            'draft': lambda vision=vision: [images.decode(one, vision, draft=True) for one in data],
        }
        speeds = {name: len(data) / seconds for name, seconds in in_turns(ways, repeats).items()}
        ratios = {f'{name}_to_pil': round(speeds[name] / speeds['pil'], 2) for name in ('exact', 'draft')}
        found[size] = {name: round(speed) for name, speed in speeds.items()} | ratios
    return found


def words(rng, count=4000):
    """Words as a language has them: few are common."""
    made = [''.join(rng.choices('etaoinshrdlucmfwygpbvk', k=rng.randint(2, 9))) for _ in range(count)]
    return lambda n: ' '.join(made[min(int(rng.paretovariate(0.6)), count) - 1] for _ in range(n))


def write_conversations(file, count):
    """Writes `count` conversations of one to three turns as JSON lines."""
    rng = random.Random(0)
    say = words(rng)
    with open(file, 'w') as lines:
        for i in range(count):
            turns = []
            for _ in range(rng.randint(1, 3)):
                turns.append({'from': 'human', 'value': f'{i}: {say(rng.randint(3, 12))}?'})
                turns.append({'from': 'gpt', 'value': say(rng.randint(3, 40))})
            lines.write(json.dumps({'id': str(i), 'conversations': turns}) + '\n')


def measure_tokens(opened, repeats):
    """MB of text a second and core: a long text, documents of 2,000 characters, and conversations of such."""
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    say = words(random.Random(1))
    documents = [say(400)[:2000] for _ in range(100)]
    text = '\n'.join(documents)
    talks = [[{'role': 'user', 'content': d[:300]}, {'role': 'assistant', 'content': d[300:]}] for d in documents]
    ways = {
        'text': lambda: opened.encode(text),
        'documents': lambda: opened.encode_documents(documents),
        'conversations': lambda: [conversation.encode(talk, opened) for talk in talks],
    }
    size = len(text.encode()) / 1e6
    return {name: round(size / seconds, 2) for name, seconds in in_turns(ways, repeats).items()}


def memory():
    """The memory of this process and of those it started, in MiB, what they share counted once. None: not told."""
    parents = {}
    for folder in pathlib.Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / 'stat').read_text().rpartition(')')[2].split()[1])
    ours = {os.getpid()}
    while new := {child for child, parent in parents.items() if parent in ours} - ours:
        ours |= new
    total = 0
    for process in ours:
        with contextlib.suppress(OSError):
            lines = pathlib.Path(f'/proc/{process}/smaps_rollup').read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith('Pss:'))
    return round(total / 1024) or None


@contextlib.contextmanager
def watched():
    """Gives a list that holds the largest memory() when the block is left."""
    seen, over = [memory()], threading.Event()

    def watch():
        while not over.wait(0.5):
            seen.append(memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
        seen[:] = [max((m for m in seen if m), default=None)]


def measure_index(folder, opened, count):
    """How fast conversations are looked at in this process, and by as many as the pass takes by itself."""
    config = configs.Config(stage='sft', run_dir=str(folder / 'runs' / 'sft'))
    config.data.source, config.data.path, config.data.length = 'conversations', str(folder / 'chats.jsonl'), 512
    write_conversations(config.data.path, count)
    found = {'examples': count, 'cores': index.cores()}
    for name, cores in (('alone', 1), ('as_it_comes', index.cores())):
        one = mock.patch.object(index, 'cores', lambda cores=cores: cores)
        with tempfile.TemporaryDirectory() as again, watched() as peak, one:
            config.run_dir = f'{again}/runs/sft'
            began = time.perf_counter()
            made = index.build_index(sources.open_source(config, 'train'), config, opened, 'train')
            seconds = time.perf_counter() - began
        found[name] = {'examples_per_second': round(count / seconds), 'peak_mib': peak[0], 'of_train': made.asked}
    return found


def lengths_of(name, count):
    """(lengths, images, row length, slots, open rows) of so many examples of one of SETS."""
    median, spread, share, length, slots, open_rows = SETS[name]
    rng = np.random.default_rng(0)
    seen = (rng.random(count) < share).astype(np.int32)
    text = np.clip(rng.lognormal(np.log(median), spread, count), 6, length - PATCHES * bool(slots))
    return text.astype(np.int32) + PATCHES * seen, seen, length, slots, open_rows


def measure_plan(count):
    """Seconds of processor time for the plan of `count` examples, and how many rows it makes."""
    lengths, seen, *rest = lengths_of('pages of 180 tokens', count)
    order = np.random.default_rng(1).permutation(count)
    began = time.process_time()
    rows = packing.plan(order, lengths, seen, *rest)
    return {'examples': count, 'seconds': round(time.process_time() - began, 2), 'rows': len(rows)}


def measure_packing(count):
    """{set: shares of tokens and of image slots that are used}."""
    found = {}
    for name in SETS:
        lengths, seen, length, slots, open_rows = lengths_of(name, count)
        rows = len(packing.plan(np.random.default_rng(1).permutation(count), lengths, seen, length, slots, open_rows))
        used = {'tokens': round(float(lengths.sum() / rows / length), 4)}
        found[name] = used | ({'image slots': round(float(seen.sum() / rows / slots), 4)} if slots else {})
    return found


def measure_pipeline(named, batches=20):
    """Batches, rows and tokens a second of a config as training reads it."""
    file, _, size = named.partition(':')
    if not pathlib.Path(file).is_file():
        raise UserError(f'no config file {file!r}: say --config=FILE, as in --config=configs/sft.py:tiny.')
    config = runpy.run_path(file)['get_config'](*([size] if size else []))
    configs.fill(config)
    check(config)
    rows, _ = pipeline.open_rows(config, pipeline.family_tokenizer(config))
    stream = pipeline.batches(rows, config.data.batch_size, 0, config.data.workers)
    first = next(stream)
    began = time.perf_counter()
    for _ in range(batches):
        next(stream)
    second = batches / (time.perf_counter() - began)
    return {
        'config': named,
        'batches_per_second': round(second, 2),
        'rows_per_second': round(second * config.data.batch_size),
        'tokens_per_second': round(second * first['tokens'].size),
    }


def measure(options):
    """What main() prints."""
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        say = words(random.Random(0))
        tokenizer.train_tokenizer((say(50) for _ in range(500)), 2048, folder / 'trained')
        trained = tokenizer.Tokenizer(folder / 'trained')
        looked = measure_index(folder, trained, options['examples'])  # first: what follows takes memory of its own
        tokens = {'trained': measure_tokens(trained, options['repeats'])}
        if options['tokenizer']:
            tokenizer.import_tokenizer(options['tokenizer'], folder / 'given')
            tokens['given'] = measure_tokens(tokenizer.Tokenizer(folder / 'given'), options['repeats'])
    found = {
        'images_per_second_and_core': measure_images(options['repeats']),
        'megabytes_tokenized_per_second_and_core': tokens,
        'index': looked,
        'plan': measure_plan(options['plan']),
        'packing': measure_packing(min(options['plan'], 100_000)),
    }
    if options['config']:
        found['pipeline'] = measure_pipeline(options['config'])
    versions = {'python': platform.python_version(), 'numpy': np.__version__, 'pillow': __version__}
    return found | {'machine': f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores'} | versions


def table(found, above=()):
    """What was found as lines of a name and a figure each."""
    for name, value in found.items():
        if isinstance(value, dict):
            yield from table(value, (*above, str(name).replace('_', ' ')))
        else:
            told = f'{value:,}' if isinstance(value, int | float) else value
            yield f'{" · ".join((*above, str(name).replace("_", " "))):<64}{told:>16}'


def main(argv):
    """The command: see the module's docstring."""
    if {'--help', '-h'} & set(argv):
        print(__doc__)
        return
    found = measure(read(argv))
    print('\n'.join(table(found)))
    print(json.dumps(found))


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
