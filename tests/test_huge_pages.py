"""Huge pages: the command begins once more, with its own arguments, and never a third time."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = (
    'import os, sys\n'
    'from nanovision_jax.parallel import huge_pages\n'
    'print("begins", os.getpid(), flush=True)\n'
    'huge_pages.use()\n'
    'print(sys.argv[1:], os.environ["GLIBC_TUNABLES"])\n'
)


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc is of Linux')
@pytest.mark.parametrize(
    'given, begins, told', [({}, 2, 'glibc.malloc.hugetlb=1'), ({'GLIBC_TUNABLES': 'a.b=1'}, 1, 'a.b=1')]
)
def test_a_command_begins_once_more_with_huge_pages(given, begins, told):
    env = {name: value for name, value in os.environ.items() if name != 'GLIBC_TUNABLES'} | {'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-c', PROGRAM, '--an=option', 'a word']
    done = subprocess.run(command, capture_output=True, text=True, env=env | given)
    assert done.returncode == 0, done.stderr
    *begun, last = done.stdout.splitlines()
    assert len(begun) == begins and len(set(begun)) == 1  # in the same process
    assert last == f"['--an=option', 'a word'] {told}"
