"""What each stage trains, what it starts from, and its loss.

A stage is data (data/pipeline.py), a start (here), the parts it trains (here) and a loss (here). The rest is the same
for all: train.py.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import optax

from nanovision_jax import checkpoint, hf
from nanovision_jax import config as configs
from nanovision_jax.config import PARENTS, is_foreign
from nanovision_jax.errors import UserError

# Top-level parts of the model that learn; None is all of them. What is not named is frozen: it gets no gradient, no
# optimizer state, and its bytes are the same afterwards.
TRAINS = {
    'clip': None,
    'pretrain': None,
    'sft': None,
    'vision_pretrain': ('projector',),
    'vision_instruct': ('projector', 'decoder'),
}


def loss(stage, model, batch):
    """(sum of losses, their number): next-token cross-entropy over learned tokens, or CLIP's loss over pairs."""
    if stage == 'clip':
        pairs = batch['images'].shape[0]
        return model.loss(model(batch['images'], batch['tokens'], batch['ends'])) * pairs, jnp.float32(pairs)
    inputs = [batch[name] for name in ('tokens', 'positions', 'segments', 'images') if name in batch]
    losses = optax.softmax_cross_entropy_with_integer_labels(model(*inputs), batch['targets'])
    return jnp.sum(losses * batch['weights']), jnp.sum(batch['weights'])


@dataclasses.dataclass
class Parent:
    """A run whose parameters this one starts from: `part` of its tree ('' is all) becomes `target` of ours.

    Without a step it is no run but a Hugging Face folder: a tower if part is 'vision', else a decoder.
    """

    run_dir: pathlib.Path
    step: int | None
    part: str
    target: str


def parents(config):
    """What a run starts from: the stage before it (or model.decoder) and, where it sees first, a tower.

    Raises UserError, naming the command that makes it, where one is missing, and where one does not fit.
    """
    found, vision = [], config.stage.startswith('vision')
    allowed = PARENTS.get(config.stage, (config.stage,))
    run_dir = pathlib.Path(config.init_from or config.family / allowed[0])
    foreign = config.model.decoder and not config.init_from and not (vision and (run_dir / 'config.json').is_file())
    if foreign and config.stage != 'clip':
        found.append(Parent(hf.find_decoder(config.model.decoder), None, '', 'decoder' if vision else ''))
    elif config.init_from or config.stage in PARENTS:
        found.append(_parent(config, run_dir, allowed, '', 'decoder' if config.stage == 'vision_pretrain' else ''))
    if config.stage == 'vision_pretrain' or (vision and foreign):
        if is_foreign(config.model.tower):
            found.append(Parent(hf.find_tower(config.model.tower), None, 'vision', 'vision'))
        else:
            tower = pathlib.Path(config.model.tower or config.family / 'clip')
            found.append(_parent(config, tower, ('clip',), 'vision', 'vision'))
    return found


def _parent(config, run_dir, allowed, part, target):
    if not (run_dir / 'config.json').is_file() or (step := checkpoint.newest(run_dir)) is None:
        name = f' --config.name={config.name}' if config.name != config.size else ''
        raise UserError(
            f'{config.stage} starts from the run {run_dir}, which does not exist. '
            f'Make it: python -m nanovision_jax.train --config=configs/{allowed[0]}.py:{config.size}{name}'
        )
    theirs = configs.from_json((run_dir / 'config.json').read_text())
    if theirs.stage not in allowed:
        raise UserError(
            f'{config.stage} cannot start from {run_dir}, a {theirs.stage} run: it takes {" or ".join(allowed)}.'
        )
    names = []
    if part == 'vision' or theirs.stage.startswith('vision'):
        names += [f'model.vision.{f.name}' for f in dataclasses.fields(configs.Vision)]
    if theirs.stage.startswith('vision'):
        names += ['model.projector']
    if theirs.stage != 'clip':
        elsewhere = ('decoder', 'tower', 'contrastive', 'projector', 'remat', 'unroll', 'vision', 'text')
        names += [f'model.{f.name}' for f in dataclasses.fields(configs.Model) if f.name not in elsewhere]
    for name in names:
        ours, given = configs.get(config, name), configs.get(theirs, name)
        if ours != given:
            raise UserError(
                f'{name} is {ours} here and {given} in {run_dir}, which this run starts from: make them equal.'
            )
    return Parent(run_dir, step, part, target)


def check_tokenizer(parent, tokenizer):
    """Raises UserError if a parent run was trained with another tokenizer (a tower alone does not mind)."""
    from nanovision_jax.data.tokenizer import Tokenizer

    if parent.step is None or parent.part == 'vision':
        return
    if Tokenizer(parent.run_dir / 'tokenizer').digest != tokenizer.digest:
        raise UserError(
            f'{parent.run_dir} was trained with another tokenizer than {tokenizer.folder}: '
            f'set --config.data.tokenizer={parent.run_dir / "tokenizer"} under a new --config.name, or start elsewhere.'
        )


def inherit(parent, params, vocab_size):
    """`params` (nested dicts of arrays, or of ShapeDtypeStructs with shardings) with the parent's part read in."""
    target = params[parent.target] if parent.target else params
    if parent.step is None:
        if parent.part == 'vision':
            read = hf.tower_weights(parent.run_dir, target)
        else:
            read = hf.read_decoder(parent.run_dir, target, vocab_size)
        read = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), read, target)
        return params | {parent.target: read} if parent.target else read
    wrapped = {parent.part: target} if parent.part else target
    read = checkpoint.restore(parent.run_dir, parent.step, 'params', checkpoint.like(wrapped))
    read = read[parent.part] if parent.part else read
    return params | {parent.target: read} if parent.target else read
