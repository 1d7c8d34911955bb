"""The server: OpenAI's own client, unmodified, and requests that no client should send."""

import asyncio
import base64
import concurrent.futures
import contextlib
import io
import json
import socket
import threading
import time

import httpx
import micro
import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image

from nanovision_jax import serve
from nanovision_jax.errors import UserError
from nanovision_jax.inference.prompt import text_prompt
from nanovision_jax.inference.run import Run
from nanovision_jax.inference.scheduler import Scheduler
from nanovision_jax.serving import entrance
from nanovision_jax.serving.api import build_app
from nanovision_jax.serving.connection import Connection
from nanovision_jax.serving.guard import Guard, Settings
from nanovision_jax.serving.jobs import Served
from nanovision_jax.serving.protocol import Limits
from nanovision_jax.serving.text import TextStream

LIMITS = Limits(body=200_000, images=3, pixels=10_000, prompts=4, tokens=200, seconds=60)
KEY = 'a secret'


@contextlib.contextmanager
def serving(served, settings):
    """The address of a server in a thread."""
    quick = type('Quick', (Connection,), {'seconds': 1.0})
    config = uvicorn.Config(build_app(served, settings), host='127.0.0.1', port=0, log_level='warning', http=quick)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f'http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}'
    finally:
        server.should_exit = True
        thread.join()


def make_run(stage, tokenizer):
    cfg = micro.odd_config(stage, positions=250)
    graphdef, params = micro.model(cfg, tokenizer)
    head = params.get('decoder', params)['head']
    head['kernel'] = head['kernel'].at[:, tokenizer.image].set(0)
    return Run(cfg, 1, graphdef, params, tokenizer)


@pytest.fixture(scope='module')
def runs(tokenizer):
    return {'see': make_run('vision_instruct', tokenizer), 'text': make_run('pretrain', tokenizer)}


@pytest.fixture(scope='module')
def address(runs):
    served = [Served(run, name, Scheduler(run, slots=4, images=8, waiting=8)) for name, run in runs.items()]
    for one in served:
        assert list(one.scheduler.warm_up())
    with serving(served, Settings(KEY, limits=LIMITS, body_seconds=3.0)) as address:
        yield address


@pytest.fixture(scope='module')
def client(address):
    return openai.OpenAI(base_url=f'{address}/v1', api_key=KEY, max_retries=0)


def picture(seed, size=(30, 40)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(pixels)


def uri(image, kind='PNG'):
    file = io.BytesIO()
    image.save(file, kind)
    return f'data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}'


def asked(text, *images):
    content = [{'type': 'image_url', 'image_url': {'url': uri(one), 'detail': 'low'}} for one in images]
    return {'role': 'user', 'content': [*content, {'type': 'text', 'text': text}]}


TALKS = [
    [{'role': 'user', 'content': 'the dog?'}],
    [asked('what is it?', picture(1))],
    [asked('and these?', picture(1), picture(2))],
    [{'role': 'system', 'content': 'be brief'}, asked('one?', picture(3))],
    [asked('a?', picture(1)), {'role': 'assistant', 'content': 'the cat'}, {'role': 'user', 'content': 'sure?'}],
]


def ours(run, talk, **options):
    """What the library answers to the same conversation."""
    messages, images = [], []
    for message in talk:
        content = message['content']
        if isinstance(content, list):
            images += [part for part in content if part['type'] == 'image_url']
            content = [{'type': 'image'} if part['type'] == 'image_url' else part for part in content]
        messages.append({'role': message['role'], 'content': content})
    opened = [Image.open(io.BytesIO(base64.b64decode(i['image_url']['url'].partition(',')[2]))) for i in images]
    return run.chat(messages, images=opened, **options)


def test_openais_client_gets_the_librarys_answers(client, runs):
    assert [model.id for model in client.models.list()] == ['see', 'text']
    assert client.models.retrieve('text').id == 'text'
    for talk in TALKS:
        found = client.chat.completions.create(model='see', messages=talk, max_tokens=20)
        wanted = ours(runs['see'], talk, max_new_tokens=20)
        assert found.choices[0].message.content == wanted and found.choices[0].finish_reason in ('length', 'stop')
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
        stream = client.chat.completions.create(
            model='see', messages=talk, max_completion_tokens=20, stream=True, stream_options={'include_usage': True}
        )
        chunks = list(stream)
        assert ''.join(c.choices[0].delta.content or '' for c in chunks if c.choices) == wanted
        assert chunks[0].choices[0].delta.role == 'assistant' and chunks[-1].usage == found.usage
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == found.choices[0].finish_reason


def test_sampling_follows_the_seed(client):
    def said(**options):
        made = client.chat.completions.create(model='see', messages=TALKS[0], max_tokens=30, **options)
        return made.choices[0].message.content

    assert said(temperature=1, seed=3) == said(temperature=1, seed=3) != said(temperature=1, seed=4)
    assert said(temperature=1, top_p=1e-9, seed=5) == said()
    assert said(temperature=1, extra_body={'top_k': 1}) == said(extra_body={'min_p': 1.0}) == said()


def test_probabilities_of_a_chat(client, runs):
    found = client.chat.completions.create(model='see', messages=TALKS[1], max_tokens=9, logprobs=True, top_logprobs=3)
    content = found.choices[0].logprobs.content
    assert len(content) == found.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 3 and token.logprob == token.top_logprobs[0].logprob <= 0
        assert bytes(token.bytes).decode() == token.token == token.top_logprobs[0].token
    stream = client.chat.completions.create(
        model='see', messages=TALKS[1], max_tokens=9, logprobs=True, top_logprobs=3, stream=True
    )
    streamed = [one for c in stream if c.choices[0].logprobs for one in c.choices[0].logprobs.content]
    assert streamed == content


def test_a_stop_string_ends_an_answer_before_it(client):
    def said(**options):
        choice = client.chat.completions.create(model='see', messages=TALKS[0], max_tokens=60, **options).choices[0]
        return choice.message.content, choice.finish_reason

    plain, _ = said()
    for start, length in ((3, 1), (10, 4), (5, 9)):
        stop = plain[start : start + length]
        text, why = said(stop=[stop, 'never said'])
        assert text == plain[: plain.index(stop)] and why == 'stop'
        asked = dict(model='see', messages=TALKS[0], max_tokens=60, stop=stop, logprobs=True)
        whole = client.chat.completions.create(**asked)
        tokens = whole.choices[0].logprobs.content
        assert len(tokens) == whole.usage.completion_tokens  # and none behind the one with which the stop was whole
        if '\ufffd' not in stop:  # a part of a character, which waits for the rest of it
            assert stop in ''.join(t.token for t in tokens) and stop not in ''.join(t.token for t in tokens[:-1])
        parts = [c.choices[0].logprobs for c in client.chat.completions.create(**asked, stream=True)]
        assert [t for part in parts if part for t in part.content] == tokens


def test_completions_echo_with_probabilities_as_harnesses_read_them(client, runs, tokenizer):
    ids = text_prompt(tokenizer, 'the cat runs over the').ids.tolist()
    found = client.completions.create(
        model='text', prompt=[ids, ids[:4]], max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
    )
    for choice, prompt in zip(found.choices, (ids, ids[:4]), strict=True):
        logprobs = choice.logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(prompt) + 1
        assert logprobs.token_logprobs[0] is None and all(logprobs.top_logprobs[1:])
        assert all(p <= 0 for p in logprobs.token_logprobs[1:])
        assert ''.join(logprobs.tokens[:-1]) == tokenizer.decode(prompt, special=True)
        assert choice.text.startswith(tokenizer.decode(prompt))
        for text, at in zip(logprobs.tokens, logprobs.text_offset, strict=True):
            assert text in tokenizer.controls or choice.text[at : at + len(text)] == text
        logits = np.asarray(runs['text'].logits([prompt])[0], np.float64)
        logs = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        np.testing.assert_allclose(
            logprobs.token_logprobs[1:-1], [logs[i, t] for i, t in enumerate(prompt[1:])], atol=1e-3
        )
    texts = client.completions.create(model='text', prompt=['the cat', 'a dog'], max_tokens=5)
    for choice, text in zip(texts.choices, ('the cat', 'a dog'), strict=True):
        assert choice.text == ''.join(runs['text'].continue_text(text, max_new_tokens=5))
    none = client.completions.create(model='text', prompt='the cat', max_tokens=0, logprobs=2, echo=True)
    assert none.choices[0].text == 'the cat' and none.usage.completion_tokens == 0
    assert len(none.choices[0].logprobs.tokens) == none.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match='echo is not supported in a stream'):
        client.completions.create(model='text', prompt='the cat', echo=True, stream=True)
    streamed = client.completions.create(model='text', prompt='the cat', max_tokens=5, stream=True)
    assert ''.join(chunk.choices[0].text for chunk in streamed) == texts.choices[0].text
    asked = dict(model='text', prompt='the cat', max_tokens=40, logprobs=1)
    offsets = client.completions.create(**asked).choices[0].logprobs.text_offset
    parts = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
    assert [at for part in parts if part for at in part.text_offset] == offsets and len(offsets) == 40


def test_tokens_there_and_back(address, tokenizer):
    with httpx.Client(base_url=address, headers={'authorization': f'Bearer {KEY}'}) as web:
        told = web.post('/tokenize', json={'model': 'text', 'prompt': 'the cat'}).json()
        for leading in (True, False):
            broken = {'model': 'text', 'prompt': 'a\ud800', 'add_special_tokens': leading}
            said = web.post('/tokenize', content=json.dumps(broken))
            assert said.status_code == 400 and 'not Unicode' in said.json()['error']['message']
        assert told['tokens'] == text_prompt(tokenizer, 'the cat').ids.tolist() and told['count'] == len(told['tokens'])
        back = web.post('/detokenize', json={'model': 'text', 'tokens': told['tokens']}).json()
        assert back['prompt'] == '<|endoftext|>the cat'

        def piece(text):
            asked = {'model': 'text', 'prompt': text, 'add_special_tokens': False}
            return web.post('/tokenize', json=asked).json()['tokens']

        assert tokenizer.decode(piece(' the cat ')) == ' the cat ' and piece('the cat') == told['tokens'][1:]
        assert piece('<|endoftext|>') == [tokenizer.end_of_text] and piece('<|end|>') == [tokenizer.end]
        assert len(piece('a <|end|>')) > 4 and tokenizer.end not in piece('a <|end|>')  # text is text
        talk = web.post('/tokenize', json={'model': 'see', 'messages': TALKS[0]}).json()['tokens']
        assert tokenizer.decode(talk, special=True).endswith('<|assistant|>')
        told = web.get('/tokenizer_info').json()
        assert told['eos_token'] == '<|end|>' and told['bos_token'] == '<|endoftext|>' and told['chat_template']


def test_what_cannot_be_served_is_named(client, address):
    def refused(**options):
        with pytest.raises(openai.APIStatusError) as error:
            client.chat.completions.create(**{'model': 'see', 'messages': TALKS[0], 'max_tokens': 3} | options)
        return error.value.status_code, error.value.body['param'], error.value.body['message']

    tool = {'type': 'function', 'function': {'name': 'f', 'parameters': {}}}
    for options, field in (
        ({'n': 2}, 'n'),
        ({'tools': [tool]}, 'tools'),
        ({'logit_bias': {'3': 1}}, 'logit_bias'),
        ({'presence_penalty': 1}, 'presence_penalty'),
        ({'temperature': 3}, 'temperature'),
        ({'top_p': 'x'}, 'top_p'),
        ({'max_tokens': 0}, 'max_tokens'),
        ({'max_tokens': 201}, 'max_tokens'),
        ({'max_completion_tokens': 10**9}, 'max_completion_tokens'),
        ({'top_logprobs': 3}, 'top_logprobs'),
        ({'logprobs': True, 'top_logprobs': 21}, 'top_logprobs'),
        ({'stop': ['']}, 'stop'),
        ({'messages': []}, 'messages'),
        ({'messages': [{'role': 'tool', 'content': 'x', 'tool_call_id': '1'}]}, 'messages'),
        ({'messages': [{'role': 'assistant', 'content': 'x'}]}, 'messages'),
        ({'messages': [{'role': 'user', 'content': 'word ' * 600}]}, 'messages'),
        ({'messages': [{'role': 'user', 'content': [{'type': 'input_audio', 'input_audio': {}}]}]}, 'messages'),
        ({'messages': [asked('too many', *[picture(1)] * 4)]}, 'messages'),
        ({'messages': [asked('too large', picture(1, (101, 100)))]}, 'messages'),
        ({'seed': 1.5}, 'seed'),
    ):
        status, param, message = refused(**options)
        assert (status, param) == (400, field) and message.count('\n') == 0, options
    assert refused(model='other')[0] == 404
    assert refused(model='text')[0] == 400
    with httpx.Client(base_url=address, headers={'authorization': f'Bearer {KEY}'}) as web:
        body = {
            'model': 'see',
            'messages': TALKS[0],
            'max_tokens': 3,
            'user': 'me',
            'zest': 1,
            'reasoning_effort': 'low',
        }
        answer = web.post('/v1/chat/completions', json=body)
        assert answer.status_code == 200 and answer.headers['x-ignored-fields'] == 'reasoning_effort, zest'
        nothing = web.post('/v1/embeddings', json={})
        assert nothing.status_code == 404 and 'embeddings' in nothing.json()['error']['message']


def test_answers_are_held_to_a_schema_or_to_choices(client, runs):
    shape = {'type': 'string', 'enum': ['circle', 'square', 'the "odd" one']}
    properties = {'shape': shape, 'count': {'type': 'integer', 'minimum': 0, 'maximum': 99}}
    schema = {'type': 'object', 'properties': properties, 'required': ['shape', 'count'], 'additionalProperties': False}
    wanted = {'type': 'json_schema', 'json_schema': {'name': 'thing', 'schema': schema}}

    def said(**options):
        made = client.chat.completions.create(model='see', messages=TALKS[1], max_tokens=100, **options)
        return made.choices[0]

    found = set()
    for seed in range(4):
        answer = said(response_format=wanted, temperature=1, seed=seed)
        told = json.loads(answer.message.content)
        assert set(told) == {'shape', 'count'} and told['shape'] in shape['enum'] and 0 <= told['count'] <= 99
        assert answer.finish_reason == 'stop'
        found.add(answer.message.content)
    assert len(found) > 1
    choices = ['Yes.', 'No.', 'I "cannot" tell']
    assert {said(extra_body={'choice': choices}, temperature=1, seed=s).message.content for s in range(9)} <= set(
        choices
    )
    assert isinstance(
        json.loads(said(response_format={'type': 'json_object'}, stop=['zzz']).message.content or '{}'), dict
    )
    for wrong in (
        {'type': 'xml'},
        {'type': 'json_schema'},
        {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': {'type': 'nothing'}}},
    ):
        with pytest.raises(openai.BadRequestError, match='response_format'):
            said(response_format=wrong)


HOSTILE = [
    'file:///etc/passwd',
    'http://169.254.169.254/latest',
    'https://example.org/a.png',
    '/etc/passwd',
    'data:,x',
    '',
]


def test_images_come_as_data_alone_and_no_socket_is_opened(client, monkeypatch):
    opened = []
    connect = socket.socket.connect
    here = threading.get_ident()
    monkeypatch.setattr(
        socket.socket,
        'connect',
        lambda self, to: (threading.get_ident() != here and opened.append(to)) or connect(self, to),
    )
    for address in [*HOSTILE, 'data:image/png;base64,????', f'data:image/png;base64,{"A" * 50}']:
        content = [{'type': 'image_url', 'image_url': {'url': address}}, {'type': 'text', 'text': 'a?'}]
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model='see', messages=[{'role': 'user', 'content': content}])
    assert not opened


def test_the_server_is_closed(address):
    def status(path='/v1/models', **headers):
        return httpx.get(address + path, headers=headers).status_code

    good = f'Bearer {KEY}'
    assert status() == status(authorization='Bearer other') == status(authorization=KEY) == 401
    assert status(authorization=good) == 200 and status('/health') == 200
    assert status(authorization=good, host='evil.example') == 403
    assert status(authorization=good, host='localhost:99') == 200
    assert status(authorization=good, origin='https://evil.example') == 403
    assert status(authorization=good, origin='http://localhost:3000') == 200
    assert status('/docs', authorization=good) == status('/openapi.json', authorization=good) == 404


def test_bodies_have_limits(address):
    port = int(address.rpartition(':')[2])
    start = f'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n'

    def sent(*parts, pause=0.0):
        with socket.create_connection(('127.0.0.1', port)) as line:
            line.settimeout(10)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for part in parts:
                    line.sendall(part)
                    time.sleep(pause)
            return int(line.recv(1000).split()[1])

    assert sent(f'{start}Content-Length: 1000000000\r\n\r\n'.encode()) == 413
    chunk = b'%x\r\n%s\r\n' % (1 << 16, b' ' * (1 << 16))
    assert sent(f'{start}Transfer-Encoding: chunked\r\n\r\n'.encode(), *[chunk] * 8) == 413
    assert sent(f'{start}Content-Length: 100\r\n\r\n'.encode(), b'{', b'"', pause=0.2) == 408
    web = httpx.Client(base_url=address, headers={'authorization': f'Bearer {KEY}'})
    for body in (
        b'[' * 10_000,
        b'{"a":' * 10_000,
        b'',
        b'[]',
        b'{',
        b'\xff\xfe',
        b'{"model": "text", "prompt": 1e999}',
        b'null',
        b'"x"',
    ):
        assert web.post('/v1/completions', content=body).status_code == 400, body[:20]
    web.close()


def test_heads_that_take_long_are_cut_off(address):
    port = int(address.rpartition(':')[2])
    head = b'GET /health HTTP/1.1\r\nHost: localhost\r\n'

    def heard(*parts):
        """All that comes back until the server closes, or None if it stays open for three seconds."""
        with socket.create_connection(('127.0.0.1', port)) as line:
            line.settimeout(3)
            found = b''
            for part in parts:
                line.sendall(part)
                if part.endswith(b'\r\n\r\n'):
                    found += line.recv(1000)
            try:
                while more := line.recv(1000):
                    found += more
            except TimeoutError:
                return None
            return found

    assert heard().startswith(b'HTTP/1.1 408')  # a connection that says nothing
    assert heard(head[:30]).startswith(b'HTTP/1.1 408')
    again = heard(head + b'\r\n', head[:30])  # and one whose second request does not come
    assert again.startswith(b'HTTP/1.1 200') and b'HTTP/1.1 408' in again
    assert httpx.get(f'{address}/health').status_code == 200


def test_random_bodies_are_mistakes_and_no_failures(address):
    rng = np.random.default_rng(0)
    atoms = [None, True, 0, -1, 1e308, 'x', '', [], {}, [[]], [1, 'a'], {'type': 'x'}, 'a' * 1000, -(2**70), [None]]
    names = [
        'model',
        'messages',
        'prompt',
        'max_tokens',
        'temperature',
        'stop',
        'stream_options',
        'response_format',
        'n',
        'logprobs',
        'seed',
        'echo',
        'top_logprobs',
        'tools',
    ]
    good = {'model': 'see', 'messages': TALKS[0], 'prompt': 'a', 'max_tokens': 1}
    with httpx.Client(base_url=address, headers={'authorization': f'Bearer {KEY}'}, timeout=60) as web:
        for number in range(500):
            body = dict(good) | {str(n): atoms[rng.integers(len(atoms))] for n in rng.choice(names, rng.integers(1, 4))}
            path = ('/v1/chat/completions', '/v1/completions', '/tokenize', '/detokenize')[number % 4]
            assert web.post(path, json=body).status_code in (200, 400, 404), body
        data = base64.b64decode(uri(picture(1), 'JPEG').partition(',')[2])
        for _ in range(200):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), rng.integers(1, 20)):
                damaged[place] = rng.integers(256)
            address = f'data:image/jpeg;base64,{base64.b64encode(damaged[: rng.integers(1, len(data))]).decode()}'
            content = [{'type': 'image_url', 'image_url': {'url': address}}]
            body = {'model': 'see', 'messages': [{'role': 'user', 'content': content}], 'max_tokens': 1}
            assert web.post('/v1/chat/completions', json=body).status_code in (200, 400)
        assert web.get('/health').status_code == 200


def test_many_clients_get_their_own_answers_and_a_flood_is_told_to_wait(client, runs, address):
    texts = [f'the {i} dog{"s" * (i % 3)} run?' for i in range(12)]
    talks = [
        [asked(text, picture(i))] if i % 3 == 0 else [{'role': 'user', 'content': text}] for i, text in enumerate(texts)
    ]
    wanted = [ours(runs['see'], talk, max_new_tokens=10 + 5 * (i % 4)) for i, talk in enumerate(talks)]

    def one(i):
        made = client.chat.completions.create(model='see', messages=talks[i], max_tokens=10 + 5 * (i % 4))
        return made.choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # as many as may wait
        assert list(pool.map(one, range(12))) == wanted

    def flood(i):
        try:
            client.chat.completions.create(model='see', messages=talks[i % 12], max_tokens=100)
            return 200
        except openai.RateLimitError as error:
            assert error.response.headers['retry-after']
            return 429

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        assert set(pool.map(flood, range(60))) == {200, 429}
    assert one(3) == wanted[3]


def test_a_client_that_leaves_frees_its_slot(client, address):
    def running():
        text = httpx.get(f'{address}/metrics', headers={'authorization': f'Bearer {KEY}'}).text
        return float(
            next(line.split()[1] for line in text.splitlines() if line.startswith('nanovision_running{model="see"}'))
        )

    stream = client.chat.completions.create(model='see', messages=TALKS[0], max_tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    with contextlib.suppress(openai.APITimeoutError):
        client.with_options(timeout=0.02).chat.completions.create(model='see', messages=TALKS[1], max_tokens=200)
    for _ in range(500):
        if running() == 0:
            return
        time.sleep(0.02)
    raise AssertionError('still running')


def test_the_command_is_closed_unless_told(monkeypatch):
    monkeypatch.delenv('NANOVISION_API_KEY', raising=False)
    with socket.create_server(('127.0.0.1', 0)) as other:
        free = f'--port={other.getsockname()[1]}'
    for argv, said in (
        (['--host=0.0.0.0'], 'is open to others'),
        (['--slots=0'], '--slots takes a number above 0'),
        (['--port=x'], 'port'),
        (['--port=70000'], 'from 1 to 65535'),
        (['--queues=3'], "Did you mean '--queue'"),
        ([free], 'no run folder'),
        ([free, '--host=0.0.0.0', '--api-key=k'], 'no run folder'),  # it would be opened then
        ([free, '--host=0.0.0.0', '--public'], 'no run folder'),
    ):
        with pytest.raises(UserError, match=said):
            serve.main(['--run=/nowhere/at/all', *argv])


def test_a_port_that_is_taken_is_said_before_anything_is_loaded():
    with socket.create_server(('127.0.0.1', 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f'--host=127.0.0.1 --port={port} cannot be listened at: Address already'):
            serve.main(['--run=/nowhere/at/all', f'--port={port}'])
    with pytest.raises(UserError, match=r'--host=a\.\.b --port=8000 cannot be listened at'):
        serve.main(['--run=/nowhere/at/all', '--host=a..b', '--api-key=k'])


def test_streamed_text_is_whole_characters_and_never_a_stop(tokenizer):
    said = 'The 🦔 and the 日本 über\n naïve — fine'
    ids = list(tokenizer.encode(said))
    for size in (1, 2, 5):
        stream = TextStream(tokenizer)
        pieces = [stream.push(ids[i : i + size], i + size >= len(ids)) for i in range(0, len(ids), size)]
        assert ''.join(pieces) == said and not any('\ufffd' in piece for piece in pieces)
        for stop in ('日', 'e 🦔 a', 'fine', ' naïve — fin', 'T'):
            stream, text = TextStream(tokenizer, ['zzz', stop]), ''
            for i in range(0, len(ids), size):
                text += stream.push(ids[i : i + size], i + size >= len(ids))
                assert said[: said.index(stop)].startswith(text)
            assert text == said[: said.index(stop)] and stream.stopped == stop
    stream = TextStream(tokenizer, ['fines'])
    assert stream.push(ids) + stream.push([], last=True) == said


def test_pictures_are_small_and_so_is_their_sum():
    async def app(scope, receive, send):
        await send({'type': 'http.response.start', 'status': 200, 'headers': []})
        await send({'type': 'http.response.body', 'body': (await receive())['body']})

    async def sent(client, size, kind='multipart/x'):
        reply = await client.post('/gradio_api/upload', content=b'x' * size, headers={'content-type': kind})
        return reply.status_code

    async def statuses():
        transport = httpx.ASGITransport(Guard(app, Settings(page=True, uploads=1000)))
        async with httpx.AsyncClient(transport=transport, base_url='http://localhost') as client:
            found = [await sent(client, 600), await sent(client, 500, 'Multipart/Form-Data'), await sent(client, 400)]
            found.append(await sent(client, 1, ' MULTIPART/X'))
            return found, (await client.post('/gradio_api/queue/join', json={})).status_code

    assert asyncio.run(statuses()) == ([200, 429, 200, 429], 200)


def test_the_guard_sees_what_comes_after_it():
    """Of two headers of a name one is looked at here, and the other there. Routes that no page needs are closed."""

    async def app(scope, receive, send):
        await send({'type': 'http.response.start', 'status': 200, 'headers': []})
        await send({'type': 'http.response.body', 'body': b''})

    async def replies():
        transport = httpx.ASGITransport(Guard(app, Settings(page=True)))
        async with httpx.AsyncClient(transport=transport, base_url='http://localhost') as client:
            twice = [('Content-Type', 'application/json'), ('content-type', 'multipart/x')]
            address = b'{"path": "http://127.0.0.1:1/x", "meta": {"_type": "gradio.FileData"}}'
            posted = [('queue/join', twice), ('queue/join', twice[:1]), ('process_recording', twice[1:])]
            found = [
                await client.post(f'/gradio_api/{path}', content=address, headers=headers) for path, headers in posted
            ]
            found += [await client.get(f'/gradio_api/{path}') for path in ('deep_link', 'info')]
            return [reply.status_code for reply in found]

    assert asyncio.run(replies()) == [400, 400, 404, 404, 200]


def test_the_key_is_seen_among_the_cookies_of_other_programs():
    given = entrance.cookie('k', secure=False).partition(';')[0].encode()
    for others in (b'', b'g={"theme":"dark"}; ', b'x; path=/; ', b'name=\xe4; ', b'nanovision_jax=old; '):
        assert entrance.is_known(others + given, 'k') and entrance.is_known(given + b'; ' + others, 'k')
        assert not entrance.is_known(others + given, 'other') and not entrance.is_known(others, 'k')
