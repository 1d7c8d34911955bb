"""The key of the page in the browser: asked for once, and kept in a cookie that no script can read.

The cookie holds no key, but what one that has the key can compute from it; it counts for the page alone, so that no
other site can make a browser call the API.
"""

import hashlib
import hmac
import html
import urllib.parse

PAGE, ASKED = '/', '/key'  # where the page is, and where its key is sent to
API = (
    'v1',
    'health',
    'metrics',
    'tokenize',
    'detokenize',
    'tokenizer_info',
)  # what is the server's, and not the page's
COOKIE = 'nanovision_jax'
# What a browser may load from the page: nothing of another host, whatever a library of the page asks for.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; base-uri 'self'"

_FORM = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>nanovision_jax</title>
<style>:root {{ color-scheme: light dark }}
body {{ font: 1.05rem/1.5 system-ui, sans-serif; max-width: 20rem; margin: 20vh auto 0; padding: 0 1rem }}
input, button {{ font: inherit; width: 100%; box-sizing: border-box; padding: .5rem; margin: .4rem 0 }}
</style></head>
<body><form method="post" action="{asked}"><label>This page wants the key of its server.
<input type="password" name="key" autocomplete="current-password" autofocus required></label>
<button>Enter</button></form><p role="alert">{told}</p></body></html>
"""


def is_inside(path: str) -> bool:
    """Whether a path is one of the page's."""
    return path.split('/')[1:2] not in [[name] for name in API]


def form(told: str = '') -> bytes:
    """The page that asks for the key."""
    return _FORM.format(asked=ASKED, told=html.escape(told)).encode()


def is_key(body: bytes, key: str) -> bool:
    """Whether the key is in what the form sent."""
    given = urllib.parse.parse_qs(body.decode('utf-8', 'replace')).get('key', [''])[0]
    return hmac.compare_digest(given.encode(), key.encode())


def cookie(key: str, secure: bool) -> str:
    """The value of Set-Cookie for a browser that gave the key."""
    flags = '; Secure' if secure else ''
    return f'{COOKIE}={_proof(key)}; HttpOnly; SameSite=Strict; Path={PAGE}{flags}'


def is_known(header: bytes, key: str) -> bool:
    """Whether a request's Cookie shows that its browser gave the key."""
    wanted = f'{COOKIE}={_proof(key)}'.encode()
    # By hand: other programs of this host have cookies here too, at one of which http.cookies would stop.
    return any(hmac.compare_digest(cookie.strip(), wanted) for cookie in header.split(b';'))


def _proof(key):
    return hmac.new(key.encode(), b'the page of nanovision_jax', hashlib.sha256).hexdigest()
