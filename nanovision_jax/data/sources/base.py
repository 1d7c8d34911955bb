"""What a source of examples is."""

import dataclasses

import numpy as np

from nanovision_jax.data.conversation import text_of


@dataclasses.dataclass
class Example:
    """A conversation (see conversation.py), the encoded images it speaks of, and their names."""

    id: str
    messages: list[dict]
    images: list[bytes]
    names: list[str]

    @property
    def caption(self) -> str:
        """What contrastive learning pairs with the image: the first answer."""
        return next((text_of(m) for m in self.messages if m['role'] == 'assistant'), '')


class Source:
    """A sequence of Examples: len(source), source[i]. Raises BadExample for a row that is none.

    It opens its files when it is first used, so that a data worker gets only paths. Reading is thread-safe.
    """

    name = ''  # of a prepared set
    decoded = False  # whether every image is known to decode
    text_only = False  # whether rows with an image are to be passed over
    mixes_splits = False  # whether rows of train and validation are mixed: split_of() tells them apart

    @property
    def key(self) -> str:
        """What the content depends on; not where it lies, so that data may be moved."""
        raise NotImplementedError

    @property
    def stamps(self) -> tuple[str, np.ndarray] | None:
        """(what the content depends on but for pictures in files of their own, uint64 [n]: a number for each row of
        what its pictures are). Sources with equal keys have equal ones. None where no picture has a file of its own.
        """
        return None

    @property
    def pictures(self) -> str:
        """What the pictures of its rows depend on, whatever is said of them."""
        return self.key

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i) -> Example:
        raise NotImplementedError

    def number(self, i: int):
        """What row i is called in a list of bad rows."""
        return i

    def without_images(self, i: int) -> Example | None:
        """Row i without its images, which may be missing; None where it is no conversation, or they are not apart."""
        return None

    def split_of(self, example: Example) -> str:
        """'train' or 'validation', where both are mixed."""
        raise NotImplementedError

    def likely_split_of(self, i: int) -> str:
        """The same of a row that cannot be read, for counting."""
        raise NotImplementedError


class Concatenated(Source):
    """Several sources one after the other, as one."""

    def __init__(self, parts: list[Source]):
        self.parts = parts
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    @property
    def key(self) -> str:
        """As Source.key."""
        return ' and '.join(part.key for part in self.parts)

    @property
    def pictures(self) -> str:
        """As Source.pictures."""
        return ' and '.join(part.pictures for part in self.parts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i) -> Example:
        part = int(np.searchsorted(self.starts, i, side='right')) - 1
        return self.parts[part][int(i) - int(self.starts[part])]
