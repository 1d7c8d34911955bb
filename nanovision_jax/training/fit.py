"""What the compiled step of a config takes, on hardware that need not be there; and the choices that make it fit.

The compiler says how much memory a program takes before anything is allocated, for the devices at hand or for those of
a topology, as in `v5e:2x4`.
"""

import collections
import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding

from nanovision_jax import models
from nanovision_jax.data.batch import fake_batch
from nanovision_jax.errors import UserError
from nanovision_jax.models import kernels
from nanovision_jax.parallel import hardware, hosts
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.stages import stage_of
from nanovision_jax.training import meter, objectives, optim
from nanovision_jax.training.step import abstract_state, make_train_step, partition, shardings_of

PACKED = ('tokens', 'segments', 'positions')  # what a batch has of captions


class Program(NamedTuple):
    """A compiled training step."""

    graphdef: object
    shapes: dict  # of the state, with shardings
    step: object
    seconds: float  # of compilation

    @property
    def peak(self) -> int:
        """Bytes that a device holds at most: the state, the batch and what the step itself needs."""
        memory = self.step.memory_analysis()
        peak, temporaries = memory.peak_memory_in_bytes, memory.temp_size_in_bytes
        return peak if peak >= temporaries else memory.argument_size_in_bytes + temporaries  # so on CPU


def abstract_batch(config, mesh, vocab_size: int = 512, caption_rows: int | None = None) -> dict:
    """A batch of a config as shapes with shardings.

    caption_rows: into how many rows the captions of pairs are packed; without it, each has its own.
    """
    one = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=1))
    sharding, rows = NamedSharding(mesh, parallel.BATCH), config.data.batch_size
    return {
        name: jax.ShapeDtypeStruct(
            (caption_rows if caption_rows and name in PACKED else rows, *x.shape[1:]), x.dtype, sharding=sharding
        )
        for name, x in fake_batch(one, vocab_size).items()
    }


def compile_step(config, vocabulary, optimizer, mesh, caption_rows: int | None = None) -> Program:
    """The step of a config, compiled for a mesh of devices that need not be there; allocates nothing.

    caption_rows: as abstract_batch() takes them.
    """
    began = time.perf_counter()
    graphdef, shapes = abstract_state(config, vocabulary, optimizer, mesh)
    step = make_train_step(config, graphdef, optimizer, shardings_of(shapes))
    compiled = step.lower(shapes, abstract_batch(config, mesh, vocabulary.size, caption_rows)).compile()
    return Program(graphdef, shapes, compiled, time.perf_counter() - began)


# The choices ---------------------------------------------------------------------------------------------------------

AT_MOST = 3  # programs compiled to find one that fits
ROOM = 2 << 30  # bytes of a device left free for batches on their way, evaluation and samples; a seventh of a small one
FLOPS_A_BYTE = 1500  # that a device does while one is sent: 1,000 of an A100 or v5e, 2,000 of an H100 or v6e
REMAT = {'none': 1.0, 'dots': 1.05, 'full': 1.3}  # model.remat, and about how long a step takes with each


def settle(config, vocabulary, optimizer, mesh, memory: int | None = None, pack: Callable | None = None) -> Program:
    """The compiled step of a config, whose model.attention, model.remat and optim.accumulate may be open.

    What is open is settled in `config` and printed: attention by hardware and shape; of the others the fastest that is
    estimated to fit into `memory` bytes a device, then compiled, and followed by the next one if the compiler finds it
    too large. If none of AT_MOST fits, the last stands: what is wrong is the device's to say.

    pack: PairRows.pack of what is learned from, if that is pairs.
    """
    kernel, why = models.attention_kernel(config)
    print(f'attention: {kernel} ({why})')
    config.model.attention = kernel
    if memory is None:
        own = (device for device in mesh.devices.flat if device.process_index == jax.process_index())
        memory = min(hosts.gather(hardware.memory(next(own, mesh.devices.flat[0])) or 0)) or None
    free = room(memory)
    found, scale = _candidates(config, vocabulary, mesh), 1.0
    for last in range(AT_MOST - 1, -1, -1):
        chosen = _fastest(found, free / scale)
        config.model.remat, config.optim.accumulate = chosen.remat, chosen.parts
        rows = pack(mesh.shape['data'] * mesh.shape['fsdp'], chosen.parts).rows if pack else None
        program = _compiled(config, vocabulary, optimizer, mesh, rows)
        peak = program.peak if program else None
        found = [c for c in found if c.bytes < chosen.bytes]
        if not found or (peak and peak <= free) or not last:
            break
        scale = max(scale, (peak or 1.25 * chosen.bytes * scale) / chosen.bytes)
    if program is None:
        raise UserError(
            f'{config.stage} does not fit into a device with model.remat={chosen.remat} and optim.accumulate='
            f'{chosen.parts}: split parameters with mesh.fsdp, or lower data.length.'
        )
    of = f' of {memory / 2**30:.1f}' if memory else ''
    print(
        f'compiled the step in {program.seconds:.1f} s: {program.peak / 2**30:.1f}{of} GiB a device, with '
        f'model.remat={chosen.remat} and optim.accumulate={chosen.parts}'
    )
    return program


def room(memory: int | None) -> float:
    """Bytes of a device that the step may take."""
    return float(memory - min(ROOM, memory // 7)) if memory else float('inf')


def choose(config, vocabulary, mesh, memory: int | None, kernel: str):
    """What settle() would try first: (remat, parts, bytes estimated of one device, time).

    mesh: its shape is enough. kernel: as estimate() takes it.
    """
    return _fastest(_candidates(config, vocabulary, mesh, kernel), room(memory))


def _fastest(found, free):
    """The fastest candidate that is estimated to fit, or the smallest."""
    fitting = [c for c in found if c.bytes <= free]
    return fitting[0] if fitting else min(found, key=lambda c: c.bytes)


class _Candidate(NamedTuple):
    remat: str
    parts: int
    bytes: float  # estimated, of one device
    time: float  # estimated, relative


def _candidates(config, vocabulary, mesh, kernel=''):
    """What model.remat and optim.accumulate may be, the fastest first."""
    rows = config.data.batch_size // (mesh.shape['data'] * mesh.shape['fsdp'])
    every = [parts for parts in range(1, rows + 1) if rows % parts == 0]
    parts = [config.optim.accumulate] if config.optim.accumulate else every
    remats = REMAT if config.model.remat == 'auto' else [config.model.remat]
    fixed, by_part = estimate(config, vocabulary, mesh, kernel)
    # A part of few tokens leaves matrix units waiting, and each part reads all weights and adds all gradients. Where
    # they are split it gathers them for both passes and reduces: 8 bytes sent for 6 FLOPs a token.
    lost = 512 if mesh.shape['fsdp'] == 1 else 512 + round(8 / 6 * FLOPS_A_BYTE)
    found = [
        _Candidate(
            remat, n, fixed + by_part[remat] / n, REMAT[remat] * (1 + lost * n / (rows * config.data.length))
        )
        for n in parts
        for remat in remats
    ]  # fmt: skip
    return sorted(found, key=lambda candidate: candidate.time)


def _compiled(config, vocabulary, optimizer, mesh, caption_rows):
    """The Program of a config; None where the compiler itself says that a device has not so much memory."""
    try:
        return compile_step(config, vocabulary, optimizer, mesh, caption_rows)
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return None


def state_bytes(config, vocabulary, mesh) -> dict[str, int]:
    """Bytes of one device, by what they hold, that a step takes whatever its rows. mesh: its shape is enough."""
    params = models.abstract(config, vocabulary.size, vocabulary.image)[1]
    learned = partition(config, params)[0]
    moments = jax.eval_shape(optim.make_optimizer(config.optim, 1).init, learned)
    count, count_learned = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, learned))
    held = {
        'parameters': (4 + models.compute_dtype(config.dtype).itemsize) * count,  # and a copy in the dtype of compute
        'optimizer': sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(moments)),
        'gradients': 4 * count_learned,
    }
    return {name: size // (mesh.shape['fsdp'] * mesh.shape['tensor']) for name, size in held.items()}


def estimate(config, vocabulary, mesh, kernel: str = ''):
    """(bytes of a device whatever the part, {model.remat: bytes of a whole step's rows}), within a quarter or so.

    kernel: of attention, if it is not model.attention's.
    """
    size = models.compute_dtype(config.dtype).itemsize
    fixed = sum(state_bytes(config, vocabulary, mesh).values()) + 4 * objectives.LOGITS
    rows = config.data.batch_size // (mesh.shape['data'] * mesh.shape['fsdp'])
    model, stage = config.model, stage_of(config)
    by_part = dict.fromkeys(REMAT, 0.0)

    def add(part, tokens, length, learns):
        """Adds what the blocks of a transformer keep for the backward pass."""
        width, heads = part.width, part.heads
        scores = 0 if (kernel or model.attention) in kernels.PACKED else heads * length * (4 + size)
        block = size * (8 * width + 4 * meter.attention_width(part) + 4 * part.ffn) + scores
        kept = {
            'none': block,
            'dots': size * (3 * width + 4 * meter.attention_width(part) + part.ffn),
            'full': size * width,
        }
        for remat in REMAT:
            by_part[remat] += tokens * (block + (part.layers * kept[remat] if learns else 0)) / mesh.shape['tensor']

    vision = model.vision
    seen = vision.patches + vision.class_tokens
    if stage.model == 'clip':
        add(vision, rows * seen, seen, True)
        add(model.text, rows * config.data.length, config.data.length, True)
    else:
        add(model, rows * config.data.length, config.data.length, True)
    if stage.sees and not config.data.cache_features:
        add(vision, rows * config.data.slots * seen, seen, False)
    return fixed, by_part


# What a program sends ------------------------------------------------------------------------------------------------

_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4}
_COLLECTIVE = re.compile(r'= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(')
_LOOP = re.compile(r'condition=%?([\w.\-]+), body=%?([\w.\-]+)')
_SHAPE = re.compile(r'\b(\w+)\[([\d,]*)\]')


class Sent(NamedTuple):
    """Collective operations of one kind and dtype in a program, those in loops as often as they run."""

    times: int
    bytes: int  # of the results on one device


def collectives(text: str) -> dict[tuple[str, str], Sent]:
    """{(kind, dtype): Sent} of a compiled program's text (compiled.as_text()).

    An operation on several arrays counts once, for the dtype of the first.
    """
    found = collections.defaultdict(lambda: Sent(0, 0))
    computations = _computations(text)
    for name, runs in _runs(computations).items():
        for line in computations[name]:
            if not (match := _COLLECTIVE.search(line)):
                continue
            shapes = [(d, math.prod(int(n) for n in dims.split(',') if n)) for d, dims in _SHAPE.findall(match[1])]
            shapes = [(dtype, size) for dtype, size in shapes if dtype in _BYTES]
            if '-start(' in line and match[2] != 'all-reduce':  # (operands, as many results, u32[] …)
                shapes = [shape for shape in shapes if shape != ('u32', 1)]
                shapes = shapes[len(shapes) // 2 :]
            sent = sum(_BYTES[dtype] * size for dtype, size in shapes)
            before = found[match[2], shapes[0][0]]
            found[match[2], shapes[0][0]] = Sent(before.times + runs, before.bytes + runs * sent)
    return dict(found)


def _computations(text):
    """{name: its lines} of the computations of a program; the one that it begins with is 'ENTRY'."""
    found, name = {}, None
    for line in text.splitlines():
        if line.startswith(('%', 'ENTRY')) and line.endswith('{'):
            name = 'ENTRY' if line.startswith('ENTRY') else line.split()[0].lstrip('%')
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def _runs(computations):
    """{computation: how often it runs}; of a loop whose number of turns is not in the program one turn counts."""
    runs = collections.Counter()

    def turns(line):
        if known := re.search(r'known_trip_count":\{"n":"(\d+)', line):
            return int(known[1])
        condition, body = ('\n'.join(computations.get(name, ())) for name in re.search(_LOOP, line).groups())
        limits = re.findall(r'[su]32\[\]\S* constant\((\d+)\)', condition)
        counter = re.search(r'get-tuple-element\(.*index=(\d+)', condition)
        return int(limits[0]) // _step(body, int(counter[1])) if counter and len(limits) == 1 else 1

    def walk(name, times):
        runs[name] += times
        for line in computations[name]:
            inner = times * turns(line) if ' while(' in line else times
            for called in re.findall(r'(?:body|condition|calls|to_apply)=%?([\w.\-]+)', line):
                if called in computations:
                    walk(called, inner)

    walk('ENTRY', 1)
    return runs


def _step(body, index):
    """What the body of a loop adds to element `index` of what it carries; 1 where that is not to be seen."""
    root = re.search(r'ROOT .* tuple\((.*?)\)', body)
    name = re.findall(r'%([\w.\-]+)', root[1])[index] if root else ''
    added = re.search(rf'%{re.escape(name)} = .* add\(.*%([\w.\-]+)\)', body)
    constant = added and re.search(rf'%{re.escape(added[1])} = .* constant\((\d+)\)', body)
    return int(constant[1]) if constant else 1
