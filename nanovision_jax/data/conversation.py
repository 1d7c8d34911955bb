"""Conversations become tokens here, and nowhere else.

A message is {'role': 'user' | 'assistant', 'content': text or parts}, a part {'type': 'text', 'text': …} or
{'type': 'image'}; the first one may have the role 'system'. Written out in our own template (templates.py has others):

    <|endoftext|><|user|> <|image|>×P question <|end|><|assistant|> answer <|end|><|user|> …

Learned are the assistant's words and the <|end|> after them.
"""

import hashlib
import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from nanovision_jax.data.templates import TOOL_ROLES

# What data sets call who speaks, as our roles.
SPEAKERS = {'human': 'user', 'user': 'user', 'gpt': 'assistant', 'assistant': 'assistant', 'system': 'system'}


class BadExample(Exception):
    """An example that cannot be used; the message is the reason, as bad_rows.jsonl lists it."""


class TooLong(BadExample):
    """A conversation of which not even the first answer fits into a row: data.too_long says what becomes of it."""


def kind_of(reason: str) -> str:
    """A reason without the names it quotes and an image's size, so that reasons of one kind are counted together."""
    return re.sub(r""" ['"].*['"]| of \d+ × \d+ pixels""", '', reason)


class Encoded(NamedTuple):
    """A conversation as tokens: what encode() makes, and fit() cuts."""

    ids: Int32[np.ndarray, ' n']
    learned: Bool[np.ndarray, ' n']
    ends: list[int]  # the lengths at which an answer is complete
    images: list[int]  # how many images stand before each of these ends


def encode(messages: list[dict], tokenizer, image_tokens: list[int] | tuple = (), question: bool = False) -> Encoded:
    """Messages to Encoded, as the tokenizer's template writes them.

    image_tokens: how many image tokens each image has; the i-th image part becomes as many. A last question without
    an answer is left out, unless `question`: then it stays, and the assistant's turn is opened for the model to fill.
    Raises BadExample for an unknown speaker, turns out of order, no answer, or images that do not match.
    """
    check(messages)
    expected, seen, images = 'user', 0, []
    for message in messages:
        role, content = message['role'], message['content']
        shown = 0 if isinstance(content, str) else sum(part['type'] == 'image' for part in content)
        if shown and role == 'assistant':
            raise BadExample('a picture in an answer')
        if role == 'system':  # the first: check() has seen to it
            continue
        if role != expected:
            raise BadExample(f'{role} speaks out of turn')
        expected = 'assistant' if role == 'user' else 'user'
        seen += shown
        if role == 'assistant':
            if not text_of(message).strip():
                raise BadExample('empty answer')
            images.append(seen)
    if seen != len(image_tokens):
        raise BadExample(f'{seen} image places for {len(image_tokens)} images')
    if question and expected != 'assistant':
        raise BadExample('no question to answer')
    if not question and not images:
        raise BadExample('no answer')
    if not question and expected == 'assistant':
        messages = messages[:-1]
    ids, learned, ends, length, placed = [], [], [], 0, 0
    for turn in tokenizer.template.turns(messages, tokenizer.escape, question):
        read, marks = tokenizer.tokenize(turn)
        if image_tokens and (places := np.flatnonzero(read == tokenizer.image)).size:
            copies = np.ones(len(read), int)
            copies[places] = image_tokens[placed : placed + len(places)]
            read, marks, placed = np.repeat(read, copies), np.repeat(marks, copies), placed + len(places)
        ids.append(read)
        learned.append(marks)
        length += len(read)
        if any(span.learned for span in turn):
            ends.append(length)
    return Encoded(np.concatenate(ids), np.concatenate(learned), ends, images)


def check(messages):
    """Raises BadExample for what is no list of messages; a system message may be the first.

    Whose turn it is otherwise, is encode's business.
    """
    for number, message in enumerate(messages):
        role, content = (message.get('role'), message.get('content')) if isinstance(message, dict) else (None, None)
        if role_of(role) != role:
            raise BadExample(f'unknown speaker {role!r}')
        if role == 'system' and number:
            raise BadExample('system speaks out of turn')
        if role == 'system' and isinstance(content, list) and any(map(is_image, content)):
            raise BadExample('a picture in a system message')
        for part in content if isinstance(content, list) else [{'type': 'text', 'text': content}]:
            kind = part.get('type') if isinstance(part, dict) else None
            if kind != 'image' and not (kind == 'text' and isinstance(part.get('text'), str)):
                raise BadExample('a turn without text')
            if kind == 'text' and re.search('[\ud800-\udfff]', part['text']):  # half a character, as JSON may hold
                raise BadExample('text that is not Unicode')


def fit(encoded: Encoded, length: int, cut: bool = False) -> tuple:
    """Cuts a conversation after the last answer that a row of `length` tokens holds whole.

    Returns (ids, learned, how many images are left): the images behind the cut go with it.
    A row of T tokens holds T inputs and the T ids that follow them: an example of T + 1 ids.
    If not even the first answer fits, its beginning is kept, without its end, where `cut` allows it and the row holds
    any of it. Raises TooLong else.
    """
    ids, learned, ends, images = encoded
    whole = sum(end <= length + 1 for end in ends)
    if whole:
        return ids[: ends[whole - 1]], learned[: ends[whole - 1]], images[whole - 1]
    if cut and learned[: length + 1].any():  # so the question is whole, with all its images
        return ids[: length + 1], learned[: length + 1], images[0]
    raise TooLong(f'the first answer ends at token {ends[0]}, beyond a row of {length}')


def first_answers(messages: list[dict], count: int) -> list[dict]:
    """A conversation up to its `count`-th answer."""
    answers = [number for number, message in enumerate(messages) if message['role'] == 'assistant']
    return messages[: answers[count - 1] + 1]


def is_image(part) -> bool:
    """Whether a part of a message is an image's place: type image, or image_url."""
    return isinstance(part, dict) and str(part.get('type')).startswith('image')


def role_of(speaker) -> str:
    """The role of a speaker. Raises BadExample for one that has none, and names those of tools."""
    if speaker in TOOL_ROLES:
        raise BadExample(f'the role {speaker} belongs to tools, which are not supported')
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise BadExample(f'unknown speaker {speaker!r}')
    return SPEAKERS[speaker]


def from_llava(turns: list, images: bool = True) -> list[dict]:
    """LLaVA's [{'from': 'human', 'value': '<image>\\n…'}, …] as messages.

    An <image> in a question is an image's place; in an answer, or without `images`, the string is left as it stands.
    Raises BadExample for a speaker that is none of SPEAKERS.
    """
    messages = []
    for turn in turns:
        speaker, text = (turn.get('from'), turn.get('value')) if isinstance(turn, dict) else (None, '')
        role = role_of(speaker)
        if not isinstance(text, str):
            raise BadExample('a turn without text')
        message = {'role': role, 'content': text}
        if turn.get('kind') is not None:
            message['kind'] = turn['kind']
        if message['role'] == 'user' and images:
            message['content'] = split_at_images(text)
        messages.append(message)
    return messages


def split_at_images(text: str) -> str | list[dict]:
    """A question with an <image> wherever an image belongs, as parts; without any, the text itself.

    Line breaks beside an <image> go: a question about an image is asked without them.
    """
    if '<image>' not in text:
        return text
    first, *others = re.split(r'\n*<image>\n*', text)
    parts = [{'type': 'text', 'text': first}]
    for piece in others:
        parts += [{'type': 'image'}, {'type': 'text', 'text': piece}]
    return [part for part in parts if part['type'] == 'image' or part['text'].strip()]


def text_of(message: dict) -> str:
    """The words of a message, without its images."""
    content = message['content']
    return content if isinstance(content, str) else ' '.join(p['text'] for p in content if p['type'] == 'text').strip()


def split_of(messages: list[dict], images: list[bytes]) -> str:
    """'train', or 'validation' for the 5% whose first image's bytes or, without one, first question hash low.

    One rule for all conversations: the same image is in the same split in every file, data set and stage.
    """
    questions = (text_of(message).encode() for message in messages if message['role'] == 'user')
    content = images[0] if images else next(questions, b'')
    return 'validation' if hashes_low(content, 20) else 'train'


def hashes_low(content: bytes, one_in: int) -> bool:
    """Whether content is among the one in so many that is kept for validation, by a hash of its bytes."""
    return int(hashlib.sha256(content).hexdigest()[:8], 16) % one_in == 0
