"""Of a report, what has pictures: questions with answers, and conversations."""

import base64
import collections
import contextlib
import hashlib
import io
import itertools
import pathlib

from nanovision_jax.data import images, sources
from nanovision_jax.data.conversation import BadExample
from nanovision_jax.data.datasets import tiny_world
from nanovision_jax.errors import UserError
from nanovision_jax.evals.base import split_of
from nanovision_jax.reporting.runs import Run, results, rows_of
from nanovision_jax.runs import folder as runfolder

CHATS = 24  # pictures that are shown of chat.jsonl, so that the page stays below 5 MB


def chapter(folder: pathlib.Path, runs: list[Run]):
    """Blocks: a dozen questions with their images, and the conversations of chat.jsonl."""
    for run_, part, result in itertools.islice(results(runs[::-1], 'vqa'), 1):
        if not (rows := rows_of(run_, part, result)):
            break
        chosen = choose(rows)
        split, names = split_of(part), {row['image'] for row in chosen}
        found = find_images(run_.config, split, names) if run_.config and split else {}
        right, share = (sum(row['correct'] == 1 for row in some) for some in (chosen, rows))
        yield 'heading', f'{len(chosen)} questions and answers'
        yield 'text', (
            f'Nobody picked them: a digest of their ids draws them, spread over the kinds, right and wrong in the '
            f'proportion of all, at least one of each. {right} of {len(chosen)} are wholly right here, '
            f'{share / len(rows):.1%} of all.'
        ), ''  # fmt: skip
        turns = [[(r['question'], r['answer'], r['reference'], r['correct'])] for r in chosen]
        yield 'cards', [(found.get(r['image']), r['image'], r['kind'], t) for r, t in zip(chosen, turns, strict=True)]
    cards, told = [], ('image', 'question', 'answer')
    chats = [row for row in runfolder.read_lines(folder / 'chat.jsonl') if all(row.get(name) for name in told)]
    for name, rows in itertools.groupby(chats, key=lambda row: str(row['image'])):
        file = next((path for path in (folder / name, pathlib.Path(name)) if path.is_file()), None)
        turns = [(row['question'], row['answer'], '', 1) for row in rows]
        cards.append((data_uri(file.read_bytes()) if file else '', pathlib.Path(name).name, '', turns))
    if cards:
        yield 'heading', 'A conversation about pictures it has never seen'
        yield 'cards', cards[:CHATS]
        if len(cards) > CHATS:
            yield 'text', f'These are the first {CHATS} of {len(cards)} pictures.', 'note'


def choose(rows: list[dict], n: int = 12) -> list[dict]:
    """n rows: right and wrong in the proportion of all (at least one of each), and as many kinds as there are.

    They are taken in the order of a digest of their ids, so that nobody picks.
    """
    rows = sorted(rows, key=lambda row: hashlib.sha256(str(row['id']).encode()).digest())
    wrong, right = ([row for row in rows if (row['correct'] == 1) == value] for value in (False, True))
    n = min(n, len(rows))
    n_wrong = round(n * len(wrong) / len(rows))
    if wrong and right and n > 1:
        n_wrong = min(max(n_wrong, 1), n - 1)
    chosen, seen = [], collections.Counter()
    for pool in [wrong] * n_wrong + [right] * (n - n_wrong):
        row = min(pool, key=lambda row: (seen['kind', row['kind']], seen['image', row['image']]))
        pool.remove(row)
        seen.update([('kind', row['kind']), ('image', row['image'])])
        chosen.append(row)
    return sorted(chosen, key=lambda row: row['kind'])


def find_images(config, split: str, names: set[str]) -> dict[str, str]:
    """{name: data: URI} of the images of a split of the run's data that still are where the run read them."""
    found, data = {}, config.data
    if data.source == 'tiny_world':
        version = str(tiny_world.TinyWorld.VERSION)
        if (pathlib.Path(data.local_path) / 'tiny_world/scenes' / version).exists():  # what is not there would be made
            source = sources.TinyWorldSource(data.local_path, split, 'conversation')
            examples = (source[i] for i in range(len(source)))
            found = {e.names[0]: data_uri(e.images[0]) for e in examples if e.names[0] in names}
    elif data.prepared:
        with contextlib.suppress(UserError):  # the prepared sets are somewhere else by now
            source = sources.open_source(config, split)
            examples = (source[i] for i in range(len(source)))
            shown = (pair for e in examples for pair in zip(e.names, e.images, strict=True))
            found = {name: data_uri(image) for name, image in shown if name in names}
    elif pathlib.Path(data.local_path).is_file():
        named = sources.Conversations(data.local_path, data.local_images).images_by_name()
        for name in names:
            try:
                found[name] = data_uri(named.read(name))
            except BadExample:  # its caption is shown alone
                continue
    return found


def data_uri(data: bytes) -> str:
    """An image as a data: URI, at most 256 pixels a side and without what else the file tells; '' if it is none."""
    try:
        image = images.load(data)
    except BadExample:
        return ''
    kind, buffer = 'png' if max(image.size) <= 128 else 'jpeg', io.BytesIO()
    image.thumbnail((256, 256))
    image.save(buffer, kind)
    return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'
