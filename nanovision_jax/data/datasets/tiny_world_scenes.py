"""tiny_world's scenes: which things there are, which pairs are unseen, how a scene is chosen and drawn."""

from typing import NamedTuple

import numpy as np

SHAPES = ('circle', 'square', 'triangle', 'diamond', 'cross', 'ring')
COLOURS = ('red', 'green', 'blue', 'yellow', 'purple', 'orange', 'white', 'black')
SIZES = ('small', 'large')
# Reading order. No place name holds another one, so that a place is found by plain text search.
PLACES = (
    'top left',
    'top middle',
    'top right',
    'middle left',
    'centre',
    'middle right',
    'bottom left',
    'bottom middle',
    'bottom right',
)
PIXELS = 60
RGB = {
    'red': (215, 30, 40),
    'green': (30, 165, 60),
    'blue': (35, 75, 225),
    'yellow': (250, 230, 40),
    'purple': (155, 40, 195),
    'orange': (250, 135, 20),
    'white': (248, 248, 248),
    'black': (15, 15, 15),
}
ACROSS = {'small': (9.0, 10.0), 'large': (15.0, 16.0)}  # pixels from edge to edge

_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
# A step of 3 through the 8 colours visits seven different ones, while the shapes go round once and a bit.
UNSEEN = tuple((COLOURS[(3 * k + 4) % 8], SHAPES[k % 6]) for k in range(7))
SEEN = tuple(pair for pair in _PAIRS if pair not in UNSEEN)


class Thing(NamedTuple):
    """One object of a scene, in the words of SIZES, COLOURS, SHAPES and PLACES."""

    size: str
    colour: str
    shape: str
    place: str

    @property
    def pair(self) -> tuple[str, str]:
        """Colour and shape: what the held-out rule is about."""
        return self.colour, self.shape


def heldout_pairs() -> tuple[tuple[str, str], ...]:
    """The seven unseen (colour, shape) pairs: no colour loses more than one pair, no shape more than two."""
    return UNSEEN


def pick(rng, options):
    """One of `options`, all as likely."""
    return options[rng.integers(len(options))]


def choose_scene(rng, heldout):
    """A scene: one to three things in reading order, each in a cell and a colour-shape pair of its own."""
    n = pick(rng, (1, 1, 2, 2, 2, 3, 3, 3))
    allowed = _PAIRS if heldout else SEEN
    pairs = []
    if heldout:
        pairs.append(pick(rng, UNSEEN))
        if n == 3 and rng.random() < 0.75:
            # Two seen things that would recombine into another unseen pair: a hard 'No.' for an existence question.
            colour, shape = pick(rng, [pair for pair in UNSEEN if pair != pairs[0]])
            pairs.append(pick(rng, [pair for pair in SEEN if pair[0] == colour]))
            pairs.append(pick(rng, [pair for pair in SEEN if pair[1] == shape]))
    while len(pairs) < n:
        colour, shape = pick(rng, allowed)
        if pairs:
            # Things often share a colour or a shape, so that one word is not enough to tell them apart.
            other, share = pick(rng, pairs), rng.random()
            colour = other[0] if share < 0.25 else colour
            shape = other[1] if 0.25 <= share < 0.5 else shape
        if (colour, shape) in allowed and (colour, shape) not in pairs:
            pairs.append((colour, shape))
    cells = rng.permutation(9)[:n]
    order = np.argsort(cells)
    return [Thing(pick(rng, SIZES), *pairs[i], PLACES[cells[i]]) for i in order]


def render(things: list[Thing], rng: np.random.Generator) -> np.ndarray:
    """Draw a scene as (60, 60, 3) uint8: muted background, soft gradient, mild noise, anti-aliased things."""
    axis = np.arange(PIXELS, dtype=np.float32) + 0.5
    # Mid grey with a tint: at least 70 levels from white and from black in every channel.
    base = (rng.uniform(95, 145) + rng.uniform(-12, 12, 3)).astype(np.float32)
    slope = rng.uniform(-15, 15, 2).astype(np.float32) * rng.integers(2)
    ramp = axis / PIXELS - 0.5
    image = base + (slope[0] * ramp[:, None] + slope[1] * ramp)[..., None]
    for thing in things:
        row, column = divmod(PLACES.index(thing.place), 3)
        half = rng.uniform(*ACROSS[thing.size]) / 2
        room = min(2.0, PIXELS / 6 - half - 0.4)
        dy, dx = rng.uniform(-room, room, 2)
        y, x = (row + 0.5) * PIXELS / 3 + dy, (column + 0.5) * PIXELS / 3 + dx
        # Nothing reaches beyond its cell, so only the cell is drawn.
        rows, columns = (slice(i * PIXELS // 3, (i + 1) * PIXELS // 3 + 1) for i in (row, column))
        distance = _distance(thing.shape, axis[columns] - np.float32(x), axis[rows, None] - np.float32(y), half)
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        colour = np.clip(np.array(RGB[thing.colour]) + rng.uniform(-10, 10, 3), 0, 255).astype(np.float32)
        image[rows, columns] += cover * (colour - image[rows, columns])
    # One noise value for all three channels keeps the PNG small.
    image += rng.integers(-1, 2, (PIXELS, PIXELS, 1))
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def _distance(shape, x, y, half):
    """Signed distance in pixels to the edge of a shape around (0, 0), negative inside; x: (W,), y: (H, 1)."""
    if shape == 'circle':
        return np.hypot(x, y) - half
    if shape == 'ring':
        return np.abs(np.hypot(x, y) - 0.73 * half) - 0.27 * half
    x = np.abs(x)
    if shape == 'triangle':
        # Two slanted sides that meet at the top, and a flat bottom.
        return np.maximum((2 * x - y - half) / 5**0.5, y - half)
    y = np.abs(y)
    if shape == 'square':
        return np.maximum(x, y) - half
    if shape == 'diamond':
        return (x + y - half) / 2**0.5
    arm = 0.34 * half
    return np.minimum(np.maximum(x - half, y - arm), np.maximum(x - arm, y - half))
