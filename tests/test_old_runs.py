"""Runs of older code still open, go on and export: tests/golden/run, which make.sh beside it tells the history of."""

import json
import pathlib
import shutil

import micro
import numpy as np
import pytest

import nanovision_jax
from nanovision_jax import convert
from nanovision_jax.errors import UserError
from nanovision_jax.runs import config_file as runconfig
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.runs.metrics import read_metrics
from nanovision_jax.training import loop as train

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'run'


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy somewhere else, opened from a folder where its relative paths lead nowhere."""
    shutil.copytree(GOLDEN, tmp_path / 'copy')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    return tmp_path / 'copy' / 'family' / 'vision_instruct'


EXPECTED = json.loads((GOLDEN / 'expected.json').read_text())


def test_it_opens_and_exports(run, tmp_path):
    opened = nanovision_jax.load(run)
    assert opened.step == 2 and opened.config.run_dir == str(run)
    np.testing.assert_allclose(opened.logits([[5, 6, 7]])[0, -1, :8], EXPECTED['logits'], atol=1e-4)
    convert.main(['--to=hf', f'--run={run}', f'--output={tmp_path}/out'])
    assert '| vision_instruct | conversations data.json |' in (tmp_path / 'out' / 'README.md').read_text()
    convert.main(['--from=hf', f'--input={tmp_path}/out', f'--output={tmp_path}/back/vision_instruct'])
    again = nanovision_jax.load(tmp_path / 'back' / 'vision_instruct')
    np.testing.assert_array_equal(again.logits([[5, 6, 7]]), opened.logits([[5, 6, 7]]))


def test_it_goes_on_with_the_same_rows(run, tmp_path, monkeypatch):
    micro.quicken(monkeypatch)
    config = runconfig.read(run)
    assert pathlib.Path(config.data.path) == run.parent.parent / 'data.json'
    config.mesh.data = 1
    with monkeypatch.context() as patch:
        one = train.parallel.make_mesh(config.mesh, train.jax.devices()[:1])
        patch.setattr(train.parallel, 'make_mesh', lambda *_, **__: one)
        train.train(config)
    lines = read_metrics(run / 'metrics.jsonl')
    found = {str(line['step']): line['loss'] for line in lines if 'loss' in line and line['step'] > 2}
    assert found.keys() == EXPECTED['losses'].keys()
    for step, loss in EXPECTED['losses'].items():
        assert found[step] == pytest.approx(loss, rel=1e-4)
    assert runfolder.manifest(run, 4)['position'] == 8
    record = runfolder.read_lineage(run)
    assert record['frozen_before'] == record['frozen_after'] and record['rows'].keys() == {'data', 'order', 'packing'}
    assert pathlib.Path(record['parents'][0]['run']).name == 'vision_pretrain'


def test_it_does_not_go_on_over_another_tower(run, tmp_path, monkeypatch):
    record = json.loads((run / 'lineage.json').read_text())
    record['frozen_before']['vision'] = record['frozen_before']['vision'][::-1]
    (run / 'lineage.json').write_text(json.dumps(record))
    micro.quicken(monkeypatch)
    config = runconfig.read(run)
    with monkeypatch.context() as patch, pytest.raises(UserError, match='another frozen_before'):
        one = train.parallel.make_mesh(config.mesh, train.jax.devices()[:1])
        patch.setattr(train.parallel, 'make_mesh', lambda *_, **__: one)
        train.train(config)
