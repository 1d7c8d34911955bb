"""Of a report, where runs came from: their tree, data, parents and versions, and the commands that make them again."""

import collections
import contextlib
import pathlib
import runpy
import shlex

from nanovision_jax import config as configs
from nanovision_jax.errors import UserError
from nanovision_jax.evals.base import BENCHMARKS, part_options
from nanovision_jax.reporting import tree
from nanovision_jax.reporting.runs import Run, results
from nanovision_jax.runs import config_file as runconfig
from nanovision_jax.training import start


def chapter(runs: list[Run]):
    """Blocks: the tree, data, parents and versions."""
    rows, versions = [], collections.defaultdict(list)
    for run_ in (run_ for run_ in runs if run_.lineage):
        record, frozen = run_.lineage, ', '.join(sorted(run_.lineage.get('frozen_before', ())))
        if frozen and 'finished' in record:
            frozen += ': unchanged' if record['frozen_before'] == record.get('frozen_after') else ': CHANGED'
        parents = [f'{p["run"]}, step {p["step"]}, {p["part"]}, {p["manifest"][:12]}' for p in record['parents']]
        data = ' '.join(value for value in record['data'].values() if value and isinstance(value, str))
        rows.append((run_.name, data, '; '.join(parents) or '–', frozen or '–', record['tokenizer'][:12]))
        for session in record['sessions'][-1:]:  # a converted run has none
            packages = ', '.join(f'{name} {version}' for name, version in session['versions'].items())
            versions[packages].append(run_.name)
    if rows:
        yield 'heading', 'Where it came from'
        yield 'tree', tree.ancestry(runs)
        yield 'words', ('Run', 'Data', 'Starts from (run, step, part, manifest)', 'Frozen', 'Tokenizer'), rows
        yield 'text', 'Digests are the first 12 digits; lineage.json in a run folder has them whole.', 'note'
        for packages, names in versions.items():
            yield 'text', f'{", ".join(names)}: {packages}.', 'note'


def reproduce(runs: list[Run], *last: str):
    """Blocks: the commands that train and evaluate runs as these were. last: further ones."""
    lines = [train_command(run_) for run_ in runs if run_.config]
    for run_, part, result in results(runs, 'bpb', 'vqa', *BENCHMARKS):
        line = f'python -m nanovision_jax.evaluate --run={shlex.quote(str(run_.folder))} --task={result.task}'
        options = part_options(part)
        files = ['--data=FOLDER'] * (result.task in BENCHMARKS and not any(o.startswith('--data=') for o in options))
        lines.append(' '.join([line, *files, *map(shlex.quote, options)]))
    yield 'heading', 'How to reproduce'
    yield 'commands', [*lines, *last]


def train_command(run_: Run) -> str:
    """The command line of a run: its config file and, where that can be read from here, every field that differs."""
    config = run_.config
    file = pathlib.Path('configs') / f'{config.stage}.py'
    if run_.lineage and not run_.lineage['sessions']:
        source = next(parent['run'] for parent in run_.lineage['parents'])
        place = shlex.quote(str(run_.folder))
        kind = 'nanogptvision' if config.size == 'nanogptvision' else 'hf'
        return f'python -m nanovision_jax.convert --from={kind} --input={shlex.quote(source)} --output={place}'
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
        usual.run_dir, usual.init_from = str(pathlib.Path('runs', config.name, config.stage)), ''
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
