"""The report of two runs or more beside each other: what differs, curves over tokens and hours, paired scores."""

import os
import pathlib
import shlex

from nanovision_jax import config as configs
from nanovision_jax.errors import UserError, check_writable
from nanovision_jax.evals import compare
from nanovision_jax.reporting import family, training
from nanovision_jax.reporting.charts import Chart, Line
from nanovision_jax.reporting.runs import Run, open_run
from nanovision_jax.runs import config_file as runconfig


def write(folders: list, output=None, price: float | None = None) -> pathlib.Path:
    """Writes report.html and report.md, which compare runs, into a folder, and returns the path of the first.

    output: by default the folder in which all of the runs lie, or this one if that is the root. A report there that is
    of something else is left alone, with a UserError, as is one for folders that are no runs.
    """
    folders = [pathlib.Path(folder) for folder in folders]
    places = [folder.resolve() for folder in folders]
    if twice := next((folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1), None):
        raise UserError(f'{twice} is given twice: a comparison takes different runs.')
    shared = pathlib.Path(os.path.commonpath([place.parent for place in places]))
    root = shared == pathlib.Path(shared.anchor)
    names = ['/'.join(place.parts[-2:]) if root else str(place.relative_to(shared)) for place in places]
    runs = [open_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    folder = pathlib.Path(output) if output else pathlib.Path() if root else shared
    check_writable(folder)
    for file in (folder / 'report.html', folder / 'report.md'):
        told = '# Comparison' if file.suffix == '.md' else family.COMPARISON
        if file.exists() and told not in file.read_text(errors='replace')[:1000]:
            raise UserError(f'{file} is there and is no comparison: say --output=FOLDER.')
    folder.mkdir(parents=True, exist_ok=True)
    return family.write_pages(folder, 'Comparison', list(tell(runs, price)), family.COMPARISON)


def tell(runs: list[Run], price: float | None = None):
    """Yields the blocks of the comparison."""
    yield 'title', f'Comparison of {len(runs)} runs', ', '.join(run_.name for run_ in runs)
    yield 'heading', 'Facts'
    yield from training.facts(runs, price)
    yield from differences(runs)
    if found := curves(runs):
        yield 'heading', 'Losses'
        yield 'text', 'Training as a line, held-out data as dots. Point at a curve to read it.', ''
        yield 'legend', [run_.name for run_ in runs]
        yield 'charts', found
    yield from paired(runs)
    yield 'heading', 'How to reproduce'
    yield 'commands', [f'python -m nanovision_jax.report {shlex.join(str(run_.folder) for run_ in runs)}']


def differences(runs: list[Run]):
    """Blocks: the fields of the configs in which the runs differ, of those that may change results, and the mesh."""
    told = [run_.config for run_ in runs]
    yield 'heading', 'Differences of config'
    if None in told:
        yield 'text', 'Not all of these runs have a config.json.', ''
        return
    differ = {name for other in told[1:] for name in runconfig.differences(told[0], other)}
    names = [
        name
        for name in configs.fields(configs.Config)
        if name in differ or (name.startswith('mesh.') and len({configs.get(config, name) for config in told}) > 1)
    ]
    if not names:
        yield 'text', 'None that changes results.', ''
        return
    rows = [(name, *(_value(configs.get(config, name)) for config in told)) for name in names]
    yield 'words', ('Field', *(run_.name for run_ in runs)), rows


def _value(value):
    return str(value) if value not in ('', ()) else '–'


def curves(runs: list[Run]) -> list[Chart]:
    """Charts of the runs' losses over tokens and over hours, a colour a run."""
    charts = []
    for x, over, scale in (('tokens', 'tokens', 1), ('hours', 'seconds', 1 / 3600)):
        lines = []
        for colour, run_ in enumerate(runs):
            for name, log, dots in (('', 'loss', False), (' held-out', 'eval_loss', True)):
                if points := [(at * scale, y) for at, y in run_.series(log, over)]:
                    lines.append(Line(run_.name + name, points, colour, dots))
        if lines:
            charts.append(Chart(f'Loss over {x}', 'loss', lines, x))
    return charts


def paired(runs: list[Run]):
    """Blocks: scores on the questions that all runs were asked, and how far each is from the first run's."""
    yield 'heading', 'Paired scores'
    try:
        found = list(compare.paired([str(run_.folder) for run_ in runs]))
    except UserError:
        yield 'text', 'No evaluation, question by question, is in all of these runs.', ''
        return
    names = {str(run_.folder): run_.name for run_ in runs}
    for one in found:
        yield 'subheading', one.title()
        rows = []
        for score in one.scores:
            rows.append((names[score.run], score.told(), score.change().replace('-', '−') or '–', score.verdict()))
        yield 'table', ('Run', 'Score', 'Difference from the first', ''), rows
    yield 'text', (
        'The same questions on the same images are resampled for both runs, so that what is hard for both widens no '
        'interval.'
    ), 'note'  # fmt: skip
