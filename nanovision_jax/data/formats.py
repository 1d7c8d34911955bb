"""Files of rows: a JSON list, or JSON lines, of any size."""

import array
import json
import os
import pathlib
import re
import weakref

from nanovision_jax.data.conversation import BadExample
from nanovision_jax.errors import UserError

_SPACE = re.compile(r'[ \t\r\n]*')
_WINDOW = 1 << 20


class RowFile:
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
            try:
                json.loads(self._bytes(0))
            except (ValueError, RecursionError) as error:
                raise UserError(f'{path} is neither a JSON list nor JSON lines: {error}.') from error

    def _places(self):
        head = os.pread(self._file, 4096, 0)
        mark = 3 if head.startswith(b'\xef\xbb\xbf') else 0
        start = len(head) - len(head[mark:].lstrip())
        return self._of_list(start + 1) if head[start : start + 1] == b'[' else self._of_lines(mark)

    def _of_list(self, base):
        # Read as latin-1, one byte is one character: places in the text are places in the file.
        decoder, window, place = json.JSONDecoder(), _WINDOW, 0
        text = os.pread(self._file, window, base).decode('latin-1')
        if text[_SPACE.match(text).end() :].startswith(']'):
            return
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
                return
            place = after + 1

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

    def __iter__(self):
        """The rows in order, None for one that is no JSON."""
        for i in range(len(self)):
            try:
                yield self[i]
            except BadExample:
                yield None
