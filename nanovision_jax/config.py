"""Typed configs and the size dial: every field, listed once, with its default, its meaning and what it may be.

A config file defines get_config(size) and returns a Config; cli.py reads it. No jax is imported, so that
mistakes are answered at once. What a run takes over from where it starts is training/start.py's business.
"""

import dataclasses
import math
import os
import pathlib
import re
import typing

from nanovision_jax import caches
from nanovision_jax.data import catalog
from nanovision_jax.errors import UserError, nearest
from nanovision_jax.stages import STAGES

TINY = ('tiny', 'ltiny')  # sizes for a laptop and drawings
UNKNOWN = 'unknown'  # data.source of a run that was made of somebody's weights


def option(default, meaning, choices=(), least=None, above=None, below=None):
    """A field of a config: its default, what --help says of it, and what it may be.

    choices: the values that there are; least, above, below: bounds of a number. Numbers are finite in any case.
    """
    limits = {'choices': choices, 'least': least, 'above': above, 'below': below}
    metadata = {'meaning': meaning} | limits
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(unsafe_hash=True)  # a static part of jitted models
class Vision:
    """A vision tower and the pictures it takes."""

    kind: str = option('clip', 'clip (a class token, a norm before the blocks) or siglip', ('clip', 'siglip'))
    image_size: int = option(224, 'side of the square picture, in pixels', above=0)
    patch_size: int = option(16, 'side of a patch, in pixels', above=0)
    width: int = option(768, 'numbers a token', above=0)
    layers: int = option(12, 'blocks; features are taken before the last one', above=0)
    heads: int = option(12, 'attention heads', above=0)
    ffn: int = option(3072, 'width of the feed-forward layers', above=0)
    activation: str = option('quick_gelu', 'of the feed-forward layers', ('quick_gelu', 'gelu', 'gelu_tanh'))
    epsilon: float = option(1e-5, 'of the norms', above=0)
    fit: str = option(
        'crop',
        'how a picture becomes square: crop (the middle; CLIP), pad (mean colour; LLaVA 1.5) or stretch (SigLIP)',
        ('crop', 'pad', 'stretch'),
    )
    resample: str = option('bicubic', 'how a picture is resized', ('bicubic', 'bilinear'))
    mean: tuple[float, float, float] = option((0.48145466, 0.4578275, 0.40821073), 'subtracted from pixels in 0..1')
    std: tuple[float, float, float] = option((0.26862954, 0.26130258, 0.27577711), 'and what they are divided by')

    @property
    def patches(self) -> int:
        """Patch tokens a picture: P."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def class_tokens(self) -> int:
        """Tokens before the patches: one class token, or none."""
        return int(self.kind == 'clip')


@dataclasses.dataclass(unsafe_hash=True)  # a static part of jitted models
class Text:
    """CLIP's text tower; its context is data.length, its output has `embed` dimensions like the vision tower's."""

    width: int = option(512, 'numbers a token', above=0)
    layers: int = option(12, 'blocks', above=0)
    heads: int = option(8, 'attention heads', above=0)
    ffn: int = option(2048, 'width of the feed-forward layers', above=0)
    embed: int = option(512, 'dimensions in which pictures and captions are compared', above=0)


@dataclasses.dataclass(unsafe_hash=True)  # a static part of jitted models
class Model:
    """The decoder, and what the vision stages add to it."""

    layers: int = option(20, 'blocks of the decoder', above=0)
    width: int = option(1280, 'numbers a token', above=0)
    heads: int = option(10, 'attention heads', above=0)
    ffn: int = option(5120, 'width of the feed-forward layers', above=0)
    positions: int = option(2048, 'the longest context; data.length may be shorter', above=0)
    rope_theta: float = option(1e6, 'base of the rotary positions', above=0)
    flavour: str = option(
        'gpt', 'gpt (LayerNorm, ReLU) or llama (RMSNorm, SwiGLU: Llama, SmolLM2, Qwen2, Qwen3)', ('gpt', 'llama')
    )
    epsilon: float = option(1e-5, 'of the norms', above=0)
    tied: bool = option(False, 'the embedding is the output layer too')
    kv_heads: int = option(0, 'llama: key-value heads; 0 is as many as heads', least=0)
    head_dim: int = option(0, 'llama: numbers a head; 0 is width / heads', least=0)
    qkv_bias: bool = option(False, "llama: Qwen2's biases")
    qk_norm: bool = option(False, "llama: Qwen3's norms of queries and keys")
    rope_scaling: tuple[float, ...] = option(
        (), 'llama: factor, low and high frequency factor, original context (Llama 3.1)'
    )
    attention: str = option(
        'auto',
        'what packed rows go through: splash (TPU), pallas (GPU) or xla; cudnn (GPU) is for clip',
        ('auto', 'xla', 'splash', 'pallas', 'cudnn'),
    )
    remat: str = option(
        'auto',
        'what the backward pass recomputes: none, dots (all but matrix products) or full (whole blocks: the least '
        'memory, a third more work); auto is, with optim.accumulate, the fastest that fits',
        ('auto', 'none', 'dots', 'full'),
    )
    unroll: int = option(1, 'layers a scan step: more is faster to run and slower to compile', above=0)
    projector: str = option('mlp', 'mlp (LLaVA 1.5) or linear (LLaVA v1)', ('mlp', 'linear'))
    contrastive: str = option('softmax', "clip's loss: softmax (CLIP) or sigmoid (SigLIP)", ('softmax', 'sigmoid'))
    decoder: str = option('', 'a published decoder to start from: a folder, or a hub id as OWNER/NAME')
    tower: str = option('', 'a clip run, a published tower or a hub id; default: the clip run beside this one')
    vision: Vision = dataclasses.field(default_factory=Vision)
    text: Text = dataclasses.field(default_factory=Text)

    @property
    def head_size(self) -> int:
        """Numbers a head: H."""
        return self.head_dim or self.width // self.heads


@dataclasses.dataclass
class Data:
    """Where the examples come from and how they become batches."""

    source: str = option('tiny_world', 'a prepared set, or a part of one as in magpie[:10%]; or a kind of own data')
    path: str = option(
        '', 'the file or folder, s3://… and gs://… too; default: data for prepared sets, runs/NAME/data for tiny_world'
    )
    images: str = option('', 'the zip or folder of pictures; default: images.zip or images/ beside path')
    mixture: str = option('', 'prepared sets by share, instead of source: llava_instruct:0.9,magpie:0.1')
    tokenizer: str = option('train', 'train (one of its own, on this data), a folder, or a hub id')
    template: str = option(
        'auto', 'auto keeps the chat template that a published tokenizer comes with; own takes ours', ('auto', 'own')
    )
    vocab_size: int = option(1024, 'of a trained tokenizer, special tokens included', above=0)
    batch_size: int = option(32, 'rows a step, over all devices', above=0)
    length: int = option(1024, 'tokens a row', above=0)
    too_long: str = option(
        '',
        "what becomes of a first answer beyond length; '' drops up to 5% of the examples",
        ('', 'drop', 'cut', 'refuse'),
    )
    slots: int = option(4, 'pictures a row, in the vision stages', above=0)
    open_rows: int = option(16, 'rows that an example may still go into: more packs tighter', above=0)
    augment: bool = option(False, 'clip only: random crop and mirror; wrong where left and right matter')
    draft: bool = option(False, 'training decodes JPEGs of twice the size needed or more at a part of it: faster')
    cache_features: str = option(
        '',
        'vision stages: what the tower makes of the training pictures is kept on disk, in runs/NAME/features, and read '
        'instead of them: bf16, or int8 of half the size, which differs by up to 1/254 of the largest of its patch',
        ('', 'bf16', 'int8'),
    )
    workers: int = option(0, 'processes that read and decode; 0 uses threads of this one', least=0)
    timeout: float = option(120.0, 'seconds that reading a batch may take before something hangs', above=0)

    @property
    def local_path(self) -> str:
        """Where `path` is on this machine, once what lies in a store is fetched."""
        return caches.local(self.path)

    @property
    def local_images(self) -> str:
        """Where `images` are on this machine."""
        return caches.local(self.images)

    @property
    def named(self) -> catalog.Part:
        """What `source` names."""
        return catalog.parse_source(self.source)

    @property
    def prepared(self) -> tuple[catalog.Part, ...]:
        """The prepared sets that mixture or source name; none for another source."""
        return catalog.prepared_sets(self.source, self.mixture)


@dataclasses.dataclass
class Optim:
    """The optimizer and its schedule."""

    name: str = option('adamw', 'adamw, muon (matrices by Muon, the rest by AdamW) or sgd', ('adamw', 'muon', 'sgd'))
    learning_rate: float = option(1e-3, 'the highest, after the warmup', above=0)
    end_learning_rate: float = option(1e-4, 'that of the last step', least=0)
    schedule: str = option('cosine', 'from learning_rate to end_learning_rate', ('cosine', 'linear'))
    warmup: float = option(1000.0, 'steps; below 1, a share of all steps', least=0)
    b1: float = option(0.9, 'decay of the mean of gradients', least=0, below=1)
    b2: float = option(0.95, 'decay of the mean of their squares', least=0, below=1)
    weight_decay: float = option(0.1, 'of matrices only: never norms, biases, embeddings', least=0)
    clip_norm: float = option(1.0, 'gradients are scaled down to this norm', above=0)
    accumulate: int = option(0, "a step's batch goes through in this many parts; 0 or auto: see model.remat", least=0)
    max_skipped: int = option(5, 'steps in a row whose loss or gradients are not finite, with which it stops', above=0)
    reduce_dtype: str = option(
        'float32', 'in which gradients are summed over the devices of mesh.data', ('float32', 'bfloat16')
    )

    @property
    def parts(self) -> int:
        """Parts of a step's batch: accumulate, and 1 where that is still to be settled."""
        return self.accumulate or 1


@dataclasses.dataclass
class Mesh:
    """Devices per axis. -1 is all that the other axes leave; the product must use every device."""

    data: int = option(-1, 'copies of the model, each on its part of the batch; -1: as many devices as are left')
    fsdp: int = option(1, 'parameters and optimizer state in this many parts, batch too')
    tensor: int = option(1, 'each matrix product in this many parts')


@dataclasses.dataclass
class Checkpoint:
    """How often state is saved, and how many checkpoints are kept."""

    every: int = option(1000, 'steps between checkpoints', above=0)
    keep: int = option(2, 'the newest so many stay', above=0)
    mirror: str = option('', 'a folder of an object store, s3://… or gs://…, to which runs are copied and fetched from')


@dataclasses.dataclass
class Eval:
    """Evaluation on held-out data as the run goes: how often, and over how many batches."""

    every: int = option(500, 'steps between evaluations', above=0)
    batches: int = option(20, 'batches an evaluation', above=0)
    tasks: str = option('', 'of evaluate, with commas between: asked a few questions at each evaluation, as vqa,pope')
    data: str = option('', "the folder of their published files; vqa and bpb take the run's own data")
    limit: int = option(100, 'questions of each of these tasks', above=0)


@dataclasses.dataclass
class Log:
    """How often a line is logged, and to what beside metrics.jsonl."""

    every: int = option(10, 'steps between lines', above=0)
    to: str = option('', 'tensorboard, wandb, trackio, with commas between: where else than in metrics.jsonl')


@dataclasses.dataclass
class Config:
    """A run of one stage."""

    stage: str = option('pretrain', 'what is trained', tuple(STAGES))
    size: str = option(
        'd20',
        "the dial: tiny, d2, d4, … d20, or of Llama's kind ltiny, l2, l4, …; it stands behind the file: sft.py:tiny",
    )
    name: str = option('', 'the family of runs; default: the size')
    run_dir: str = option('', 'where the run lives; default: runs/NAME/STAGE')
    init_from: str = option('', 'the run that this one starts from; default: the stage before, beside it')
    allow_unfinished_parent: bool = option(False, 'start from a run that has not come to its end, too')
    steps: int = option(0, 'steps; 0: as many as data passes (epochs) take', least=0)
    epochs: float = option(1.0, 'passes over the data, where steps is 0', least=0)
    seed: int = option(0, 'of parameters and data order', least=0, below=2**32)
    dtype: str = option(
        'auto', 'of compute; auto is bfloat16 on GPU and TPU, float32 on CPU', ('auto', 'float32', 'bfloat16')
    )
    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    optim: Optim = dataclasses.field(default_factory=Optim)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    eval: Eval = dataclasses.field(default_factory=Eval)
    log: Log = dataclasses.field(default_factory=Log)

    @property
    def family(self) -> pathlib.Path:
        """The folder that the stages of one road share: runs/<name>."""
        return pathlib.Path(self.run_dir).parent


# The size dial -------------------------------------------------------------------------------------------------------


def base_config(stage: str, size: str) -> Config:
    """A Config whose models have `size`: tiny, or d<even depth> as d20 (width 64·d, heads of 128, ffn 4·width).

    ltiny and l<even depth> are decoders of Llama's kind of about as many parameters (SwiGLU of 8/3·width, in steps of
    128), which every engine knows. The tower beside a d<depth> decoder is a ViT-B/16 (CLIP, arXiv:2103.00020); tiny's
    has no class token.
    """
    config = Config(stage=stage, size=size)
    if size in TINY:
        config.model = Model(layers=4, width=128, heads=4, ffn=512, positions=512, unroll=4)
        config.model.vision = Vision('siglip', image_size=60, patch_size=20, width=192, layers=3, heads=3, ffn=768)
        config.model.text = Text(width=128, layers=1, heads=2, ffn=512, embed=128)
    elif (match := re.fullmatch(r'[dl](\d+)', size)) and int(match[1]) > 0 and int(match[1]) % 2 == 0:
        depth = int(match[1])
        config.model = Model(layers=depth, width=64 * depth, heads=depth // 2, ffn=256 * depth)
    else:
        raise UserError(f'no size {size!r}: sizes are tiny and d2, d4, … d20, … (an even depth), ltiny and l2, l4, ….')
    if size.startswith('l'):
        config.model.flavour, config.model.ffn = 'llama', 128 * round(config.model.width / 48)
    return config


# Fields --------------------------------------------------------------------------------------------------------------


def options(kind: type, prefix: str = '') -> dict[str, dataclasses.Field]:
    """{'optim.learning_rate': dataclasses.Field, …}: every settable field of a config, by its dotted name."""
    found = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            found |= options(hints[field.name], f'{prefix}{field.name}.')
        else:
            found[prefix + field.name] = field
    return found


def fields(kind: type) -> dict[str, type]:
    """{'optim.learning_rate': float, …}: the types of options(); a tuple's is tuple."""
    return {name: typing.get_origin(field.type) or field.type for name, field in options(kind).items()}


def get(config, name: str):
    """The value of a dotted field name."""
    for part in name.split('.'):
        config = getattr(config, part)
    return config


def put(config, name: str, value):
    """Sets the value of a dotted field name."""
    part, _, field = name.rpartition('.')
    setattr(get(config, part) if part else config, field, value)


def parse_field(name: str, text: str):
    """The value of a dotted field from its text on a command line. Raises UserError where it is none."""
    known = fields(Config)
    if name not in known:
        raise UserError(f'no config field {name!r}.{nearest(name, known)}')
    if (name, text) == ('optim.accumulate', 'auto'):
        return 0
    return parse_value(f'--config.{name}', known[name], text, numbers=4 if name.endswith('rope_scaling') else 3)


def parse_value(option, kind, text, numbers=3):
    """The value of a command line's option from its text. kind: its type; a tuple has so many `numbers`."""
    try:
        if kind is bool:
            return {'true': True, '1': True, 'false': False, '0': False}[text.lower()]
        if kind is not tuple:
            return kind(text)
        values = tuple(float(number) for number in text.strip('()').split(','))
        if len(values) == numbers and all(map(math.isfinite, values)):
            return values
    except (ValueError, KeyError):
        pass
    wanted = f'{"three" if numbers == 3 else "four"} numbers' if kind is tuple else kind.__name__
    raise UserError(f'{option} takes {wanted}, not {text!r}.')


def fill(config: Config):
    """Sets the fields whose default follows from other fields: name, run_dir, data.source of a mixture, data.path."""
    config.name = config.name or config.size
    config.run_dir = config.run_dir or os.path.join('runs', config.name, config.stage)
    if config.data.mixture:
        config.data.source = 'mixture'
    if config.data.prepared:
        config.data.path = config.data.path or 'data'
    elif config.data.source == 'tiny_world':
        config.data.path = config.data.path or str(config.family / 'data')
