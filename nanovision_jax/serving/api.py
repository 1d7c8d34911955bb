"""The HTTP interface: OpenAI's chats and completions, tokens, health and metrics, as a FastAPI application."""

import asyncio
import collections
import contextlib
import json
import secrets
import threading
import time

import fastapi
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from nanovision_jax.errors import UserError
from nanovision_jax.inference.engine import Prompt
from nanovision_jax.inference.scheduler import Full, Heard, Request, Scheduler
from nanovision_jax.serving import protocol
from nanovision_jax.serving.errors import Refusal
from nanovision_jax.serving.guard import Guard, Settings
from nanovision_jax.serving.metrics import Metrics
from nanovision_jax.serving.protocol import Fields, Limits, Wanted
from nanovision_jax.serving.text import TextStream
from nanovision_jax.stages import stage_of


class Served:
    """A run, its scheduler, and the thread in which that works."""

    def __init__(self, run, name: str, scheduler: Scheduler):
        self.name, self.scheduler = name, scheduler
        self.config, self.tokenizer, self.created = run.config, run.tokenizer, int(time.time())
        self.sees, self.answers = stage_of(run.config).sees, stage_of(run.config).answers
        self.thread = threading.Thread(target=scheduler.run, daemon=True, name=f'scheduler of {name}')

    def token(self, i: int) -> str:
        """A token as text; special ones by their name."""
        return self.tokenizer.decode([i], special=True)


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
            ids = protocol.tokens(text, leading, one.tokenizer)
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


class Job:
    """A request on its way through the scheduler, heard in the event loop."""

    def __init__(
        self, one: Served, prompt: Prompt, options: Wanted, limits: Limits, scored=False, echo=False, guide=None
    ):
        loop, self.queue, self.one = asyncio.get_running_loop(), asyncio.Queue(), one

        def hear(heard: Heard):
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(self.queue.put_nowait, heard)

        self.request = Request(
            prompt, hear, options.sampling, max(1, options.most), scored, echo,
            time.monotonic() + limits.seconds, guide,
        )  # fmt: skip
        self.text = TextStream(one.tokenizer, options.stops)
        self.tokens, self.scores, self.finish = [], [], ''

    def start(self):
        """Queues it. Raises Refusal where there is no room."""
        try:
            self.one.scheduler.submit(self.request)
        except Full:
            raise Refusal(
                429, 'too many requests wait already: try again later.', headers={'retry-after': '1'}
            ) from None
        except UserError as error:
            raise Refusal(400, str(error), 'messages', 'context_length_exceeded') from None

    async def pieces(self):
        """Yields (further text, further tokens, their scores) until the answer is whole; `finish` says why it ended."""
        while not self.finish:
            heard = await self.queue.get()
            if heard.finish.startswith('error'):
                raise Refusal(500, f'this request could not be answered ({heard.finish}).')
            text, count = self._read(heard)
            tokens, scores = heard.tokens[:count], heard.scores
            self.finish = heard.finish if heard.finish != 'deadline' else 'length'
            if self.text.stopped is not None:
                self.finish = 'stop'
                self.request.cancel()
                scores = scores and scores[: len(scores) - len(heard.tokens) + count]
            self.tokens += tokens
            self.scores += scores or []
            yield text, tokens, scores

    def _read(self, heard):
        """(further text, how many of the tokens it took): a stop string ends both."""
        ends, text = self.one.tokenizer.stops, ''
        if not self.text.stops:
            said = [token for token in heard.tokens if token not in ends]
            return self.text.push(said, last=bool(heard.finish)), len(heard.tokens)
        for count, token in enumerate(heard.tokens, 1):
            text += self.text.push([token] if token not in ends else [])
            if self.text.stopped is not None:
                return text, count
        if heard.finish:
            text += self.text.push([], last=True)
        return text, len(heard.tokens)

    async def whole(self):
        """The answer's text."""
        return ''.join([text async for text, _, _ in self.pieces()])

    def usage(self):
        """How many tokens it took."""
        return {'prompt_tokens': len(self.request.prompt.ids), 'completion_tokens': len(self.tokens)}


def _usage(jobs):
    told = [job.usage() for job in jobs]
    prompt, completion = (sum(one[name] for one in told) for name in ('prompt_tokens', 'completion_tokens'))
    return {'prompt_tokens': prompt, 'completion_tokens': completion, 'total_tokens': prompt + completion}


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
                yield event(form.frame() | {'choices': [], 'usage': _usage(jobs)})
            yield 'data: [DONE]\n\n'
        finally:
            for task in tasks:
                task.cancel()


class Form:
    """What answers look like: the parts that chats and completions share."""

    prefix = kind = chunk_kind = ''

    def __init__(self, one: Served, alternatives: int | None):
        self.one, self.alternatives = one, alternatives
        self.id, self.created = f'{self.prefix}-{secrets.token_hex(12)}', int(time.time())

    def frame(self, whole: bool = False):
        """The fields that every object has."""
        kind = self.kind if whole else self.chunk_kind
        return {'id': self.id, 'object': kind, 'created': self.created, 'model': self.one.name}

    def opening(self, jobs):
        """Chunks before the first."""
        return []


class Chat(Form):
    """/v1/chat/completions."""

    prefix, kind, chunk_kind = 'chatcmpl', 'chat.completion', 'chat.completion.chunk'

    def whole(self, jobs, texts):
        """The answer at once."""
        (job,), (text,) = jobs, texts
        choice = {'index': 0, 'message': {'role': 'assistant', 'content': text}, 'finish_reason': job.finish}
        choice['logprobs'] = self._logprobs(job.tokens, job.scores)
        return self.frame(whole=True) | {'choices': [choice], 'usage': _usage(jobs)}

    def opening(self, jobs):
        """The assistant begins to speak."""
        delta = {'role': 'assistant', 'content': ''}
        return [self.frame() | {'choices': [{'index': 0, 'delta': delta, 'finish_reason': None}]}]

    def chunk(self, number, text, tokens, scores, finish):
        """A piece of a stream."""
        choice = {'index': 0, 'delta': {'content': text} if text else {}, 'finish_reason': finish}
        if scores:
            choice['logprobs'] = self._logprobs(tokens, scores)
        return self.frame() | {'choices': [choice]}

    def _logprobs(self, tokens, scores):
        if self.alternatives is None:
            return None
        return {
            'content': [
                self._one(token, p) | {'top_logprobs': [self._one(*other) for other in others[: self.alternatives]]}
                for token, (p, others) in zip(tokens, scores, strict=True)
            ]
        }

    def _one(self, token, probability):
        text = self.one.token(token)
        return {'token': text, 'logprob': probability, 'bytes': list(text.encode())}


class Completion(Form):
    """/v1/completions."""

    prefix, kind, chunk_kind = 'cmpl', 'text_completion', 'text_completion'

    def __init__(self, one, alternatives, echo, most):
        super().__init__(one, alternatives)
        self.echo, self.most = echo, most
        self.characters = collections.Counter()  # of each answer's tokens that are streamed already

    def whole(self, jobs, texts):
        """All answers at once."""
        choices = []
        for number, (job, text) in enumerate(zip(jobs, texts, strict=True)):
            prompt = job.request.prompt.ids.tolist()
            if not self.most:  # the engine says one token at least
                text, job.tokens, job.scores = '', [], job.scores[: len(prompt)]
            tokens = job.tokens
            if self.echo:
                text, tokens = self.one.tokenizer.decode(prompt) + text, prompt + tokens
            logprobs = self._logprobs(tokens, job.scores) if self.alternatives is not None else None
            choices.append({'index': number, 'text': text, 'finish_reason': job.finish, 'logprobs': logprobs})
        return self.frame(whole=True) | {'choices': choices, 'usage': _usage(jobs)}

    def chunk(self, number, text, tokens, scores, finish):
        """A piece of a stream."""
        logprobs = self._logprobs(tokens, scores, self.characters[number]) if scores else None
        self.characters[number] += sum(len(self.one.token(token)) for token in tokens) if scores else 0
        return self.frame() | {
            'choices': [{'index': number, 'text': text, 'finish_reason': finish, 'logprobs': logprobs}]
        }

    def _logprobs(self, tokens, scores, at=0):
        texts, offsets = [self.one.token(token) for token in tokens], []
        for text in texts:
            offsets.append(at)
            at += len(text)
        tops = []
        for text, (p, others) in zip(texts, scores, strict=True):
            top = {}
            for other, value in others[: max(1, self.alternatives)]:
                top.setdefault(self.one.token(other), value)  # of tokens with one spelling, the likeliest
            if p is not None:
                top.setdefault(text, p)
            tops.append(top or None)
        probabilities = [p for p, _ in scores]
        return {'tokens': texts, 'token_logprobs': probabilities, 'top_logprobs': tops, 'text_offset': offsets}
