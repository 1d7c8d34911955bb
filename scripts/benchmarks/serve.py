"""Times the server: first token, tokens/s per client and in total, at several numbers of clients.

    python scripts/benchmarks/serve.py --run=runs/tiny/vision_instruct [--clients=1,4,16,64] [--requests=8]
    python scripts/benchmarks/serve.py --run=runs/tiny/vision_instruct --peer=transformers

Every client asks --requests questions, one after the other, and streams the answers; every second one shows a picture
of its own, where the model sees. --peer serves the same weights by `transformers serve`, which takes
pip install 'transformers[serving]' torch torchvision; the servers run in turn, TURNS times each. Tokens are counted by
the run's own tokenizer on both sides. The clients share the machine with the server.

Prints one JSON object. Of each number of clients: first_token_ms (median), tokens_per_second (of a client, after its
first token; median), total_tokens_per_second (all by all the time), requests_per_second. same_answers: the share of
answers in which both sides say the same.
"""

import asyncio
import base64
import contextlib
import io
import json
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import httpx
import jax
import numpy as np
import train

from nanovision_jax.config import parse_value
from nanovision_jax.errors import UserError

TURNS = 2
QUESTIONS = (
    'Tell me what you can see.',
    'How many things are there?',
    'Describe the picture.',
    'What is in the centre?',
)


def body(model, client, number, sees):
    """A request."""
    content = [{'type': 'text', 'text': QUESTIONS[(client + number) % len(QUESTIONS)]}]
    if sees and (client + number) % 2 == 0:
        from PIL import Image

        file = io.BytesIO()
        pixels = np.random.default_rng((client, number)).integers(0, 256, (60, 60, 3), np.uint8)
        Image.fromarray(pixels).save(file, 'PNG')
        url = f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'
        content.insert(0, {'type': 'image_url', 'image_url': {'url': url}})
    options = {'max_tokens': 64, 'temperature': 0, 'stream': True}
    return {'model': model, 'messages': [{'role': 'user', 'content': content}]} | options


async def asked(web, request):
    """(seconds to the first text, seconds in all, the answer) of one request."""
    began, first, text = time.perf_counter(), None, ''
    async with web.stream('POST', '/v1/chat/completions', json=request) as stream:
        if stream.status_code != 200:
            raise UserError(f'the server answered {stream.status_code}: {(await stream.aread())[:200]!r}.')
        async for line in stream.aiter_lines():
            if not line.startswith('data: {'):
                continue
            for choice in json.loads(line[6:])['choices']:
                if said := choice['delta'].get('content'):
                    first = first or time.perf_counter() - began
                    text += said
    whole = time.perf_counter() - began
    return first or whole, whole, text


async def load(address, model, clients, requests, sees, tokens_of):
    """(the figures of so many clients at once, their answers)."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as web:

        async def client(number):
            return [await asked(web, body(model, number, i, sees)) for i in range(requests)]

        began = time.perf_counter()
        found = [one for some in await asyncio.gather(*map(client, range(clients))) for one in some]
        seconds = time.perf_counter() - began
    answers = [text for _, _, text in found]
    counts = list(map(tokens_of, answers))
    timed = zip(found, counts, strict=True)
    speeds = [(n - 1) / (whole - first) for (first, whole, _), n in timed if n > 1 and whole > first]
    figures = {
        'first_token_ms': round(1e3 * statistics.median(first for first, _, _ in found), 1),
        'tokens_per_second': round(statistics.median(speeds)) if speeds else None,
        'total_tokens_per_second': round(sum(counts) / seconds),
        'requests_per_second': round(len(found) / seconds, 2),
    }
    return figures, answers


@contextlib.contextmanager
def serving(*command, port):
    """A server in a process of its own, once it answers."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            address = f'http://127.0.0.1:{port}'
            while process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f'{address}/health').status_code == 200:
                        break
                time.sleep(0.2)
            else:
                log.seek(0)
                raise UserError(f'{command[0]} ended: {log.read()[-500:].decode(errors="replace")}')
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def free_port():
    """A port that nobody listens on."""
    with socket.create_server(('127.0.0.1', 0)) as line:
        return line.getsockname()[1]


def main(argv):
    """The command: see the module's docstring."""
    given = dict(arg.removeprefix('--').partition('=')[::2] for arg in argv)
    run, peer = given.pop('run', None), given.pop('peer', None)
    numbers = [parse_value('--clients', int, n) for n in given.pop('clients', '1,4,16,64').split(',')]
    requests = parse_value('--requests', int, given.pop('requests', '8'))
    if given or not run or peer not in (None, 'transformers') or min(numbers) < 1 or requests < 1:
        raise UserError('serve.py takes --run=DIR, --clients=N,…, --requests=N and --peer=transformers.')
    from nanovision_jax.data.tokenizer import Tokenizer
    from nanovision_jax.runs import config_file
    from nanovision_jax.runs.folder import Paths
    from nanovision_jax.stages import stage_of

    config, tokenizer = config_file.read(pathlib.Path(run)), Tokenizer(Paths(run).tokenizer)
    sees = stage_of(config).sees
    turns, answers = {'ours': [], **({'transformers': []} if peer else {})}, {}
    with tempfile.TemporaryDirectory() as folder:
        if peer:
            train.process('-m', 'nanovision_jax.convert', '--to=hf', f'--run={run}', f'--output={folder}/exported')
        for _ in range(TURNS if peer else 1):
            for side, found in turns.items():
                port = free_port()
                if side == 'ours':
                    command = [
                        sys.executable,
                        '-m',
                        'nanovision_jax.serve',
                        f'--run={run}',
                        f'--port={port}',
                        '--slots=16',
                    ]
                    model = f'{config.name}/{config.stage}'
                else:
                    model = f'{folder}/exported'
                    program = str(pathlib.Path(sys.executable).with_name('transformers'))
                    command = [program, 'serve', model, f'--port={port}', '--host=127.0.0.1', '--device=cpu']
                with serving(*command, port=port) as address:
                    asyncio.run(load(address, model, 2, 2, sees, len))  # warm
                    figures, answers[side] = {}, []
                    for n in numbers:
                        count = lambda text: len(tokenizer.encode(text))  # noqa: E731
                        figures[n], said = asyncio.run(load(address, model, n, requests, sees, count))
                        answers[side] += said
                        print(f'{side}, {n} clients: {figures[n]}', file=sys.stderr)
                    found.append(figures)
    told = {
        side: {n: {k: statistics.median(f[n][k] for f in found) for k in found[0][n]} for n in numbers}
        for side, found in turns.items()
    }
    if peer:
        us, them = told['ours'], told['transformers']
        told['ratio'] = {
            n: round(us[n]['total_tokens_per_second'] / them[n]['total_tokens_per_second'], 2) for n in numbers
        }
        pairs = list(zip(answers['ours'], answers['transformers'], strict=True))
        told['same_answers'] = round(sum(a.strip() == b.strip() for a, b in pairs) / len(pairs), 3)
    told |= {'requests_a_client': requests, 'cores': os.cpu_count(), 'versions': {'jax': jax.__version__}}
    print(json.dumps(told))


if __name__ == '__main__':
    train.command(main)
