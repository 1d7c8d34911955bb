"""What a command leaves on stderr, and its exit code, when the reader of its output goes away."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize('unbuffered', ['', '1'])
@pytest.mark.parametrize('lines', [1, 100_000])  # one fits the buffer and is only written at the end
def test_a_reader_that_goes_away_ends_the_command_without_a_word(lines, unbuffered):
    program = f'from nanovision_jax import errors; errors.run(lambda argv: [print("row") for _ in range({lines})])'
    reader, writer = os.pipe()
    os.close(reader)
    env = os.environ | {'PYTHONUNBUFFERED': unbuffered}
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, env=env, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b'')


def test_another_broken_pipe_is_not_hidden():
    program = 'from nanovision_jax import errors\ndef main(argv): raise BrokenPipeError("a worker")\nerrors.run(main)'
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert 'BrokenPipeError: a worker' in done.stderr
