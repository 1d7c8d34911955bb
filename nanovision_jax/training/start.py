"""Where a run starts, and what it takes over from there.

The parameters come from the first of these that is there; it is printed as the run begins:

  1. the run itself, where it has a checkpoint: it goes on (not with --anew)
  2. init_from: a run of the same stage or of one before it
  3. the run of the stage before, beside this one
  4. model.decoder: a published decoder, a folder or a hub id
  5. nothing (stages clip and pretrain): random numbers

A stage that starts to see (vision_pretrain; vision_instruct from 4) takes a tower too:

  1. model.tower: a clip run, a published tower's folder or a hub id; where it is not given, the one that the run it
     starts from was given
  2. the clip run beside this one

What such a source fixes (the shape of the model, projector, tower, tokenizer, the length of positions) is taken over
where it is not given; what is given and contradicts is an error. No jax is imported here: load.py reads the parameters.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib

from nanovision_jax import config as configs
from nanovision_jax.errors import UserError
from nanovision_jax.hf import configs as hf_configs
from nanovision_jax.runs import config_file as runconfig
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.stages import stage_of

# Fields of config.Model that no decoder fixes.
_FREE = ('decoder', 'tower', 'contrastive', 'projector', 'attention', 'remat', 'unroll', 'vision', 'text')
DECODER = tuple(f'model.{f.name}' for f in dataclasses.fields(configs.Model) if f.name not in _FREE)
VISION = tuple(f'model.vision.{f.name}' for f in dataclasses.fields(configs.Vision))
WHERE = ('init_from', 'model.decoder', 'model.tower', 'data.tokenizer', 'data.template')  # which say where a run starts
TEXT = tuple(f'model.text.{f.name}' for f in dataclasses.fields(configs.Text))


class Missing(UserError):
    """A run that one starts from is not there (yet)."""


@dataclasses.dataclass
class Run:
    """A run as a source: `part` of its parameter tree ('' is all) becomes `target` of ours ('' is all)."""

    folder: pathlib.Path
    part: str = ''
    target: str = ''
    step: int | None = None  # which checkpoint: known once prove() was called

    @functools.cached_property
    def config(self):
        """The run's config."""
        return runconfig.read(self.folder)

    @property
    def tokenizer(self):
        """The folder of the tokenizer that comes with the parameters; None: they know no words."""
        return None if self.part == 'vision' else runfolder.Paths(self.folder).tokenizer

    def fixes(self, config):
        """{field: value} of what this source fixes in `config`."""
        theirs, stage, names = self.config, stage_of(self.config), []
        if stage.model in ('clip', 'vlm'):
            names += VISION
        if stage.sees:
            names += ['model.projector', 'model.tower']
        if self.part == 'vision':
            return {name: configs.get(theirs, name) for name in names}
        names += [*TEXT, 'model.contrastive'] if stage.model == 'clip' else [*DECODER, 'model.decoder']
        names += ['data.tokenizer', 'data.template']
        names += ['data.vocab_size'] if theirs.data.tokenizer == runconfig.TRAINED else []
        return {name: configs.get(theirs, name) for name in names}

    def prove(self, unfinished: bool = False):
        """Finds the newest checkpoint whose parameters are whole, and looks at what lies beside it.

        unfinished: whether a run that has not come to its end will do. Raises UserError where something is wrong.
        """
        self.step = runfolder.newest(self.folder, 'params')
        runfolder.check_beside(self.folder, self.step)
        record = runfolder.read_lineage(self.folder)
        if not record:
            raise UserError(f'{self.folder} has no lineage.json, which says what it was made of: bring it back.')
        if record.get('frozen_after', record['frozen_before']) != record['frozen_before']:
            raise UserError(f'parts of {self.folder} that should be frozen changed in training (lineage.json).')
        if record.get('finished') != self.step and not unfinished:
            raise UserError(
                f'{self.folder} is not finished, it is at step {self.step}: let the command that trains it end, or say '
                '--config.allow_unfinished_parent=true to start from it as it is.'
            )

    def place(self, run_dir):
        """What lineage.json of the run in `run_dir` says of where these parameters are."""
        return runfolder.portable(self.folder, run_dir)

    def digest(self):
        """What proves which parameters these are: the digest of the checkpoint's manifest."""
        return runfolder.file_digest(runfolder.Paths(self.folder).manifest(self.step))

    def __str__(self):
        return f'{self.folder}, step {self.step}' if self.step else str(self.folder)


@dataclasses.dataclass
class Published:
    """Published weights as a source: a tower where part is 'vision', else a decoder. `name` is a folder or a hub id."""

    name: str
    part: str
    target: str
    step: None = None

    @functools.cached_property
    def folder(self):
        """Where the files are; a hub id's are downloaded first."""
        return hf_configs.tower_folder(self.name) if self.part == 'vision' else hf_configs.decoder_folder(self.name)

    tokenizer = None  # config.data.tokenizer says which: it is imported, not copied

    def fixes(self, config):
        """{field: value} of what this source fixes in `config`."""
        if self.part == 'vision':
            vision = hf_configs.vision_config(self.folder)
            fixed = {name: getattr(vision, name.rpartition('.')[2]) for name in VISION}
            if config.model.vision.fit == 'pad':  # LLaVA 1.5's choice, whatever the tower was trained on
                del fixed['model.vision.fit']
            return fixed
        fixed = {f'model.{name}': value for name, value in hf_configs.read_decoder_config(self.folder).items()}
        return fixed | {'data.tokenizer': self.name}

    def prove(self, unfinished: bool = False):
        """Nothing to prove: what does not fit is found on reading."""

    def place(self, run_dir):
        """As Run.place()."""
        return self.name if runconfig.hub_id(self.name) else runfolder.portable(self.folder, run_dir)

    def digest(self):
        """What proves which parameters these are: a digest over the files of weights."""
        return runfolder.weights_digest(self.folder)

    def __str__(self):
        return f'the published weights {self.name}'


def find(config, anew: bool = False) -> list:
    """The sources of a run: what its parameters come from and, where it starts to see, its tower. See the module.

    anew: the run itself is none of them. Raises Missing where one is not there, naming the command that makes it.
    """
    return list(_sources(config, anew))


def _sources(config, anew):
    own = pathlib.Path(config.run_dir)
    if not anew and is_run(own):
        yield Run(own)
        return
    stage, model = stage_of(config), config.model
    allowed = (*stage.parents, stage.name)
    before = pathlib.Path(config.init_from) if config.init_from else config.family / allowed[0]
    if config.init_from and os.path.abspath(before) == os.path.abspath(own):
        raise UserError(f'init_from is {config.init_from!r}, the run itself: choose another --config.name.')
    if config.init_from or (stage.parents and (is_run(before) or not model.decoder)):
        first = _run(config, before, allowed)
        sees_already = stage_of(first.config).sees
        first.target = 'decoder' if stage.sees and not sees_already else ''
        tower = model.tower or first.config.model.tower
    elif model.decoder and stage.decodes:
        first, sees_already, tower = Published(model.decoder, '', 'decoder' if stage.sees else ''), False, model.tower
    else:
        return
    yield first
    if not stage.sees or sees_already:
        return
    place = pathlib.Path(tower or config.family / 'clip')
    if tower and not is_run(place) and not runfolder.Paths(place).lineage.is_file():
        yield Published(tower, 'vision', 'vision')
    else:
        yield _run(config, place, ('clip',), 'vision', 'vision')


def is_run(folder: pathlib.Path) -> bool:
    """Whether a folder is a run that one can start from: with a config and a checkpoint written to its end."""
    return runfolder.Paths(folder).config.is_file() and bool(runfolder.whole_steps(folder))


def _run(config, folder, allowed, part='', target=''):
    """A run as a source. Raises UserError where it is missing, or of a stage that is not allowed."""
    if not is_run(folder) and not part and config.init_from:
        raise UserError(f'init_from is {config.init_from!r}, which is no run with a checkpoint: name a run folder.')
    if not is_run(folder):
        name = f' --config.name={config.name}' if config.name != config.size else ''
        if config.family != pathlib.Path('runs', config.name):
            name = f' --config.run_dir={folder}'
        raise Missing(
            f'{config.stage} starts from the run {folder}, which does not exist or has no checkpoint. '
            f'Make it: python -m nanovision_jax.train --config=configs/{allowed[0]}.py:{config.size}{name}'
        )
    source = Run(folder, part, target)
    if (stage := source.config.stage) not in allowed:
        raise UserError(f'{config.stage} cannot start from {folder}, a {stage} run: it takes {" or ".join(allowed)}.')
    return source


def available(config, anew: bool = False) -> list:
    """As find(), without those that are not there yet."""
    found = []
    with contextlib.suppress(Missing):
        for source in _sources(config, anew):
            found.append(source)
    return found


def inherit(config, given: set[str], anew: bool = False) -> list[str]:
    """Takes over what the sources fix and is not in `given` (names of fields). Returns lines that say what changed.

    A source that is not there yet fixes nothing. Raises UserError for what is given and contradicts; a run that goes on
    is compared with its own config elsewhere (resume.open_run).
    """
    told = []
    for source in available(config, anew):
        taken, own = [], source.folder == pathlib.Path(config.run_dir)
        for name, value in source.fixes(config).items():
            if name in given:
                if not own:
                    _compare(config, source, name, value)
            elif configs.get(config, name) != value:
                configs.put(config, name, value)
                taken.append(f'{name}={value}')
        if taken:
            told.append(f'taken over from {source}: {", ".join(taken)}')
    _know_vocabulary(config, given)
    return told


def _know_vocabulary(config, given):
    """data.vocab_size is what the family's tokenizer was trained for. Raises UserError where another is given."""
    folder = config.family / 'tokenizer'
    size = runfolder.read_json(folder / 'source.json') if (folder / 'source.json').exists() else {}
    size = size.get('data.vocab_size', config.data.vocab_size)  # older tokenizers do not say it
    if config.data.tokenizer == runconfig.TRAINED and size != config.data.vocab_size:
        if 'data.vocab_size' in given:
            raise UserError(
                f'data.vocab_size is {config.data.vocab_size}, but the tokenizer in {folder} was trained for {size}: '
                'leave it out, or choose another --config.name.'
            )
        config.data.vocab_size = size


def check(config, sources: list):
    """Raises UserError where a field is not what a source fixes."""
    for source in sources:
        for name, value in source.fixes(config).items():
            _compare(config, source, name, value)


def _compare(config, source, name, value):
    """A name of weights that is not given contradicts nothing; a tokenizer is compared when it is opened."""
    ours = configs.get(config, name)
    open_question = name == 'data.tokenizer' and isinstance(source, Run)
    if not open_question and not (name in runconfig.NAMES and not ours) and not runconfig.equal(name, ours, value):
        raise UserError(
            f'{name} is {ours!r} here and {value!r} in {source}, which this run starts from: leave it out, or choose '
            'another --config.name.'
        )


def lines(config, sources: list) -> list[str]:
    """What is printed as a run begins: where it starts."""
    if not sources:
        return [f'{config.stage} starts from random numbers']
    told = [f'{config.stage} starts from {sources[0]}']
    return told + [f'tower from {source}' for source in sources[1:]]
