"""What stands before every route: the key, Host and Origin, and how much a client may send, and how slowly."""

import asyncio
import collections
import dataclasses
import hmac
import json
import time
import urllib.parse

from nanovision_jax.serving import entrance
from nanovision_jax.serving.errors import Refusal
from nanovision_jax.serving.protocol import Limits

OPEN = ('/health',)  # what needs no key
HTML = [(b'content-type', b'text/html; charset=utf-8'), (b'cache-control', b'no-store')]
FORM, WRONG = 1 << 12, 1.0  # bytes that a key is sent in, and seconds that a wrong one takes
STAY = 7200  # seconds that an uploaded picture may lie on the disk: page.py removes it after half of that, every hour
LOOPBACK = ('127.0.0.1', 'localhost', '::1')
ONCE = (b'host', b'origin', b'authorization', b'content-type', b'content-length')  # headers that one looks at
# The routes of the page's library that the page uses; others run programs on what visitors send, or write files.
USED = (
    'app_id', 'cancel', 'heartbeat', 'info', 'queue', 'reset', 'run', 'startup-events', 'theme.css', 'upload',
    'upload_progress',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a server is closed. hosts: the names by which it may be called; None: any."""

    key: str = ''
    hosts: tuple[str, ...] | None = LOOPBACK
    limits: Limits = dataclasses.field(default_factory=Limits)
    page: bool = False  # whether there is one for browsers, see page.py
    uploads: int = 1 << 30  # bytes of pictures that may lie on the disk at once
    body_seconds: float = 30.0  # in which a request's body has to be there
    leave_in: float = 30.0  # seconds that what runs has to end when the server leaves


class Guard:
    """ASGI middleware: refuses what is not allowed before anything of a request is read."""

    def __init__(self, app, settings: Settings):
        self.app, self.settings = app, settings
        self._uploads = collections.deque()  # (when, how many bytes)

    async def __call__(self, scope, receive, send):
        """As ASGI has it."""
        if scope['type'] != 'http':
            if scope['type'] == 'lifespan':
                await self.app(scope, receive, send)
            return  # no websockets
        try:
            headers = _headers(scope)
            self._check_host(headers)
            path, page = scope['path'], self.settings.page and entrance.is_inside(scope['path'])
            if (
                page
                and not self._has_key(headers)
                and not entrance.is_known(headers.get(b'cookie', b''), self.settings.key)
            ):
                await self._ask(scope, headers, receive, send)
                return
            if not page and path not in OPEN and not self._has_key(headers):
                raise Refusal(401, 'this server wants its key: Authorization: Bearer KEY.', code='invalid_api_key')
            body = await self._whole(headers, receive)
            if page and _is_upload(headers):
                self._check_room(len(body))
            if page:
                _check_page(path, headers, body)
            await self.app(scope, _given(body, receive), _guarded(send) if page else send)
        except Refusal as refusal:
            await _send(refusal, send)

    def _check_host(self, headers):
        hosts = self.settings.hosts
        if hosts is not None:
            if _host(headers.get(b'host', b'')) not in hosts:
                raise Refusal(403, 'this server is not called by that name (Host): see --allow-host.')
            origin = headers.get(b'origin')
            if origin is not None and _host(origin.partition(b'://')[2]) not in hosts:
                raise Refusal(403, 'pages of other sites may not call this server (Origin).')

    def _check_room(self, size):
        """Counts an upload. Each is small, and anyone may send many."""
        now = time.monotonic()
        while self._uploads and self._uploads[0][0] < now - STAY:
            self._uploads.popleft()
        if sum(held for _, held in self._uploads) + size > self.settings.uploads:
            raise Refusal(429, 'too many pictures were sent to this page: try again in an hour.')
        self._uploads.append((now, size))

    def _has_key(self, headers):
        given = headers.get(b'authorization', b'')
        return not self.settings.key or hmac.compare_digest(given, f'Bearer {self.settings.key}'.encode())

    async def _ask(self, scope, headers, receive, send):
        """Asks a browser for the key of the page, or takes it."""
        if scope['method'] == 'POST' and scope['path'] == entrance.ASKED:
            if entrance.is_key(await self._whole(headers, receive, FORM), self.settings.key):
                cookie = entrance.cookie(self.settings.key, scope['scheme'] == 'https')
                found = [(b'location', entrance.PAGE.encode()), (b'set-cookie', cookie.encode())]
                await _answer(send, 303, b'', found)
                return
            await asyncio.sleep(WRONG)
            await _answer(send, 401, entrance.form('That is not the key.'), HTML)
        elif scope['method'] == 'GET' and b'text/html' in headers.get(b'accept', b''):
            await _answer(send, 401, entrance.form(), HTML)
        else:
            raise Refusal(401, f'this page wants its key: give it at {entrance.PAGE}.', code='invalid_api_key')

    async def _whole(self, headers, receive, most=None):
        """The body, read within the limits, or within `most` bytes."""
        most, parts, size = most or self.settings.limits.body, [], 0
        too_large = Refusal(413, f'the body is larger than {most:,} bytes.', code='body_too_large')
        length = headers.get(b'content-length', b'0')
        if not length.isdigit() or int(length[:20]) > most:
            raise too_large if length.isdigit() else Refusal(400, 'Content-Length is no number.')
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message['type'] == 'http.disconnect':
                        break
                    parts.append(message.get('body', b''))
                    size, more = size + len(parts[-1]), message.get('more_body', False)
                    if size > most:
                        raise too_large
        except TimeoutError:
            raise Refusal(408, f'the body took longer than {self.settings.body_seconds:.0f} s.') from None
        return b''.join(parts)


def _given(body, receive):
    """A receive() that gives the body at once."""
    parts = [{'type': 'http.request', 'body': body, 'more_body': False}]

    async def given():
        return parts.pop() if parts else await receive()

    return given


def _headers(scope):
    """{name: value} of a request. Of two values the guard would look at one, and who comes after it at the other."""
    found = {}
    for name, value in scope['headers']:
        name = name.lower()
        if name in found and name in ONCE:
            raise Refusal(400, f'the header {name.decode("ascii")} is there twice.')
        found[name] = value
    return found


def _check_page(path, headers, body):
    """Refuses routes that the page does not use, and what would make its library open an address: a file is one that
    was uploaded."""
    refusal = Refusal(400, 'an image is uploaded: no address is opened.')
    if '://' in path:
        raise refusal
    _, first, *rest = path.split('/')
    if first == 'gradio_api' and not (rest and (rest[0] in USED or rest[0].startswith('file='))):
        raise Refusal(404, 'the page has no such route.')
    if _is_upload(headers):
        return
    try:
        waiting = [json.loads(body)] if body else []
    except ValueError:  # nor will the library read it
        return
    except RecursionError:
        raise refusal from None
    while waiting:
        one = waiting.pop()
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        if isinstance(one, dict) and isinstance(one.get('path'), str) and '://' in one['path']:
            raise refusal


def _is_upload(headers):
    return headers.get(b'content-type', b'').strip().lower().startswith(b'multipart/')


def _guarded(send):
    """A send() whose answers tell the browser what it may load."""

    async def guarded(message):
        if message['type'] == 'http.response.start':
            told = [(b'content-security-policy', entrance.POLICY.encode()), (b'referrer-policy', b'same-origin')]
            message = message | {'headers': [*message.get('headers', ()), *told]}
        await send(message)

    return guarded


def _host(text: bytes) -> str:
    """The name in HOST, HOST:PORT or [HOST]:PORT, in lower case; '' for what is none."""
    try:
        return (urllib.parse.urlsplit(f'//{text.decode("ascii")}').hostname or '').lower()
    except ValueError:
        return ''


async def _send(refusal, send):
    headers = [(b'content-type', b'application/json')]
    headers += [(name.encode(), value.encode()) for name, value in refusal.headers.items()]
    headers.append((b'connection', b'close'))  # what is left of the body is not read
    await _answer(send, refusal.status, json.dumps(refusal.body()).encode(), headers)


async def _answer(send, status, body, headers):
    headers = [*headers, (b'content-length', str(len(body)).encode())]
    await send({'type': 'http.response.start', 'status': status, 'headers': headers})
    await send({'type': 'http.response.body', 'body': body})
