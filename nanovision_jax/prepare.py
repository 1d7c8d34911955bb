"""Prepares a published data set for training: every row checked, every picture decoded once, records written.

    python -m nanovision_jax.prepare llava_pretrain --from=FOLDER    files that are already there
    python -m nanovision_jax.prepare llava_pretrain                  downloads them first
    python -m nanovision_jax.train --config=configs/vision_pretrain.py --config.data.source=llava_pretrain

  fineweb_edu      FineWeb-Edu as .npy or .bin token shards (used where they lie), or as parquet (tokenized)
  magpie           Magpie-Phi3-Pro: questions and answers
  llava_pretrain   LLaVA-CC3M-Pretrain-595K or, with --repo, LLaVA-Pretrain 558K: captions
  llava_instruct   LLaVA-Instruct-150K or the 665K mix of LLaVA 1.5: conversations about pictures
  cauldron         The Cauldron or, with --repo=HuggingFaceM4/FineVision, FineVision; say which with --files='ai2d/*'
  chat             conversations in any form that data.source=conversations takes

A set lies in OUTPUT/NAME, with bad_rows.jsonl (what was left out, and why) and source.json (what it is made from).
Downloads are kept in OUTPUT/downloads/NAME.
"""

import json
import pathlib
import shutil

from nanovision_jax.data.catalog import PREPARED
from nanovision_jax.errors import Parser, UserError, check_writable, nearest, run

# Where each set is published, which of its files are needed, and what else must be placed beside them.
ORIGINS = {
    'fineweb_edu': ('ShallowU/FineWeb-Edu-10B-Tokens-NPY', ('*.npy',), ''),
    'magpie': ('Magpie-Align/Magpie-Phi3-Pro-300K-Filtered', ('data/*.parquet',), ''),
    'llava_pretrain': ('liuhaotian/LLaVA-CC3M-Pretrain-595K', ('chat.json', '*558k.json', 'images.zip'), ''),
    'llava_instruct': (
        'liuhaotian/LLaVA-Instruct-150K',
        ('llava_instruct_150k.json',),
        "COCO's train2017.zip (for the 665K coco, gqa, ocr_vqa, textvqa, vg)",
    ),
    'cauldron': ('HuggingFaceM4/the_cauldron', (), ''),
    'chat': ('', (), ''),
}


def prepare(name, source='', output='data', **options):
    """Prepares the set `name` and returns what its source.json says. Options: see main().

    Raises UserError, among others where the set is there but was made with other options.
    """
    if name not in PREPARED:
        raise UserError(f'no data set {name!r}.{nearest(name, PREPARED)}')
    minimum = _ratings(options['minimum']) if options.get('minimum') else None
    if minimum and name != 'cauldron':
        raise UserError(f'--minimum is for cauldron: {name} has no ratings.')
    source = str(pathlib.Path(source).resolve()) if source else ''
    asked = {'from': source, 'minimum': minimum}
    asked |= {key: options.get(key) for key in ('repo', 'revision', 'files', 'tokenizer')}
    asked = {key: value for key, value in asked.items() if value}
    home = _home(name, output)
    if (home / 'source.json').exists():
        made = json.loads((home / 'source.json').read_text())
        for key, value in asked.items():
            if made.get(key) != value:
                raise UserError(
                    f'{home} was prepared with --{key}={made.get(key)}: remove it, or choose another --output.'
                )
        print(f'{name} is prepared already, in {home}: nothing to do')
        return made
    if source and not pathlib.Path(source).exists():
        raise UserError(f'no folder {source}: say with --from where the files of {name} are.')
    check_writable(home)
    patterns = (options['files'],) if options.get('files') else ()
    made_from = asked
    if not source:
        source, fetched = _fetch(name, output, patterns, options)
        made_from = asked | fetched
    return _make(name, source, home, patterns, minimum, made_from, options)


def _make(name, source, home, patterns, minimum, made_from, options):
    workers = options.get('workers') or 0
    if name == 'fineweb_edu':
        from nanovision_jax.data.datasets import fineweb_edu

        tokenizer = options.get('tokenizer') or 'gpt2'
        return fineweb_edu.prepare(source, home, patterns, tokenizer, workers, options.get('beam') or '', made_from)
    from nanovision_jax.data.datasets import cauldron, chat, llava_instruct, llava_pretrain, magpie
    from nanovision_jax.data.datasets.conversations_builder import build

    builders = {
        'magpie': magpie.Magpie,
        'llava_pretrain': llava_pretrain.LlavaPretrain,
        'llava_instruct': llava_instruct.LlavaInstruct,
        'cauldron': cauldron.Cauldron,
        'chat': chat.Chat,
    }
    for left in home.parent.glob('incomplete.*'):  # of a preparation that was killed
        shutil.rmtree(left)
    asked = {'source': source, 'patterns': patterns, 'minimum': minimum, 'workers': workers, 'made_from': made_from}
    build(builders[name](data_dir=str(home.parent.parent), file_format='array_record', **asked))
    return json.loads((home / 'source.json').read_text())


def _home(name, output):
    """The folder of a prepared set: it is there when the set is whole."""
    from nanovision_jax.data.sources import PREPARED_VERSION

    return pathlib.Path(output) / name / ('' if name == 'fineweb_edu' else PREPARED_VERSION)


def _fetch(name, output, patterns, options):
    """Downloads a set: (folder, what source.json says of it)."""
    from nanovision_jax.data.download import download

    own, wanted, beside = ORIGINS[name]
    repo = options.get('repo') or own
    if not repo:
        raise UserError(f'{name} is your own data: say --from=FOLDER, or --repo=ID for a data set of the hub.')
    if not (patterns or wanted):
        raise UserError(f"{repo} is large: say which part of it with --files, as in --files='ai2d/*'.")
    folder = pathlib.Path(output) / 'downloads' / name
    revision = download(repo, options.get('revision'), patterns or wanted, folder, beside)
    if beside and not any(folder.glob('*.zip')) and not any(f.is_dir() for f in folder.glob('[!.]*')):
        raise UserError(f'{name} needs pictures that the hub has not: place {beside} in {folder} and run this again.')
    return str(folder), {'repo': repo, 'revision': revision}


def _ratings(text):
    """'relevance:4,formatting:3' as {rating: least value}."""
    from nanovision_jax.data.datasets.cauldron import RATINGS

    found = {}
    for entry in text.split(','):
        name, _, value = entry.partition(':')
        if name not in RATINGS:
            raise UserError(f'no rating {name!r}.{nearest(name, RATINGS)}')
        if not value.isdigit():
            raise UserError(f'--minimum takes RATING:NUMBER, as in relevance:4, not {entry!r}.')
        found[name] = int(value)
    return found


def lines(made):
    """What was made, as lines of text."""
    told = ', '.join(f'{made[key]:,} {key.replace("_", " ")}' for key in _TOLD if made.get(key))
    reasons = [f'  {count:,} × {reason}' for reason, count in sorted(made.get('reasons', {}).items())]
    return [told, *reasons]


# Conversations are counted in characters: how many tokens they are depends on the tokenizer of the run that reads them.
_TOLD = ('rows', 'train', 'validation', 'pictures', 'characters', 'train_tokens', 'val_tokens', 'left_out', 'bad')


def main(argv):
    """The command: see the module's docstring."""
    parser = Parser(prog='python -m nanovision_jax.prepare', description=__doc__)
    parser.add_argument('name', help=', '.join(PREPARED))
    parser.add_argument('--from', dest='source', default='', help='the folder of the published files')
    parser.add_argument('--output', default='data', help='where prepared sets lie (default: data)')
    parser.add_argument('--files', help='which files of the folder or the hub hold the rows, as in "ai2d/*"')
    parser.add_argument('--repo', help='another data set of the hub in the same form')
    parser.add_argument('--revision', help='its commit (default: a pinned one, or the newest, which source.json keeps)')
    parser.add_argument('--minimum', help="FineVision's ratings a turn must have, as in relevance:4,formatting:3")
    parser.add_argument('--tokenizer', help='of text for fineweb_edu: a folder or an id (default: gpt2)')
    parser.add_argument('--workers', type=int, help='threads or processes (default: as many as there are cores)')
    parser.add_argument('--beam', help='options of the Apache Beam pipeline that tokenizes')
    args = vars(parser.parse(argv))
    name, output = args.pop('name'), args['output']
    print('\n'.join(lines(prepare(name, **args))))
    print(f'train on it: --config.data.source={name} --config.data.path={output}')


if __name__ == '__main__':
    run(main)
