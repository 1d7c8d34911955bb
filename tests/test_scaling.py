"""What a compiled step sends, and what a device holds of its state, as devices become more."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

MESHES = {8: [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)], 64: [(64, 1, 1), (1, 64, 1), (8, 8, 1), (8, 4, 2)]}


@pytest.fixture(scope='module', params=[8, pytest.param(64, marks=pytest.mark.slow)])
def found(request):
    """{mesh: what scaling_driver.py says of it}, of one number of devices."""
    meshes = MESHES[request.param]
    command = [sys.executable, f'{ROOT}/tests/scaling_driver.py', str(request.param), json.dumps(meshes)]
    done = subprocess.run(command, env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'Involuntary full rematerialization' not in done.stderr
    return dict(zip(meshes, map(json.loads, done.stdout.splitlines()), strict=True))


def test_copies_send_their_gradients_once_and_nothing_else(found):
    mesh, told = next(iter(found.items()))
    assert mesh[1:] == (1, 1) and told['held'] == told['whole']
    assert set(told['sent']) == {'all-reduce f32'}
    assert told['sent']['all-reduce f32'] == pytest.approx(4 * told['parameters'], rel=0.01)


def test_what_is_split_is_held_in_parts(found):
    for (_, fsdp, tensor), told in found.items():
        # Norms are whole everywhere: a few in a thousand.
        assert told['held'] / told['whole'] == pytest.approx(1 / (fsdp * tensor), abs=0.02), (fsdp, tensor)


def test_split_parameters_are_gathered_twice_and_their_gradients_reduced_once(found):
    """Forward and backward; programs for CPU gather float32, which TPUs and GPUs gather in bfloat16."""
    for (data, fsdp, tensor), told in found.items():
        if tensor > 1 or fsdp == 1:
            continue
        gathered = sum(size for name, size in told['sent'].items() if name.startswith('all-gather'))
        assert gathered <= 2.2 * 4 * told['parameters'], (data, fsdp, told)
        reduced = sum(size for name, size in told['sent'].items() if name.startswith(('all-reduce', 'reduce-scatter')))
        most = 1 + (data > 1) / fsdp  # over what is split, and the own part over the copies
        assert reduced <= 1.05 * most * 4 * told['parameters'], (data, fsdp, told)
