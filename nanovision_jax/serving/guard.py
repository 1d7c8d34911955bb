"""What stands before every route: the key, Host and Origin, and how much a client may send, and how slowly."""

import asyncio
import dataclasses
import hmac
import json
import urllib.parse

from nanovision_jax.serving.errors import Refusal
from nanovision_jax.serving.protocol import Limits

OPEN = ('/health',)  # what needs no key
LOOPBACK = ('127.0.0.1', 'localhost', '::1')


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a server is closed. hosts: the names by which it may be called; None: any."""

    key: str = ''
    hosts: tuple[str, ...] | None = LOOPBACK
    limits: Limits = dataclasses.field(default_factory=Limits)
    body_seconds: float = 30.0  # in which a request's body has to be there
    leave_in: float = 30.0  # seconds that what runs has to end when the server leaves


class Guard:
    """ASGI middleware: refuses what is not allowed before anything of a request is read."""

    def __init__(self, app, settings: Settings):
        self.app, self.settings = app, settings

    async def __call__(self, scope, receive, send):
        """As ASGI has it."""
        if scope['type'] != 'http':
            if scope['type'] == 'lifespan':
                await self.app(scope, receive, send)
            return  # no websockets
        try:
            headers = {name.lower(): value for name, value in scope['headers']}
            self._check(scope['path'], headers)
            await self.app(scope, await self._whole(headers, receive), send)
        except Refusal as refusal:
            await _send(refusal, send)

    def _check(self, path, headers):
        hosts = self.settings.hosts
        if hosts is not None:
            if _host(headers.get(b'host', b'')) not in hosts:
                raise Refusal(403, 'this server is not called by that name (Host): see --allow-host.')
            origin = headers.get(b'origin')
            if origin is not None and _host(origin.partition(b'://')[2]) not in hosts:
                raise Refusal(403, 'pages of other sites may not call this server (Origin).')
        if self.settings.key and path not in OPEN:
            given = headers.get(b'authorization', b'')
            if not hmac.compare_digest(given, f'Bearer {self.settings.key}'.encode()):
                raise Refusal(401, 'this server wants its key: Authorization: Bearer KEY.', code='invalid_api_key')

    async def _whole(self, headers, receive):
        """A receive() that gives the body at once: read here, within the limits."""
        most, parts, size = self.settings.limits.body, [], 0
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
        body = [{'type': 'http.request', 'body': b''.join(parts), 'more_body': False}]

        async def given():
            return body.pop() if body else await receive()

        return given


def _host(text: bytes) -> str:
    """The name in HOST, HOST:PORT or [HOST]:PORT, in lower case; '' for what is none."""
    try:
        return (urllib.parse.urlsplit(f'//{text.decode("ascii")}').hostname or '').lower()
    except ValueError:
        return ''


async def _send(refusal, send):
    body = json.dumps(refusal.body()).encode()
    headers = [(b'content-type', b'application/json'), (b'content-length', str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in refusal.headers.items()]
    headers.append((b'connection', b'close'))  # what is left of the body is not read
    await send({'type': 'http.response.start', 'status': refusal.status, 'headers': headers})
    await send({'type': 'http.response.body', 'body': body})
