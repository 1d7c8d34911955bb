"""Makes a Hugging Face Space of a run: a page on which everyone can talk with it.

    python scripts/space/share.py --run=runs/tiny/vision_instruct --output=FOLDER      the folder of a Space
    python scripts/space/share.py --run=runs/tiny/vision_instruct --push=USER/NAME     and uploads it

In the folder are the run, without its optimizer and without any path of this machine, this package and what it needs.
`python app.py` in it starts the page as the hub does. --push takes the key that `hf auth login` keeps.
"""

import contextlib
import pathlib
import shutil
import tempfile
import tomllib

from nanovision_jax.cli import Parser, run
from nanovision_jax.errors import UserError
from nanovision_jax.hf import convert
from nanovision_jax.inference.run import load

ROOT = pathlib.Path(__file__).parents[2]


def requirements():
    """What the package needs to serve a page, a line each, as pyproject.toml has it."""
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    extras = project['optional-dependencies']
    wanted = [*project['dependencies'], *extras['serve'], *extras['page']]
    return [name for name in wanted if not name.startswith('nanovision_jax')]


def make(run_dir, folder):
    """Writes the folder of a Space. Raises UserError where there is no run, or something is there already."""
    folder = pathlib.Path(folder)
    if folder.exists():
        raise UserError(f'{folder} exists: name a folder that does not.')
    opened = load(run_dir)
    # Through an export, in which there is no path of this machine; what is said of that is not about the Space.
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(None):
        convert.to_folder(opened, pathlib.Path(temporary) / 'hf')
        convert.from_folder(f'{temporary}/hf', folder / 'runs' / opened.config.name / opened.config.stage)
    for name in ('app.py', 'README.md'):
        shutil.copy(pathlib.Path(__file__).with_name(name), folder)
    shutil.copytree(ROOT / 'nanovision_jax', folder / 'nanovision_jax', ignore=shutil.ignore_patterns('__pycache__'))
    (folder / 'requirements.txt').write_text('\n'.join(requirements()) + '\n')


def main(argv):
    """The command: see the module's docstring."""
    parser = Parser(prog='python scripts/space/share.py', description=__doc__)
    parser.add_argument('--run', required=True, help='a run folder')
    parser.add_argument('--output', help='a folder that is not there yet')
    parser.add_argument('--push', help='USER/NAME of a Space, new or not')
    args = parser.parse(argv)
    if not (args.output or args.push):
        raise UserError('where to? Say --output=FOLDER, --push=USER/NAME, or both.')
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(args.output or pathlib.Path(temporary) / 'space')
        make(args.run, folder)
        if args.push:
            convert.upload(folder, args.push, 'space', kept=bool(args.output))
            print(f'https://huggingface.co/spaces/{args.push}')
        else:
            print(f'written: {folder}')


if __name__ == '__main__':
    run(main)
