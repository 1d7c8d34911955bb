"""How a published set becomes one that training reads: fetched, then built by its module of datasets/."""

import importlib
import json
import pathlib
import shutil

from nanovision_jax.data import catalog
from nanovision_jax.data.datasets.cauldron import RATINGS
from nanovision_jax.data.datasets.conversations_builder import build
from nanovision_jax.data.download import download
from nanovision_jax.errors import UserError, check_writable, nearest
from nanovision_jax.runs import lock

# Conversations are counted in characters: how many tokens they are depends on the tokenizer of the run that reads them.
_TOLD = ('rows', 'train', 'validation', 'pictures', 'characters', 'train_tokens', 'val_tokens', 'left_out', 'bad')


def prepare(name: str, source: str = '', output: str = 'data', **options) -> dict:
    """Prepares the set `name` and returns what its source.json says. Options: see prepare.py.

    Raises UserError, among others where the set is there but was made with other options.
    """
    if name not in catalog.SETS:
        raise UserError(f'no data set {name!r}.{nearest(name, catalog.SETS)}')
    record = catalog.SETS[name]
    minimum = _ratings(options['minimum']) if options.get('minimum') else None
    if minimum and name != 'cauldron':
        raise UserError(f'--minimum is for cauldron: {name} has no ratings.')
    source = str(pathlib.Path(source).resolve()) if source else ''
    asked = {'from': source, 'minimum': minimum}
    asked |= {key: options.get(key) for key in ('repo', 'revision', 'files', 'tokenizer')}
    asked = {key: value for key, value in asked.items() if value}
    home = pathlib.Path(output) / name / ('' if record.is_text else catalog.PREPARED_VERSION)
    if made := _made_already(home, name, asked):
        return made
    if source and not pathlib.Path(source).exists():
        raise UserError(f'no folder {source}: say with --from where the files of {name} are.')
    check_writable(home)
    patterns = (options['files'],) if options.get('files') else ()
    made_from = asked
    with lock.held(pathlib.Path(output) / f'.{name}.lock', f'{name} in {output}', other='--output'):
        if made := _made_already(home, name, asked):  # meanwhile
            return made
        if not source:
            source, fetched = _fetch(record, output, patterns, options)
            made_from = asked | fetched
        return _make(record, source, home, patterns, minimum, made_from, options)


def _made_already(home, name, asked):
    """What source.json says of a set that is there. Raises UserError where it was made with other options."""
    if not (home / 'source.json').exists():
        return None
    made = json.loads((home / 'source.json').read_text())
    for key, value in asked.items():
        if made.get(key) != value:
            raise UserError(f'{home} was prepared with --{key}={made.get(key)}: remove it, or choose another --output.')
    print(f'{name} is prepared already, in {home}: nothing to do')
    return made


def lines(made: dict) -> list[str]:
    """What was made, as lines of text."""
    told = ', '.join(f'{made[key]:,} {key.replace("_", " ")}' for key in _TOLD if made.get(key))
    reasons = [f'  {count:,} × {reason}' for reason, count in sorted(made.get('reasons', {}).items())]
    return [told, *reasons]


def _make(record, source, home, patterns, minimum, made_from, options):
    workers = options.get('workers') or 0
    module, _, kind = record.builder.partition(':')
    module = importlib.import_module(f'nanovision_jax.data.datasets.{module}')
    if record.is_text:
        tokenizer = options.get('tokenizer') or 'gpt2'
        return module.prepare(source, home, patterns, tokenizer, workers, options.get('beam') or '', made_from)
    for left in home.parent.glob('incomplete.*'):  # of a preparation that was killed
        shutil.rmtree(left)
    asked = {'source': source, 'patterns': patterns, 'minimum': minimum, 'workers': workers, 'made_from': made_from}
    build(getattr(module, kind)(data_dir=str(home.parent.parent), file_format='array_record', **asked))
    return json.loads((home / 'source.json').read_text())


def _fetch(record, output, patterns, options):
    """Downloads a set: (folder, what source.json says of it)."""
    repo = options.get('repo') or next(iter(record.repositories), '')
    if not repo:
        raise UserError(f'{record.name} is your own data: say --from=FOLDER, or --repo=ID for a data set of the hub.')
    if not (patterns or record.files):
        raise UserError(f"{repo} is large: say which part of it with --files, as in --files='ai2d/*'.")
    folder = pathlib.Path(output) / 'downloads' / record.name
    revision = download(repo, options.get('revision'), patterns or record.files, folder, record.beside)
    if record.beside and not any(folder.glob('*.zip')) and not any(f.is_dir() for f in folder.glob('[!.]*')):
        raise UserError(
            f'{record.name} needs pictures that the hub has not: place {record.beside} in {folder} and run this again.'
        )
    return str(folder), {'repo': repo, 'revision': revision}


def _ratings(text):
    """'relevance:4,formatting:3' as {rating: least value}."""
    found = {}
    for entry in text.split(','):
        name, _, value = entry.partition(':')
        if name not in RATINGS:
            raise UserError(f'no rating {name!r}.{nearest(name, RATINGS)}')
        if not value.isdigit():
            raise UserError(f'--minimum takes RATING:NUMBER, as in relevance:4, not {entry!r}.')
        found[name] = int(value)
    return found
