"""One page about a family of runs: what was trained, how well it answers, and where it came from.

    python -m nanovision_jax.report runs/tiny

Writes report.html, which needs no other file and no network, and its text twin report.md into the folder. What a family
does not have is left out. A chat.jsonl in the folder ({image, question, answer} a line) is shown too.
"""

import base64
import collections
import dataclasses
import datetime
import hashlib
import html
import io
import itertools
import json
import math
import pathlib
import re
import runpy
import shlex
import statistics

from nanovision_jax import config as configs
from nanovision_jax.data import images, sources
from nanovision_jax.data.conversation import BadExample
from nanovision_jax.errors import Parser, UserError, run

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


@dataclasses.dataclass
class Run:
    """What a run folder tells about its stage; empty where a file is missing."""

    stage: str
    folder: pathlib.Path
    config: configs.Config | None
    metrics: list[dict]
    lineage: dict

    def all(self, name):
        """The logged values of that name."""
        return [line[name] for line in self.metrics if name in line]


# Reading -------------------------------------------------------------------------------------------------------------


def open_runs(family):
    """The Runs of a family folder, in the order of the stages. Raises UserError if there is none."""
    runs = []
    for folder in (family / stage for stage in configs.STAGES):
        if any((folder / name).exists() for name in ('config.json', 'metrics.jsonl', 'lineage.json')):
            file = folder / 'config.json'
            config = configs.from_json(file.read_text()) if file.exists() else None
            lineage = next(read(folder / 'lineage.json'), {})
            runs.append(Run(folder.name, folder, config, list(read(folder / 'metrics.jsonl')), lineage))
    if not runs:
        raise UserError(f'{family} holds no run: give a family folder, with {", ".join(configs.STAGES)} in it.')
    return runs


def read(file):
    """The objects of a .jsonl file, or the one of a .json file; a line cut off by a crash ends them."""
    text = file.read_text() if file.exists() else ''
    for line in text.splitlines() if file.suffix == '.jsonl' else [text]:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def results(runs, task):
    """Every (Run, split, result) of an evaluation; the file of the validation split has no split in its name."""
    for run_ in runs:
        for file in sorted(run_.folder.glob(f'eval/{task}*.json'), key=lambda file: (len(file.name), file)):
            for result in read(file):
                yield run_, file.stem.removeprefix(task).strip('-') or 'validation', result


def parameters(run_):
    """How many parameters a run has and trains, from the shapes that its checkpoint lists; None without one."""
    sizes = collections.Counter()
    for tree in itertools.chain(*map(read, [*run_.folder.glob('checkpoints/*/params/_METADATA')][:1])):
        for leaf in tree['tree_metadata'].values():
            sizes[leaf['key_metadata'][0]['key']] += math.prod(leaf['value_metadata']['write_shape'])
    learn = sum(n for part, n in sizes.items() if part not in run_.lineage.get('frozen_before', ()))
    return (f'{sizes.total():,}', f'{learn:,}') if sizes else (None, None)


def choose(rows, n=12):
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


def find_pictures(config, names):
    """{name: data: URI} of the held-out pictures that still are where the run read them."""
    found, data = {}, config.data
    if data.source == 'tiny_world':
        if (pathlib.Path(data.path) / 'tiny_world' / 'scenes').exists():  # opening what is not there would make it
            source = sources.TinyWorld(data.path, 'validation', 'conversation')
            examples = (source[i] for i in range(len(source)))
            found = {e.names[0]: data_uri(e.images[0]) for e in examples if e.names[0] in names}
    elif pathlib.Path(data.path).is_file() and (path := sources.Conversations(data.path, data.images)._image_path()):
        store = images.ImageStore(path)
        for name in names:
            try:
                found[name] = data_uri(store.read(name))
            except BadExample:  # its caption is shown alone
                continue
    return found


def data_uri(data):
    """A picture as a data: URI, at most 256 pixels a side and without what else the file tells; '' if it is none."""
    try:
        image = images.load(data)
    except BadExample:
        return ''
    kind, buffer = 'png' if max(image.size) <= 128 else 'jpeg', io.BytesIO()
    image.thumbnail((256, 256))
    image.save(buffer, kind)
    return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'


# The report, as blocks that both pages are made of -------------------------------------------------------------------


def tell(family, runs):
    """Yields the blocks of the report; html_block and markdown_block say what there is."""
    started = [session['started'] for run_ in runs for session in run_.lineage.get('sessions', ())]
    day = datetime.datetime.fromisoformat(max(started)) if started else datetime.datetime.now()
    yield 'title', family.resolve().name, f'{"Trained" if started else "Reported"} {day.day} {day:%B %Y}'
    minutes = sum(max(run_.all('seconds'), default=0) for run_ in runs) / 60
    lead = f'{len(runs)} {"stages" if len(runs) > 1 else "stage"}, {minutes:.1f} minutes of training.'
    for found in itertools.islice(results(runs[::-1], 'vqa'), 1):
        lead += f' {headline(*found)}'
    yield 'text', lead, 'lead'
    yield from training(runs)
    for found in results(runs, 'vqa'):
        yield from evaluation(*found)
    if found := list(results(runs, 'bpb')):
        yield 'heading', 'Held-out text'
        rows = [
            (f'{r.stage}, {s}', f'{b["n"]:,}', f'{b["loss"]:.3f}', f'{b["bits_per_byte"]:.3f}') for r, s, b in found
        ]
        yield 'table', ('Run, split', 'Tokens', 'Loss (nats a token)', 'Bits per byte'), rows
    yield from answers(family, runs)
    yield from origin(runs)
    yield 'heading', 'How to reproduce'
    lines = [train_command(run_) for run_ in runs if run_.config]
    for task in ('bpb', 'vqa'):
        for run_, split, _ in results(runs, task):
            line = f'python -m nanovision_jax.evaluate --run={shlex.quote(str(run_.folder))} --task={task}'
            lines.append(line if split == 'validation' else f'{line} --split={shlex.quote(split)}')
    yield 'commands', [*lines, f'python -m nanovision_jax.report {shlex.quote(str(family))}']


def headline(run_, split, result):
    """The result of an evaluation in a sentence."""
    (low, high), n = result['interval'], f'{result["n"]:,} questions about pictures of the {split} split'
    return f'{run_.stage} answers {result["accuracy"]:.1%} of {n} right (95% interval {low:.1%} to {high:.1%}).'


def training(runs):
    """Blocks: a table of the stages, and their loss curves."""
    columns = []
    for run_ in runs:
        done, planned = max(run_.all('step'), default=0), run_.config.steps if run_.config else 0
        memory, sessions = run_.lineage.get('peak_device_bytes'), run_.lineage.get('sessions')
        total, learn = parameters(run_)

        def logged(name, form, of=lambda values: values[-1]):
            return form.format(of(run_.all(name))) if run_.all(name) else None

        columns.append({
            'Steps': f'{done:,} of {planned:,}' if planned > done else f'{done:,}',
            'Parameters': total,
            'Parameters that learn': learn,
            'Last training loss': logged('loss', '{:.3f}'),
            'Last held-out loss': logged('eval_loss', '{:.3f}'),
            'Minutes¹': logged('seconds', '{:.1f}', lambda seconds: seconds[-1] / 60),
            'Tokens²': logged('tokens', '{:,}'),
            'Tokens/s²': logged('tokens_per_second', '{:,.0f}', statistics.median),
            'MFU³': logged('mfu', '{:.1%}', statistics.median),
            'Peak device memory': f'{memory / 2**30:.2f} GiB' if memory else None,
            'Devices': sessions[-1]['devices'] if sessions else None,
        })  # fmt: skip
    yield 'heading', 'Training'
    rows = [(fact, *(c[fact] or '–' for c in columns)) for fact in columns[0] if any(c[fact] for c in columns)]
    yield 'table', ('', *(run_.stage for run_ in runs)), rows
    yield 'text', (
        '¹ Training alone, without compiling, evaluating and saving. ² Of text (captions in clip), without padding; '
        'the speed is the median of the logged steps, as is MFU. ³ The share of the peak FLOP/s that the model’s '
        'arithmetic takes: full-attention convention, padding not counted. The peak is the data sheet’s for bf16 or, '
        'on CPU, that of a matrix product measured as the run began.'
    ), 'note'  # fmt: skip
    curves = []
    for run_ in runs:
        finite = [x for x in run_.metrics if math.isfinite(x.get('loss', x.get('eval_loss', math.nan)))]
        train, held_out = ([(x['step'], x[name]) for x in finite if name in x] for name in ('loss', 'eval_loss'))
        if train:
            curves.append((run_.stage, train, held_out))
    if curves:
        yield 'text', 'Losses over the steps: training as a line, held-out data as dots.', ''
        yield 'curves', curves


def evaluation(run_, split, result):
    """Blocks: accuracy by kind, what becomes of it without the pictures, and what that means."""
    yield 'heading', f'Questions about pictures: {run_.stage}, {split} split'
    yield 'text', headline(run_, split, result), ''
    kinds = sorted(result['by_kind'].items(), key=lambda item: -item[1]['n'])
    rows = [
        (kind, f'{r["n"]:,}', f'{r["accuracy"]:.1%}', (r['accuracy'], r['chance']), f'{r["chance"]:.1%}')
        for kind, r in sorted(kinds[:16])
    ]
    yield 'table', ('Kind', 'Questions', 'Accuracy', '', 'Chance'), rows
    note = 'Chance, the mark in a bar, is the score of always giving the kind’s commonest answer.'
    note += ' A description counts by the share of its parts that are right.' if 'description' in dict(kinds) else ''
    note += ' In heldout are the pairs of colour and shape that training never shows.' if split == 'heldout' else ''
    note += f' {len(kinds) - 16} rarer kinds are left out.' if len(kinds) > 16 else ''
    yield 'text', note, 'note'
    right = result['accuracy']
    rows = [('as they are', f'{right:.1%}', (right, 0), '')]
    for name, share in result['controls'].items():
        rows.append((name, f'{share:.1%}', (share, 0), f'{100 * (share - right):+.1f} points'.replace('-', '−')))
    yield 'table', ('Pictures', 'Accuracy', '', 'Difference'), rows
    yield 'text', looks(result), 'verdict'


def looks(result):
    """Whether the model looks at its pictures: it must lose by 5 points, and surely, when they are blank or others."""
    name, best = max(result['controls'].items(), key=lambda item: item[1])
    lost = round(100 * (result['accuracy'] - best), 1)
    if lost <= 5:
        return f'The model does not look at its pictures: with {name} ones its answers are about as good ({best:.1%}).'
    if best >= result['interval'][0]:
        return f'{result["n"]:,} questions are too few to tell whether the model looks at its pictures.'
    return f'The model looks at its pictures: with {name} ones it loses {lost:.1f} points.'


def answers(family, runs):
    """Blocks: a dozen questions with their pictures, and the conversations of chat.jsonl."""
    asked = [(run_, rows) for run_ in runs if (rows := list(read(run_.folder / 'eval' / 'vqa.jsonl')))]
    for run_, rows in asked[-1:]:
        chosen = choose(rows)
        found = find_pictures(run_.config, {row['image'] for row in chosen}) if run_.config else {}
        right, share = (sum(row['correct'] == 1 for row in some) for some in (chosen, rows))
        yield 'heading', f'{len(chosen)} questions and answers'
        yield 'text', (
            f'Nobody picked them: a digest of their ids draws them, spread over the kinds, right and wrong in the '
            f'proportion of all, at least one of each. {right} of {len(chosen)} are wholly right here, '
            f'{share / len(rows):.1%} of all.'
        ), ''  # fmt: skip
        turns = [[(r['question'], r['answer'], r['reference'], r['correct'])] for r in chosen]
        yield 'cards', [(found.get(r['image']), r['image'], r['kind'], t) for r, t in zip(chosen, turns, strict=True)]
    cards = []
    for name, rows in itertools.groupby(read(family / 'chat.jsonl'), key=lambda row: row['image']):
        file = next((path for path in (family / name, pathlib.Path(name)) if path.is_file()), None)
        turns = [(row['question'], row['answer'], '', 1) for row in rows]
        cards.append((data_uri(file.read_bytes()) if file else '', pathlib.Path(name).name, '', turns))
    if cards:
        yield 'heading', 'A conversation about pictures it has never seen'
        yield 'cards', cards


def origin(runs):
    """Blocks: data, parents and versions."""
    rows, versions = [], collections.defaultdict(list)
    for run_ in (run_ for run_ in runs if run_.lineage):
        record, frozen = run_.lineage, ', '.join(sorted(run_.lineage.get('frozen_before', ())))
        if frozen and 'finished' in record:
            frozen += ': unchanged' if record['frozen_before'] == record.get('frozen_after') else ': CHANGED'
        parents = [f'{p["run"]}, step {p["step"]}, {p["part"]}, {p["manifest"][:12]}' for p in record['parents']]
        data = ' '.join(filter(None, record['data'].values()))
        rows.append((run_.stage, data, '; '.join(parents) or '–', frozen or '–', record['tokenizer'][:12]))
        packages = ', '.join(f'{name} {version}' for name, version in record['sessions'][-1]['versions'].items())
        versions[packages].append(run_.stage)
    if rows:
        yield 'heading', 'Where it came from'
        yield 'words', ('Run', 'Data', 'Starts from (run, step, part, manifest)', 'Frozen', 'Tokenizer'), rows
        yield 'text', 'Digests are the first 12 digits; lineage.json in a run folder has them whole.', 'note'
        for packages, stages in versions.items():
            yield 'text', f'{", ".join(stages)}: {packages}.', 'note'


def train_command(run_):
    """The command line of a run: its config file and, where that can be read from here, every field that differs."""
    config, file = run_.config, pathlib.Path('configs') / f'{run_.stage}.py'
    line = f'python -m nanovision_jax.train --config={file}:{config.size}'
    if config.name != config.size:
        line += f' --config.name={shlex.quote(config.name)}'
    if file.exists():
        usual = runpy.run_path(str(file))['get_config'](config.size)
        usual.name = config.name
        configs.fill(usual)
        for name in configs.fields(configs.Config):
            if (value := configs.get(config, name)) != configs.get(usual, name):
                line += f' --config.{name}={shlex.quote(str(value))}'
    return line


# The two pages -------------------------------------------------------------------------------------------------------


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
    """A picture and what is said about it."""
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


def curve_text(stage, train, held_out, points):
    """A loss curve in words: training losses at a few points from the first to the last, and the last held-out one."""
    points = min(points, len(train) - 1) or 1
    some = [train[round(i * (len(train) - 1) / points)] for i in range(points + 1)]
    text = f'{stage}: ' + ', '.join(f'{loss:.3f} (step {step:,})' for step, loss in some)
    return text + (f'; held-out {held_out[-1][1]:.3f}' if held_out else '')


def ticks(low, high, log=False):
    """A few round numbers within a range."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        return [x for x in (m * 10.0**p for p in powers for m in (1, 2, 5)) if low <= x <= high]
    size = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(m * size for m in (5, 2, 1) if (high - low) / (m * size) >= 3)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(stage, train, held_out):
    """A loss curve as SVG, logarithmic where the loss falls to less than a tenth."""
    steps, losses = zip(*train, *held_out, strict=True)
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
    dots = ''.join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in itertools.starmap(at, held_out))
    return (
        f'<figure><svg viewBox="0 0 360 200" role="img" font-size="10.5" fill="#444">{"".join(parts)}'
        '<path d="M40 165H350" stroke="#999"/><text x="195" y="196" text-anchor="middle">step</text>'
        f'<text transform="translate(9 86) rotate(-90)" text-anchor="middle">loss{" (log)" * log}</text>'
        f'<polyline points="{line}" fill="none" stroke="#2a5d8c" stroke-width="1.4" stroke-linejoin="round"/>'
        f'<g fill="#c8601a" stroke="#fff">{dots}</g></svg>'
        f'<figcaption>{html.escape(curve_text(stage, train, held_out, points=1))}</figcaption></figure>'
    )


def report(family):
    """Writes report.html and report.md into a family folder, and returns the path of the first."""
    family = pathlib.Path(family)
    blocks = list(tell(family, open_runs(family)))
    (family / 'report.md').write_text('\n\n'.join(map(markdown_block, blocks)) + '\n', encoding='utf-8')
    title, body = html.escape(family.resolve().name), '\n'.join(map(html_block, blocks))
    page = family / 'report.html'
    page.write_text(
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n',
        encoding='utf-8',
    )
    return page


def main(argv):
    """The command: see the module's docstring."""
    parser = Parser(prog='python -m nanovision_jax.report', description=__doc__)
    parser.add_argument('family', help='the folder that holds the run folders, such as runs/tiny')
    print(f'written: {report(parser.parse(argv).family)}')


if __name__ == '__main__':
    run(main)
