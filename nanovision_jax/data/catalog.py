"""Names of data: prepared sets, a part of one (`magpie[:10%]`), several by weight (`llava_instruct:0.9,magpie:0.1`)."""

import re
from typing import NamedTuple

from nanovision_jax.errors import UserError, nearest

CONVERSATIONS = ('magpie', 'llava_pretrain', 'llava_instruct', 'cauldron', 'chat')  # prepare.py makes these,
PREPARED = (*CONVERSATIONS, 'fineweb_edu')  # and this one, of tokens


class Part(NamedTuple):
    """A prepared set: its name, which part of its training split ('' is all, else as in '[:10%]'), and its share."""

    name: str
    subset: str = ''
    weight: float = 1.0


def parse_source(text):
    """'name' or 'name[a:b]', as data.source has it, as a Part. Whether there is such a name is not asked."""
    name, bracket, inside = text.partition('[')
    if bracket and not re.fullmatch(r'(-?\d+%?)?:(-?\d+%?)?\]', inside):
        raise UserError(f'{text!r} is no part of a data set: say it as in {name}[:10%] or {name}[1000:2000].')
    return Part(name, bracket + inside)


def parse_mixture(text):
    """'name:weight,…', as data.mixture has it, as Parts whose weights add up to 1. Raises UserError."""
    parts = []
    for entry in text.split(','):
        source, _, weight = entry.strip().rpartition(':')
        part = parse_source(source) if ']' not in weight else Part('')
        try:
            part = part._replace(weight=float(weight))
        except ValueError:
            part = Part('')
        if not part.name or not 0 < part.weight < float('inf'):
            raise UserError(
                f'data.mixture: {entry.strip()!r} is not NAME:WEIGHT with a weight above 0, as in magpie:0.1.'
            )
        if part.name not in CONVERSATIONS:
            raise UserError(
                f'data.mixture: no prepared conversations {part.name!r}.{nearest(part.name, CONVERSATIONS)}'
            )
        parts.append(part)
    if len({part.name for part in parts}) < len(parts):
        raise UserError(f'data.mixture names a data set twice: {text}.')
    total = sum(part.weight for part in parts)
    return [part._replace(weight=part.weight / total) for part in parts]


def parts_of(data):
    """The prepared sets that a config's `data` names: those of its mixture, its source, or none."""
    if data.mixture:
        return parse_mixture(data.mixture)
    part = parse_source(data.source)
    return [part] if part.name in PREPARED else []


def bounds(subset, n):
    """(start, stop) in n things of a subset as in '[:10%]', '[1000:]' or '[-20%:]', cut to what there is."""
    if not subset:
        return 0, n

    def place(text, otherwise):
        if not text:
            return otherwise
        at = round(int(text[:-1]) * n / 100) if text.endswith('%') else int(text)
        return min(max(at + n if at < 0 else at, 0), n)

    start, stop = subset[1:-1].split(':')
    return place(start, 0), place(stop, n)
