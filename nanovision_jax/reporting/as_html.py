"""The blocks of a report as HTML: one file that needs no other, no network and no scripts."""

import html
import re

from nanovision_jax.reporting import charts, tree
from nanovision_jax.reporting.style import STYLE

LONGEST = 2000  # signs of a text in a card, so that the page stays below 5 MB
OPTION = r"""(?<= )(--[^\s='"]+(?:=(?:'[^']*'|"[^"]*"|[^\s'"])*)?)"""  # of a command, with what is quoted


def page(title: str, blocks: list[tuple], about: str) -> str:
    """The whole page. about: what it says it is of, for programs that find it."""
    body = '\n'.join(map(block, blocks))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="generator" content="{html.escape(about)}">\n<title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    )


def block(told: tuple) -> str:
    """A block as HTML; every text in it is escaped here."""
    match told:
        case 'title', name, day:
            return f'<h1>{html.escape(name)}</h1>\n<p class="day">{html.escape(day)}</p>'
        case 'heading', text:
            return f'<h2>{html.escape(text)}</h2>'
        case 'subheading', text:
            return f'<h3>{html.escape(text)}</h3>'
        case 'text', text, kind:
            return f'<p class="{kind}">{html.escape(text)}</p>'
        case ('table' | 'words') as kind, header, rows:
            lines = [f'<tr>{"".join(f"<th>{html.escape(cell)}</th>" for cell in header)}</tr>']
            lines += [f'<tr>{"".join(f"<td>{_cell(cell)}</td>" for cell in row)}</tr>' for row in rows]
            return f'<div class="scroll"><table class="{kind}">\n' + '\n'.join(lines) + '\n</table></div>'
        case 'charts', found:
            size = 'small' if found[0].small else 'large'
            return f'<div class="charts {size}">\n' + '\n'.join(map(_chart, found)) + '\n</div>'
        case 'legend', names:
            return f'<p class="legend">{"".join(_key(name, i) for i, name in enumerate(names))}</p>'
        case 'confusions', tables:
            return '<div class="confusions">\n' + '\n'.join(_confusion(*table) for table in tables) + '\n</div>'
        case 'cards', cards:
            return '<div class="cards">\n' + '\n'.join(_card(*card) for card in cards) + '\n</div>'
        case 'patches', uri, across, words:
            return _patches(uri, across, words)
        case 'tree', nodes:
            return tree.draw(nodes)
        case 'commands', lines:
            # Without breaks within an option, between its dashes say.
            parts = re.split(OPTION, '\n'.join(lines))
            parts[1::2] = [f'<span>{html.escape(part)}</span>' for part in parts[1::2]]
            parts[::2] = map(html.escape, parts[::2])
            return f'<pre>{"".join(parts)}</pre>'
    raise ValueError(told[0])


def _cell(cell):
    """A table's cell: text, or (share, mark, low, high) as a bar; mark 0 is none, and so are low and high of None."""
    if isinstance(cell, str):
        return html.escape(cell)
    share, mark, *ends = (None if x is None else round(120 * min(max(x, 0), 1), 1) for x in cell)
    told = f'<rect class="mark" x="{mark - 0.75}" width="1.5" height="11"/>' if mark else ''
    if ends and None not in ends:
        told += f'<path class="mark" d="M{ends[0]} 5.5H{ends[1]}M{ends[0]} 3.5v4M{ends[1]} 3.5v4"/>'
    return (
        '<svg class="bar" width="120" height="11" role="img"><rect class="track" y="2" width="120" height="7"/>'
        f'<rect class="share" y="2" width="{share}" height="7"/>{told}</svg>'
    )


def _chart(chart):
    """A chart, and below it what it is of: a large one's ends in words, a small one's lines."""
    if not chart.small:
        told = '' if len(chart.lines) > 2 else f'<figcaption>{html.escape(charts.told(chart))}</figcaption>'
        return f'<figure>{charts.draw(chart)}{told}</figure>'
    keys = ''.join(_key(line.name, line.colour) for line in chart.lines) if len(chart.lines) > 1 else ''
    return f'<figure><figcaption>{html.escape(chart.title)} {keys}</figcaption>{charts.draw(chart)}</figure>'


def _key(name, colour):
    return f'<span class="key k{colour % charts.COLOURS}">{html.escape(name)}</span> '


def _confusion(kind, given, lines):
    """A table of how often each answer was given where each was wanted, darker where it was more often."""
    rows = [f'<tr><th>{html.escape(kind)}</th>{"".join(f"<th>{html.escape(name)}</th>" for name in given)}</tr>']
    for number, (wanted, counts) in enumerate(lines):
        cells = ''
        for place, count in enumerate(counts):
            share = round(100 * count / max(sum(counts), 1))
            side = 'right' if place == number else 'wrong'
            cells += f'<td class="{side}" style="--share:{share}%">{count or "·"}</td>'
        rows.append(f'<tr><th>{html.escape(wanted)}</th>{cells}</tr>')
    return '<div class="scroll"><table class="confusion">\n' + '\n'.join(rows) + '\n</table></div>'


def _card(uri, name, kind, turns):
    """An image and what is said about it."""
    lines = [f'<span class="kind">{html.escape(kind)}</span>'] if kind else []
    for question, answer, reference, correct in turns:
        question, answer, reference = (html.escape(text[:LONGEST]) for text in (question, answer, reference))
        tick = ' ✓' if correct == 1 and reference else ''
        lines.append(f'<p><span class="asked">{question}</span><br>{answer}{tick}</p>')
        if correct < 1:
            verdict = 'wrong' if correct == 0 else f'{correct:.0%} right'
            lines.append(f'<p class="wrong">✗ {verdict}; it is: {reference}</p>')
    size = 'small' if uri and uri.startswith('data:image/png') else 'large'
    shown = f'<img class="{size}" src="{uri}" alt="{html.escape(name)}">' if uri else ''
    return f'<figure>{shown}<figcaption>{"".join(lines)}</figcaption></figure>'


def _patches(uri, across, words):
    """A picture under the grid of its patches, and beside it the words of each at its place."""
    lines = ''.join(f'<path d="M{i} 0V{across}M0 {i}H{across}"/>' for i in range(1, across))
    grid = f'<svg class="grid" viewBox="0 0 {across} {across}">{lines}</svg>'
    cells = []
    for number, patch in enumerate(words):
        said = '<br>'.join(f'{html.escape(word)} <small>{cosine:.2f}</small>' for word, cosine in patch)
        cells.append(('<tr>' if number % across == 0 else '') + f'<td>{said}</td>')
    return (
        f'<div class="patches"><div class="picture"><img src="{uri}" alt="">{grid}</div>'
        f'<div class="scroll"><table class="confusion">{"".join(cells)}</table></div></div>'
    )
