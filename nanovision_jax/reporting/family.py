"""The report of a family of runs, or of one: its chapters, as blocks that as_html and as_markdown turn into pages."""

import datetime
import html
import itertools
import os
import pathlib
import shlex
import sys

from nanovision_jax import config as configs
from nanovision_jax.errors import check_writable
from nanovision_jax.reporting import as_html, as_markdown, origin, pictures, scores, training
from nanovision_jax.reporting.runs import Run, is_run, open_runs, results
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.runs.config_file import NAMES, PATHS

RUNS, COMPARISON = ('nanovision_jax: ' + what for what in ('runs', 'a comparison'))  # what pages say they are of


def write(folder, price: float | None = None, words: tuple = ()) -> pathlib.Path:
    """Writes report.html and report.md into the folder of a family or a run, and returns the path of the first.

    price: dollars an hour and device. words: blocks of words.chapter(), which takes jax.
    Raises UserError where there is no run.
    """
    folder = pathlib.Path(folder)
    runs = open_runs(folder)
    check_writable(folder)
    return write_pages(folder, title(folder), list(tell(folder, runs, price, words)), RUNS)


def write_after(folder: pathlib.Path):
    """Writes the report of a run that has ended, unless it is there. What goes wrong with it is said, and no more."""
    report, lineage = folder / 'report.html', folder / 'lineage.json'
    try:
        if not report.exists() or report.stat().st_mtime < lineage.stat().st_mtime:
            print(f'report: {write(folder)}')
    except Exception as error:  # the run is done and whole, whatever becomes of its report
        print(f'no report was written: {error}', file=sys.stderr)


def write_pages(folder: pathlib.Path, name: str, blocks: list[tuple], about: str) -> pathlib.Path:
    """Writes blocks as report.html and report.md, and returns the path of the first. about: see as_html.page."""
    runfolder.write_whole(folder / 'report.md', as_markdown.page(blocks))
    runfolder.write_whole(folder / 'report.html', as_html.page(name, blocks, about))
    return folder / 'report.html'


def for_others(run_dir) -> str | None:
    """The report.html of a run's family or, where that has none, of the run; None where there is neither.

    Of places on this machine only the last part is left. A page that write() did not make, or a version of it that left
    no mark in it, is somebody's own.
    """
    run_dir = pathlib.Path(run_dir).resolve()
    for file in (run_dir.parent / 'report.html', run_dir / 'report.html'):
        if file.is_file() and f'content="{RUNS}"' in (text := file.read_text(errors='replace'))[:1000]:
            for start in _places(open_runs(file.parent)):
                text = text.replace(html.escape(start), '')
            return text
    return None


def _places(runs):
    """The beginnings, longest first, of all paths that a report of runs may tell and that lead out of this folder."""
    told = [str(folder) for run_ in runs for folder in (run_.folder, run_.folder.parent)]
    for run_ in runs:
        told += [configs.get(run_.config, name) for name in (*PATHS, *NAMES)] if run_.config else []
        told += [parent['run'] for parent in run_.lineage.get('parents', ())]
        told += [run_.lineage.get('data', {}).get(name, '') for name in ('path', 'images')]
    starts = {os.path.dirname(path) for one in filter(None, told) for path in (one, os.path.abspath(one))}
    starts |= {os.getcwd(), os.path.expanduser('~')}
    starts = {f'{start}/' for start in starts if start.startswith(('/', '../')) and start != '/'}
    starts |= {start.replace("'", "'\"'\"'") for start in starts}  # as a shell reads it
    starts |= {run_.config.checkpoint.mirror for run_ in runs if run_.config} - {''}
    return sorted(starts, key=len)[::-1]


def title(folder: pathlib.Path) -> str:
    """What a report calls a family or a run."""
    folder = folder.resolve()
    return f'{folder.parent.name}: {folder.name}' if is_run(folder) else folder.name


def tell(folder: pathlib.Path, runs: list[Run], price: float | None = None, words: tuple = ()):
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
    yield from pictures.chapter(folder, runs)
    yield from words
    yield from origin.chapter(runs)
    line = f'python -m nanovision_jax.report {shlex.quote(str(folder))}'
    yield from origin.reproduce(runs, line + (f' --price={price:g}' if price is not None else ''))
