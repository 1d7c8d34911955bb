"""Files made to harm, given to the real commands: each ends in one sentence with code 2, soon, and in little memory.

Nothing is executed, and nothing is written but where the command was told to. bash scripts/test.sh --faults runs these.
"""

import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
import zlib

import micro
import pytest
from conftest import ROOT

from nanovision_jax.hf import convert
from nanovision_jax.inference.run import load

pytestmark = [pytest.mark.slow, pytest.mark.faults]
DEEP = '[' * 100_000 + ']' * 100_000
MOST = 1500 << 20  # bytes of memory; reading what is sound takes about 700 MiB


def refused(tmp_path, *argv):
    """The command ends with code 2 within a minute, in one sentence, and has not written elsewhere."""
    last = ends(tmp_path, *argv, code=2).splitlines()[-1]
    assert last.startswith('error: ') and len(last) < 2000, last


def ends(tmp_path, *argv, code):
    """What a command has said by its end, which comes soon, with a code; it has written nothing but into made/."""
    before = {path for path in tmp_path.rglob('*') if 'made' not in path.relative_to(tmp_path).parts}
    env = os.environ | {'PYTHONPATH': str(ROOT), 'NANOVISION_CACHE': '0'}
    began, log = time.monotonic(), tmp_path / 'made' / 'log'
    log.parent.mkdir(exist_ok=True)
    with open(log, 'w') as out:
        command = [sys.executable, '-m', *map(str, argv)]
        started = subprocess.Popen(command, cwd=tmp_path / 'made', env=env, stdout=out, stderr=out)
        _, status, used = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)
    said = log.read_text(errors='replace')
    assert started.returncode == code and 'Traceback' not in said, (started.returncode, said[-3000:])
    assert time.monotonic() - began < 60 and used.ru_maxrss << 10 < MOST, used
    after = {path for path in tmp_path.rglob('*') if 'made' not in path.relative_to(tmp_path).parts}
    assert after == before
    assert not (tmp_path / 'made' / 'executed').exists()
    return said


class Harm:
    """A pickle of it makes a file when it is read."""

    def __reduce__(self):
        return open, ('executed', 'w')


# Data ----------------------------------------------------------------------------------------------------------------


def sparse_zip(file, size):
    """A zip whose pictures claim to be `size` bytes of zeros each, in a thousandth of that."""
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as opened:
        for number in range(3):
            with opened.open(f'{number}.jpg', 'w', force_zip64=True) as member:
                for _ in range(size >> 24):
                    member.write(bytes(1 << 24))


def large_png():
    """A PNG of 9000 × 9000 black pixels."""

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    head = struct.pack('>IIBBBBB', 9000, 9000, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(9001 * 9000), 1)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', body) + chunk(b'IEND', b'')


def outside(own):
    """Rows whose pictures lie where no data may point."""
    secret = own.file.parent.parent / 'secret.jpg'
    secret.write_bytes((own.images / '0.jpg').read_bytes())
    (own.images / 'link.jpg').symlink_to(secret)
    names = ['../../secret.jpg', str(secret), 'link.jpg']
    own.file.write_text(json.dumps([row | {'image': names[i % 3]} for i, row in enumerate(own.rows)]))


def zipped(own):
    with zipfile.ZipFile(own.file.parent / 'images.zip', 'w') as file:
        for image in own.images.iterdir():
            file.writestr(f'../{image.name}', image.read_bytes())
    data = (own.file.parent / 'images.zip').read_bytes()
    for image in own.images.iterdir():
        image.unlink()
    own.images.rmdir()
    return data


DATA = {
    'deep JSON': lambda own: own.file.write_text(DEEP),
    'deep rows': lambda own: own.file.write_text(f'[{DEEP}]'),
    'JSON cut off': lambda own: own.file.write_bytes(own.file.read_bytes()[:5000]),
    'a number': lambda own: own.file.write_text('7'),
    'a number of a million digits': lambda own: own.file.write_text('[' + '7' * 1_000_000 + ']'),
    'nothing but zeros': lambda own: own.file.write_bytes(bytes(1 << 20)),
    'rows of other things': lambda own: own.file.write_text(json.dumps([7, None, 'x', [], {}] * 60)),
    'half a character': lambda own: own.file.write_text(own.file.read_text().replace('What?', '\\ud83d')),
    'links and names that leave': outside,
    'a zip cut off': lambda own: (own.file.parent / 'images.zip').write_bytes(zipped(own)[:3000]),
    'a zip of zeros': lambda own: (zipped(own), sparse_zip(own.file.parent / 'images.zip', 1 << 30)),
    'huge pictures': lambda own: [image.write_bytes(large_png()) for image in list(own.images.iterdir())[:5]],
}


def train_clip(own, tmp_path):
    fields = [f'run_dir={tmp_path}/made/x/clip', 'data.source=conversations', f'data.path={own.file}', 'steps=1']
    train = ['nanovision_jax.train', f'--config={ROOT}/configs/clip.py:tiny']
    return [*train, *(f'--config.{field}' for field in fields)]


@pytest.mark.parametrize('what', DATA)
def test_data(what, own, tmp_path):
    DATA[what](own)
    refused(tmp_path, *train_clip(own, tmp_path))


def test_a_zip_of_names_that_leave_it_is_read_and_never_unpacked(own, tmp_path):
    zipped(own)
    ends(tmp_path, *train_clip(own, tmp_path), code=0)


# Runs ----------------------------------------------------------------------------------------------------------------


def put(run, **values):
    """Changes values of a run's config, as whoever made the run would have: its checkpoints are of that config."""
    content = json.loads((run / 'config.json').read_text())
    for name, value in values.items():
        *groups, last = name.split('__')
        place = content
        for group in groups:
            place = place[group]
        place[last] = value
    (run / 'config.json').write_text(json.dumps(content))


CONFIGS = {
    'a list': lambda run: (run / 'config.json').write_text('[1]'),
    'deep': lambda run: (run / 'config.json').write_text(DEEP),
    'deep within': lambda run: (run / 'config.json').write_text('{"stage": "sft", "model": ' + DEEP + '}'),
    'another stage': lambda run: put(run, stage='evil'),
    'no heads': lambda run: put(run, model__heads=0),
    'words for numbers': lambda run: put(run, model__width='wide'),
    'numbers for words': lambda run: put(run, dtype=7),
    'a thousand million layers': lambda run: put(run, model__layers=10**9),
    'not a number': lambda run: put(run, model__rope_theta=float('nan')),
    'a model that is no group': lambda run: put(run, model=[]),
    'a tokenizer of nothing': lambda run: (run / 'tokenizer/tokenizer.json').write_text('{}'),
    'a deep tokenizer': lambda run: (run / 'tokenizer/tokenizer.json').write_text(DEEP),
    'a deep lineage': lambda run: (run / 'lineage.json').write_text(DEEP),
    'a lineage of words': lambda run: (run / 'lineage.json').write_text('{"sessions": "x", "parents": "y"}'),
}


@pytest.fixture
def run(tmp_path, tiny_family):
    """The folder of an sft run."""
    (tmp_path / 'family').mkdir()
    return micro.parent_run(micro.family(tmp_path / 'family' / 'x', tiny_family), 'sft')


@pytest.mark.parametrize('what', CONFIGS)
def test_runs_of_others(what, run, tmp_path):
    CONFIGS[what](run)
    micro.restamp(run)
    refused(tmp_path, 'nanovision_jax.chat', f'--run={run}', '--prompt=hello')
    next_stage = [f'init_from={run}', f'run_dir={tmp_path}/made/y/sft', 'data.source=tiny_world', 'steps=1']
    train = ['nanovision_jax.train', f'--config={ROOT}/configs/sft.py:tiny']
    refused(tmp_path, *train, *(f'--config.{field}' for field in next_stage))


# Published folders ---------------------------------------------------------------------------------------------------


def header(folder, text):
    data = text.encode()
    (folder / 'model.safetensors').write_bytes(struct.pack('<Q', len(data)) + data)


def pickled(folder, name):
    for file in folder.glob('*.safetensors'):
        file.unlink()
    (folder / name).write_bytes(pickle.dumps(Harm()))


def config(folder, **values):
    file = folder / 'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def foreign_code(folder):
    """A tokenizer that asks for code of its own, which is there; and is no tokenizer itself."""
    file = folder / 'tokenizer_config.json'
    told = json.loads(file.read_text()) | {'auto_map': {'AutoTokenizer': ['code.Own', None]}, 'tokenizer_class': 'Own'}
    file.write_text(json.dumps(told))
    (folder / 'code.py').write_text("open('executed', 'w')\n")
    (folder / 'tokenizer.json').unlink()


FOLDERS = {
    'a header of 2**40 bytes': lambda f: (f / 'model.safetensors').write_bytes(struct.pack('<Q', 2**40) + b'{}'),
    'a deep header': lambda f: header(f, '{"a": ' + DEEP + '}'),
    'a header of nothing': lambda f: header(f, 'null'),
    'weights that leave the file': lambda f: header(
        f, '{"x": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}'
    ),
    'pickled weights': lambda f: pickled(f, 'pytorch_model.bin'),
    'a pickle as safetensors': lambda f: pickled(f, 'model.safetensors'),
    'a deep config': lambda f: (f / 'config.json').write_text(DEEP),
    'a config that is a list': lambda f: (f / 'config.json').write_text('[]'),
    'a thousand million layers': lambda f: config(f, num_hidden_layers=10**9),
    'a width of words': lambda f: config(f, hidden_size='x'),
    'no heads': lambda f: config(f, num_attention_heads=0),
    'a deep tokenizer': lambda f: (f / 'tokenizer.json').write_text(DEEP),
    'a tokenizer of zeros': lambda f: (f / 'tokenizer.json').write_bytes(bytes(100_000)),
    'a tokenizer with code': foreign_code,
}


@pytest.fixture
def published(run, tmp_path):
    """The run as a Hugging Face folder without our own notes, as anybody may offer one."""
    folder = tmp_path / 'published'
    convert.to_folder(load(run), folder, 'float32', None)
    (folder / 'nanovision_jax.json').unlink()
    return folder


@pytest.mark.parametrize('what', FOLDERS)
def test_published_folders(what, published, tmp_path):
    FOLDERS[what](published)
    command = ['nanovision_jax.convert', '--from=hf', f'--input={published}', f'--output={tmp_path}/made/taken']
    refused(tmp_path, *command)
    assert not (tmp_path / 'made' / 'taken').exists()


def test_a_template_that_is_a_program_is_not_run(published, tmp_path):
    """It is judged by what it prints in a sandbox; our own template takes its place, or it is refused."""
    file = published / 'tokenizer_config.json'
    harm = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    harm += '{% for i in range(10**9) %}' * 2 + 'x' + '{% endfor %}' * 2
    for stale in published.glob('chat_template*'):
        stale.unlink()
    file.write_text(json.dumps(json.loads(file.read_text()) | {'chat_template': harm}))
    refused(tmp_path, 'nanovision_jax.convert', '--from=hf', f'--input={published}', f'--output={tmp_path}/made/taken')
