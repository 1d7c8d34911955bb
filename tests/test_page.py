"""The page for browsers, in Chromium: a key, pictures, answers, where the model looks, and nothing from elsewhere."""

import base64
import contextlib
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import urllib.parse

import httpx
import micro
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from processes import until

from nanovision_jax.data.tokenizer import Tokenizer

playwright = pytest.importorskip('playwright.sync_api')
pytest.importorskip('gradio')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='there is no Chromium: apt-get install chromium')
KEY, QUESTION = 'a secret, with "quotes"', 'the cat sees a red house?'
STAGES = ('pretrain', 'sft', 'vision_pretrain', 'vision_instruct')


@pytest.fixture(scope='module')
def family(tiny_family, tmp_path_factory):
    """All stages of models that never learned, and that never end an answer."""
    folder = micro.family(tmp_path_factory.mktemp('page') / 'x', tiny_family)
    tokenizer, model = Tokenizer(folder / 'tokenizer'), micro.model

    def talkative(cfg, *args):
        graphdef, params = model(cfg, *args)
        head = params.get('decoder', params)['head']
        silent = [*tokenizer.special, *tokenizer.stops]
        head['kernel'] = head['kernel'].at[:, np.array(silent)].set(0)
        return graphdef, params

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro, 'model', talkative)
        for stage in STAGES:
            cfg = micro.run_config(stage, folder)
            cfg.model.positions, cfg.name = 512, 'x'
            if stage == 'vision_instruct':  # so slow that it can be stopped
                cfg.model.layers, cfg.model.width, cfg.model.ffn = 8, 256, 1024
            micro.run_folder(cfg, tokenizer)
    return folder


@pytest.fixture(scope='module')
def address(family, tmp_path_factory):
    """The address of the command, which serves them with a page and a key."""
    with socket.create_server(('127.0.0.1', 0)) as line:
        port = line.getsockname()[1]
    command = [sys.executable, '-m', 'nanovision_jax.serve', f'--run={family}', f'--port={port}', '--page', '--slots=2']
    env = os.environ | {'NANOVISION_API_KEY': KEY}
    log = tmp_path_factory.mktemp('log') / 'log'
    with open(log, 'w') as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file)
    try:
        found = f'http://127.0.0.1:{port}'
        until(lambda: process.poll() is not None or answers(f'{found}/health'), 180)
        assert process.poll() is None, log.read_text()
        yield found
        process.terminate()
        process.wait(60)
        assert 'Traceback' not in log.read_text(), log.read_text()
    finally:
        process.kill()
        process.wait()


def answers(url):
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).status_code == 200
    return False


@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, address):
    """A function that opens the page, with the key given. No request goes to another host, and none fails."""
    with contextlib.ExitStack() as stack:
        wrong = []

        def visit(width=1280, key=KEY):
            context = browser.new_context(viewport={'width': width, 'height': 900}, color_scheme='light')
            stack.callback(context.close)
            page = context.new_page()
            page.on('request', lambda request: is_ours(request.url, address) or wrong.append(request.url))
            page.on('response', lambda found: found.status >= 500 and wrong.append((found.status, found.url)))
            page.on('pageerror', lambda error: wrong.append(str(error)))
            page.goto(address)
            if key:
                page.get_by_label('key').fill(key)
                page.get_by_role('button', name='Enter').click()
                page.get_by_role('tab', name='Talk').wait_for()
            return page

        yield visit
        assert not wrong


def is_ours(url, address):
    return urllib.parse.urlsplit(url).scheme in ('data', 'blob') or url.startswith(f'{address}/')


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp('picture') / 'some.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(file)
    return file


def ask_api(address, picture, most=64):
    uri = f'data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}'
    content = [{'type': 'image_url', 'image_url': {'url': uri}}, {'type': 'text', 'text': QUESTION}]
    body = {'model': 'x/vision_instruct', 'messages': [{'role': 'user', 'content': content}], 'max_tokens': most}
    reply = httpx.post(
        f'{address}/v1/chat/completions', json=body, headers={'Authorization': f'Bearer {KEY}'}, timeout=60
    )
    return reply.json()['choices'][0]['message']['content']


def running(address):
    text = httpx.get(f'{address}/metrics', headers={'Authorization': f'Bearer {KEY}'}).text
    return sum(float(n) for n in re.findall(r'^\S*running\S* (\S+)$', text, re.MULTILINE))


def bubbles(page, role):
    return page.locator(f'[data-testid="{role}"]')


def settled(answer):
    """The text of an answer, once it has ended: a button to stop it is there until then."""
    answer.wait_for()
    before, text, stop = None, answer.inner_text(), answer.page.locator('.stop-button:visible')
    while text != before or stop.count():
        answer.page.wait_for_timeout(700)
        before, text = text, answer.inner_text()
    return text


def test_a_key_is_asked_for_once_and_kept_where_no_script_reads_it(visit, address):
    page = visit(key='')
    page.get_by_label('key').fill('a guess')
    page.get_by_role('button', name='Enter').click()
    page.get_by_text('That is not the key.').wait_for()
    page.get_by_label('key').fill(KEY)
    page.get_by_role('button', name='Enter').click()
    page.get_by_role('tab', name='Talk').wait_for()
    (cookie,) = page.context.cookies()
    assert cookie['httpOnly'] and cookie['sameSite'] == 'Strict' and KEY not in cookie['value']
    page.reload()
    page.get_by_role('tab', name='Talk').wait_for()
    jar = {cookie['name']: cookie['value']}
    assert httpx.get(f'{address}/v1/models', cookies=jar).status_code == 401  # it is for the page alone


def test_without_the_key_no_route_of_the_page_does_anything(address, picture):
    for path in ('/gradio_api/info', '/config', '/gradio_api/file=/etc/hostname', '/theme.css', '/nosuch', '/key'):
        assert httpx.get(address + path).status_code == 401, path
    sent = httpx.post(f'{address}/gradio_api/upload', files={'files': picture.read_bytes()})
    assert sent.status_code == 401
    assert httpx.post(f'{address}/gradio_api/queue/join', json={}).status_code == 401
    assert httpx.post(f'{address}/key', data={'key': 'x' * 10_000}).status_code == 413


def test_no_address_and_no_file_of_the_machine_is_opened(address):
    known = {'Authorization': f'Bearer {KEY}'}
    for path in ('file=http://127.0.0.1:1/x', 'file=http%3A%2F%2F127.0.0.1:1/x', 'proxy=https://127.0.0.1:1/x'):
        reply = httpx.get(f'{address}/gradio_api/{path}', headers=known)
        assert reply.status_code == 400 and 'no address is opened' in reply.text
    assert httpx.get(f'{address}/gradio_api/file=/etc/hostname', headers=known).status_code in (403, 404)
    escaped = b'{"data": [{"path": "http:\\u002f/127.0.0.1:1/x", "meta": {"_type": "gradio.FileData"}}]}'
    reply = httpx.post(
        f'{address}/gradio_api/queue/join', content=escaped, headers=known | {'content-type': 'application/json'}
    )
    assert reply.status_code == 400 and 'no address is opened' in reply.text


def test_a_picture_is_asked_about_stopped_and_asked_again(visit, address, picture):
    page = visit()
    page.locator('input[type=file]').first.set_input_files(picture)
    page.locator('.thumbnail-item, [data-testid="file"]').first.wait_for()
    page.locator('textarea:visible').first.fill(QUESTION)
    page.keyboard.press('Enter')
    answer = bubbles(page, 'bot')
    first = settled(answer.first)
    assert first.strip() and page.locator('[data-testid="user"] img').count() == 1
    page.get_by_role('button', name='Retry').click()
    assert settled(answer.first) == first and answer.count() == 1
    page.get_by_role('button', name='Settings').click()
    page.get_by_label('number input for Longest answer').fill('500')
    page.keyboard.press('Tab')
    page.locator('textarea:visible').first.fill('and a long one?')
    page.keyboard.press('Enter')
    until(lambda: answer.count() == 2 and len(answer.nth(1).inner_text()) > 20)
    shown = len(answer.nth(1).inner_text())
    until(lambda: len(answer.nth(1).inner_text()) > shown)  # it streams
    assert running(address) == 1
    # The library's status of another call may lie over the button for a moment, on a busy machine.
    page.locator('.stop-button:visible').dispatch_event('click')
    until(lambda: running(address) == 0, 5)


def test_the_stages_answer_side_by_side_as_the_api_does(visit, address, picture):
    page = visit()
    page.get_by_role('tab', name='Stages').click()
    panel = page.locator('[role=tabpanel]:visible')
    panel.locator('input[type=file]').set_input_files(picture)
    panel.get_by_label('Question').fill(QUESTION)
    panel.locator('img').first.wait_for()
    panel.get_by_role('button', name='Ask').click()
    found = panel.get_by_label('x/vision_instruct')
    wanted = ask_api(address, picture)
    until(lambda: found.input_value() == wanted)
    for name in ('x/pretrain, which continues text', 'x/sft, which cannot see', 'x/vision_pretrain'):
        until(lambda name=name: panel.get_by_label(name, exact=True).input_value())


def test_where_it_looks_is_shown_for_each_token(visit, picture):
    page = visit()
    page.get_by_role('tab', name='Attention').click()
    panel = page.locator('[role=tabpanel]:visible')
    panel.get_by_role('button', name='Ask').click()
    page.get_by_text('Give a picture first.').wait_for()
    panel.locator('input[type=file]').first.set_input_files(picture)
    panel.get_by_label('Question').fill(QUESTION)
    panel.locator('img').first.wait_for()
    panel.get_by_role('button', name='Ask').click()
    said = panel.get_by_text('of the attention was on the picture')
    said.wait_for()
    told, shown = said.inner_text(), panel.locator('img').last
    seen = shown.get_attribute('src')
    assert re.search(r'^Before token 1, “.*”, \d+% of .* row [12], column [12] of 2\.$', told, re.DOTALL)
    panel.get_by_role('radio').nth(1).focus()
    page.keyboard.press('Space')  # the next token, by the keyboard
    until(lambda: said.inner_text() != told and shown.get_attribute('src') != seen)
    shown.click(position={'x': 20, 'y': 20})
    panel.get_by_text('Row 1, column 1 is most like: “').wait_for()


def test_the_keyboard_is_enough_and_a_phone_wide_enough(visit):
    page = visit(width=360)
    assert page.evaluate('document.documentElement.scrollWidth') <= 360
    field = page.locator('textarea:visible').first
    field.wait_for()  # it is loaded after the tabs
    for _ in range(20):
        page.keyboard.press('Tab')
        if field.evaluate('field => field === document.activeElement'):
            break
    page.keyboard.type(QUESTION)
    assert field.input_value() == QUESTION
    page.keyboard.press('Enter')
    assert settled(bubbles(page, 'bot').first).strip()
    for name in ('Stages', 'Attention'):
        page.get_by_role('tab', name=name).click()
        page.wait_for_timeout(300)
        assert page.evaluate('document.documentElement.scrollWidth') <= 360, name


@pytest.mark.slow
def test_a_space_starts_as_on_the_hub_and_gives_no_path_away(family, browser, tmp_path, picture):
    run, folder = family / 'vision_instruct', tmp_path / 'space'
    command = [sys.executable, f'{ROOT}/scripts/space/share.py', f'--run={run}', f'--output={folder}']
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    assert subprocess.run(command, env=env, capture_output=True).returncode == 0
    written = b''.join(file.read_bytes() for file in (folder / 'runs').rglob('*.json'))
    assert str(tmp_path.parent).encode() not in written and b'/' + family.name.encode() + b'/data' not in written
    again = subprocess.run(command, env=env, capture_output=True, text=True)
    assert again.returncode == 2 and 'exists: name a folder that does not' in again.stderr
    with socket.create_server(('127.0.0.1', 0)) as line:
        port = line.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    process = subprocess.Popen([sys.executable, 'app.py'], cwd=folder, env=env | {'GRADIO_SERVER_PORT': str(port)})
    try:
        address = f'http://127.0.0.1:{port}'
        until(lambda: process.poll() is not None or answers(f'{address}/health'), 120)
        assert httpx.get(address, headers={'Host': 'user-name.hf.space'}).status_code == 200
        page = browser.new_page()
        page.goto(address)
        page.locator('textarea:visible').first.fill(QUESTION)
        page.keyboard.press('Enter')
        assert settled(bubbles(page, 'bot').first).strip()
        page.close()
    finally:
        process.terminate()
        process.wait(60)


def test_a_space_asks_for_what_the_package_needs():
    wanted = runpy.run_path(str(ROOT / 'scripts/space/share.py'))['requirements']()
    assert {'jax', 'gradio', 'fastapi', 'transformers'} <= {re.match(r'\w+', name)[0] for name in wanted}
    assert not [name for name in wanted if 'nanovision' in name or ' @ ' in name]
