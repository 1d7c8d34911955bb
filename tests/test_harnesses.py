"""Others' harnesses against our server, unchanged: their numbers are those of `evaluate` on the same questions.

Each is installed into an environment of its own, which takes minutes, unless LM_EVAL_PYTHON or LMMS_EVAL_PYTHON names
the Python of one that has it.
"""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import micro
import numpy as np
import pytest
from conftest import ROOT, sentence
from PIL import Image

import nanovision_jax
from nanovision_jax.evals.run import evaluate

pytestmark = pytest.mark.slow

VERSIONS = {'lm_eval': ['lm-eval[api]==0.4.13', 'transformers>=5'], 'lmms_eval': ['lmms-eval==0.7.3', 'filelock<4']}
POSITIONS = 250
OFFLINE = {'HF_HUB_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1', 'OPENAI_API_KEY': 'none', 'TQDM_DISABLE': '1'}


def python_with(name, tmp_path_factory):
    """The Python of an environment that has a harness; the test is skipped where there can be none."""
    if given := os.environ.get(f'{name.upper()}_PYTHON'):
        return given
    folder = tmp_path_factory.mktemp(name) / 'venv'
    subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
    python = str(folder / 'bin/python')
    done = subprocess.run([python, '-m', 'pip', 'install', '-q', *VERSIONS[name]], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f'{VERSIONS[name]} cannot be installed here: {done.stderr[-300:]}')
    return python


@pytest.fixture(scope='module')
def lm_eval(tmp_path_factory):
    return python_with('lm_eval', tmp_path_factory)


@pytest.fixture(scope='module')
def lmms_eval(tmp_path_factory):
    return python_with('lmms_eval', tmp_path_factory)


@pytest.fixture(scope='module')
def run_dir(tokenizer, tmp_path_factory):
    """A run that answers and sees, and never learned; it does not say the token of images."""
    cfg = micro.odd_config('vision_instruct', tmp_path_factory.mktemp('runs') / 'see', positions=POSITIONS)
    return micro.run_folder(cfg, tokenizer)


@pytest.fixture(scope='module')
def address(run_dir, tmp_path_factory):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp('server') / 'log'
    command = [sys.executable, '-m', 'nanovision_jax.serve', f'--run={run_dir}', f'--port={port}', '--slots=4']
    with open(log, 'w') as said:
        served = subprocess.Popen([*command, '--images=8'], stdout=said, stderr=said, cwd=ROOT)
    try:
        end, found = time.monotonic() + 300, None
        while found is None:
            assert served.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                found = urllib.request.urlopen(f'http://127.0.0.1:{port}/v1/models').read()
        yield f'http://127.0.0.1:{port}', json.loads(found)['data'][0]['id']
    finally:
        served.terminate()
        served.wait()


def harness(python, module, folder, **options):
    """(the results of a harness's run in a folder, [its samples])."""
    command = [python, '-m', module, '--log_samples', '--output_path', '../out']
    command += [word for name, value in options.items() for word in (f'--{name}', str(value)) if word != 'True']
    done = subprocess.run(command, cwd=folder, env=os.environ | OFFLINE, capture_output=True, text=True)
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-6000:]
    (results,) = (folder / '../out').rglob('*results*.json')
    (samples,) = (folder / '../out').rglob('*samples*.jsonl')
    samples = [json.loads(line) for line in samples.read_text().splitlines()]
    (told,) = json.loads(results.read_text())['results'].values()
    return told, sorted(samples, key=lambda sample: sample['doc_id'])


def write(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / 'mine.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def choices(count=40):
    """Questions with options: of unequal lengths, with signs, and blanks where there may be some."""
    rng, rows = random.Random(0), []
    for number in range(count):
        options = [sentence(rng, 1, 5) + rng.choice(['', '', '!', ' ']) for _ in range(rng.randint(2, 5))]
        context = rng.choice(['', '', ' ', '\n']) + sentence(rng, 3, 40) + rng.choice(['', ' ', '\nAnswer:'])
        rows.append({'id': f'{number}', 'context': context, 'options': options, 'answer': rng.randrange(len(options))})
    rows[0]['context'] = sentence(rng, 150, 150)  # longer than the run's context
    return rows


@pytest.mark.parametrize('tokenizer_of', ['server', 'folder'])
def test_lm_eval_finds_the_same_likelihoods(lm_eval, address, run_dir, tokenizer, tmp_path, tokenizer_of):
    write(tmp_path / 'data', choices())
    url, model = address
    # One token less than the context: lm-eval lets the model say one more.
    settings = f'model={model},base_url={url}/v1/completions,num_concurrent=1,max_retries=1,max_length={POSITIONS}'
    if tokenizer_of == 'folder':
        settings += f',tokenizer_backend=huggingface,tokenizer={run_dir}/tokenizer'
    else:  # lm-eval takes a server's first id, 0, for none
        settings += f',custom_prefix_token_id={tokenizer.end_of_text}'
    told, samples = harness(
        lm_eval, 'lm_eval', tmp_path / 'data', model='local-completions', model_args=settings,
        tasks='choices', include_path=ROOT / 'tests/harnesses', batch_size=8,
    )  # fmt: skip
    found = evaluate(run_dir, 'choices', data=tmp_path / 'data', output=tmp_path / 'ours')
    rows = [json.loads(line) for line in (tmp_path / 'ours/choices-of-data.jsonl').read_text().splitlines()]
    assert len(rows) == len(samples) == found.n == 40
    theirs, ours = [], []
    for row, sample in zip(rows, samples, strict=True):
        assert row['id'] == sample['doc']['id']
        answer = row['likelihood']['answer']
        got = [(float(value), said in (True, 'True')) for ((value, said),) in sample['resps']]
        values = [*answer['sums'], *answer['unconditional']]
        if row['id'] != '0':  # what is too long loses its beginning, here of one token less
            theirs += [value for value, _ in got]
            ours += values
            assert [said for _, said in got[: len(answer['sums'])]] == answer['greedy']
    assert min(theirs) < -10 and max(theirs) < 0  # they are no zeros
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
    shares = {name: told[f'{name},none'] for name in ('acc', 'acc_norm', 'acc_mutual_info')}
    names = ('sum', 'per character', 'against the option alone')
    assert {name: found.metrics[f'accuracy ({ours})'] for name, ours in zip(shares, names, strict=True)} == shares
    assert min(shares.values()) > 0 and len(set(shares.values())) > 1
    print('lm-eval', shares, 'evaluate', {name: found.metrics[f'accuracy ({name})'] for name in names})


def words_of(run_dir, tmp_path, images=False):
    """Questions to be answered in words; every other answer is what the run says."""
    rng, opened, rows = random.Random(1), nanovision_jax.load(run_dir), []
    for number in range(12):
        row = {'id': f'{number}', 'question': sentence(rng) + '?'}
        shown = []
        if images:
            pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), np.uint8)
            shown, row['image'] = [Image.fromarray(pixels)], f'{number}.png'
            shown[0].save(tmp_path / row['image'])
        said = opened.chat(row['question'], images=shown, max_new_tokens=64)
        rows.append(row | {'answer': said if number % 2 else sentence(rng)})
    write(tmp_path, rows)
    return [row['answer'] for row in rows]


def test_lm_eval_finds_the_same_answers(lm_eval, address, run_dir, tmp_path):
    url, model = address
    (tmp_path / 'data').mkdir()
    words_of(run_dir, tmp_path / 'data')
    told, samples = harness(
        lm_eval, 'lm_eval', tmp_path / 'data', model='local-chat-completions', apply_chat_template=True,
        model_args=f'model={model},base_url={url}/v1/chat/completions,num_concurrent=1,max_retries=1',
        tasks='answers', include_path=ROOT / 'tests/harnesses',
    )  # fmt: skip
    found = evaluate(run_dir, 'answers', data=tmp_path / 'data', output=tmp_path / 'ours')
    rows = [json.loads(line) for line in (tmp_path / 'ours/answers-of-data.jsonl').read_text().splitlines()]
    assert [row['generate']['answer'] for row in rows] == [sample['resps'][0][0] for sample in samples]
    assert told['exact_match,none'] == found.metrics['exact match'] == 0.5
    print('lm-eval', told['exact_match,none'], 'evaluate', found.metrics['exact match'])


def test_lmms_eval_finds_the_same_answers_about_images(lmms_eval, address, run_dir, tmp_path):
    url, model = address
    (tmp_path / 'data').mkdir()
    words_of(run_dir, tmp_path / 'data', images=True)
    shutil.copytree(ROOT / 'tests/harnesses/lmms', tmp_path / 'tasks')
    told, samples = harness(
        lmms_eval, 'lmms_eval', tmp_path / 'data', model='openai',
        model_args=f'model_version={model},base_url={url}/v1,api_key=none,timeout=120,num_concurrent=1,max_retries=2',
        tasks='mine', include_path=tmp_path / 'tasks',
    )  # fmt: skip
    found = evaluate(run_dir, 'answers', data=tmp_path / 'data', output=tmp_path / 'ours')
    rows = [json.loads(line) for line in (tmp_path / 'ours/answers-of-data.jsonl').read_text().splitlines()]
    assert 'LMMS_EVAL_REQUEST_FAILED' not in json.dumps(samples)
    assert [row['generate']['answer'] for row in rows] == [sample['filtered_resps'] for sample in samples]
    assert told['exact_match,none'] == found.metrics['exact match'] == 0.5
    assert len({row['generate']['answer'] for row in rows}) > 6 and found.controls['blank']['exact match'] < 0.5
    print('lmms-eval', told['exact_match,none'], 'evaluate', found.metrics['exact match'])
