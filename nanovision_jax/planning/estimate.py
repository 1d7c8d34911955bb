"""Counts what a stage takes on a machine: parameters, FLOPs, memory, what is sent, hours and dollars."""

import contextlib
import copy
import importlib.util
import io
import math
import statistics
import tempfile
import time
import types
from typing import NamedTuple

import jax
import numpy as np

from nanovision_jax import models
from nanovision_jax.data.batch import fake_batch
from nanovision_jax.data.datasets import tiny_world
from nanovision_jax.data.download import tokenizer_folder
from nanovision_jax.data.packing import MEMORY, OVERHEAD
from nanovision_jax.data.tokenizer import Tokenizer, import_tokenizer
from nanovision_jax.errors import UserError
from nanovision_jax.parallel import hardware
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.planning import topologies
from nanovision_jax.planning.machines import SHAPES, Machine
from nanovision_jax.runs.config_file import TRAINED
from nanovision_jax.stages import stage_of
from nanovision_jax.training import fit, meter, objectives, optim
from nanovision_jax.training.step import init_state, partition

MFU = 0.4  # of the peak that training is taken to reach; the reference's eight A100 reached 0.52
STEPS = 10  # that are measured
# As measured of tiny's stages on three machines: bytes of Python, what it loads and what compiling leaves behind; and
# how much more than the step's peak evaluation, saving and what malloc does not give back make of it.
LIBRARIES, MORE = 614 << 20, 1.25
# Examples of the published sets, and about how many a row holds, for recipes that tell epochs instead of steps.
EXAMPLES = {'llava_pretrain': 595_375, 'llava_instruct': 157_712, 'magpie': 300_000}
A_ROW = {'clip': 1.0, 'vision_pretrain': 6.8, 'vision_instruct': 3.2}
USED = {'pretrain': 1.0, 'sft': 0.95}  # share of a batch's tokens that is no padding; 0.9 of the others
LEARNED = {'pretrain': 1.0}  # share of the tokens that are targets; a quarter of the others, as of the built-in data
SLOTS = {'vision_pretrain': 0.95, 'vision_instruct': 0.7}  # share of image slots that hold a picture
CAPTION, PACKED = 15, 0.8  # tokens of a caption, and the share of clip's tokens that packing uses
SPANS = (8, 64, 256, 1024)  # chips


class Plan(NamedTuple):
    """What one stage takes. Bytes are of one device."""

    config: object
    machine: Machine
    parameters: int
    learned: int
    tokens: int  # a step, padding aside
    images: int
    flops: float  # a step
    steps: int
    memory: int | None  # bytes of a device that a program may take; None where nothing says
    parts: dict[str, int]  # bytes by what they hold, counted
    peak: int  # bytes; compiled, or their sum
    compiled: str  # what it was compiled for; '' where it is counted
    process: int | None  # bytes of main memory of the whole process, on the CPU at hand
    rows: int  # of a device at once, with the settled remat and accumulation
    most_rows: int  # of a device at once that fit
    sent: float  # bytes that a device sends in a step
    step: float  # seconds
    source: str  # of the seconds

    @property
    def fits(self) -> bool:
        """Whether the step fits into a device."""
        return self.memory is None or self.peak <= fit.room(self.memory)

    @property
    def hours(self) -> float:
        """Of all steps."""
        return self.steps * self.step / 3600

    @property
    def dollars(self) -> float:
        """Of all steps."""
        return self.hours * self.machine.count * (self.machine.chip.price if self.machine.chip else 0.0)


def plan(config, machine: Machine, mfu: float = MFU, measured: bool = False) -> Plan:
    """The Plan of a stage. measured: takes ten steps on the devices at hand instead of counting.

    Raises UserError where the mesh does not divide the machine, or its recipe does not say how long it is.
    """
    config, steps = copy.deepcopy(config), steps_of(config)
    size = vocabulary_of(config)
    vocabulary = types.SimpleNamespace(size=size, image=size - 1)
    if machine.chip:
        config.dtype = 'bfloat16' if config.dtype == 'auto' else config.dtype
    mesh = shape_of(config, machine.count if machine.chip else jax.device_count())
    parallel.check_divides(config, mesh, size)
    learned, frozen = (
        sum(leaf.size for leaf in jax.tree.leaves(part))
        for part in partition(config, models.abstract(config, size, size - 1)[1])
    )
    tokens, images, targets = _work(config)
    flops = meter.step_flops(config, size, tokens, images, targets)
    counted, kernel = copy.deepcopy(config), _kernel(config, machine)
    counted.model.attention = 'xla'  # a kernel that this machine lacks builds no model here
    memory = int(machine.chip.memory * 2**30) if machine.chip else hardware.memory(jax.devices()[0])
    program, compiled = _program(config, vocabulary, machine)
    if program:
        bytes_ = program.peak
    else:
        chosen = fit.choose(counted, vocabulary, mesh, memory, kernel)
        config.model.remat, config.optim.accumulate, bytes_ = chosen.remat, chosen.parts, chosen.bytes
    at_once = config.data.batch_size // (mesh.shape['data'] * mesh.shape['fsdp']) // config.optim.parts
    parts = _parts(config, vocabulary, mesh, at_once * config.data.length, bytes_)
    if measured:
        seconds, source = _measured(config, vocabulary, program), f'{STEPS} steps measured'
    else:
        peak = machine.chip.flops * machine.count if machine.chip else hardware.peak_flops()[0]
        seconds, source = flops / (mfu * peak), f'{mfu:.0%} MFU assumed'
    process = process_of(config, program.peak, images) if machine.chip is None else None
    return Plan(
        config, machine, learned + frozen, learned, tokens, images, flops, steps, memory, parts,
        program.peak if program else sum(parts.values()), compiled, process, at_once,
        _most_rows(counted, config.model.remat, vocabulary, mesh, memory, at_once, kernel),
        sent(config, learned + frozen, learned, mesh), seconds, source,
    )  # fmt: skip


def _work(config):
    """(tokens, images, targets) of a step, padding aside."""
    stage, data = stage_of(config), config.data
    pairs = stage.data == 'pairs'
    a_row = min(CAPTION, data.length) if pairs else data.length * USED.get(stage.name, 0.9)
    tokens = round(data.batch_size * a_row)
    images = round(data.batch_size * (data.slots * SLOTS[stage.name] if stage.sees else pairs))
    return tokens, images, round(tokens * LEARNED.get(stage.name, 0.25))


def _kernel(config, machine):
    """The kernel of attention that training would take on a machine."""
    if machine.chip and stage_of(config).decodes and config.model.attention != 'xla':
        return 'splash' if machine.chip.is_tpu else 'pallas'
    return 'xla'


def vocabulary_of(config) -> int:
    """How many tokens there are: of the tokenizer that is named, or as many as are trained."""
    wanted = config.data.tokenizer
    if wanted == TRAINED:
        return config.data.vocab_size
    if wanted == 'gpt2':  # with our special tokens: the recipes' own needs no download to be planned
        return 50_261
    with tempfile.TemporaryDirectory() as folder:
        import_tokenizer(tokenizer_folder(wanted), folder, config.data.template)
        return Tokenizer(folder).size


def shape_of(config, devices: int):
    """What is asked of a mesh of so many devices, which need not be there: its shape. Raises UserError as make_mesh."""
    sizes = [getattr(config.mesh, axis) for axis in parallel.AXES]
    known = math.prod(n for n in sizes if n != -1)
    sizes = [devices // known if n == -1 else n for n in sizes]
    if math.prod(sizes) != devices:
        raise UserError(f'mesh {dict(zip(parallel.AXES, sizes, strict=True))} does not use {devices} devices.')
    return types.SimpleNamespace(shape=dict(zip(parallel.AXES, sizes, strict=True)))


def steps_of(config) -> int:
    """Steps of a stage. Raises UserError where only its data would say."""
    if config.steps:
        return config.steps
    if config.data.source not in EXAMPLES or config.stage not in A_ROW:
        raise UserError(
            f'{config.stage} learns from {config.data.source!r} for {config.epochs:g} epochs: say --config.steps.'
        )
    rows = EXAMPLES[config.data.source] / A_ROW[config.stage]
    return max(1, round(config.epochs * rows / config.data.batch_size))


# Memory --------------------------------------------------------------------------------------------------------------


def process_of(config, peak: int, images: int) -> int:
    """Bytes of the process that trains on a CPU: the libraries, a step of `peak` bytes and `images` pictures, and the
    pictures that stay in memory."""
    drawn = tiny_world.EXAMPLES['scenes']['train']
    read = min(config.steps * images, drawn) if config.data.source == 'tiny_world' else 0  # others may not fit
    kept = read * (config.model.vision.image_size**2 * 3 + OVERHEAD)
    return LIBRARIES + round(MORE * peak) + kept * (kept <= MEMORY)


def _parts(config, vocabulary, mesh, tokens, peak) -> dict[str, int]:
    """Bytes of a device by what they hold: the state is counted, what is left of the peak are activations."""
    held = fit.state_bytes(config, vocabulary, mesh)
    if stage_of(config).decodes:  # with what their softmax and its gradient hold
        size = vocabulary.size
        held['logits'] = 4 * 4 * objectives.chunk_of(tokens, size) * size // mesh.shape['tensor']
    return held | {'activations': max(0, round(peak - sum(held.values())))}


def _most_rows(config, remat, vocabulary, mesh, memory, now, kernel):
    """How many rows a device takes at once, with a model.remat; 0 if not one fits."""
    if memory is None:
        return now
    rows = config.data.batch_size // (mesh.shape['data'] * mesh.shape['fsdp'])
    fixed, by_part = fit.estimate(config, vocabulary, mesh, kernel)
    return max(0, int((fit.room(memory) - fixed) / (by_part[remat] / rows)))


def _program(config, vocabulary, machine):
    """(the true step, compiled, for what) of a TPU's topology or of the devices at hand; (None, '') of GPUs.

    What the config leaves open is settled in it, as training would.
    """
    if machine.chip is None:
        compiled, devices = 'the devices at hand', jax.devices()
    elif machine.chip.is_tpu and importlib.util.find_spec('libtpu'):
        compiled = f'{machine.chip.topology}:{SHAPES[machine.count]}'
        devices = topologies.devices_of(compiled)
    else:
        return None, ''
    mesh = parallel.make_mesh(config.mesh, devices, config.data.batch_size // config.optim.parts)
    with jax.set_mesh(mesh), contextlib.redirect_stdout(io.StringIO()):
        program = fit.settle(config, vocabulary, optim.make_optimizer(config.optim, 1000), mesh, pack=_pack(config))
    return program, compiled


def _measured(config, vocabulary, program):
    """The median of the seconds of steps on a random batch, on the devices at hand."""
    mesh = parallel.make_mesh(config.mesh, rows=config.data.batch_size // config.optim.parts)
    with jax.set_mesh(mesh):
        state = init_state(config, vocabulary, optim.make_optimizer(config.optim, 1000), program.shapes)
        batch, seconds = parallel.put_batch(_batch(config, vocabulary.size, mesh), mesh), []
        for _ in range(STEPS + 1):
            began = time.perf_counter()
            state, metrics = program.step(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _pack(config):
    """What PairRows.pack() would make of captions of the usual length; None where a stage has none."""
    if stage_of(config).data != 'pairs':
        return None
    filled = config.data.batch_size * min(CAPTION, config.data.length) / (PACKED * config.data.length)

    def pack(shards, parts):
        return types.SimpleNamespace(rows=shards * parts * math.ceil(filled / (shards * parts)))

    return pack


def _batch(config, size, mesh):
    """A random batch, in which as much is learned and shown as is usual."""
    batch, rng = fake_batch(config, size), np.random.default_rng(0)
    if pack := _pack(config):
        rows = pack(mesh.shape['data'] * mesh.shape['fsdp'], config.optim.parts).rows
        batch |= {name: batch[name][:rows] for name in fit.PACKED} | {
            'ends': batch['ends'] % (rows * config.data.length)
        }
        return batch
    learned, shown = LEARNED.get(config.stage, 0.25), SLOTS.get(config.stage, 1.0)
    batch['weights'] *= rng.random(batch['weights'].shape) * batch['weights'].mean() < learned
    if 'images' in batch:
        batch['images'] *= (rng.random(batch['images'].shape[:2]) < shown)[..., None, None, None]
    return batch


# What is sent --------------------------------------------------------------------------------------------------------


def sent(config, parameters: int, learned: int, mesh) -> float:
    """Bytes that a device sends in a step for parameters and gradients, as rings send them.

    Over n copies all-reduced gradients are 2·(n-1)/n of their bytes, once. Split over n, all parameters are gathered
    twice and gradients scattered once a part of an accumulated step, (n-1)/n of their bytes each time. What tensor
    splits is sent beside that, and not counted.
    """
    copies, splits, tensor = (mesh.shape[axis] for axis in parallel.AXES)
    reduced, computed = _reduced(config), models.compute_dtype(config.dtype).itemsize
    total = 2 * (copies - 1) / copies * learned / (splits * tensor) * reduced
    share = (splits - 1) / splits / tensor
    return total + config.optim.parts * share * (2 * parameters * computed + learned * reduced)


def _reduced(config):
    return 4 if config.optim.reduce_dtype == 'float32' else 2


def seconds_sent(chip, count: int, bytes_sent: float) -> float:
    """Seconds in which `count` chips send so many bytes each: over their links, or the network where these end."""
    return bytes_sent / ((chip.link if count <= chip.host else chip.network or chip.link) * 1e9)


def scaling(plan: Plan) -> list[tuple[int, float, float]]:
    """[(chips, seconds that a step sends, weak-scaling efficiency)] of copies of this plan's model over more hosts.

    The work of a chip stays as it is. Within a host gradients go over its links, between hosts each chip sends its
    share of them, 2·(h-1)/h of what a host's chips split, over the network. What more is sent than by the planned chips
    (whose share of the peak has that in it) is taken to overlap with nothing, so it is the least. Nothing of models
    that are split, whose parameters are sent too.
    """
    chip, config = plan.machine.chip, plan.config
    if config.mesh.fsdp != 1 or config.mesh.tensor != 1:
        return []

    def seconds(count):
        hosts, inside = math.ceil(count / chip.host), min(count, chip.host)
        bytes_ = plan.learned * _reduced(config)
        within = 2 * (inside - 1) / inside * bytes_ / (chip.link * 1e9)
        return within + (2 * (hosts - 1) / hosts * bytes_ / inside / (chip.network * 1e9) if hosts > 1 else 0.0)

    spans = [count for count in SPANS if count >= plan.machine.count and (count <= chip.host or chip.network)]
    before = seconds(plan.machine.count)
    return [(count, seconds(count), plan.step / (plan.step + seconds(count) - before)) for count in spans]
