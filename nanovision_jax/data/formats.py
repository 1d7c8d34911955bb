"""Files of rows: a JSON list, JSON lines or parquet; and the forms of conversations that a row may have.

Forms are ShareGPT's and LLaVA's `conversations: [{from, value}]`, and `messages: [{role, content}]` with strings, in
which <image> is an image's place where the row has `images` (LLaMA-Factory), or parts, which may carry their image
(transformers, OpenAI).
"""

import array
import collections
import contextlib
import json
import os
import pathlib
import re
import weakref

import pyarrow.parquet

from nanovision_jax.data.conversation import BadExample, check, from_llava, is_image, role_of, split_at_images
from nanovision_jax.data.text import check_text
from nanovision_jax.errors import UserError

_SPACE = re.compile(r'[ \t\r\n]*')
_WINDOW = 1 << 20
MAX_TABLE = 512 << 20  # bytes of a parquet file that is kept in memory
# Forms that are not taken, by the columns that tell them.
OTHER_FORMS = {
    "Alpaca's instruction, input and output": ('instruction', 'output'),
    'prompt and completion': ('prompt', 'completion'),
    'preferences, chosen and rejected': ('chosen', 'rejected'),
}
FORMS = 'conversations: [{from, value}] (ShareGPT, LLaVA) and messages: [{role, content}] (OpenAI, LLaMA-Factory)'


def open_rows(path) -> 'Rows':
    """The rows of a file by number, in threads: of parquet, JSON or JSON lines.

    Raises UserError where it is none of these, and where the first row tells of a form that is not taken.
    """
    rows = ParquetFile(path) if pathlib.Path(path).suffix == '.parquet' else RowFile(path)
    if len(rows):
        with contextlib.suppress(BadExample):  # one bad row, which is counted where all are read
            check_form(rows[0], path)
    return rows


class Rows:
    """The rows of a file by number: len(rows), rows[i], which raises BadExample for a row that cannot be read."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i):
        raise NotImplementedError

    def __iter__(self):
        """The rows in order, None for one that cannot be read."""
        for i in range(len(self)):
            try:
                yield self[i]
            except BadExample:
                yield None


class RowFile(Rows):
    """The rows of a JSON list or of JSON lines, each read where it lies when it is asked for. Safe in threads.

    Held in memory are two numbers a row and, while the file is opened, a window of 1 MiB or of the largest row.
    Raises UserError where the file is neither; what is no JSON further down is a bad row.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f'{path} cannot be read: {error.strerror}.') from error
        weakref.finalize(self, os.close, self._file)
        self._starts, self._stops = array.array('q'), array.array('q')
        self._size = os.fstat(self._file).st_size
        for start, stop in self._places():
            self._starts.append(start)
            self._stops.append(stop)
        if self._starts:
            self._check_first()

    def _check_first(self):
        told = f'{self.path} is neither a JSON list nor JSON lines'
        try:
            row = json.loads(self._bytes(0))
        except (ValueError, RecursionError) as error:
            row = self._object()
            if row is None:
                raise UserError(f'{told}: {error}.') from error
            if not _list_of_rows(row):
                how = 'write each row on a line of its own'
                raise UserError(f'{told}, but a JSON object of several lines: {how}.') from error
        else:
            row = row if len(self) == 1 else None
        if name := _list_of_rows(row):
            raise UserError(f'{told}, but a JSON object with the rows under {name!r}: write that list alone to a file.')

    def _object(self):
        """The whole file, if it is one JSON object. None for anything else."""
        if self._size > 1 << 28:
            return None
        try:
            whole = json.loads(os.pread(self._file, self._size, 0))
        except (ValueError, RecursionError):
            return None
        return whole if isinstance(whole, dict) else None

    def _places(self):
        head = os.pread(self._file, 4096, 0)
        check_text(head, self.path)
        mark = 3 if head.startswith(b'\xef\xbb\xbf') else 0
        start = len(head) - len(head[mark:].lstrip())
        return self._of_list(start + 1) if head[start : start + 1] == b'[' else self._of_lines(mark)

    def _of_list(self, base):
        # Read as latin-1, one byte is one character: places in the text are places in the file.
        decoder, window, place = json.JSONDecoder(), _WINDOW, 0
        text = os.pread(self._file, window, base).decode('latin-1')
        if text[(first := _SPACE.match(text).end()) :].startswith(']'):
            return self._check_end(base + first + 1)
        while True:
            begin = _SPACE.match(text, place).end()
            try:
                end = decoder.raw_decode(text, begin)[1]
                after = _SPACE.match(text, end).end()
                if text[after] not in ',]':
                    raise ValueError('no comma')
            except (ValueError, IndexError, RecursionError) as error:
                if base + len(text) >= self._size:
                    raise UserError(
                        f'{self.path} is neither a JSON list nor JSON lines: what begins at byte {base + begin + 1} is '
                        'no JSON, or is not whole.'
                    ) from error
                # Perhaps only the window ends here.
                window, base, place = window if place else 2 * window, base + place, 0
                text = os.pread(self._file, window, base).decode('latin-1')
                continue
            yield base + begin, base + end
            if text[after] == ']':
                return self._check_end(base + after + 1)
            place = after + 1

    def _check_end(self, at):
        """Raises UserError where anything but white space follows a list: rows would be dropped without a word."""
        while data := os.pread(self._file, _WINDOW, at):
            if rest := data.lstrip(b' \t\r\n'):
                raise UserError(
                    f'{self.path} goes on behind the end of its JSON list, at byte {at + len(data) - len(rest) + 1}: '
                    'write one list alone to a file.'
                )
            at += len(data)

    def _of_lines(self, mark):
        with open(self.path, 'rb') as lines:
            lines.seek(mark)
            at = mark
            for line in lines:  # only \n ends one: a string may hold the other line breaks of Unicode
                if line.strip():
                    yield at, at + len(line)
                at += len(line)

    def _bytes(self, i):
        return os.pread(self._file, self._stops[i] - self._starts[i], self._starts[i])

    def __len__(self):
        return len(self._starts)

    def __getitem__(self, i):
        try:
            return json.loads(self._bytes(i))
        except UnicodeDecodeError as error:
            raise BadExample('a row that is not UTF-8') from error
        except (ValueError, RecursionError) as error:
            raise BadExample('a row that is no JSON') from error


def _list_of_rows(row):
    """Under which name a JSON object holds a list of objects, if it is no row itself. None for none."""
    if not isinstance(row, dict) or {'conversations', 'messages'} & row.keys():
        return None
    lists = (key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict))
    return next(lists, None)


class ParquetFile(Rows):
    """The rows of a parquet file, held in memory as columns. Raises UserError beyond MAX_TABLE bytes."""

    def __init__(self, path):
        opened = open_parquet(path)
        groups = (opened.metadata.row_group(group) for group in range(opened.num_row_groups))
        if (size := sum(group.total_byte_size for group in groups)) > MAX_TABLE:
            raise UserError(
                f'{path} unpacks to {size >> 20:,} MiB, of which {MAX_TABLE >> 20} are held in memory: run python -m '
                f'nanovision_jax.prepare chat --from={path}, and train with data.source=chat.'
            )
        try:
            self._table = opened.read(use_threads=False)
        except (OSError, ValueError) as error:
            raise UserError(f'{path} is damaged: {str(error).splitlines()[0]}.') from error

    def __len__(self):
        return len(self._table)

    def __getitem__(self, i):
        return row_of(self._table, i)


def row_of(table, i):
    """Row i of a pyarrow table or batch. Raises BadExample where a string in it is not UTF-8: pyarrow does not look."""
    try:
        return table.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        raise BadExample('a row that is not UTF-8') from error


def open_parquet(file):
    """A pyarrow ParquetFile. Raises UserError for what is none."""
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f'{file} is no parquet file that can be read: {str(error).splitlines()[0]}.') from error


def check_form(row, path):
    """Raises UserError where a file's first row is of a form that is known, and not taken."""
    if isinstance(row, dict) and not {'conversations', 'messages'} & row.keys():
        for form, columns in OTHER_FORMS.items():
            if set(columns) <= row.keys():
                raise UserError(f'the rows of {path} are in the form of {form}: the forms taken are {FORMS}.')


def read_row(row) -> tuple[list[dict], list]:
    """(messages, references) of a row: conversation.py's messages, and what the row says of each image, in order.

    A reference is a name, an address, bytes or {bytes, path}: see image_names.fetch. A part that carries none, and an
    <image> in a question, take the next of the row's `image` or `images`. Raises BadExample where there is no
    conversation, and where the row asks for what is not supported.
    """
    if not isinstance(row, dict):
        raise BadExample('a row that is no JSON object')
    if not {'conversations', 'messages'} & row.keys():
        raise BadExample('a row without conversations or messages')
    turns = row.get('conversations') or row.get('messages') or []
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadExample('turns that are no JSON objects')
    for key in ('video', 'videos', 'audio', 'audios'):
        if _found(row, key):
            raise BadExample(f'a row with {key}, which is not supported')
    waiting = collections.deque(images_of(row))
    # Not only where there is an image: without its image a question about one would be learned as text.
    messages, references, places = [], [], not row.keys().isdisjoint(('image', 'images'))
    for turn in turns:
        message = from_llava([turn])[0] if turn.get('from') is not None else _message(turn, places)
        if message['role'] == 'assistant' and turn.get('weight') == 0:  # OpenAI's mark of what is not to be learned
            raise BadExample('an answer with weight 0: answers that are not learned are not supported')
        content = message['content']
        for part in filter(is_image, content if isinstance(content, list) else ()):
            reference = _carried(part)
            if reference is None and waiting:
                reference = waiting.popleft()
            if reference is not None:  # else there are fewer images than places, as encode says
                references.append(reference)
        if isinstance(content, list):
            message['content'] = [_plain(part) for part in content]
        messages.append(message)
    system = row.get('system')  # beside ShareGPT's turns
    if not isinstance(system, str) and not _is_nothing(system):
        raise BadExample('a system that is no text')
    if isinstance(system, str) and system.strip() and messages and messages[0]['role'] != 'system':
        messages.insert(0, {'role': 'system', 'content': system})
    check(messages)
    return messages, [*references, *waiting]


def images_of(row) -> list:
    """What a row's `image` or `images` says, as a list; see _is_nothing for what is no image."""
    return (_found(row, 'image') or _found(row, 'images')) if isinstance(row, dict) else []


def has_images(row) -> bool:
    """Whether a row has images, as far as it can be read."""
    try:
        return bool(images_of(row) or read_row(row)[1])
    except BadExample:
        return False


def _found(row, key):
    """What a row has in a column, as a list, without what is nothing."""
    value = row.get(key)
    return [one for one in (value if isinstance(value, list) else [value]) if not _is_nothing(one)]


def _is_nothing(value):
    """Whether a value says nothing: null, '', pandas' NaN, and an image of parquet without bytes and path."""
    if isinstance(value, dict):
        return value.keys() <= {'bytes', 'path'} and all(map(_is_nothing, value.values()))
    return value is None or value == '' or value != value


def _message(turn, places):
    """A message of ours; `places`: an <image> in a question is an image's place."""
    role, content = role_of(turn.get('role')), turn.get('content')
    if turn.get('tool_calls'):
        raise BadExample('tool_calls belong to tools, which are not supported')
    if isinstance(content, str) and role == 'user' and places:
        content = split_at_images(content)
    message = {'role': role, 'content': content}
    return message if turn.get('kind') is None else message | {'kind': turn['kind']}


def _carried(part):
    """The image that a part carries: OpenAI's image_url, or the keys of transformers. None for none."""
    found = next((part[key] for key in ('image_url', 'image', 'url', 'path') if not _is_nothing(part.get(key))), None)
    return found.get('url') or found if isinstance(found, dict) else found


def _plain(part):
    """A part with our keys only: parquet gives every part the keys of all."""
    if is_image(part):
        return {'type': 'image'}
    if isinstance(part, str):
        return {'type': 'text', 'text': part}
    return {'type': part.get('type'), 'text': part.get('text')} if isinstance(part, dict) else {}
