"""What a report tells of a family of runs, as blocks; page.py turns them into HTML and Markdown."""

import base64
import collections
import contextlib
import dataclasses
import datetime
import hashlib
import io
import itertools
import math
import pathlib
import re
import runpy
import shlex
import statistics

from nanovision_jax import config as configs
from nanovision_jax.data import images, sources
from nanovision_jax.data.conversation import BadExample
from nanovision_jax.errors import UserError, check_writable
from nanovision_jax.evals.base import part_options, read_results, told_part
from nanovision_jax.reporting import page
from nanovision_jax.runs import config_file as runconfig
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.runs.metrics import read_metrics
from nanovision_jax.stages import STAGES
from nanovision_jax.training import start


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
    for folder in (family / stage for stage in STAGES):
        paths = runfolder.Paths(folder)
        if any(file.exists() for file in (paths.config, paths.metrics, paths.lineage)):
            config = runconfig.read(folder) if paths.config.exists() else None
            lineage = runfolder.read_lineage(folder)
            runs.append(Run(folder.name, folder, config, read_metrics(paths.metrics), lineage))
    if not runs:
        raise UserError(f'{family} holds no run: give a family folder, with {", ".join(STAGES)} in it.')
    return runs


def results(runs, task):
    """Every (Run, part, Result) of a task, the validation split's first; a part of what is there whole is left out."""
    for run_ in runs:
        found = [(part, result) for part, result in read_results(run_.folder) if result.task == task]
        whole = {part for part, _ in found}
        for part, result in found:
            of = re.sub('-?limit.*', '', part) or 'validation'
            if of == part or of not in whole:
                yield run_, part, result


def parameters(run_):
    """How many parameters a run has and trains, from the shapes that its checkpoint lists; None without one."""
    sizes = collections.Counter()
    for file in [*runfolder.Paths(run_.folder).checkpoints.glob('*/params/_METADATA')][:1]:
        tree = runfolder.read_json(file)
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


def find_images(config, names):
    """{name: data: URI} of the held-out images that still are where the run read them."""
    found, data = {}, config.data
    if data.source == 'tiny_world':
        if (
            pathlib.Path(data.local_path) / 'tiny_world' / 'scenes'
        ).exists():  # opening what is not there would make it
            source = sources.TinyWorldSource(data.local_path, 'validation', 'conversation')
            examples = (source[i] for i in range(len(source)))
            found = {e.names[0]: data_uri(e.images[0]) for e in examples if e.names[0] in names}
    elif data.prepared:
        with contextlib.suppress(UserError):  # the prepared sets are somewhere else by now
            source = sources.open_source(config, 'validation')
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


def data_uri(data):
    """An image as a data: URI, at most 256 pixels a side and without what else the file tells; '' if it is none."""
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
    """Yields the blocks of the report; page.html_block and markdown_block say what there is."""
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
            (f'{r.stage}, {told_part(s)}', f'{b.n:,}', f'{b.loss:.3f}', f'{b.bits_per_byte:.3f}') for r, s, b in found
        ]
        yield 'table', ('Run, text', 'Tokens', 'Loss (nats a token)', 'Bits per byte'), rows
    yield from answers(family, runs)
    yield from origin(runs)
    yield 'heading', 'How to reproduce'
    lines = [train_command(run_) for run_ in runs if run_.config]
    for task in ('bpb', 'vqa'):
        for run_, split, _ in results(runs, task):
            line = f'python -m nanovision_jax.evaluate --run={shlex.quote(str(run_.folder))} --task={task}'
            lines.append(' '.join([line, *part_options(split)]))
    yield 'commands', [*lines, f'python -m nanovision_jax.report {shlex.quote(str(family))}']


def headline(run_, split, result):
    """The result of an evaluation in a sentence."""
    (low, high), n = result.interval, f'{result.n:,} questions about pictures ({told_part(split)})'
    return f'{run_.stage} answers {result.accuracy:.1%} of {n} right (95% interval {low:.1%} to {high:.1%}).'


def training(runs):
    """Blocks: a table of the stages, and their loss curves."""
    columns = []
    for run_ in runs:
        done, planned = max(run_.all('step'), default=0), run_.config.steps if run_.config else 0
        sessions = run_.lineage.get('sessions')
        total, learn = parameters(run_)

        def memory(name, of=run_.lineage):
            return f'{of[name] / 2**30:.2f} GiB' if of.get(name) else None

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
            'Peak device memory': memory('peak_device_bytes'),
            'Peak memory of the process': memory('peak_host_bytes'),
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
        train, validation = ([(x['step'], x[name]) for x in finite if name in x] for name in ('loss', 'eval_loss'))
        if train:
            curves.append((run_.stage, train, validation))
    if curves:
        yield 'text', 'Losses over the steps: training as a line, held-out data as dots.', ''
        yield 'curves', curves


def evaluation(run_, split, result):
    """Blocks: accuracy by kind, what becomes of it without the images, and what that means."""
    yield 'heading', f'Questions about pictures: {run_.stage}, {told_part(split)}'
    yield 'text', headline(run_, split, result), ''
    if told := result.coverage():
        yield 'text', f'Questions {told}.', 'note'
    kinds = sorted(result.by_kind.items(), key=lambda item: -item[1]['n'])
    others = ('chance', 'blank', 'shuffled')
    rows = [
        (kind, f'{r["n"]:,}', f'{r["accuracy"]:.1%}', (r['accuracy'], r['chance']), *(f'{r[x]:.1%}' for x in others))
        for kind, r in sorted(kinds[:16])
    ]
    yield 'table', ('Kind', 'Questions', 'Accuracy', '', 'Chance', 'Blank', 'Shuffled'), rows
    note = 'Chance, the mark in a bar, is the score of always giving the kind’s commonest answer.'
    note += ' Blank and Shuffled are the scores with grey pictures, and with those of other questions.'
    note += ' A description counts by the share of its parts that are right.' if 'description' in dict(kinds) else ''
    note += (
        ' In heldout are the pairs of colour and shape that training never shows.'
        if split.startswith('heldout')
        else ''
    )
    note += f' {len(kinds) - 16} rarer kinds are left out.' if len(kinds) > 16 else ''
    yield 'text', note, 'note'
    right = result.accuracy
    rows = [('as they are', f'{right:.1%}', (right, 0), '')]
    for name, share in result.controls.items():
        rows.append((name, f'{share:.1%}', (share, 0), f'{100 * (share - right):+.1f} points'.replace('-', '−')))
    yield 'table', ('Pictures', 'Accuracy', '', 'Difference'), rows
    yield 'text', result.verdict(), 'verdict'


def answered(file):
    """The rows of an evaluation's .jsonl that have an answer: the others tell why they were left out."""
    return [row for row in runfolder.read_lines(file) if 'answer' in row]


def answers(family, runs):
    """Blocks: a dozen questions with their images, and the conversations of chat.jsonl."""
    for run_, part, _ in itertools.islice(results(runs[::-1], 'vqa'), 1):
        file = runfolder.result_file(runfolder.Paths(run_.folder).results, 'vqa', part)
        if not (rows := answered(file.with_suffix('.jsonl'))):
            break
        chosen = choose(rows)
        found = find_images(run_.config, {row['image'] for row in chosen}) if run_.config else {}
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
    for name, rows in itertools.groupby(runfolder.read_lines(family / 'chat.jsonl'), key=lambda row: row['image']):
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
        data = ' '.join(value for value in record['data'].values() if value and isinstance(value, str))
        rows.append((run_.stage, data, '; '.join(parents) or '–', frozen or '–', record['tokenizer'][:12]))
        for session in record['sessions'][-1:]:  # a converted run has none
            packages = ', '.join(f'{name} {version}' for name, version in session['versions'].items())
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
    if run_.lineage and not run_.lineage['sessions']:
        source = next(parent['run'] for parent in run_.lineage['parents'])
        kind = 'nanogptvision' if config.size == 'nanogptvision' else 'hf'
        return f'python -m nanovision_jax.convert --from={kind} --input={shlex.quote(source)} --output={run_.folder}'
    line = f'python -m nanovision_jax.train --config={file}:{config.size}'
    if config.name != config.size:
        line += f' --config.name={shlex.quote(config.name)}'
    if file.exists():
        try:
            usual = runpy.run_path(str(file))['get_config'](config.size)
        except UserError:  # a config file of somebody's own, with a size of its own
            return line
        usual.name, usual.init_from, usual.run_dir = config.name, config.init_from, config.run_dir
        usual.model.tower, usual.model.decoder = config.model.tower, config.model.decoder
        configs.fill(usual)
        told = ()
        with contextlib.suppress(UserError):  # what it started from is gone: every field is told
            told = _take_over(usual)
        usual.run_dir, usual.init_from = str(pathlib.Path('runs', config.name, run_.stage)), ''
        usual.model.tower = usual.model.decoder = ''
        for name in configs.fields(configs.Config):
            value = configs.get(config, name)
            if name not in told and not runconfig.equal(name, value, configs.get(usual, name)):
                line += f' --config.{name}={shlex.quote(str(value))}'
    return line


def _take_over(config):
    """Takes over what runs fix; of published weights, which need not be there any more, returns the fields they fix."""
    fixed = ()
    for source in start.available(config, anew=True):
        if isinstance(source, start.Run):
            for name, value in source.fixes(config).items():
                configs.put(config, name, value)
        else:
            fixed += start.VISION if source.part == 'vision' else (*start.DECODER, 'data.tokenizer')
    return fixed


def write(family) -> pathlib.Path:
    """Writes report.html and report.md into a family folder, and returns the path of the first."""
    family = pathlib.Path(family)
    runs = open_runs(family)
    check_writable(family)
    blocks = list(tell(family, runs))
    runfolder.write_whole(family / 'report.md', '\n\n'.join(map(page.markdown_block, blocks)) + '\n')
    file = family / 'report.html'
    runfolder.write_whole(file, page.html_page(family.resolve().name, blocks))
    return file
