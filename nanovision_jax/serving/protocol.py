"""OpenAI's requests read and checked, before anything is decoded or queued; what is wrong is a Refusal."""

import base64
import binascii
import dataclasses
import json
import math

import numpy as np

from nanovision_jax.data import images as image_files
from nanovision_jax.data.conversation import BadExample
from nanovision_jax.errors import UserError
from nanovision_jax.inference.engine import Prompt
from nanovision_jax.inference.prompt import chat_ids, text_prompt
from nanovision_jax.inference.sampling import Sampling
from nanovision_jax.inference.slots import ALTERNATIVES
from nanovision_jax.serving.errors import Refusal

# What OpenAI's interface has and this one has not: (field, the values that ask for nothing).
NOT_SUPPORTED = {
    'n': (1,),
    'best_of': (1,),
    'tools': ([],),
    'tool_choice': ('none', 'auto'),
    'functions': ([],),
    'function_call': ('none', 'auto'),
    'parallel_tool_calls': (True, False),
    'logit_bias': ({},),
    'presence_penalty': (0,),
    'frequency_penalty': (0,),
    'modalities': (['text'],),
    'audio': (),
    'prediction': (),
    'suffix': ('',),
    'web_search_options': (),
}
HARMLESS = ('user', 'store', 'metadata', 'service_tier', 'safety_identifier', 'prompt_cache_key')  # of no effect here
STOPS = 16  # stop strings of a request


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask for at most."""

    body: int = 32 << 20  # bytes
    images: int = 16
    pixels: int = image_files.MAX_PIXELS  # of an image
    prompts: int = 128  # of a completion
    tokens: int = 1 << 20  # of an answer; the context is a bound too
    seconds: float = 600.0


PUBLIC = Limits(body=8 << 20, images=4, pixels=16_000_000, prompts=4, tokens=512, seconds=60.0)


class Fields:
    """The fields of a JSON object, each read once; what nobody reads is ignored, and named."""

    def __init__(self, body: bytes):
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            raise Refusal(400, 'the body is no JSON that can be read.') from None
        if not isinstance(data, dict):
            raise Refusal(400, 'the body is no JSON object.')
        self.data = {name: value for name, value in data.items() if value is not None}
        self.unread = set(self.data) - set(HARMLESS)
        for name, nothing in NOT_SUPPORTED.items():
            if name in self.data and not any(self.data[name] == one for one in nothing):
                raise Refusal(400, f'{name} is not supported here: leave it out.', name, 'unsupported_parameter')
            self.unread.discard(name)

    def take(self, name: str, kind, default=None):
        """A field of a type, as it stands. Raises Refusal for another type."""
        self.unread.discard(name)
        if name not in self.data:
            return default
        value = self.data[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = {bool: 'true or false', str: 'text', int: 'a whole number', list: 'a list', dict: 'an object'}
            raise Refusal(400, f'{name} takes {wanted.get(kind, "another type")}, not {_short(value)}.', name)
        return value

    def number(self, name: str, default, low, high, whole: bool = False):
        """A number between bounds. Raises Refusal for another."""
        self.unread.discard(name)
        value = self.data.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(_finite(value)):
            raise Refusal(400, f'{name} takes a number, not {_short(value)}.', name)
        if whole and value != int(value):
            raise Refusal(400, f'{name} takes a whole number, not {_short(value)}.', name)
        if not low <= value <= high:
            raise Refusal(400, f'{name} takes a number from {low:,} to {high:,}, not {_short(value)}.', name)
        return int(value) if whole else float(value)


def _finite(value):
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else f'{text[:57]}…'


@dataclasses.dataclass
class Wanted:
    """What every kind of request asks for."""

    sampling: Sampling
    most: int
    stops: list[str]
    stream: bool
    usage: bool  # at the end of a stream


def wanted(fields: Fields, limits: Limits, most: int) -> Wanted:
    """The options of a request, whose answer has at most `most` tokens if it does not say."""
    sampling = Sampling(
        fields.number('temperature', 0.0, 0, 2),
        fields.number('top_k', 0, -1, 2**31 - 1, whole=True),
        fields.number('top_p', 1.0, 0, 1) or 1e-9,
        fields.number('seed', 0, -(2**63), 2**64, whole=True),
        fields.number('min_p', 0.0, 0, 1),
        fields.number('repetition_penalty', 1.0, 0.01, 100),
    )
    sampling = sampling._replace(top_k=max(0, sampling.top_k))
    named = [name for name in ('max_completion_tokens', 'max_tokens') if name in fields.data] or ['max_tokens']
    least = 0 if named[0] == 'max_tokens' and fields.data.get('echo') else 1
    tokens = [fields.number(name, min(most, limits.tokens), least, limits.tokens, whole=True) for name in named]
    stops = fields.data.get('stop', [])
    fields.unread.discard('stop')
    stops = [stops] if isinstance(stops, str) else stops
    if (
        not isinstance(stops, list)
        or len(stops) > STOPS
        or not all(isinstance(s, str) and 0 < len(s) <= 256 for s in stops)
    ):
        raise Refusal(400, f'stop takes up to {STOPS} texts of 1 to 256 characters.', 'stop')
    stream = fields.take('stream', bool, False)
    usage = fields.take('stream_options', dict, {}).get('include_usage', False)
    return Wanted(sampling, tokens[0], stops, stream, usage is True)


# Chats ---------------------------------------------------------------------------------------------------------------


def chat(fields: Fields, run, limits: Limits) -> Prompt:
    """The prompt of a chat request. Decodes its images."""
    messages, images = [], []
    for message in fields.take('messages', list, []):
        if not isinstance(message, dict) or not isinstance(message.get('role'), str):
            raise Refusal(400, 'messages takes a list of objects with role and content.', 'messages')
        role = {'developer': 'system'}.get(message['role'], message['role'])
        if role not in ('system', 'user', 'assistant'):
            raise Refusal(
                400, f'the role {_short(role)} is not supported: there are system, user and assistant.', 'messages'
            )
        content = message.get('content')
        if isinstance(content, list):
            content = [_part(part, images, limits) for part in content]
            if role != 'user':
                content = ''.join(part.get('text', '') for part in content)
        messages.append({'role': role, 'content': content})
    if not messages:
        raise Refusal(400, 'messages is empty: an answer needs a question.', 'messages')
    if not run.answers:
        raise Refusal(400, f'{run.name} has not learned to answer: it completes text (/v1/completions).', 'model')
    if images and not run.sees:
        raise Refusal(400, f'{run.name} cannot see: it takes no images.', 'messages')
    try:
        ids = chat_ids(run.config, run.tokenizer, messages, len(images))
    except UserError as error:
        raise Refusal(400, str(error), 'messages') from error
    # One image at a time, so that no more than one is there in full size.
    return Prompt(ids, [_prepared(data, run.config.model.vision, limits) for data in images])


def _part(part, images, limits):
    """A part of a message as conversation.py has it; an image's bytes are added to `images`."""
    kind = part.get('type') if isinstance(part, dict) else None
    if kind == 'text' and isinstance(part.get('text'), str):
        return {'type': 'text', 'text': part['text']}
    if kind != 'image_url':
        raise Refusal(400, f'a part of type {_short(kind)} is not supported: there are text and image_url.', 'messages')
    url = part.get('image_url')
    url = url.get('url') if isinstance(url, dict) else url
    if not isinstance(url, str) or not url[:5].lower() == 'data:':
        raise Refusal(400, 'an image comes as a data URI (data:image/png;base64,…): no address is opened.', 'messages')
    head, comma, data = url.partition(',')
    if not comma or not head.lower().endswith(';base64'):
        raise Refusal(400, 'an image is a data URI in base64: data:image/png;base64,….', 'messages')
    if len(images) >= limits.images:
        raise Refusal(400, f'more than {limits.images} images.', 'messages')
    try:
        images.append(base64.b64decode(data, validate=True))
    except (binascii.Error, ValueError):
        raise Refusal(400, 'an image is not in base64.', 'messages') from None
    return {'type': 'image'}


def _prepared(data, vision, limits):
    try:
        return image_files.prepare(image_files.load(data, most=limits.pixels), vision)
    except BadExample as error:
        raise Refusal(400, f'an image cannot be used: {error}.', 'messages') from None


# Completions ---------------------------------------------------------------------------------------------------------


def completion_prompts(fields: Fields, run, limits: Limits) -> list[Prompt]:
    """The prompts of a completion request: a text, texts, token ids, or lists of these."""
    fields.unread.discard('prompt')
    given = fields.data.get('prompt')
    if isinstance(given, str) or (isinstance(given, list) and given and all(map(is_id, given))):
        given = [given]
    if not isinstance(given, list) or not given or len(given) > limits.prompts:
        raise Refusal(400, f'prompt takes a text, a list of token ids, or up to {limits.prompts} of them.', 'prompt')
    return [_prompt(one, run) for one in given]


def _prompt(given, run):
    if isinstance(given, str):
        try:
            return text_prompt(run.tokenizer, given)
        except UserError as error:
            raise Refusal(400, str(error), 'prompt') from None
    if not isinstance(given, list) or not given or not all(map(is_id, given)):
        raise Refusal(400, 'prompt takes a text, a list of token ids, or a list of these.', 'prompt')
    if max(given) >= run.tokenizer.size or run.tokenizer.image in given:
        raise Refusal(
            400,
            f'prompt takes ids below {run.tokenizer.size}, and none of images.',
            'prompt',
        )
    return Prompt(np.array(given, np.int32), [])


def tokens(text: str, leading: bool, tokenizer) -> list[int]:
    """The ids of a text: of a document, with what leads it, or of a piece as it stands.

    A piece that is a control token and no more is that token: harnesses ask in this way which one leads documents.
    Raises Refusal for what is no text.
    """
    try:
        document = text_prompt(tokenizer, text)
    except UserError as error:
        raise Refusal(400, str(error), 'prompt') from None
    if leading:
        return document.ids.tolist()
    if text in tokenizer.controls:
        return [tokenizer.special[tokenizer.controls.index(text)]]
    return list(tokenizer.encode(text, trim=False))


def is_id(value) -> bool:
    """Whether a value can be a token's id."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def alternatives(fields: Fields, name: str) -> int | None:
    """How many alternatives to each token are asked for; None: no log-probabilities at all."""
    value = fields.data.get(name)
    return None if value is None else fields.number(name, 0, 0, ALTERNATIVES, whole=True)
