"""Serves runs to OpenAI's clients.

    python -m nanovision_jax.serve --run=runs/tiny/vision_instruct
    python -m nanovision_jax.serve --run=runs/tiny --page
    python -m nanovision_jax.serve --run=A --run=B --host=0.0.0.0 --api-key=KEY --allow-host=example.org

The address is http://127.0.0.1:8000/v1 unless said otherwise. Any address but this machine's own takes a key, which
NANOVISION_API_KEY gives as well, or --public: a demo for everyone, with lower limits. --page adds one for browsers at
the server's address, which asks for the key once. The folder of a family stands for all its runs that say something.
"""

import atexit
import errno
import gc
import itertools
import os
import pathlib
import socket
import tempfile

from nanovision_jax.cli import Parser, run
from nanovision_jax.errors import UserError
from nanovision_jax.stages import STAGES


def main(argv):
    """The command: see the module's docstring."""
    parser = Parser(prog='python -m nanovision_jax.serve', description=__doc__)
    parser.add_argument(
        '--run', action='append', required=True, help='a run folder, or that of a family; may be given again'
    )
    parser.add_argument('--host', default='127.0.0.1', help='the address to listen on (default: %(default)s)')
    parser.add_argument('--port', type=int, default=8000, help='(default: %(default)s)')
    parser.add_argument('--api-key', default='', help='what clients have to send; default: NANOVISION_API_KEY')
    parser.add_argument('--allow-host', action='append', default=[], help='a name by which it is called, or *')
    parser.add_argument('--public', action='store_true', help='no key is needed, and limits are lower')
    parser.add_argument('--page', action='store_true', help='a page for browsers, too: pip install .[page]')
    parser.add_argument('--slots', type=int, default=16, help='requests answered at once (default: %(default)s)')
    parser.add_argument('--images', type=int, default=64, help='images whose features are kept (default: %(default)s)')
    parser.add_argument('--queue', type=int, default=256, help='requests that may wait (default: %(default)s)')
    parser.add_argument('--context', type=int, default=0, help='tokens of prompt and answer; default: what it learned')
    parser.add_argument('--devices', type=int, default=1, help='split the model over so many (default: %(default)s)')
    parser.add_argument('--weights', default='', help='keep them as bfloat16 or int8: less memory, and faster on a GPU')
    args = parser.parse(argv)
    for name in ('slots', 'images', 'queue', 'context', 'devices'):
        if (value := getattr(args, name)) < 1 and (name, value) != ('context', 0):
            raise UserError(f'--{name} takes a number above 0, not {value}.')
    if not 0 < args.port < 1 << 16:
        raise UserError(f'--port takes a number from 1 to 65535, not {args.port}.')
    try:
        import uvicorn

        from nanovision_jax.serving.api import build_app
        from nanovision_jax.serving.connection import Connection
        from nanovision_jax.serving.jobs import Served

        if args.page:
            _settle_page()
            from nanovision_jax.serving.page import mount
    except ImportError as error:
        extra = 'page' if args.page else 'serve'
        raise UserError(
            f"this takes an extra: pip install 'nanovision_jax[{extra}]' ({error.name} is missing)."
        ) from error
    from nanovision_jax.inference.run import load
    from nanovision_jax.inference.scheduler import Scheduler
    from nanovision_jax.serving.guard import LOOPBACK, Settings
    from nanovision_jax.serving.protocol import PUBLIC, Limits

    key = args.api_key or os.environ.get('NANOVISION_API_KEY', '')
    if args.host not in LOOPBACK and not key and not args.public:
        raise UserError(f'--host={args.host} is open to others: give --api-key (or NANOVISION_API_KEY), or --public.')
    hosts = None if '*' in args.allow_host or args.public else (*LOOPBACK, args.host, *args.allow_host)
    settings = Settings(key, hosts, PUBLIC if args.public else Limits(), args.page)
    _check_address(args.host, args.port)
    served = []
    for folder in itertools.chain(*map(_runs, args.run)):
        opened = load(folder, args.weights, args.devices)
        name = f'{opened.config.name}/{opened.config.stage}'
        if name in {one.name for one in served}:
            raise UserError(f'two runs are called {name}: serve them apart.')
        held = sum(one.scheduler.bytes for one in served)
        scheduler = Scheduler(opened, args.slots, args.images, args.queue, args.context, held)
        print(f'{name}: {scheduler.plan()}')
        for what in scheduler.warm_up():
            print(f'{name}: compiling {what}', flush=True)
        served.append(Served(opened, name, scheduler))
    print(f'serving {", ".join(one.name for one in served)} at http://{args.host}:{args.port}/v1', flush=True)
    app = build_app(served, settings)
    if args.page:
        app = mount(app, served, settings)
        print(f'the page is at http://{args.host}:{args.port}/', flush=True)
    # Garbage is looked for rarely while jax loads (see cli.run): here it would be images that clients sent.
    gc.collect()
    gc.freeze()
    gc.set_threshold(700)
    uvicorn.run(
        app,
        host=args.host,
        port=args.port,
        http=Connection,
        log_level='warning',
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=int(settings.leave_in),
        h11_max_incomplete_event_size=1 << 16,
    )


def _check_address(host, port):
    """Raises UserError where nothing can be listened at an address, before minutes go into compiling."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)  # '': any
        failed = []
        for family, kind, protocol, _, address in found:
            try:
                with socket.socket(family, kind, protocol) as tried:
                    tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    tried.bind(address)
                    tried.listen(1)
            except OSError as error:
                failed.append(error)
        # Of a name with several addresses this machine may lack one, as it may have no IPv6.
        taken = [error for error in failed if error.errno in (errno.EADDRINUSE, errno.EACCES)]
        if taken or len(failed) == len(found):
            raise (taken or failed)[0]
    except (OSError, UnicodeError) as error:
        why = getattr(error, 'strerror', None) or error
        raise UserError(f'--host={host} --port={port} cannot be listened at: {why}.') from error


def _runs(folder):
    """The folder of a run; or, of a family, those of its stages that decode, in their order."""
    family = pathlib.Path(folder)
    stages = [name for name, stage in STAGES.items() if stage.decodes and (family / name / 'config.json').is_file()]
    return [folder] if (family / 'config.json').exists() or not stages else [str(family / name) for name in stages]


def _settle_page():
    """What the page's library may send, and where it puts what is uploaded; before it is loaded."""
    os.environ |= {'GRADIO_ANALYTICS_ENABLED': 'False', 'HF_HUB_DISABLE_TELEMETRY': '1'}
    uploads = tempfile.TemporaryDirectory(prefix='nanovision-')
    atexit.register(uploads.cleanup)
    os.environ['GRADIO_TEMP_DIR'] = uploads.name


if __name__ == '__main__':
    run(main)
