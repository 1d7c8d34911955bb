"""The report of a family of runs, or of one: its chapters, as blocks that as_html and as_markdown turn into pages."""

import datetime
import itertools
import pathlib
import shlex

from nanovision_jax.errors import check_writable
from nanovision_jax.reporting import as_html, as_markdown, origin, pictures, scores, training
from nanovision_jax.reporting.runs import Run, is_run, open_runs, results
from nanovision_jax.runs import folder as runfolder


def write(folder, price: float | None = None, words: str | None = None) -> pathlib.Path:
    """Writes report.html and report.md into the folder of a family or a run, and returns the path of the first.

    price: dollars an hour and device. words: a picture, of whose patches the nearest words are told, which takes jax.
    Raises UserError where there is no run.
    """
    folder = pathlib.Path(folder)
    runs = open_runs(folder)
    check_writable(folder)
    return write_pages(folder, title(folder), list(tell(folder, runs, price, words)), 'runs')


def write_pages(folder: pathlib.Path, name: str, blocks: list[tuple], about: str) -> pathlib.Path:
    """Writes blocks as report.html and report.md, and returns the path of the first. about: see as_html.page."""
    runfolder.write_whole(folder / 'report.md', as_markdown.page(blocks))
    runfolder.write_whole(folder / 'report.html', as_html.page(name, blocks, about))
    return folder / 'report.html'


def title(folder: pathlib.Path) -> str:
    """What a report calls a family or a run."""
    folder = folder.resolve()
    return f'{folder.parent.name}: {folder.name}' if is_run(folder) else folder.name


def tell(folder: pathlib.Path, runs: list[Run], price: float | None = None, words: str | None = None):
    """Yields the blocks of the report; as_html.block and as_markdown.block say what there is."""
    started = [session['started'] for run_ in runs for session in run_.lineage.get('sessions', ())]
    day = datetime.datetime.fromisoformat(max(started)) if started else datetime.datetime.now()
    yield 'title', title(folder), f'{"Trained" if started else "Reported"} {day.day} {day:%B %Y}'
    minutes = sum(max(run_.all('seconds'), default=0) for run_ in runs) / 60
    lead = f'{len(runs)} {"stages" if len(runs) > 1 else "stage"}, {minutes:.1f} minutes of training'
    costs = [training.dollars(run_, price) for run_ in runs] if price is not None else []
    if costs and None not in costs:
        lead += f', ${sum(costs):,.2f} at {price:g} dollars a device and hour'
    lead += '.'
    for found in itertools.islice(results(runs[::-1], 'vqa'), 1):
        lead += f' {scores.headline(*found)}'
    yield 'text', lead, 'lead'
    yield from training.chapter(runs, price)
    yield from scores.chapter(runs)
    yield from pictures.chapter(folder, runs, words)
    yield from origin.chapter(runs)
    line = f'python -m nanovision_jax.report {shlex.quote(str(folder))}'
    line += f' --price={price:g}' if price is not None else ''
    yield from origin.reproduce(runs, line + (f' --words={shlex.quote(words)}' if words else ''))
