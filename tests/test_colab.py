"""The Colab notebooks, each executed as it stands but for its first cell (sizes and names) and what only Colab has."""

import json
import os
import subprocess
import sys

import micro
import nbformat
import pytest
from conftest import ROOT, parse
from nbclient import NotebookClient
from PIL import Image
from published import llava_rows, magpie_rows, pictures, write_jsonl, write_zip
from traitlets.config import Config

FOLDER = ROOT / 'scripts' / 'colab'
SMALL = (
    '--config.steps=2 --config.data.batch_size=4 --config.optim.accumulate=2 --config.model.unroll=1 '
    '--config.eval.batches=1 --config.checkpoint.every=2'
)


def execute(name, settings):
    """Runs a notebook with `settings` for its parameters and returns what it printed; a cell that fails raises."""
    book = nbformat.read(FOLDER / f'{name}.ipynb', as_version=4)
    tags = [cell.metadata.get('tags', []) for cell in book.cells]
    (parameters,) = [cell for cell, tag in zip(book.cells, tags, strict=True) if 'parameters' in tag]
    names = [line.split()[1].partition('=')[0] for line in parameters.source.splitlines()]
    assert set(settings) <= set(names), 'a setting that the notebook does not have'
    parameters.source = '\n'.join(f'%env {name}={settings.get(name, "")}' for name in names)
    book.cells = [cell for cell, tag in zip(book.cells, tags, strict=True) if 'setup' not in tag]
    local = Config({'KernelManager': {'transport': 'ipc'}})  # no port is opened
    NotebookClient(book, timeout=300, kernel_name='python3', config=local).execute()
    outputs = [output for cell in book.cells if cell.cell_type == 'code' for output in cell.outputs]
    return ''.join(output.get('text', '') or str(output.get('data', '')) for output in outputs)


@pytest.fixture(scope='module')
def work(tmp_path_factory, tiny_family):
    """A folder as WORK: runs/tiny with pretrain and clip runs, a picture, published files in from/; CPU only."""
    folder = tmp_path_factory.mktemp('work')
    (folder / 'runs').mkdir()
    micro.family(folder / 'runs' / 'tiny', tiny_family)
    rows, members = llava_rows(40, pictures(40))
    write_zip(folder / 'from' / 'images.zip', members)
    (folder / 'from' / 'chat.json').write_text(json.dumps(rows))
    (folder / 'from' / 'llava_instruct_150k.json').write_text(json.dumps(rows))
    write_jsonl(folder / 'from' / 'magpie.jsonl', [{k: row[k] for k in KEPT} for row in magpie_rows(40)])
    Image.new('RGB', (40, 30), 'red').save(folder / 'picture.jpg')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', str(ROOT))
        patch.setenv('PATH', f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}')
        patch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')  # compiles quicker
        patch.setenv('JAX_PLATFORMS', 'cpu')
        yield folder


@pytest.mark.parametrize(
    'device, extra', [('gpu', '[cuda12]'), ('cpu', ''), ('accel0', '[tpu]'), ('vfio/0', '[tpu]'), ('vfio/vfio', '')]
)
def test_what_is_installed_has_the_libraries_of_the_device(device, extra, tmp_path):
    """Colab's own are of another jax: beside a newer one they are not used, and the CPU is."""
    (tmp_path / 'code').mkdir()
    (tmp_path / 'dev' / device).mkdir(parents=True)
    for name, does in (('pip', 'echo "$@"'), ('nvidia-smi', f'[ {device} = gpu ]'), ('git', 'exit 1')):
        (tmp_path / name).write_text(f'#!/bin/sh\n{does}\n')
        (tmp_path / name).chmod(0o755)
    environment = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'CODE': str(tmp_path / 'code')}
    for file in sorted(FOLDER.glob('*.ipynb')):
        (cell,) = [c for c in nbformat.read(file, as_version=4).cells if 'pip install' in c.source]
        assert 'setup' in cell.metadata.tags and cell.source.startswith('%%bash\n')
        script = cell.source.removeprefix('%%bash\n').replace("'/dev/", f"'{tmp_path}/dev/")
        done = subprocess.run(['bash', '-c', script], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f'install --quiet -e {tmp_path}/code{extra}\n'


KEPT = ('uuid', 'instruction', 'response')
DATA = {'sft': 'magpie', 'vision_pretrain': 'llava_pretrain', 'vision_instruct': 'llava_instruct'}


@pytest.mark.slow
def test_the_notebooks_go_down_the_road(work):
    family = work / 'runs' / 'tiny'
    for stage in ('pretrain', 'clip'):
        micro.parent_run(family, stage, parse(stage, f'run_dir={family / stage}', 'model.unroll=1'))
    settings = {'CODE': str(ROOT), 'WORK': str(work), 'NAME': 'tiny', 'SIZE': 'tiny', 'PICTURE': 'picture.jpg'}
    for stage, data in DATA.items():
        options = f'{SMALL} --config.data.source={data} --config.data.path=data'
        mine = settings | {'PREPARE': f'{data} --from=from --output=data', 'OPTIONS': options}
        said = execute(stage, mine if stage != 'sft' else {k: v for k, v in mine.items() if k != 'PICTURE'})
        assert '40 rows, ' in said and f'finished: runs/tiny/{stage}' in said
        assert (work / 'exports' / f'tiny-{stage}' / 'model.safetensors').is_file()
    said = execute('inference', {k: v for k, v in settings.items() if k != 'SIZE'} | {'STAGE': 'vision_instruct'})
    assert 'image/png' in said or 'PIL' in said
