"""Typed configs and the size dial: every field, listed once, with its default.

A config file defines get_config(size) and returns a Config; commandline.py reads it. No jax is imported, so that
mistakes are answered at once.
"""

import dataclasses
import json
import os
import pathlib
import re
import typing

from nanovision_jax.data.mixture import CONVERSATIONS, PREPARED, parse_source, parts_of
from nanovision_jax.errors import UserError, nearest

STAGES = ('clip', 'pretrain', 'sft', 'vision_pretrain', 'vision_instruct')
# The stages that one may start from, the usual one first.
PARENTS = {'sft': ('pretrain',), 'vision_pretrain': ('sft', 'pretrain'), 'vision_instruct': ('vision_pretrain',)}


@dataclasses.dataclass(unsafe_hash=True)  # a static part of jitted models
class Vision:
    """A vision tower and the pictures it takes. `mean` and `std` normalise pixels in 0..1.

    kind: clip has a class token and a norm before its blocks, siglip neither, and a bias on its patches.
    fit: crop (the short side to image_size, then the middle square; CLIP), pad (to a square first; LLaVA 1.5) or
    stretch (SigLIP).
    """

    kind: str = 'clip'
    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    activation: str = 'quick_gelu'  # quick_gelu, gelu (exact) or gelu_tanh
    epsilon: float = 1e-5  # of the norms
    fit: str = 'crop'
    resample: str = 'bicubic'  # or bilinear
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def patches(self):
        """Patch tokens a picture: P."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def class_tokens(self):
        """Tokens before the patches: one class token, or none."""
        return int(self.kind == 'clip')


@dataclasses.dataclass(unsafe_hash=True)  # a static part of jitted models
class Text:
    """CLIP's text tower; its context is data.length, its output has `embed` dimensions like the vision tower's."""

    width: int = 512
    layers: int = 12
    heads: int = 8
    ffn: int = 2048
    embed: int = 512


@dataclasses.dataclass(unsafe_hash=True)  # a static part of jitted models
class Model:
    """The decoder, and what the vision stages add to it."""

    layers: int = 20
    width: int = 1280
    heads: int = 10
    ffn: int = 5120
    positions: int = 2048  # the longest context; data.length may be shorter
    rope_theta: float = 1e6
    flavour: str = 'gpt'  # gpt (LayerNorm, ReLU) or llama (RMSNorm, SwiGLU; Llama, SmolLM2, Qwen2, Qwen3)
    epsilon: float = 1e-5  # of the norms
    tied: bool = False  # the embedding is the output layer too
    kv_heads: int = 0  # llama: key-value heads; 0 is as many as heads
    head_dim: int = 0  # llama: 0 is width / heads
    qkv_bias: bool = False  # llama: Qwen2's
    qk_norm: bool = False  # llama: Qwen3's
    rope_scaling: tuple[float, ...] = ()  # llama: factor, low and high frequency factor, original context (Llama 3.1)
    remat: bool = False  # recompute each block in the backward pass: less memory, a third more work
    unroll: int = 1  # layers a scan step: more is faster to run and slower to compile
    projector: str = 'mlp'  # mlp (LLaVA 1.5) or linear (LLaVA v1)
    contrastive: str = 'softmax'  # the loss of stage clip: softmax (CLIP) or sigmoid (SigLIP)
    decoder: str = ''  # a Hugging Face folder or id that the decoder starts from, and whose tokenizer it takes
    tower: str = ''  # a clip run folder, a Hugging Face folder or id; '' is the clip run beside this one
    vision: Vision = dataclasses.field(default_factory=Vision)
    text: Text = dataclasses.field(default_factory=Text)

    @property
    def head_size(self):
        """Numbers a head: H."""
        return self.head_dim or self.width // self.heads


@dataclasses.dataclass
class Data:
    """Where the examples come from and how they become batches."""

    source: str = 'tiny_world'  # a prepared set or part of it, magpie[:10%]; tiny_world, conversations, text or shards
    path: str = ''  # the file or folder; '' is data for prepared sets, runs/<name>/data for tiny_world
    images: str = ''  # the zip or folder of pictures that conversations name; '' is images.zip or images/ beside path
    mixture: str = ''  # prepared sets by their share of the examples, instead of source: llava_instruct:0.9,magpie:0.1
    tokenizer: str = 'train'  # train (on this data), a folder, or a Hugging Face id
    vocab_size: int = 1024  # of a trained tokenizer, special tokens included
    batch_size: int = 32  # rows a step, over all devices
    length: int = 1024  # tokens a row
    slots: int = 4  # pictures a row, in the vision stages
    augment: bool = False  # clip only: random crop and mirror; wrong where left and right matter
    workers: int = 0  # processes that read and decode; 0 uses threads of this one


@dataclasses.dataclass
class Optim:
    """The optimizer and its schedule."""

    name: str = 'adamw'  # adamw, muon (matrices by Muon, the rest by AdamW) or sgd
    learning_rate: float = 1e-3
    end_learning_rate: float = 1e-4
    schedule: str = 'cosine'  # cosine or linear, from learning_rate to end_learning_rate
    warmup: float = 1000.0  # steps; below 1, a share of all steps
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1  # of matrices only: never norms, biases, embeddings
    clip_norm: float = 1.0
    accumulate: int = 1  # a step's batch goes through in this many parts


@dataclasses.dataclass
class Mesh:
    """Devices per axis. -1 is all that the other axes leave; the product must use every device."""

    data: int = -1  # copies of the model, each on its part of the batch
    fsdp: int = 1  # parameters and optimizer state in this many parts, batch too
    tensor: int = 1  # each matrix product in this many parts


@dataclasses.dataclass
class Checkpoint:
    """How often state is saved, and how many checkpoints are kept."""

    every: int = 1000
    keep: int = 2


@dataclasses.dataclass
class Eval:
    """Evaluation on held-out data as the run goes: how often, and over how many batches."""

    every: int = 500
    batches: int = 20


@dataclasses.dataclass
class Log:
    """How often a line is logged, and to what beside metrics.jsonl: '' or tensorboard."""

    every: int = 10
    to: str = ''


@dataclasses.dataclass
class Config:
    """A run of one stage."""

    stage: str = 'pretrain'
    size: str = 'd20'
    name: str = ''  # the family of runs; default: the size
    run_dir: str = ''  # default: runs/<name>/<stage>
    init_from: str = ''  # the run this one starts from; default: the previous stage beside it
    steps: int = 0  # 0: as many as data passes (epochs) take
    epochs: float = 1.0
    seed: int = 0
    dtype: str = 'auto'  # of compute; auto is bfloat16 on GPU and TPU, float32 on CPU. Parameters are float32
    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    optim: Optim = dataclasses.field(default_factory=Optim)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    eval: Eval = dataclasses.field(default_factory=Eval)
    log: Log = dataclasses.field(default_factory=Log)

    @property
    def family(self):
        """The folder that the stages of one road share: runs/<name>."""
        return pathlib.Path(self.run_dir).parent


# The size dial -------------------------------------------------------------------------------------------------------


def base_config(stage, size):
    """A Config whose models have `size`: tiny, or d<even depth> as d20 (width 64·d, heads of 128, ffn 4·width).

    The tower beside a d<depth> decoder is a ViT-B/16 (CLIP, arXiv:2103.00020); tiny's has no class token.
    """
    config = Config(stage=stage, size=size)
    if size == 'tiny':
        config.model = Model(layers=4, width=128, heads=4, ffn=512, positions=512, unroll=4)
        config.model.vision = Vision('siglip', image_size=60, patch_size=20, width=192, layers=3, heads=3, ffn=768)
        config.model.text = Text(width=128, layers=1, heads=2, ffn=512, embed=128)
    elif (match := re.fullmatch(r'd(\d+)', size)) and int(match[1]) > 0 and int(match[1]) % 2 == 0:
        depth = int(match[1])
        config.model = Model(layers=depth, width=64 * depth, heads=depth // 2, ffn=256 * depth, remat=True)
    else:
        raise UserError(f'no size {size!r}: sizes are tiny and d2, d4, … d20, … (an even depth).')
    return config


# Fields --------------------------------------------------------------------------------------------------------------


def fields(kind, prefix=''):
    """{'optim.learning_rate': float, …}: every settable field of a config dataclass, by its dotted name."""
    found = {}
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        if dataclasses.is_dataclass(hint):
            found |= fields(hint, f'{prefix}{field.name}.')
        else:
            found[prefix + field.name] = typing.get_origin(hint) or hint
    return found


def fill(config):
    """Sets the fields whose default follows from others: name, run_dir, data.path; what published weights fix."""
    config.name = config.name or config.size
    config.run_dir = config.run_dir or os.path.join('runs', config.name, config.stage)
    if config.data.mixture:
        config.data.source = 'mixture'
    if parts_of(config.data):
        config.data.path = config.data.path or 'data'
    elif config.data.source == 'tiny_world':
        config.data.path = config.data.path or str(config.family / 'data')
    model = config.model
    parent = pathlib.Path(config.init_from or config.family / PARENTS.get(config.stage, [''])[0])
    if config.stage in PARENTS and (parent / 'config.json').is_file():  # published weights are named once a road
        theirs = from_json((parent / 'config.json').read_text()).model
        model.decoder, model.tower = model.decoder or theirs.decoder, model.tower or theirs.tower
    tower = config.stage.startswith('vision') and is_foreign(model.tower)
    decoder = config.stage != 'clip' and model.decoder
    if tower or decoder:
        from nanovision_jax import hf
    if tower:
        padded = model.vision.fit == 'pad'  # LLaVA 1.5's choice, whatever the tower was trained on
        model.vision = hf.vision_config(hf.find_tower(model.tower))
        model.vision.fit = 'pad' if padded else model.vision.fit
    if decoder:
        folder = hf.find_decoder(model.decoder)
        for name, value in hf.read_decoder_config(folder).items():
            setattr(model, name, value)
        config.data.tokenizer = str(folder)


def is_foreign(tower):
    """Whether model.tower is a Hugging Face folder or id, and not a run folder or the place of one."""
    folder = pathlib.Path(tower)
    if folder.is_dir():
        return (folder / 'config.json').is_file() and not (folder / 'lineage.json').is_file()
    return tower.count('/') == 1 and not folder.parent.is_dir()


def check(config):
    """Raises UserError where fields contradict each other, before any time is spent."""
    m, d, o = config.model, config.data, config.optim
    choices = {
        'stage': STAGES,
        'dtype': ('auto', 'float32', 'bfloat16'),
        'model.flavour': ('gpt', 'llama'),
        'model.projector': ('mlp', 'linear'),
        'model.contrastive': ('softmax', 'sigmoid'),
        'model.vision.kind': ('clip', 'siglip'),
        'model.vision.activation': ('quick_gelu', 'gelu', 'gelu_tanh'),
        'model.vision.fit': ('crop', 'pad', 'stretch'),
        'model.vision.resample': ('bicubic', 'bilinear'),
        'optim.name': ('adamw', 'muon', 'sgd'),
        'optim.schedule': ('cosine', 'linear'),
        'log.to': ('', 'tensorboard'),
    }
    for name, allowed in choices.items():
        if (value := get(config, name)) not in allowed:
            raise UserError(f'{name} is {value!r}.{nearest(value, allowed)}')
    positive = ['data.batch_size', 'data.length', 'data.slots', 'data.vocab_size', 'optim.accumulate', 'log.every']
    positive += ['checkpoint.every', 'checkpoint.keep', 'eval.every', 'eval.batches', 'optim.clip_norm']
    zero = ('model.kv_heads', 'model.head_dim')
    positive += [n for n, kind in fields(Config).items() if n.startswith('model.') and kind is int and n not in zero]
    for name in positive:
        if not get(config, name) > 0:  # nan is not above 0 either
            raise UserError(f'{name} is {get(config, name)}, and must be above 0.')
    for name in ('seed', 'data.workers', 'optim.learning_rate', 'optim.warmup'):
        if not get(config, name) >= 0:
            raise UserError(f'{name} is {get(config, name)}, and must not be below 0.')
    if config.steps < 0 or (config.steps == 0 and config.epochs <= 0):
        raise UserError('how long? Set steps above 0, or steps=0 and epochs above 0.')
    for name, part in (('model', m), ('model.vision', m.vision), ('model.text', m.text)):
        if part.width % part.heads and not getattr(part, 'head_dim', 0):
            raise UserError(f'{name}.width {part.width} is not a multiple of {name}.heads {part.heads}.')
    llama_only = [n for n in ('kv_heads', 'head_dim', 'qkv_bias', 'qk_norm', 'rope_scaling') if getattr(m, n)]
    if m.flavour == 'gpt' and llama_only:
        raise UserError(f"model.{llama_only[0]} is for model.flavour 'llama'.")
    if m.heads % (m.kv_heads or m.heads):
        raise UserError(f'model.heads {m.heads} is not a multiple of model.kv_heads {m.kv_heads}.')
    if len(m.rope_scaling) not in (0, 4):
        raise UserError('model.rope_scaling takes four numbers: factor, low and high frequency factor, context.')
    if m.head_size % 2:
        raise UserError(
            f'heads of {m.head_size} cannot be rotated in pairs (RoPE): make model.width / model.heads even.'
        )
    if m.vision.image_size % m.vision.patch_size:
        raise UserError(
            f'model.vision.image_size {m.vision.image_size} is not a multiple of patch_size {m.vision.patch_size}.'
        )
    if config.stage != 'clip' and d.length > m.positions:
        raise UserError(f'data.length {d.length} is beyond model.positions {m.positions}.')
    if d.batch_size % o.accumulate:
        raise UserError(f'data.batch_size {d.batch_size} does not divide into optim.accumulate={o.accumulate} parts.')
    _check_data(config)


def _check_data(config):
    """Raises UserError where the stage cannot learn from what data.source and data.mixture name."""
    d = config.data
    part = parse_source(d.source)
    known = ('tiny_world', 'conversations', 'text', 'shards', *PREPARED)
    if part.name not in known and not d.mixture:
        raise UserError(f'data.source is {part.name!r}.{nearest(part.name, known)}')
    if part.subset and part.name not in PREPARED:
        raise UserError(f'data.source {d.source!r}: only prepared sets are taken in part.')
    if d.mixture and config.stage == 'pretrain':
        raise UserError('data.mixture mixes conversations: stage pretrain learns from text, one data.source of it.')
    names = [part.name for part in parts_of(d)] or [part.name]
    if config.stage != 'pretrain' and (text := {'text', 'shards', 'fineweb_edu'} & set(names)):
        raise UserError(f'stage {config.stage} learns from conversations: data.source {text.pop()!r} is for pretrain.')
    if config.stage == 'pretrain' and {'conversations', *CONVERSATIONS} & set(names):
        raise UserError("stage pretrain learns from text: set data.source to 'fineweb_edu', 'text' or 'shards'.")
    if config.stage == 'clip' and 'magpie' in names:
        raise UserError('stage clip learns from pictures with captions: magpie has none.')
    if part.name != 'tiny_world' and not d.path:
        raise UserError(f'data.source {d.source!r} needs data.path: the file or folder to read.')


def get(config, name):
    """The value of a dotted field name."""
    for part in name.split('.'):
        config = getattr(config, part)
    return config


# On disk -------------------------------------------------------------------------------------------------------------


def to_json(config):
    """The config as text, as config.json in a run folder holds it."""
    return json.dumps(dataclasses.asdict(config), indent=2) + '\n'


def from_json(text):
    """The Config that `to_json` wrote. Raises UserError for a field this version does not know."""

    def build(kind, values):
        hints = typing.get_type_hints(kind)
        if unknown := set(values) - set(hints):
            raise UserError(f'config.json has a field this version does not know: {sorted(unknown)[0]!r}.')
        made = {}
        for name, value in values.items():
            if dataclasses.is_dataclass(hints[name]):
                made[name] = build(hints[name], value)
            else:
                made[name] = tuple(value) if isinstance(value, list) else value
        return kind(**made)

    return build(Config, json.loads(text))


def differences(old, new):
    """Dotted names of the fields in which two runs' results may differ.

    Where a run lives, how it reads, saves, logs, evaluates and on which mesh it runs may change between a run and its
    continuation.
    """
    free = ('name', 'run_dir', 'data.workers', 'checkpoint.', 'eval.', 'log.', 'mesh.')
    return [name for name in fields(Config) if not name.startswith(free) and get(old, name) != get(new, name)]
