"""The blocks of a report as Markdown."""

import html
import re

from nanovision_jax.reporting import charts


def page(blocks: list[tuple]) -> str:
    """The whole page."""
    return '\n\n'.join(map(block, blocks)) + '\n'


def block(told: tuple) -> str:
    """A block as Markdown."""
    match told:
        case 'title', name, day:
            return f'# {plain(name)}\n\n{plain(day)}'
        case 'heading', text:
            return f'## {plain(text)}'
        case 'subheading', text:
            return f'### {plain(text)}'
        case 'text', text, kind:
            return f'**{plain(text)}**' if kind == 'verdict' else plain(text)
        case 'table' | 'words', header, rows:
            return _table(header, rows)
        case 'charts', found:
            return '\n'.join(f'- {plain(charts.told(chart, points=1 if chart.small else 5))}' for chart in found)
        case 'legend', names:
            return 'Runs: ' + ', '.join(map(plain, names))
        case 'confusions', tables:
            return '\n\n'.join(
                _table((kind, *given), [(wanted, *map(str, counts)) for wanted, counts in lines])
                for kind, given, lines in tables
            )
        case 'cards', cards:
            return '\n'.join(
                f'- {plain(name)}: {plain(question)} **{plain(answer)}**'
                + (f' ✗ {correct:.0%} right; it is: {plain(reference)}' if correct < 1 else '')
                for _, name, _, turns in cards
                for question, answer, reference, correct in turns
            )
        case 'patches', _, across, words:
            said = [', '.join(f'{plain(word)} {cosine:.2f}' for word, cosine in patch) for patch in words]
            rows = [said[start : start + across] for start in range(0, len(said), across)]
            return _table([f'column {i + 1}' for i in range(across)], rows, escaped=True)
        case 'tree', nodes:
            return '\n'.join(f'- {plain(node.name)}: {plain(node.told)}' for node in nodes)
        case 'commands', lines:
            return '\n'.join(f'    {line}' for line in lines)
    raise ValueError(told[0])


def _table(header, rows, escaped=False):
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join(f'| {" | ".join(line if escaped else map(plain, line))} |' for line in lines)


def plain(cell) -> str:
    """Text that Markdown shows as it is, on one line; a bar as ten signs."""
    if not isinstance(cell, str):
        return ('█' * round(10 * cell[0])).ljust(10, '░')
    return re.sub(r'([\\\\`*\[\]|])', r'\\\1', html.escape(' '.join(cell.split()), quote=False))
