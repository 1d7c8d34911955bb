"""A run that is served, and a request on its way through its scheduler, heard in the event loop."""

import asyncio
import contextlib
import threading
import time

from nanovision_jax.errors import UserError
from nanovision_jax.inference.engine import Prompt
from nanovision_jax.inference.requests import Full, Heard, Request
from nanovision_jax.inference.scheduler import Scheduler
from nanovision_jax.serving.errors import Refusal
from nanovision_jax.serving.protocol import Limits, Wanted
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
                self.request.cancel('stop')
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


def usage(jobs):
    """How many tokens several took together."""
    told = [job.usage() for job in jobs]
    prompt, completion = (sum(one[name] for one in told) for name in ('prompt_tokens', 'completion_tokens'))
    return {'prompt_tokens': prompt, 'completion_tokens': completion, 'total_tokens': prompt + completion}
