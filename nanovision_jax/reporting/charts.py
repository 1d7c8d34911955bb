"""Line charts as SVG, whose values are told where the pointer is: by CSS alone, without scripts."""

import html
import itertools
import math
from typing import NamedTuple

COLOURS = 6  # that the style sheet has
HOVERED = {False: 80, True: 40}  # places of a chart that tell their values; of a small one


class Line(NamedTuple):
    """Points (x, y) in the order of x, as a line or as dots."""

    name: str
    points: list[tuple[float, float]]
    colour: int = 0
    dots: bool = False


class Chart(NamedTuple):
    """Lines over one axis. y: what is measured; from_zero: whether its axis begins there."""

    title: str
    y: str
    lines: list[Line]
    x: str = 'step'
    small: bool = False
    from_zero: bool = False


def number(value: float) -> str:
    """A value in few digits, whole from 1,000 on."""
    return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'


def short(value: float) -> str:
    """A round number of an axis."""
    for least, size, sign in ((1e9, 1e9, 'G'), (1e6, 1e6, 'M'), (1e4, 1e3, 'k')):
        if abs(value) >= least:
            return f'{value / size:.4g}{sign}'
    return f'{value:,.4g}'


def place(x: str, value: float) -> str:
    """A place of the x axis in words: 'step 1,000', '0.25 hours'."""
    return f'step {value:,.0f}' if x == 'step' else f'{number(value)} {x}'


def told(chart: Chart, points: int = 1) -> str:
    """A chart in words: lines at a few points from the first to the last, of dots the last."""
    lines = []
    for line in chart.lines:
        at = min(points, len(line.points) - 1)
        some = [line.points[round(i * (len(line.points) - 1) / at)] for i in range(at + 1)] if at else line.points[-1:]
        some = some[-1:] if line.dots else some
        values = ', '.join(f'{_value(y)} ({place(chart.x, x)})' for x, y in some)
        lines.append(f'{line.name} {values}'.strip())
    return f'{chart.title}: {"; ".join(lines)}'


def _value(y):
    return f'{y:.3f}' if 0.001 <= abs(y) < 100 else number(y)


def thin(points: list, most: int) -> list:
    """At most about so many points, of each stretch the lowest and the highest: no peak is lost."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most / 2))
    kept = []
    for some in (points[start : start + size] for start in range(0, len(points), size)):
        ends = {some.index(min(some, key=lambda p: p[1])), some.index(max(some, key=lambda p: p[1]))}
        kept += [some[i] for i in sorted(ends)]
    return [*kept, *(points[-1:] if kept[-1] != points[-1] else [])]


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """A few round numbers within a range."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        found = [x for x in (m * 10.0**p for p in powers for m in (1, 2, 5)) if low <= x <= high]
        return found if len(found) <= 6 else [x for x in found if round(math.log10(x), 6).is_integer()]
    size = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(m * size for m in (5, 2, 1) if (high - low) / (m * size) >= 3)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def draw(chart: Chart) -> str:
    """A chart as SVG, logarithmic where its values span more than a factor of ten."""
    width, height = (250, 128) if chart.small else (360, 204)
    left, right, top, bottom = 40, width - 8, 20, height - 20
    lines = [line._replace(points=thin(line.points, 400)) for line in chart.lines]
    xs, ys = zip(*(point for line in lines for point in line.points), strict=True)
    low, high, end = min(ys), max(ys), max(xs) or 1
    log = not chart.from_zero and 0 < 10 * low < high
    scale, room = (math.log if log else float), 0.05 * (high - low or abs(high) or 1)
    low, high = (low / 1.1, high * 1.1) if log else (0 if chart.from_zero and low >= 0 else low - room, high + room)

    def at(x, y):
        share = (scale(y) - scale(low)) / (scale(high) - scale(low))
        return left + (right - left) * x / end, bottom - (bottom - top) * share

    parts = []
    for value in ticks(low, high, log):
        y = at(0, value)[1]
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 3.5:.1f}" text-anchor="end">{short(value)}</text>')
    for value in ticks(0, end):
        x = at(value, high)[0]
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        anchor = 'end' if x > right - 12 else 'middle'
        parts.append(f'<text x="{min(x, right):.1f}" y="{bottom + 15}" text-anchor="{anchor}">{short(value)}</text>')
    parts.append(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
    over = '' if chart.small else ' over steps' if chart.x == 'step' else f' over {chart.x}'
    parts.append(f'<text x="0" y="9">{html.escape(chart.y)}{" (log)" * log}{over}</text>')
    for line in lines:
        places = list(itertools.starmap(at, line.points))
        if line.dots or len(places) == 1:
            dots = ''.join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{2.5 if chart.small else 3.2}"/>' for x, y in places)
            parts.append(f'<g class="dots f{line.colour % COLOURS}">{dots}</g>')
        else:
            joined = ' '.join(f'{x:.1f},{y:.1f}' for x, y in places)
            parts.append(f'<polyline class="s{line.colour % COLOURS}" points="{joined}"/>')
    parts += _hover(chart, lines, at, (left, right, top, bottom))
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(told(chart))}">'
        f'{"".join(parts)}</svg>'
    )


def _hover(chart, lines, at, box):
    """Strips that together cover the chart; the one below the pointer shows the values there."""
    left, right, top, bottom = box
    places = sorted({x for line in lines for x, _ in line.points})
    most = HOVERED[chart.small]
    if len(places) > most:
        places = [places[round(i * (len(places) - 1) / (most - 1))] for i in range(most)]
    middles = [at(x, lines[0].points[0][1])[0] for x in places]
    ends = [left, *((a + b) / 2 for a, b in itertools.pairwise(middles)), right]
    for x, middle, start, stop in zip(places, middles, ends, ends[1:], strict=False):
        found = [(line, near) for line in lines if (near := _near(line, x))]
        shown = ''.join(f'<tspan class="f{line.colour % COLOURS}" dx="7">{_value(y)}</tspan>' for line, (_, y) in found)
        names = '\n'.join(f'{line.name or chart.y} {_value(y)}' for line, (_, y) in found)
        yield (
            f'<g class="at"><title>{html.escape(f"{place(chart.x, x)}{chr(10)}{names}")}</title>'
            f'<rect x="{start:.1f}" y="0" width="{max(stop - start, 0.1):.1f}" height="{bottom}"/>'
            f'<path d="M{middle:.1f} {top}V{bottom}"/><text x="{right}" y="9" text-anchor="end">{place(chart.x, x)}'
            f'{shown}</text></g>'
        )


def _near(line, x):
    """The point of a line nearest to x, within its ends; of dots the one that is there."""
    if line.dots:
        return next((point for point in line.points if point[0] == x), None)
    if not line.points[0][0] <= x <= line.points[-1][0]:
        return None
    return min(line.points, key=lambda point: abs(point[0] - x))
