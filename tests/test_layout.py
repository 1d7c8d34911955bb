"""The structure of the package: which floor stands on which, and what each needs."""

import ast
import collections
import functools
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from nanovision_jax import prepare
from nanovision_jax.data import catalog

PACKAGE = ROOT / 'nanovision_jax'
VERBS = {'train', 'plan', 'chat', 'serve', 'evaluate', 'show', 'report', 'prepare', 'convert'}
# Packages that most runs do without; transformers takes long to load, and only who imports a tokenizer needs it.
# jax's kernels are for one hardware each.
OPTIONAL = {
    'torch',
    'apache_beam',
    'tensorboardX',
    'wandb',
    'trackio',
    'readline',
    'transformers',
    'pynvml',
    'jax.experimental.pallas.ops',
}
OPTIONAL |= {'llguidance', 'nanovision_jax.serving.guide'}  # answers in JSON are not everybody's
OPTIONAL |= {'fsspec', 'gguf'}  # nor is an object store, nor llama.cpp
# The library's doors, which load what is behind them when they are used; and a program of its own, with limits to set.
DOORS = {'nanovision_jax', 'nanovision_jax.hf', 'nanovision_jax.data.sandbox'}


@functools.cache
def modules():
    """{dotted name: file} of every module of the package."""
    found = {}
    for file in PACKAGE.rglob('*.py'):
        parts = file.relative_to(ROOT).with_suffix('').parts
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = file
    return found


def imports(node):
    """The dotted names that a tree imports; of `from a import b` both a and a.b."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module
            yield from (f'{child.module}.{alias.name}' for alias in child.names)


@functools.cache
def tree(name):
    return ast.parse(modules()[name].read_text())


@functools.cache
def own(name):
    """The modules of the package that a module imports, anywhere in it."""
    return {found for found in imports(tree(name)) if found in modules() and found != name}


def reached(name):
    """The modules of the package that importing one loads, itself included, as far as they are named at the top."""
    found, waiting = set(), [name]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            top = [node for node in tree(name).body if isinstance(node, ast.Import | ast.ImportFrom)]
            waiting += {m for node in top for m in imports(node) if m in modules()}
            waiting += ['.'.join(name.split('.')[:n]) for n in range(1, name.count('.') + 1)]
    return found


def foreign(names):
    """The packages from elsewhere that modules import at their top."""
    found = set()
    for name in names:
        top = (node for node in tree(name).body if isinstance(node, ast.Import | ast.ImportFrom))
        found |= {module.partition('.')[0] for node in top for module in imports(node)}
    return found - set(sys.stdlib_module_names) - {'nanovision_jax'}


def inside(folder):
    return [name for name in modules() if name.startswith(f'nanovision_jax.{folder}')]


def test_models_need_jax_flax_and_jaxtyping_alone():
    needed = set().union(*map(reached, inside('models')))
    assert foreign(needed) == {'jax', 'flax', 'jaxtyping'}
    assert {name.split('.')[1] for name in needed if '.' in name} == {'models', 'stages', 'errors'}


def test_data_needs_no_jax():
    needed = set().union(*map(reached, inside('data')))
    assert not foreign(needed) & {'jax', 'flax', 'optax', 'orbax', 'torch', 'chex'}
    assert 'jax' in foreign(reached('nanovision_jax.training.step'))  # the search finds it


@pytest.mark.parametrize(
    ('below', 'above'),
    [
        ('inference', ('training', 'evals', 'serving')),
        ('evals', ('training', 'serving', 'hf')),
        ('serving', ('training', 'evals', 'hf')),
        ('models', ('training', 'inference', 'data', 'runs', 'parallel', 'hf', 'evals')),
        ('parallel', ('training', 'inference', 'runs', 'hf', 'evals')),
        ('data', ('models', 'training', 'inference', 'parallel', 'hf', 'evals')),
        ('runs', ('training', 'inference', 'hf', 'evals', 'models')),
        ('hf', ('training', 'inference')),
    ],
)
def test_no_arrow_runs_back_up(below, above):
    for name in inside(below):
        up = [other for other in own(name) if other.split('.')[1:2] and other.split('.')[1] in above]
        assert not up, f'{name} imports {up}'


def test_nothing_imports_a_verb():
    for name in modules():
        assert not {other for other in own(name) if other.removeprefix('nanovision_jax.') in VERBS}, name


def test_no_circle():
    state = collections.defaultdict(int)  # 1: on the way, 2: done

    def walk(name, way):
        assert state[name] != 1, f'a circle: {" → ".join([*way, name])}'
        if not state[name]:
            state[name] = 1
            for other in own(name):
                if modules()[other].name != '__init__.py' or other not in name:
                    walk(other, [*way, name])
            state[name] = 2

    for name in modules():
        walk(name, [])


def test_imports_inside_functions_are_of_optional_packages_or_in_a_verbs_main():
    for name in modules().keys() - DOORS:
        verb = name.removeprefix('nanovision_jax.') in VERBS
        for function in ast.walk(tree(name)):
            main = verb and getattr(function, 'name', '') == 'main'
            if isinstance(function, ast.FunctionDef) and not main:
                names = set(imports(function))
                found = {module for module in names if not module.startswith(tuple(OPTIONAL))}
                assert not found, f'{name}.{function.name} imports {found}'


HEAVY = 'grain orbax tokenizers transformers PIL tqdm ml_collections tensorflow_datasets pyarrow safetensors jinja2'


@pytest.mark.parametrize(
    'module',
    [f'nanovision_jax.{name}' for name in ('training.step', 'training.objectives', 'data.batch')] + ['train', 'decode'],
)
def test_the_step_needs_jax_flax_optax_numpy_and_jaxtyping_alone(module):
    blocker = (
        'import sys\n'
        'class Blocker:\n'
        '    def find_spec(self, name, path=None, target=None):\n'
        f'        if name.partition(".")[0] in {HEAVY.split()!r}: raise ImportError(f"{{name}} is blocked")\n'
        'sys.meta_path.insert(0, Blocker())\n'
        f'import {module}\n'
        'print("jax" in sys.modules)\n'
    )
    path = f'{ROOT}:{ROOT}/scripts/benchmarks'
    done = subprocess.run([sys.executable, '-c', blocker], capture_output=True, text=True, env={'PYTHONPATH': path})
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.strip() == str(module != 'nanovision_jax.data.batch')


@pytest.mark.parametrize('verb', sorted(VERBS))
def test_help_and_a_mistake_load_no_jax(verb):
    for argv, code in ((['--help'], 0), (['--nonsense=1'], 2)):
        program = (
            f'import sys; sys.argv = ["{verb}", *{argv!r}]\n'
            f'from nanovision_jax import {verb}, cli\n'
            'try: cli.run(%s.main)\n'
            'except SystemExit as stop: code = stop.code\n'
            'else: code = 0\n'
            'print("jax" in sys.modules, code or 0)' % verb
        )
        done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.splitlines()[-1] == f'False {code}', (argv, done.stdout[-200:], done.stderr[-300:])


def test_git_ignores_no_source_file():
    git = functools.partial(subprocess.run, capture_output=True, text=True, cwd=ROOT)
    tracked = git(['git', 'ls-files'])
    if tracked.returncode == 128:
        pytest.skip('not a git repository')
    files = {*tracked.stdout.splitlines(), *(str(path.relative_to(ROOT)) for path in PACKAGE.rglob('*.py'))}
    assert {'.ci/run', 'nanovision_jax/runs/folder.py'} <= files
    assert git(['git', 'check-ignore', '--no-index', '--stdin'], input='\n'.join(files)).stdout == ''
    assert git(['git', 'check-ignore', '--no-index', 'runs/tiny/config.json']).stdout  # and it does ignore runs


def test_the_readme_tells_every_data_set_and_its_licence():
    rows = [line.split('|') for line in (ROOT / 'README.md').read_text().splitlines() if line.startswith('| `')]
    told = {cells[1].split('`')[1]: cells[3].strip() for cells in rows if len(cells) == 5}
    for name, record in catalog.SETS.items():
        assert name in told, f'the README does not tell of {name}'
        assert record.licence in told[name], f'the README tells another licence of {name}'
    assert all(f'\n  {name} ' in prepare.__doc__ for name in catalog.SETS)


def test_the_guide_names_files_that_are_there():
    guide = (ROOT / 'scripts/CONTRIBUTING.md').read_text()
    named = set(re.findall(r'[\w/]+/\w+\.(?:py|sh)\b', guide))
    assert len(named) > 12 and [name for name in named if not (ROOT / name).is_file()] == []
