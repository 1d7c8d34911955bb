"""The HTTP interface: OpenAI's chats and completions, tokens, health and metrics, as a FastAPI application."""

import asyncio
import contextlib
import json

import fastapi
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from nanovision_jax.serving import protocol
from nanovision_jax.serving.errors import Refusal
from nanovision_jax.serving.forms import Chat, Completion
from nanovision_jax.serving.guard import Guard, Settings
from nanovision_jax.serving.jobs import Job, Served, usage
from nanovision_jax.serving.metrics import Metrics
from nanovision_jax.serving.protocol import Fields


def build_app(served: list[Served], settings: Settings) -> fastapi.FastAPI:
    """The application; its schedulers work while it is up."""
    by_name, limits, metrics = {one.name: one for one in served}, settings.limits, Metrics(served)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        for one in served:
            one.thread.start()
        yield
        for one in served:
            one.scheduler.stop()
        for one in served:
            await asyncio.to_thread(one.thread.join, settings.leave_in)

    app = fastapi.FastAPI(title='nanovision_jax', docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(Guard, settings=settings)

    @app.exception_handler(Refusal)
    async def refused(_, refusal: Refusal):
        return JSONResponse(refusal.body(), refusal.status, refusal.headers)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def nowhere(request, error):
        refusal = Refusal(error.status_code, f'there is no {request.method} {request.url.path} here.')
        return JSONResponse(refusal.body(), refusal.status)

    def chosen(fields: Fields) -> Served:
        name = fields.take('model', str, served[0].name if len(served) == 1 else None)
        if name not in by_name:
            known = ', '.join(by_name)
            raise Refusal(404, f'there is no model {name!r}: there are {known}.', 'model', 'model_not_found')
        return by_name[name]

    @app.get('/v1/models')
    async def models():
        return {'object': 'list', 'data': [_model(one) for one in served]}

    @app.get('/v1/models/{name:path}')
    async def model(name: str):
        return _model(chosen(Fields(json.dumps({'model': name}).encode())))

    @app.post('/v1/chat/completions')
    async def chat_completions(request: fastapi.Request):
        fields = Fields(await request.body())
        one = chosen(fields)
        options = protocol.wanted(fields, limits, one.scheduler.context)
        scored = fields.take('logprobs', bool, False)
        alternatives = protocol.alternatives(fields, 'top_logprobs') or 0
        if alternatives and not scored:
            raise Refusal(400, 'top_logprobs goes with logprobs: true.', 'top_logprobs')
        guide = _guide(fields, one)
        prompt = await asyncio.to_thread(protocol.chat, fields, one, limits)
        jobs = [Job(one, prompt, options, limits, scored, guide=guide)]
        form = Chat(one, alternatives if scored else None)
        return await answer(request, form, jobs, options, fields)

    @app.post('/v1/completions')
    async def completions(request: fastapi.Request):
        fields = Fields(await request.body())
        one = chosen(fields)
        options = protocol.wanted(fields, limits, 16)
        alternatives, echo = protocol.alternatives(fields, 'logprobs'), fields.take('echo', bool, False)
        scored = alternatives is not None
        if echo and options.stream:
            raise Refusal(
                400, 'echo is not supported in a stream: leave one of them out.', 'echo', 'unsupported_parameter'
            )
        prompts = await asyncio.to_thread(protocol.completion_prompts, fields, one, limits)
        jobs = [Job(one, prompt, options, limits, scored, echo and scored) for prompt in prompts]
        form = Completion(one, alternatives, echo, options.most)
        return await answer(request, form, jobs, options, fields)

    async def answer(request, form, jobs, options, fields):
        headers = {}
        if ignored := sorted(fields.unread):
            named = ', '.join(name for name in ignored if name.isascii() and name.isprintable())[:200]
            headers['x-ignored-fields'] = named
        with contextlib.ExitStack() as stack:
            for job in jobs:
                stack.callback(job.request.cancel)
                job.start()
            if options.stream:
                events = _events(form, jobs, options, stack.pop_all())
                return StreamingResponse(events, 200, headers, 'text/event-stream')
            gone = asyncio.ensure_future(_gone(request))
            try:
                whole = asyncio.ensure_future(asyncio.gather(*(job.whole() for job in jobs)))
                await asyncio.wait((gone, whole), return_when=asyncio.FIRST_COMPLETED)
                if not whole.done():
                    whole.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await whole
                    return PlainTextResponse('', 499)
                return JSONResponse(form.whole(jobs, whole.result()), 200, headers)
            finally:
                gone.cancel()

    @app.post('/tokenize')
    async def tokenize(request: fastapi.Request):
        fields = Fields(await request.body())
        one = chosen(fields)
        if 'messages' in fields.data:
            ids = (await asyncio.to_thread(protocol.chat, fields, one, limits)).ids.tolist()
        else:
            text, leading = fields.take('prompt', str, ''), fields.take('add_special_tokens', bool, True)
            ids = await asyncio.to_thread(protocol.tokens, text, leading, one.tokenizer)
        return {'tokens': ids, 'count': len(ids), 'max_model_len': one.scheduler.context}

    @app.post('/detokenize')
    async def detokenize(request: fastapi.Request):
        fields = Fields(await request.body())
        one, ids = chosen(fields), fields.take('tokens', list, [])
        if not all(protocol.is_id(i) and i < one.tokenizer.size for i in ids):
            raise Refusal(400, f'tokens takes a list of ids below {one.tokenizer.size}.', 'tokens')
        return {'prompt': one.tokenizer.decode(ids, special=True)}

    @app.get('/tokenizer_info')
    async def tokenizer_info():
        one = served[0]
        folder = one.tokenizer.folder
        told = json.loads((folder / 'tokenizer_config.json').read_text())
        told |= {'chat_template': (folder / 'chat_template.jinja').read_text()}
        return told | {'eos_token': one.token(one.tokenizer.end), 'bos_token': one.token(one.tokenizer.end_of_text)}

    @app.get('/health')
    async def health():
        alive = all(one.thread.is_alive() for one in served)
        return JSONResponse({'status': 'ok' if alive else 'failed'}, 200 if alive else 503)

    @app.get('/metrics')
    async def told():
        return PlainTextResponse(metrics.text(), media_type='text/plain; version=0.0.4')

    return app


def _model(one):
    told = {'id': one.name, 'object': 'model', 'created': one.created, 'owned_by': 'nanovision_jax'}
    return told | {'max_model_len': one.scheduler.context, 'images': one.sees}


def _guide(fields, one):
    """What an answer is held to, or None."""
    wanted = fields.take('response_format', dict, {})
    kind = wanted.get('type', 'text')
    choice = fields.take('choice', list)
    if kind == 'text' and choice is None:
        return None
    from nanovision_jax.serving.guide import make_guide

    return make_guide(one.tokenizer, wanted, choice)


async def _gone(request):
    """Returns once the client has left."""
    while (await request.receive())['type'] != 'http.disconnect':
        pass


async def _events(form, jobs, options, stack):
    """A stream's server-sent events. Its requests are cancelled when the client leaves."""

    def event(content):
        return f'data: {json.dumps(content)}\n\n'

    with stack:
        pieces = asyncio.Queue()

        async def follow(number, job):
            try:
                async for text, tokens, scores in job.pieces():
                    pieces.put_nowait((number, text, tokens, scores))
                pieces.put_nowait((number, None, None, None))
            except Refusal as refusal:
                pieces.put_nowait((number, refusal, None, None))

        tasks = [asyncio.ensure_future(follow(*numbered)) for numbered in enumerate(jobs)]
        try:
            for content in form.opening(jobs):
                yield event(content)
            left = len(jobs)
            while left:
                number, text, tokens, scores = await pieces.get()
                if isinstance(text, Refusal):
                    yield event(text.body())
                    return
                if text is None:
                    left -= 1
                    yield event(form.chunk(number, '', [], None, jobs[number].finish))
                elif text or scores:
                    yield event(form.chunk(number, text, tokens, scores, None))
            if options.usage:
                yield event(form.frame() | {'choices': [], 'usage': usage(jobs)})
            yield 'data: [DONE]\n\n'
        finally:
            for task in tasks:
                task.cancel()
