"""Tokens as text while they come: whole characters alone, and nothing of a stop string."""

from collections.abc import Sequence


class TextStream:
    """Turns the tokens of an answer into pieces of text.

    What may be the beginning of a stop string, or of a character, waits. `stopped`: the stop string that came up.
    """

    def __init__(self, tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.ids, self.said, self.stopped = [], '', None
        self._done = 0  # ids before this one are told, and no character reaches over it
        self._told = ''  # the text of those

    def push(self, ids: Sequence[int], last: bool = False) -> str:
        """The text that further tokens add. last: no more will come, so nothing waits."""
        if self.stopped is not None:
            return ''
        self.ids += ids
        text = self._told + self.tokenizer.decode(self.ids[self._done :])
        if not text.endswith('\ufffd'):
            self._told, self._done = text, len(self.ids)
        elif not last:
            text = text.rstrip('\ufffd')
        found = [(text.find(stop, max(0, len(self.said) - len(stop) + 1)), stop) for stop in self.stops]
        found = [(place, stop) for place, stop in found if place >= 0]
        if found:
            place, self.stopped = min(found)
            text = text[:place]
        elif not last:
            text = text[: len(text) - self._held(text)]
        new = text[len(self.said) :]
        self.said += new
        return new

    def _held(self, text):
        """How many characters at the end of a text may begin a stop string."""
        return max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
