"""What a command leaves on stderr, and its exit code, whatever it meets: readers, terminals, folders, devices."""

import errno
import os
import pathlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from nanovision_jax import cli, convert, errors
from nanovision_jax import config as configs
from nanovision_jax.data import preparation
from nanovision_jax.reporting import family as report
from nanovision_jax.training import loop as train


@pytest.mark.parametrize('unbuffered', ['', '1'])
@pytest.mark.parametrize('lines', [1, 100_000])  # one fits the buffer and is only written at the end
def test_a_reader_that_goes_away_ends_the_command_without_a_word(lines, unbuffered):
    program = f'from nanovision_jax import cli; cli.run(lambda argv: [print("row") for _ in range({lines})])'
    reader, writer = os.pipe()
    os.close(reader)
    env = os.environ | {'PYTHONUNBUFFERED': unbuffered}
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, env=env, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b'')


def test_another_broken_pipe_is_not_hidden():
    program = 'from nanovision_jax import cli\ndef main(argv): raise BrokenPipeError("a worker")\ncli.run(main)'
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert 'BrokenPipeError: a worker' in done.stderr


def command(program, **options):
    """What a program leaves that calls cli.run(main) on its own main(argv)."""
    env = os.environ | options.pop('env', {})
    program = f'from nanovision_jax import cli\n{program}\ncli.run(main)'
    return subprocess.run([sys.executable, '-c', program], cwd=ROOT, env=env, capture_output=True, **options)


@pytest.mark.parametrize(
    ('encoding', 'said'),
    [
        ('ascii', rb'na\xefve 10 \xd7 \u2192 \u4f60 \udce9'),
        ('latin-1', b'na\xefve 10 \xd7 \\u2192 \\u4f60 \\udce9'),
        ('utf-8', 'naïve 10 × → 你 '.encode() + rb'\udce9'),
    ],
)
def test_what_a_terminal_lacks_is_shown_by_its_number(encoding, said):
    text = r'na\xefve 10 \xd7 \u2192 \u4f60 \udce9'
    program = f"""
import sys
from tqdm import tqdm
def main(argv):
    print('{text}')
    bar = tqdm(range(3), '{text}', file=sys.stderr)
    for _ in bar:
        bar.write('{text}', file=sys.stdout)
    from nanovision_jax.errors import UserError
    raise UserError('{text}')
"""
    done = command(program, env={'PYTHONIOENCODING': encoding})
    assert done.returncode == 2 and b'Traceback' not in done.stderr
    assert done.stdout.splitlines() == [said] * 4
    assert done.stderr.splitlines()[-1] == b'error: ' + said and b'100%' in done.stderr


def test_bytes_that_are_no_text_do_not_end_the_reading():
    done = command('def main(argv): print(ascii([*map(str, __import__("sys").stdin)]))', input=b'a\nb\xe9\nc\n')
    assert (done.returncode, done.stdout) == (0, rb"['a\n', 'b\udce9\n', 'c\n']" + b'\n')


@pytest.mark.parametrize(('platform', 'said'), [('cuda', ''), ('tpu', '.*'), ('nonsense', '.*known backends.*')])
def test_a_device_that_is_not_there_is_one_sentence(platform, said):
    env = {'JAX_PLATFORMS': platform, 'CUDA_VISIBLE_DEVICES': '', 'TPU_SKIP_MDS_QUERY': '1'}
    done = command('def main(argv): __import__("jax").numpy.ones(3)', env=env, text=True)
    assert done.returncode == 2
    assert re.fullmatch(f"error: jax finds no device for JAX_PLATFORMS='{platform}'{said}: install .*\n", done.stderr)


def test_another_failure_of_a_program_that_has_its_device_is_not_hidden():
    done = command('import jax\ndef main(argv): raise RuntimeError("a bug")', text=True)
    assert done.returncode == 1 and 'Traceback' in done.stderr and 'RuntimeError: a bug' in done.stderr


def test_what_the_machine_refuses_is_one_sentence():
    for raised, code, said in (
        ('PermissionError(errno.EACCES, "Permission denied", "x.json")', 2, 'x.json: Permission denied.'),
        ('OSError(errno.ENOSPC, "No space left on device")', 1, 'No space left on device.'),
        ('errors.Failure("the disk is full.")', 1, 'the disk is full.'),
        ('errors.Stuck("a file hangs.")', 1, 'a file hangs.'),
    ):
        program = f'import errno\nfrom nanovision_jax import errors\ndef main(argv): raise {raised}'
        done = command(program, text=True)
        assert (done.returncode, done.stderr) == (code, f'error: {said}\n')
    done = command('def main(argv): raise FileNotFoundError(2, "No such file", "x.json")', text=True)
    assert done.returncode == 1 and 'Traceback' in done.stderr


def test_a_folder_is_tried_before_the_work(tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'gone').symlink_to(tmp_path / 'nowhere')
    for folder in (tmp_path, tmp_path / 'new' / 'newer', pathlib.Path('new')):
        errors.check_writable(folder)
    for folder, message in (
        (tmp_path / 'file', f'{tmp_path}/file cannot be a folder: {tmp_path}/file is none.'),
        (tmp_path / 'file' / 'new', f'{tmp_path}/file/new cannot be a folder: {tmp_path}/file is none.'),
        (tmp_path / 'gone' / 'new', f'{tmp_path}/gone/new cannot be a folder: {tmp_path}/gone is none.'),
        ('/proc/new/newer', '/proc/new/newer cannot be written: nothing can be made in /proc ('),
    ):
        with pytest.raises(errors.UserError) as error:
            errors.check_writable(folder)
        assert str(error.value).startswith(message)
    assert sorted(file.name for file in tmp_path.iterdir()) == ['file', 'gone']


@pytest.mark.parametrize('order', [['--run=a', '--run', 'b'], ['--run=a', '--image=x', '--run=a']])
def test_an_option_of_one_value_is_given_once(order):
    parser = cli.Parser()
    parser.add_argument('--run')
    parser.add_argument('--image', action='append')
    with pytest.raises(errors.UserError, match=r'^--run is given 2 times: it takes one value\.$'):
        parser.parse(order)
    assert parser.parse(['--image=x', '--image=y', '--run=--run']).image == ['x', 'y']


def test_every_command_tries_its_folder_before_its_work(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    config = configs.base_config('pretrain', 'tiny')
    config.run_dir = f'{tmp_path}/file/pretrain'
    family = tmp_path / 'family'
    (family / 'clip').mkdir(parents=True)
    (family / 'clip' / 'metrics.jsonl').write_text('{"step": 5, "loss": 2.5}\n')
    for called in (
        lambda: train.train(config),
        lambda: convert.main(['--to=hf', f'--run={tmp_path}/none', f'--output={tmp_path}/file/out']),
        lambda: preparation.prepare('chat', str(tmp_path), f'{tmp_path}/file/data'),
    ):
        with pytest.raises(errors.UserError, match='cannot be a folder'):
            called()
    monkeypatch.setattr(errors.tempfile, 'TemporaryFile', refuse)  # a test may run as root, who may write anywhere
    with pytest.raises(errors.UserError, match=r'family cannot be written: .*\(Read-only file system\)'):
        report.write(family)
    assert [file.name for file in family.iterdir()] == ['clip']


def refuse(dir):
    raise OSError(errno.EROFS, 'Read-only file system')
