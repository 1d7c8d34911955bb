"""What answers look like: the objects of OpenAI's chats and completions, whole and in a stream's chunks."""

import collections
import itertools
import secrets
import time

from nanovision_jax.serving.jobs import Served, usage


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
        return self.frame(whole=True) | {'choices': [choice], 'usage': usage(jobs)}

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
        return self.frame(whole=True) | {'choices': choices, 'usage': usage(jobs)}

    def chunk(self, number, text, tokens, scores, finish):
        """A piece of a stream."""
        logprobs = self._logprobs(tokens, scores, self.characters[number]) if scores else None
        self.characters[number] += sum(map(self._length, tokens)) if scores else 0
        return self.frame() | {
            'choices': [{'index': number, 'text': text, 'finish_reason': finish, 'logprobs': logprobs}]
        }

    def _length(self, token):
        """How many characters of the text are a token's: none of a special one's."""
        return 0 if token in self.one.tokenizer.special else len(self.one.token(token))

    def _logprobs(self, tokens, scores, at=0):
        texts = [self.one.token(token) for token in tokens]
        offsets = list(itertools.accumulate(map(self._length, tokens), initial=at))[:-1]
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
