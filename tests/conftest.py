"""What must happen before anything uses jax, and the small inputs that several test files share."""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
import random
import re
import shutil
import signal
import types
import zipfile

# Tests compile much and compute little: a third less time in all. Numbers are compared with tolerances that hold.
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0'
if tuple(map(int, importlib.metadata.version('jaxlib').split('.')[:2])) < (0, 11):  # a newer one ends on this flag
    os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'

os.environ['NANOVISION_CACHE'] = '0'  # tests leave nothing in the home of whoever runs them

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook
from PIL import Image

jax.config.update('jax_num_cpu_devices', 8)  # meshes need devices; too late once a backend runs
CHECKED = ('models', 'training', 'inference', 'data.batch', 'data.features', 'data.packing')
for checked in CHECKED:  # types and shapes are checked in test runs only
    install_import_hook(f'nanovision_jax.{checked}', 'beartype.beartype')

from nanovision_jax import cli  # noqa: E402
from nanovision_jax.data import tokenizer as tokenizers  # noqa: E402
from nanovision_jax.data.datasets import tiny_world  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
WORDS = re.findall(r'\S+', 'a the cat dog bird runs sees eats red blue house tree on under naïve über 你好 42 , . ! ?')


def sentence(rng, low=3, high=12):
    return ' '.join(rng.choices(WORDS, k=rng.randint(low, high)))


@pytest.fixture(scope='session')
def tokenizer_folder(tmp_path_factory):
    """A byte-level BPE trained on a few hundred sentences; by then no pair is left to merge, so it is under 400."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp('tokenizer') / 'tokenizer'
    tokenizers.train_tokenizer((sentence(rng) for _ in range(400)), 400, folder)
    return folder


@pytest.fixture(scope='session')
def tokenizer(tokenizer_folder):
    return tokenizers.Tokenizer(tokenizer_folder)


def jpeg(rng, size=None):
    """The bytes of a picture of a few random patches."""
    patches = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
    buffer = io.BytesIO()
    patches.resize(size or (40, 30), Image.Resampling.NEAREST).save(buffer, 'JPEG')
    return buffer.getvalue()


def is_held_out(data):
    """The rule of the 5% split, written a second time."""
    return int.from_bytes(hashlib.sha256(data).digest()[:4], 'big') % 20 == 0


@pytest.fixture(scope='session')
def llava_folder(tmp_path_factory):
    """LLaVA's layout: images.zip with 60 JPEGs, 4 of them on the validation side, and two files about them.

    pretrain.json: a caption a picture. instruct.json: two to four turns a picture, and 12 rows without one.
    """
    folder, words, rng = tmp_path_factory.mktemp('llava'), random.Random(1), np.random.default_rng(1)
    wanted, pictures = {True: 4, False: 56}, []
    while len(pictures) < 60:
        data = jpeg(rng, (int(rng.integers(20, 50)), int(rng.integers(20, 50))))
        if wanted[is_held_out(data)]:
            wanted[is_held_out(data)] -= 1
            pictures.append(data)
    names = [f'{i % 3:02d}/{i:04d}.jpg' for i in range(60)]
    with zipfile.ZipFile(folder / 'images.zip', 'w') as file:
        for name, data in zip(names, pictures, strict=True):
            file.writestr(name, data)

    def talk(turns, picture):
        said = []
        for turn in range(turns):
            question = sentence(words) + '?'
            if picture and turn == 0:
                question = f'<image>\n{question}' if words.random() < 0.5 else f'{question}\n<image>'
            said += [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': sentence(words)}]
        return said

    pretrain = [{'id': f'p{i}', 'image': name, 'conversations': talk(1, True)} for i, name in enumerate(names)]
    instruct = [
        {'id': f'i{i}', 'image': name, 'conversations': talk(words.randint(2, 4), True)} for i, name in enumerate(names)
    ]
    instruct += [{'id': f't{i}', 'conversations': talk(words.randint(2, 4), False)} for i in range(12)]
    words.shuffle(instruct)
    (folder / 'pretrain.json').write_text(json.dumps(pretrain))
    (folder / 'instruct.json').write_text(json.dumps(instruct, indent=1))
    return folder


@pytest.fixture(scope='session')
def tiny_family(tmp_path_factory):
    """A folder runs/tiny whose data/ holds a tiny_world of a few dozen examples; the stages' run folders go beside."""

    family = tmp_path_factory.mktemp('runs') / 'tiny'
    few = {
        'scenes': {'train': 64, 'validation': 24, 'heldout': 24},
        'text': {'train': 96, 'validation': 16},
        'chat': {'train': 48, 'validation': 16},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_world, 'EXAMPLES', few)
        for kind in few:
            tiny_world.open_rows(str(family / 'data'), kind, 'train')
    return family


def parse(stage, *overrides, size='tiny'):
    """The config of a stage, as the command line would give it; overrides as in 'optim.learning_rate=1'."""
    argv = [f'--config={ROOT}/configs/{stage}.py:{size}', *(f'--config.{override}' for override in overrides)]
    return cli.parse(argv)[0]


@pytest.fixture(scope='session')
def tiny_config(tiny_family):
    """A function (stage, *overrides) → the tiny Config of a stage in the tiny family."""
    return lambda stage, *overrides: parse(stage, f'run_dir={tiny_family / stage}', *overrides)


# Of tests that train -------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def quick():
    """Nothing is optimized or measured; see micro.quicken()."""
    import micro

    with pytest.MonkeyPatch.context() as patch:
        micro.quicken(patch)
        yield


@pytest.fixture
def heard():
    """Signals as a terminal has them, whoever started the tests: nohup has SIGHUP ignored, `&` in a script SIGINT."""
    from nanovision_jax.training.stopping import SIGNALS

    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS if number != signal.SIGINT}
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope='module')
def unsampled():
    """Evaluations show no samples: these are half of the time of a run of nine steps."""
    from nanovision_jax.training import watching

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watching, 'watch', lambda *_: {})
        yield


@pytest.fixture(scope='module')
def family(tmp_path_factory, tiny_family, quick):
    """A family whose first stages never learned; read only."""
    import micro

    folder = micro.family(tmp_path_factory.mktemp('family'), tiny_family)
    for stage in ('pretrain', 'vision_pretrain'):
        micro.parent_run(folder, stage)
    return folder


@pytest.fixture
def runs(family, tmp_path):
    """A copy of it, to be spoiled."""
    return shutil.copytree(family, tmp_path / 'runs', symlinks=True)


@pytest.fixture
def own(tmp_path):
    """A user's data: 300 conversations about a picture of their own each, 0.jpg to 299.jpg in the folder `images`.

    file: the conversations; rows: what is in it; fields: what makes a config take them, as micro.run_config() wants it.
    """
    folder, rng = tmp_path / 'own', np.random.default_rng(0)
    (folder / 'images').mkdir(parents=True)
    talk = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'This.'}]
    rows = [{'id': str(number), 'image': f'{number}.jpg', 'conversations': talk} for number in range(300)]
    for row in rows:
        (folder / 'images' / row['image']).write_bytes(jpeg(rng))
    file = folder / 'own.json'
    file.write_text(json.dumps(rows))
    fields = {'data__source': 'conversations', 'data__path': str(file)}
    return types.SimpleNamespace(file=file, images=folder / 'images', rows=rows, fields=fields)


@pytest.fixture
def bucket(monkeypatch):
    """The address of a bucket of an S3 server on this machine."""
    moto = pytest.importorskip('moto.server')
    pytest.importorskip('s3fs')
    import fsspec

    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        'AWS_ACCESS_KEY_ID': 'x',
        'AWS_SECRET_ACCESS_KEY': 'x',
        'AWS_DEFAULT_REGION': 'us-east-1',
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('AWS_ENDPOINT_URL', f'http://{host}:{port}')
    with contextlib.suppress(FileExistsError):  # of the test before: moto's buckets outlive its server
        fsspec.filesystem('s3').mkdir('runs')
    yield 's3://runs/mine'
    fsspec.get_filesystem_class('s3').clear_instance_cache()
    server.stop()
