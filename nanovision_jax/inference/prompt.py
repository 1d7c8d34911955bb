"""Prompts: conversations and texts as the ids and images that the engine takes."""

import re

import numpy as np

from nanovision_jax.data import conversation
from nanovision_jax.data.images import prepare, to_rgb
from nanovision_jax.errors import UserError
from nanovision_jax.inference.engine import Prompt


def text_prompt(tokenizer, text) -> Prompt:
    """The beginning of a document, for a model to continue. Raises UserError for what is no text."""
    if not isinstance(text, str) or re.search('[\ud800-\udfff]', text):  # a byte that was no character, say
        raise UserError(f'{text!a:.60} cannot be continued: text that is not Unicode.')
    return Prompt(np.array([tokenizer.end_of_text, *tokenizer.encode(text)], np.int32), [])


def chat_prompt(config, tokenizer, messages: list, images=()) -> Prompt:
    """A conversation that ends with a question. images: PIL images, in the order of the messages' image parts.

    Images for which no message has a part go before the first question. Raises UserError for a conversation that makes
    no sense.
    """
    ids = chat_ids(config, tokenizer, messages, len(images))
    return Prompt(ids, [prepare(to_rgb(image), config.model.vision) for image in images])


def chat_ids(config, tokenizer, messages: list, images: int) -> np.ndarray:
    """The token ids of a conversation about so many images: see chat_prompt()."""
    try:
        conversation.check(messages)
        messages = with_image_parts(messages, images)
        return conversation.encode(messages, tokenizer, [config.model.vision.patches] * images, question=True).ids
    except conversation.BadExample as error:
        raise UserError(f'this conversation cannot be answered: {error}.') from error


def with_image_parts(messages: list[dict], count: int) -> list[dict]:
    """Messages with an image part for each of `count` images: those without one go before the first question."""
    if messages and messages[0]['role'] == 'system':
        return [messages[0], *with_image_parts(messages[1:], count)]
    parts = [p for m in messages if not isinstance(m['content'], str) for p in m['content'] if p['type'] == 'image']
    missing = count - len(parts)
    if missing <= 0 or not messages:
        return messages
    first, *rest = messages
    content = first['content']
    content = [{'type': 'text', 'text': content}] if isinstance(content, str) else list(content)
    return [first | {'content': [{'type': 'image'}] * missing + content}, *rest]
