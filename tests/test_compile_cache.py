"""The compilation cache: on by default, the user's alone, off when told, and what it gives back is the same program."""

import os
import stat
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
import os
import jax, jax.numpy as jnp
from nanovision_jax.parallel import compile_cache
jax.config.update('jax_num_cpu_devices', int(os.environ.get('DEVICES', 1)))
jax.jit(lambda x: x + 1)(jnp.ones(3))
compile_cache.SECONDS = 0.0
folder = compile_cache.use()
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
result = jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((8, 8)))
print(folder, float(result), sum('cache_hits' in name for name in hits))
"""


def said(home, **env):
    """(folder, result, hits) of a process that compiles one program."""
    kept = {name: value for name, value in os.environ.items() if name in ('PATH', 'LD_LIBRARY_PATH')}
    env = kept | {'PYTHONPATH': str(ROOT), 'XDG_CACHE_HOME': str(home), 'JAX_PLATFORMS': 'cpu'} | env
    done = subprocess.run([sys.executable, '-c', PROGRAM], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-500:]
    folder, result, hits = done.stdout.split()
    return folder, result, int(hits)


def test_what_one_process_compiled_the_next_one_reads(tmp_path):
    first, again = said(tmp_path), said(tmp_path)
    assert first[2] == 0 < again[2] and first[:2] == again[:2]
    folder = tmp_path / 'nanovision_jax'
    (made,) = folder.iterdir()
    assert str(made) == first[0] and stat.S_IMODE(made.stat().st_mode) == 0o700 and any(made.iterdir())


@pytest.mark.parametrize('env', [{'NANOVISION_CACHE': '0'}, {'JAX_COMPILATION_CACHE_DIR': 'their/own'}])
def test_it_is_off_when_told_and_where_jax_was_told_of_another(tmp_path, monkeypatch, env):
    monkeypatch.chdir(tmp_path)
    assert said(tmp_path, **env)[0] == 'None' and not (tmp_path / 'nanovision_jax').exists()


def test_several_devices_that_are_cpus_read_none_whoever_named_it(tmp_path):
    kept = {'JAX_COMPILATION_CACHE_DIR': str(tmp_path), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    alone = said(tmp_path, **kept), said(tmp_path, **kept)
    assert alone[0][2] == 0 < alone[1][2]
    assert said(tmp_path, DEVICES='2', **kept) == ('None', alone[0][1], 0)
    assert said(tmp_path / 'own', DEVICES='2')[::2] == ('None', 0) and not (tmp_path / 'own').exists()


def test_a_home_that_cannot_be_written_turns_it_off(tmp_path):
    (tmp_path / 'file').write_text('')
    assert said(tmp_path / 'file')[0] == 'None'
