"""The family tree of runs, from the blank page to the last: a line each, with lanes for what meets later."""

import html
import pathlib
from typing import NamedTuple

from nanovision_jax.reporting.runs import Run
from nanovision_jax.runs import folder as runfolder

BLANK = 'blank page'
STEP, LANE, TEXT = 42, 16, 6  # of the drawing: between lines, between lanes, from the last lane to the text


class Node(NamedTuple):
    """A line of the tree. parents: places of earlier lines; lane: from 0 on."""

    name: str
    told: str
    parents: tuple[int, ...] = ()
    lane: int = 0


def ancestry(runs: list[Run]) -> list[Node]:
    """The Nodes of runs and all that they came from, as far as lineage.json tells it, parents first."""
    nodes, places, lanes = [Node(BLANK, 'random weights')], {}, [0]
    own = {run_.folder.resolve(): run_.name for run_ in runs}
    family = runs[-1].folder.resolve().parent

    def named(folder):
        return own.get(folder) or (folder.name if folder.parent == family else f'{folder.parent.name}/{folder.name}')

    def visit(folder, lane):
        if folder in places:
            return places[folder]
        places[folder] = None  # a circle, which no run can be in, ends here
        record = runfolder.read_lineage(folder)
        parents, parts = [], []
        for number, parent in enumerate(record.get('parents', ())):
            where = pathlib.Path(parent['run']).resolve()
            if number and where not in places:
                lanes[0] += 1
            mine = lane if number == 0 else lanes[0]
            if parent['step'] is None or not runfolder.Paths(where).lineage.exists():
                if where not in places:
                    told = 'weights from elsewhere' if parent['step'] is None else 'a run that is not here any more'
                    nodes.append(Node(where.name, told, (), mine))
                    places[where] = len(nodes) - 1
                at = places[where]
            else:
                at = visit(where, mine)
            if at is not None:
                parents.append(at)
                part = 'everything' if parent['part'] == 'all' else parent['part']
                parts.append(f'{part} from {nodes[at].name}')
        done = f'{record["finished"]:,} steps' if record.get('finished') else 'not finished'
        done = 'converted' if not record.get('sessions') and record else done
        nodes.append(Node(named(folder), ', '.join([done, *parts]), tuple(parents or [0]), lane))
        places[folder] = len(nodes) - 1
        return places[folder]

    for run_ in [run_ for run_ in runs[::-1] if run_.lineage]:
        if run_.folder.resolve() not in places:
            if places:
                lanes[0] += 1
            visit(run_.folder.resolve(), lanes[0])
    if not any(0 in node.parents for node in nodes[1:]):  # all of it began with weights from elsewhere
        nodes = [node._replace(parents=tuple(at - 1 for at in node.parents)) for node in nodes[1:]]
    return nodes


def draw(nodes: list[Node]) -> str:
    """The tree as SVG, 360 units wide, with a sentence for who does not see it."""
    text = 8 + LANE * max(node.lane for node in nodes) + 6 + TEXT

    def at(node):
        return 8 + LANE * nodes[node].lane, 14 + STEP * node

    parts = []
    for number, node in enumerate(nodes):
        x, y = at(number)
        for parent in node.parents:
            a, b = at(parent)
            if a < x:  # it leaves its parent's lane at once
                parts.append(f'<path d="M{a} {b}C{a} {b + 20} {x} {b + 8} {x} {b + 28}V{y}"/>')
            elif a > x:  # and comes into its child's at the end
                parts.append(f'<path d="M{a} {b}V{y - 28}C{a} {y - 8} {x} {y - 20} {x} {y}"/>')
            else:
                parts.append(f'<path d="M{a} {b}V{y}"/>')
    for number, node in enumerate(nodes):
        x, y = at(number)
        kind = '' if node.parents else ' class="root"'
        parts.append(f'<circle{kind} cx="{x}" cy="{y}" r="5"/>')
        parts.append(f'<text class="name" x="{text}" y="{y + 3}">{_cut(node.name, 36)}</text>')
        parts.append(f'<text x="{text}" y="{y + 17}">{_cut(node.told, 54)}</text>')
    told = '; '.join(f'{node.name}: {node.told}' for node in nodes)
    return (
        f'<svg class="tree" viewBox="0 0 360 {STEP * len(nodes) - 6}" role="img" aria-label="{html.escape(told)}">'
        f'{"".join(parts)}</svg>'
    )


def _cut(text, most):
    """As much of a text as has room beside the lanes; the rest is in the sentence."""
    return html.escape(text if len(text) <= most else f'{text[: most - 1]}…')
