"""One page about a family of runs: what was trained, how well it answers, and where it came from.

    python -m nanovision_jax.report runs/tiny

Writes runs/tiny/report.html, which needs no other file and no network, and its text twin runs/tiny/report.md. What a
family does not have is left out. A chat.jsonl in the family folder ({image, question, answer} a line) is shown too.
"""

import base64
import collections
import dataclasses
import datetime
import hashlib
import io
import itertools
import json
import math
import pathlib
import runpy
import shlex
import statistics

from nanovision_jax import config as configs
from nanovision_jax.data import images, sources
from nanovision_jax.data.conversation import BadExample
from nanovision_jax.errors import Parser, UserError, run
from nanovision_jax.report_pages import Card, Html, Markdown, Share, Turn

SHOWN = 12  # questions with their pictures
KINDS = 16  # rows of a table by kind
LOOKS = 5  # points that a model must lose without its pictures, to be said to look at them


@dataclasses.dataclass
class Run:
    """What a run folder tells about its stage; config is None and the others are empty where a file is missing."""

    stage: str
    folder: pathlib.Path
    config: configs.Config | None
    metrics: list[dict]
    lineage: dict

    def last(self, name):
        """The last logged value of that name, or None."""
        return next((line[name] for line in reversed(self.metrics) if name in line), None)

    def median(self, name):
        """The median of the logged values of that name, or None."""
        values = [line[name] for line in self.metrics if name in line]
        return statistics.median(values) if values else None


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def open_runs(family):
    """The Runs of a family folder in the order of the road. Raises UserError if there is none."""
    runs = []
    for stage in configs.STAGES:
        folder = family / stage
        if not any((folder / name).exists() for name in ('config.json', 'metrics.jsonl', 'lineage.json')):
            continue
        config = folder / 'config.json'
        config = configs.from_json(config.read_text()) if config.exists() else None
        runs.append(Run(stage, folder, config, read_lines(folder / 'metrics.jsonl'), read(folder / 'lineage.json')))
    if not runs:
        raise UserError(f'{family} holds no run: give a family folder, with {", ".join(configs.STAGES)} in it.')
    return runs


def read(file):
    """The object in a JSON file; an empty one where there is no file."""
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except json.JSONDecodeError as error:
        raise UserError(f'{file} is not whole: {error}.') from error


def read_lines(file):
    """The objects of a .jsonl file; a last line cut off by a crash is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def results(runs, task):
    """Every (Run, split, result) of a task; the file of the validation split has no split in its name."""
    for run_ in runs:
        for file in sorted(run_.folder.glob(f'eval/{task}*.json')):
            yield run_, file.stem.removeprefix(task).strip('-') or 'validation', read(file)


def parameters(run_):
    """'1,410,817' or '1,410,817, of them 33,024 learn', from the shapes that a checkpoint lists; None without one."""
    files = list(run_.folder.glob('checkpoints/*/params/_METADATA'))
    if not files:
        return None
    sizes = collections.Counter()
    for leaf in read(files[0])['tree_metadata'].values():
        sizes[leaf['key_metadata'][0]['key']] += math.prod(leaf['value_metadata']['write_shape'])
    learn = sum(n for part, n in sizes.items() if part not in run_.lineage.get('frozen_before', ()))
    total = sum(sizes.values())
    return f'{total:,}' if learn == total else f'{total:,}, of them {learn:,} learn'


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def choose(rows, n=SHOWN):
    """n rows, right and wrong in the proportion of all (one of each at least), over as many kinds as there are.

    The order is that of a digest of the ids, so that nobody picks.
    """
    rows = sorted(rows, key=lambda row: hashlib.sha256(str(row['id']).encode()).hexdigest())
    wrong, right = ([row for row in rows if (row['correct'] == 1) == is_right] for is_right in (False, True))
    n = min(n, len(rows))
    count = round(n * len(wrong) / len(rows)) if rows else 0
    if wrong and right:
        count = min(max(count, 1), max(n - 1, 0))
    chosen, kinds, names = [], collections.Counter(), collections.Counter()
    for pool, size in ((wrong, count), (right, n - count)):
        for _ in range(size):
            row = min(pool, key=lambda row: (kinds[row['kind']], names[row['image']]))
            pool.remove(row)
            kinds[row['kind']] += 1
            names[row['image']] += 1
            chosen.append(row)
    return sorted(chosen, key=lambda row: row['kind'])


def find_pictures(config, split, names):
    """{name: encoded bytes} of those that can still be found where the run read them."""
    found, names = {}, set(names)
    try:
        if config.data.source == 'tiny_world':
            # Opening what is not there would make it.
            if (pathlib.Path(config.data.path) / 'tiny_world' / 'scenes').exists():
                source = sources.TinyWorld(config.data.path, split, 'conversation')
                for example in map(source.__getitem__, range(len(source))):
                    if example.names[0] in names:
                        found[example.names[0]] = example.images[0]
        elif path := sources.Conversations(config.data.path, config.data.images)._image_path():
            store = images.ImageStore(path)
            for name in names:
                try:
                    found[name] = store.read(name)
                except BadExample:
                    continue
    except UserError:  # the data has been moved or deleted
        pass
    return found


def data_uri(data):
    """A picture as a data: URI of at most 256 pixels a side, without the file's metadata; None if it does not decode."""
    try:
        image = images.load(data)
    except BadExample:
        return None
    small, buffer = max(image.size) <= 128, io.BytesIO()
    image.thumbnail((256, 256))
    image.save(buffer, 'PNG' if small else 'JPEG')
    kind = 'png' if small else 'jpeg'
    return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def answered(runs):
    """(Cards, how many of them are right, share of all that is right) of the last run that was asked, or None."""
    for run_ in reversed(runs):
        rows = read_lines(run_.folder / 'eval' / 'vqa.jsonl')
        if rows:
            chosen = choose(rows)
            found = find_pictures(run_.config, 'validation', (r['image'] for r in chosen)) if run_.config else {}
            cards = []
            for row in chosen:
                picture = data_uri(found[row['image']]) if row['image'] in found else None
                turn = Turn(row['question'], row['answer'], row['reference'], row['correct'])
                cards.append(Card(picture, row['image'], [turn], row['kind']))
            right = sum(row['correct'] == 1 for row in chosen)
            return cards, right, sum(row['correct'] == 1 for row in rows) / len(rows)
    return None


def conversations(family):
    """The Cards of chat.jsonl: lines that follow each other about the same picture are one conversation."""
    cards = []
    for name, rows in itertools.groupby(read_lines(family / 'chat.jsonl'), key=lambda row: row['image']):
        file = next((file for file in (family / name, pathlib.Path(name)) if file.is_file()), None)
        picture = data_uri(file.read_bytes()) if file else None
        cards.append(Card(picture, name, [Turn(row['question'], row['answer']) for row in rows]))
    return cards


# ---------------------------------------------------------------------------------------------------------------------
# The page, told to a writer: Html or Markdown
# ---------------------------------------------------------------------------------------------------------------------


def tell(page, family, runs, answers, chat):
    """Writes all of the report to a page."""
    opening(page, family, runs)
    training(page, runs)
    evaluation(page, runs)
    if answers:
        cards, right, share = answers
        page.heading(f'{len(cards)} questions and answers')
        page.text(
            f'Nobody picked them: held-out questions of every kind, drawn by a digest of their ids. {right} of '
            f'{len(cards)} are answered wholly right here, {share:.1%} of all (where not all answers are right or '
            'all wrong, one of each is shown at least).'
        )
        page.gallery(cards)
    if chat:
        page.heading('A conversation about pictures it has never seen')
        page.gallery(chat)
    origin(page, runs)
    page.heading('How to reproduce')
    page.commands(commands(family, runs))


def opening(page, family, runs):
    """The title, and the report in two or three sentences."""
    started = [session['started'] for run_ in runs for session in run_.lineage.get('sessions', ())]
    day = datetime.datetime.fromisoformat(max(started)) if started else datetime.datetime.now()
    page.title(family.resolve().name, f'{"Trained" if started else "Reported"} {day.day} {day:%B %Y}')
    minutes = sum(run_.last('seconds') or 0 for run_ in runs) / 60
    devices = sorted({run_.lineage['sessions'][-1]['devices'] for run_ in runs if run_.lineage.get('sessions')})
    on = f' on {" and ".join(devices)}' if devices else ''
    page.text(
        f'{len(runs)} {"stage" if len(runs) == 1 else "stages"}, {minutes:.1f} minutes of training{on}.'
        + ''.join(f' {headline(*found)}' for found in list(results(runs, 'vqa'))[-1:]),
        'lead',
    )


def headline(run_, split, result):
    """The result of an evaluation in a sentence."""
    low, high = result['interval']
    return (
        f'{run_.stage} answers {result["accuracy"]:.1%} of {result["n"]:,} questions about pictures of the {split} '
        f'split right (95% interval {low:.1%} to {high:.1%}).'
    )


def training(page, runs):
    """The table of the stages, and their loss curves."""

    def shown(value, form):
        return None if value is None else form(value)

    def steps(run_):
        done, planned = run_.last('step'), run_.config.steps if run_.config else 0
        return None if done is None else f'{done:,} of {planned:,}' if planned > done else f'{done:,}'

    facts = {
        'Steps': steps,
        'Parameters': parameters,
        'Last training loss': lambda r: shown(r.last('loss'), '{:.3f}'.format),
        'Last held-out loss': lambda r: shown(r.last('eval_loss'), '{:.3f}'.format),
        'Minutes¹': lambda r: shown(r.last('seconds'), lambda s: f'{s / 60:.1f}'),
        'Tokens': lambda r: shown(r.last('tokens'), '{:,}'.format),
        'Tokens/s²': lambda r: shown(r.median('tokens_per_second'), '{:,.0f}'.format),
        'MFU²': lambda r: shown(r.median('mfu'), '{:.1%}'.format),
        'Peak device memory': lambda r: shown(r.lineage.get('peak_device_bytes'), lambda b: f'{b / 2**30:.2f} GiB'),
        'Sessions': lambda r: shown(r.lineage.get('sessions'), lambda s: str(len(s))),
    }
    rows = [(name, *map(fact, runs)) for name, fact in facts.items()]
    page.heading('Training')
    page.table(('', *(run_.stage for run_ in runs)), [row for row in rows if any(row[1:])])
    page.text(
        '¹ Of training, without compiling, evaluating and saving. ² Median of the logged steps. Tokens are those of text '
        '(of captions in clip), padding not counted. MFU is the share of the peak rate that the model’s own arithmetic '
        'uses, by the full-attention convention and padding not counted; the peak is the data sheet’s for bf16 or, on '
        'CPU, that of a matrix product measured as the run began.',
        'note',
    )
    page.text('Training loss as a line, held-out loss as dots, over the steps.')
    for run_ in runs:
        series = []
        for name in ('loss', 'eval_loss'):
            values = [(line['step'], line[name]) for line in run_.metrics if math.isfinite(line.get(name, math.nan))]
            series.append(values)
        if series[0]:
            page.curve(run_.stage, *series)


def evaluation(page, runs):
    """Accuracy by kind and what becomes of it without the pictures; bits per byte of text."""
    for run_, split, result in results(runs, 'vqa'):
        page.heading(f'Questions about pictures: {run_.stage}, {split} split')
        page.text(headline(run_, split, result))
        if split == 'heldout':
            page.text('This split is about pairs of colour and shape that appear nowhere in training.')
        kinds = sorted(result['by_kind'].items(), key=lambda item: -item[1]['n'])
        rows = sorted(kinds[:KINDS])
        page.table(
            ('Kind', 'Questions', 'Accuracy', '', 'Chance³'),
            [
                (kind, f'{r["n"]:,}', f'{r["accuracy"]:.1%}', Share(r['accuracy'], r['chance']), f'{r["chance"]:.1%}')
                for kind, r in rows
            ],
        )
        rarer = f' {len(kinds) - KINDS} rarer kinds are left out.' if len(kinds) > KINDS else ''
        parts = ' A description counts by the share of its parts that are right.' if 'description' in dict(rows) else ''
        page.text(f'³ Always giving the kind’s commonest answer; the mark in a bar.{parts}{rarer}', 'note')
        controls = [(name, result['controls'][name]) for name in ('blank', 'shuffled') if name in result['controls']]
        if controls:
            right = result['accuracy']
            table = [('its own', f'{right:.1%}', Share(right), '')]
            table += [(n, f'{v:.1%}', Share(v), f'{100 * (v - right):+.1f} points') for n, v in controls]
            page.table(('Pictures', 'Accuracy', '', 'Difference'), table)
            page.text(looks(result), 'verdict')
    rows = [
        (r.stage, split, f'{b["n"]:,}', f'{b["bytes"]:,}', f'{b["loss"]:.3f}', f'{b["bits_per_byte"]:.3f}')
        for r, split, b in results(runs, 'bpb')
    ]
    if rows:
        page.heading('Held-out text')
        page.table(('Run', 'Split', 'Tokens', 'Bytes', 'Loss (nats a token)', 'Bits per byte'), rows)


def looks(result):
    """Whether the model looks at its pictures, by its controls: the better it does without them, the less it looks."""
    name, best = max(result['controls'].items(), key=lambda item: item[1])
    lost = round(100 * (result['accuracy'] - best), 1)
    if lost <= LOOKS:
        return (
            f'The model does not look at its pictures: with {name} ones it answers as well, or nearly '
            f'({best:.1%} instead of {result["accuracy"]:.1%}).'
        )
    if best >= result['interval'][0]:
        return f'{result["n"]:,} questions are too few to tell whether the model looks at its pictures.'
    return f'The model looks at its pictures: with {name} ones it loses {lost} points.'


def origin(page, runs):
    """Data, parents and versions."""
    page.heading('Where it came from')
    rows = []
    for run_ in runs:
        record = run_.lineage
        parents = [
            f'{p["run"]}, step {p["step"]}, {p["part"]} ({p["manifest"][:12]})' for p in record.get('parents', ())
        ]
        data = ' '.join(filter(None, record.get('data', {}).values()))
        frozen = sorted(record.get('frozen_before', ()))
        if 'finished' in record and frozen:
            same = record['frozen_before'] == record.get('frozen_after')
            frozen.append('(unchanged)' if same else '(CHANGED)')
        rows.append(
            (run_.stage, data, '; '.join(parents) or 'nothing', ' '.join(frozen), record.get('tokenizer', '')[:12])
        )
    page.table(('Run', 'Data', 'Started from (manifest)', 'Frozen', 'Tokenizer'), rows, wide=True)
    versions = collections.defaultdict(list)
    for run_ in runs:
        if run_.lineage.get('sessions'):
            last = run_.lineage['sessions'][-1]
            packages = ', '.join(f'{name} {version}' for name, version in last['versions'].items())
            versions[f'{last["devices"]}; {packages}'].append(run_.stage)
    for text, stages in versions.items():
        page.text(f'{", ".join(stages)}: {text}.', 'note')
    page.text('Digests are the first 12 digits of a sha256; lineage.json in a run folder has them whole.', 'note')


def commands(family, runs):
    """The command lines that make this family again, in order."""
    lines = [command(run_) for run_ in runs if run_.config]
    for task in ('bpb', 'vqa'):
        for run_, split, _ in results(runs, task):
            option = '' if split == 'validation' else f' --split={shlex.quote(split)}'
            lines.append(
                f'python -m nanovision_jax.evaluate --run={shlex.quote(str(run_.folder))} --task={task}{option}'
            )
    return [*lines, f'python -m nanovision_jax.report {shlex.quote(str(family))}']


def command(run_):
    """The command line of a run: its config file and, where that can be read from here, the fields that differ."""
    config, file = run_.config, pathlib.Path('configs') / f'{run_.stage}.py'
    line = f'python -m nanovision_jax.train --config={file}:{config.size}'
    if config.name != config.size:
        line += f' --config.name={shlex.quote(config.name)}'
    if file.exists():
        usual = runpy.run_path(str(file))['get_config'](config.size)
        usual.name = config.name
        configs.fill(usual)
        for name in configs.fields(configs.Config):
            if name != 'name' and (value := configs.get(config, name)) != configs.get(usual, name):
                line += f' --config.{name}={shlex.quote(str(value))}'
    return line


def report(family):
    """Writes report.html and report.md into a family folder, and returns the path of the first."""
    family = pathlib.Path(family)
    runs = open_runs(family)
    answers, chat = answered(runs), conversations(family)
    for page, name in ((Markdown(), 'report.md'), (Html(), 'report.html')):
        tell(page, family, runs, answers, chat)
        (family / name).write_text(page.text_of(), encoding='utf-8')
    return family / 'report.html'


def main(argv):
    """The command: see the module's docstring."""
    parser = Parser(prog='python -m nanovision_jax.report', description=__doc__)
    parser.add_argument('family', help='a folder with the run folders of a family, such as runs/tiny')
    print(f'written: {report(parser.parse(argv).family)}')


if __name__ == '__main__':
    run(main)
