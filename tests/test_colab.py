"""The Colab notebooks, each executed as it stands but for its first cell (sizes and names) and what only Colab has."""

import os
import sys

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from PIL import Image

FOLDER = ROOT / 'scripts' / 'colab'
SMALL = (
    '--config.steps=2 --config.data.batch_size=4 --config.optim.accumulate=2 --config.model.unroll=1 '
    '--config.eval.batches=1 --config.checkpoint.every=2'
)


def execute(name, settings):
    """Runs a notebook with `settings` for its parameters; a cell that fails raises. Returns the cells' output as text."""
    book = nbformat.read(FOLDER / f'{name}.ipynb', as_version=4)
    tags = [cell.metadata.get('tags', []) for cell in book.cells]
    (parameters,) = [cell for cell, tag in zip(book.cells, tags, strict=True) if 'parameters' in tag]
    names = [line.split()[1].partition('=')[0] for line in parameters.source.splitlines()]
    assert set(settings) <= set(names), 'a setting that the notebook does not have'
    parameters.source = '\n'.join(f'%env {name}={settings.get(name, "")}' for name in names)
    book.cells = [cell for cell, tag in zip(book.cells, tags, strict=True) if 'setup' not in tag]
    NotebookClient(book, timeout=300, kernel_name='python3').execute()
    outputs = [output for cell in book.cells if cell.cell_type == 'code' for output in cell.outputs]
    return ''.join(output.get('text', '') or str(output.get('data', '')) for output in outputs)


@pytest.fixture(scope='module')
def work(tmp_path_factory, tiny_family):
    """A folder as WORK with runs/tiny, whose data are small; the kernels find our code, and no device but the CPU."""
    folder = tmp_path_factory.mktemp('work')
    (folder / 'runs').mkdir()
    (folder / 'runs' / 'tiny').mkdir()
    (folder / 'runs' / 'tiny' / 'data').symlink_to(tiny_family / 'data')
    Image.new('RGB', (40, 30), 'red').save(folder / 'picture.jpg')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', str(ROOT))
        patch.setenv('PATH', f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}')
        patch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')
        patch.setenv('JAX_PLATFORMS', 'cpu')
        yield folder
