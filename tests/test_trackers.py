"""Where else a run's numbers go: what each tracker holds afterwards, and that nothing is sent."""

import json
import os
import socket
import sqlite3
import struct

import pytest

from nanovision_jax.config import parse_field
from nanovision_jax.errors import UserError
from nanovision_jax.runs import metrics, trackers

LINES = ({'step': 1, 'loss': 0.5, 'word': 'left out'}, {'step': 3, 'loss': 0.25, 'tokens': 20})
CONFIG = {'stage': 'sft', 'optim.learning_rate': 0.1}


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No address but this machine's is reached, and nothing is read or kept in the user's home."""
    reached, connect = [], socket.socket.connect

    def noted(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ('127.0.0.1', '::1', 'localhost'):
            reached.append(address)
            raise OSError('there is no network')
        return connect(self, address)

    monkeypatch.setattr(socket.socket, 'connect', noted)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    monkeypatch.setenv('TRACKIO_DIR', str(tmp_path / 'trackio'))
    yield
    assert not reached


def write(run, to):
    run.mkdir(parents=True)
    log = metrics.Metrics(run, trackers=trackers.opened(to, run, CONFIG))
    for line in LINES:
        log.write(**line)
    log.close()
    assert [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()] == list(LINES)


def test_tensorboard_gets_the_numbers(tmp_path, alone):
    pytest.importorskip('tensorboardX')
    from tensorboardX.proto.event_pb2 import Event

    write(tmp_path / 'x/sft', 'tensorboard, jsonl')
    (file,) = (tmp_path / 'x/sft/tensorboard').glob('events*')
    data, found = file.read_bytes(), []
    while data:
        (size,) = struct.unpack('<Q', data[:8])
        event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value if event.step]
    assert found == [(1, 'loss', 0.5), (3, 'loss', 0.25), (3, 'tokens', 20)]


def test_trackio_gets_the_numbers(tmp_path, alone):
    pytest.importorskip('trackio')
    write(tmp_path / 'x/sft', 'trackio')
    (file,) = (tmp_path / 'trackio').glob('*.db')
    with sqlite3.connect(file) as base:
        found = [(step, json.loads(values)) for step, values in base.execute('select step, metrics from metrics')]
    assert found == [(1, {'loss': 0.5}), (3, {'loss': 0.25, 'tokens': 20})]


def test_wandb_gets_the_numbers_and_sends_nothing_offline(tmp_path, alone):
    pytest.importorskip('wandb')
    write(tmp_path / 'x/sft', 'wandb')
    (file,) = (tmp_path / 'x/sft/wandb').glob('offline-run-*/run-x-sft.wandb')
    data = file.read_bytes()
    assert b'learning_rate' in data and b'loss' in data and b'0.25' in data and b'left out' not in data


def test_other_trackers_are_refused_and_missing_packages_named(monkeypatch):
    assert trackers.names(parse_field('log.to', 'wandb,tensorboard,wandb,jsonl')) == ['wandb', 'tensorboard']
    with pytest.raises(UserError, match=r"log.to knows tensorboard, wandb, trackio, jsonl, .* not 'mlflow'"):
        trackers.names('tensorboard,mlflow')
    monkeypatch.setitem(trackers.PACKAGES, 'wandb', 'no_such_package')
    with pytest.raises(UserError, match=r"pip install 'nanovision_jax\[wandb\]'"):
        trackers.names('wandb')
    assert 'WANDB_MODE' not in os.environ
