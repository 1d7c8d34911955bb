"""The server as a process of its own, at size tiny, under a load: slow."""

import asyncio
import base64
import contextlib
import io
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import httpx
import micro
import numpy as np
import openai
import pytest
from conftest import ROOT, WORDS, parse, sentence
from PIL import Image

CLIENTS, REQUESTS = 64, 1000


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory, tokenizer):
    """A run of size tiny that never learned: its answers are long, and no two alike."""
    cfg = parse('vision_instruct', f'run_dir={tmp_path_factory.mktemp("runs") / "tiny" / "vision_instruct"}')
    return micro.run_folder(cfg, tokenizer)


@contextlib.contextmanager
def server(run_folder, cache, *options):
    """(process, address) of the command, once it answers. Its log is this test's."""
    with socket.create_server(('127.0.0.1', 0)) as line:
        port = line.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if name not in ('XLA_FLAGS', 'NANOVISION_API_KEY')}
    command = [sys.executable, '-m', 'nanovision_jax.serve', f'--run={run_folder}', f'--port={port}', *options]
    process = subprocess.Popen(command, cwd=ROOT, env=env | {'NANOVISION_CACHE': str(cache)})
    address = f'http://127.0.0.1:{port}'
    try:
        for _ in range(1200):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f'{address}/health').status_code == 200:
                    break
            assert process.poll() is None
            time.sleep(0.1)
        yield process, address
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


def picture(number):
    file, rng = io.BytesIO(), np.random.default_rng(number)
    pixels = rng.integers(0, 256, (int(rng.integers(20, 200)), int(rng.integers(20, 200)), 3), np.uint8)
    Image.fromarray(pixels).save(file, 'PNG' if number % 2 else 'JPEG')
    return f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'


def request(number):
    """Request `number` of a thousand: a third with one or two pictures, a third sampled, some with a conversation."""
    words = random.Random(number)
    content = [{'type': 'text', 'text': sentence(words, 3, 30)}]
    if number % 3 == 0:
        pictures = [words.randrange(150) for _ in range(words.choice((1, 1, 2)))]  # some are asked about again
        content[:0] = [{'type': 'image_url', 'image_url': {'url': picture(n)}} for n in pictures]
    messages = [{'role': 'user', 'content': content}]
    if words.random() < 0.3:
        answer, further = sentence(words), words.choice(WORDS)
        messages += [{'role': 'assistant', 'content': answer}, {'role': 'user', 'content': further}]
    if words.random() < 0.3:
        messages.insert(0, {'role': 'system', 'content': 'a dog sees the red house . ' * 25})
    sampled = {'temperature': 1.0, 'top_p': 0.9} if words.random() < 1 / 3 else {}
    return dict(messages=messages, max_tokens=words.choice((1, 4, 16, 40)), seed=number, **sampled)


def resident(process):
    """Bytes of memory that a process has."""
    pages = int(pathlib.Path(f'/proc/{process.pid}/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE')


async def answers(address, numbers, clients, after=lambda done: None, leaving=()):
    """{number: answer} of requests, so many at once. Those in `leaving` are left after the first words."""
    found, waiting = {}, list(numbers)
    async with openai.AsyncOpenAI(base_url=f'{address}/v1', api_key='none', max_retries=0, timeout=600) as client:

        async def one(number):
            streams = number in leaving or number % 2
            made = await client.chat.completions.create(
                model='tiny/vision_instruct', stream=bool(streams), **request(number)
            )
            if not streams:
                return made.choices[0].message.content
            text = ''
            async for chunk in made:
                text += chunk.choices[0].delta.content or ''
                if number in leaving and text:
                    await made.close()
                    return None
            return text

        async def work():
            while waiting:
                number = waiting.pop()
                found[number] = await one(number)
                after(len(found))

        await asyncio.gather(*(work() for _ in range(clients)))
    return found


def told(address, name):
    """A figure of /metrics, over all labels."""
    lines = httpx.get(f'{address}/metrics').text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f'nanovision_{name}'))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='what memory a process has is read from /proc')
def test_a_thousand_requests_of_64_clients(run_folder, cache):
    """None is lost or mixed up, a tenth leave, and memory stays what it is."""
    numbers = list(range(REQUESTS))
    with server(run_folder, cache) as (_, address):
        alone = asyncio.run(answers(address, numbers, 1))
    random.Random(0).shuffle(numbers)
    leaving, memory = set(numbers[::10]), {}
    with server(run_folder, cache) as (process, address):

        def after(done):
            memory[done] = resident(process)

        found = asyncio.run(answers(address, numbers, CLIENTS, after, leaving))
        for _ in range(100):
            if not told(address, 'running'):
                break
            time.sleep(0.1)
        assert told(address, 'running') == told(address, 'waiting') == 0
        assert told(address, 'requests_total') == REQUESTS and told(address, 'prompt_tokens_shared_total') > 0
    # Medians of 20 requests: what a few requests take together comes and goes.
    early, late = (np.median([memory[n] for n in range(stop - 19, stop + 1)]) for stop in (100, REQUESTS))
    print(f'memory after 100 requests {early / 2**20:.0f} MiB, after all {late / 2**20:.0f} MiB')
    assert len(set(alone.values())) > REQUESTS / 2  # answers differ, so that one mixed up would be seen
    wrong = [number for number in numbers if number not in leaving and found[number] != alone[number]]
    assert sorted(found) == sorted(numbers) and not wrong
    assert abs(late / early - 1) < 0.05


@pytest.mark.slow
def test_sigterm_lets_what_runs_end(run_folder, cache):
    with server(run_folder, cache) as (process, address):
        web = httpx.AsyncClient(base_url=address, timeout=120)

        async def one(number):
            body = request(number) | {'max_tokens': 200}
            try:
                return (await web.post('/v1/chat/completions', json=body)).status_code
            except httpx.TransportError:
                return 'refused'

        async def load():
            asked = [asyncio.ensure_future(one(number)) for number in range(24)]
            while told(address, 'running') < 16:
                await asyncio.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.5)
            late = await one(24)
            return late, await asyncio.gather(*asked)

        late, statuses = asyncio.run(load())
        assert statuses == [200] * 24 and late == 'refused'
        assert process.wait(60) in (0, -signal.SIGTERM)
