"""Anybody's conversations: JSON lines or parquet with `messages`, as chat APIs have them."""

import base64
import binascii

from nanovision_jax.data.conversation import BadExample, place_images
from nanovision_jax.data.datasets.conversations_builder import ConversationsBuilder
from nanovision_jax.data.datasets.files import picture_reader


class Chat(ConversationsBuilder):
    """`messages: [{role, content}]`, content a string or parts: text, image, image_url.

    A picture is a data: URI, the name of a file beside the rows, or bytes; an image part that says none of these, or an
    <image> in a question, takes the next of the row's `images`. Addresses on the web are not fetched. All JSON, JSON
    lines and parquet files of the folder are read, unless --files says which.
    """

    PATTERNS = ('*.jsonl', '*.parquet', '*.json')
    TOGETHER = True

    def rows(self):
        """Every row of the files."""
        self.picture = picture_reader(self.source)
        return super().rows()

    def example(self, row):
        """The messages in our parts, and the pictures in the order of their places."""
        if not isinstance(row, dict) or not isinstance(row.get('messages'), list):
            raise BadExample('a row without messages')
        stored = row.get('images') or row.get('image') or []
        stored = list(stored) if isinstance(stored, list) else [stored]
        messages, pictures = [], []
        for message in row['messages']:
            role, content = (message.get('role'), message.get('content')) if isinstance(message, dict) else (None, '')
            if isinstance(content, str) and role == 'user' and stored:
                content = place_images(content)
            if isinstance(content, list):
                parts = [part if isinstance(part, dict) else {} for part in content]
                for part in parts:
                    if str(part.get('type')).startswith('image'):
                        pictures.append(self._fetch(_reference(part) or (stored.pop(0) if stored else None)))
                content = [_plain(part) for part in parts]
            messages.append({'role': role, 'content': content})
        return messages, pictures + [self._fetch(reference) for reference in stored]

    def _fetch(self, reference):
        if isinstance(reference, dict):  # as parquet holds a picture
            reference = reference.get('bytes') or reference.get('path')
        if isinstance(reference, bytes):
            return reference
        if not isinstance(reference, str):
            raise BadExample('missing image')
        if reference.startswith('data:'):
            try:
                return base64.b64decode(reference.partition(',')[2], validate=True)
            except binascii.Error as error:
                raise BadExample('a picture that is no base64') from error
        if '://' in reference:
            raise BadExample(f'a picture on the web {reference!r}')
        return self.picture(reference)


def _reference(part):
    """What an image part says of its picture: OpenAI's image_url, or the keys of transformers."""
    found = next((part[key] for key in ('image_url', 'image', 'url', 'path') if part.get(key)), None)
    return found.get('url') or found if isinstance(found, dict) else found


def _plain(part):
    """A part with our keys only: parquet gives every part the keys of all."""
    if str(part.get('type')).startswith('image'):
        return {'type': 'image'}
    return {'type': part.get('type'), 'text': part.get('text')}
