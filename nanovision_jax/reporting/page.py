"""How the blocks of a report look as HTML, and as Markdown."""

import html
import itertools
import math
import re

STYLE = """
:root { color-scheme: light } * { box-sizing: border-box }
body { max-width: 50rem; margin: 0 auto; padding: 2.5rem 1.2rem 4rem; background: #fff; color: #1b1b1b;
  font: 1.05rem/1.55 Charter, 'Iowan Old Style', Georgia, 'Liberation Serif', serif }
h1 { font-size: 2.3rem; line-height: 1.1; margin: 0 } .day { color: #666; margin: .3rem 0 1.6rem }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 2.8rem 0 .6rem; break-after: avoid } p { margin: .6rem 0 }
.lead { font-size: 1.2rem; line-height: 1.5 } .verdict { border-left: 3px solid #2a5d8c; padding-left: .8rem }
.note, table, figure, pre, svg { font-family: system-ui, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif }
.note { font-size: .8rem; line-height: 1.45; color: #595959 } .scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .85rem; line-height: 1.35; font-variant-numeric: tabular-nums;
  border-bottom: 1px solid #999; min-width: 60% } table { break-inside: avoid }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; vertical-align: top } th:last-child, td:last-child {
  padding-right: 0 } th:first-child, td:first-child, .words th, .words td { text-align: left }
td { white-space: nowrap } .words { min-width: 44rem }
.words td:not(:first-child, :last-child) { white-space: normal }
th { font-weight: 600; border-top: 1px solid #999; border-bottom: 1px solid #999 } td svg { vertical-align: -1px }
.charts, .cards { display: grid; gap: 1.4rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)) }
.cards { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)) } figure { margin: 0; break-inside: avoid }
figcaption { font-size: .85rem; line-height: 1.4 } figcaption p { margin: .35rem 0 0 } .charts svg { width: 100% }
img { width: 128px; height: 128px; object-fit: contain; display: block; background: #f3f3f3 }
.small { image-rendering: pixelated } .kind { font-size: .75rem } .kind, .asked { color: #595959 }
.wrong { color: #a3281e }
pre { font: .75rem/1.6 ui-monospace, Menlo, 'Liberation Mono', monospace; white-space: pre-wrap; padding: .8rem 1rem;
  overflow-wrap: anywhere; background: #f5f5f3 } @media print { body { max-width: none; padding: 0; font-size: 10pt } }
"""


def html_page(title, blocks):
    """The whole page: self-contained, no scripts."""
    body = '\n'.join(map(html_block, blocks))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    )


def html_block(block):
    """A block as HTML; every text in it is escaped here."""
    match block:
        case 'title', name, day:
            return f'<h1>{html.escape(name)}</h1>\n<p class="day">{html.escape(day)}</p>'
        case 'heading', text:
            return f'<h2>{html.escape(text)}</h2>'
        case 'text', text, kind:
            return f'<p class="{kind}">{html.escape(text)}</p>'
        case ('table' | 'words') as kind, header, rows:
            lines = [f'<tr>{"".join(f"<th>{html.escape(cell)}</th>" for cell in header)}</tr>']
            lines += [f'<tr>{"".join(f"<td>{html_cell(cell)}</td>" for cell in row)}</tr>' for row in rows]
            return f'<div class="scroll"><table class="{kind}">\n' + '\n'.join(lines) + '\n</table></div>'
        case 'curves', curves:
            return '<div class="charts">\n' + '\n'.join(itertools.starmap(chart, curves)) + '\n</div>'
        case 'cards', cards:
            return '<div class="cards">\n' + '\n'.join(itertools.starmap(html_card, cards)) + '\n</div>'
        case 'commands', lines:
            return f'<pre>{html.escape(chr(10).join(lines))}</pre>'


def html_cell(cell):
    """A table's cell: text, or (share, mark) as a bar."""
    if isinstance(cell, str):
        return html.escape(cell)
    share, mark = (round(120 * min(max(x, 0), 1), 1) for x in cell)
    tick = f'<rect x="{mark - 0.75}" width="1.5" height="11" fill="#1b1b1b"/>' if mark else ''
    return (
        '<svg width="120" height="11" role="img"><rect y="2" width="120" height="7" fill="#e9e9e6"/>'
        f'<rect y="2" width="{share}" height="7" fill="#6f9fca"/>{tick}</svg>'
    )


def html_card(uri, name, kind, turns):
    """An image and what is said about it."""
    lines = [f'<span class="kind">{html.escape(kind)}</span>'] if kind else []
    for question, answer, reference, correct in turns:
        tick = ' ✓' if correct == 1 and reference else ''
        lines.append(f'<p><span class="asked">{html.escape(question)}</span><br>{html.escape(answer)}{tick}</p>')
        if correct < 1:
            verdict = 'wrong' if correct == 0 else f'{correct:.0%} right'
            lines.append(f'<p class="wrong">✗ {verdict}; it is: {html.escape(reference)}</p>')
    size = 'small' if uri and uri.startswith('data:image/png') else 'large'
    shown = f'<img class="{size}" src="{uri}" alt="{html.escape(name)}">' if uri else ''
    return f'<figure>{shown}<figcaption>{"".join(lines)}</figcaption></figure>'


def markdown_block(block):
    """A block as Markdown."""
    match block:
        case 'title', name, day:
            return f'# {plain(name)}\n\n{plain(day)}'
        case 'heading', text:
            return f'## {plain(text)}'
        case 'text', text, kind:
            return f'**{plain(text)}**' if kind == 'verdict' else plain(text)
        case 'table' | 'words', header, rows:
            lines = [header, ['---'] * len(header), *rows]
            return '\n'.join(f'| {" | ".join(map(plain, line))} |' for line in lines)
        case 'curves', curves:
            return '\n'.join(f'- {curve_text(*curve, points=5)}' for curve in curves)
        case 'cards', cards:
            return '\n'.join(
                f'- {plain(name)}: {plain(question)} **{plain(answer)}**'
                + (f' ✗ {correct:.0%} right; it is: {plain(reference)}' if correct < 1 else '')
                for _, name, _, turns in cards
                for question, answer, reference, correct in turns
            )
        case 'commands', lines:
            return '\n'.join(f'    {line}' for line in lines)


def plain(cell):
    """Text that Markdown shows as it is, on one line; a bar as ten signs."""
    if not isinstance(cell, str):
        return ('█' * round(10 * cell[0])).ljust(10, '░')
    return re.sub(r'([\\\\`*\[\]|])', r'\\\1', html.escape(' '.join(cell.split()), quote=False))


def curve_text(stage, train, validation, points):
    """A loss curve in words: training losses at a few points from the first to the last, and the last held-out one."""
    points = min(points, len(train) - 1) or 1
    some = [train[round(i * (len(train) - 1) / points)] for i in range(points + 1)]
    text = f'{stage}: ' + ', '.join(f'{loss:.3f} (step {step:,})' for step, loss in some)
    return text + (f'; held-out {validation[-1][1]:.3f}' if validation else '')


def ticks(low, high, log=False):
    """A few round numbers within a range."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        return [x for x in (m * 10.0**p for p in powers for m in (1, 2, 5)) if low <= x <= high]
    size = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(m * size for m in (5, 2, 1) if (high - low) / (m * size) >= 3)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(stage, train, validation):
    """A loss curve as SVG, logarithmic where the loss falls to less than a tenth."""
    steps, losses = zip(*train, *validation, strict=True)
    low, high, end = min(losses), max(losses), max(steps)
    log = 0 < 10 * low < high
    scale, room = (math.log if log else float), 0.05 * (high - low or 1)
    low, high = (low / 1.1, high * 1.1) if log else (low - room, high + room)

    def at(step, loss):
        return 40 + 310 * step / end, 165 - 157 * (scale(loss) - scale(low)) / (scale(high) - scale(low))

    parts = []
    for y, loss in ((at(0, loss)[1], loss) for loss in ticks(low, high, log)):
        parts.append(f'<path d="M40 {y:.1f}H350" stroke="#e6e6e3"/>')
        parts.append(f'<text x="34" y="{y + 3.5:.1f}" text-anchor="end">{loss:.3g}</text>')
    for x, step in ((at(step, high)[0], step) for step in ticks(0, end)):
        parts.append(f'<path d="M{x:.1f} 165v4" stroke="#999"/>')
        parts.append(f'<text x="{x:.1f}" y="180" text-anchor="middle">{step:,.0f}</text>')
    line = ' '.join(f'{x:.1f},{y:.1f}' for x, y in itertools.starmap(at, train))
    dots = ''.join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in itertools.starmap(at, validation))
    return (
        f'<figure><svg viewBox="0 0 360 200" role="img" font-size="10.5" fill="#444">{"".join(parts)}'
        '<path d="M40 165H350" stroke="#999"/><text x="195" y="196" text-anchor="middle">step</text>'
        f'<text transform="translate(9 86) rotate(-90)" text-anchor="middle">loss{" (log)" * log}</text>'
        f'<polyline points="{line}" fill="none" stroke="#2a5d8c" stroke-width="1.4" stroke-linejoin="round"/>'
        f'<g fill="#c8601a" stroke="#fff">{dots}</g></svg>'
        f'<figcaption>{html.escape(curve_text(stage, train, validation, points=1))}</figcaption></figure>'
    )
