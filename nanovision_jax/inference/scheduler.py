"""The scheduler: which request has which slot (slots.py), and what is done next.

One thread works through turns: requests that wait get slots, a few pieces of prompts are read, and every slot that
speaks says a chunk of tokens. A slot keeps what it read until another request needs it, so a prompt that begins as one
before it, images included, is read from there on.
"""

import collections
import contextlib
import dataclasses
import logging
import threading
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nanovision_jax import models
from nanovision_jax.errors import UserError
from nanovision_jax.inference import slots as on_device
from nanovision_jax.inference.engine import Engine, bucket
from nanovision_jax.inference.feature_store import FeatureStore, digest
from nanovision_jax.inference.requests import Full, Heard, Request
from nanovision_jax.inference.sampling import COLD, Sampling, make_sampler
from nanovision_jax.inference.weights import readable
from nanovision_jax.parallel import hardware, hosts
from nanovision_jax.stages import stage_of

log = logging.getLogger(__name__)
# Tokens that are said in a turn: at most; at most where others wait for its end; about so long, in seconds; and at
# least, since a turn begins and ends with a copy of what is in use of the cache.
CHUNK, SHARED, SECONDS, FEWEST = 16, 8, 0.05, 4
UNITS = 4  # images and pieces of prompts that are read in a turn while others wait to speak
LONGEST_PIECE, SHORTEST = 512, 32  # tokens of a piece; a context has four of them at least
ALL = np.uint32(0xFFFFFFFF)  # every token may come next


@dataclasses.dataclass(eq=False)
class _Slot:
    """What the host knows of a slot: the keys of the tokens that it holds, of which `read` were read as pieces."""

    number: np.int32
    keys: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    read: int = 0
    request: Request | None = None
    wanted: np.ndarray | None = None  # the keys of all of the request's prompt
    speaks: bool = False
    used: float = 0.0
    scores: list = dataclasses.field(default_factory=list)  # of an echoed prompt


class Scheduler:
    """Answers requests with a run's model. Nothing is compiled after warm_up().

    slots: requests that are answered at once; images: those whose features are kept; waiting: requests that may wait;
    context: tokens of a slot, prompt and answer, if fewer than the model's positions; held: bytes of the device that
    other schedulers take.
    Raises UserError where the memory of the device does not hold all that.
    """

    def __init__(self, run, slots: int = 16, images: int = 64, waiting: int = 256, context: int = 0, held: int = 0):
        self.config, engine = run.config, Engine(run.config, run.graphdef, run.params, run.tokenizer.stops)
        self.definition, self.stops = engine.definition, np.array(engine.stops, np.int32)
        self.params, self.image = readable(run.config, engine.params), run.tokenizer.image
        self.context = min(context or self.config.model.positions, self.config.model.positions)
        self.piece = min(LONGEST_PIECE, max(SHORTEST, bucket(self.context // 4)))
        self.columns = -(-self.context // self.piece) * self.piece
        self.sees, self.patches = stage_of(self.config).sees, self.config.model.vision.patches
        self.waiting, self.room = collections.deque(), waiting
        self._wake, self._stopping = threading.Condition(), False
        self.count, self._kept = slots, images if self.sees else 0
        self.bytes = self._counted()
        self._check_memory(held)
        self._slots = [_Slot(np.int32(number)) for number in range(slots)]
        self._begin()
        self._pace = SECONDS / CHUNK  # seconds a token
        self.counts = collections.Counter()
        self.words = -(-self.state.logits.shape[1] // 32)

    def _begin(self):
        """Makes the slots, and a store of images' features, with nothing in them."""
        sampler = make_sampler([Sampling()] * self.count)
        state = on_device.empty(self.definition, self.params, sampler, self.columns)
        # Put where they are: arrays that jax is free to move are compiled for apart.
        self.state = jax.tree.map(lambda x: jax.device_put(x, x.sharding), state)
        dtype, mesh = models.compute_dtype(self.config.dtype), self.definition.mesh
        place = NamedSharding(mesh, PartitionSpec()) if mesh else jax.tree.leaves(self.params)[0].sharding
        self.store = FeatureStore(self._kept, self.patches, self.config.model.width, dtype, place)

    def _counted(self):
        """Bytes of a device that it takes."""
        sampler, split = make_sampler([Sampling()] * self.count), self.definition.mesh
        planned = jax.eval_shape(on_device.empty, self.definition, self.params, sampler, self.columns)
        store = self._kept * self.patches * self.config.model.width * 4
        shares = split.shape['tensor'] if split else 1
        # Saying tokens takes the columns that are read a second time.
        return (_size(self.params) + 2 * _size(planned.cache)) // shares + 2 * _size(planned.logits) + store

    def _check_memory(self, held):
        if (there := hardware.memory(hosts.first_device())) and held + self.bytes > there:
            others = f', beside {held / 2**30:,.1f} GiB of other runs,' if held else ''
            raise UserError(
                f'{self.count} slots of {self.context:,} tokens, {self._kept} images and the model take '
                f'{self.bytes / 2**30:,.1f} GiB{others} and there are {there / 2**30:,.1f} GiB: lower --slots, '
                '--context or --images.'
            )

    # From other threads -----------------------------------------------------------------------------------------------

    def submit(self, request: Request):
        """Queues a request. Raises Full where the queue is, and UserError for a prompt that leaves no room."""
        length = len(request.prompt.ids)
        if length >= self.context:
            raise UserError(f'the prompt is {length} tokens long, and the context holds {self.context}.')
        places = int((np.asarray(request.prompt.ids) == self.image).sum())
        if places != self.patches * len(request.prompt.images):
            raise UserError(f'the prompt has {places} tokens for {len(request.prompt.images)} images.')
        if len(request.prompt.images) > self._kept:
            raise UserError(f'{len(request.prompt.images)} images at once: this server keeps {self._kept}.')
        request.digests = [digest(image) for image in request.prompt.images]
        request.keys = self._keys(request)
        with self._wake:
            if self._stopping or len(self.waiting) >= self.room:
                raise Full
            self.waiting.append(request)
            self._wake.notify()

    def stop(self):
        """Lets run() end once nothing is left to do; new requests are refused."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def busy(self) -> int:
        """How many slots have a request."""
        return sum(slot.request is not None for slot in self._slots)

    def cache_used(self) -> float:
        """Which share of the cache holds tokens."""
        return sum(len(slot.keys) for slot in self._slots) / (len(self._slots) * self.context)

    def plan(self) -> str:
        """What memory it takes, as text."""
        cache, store = _size(self.state), _size(self.store.rows)
        kept = f', {store / 2**20:,.0f} MiB for {self._kept} images' if self.sees else ''
        return (
            f'{len(self._slots)} slots of {self.context:,} tokens in {cache / 2**20:,.0f} MiB{kept}; '
            f'{self.room} requests may wait'
        )

    # The scheduler's thread -------------------------------------------------------------------------------------------

    def run(self):
        """Works until stop() is called and nothing is left to do."""
        while True:
            with self._wake:
                while not (self.waiting or self.busy() or self._stopping):
                    self._wake.wait()
                if self._stopping and not self.waiting and not self.busy():
                    return
            self.turn()

    def turn(self):
        """Does a little of everything that there is to do."""
        try:
            self._end_some()
            self._admit()
            self._read()
            self._say()
        except Exception as error:
            self._failed(error)

    def _end_some(self):
        now = time.monotonic()
        with self._wake:
            gone = [r for r in self.waiting if r.cancelled or r.deadline < now]
            for request in gone:
                self.waiting.remove(request)
        for request in gone:
            self._tell(request, Heard([], finish=request.cancelled or 'deadline'))
        for slot in self._slots:
            if (request := slot.request) and (request.cancelled or request.deadline < now):
                self._silence(slot)
                self._finish(slot, request.cancelled or 'deadline')

    def _silence(self, slot):
        self.state = on_device.silence(self.definition.mesh, self.state, slot.number)

    def _tell(self, request, heard):
        seconds = time.monotonic() - request.asked
        if heard.tokens and not request.heard:
            self.counts['wait seconds'] += seconds
        if heard.finish:
            self.counts['request seconds'] += seconds
        request.heard += len(heard.tokens)
        self.counts['tokens'] += len(heard.tokens)
        if heard.finish:
            self.counts[f'finished {heard.finish.partition(":")[0]}'] += 1
        request.hear(heard)

    def _finish(self, slot, why, tokens=(), scores=None):
        request, slot.request, slot.speaks, slot.used = slot.request, None, False, time.monotonic()
        self._release(slot, request)
        self._tell(request, Heard(list(tokens), scores, why))

    def _release(self, slot, request):
        """Lets the store forget a request's images, whose tokens are in the cache or no longer wanted."""
        if slot.wanted is not None:
            self.store.release(request.digests)
            slot.wanted = None

    def _failed(self, error):
        """Tells every request whose slot is lost, and begins anew."""
        log.error('all that was being answered is lost', exc_info=error)
        for slot in self._slots:
            if slot.request:
                self._finish(slot, f'error: {error}')
            slot.keys, slot.read = np.zeros(0, np.int64), 0
        self.state = self.store = None  # whose memory the new ones take
        try:
            self._begin()
        except Exception as again:
            log.error('it cannot begin anew, and answers no more', exc_info=again)
            with self._wake:
                self._stopping, lost = True, list(self.waiting)
                self.waiting.clear()
            for request in lost:
                self._tell(request, Heard([], finish=f'error: {again}'))

    def _admit(self):
        """Gives slots to requests that wait."""
        while True:
            idle = [slot for slot in self._slots if slot.request is None]
            with self._wake:
                if not idle or not self.waiting:
                    return
                if not self.store.has_room(self.waiting[0].digests):  # it waits until the images of others are read
                    return
                request = self.waiting.popleft()
            wanted = request.keys
            # At least the last token is read, as its scores are wanted; and of an echoed prompt all are.
            most = 0 if request.echo else (len(wanted) - 1) // self.piece * self.piece
            shared = [
                min(most, _common(slot.keys[: slot.read], wanted) // self.piece * self.piece) for slot in self._slots
            ]
            slot = max(idle, key=lambda slot: (shared[slot.number], -slot.used))
            source = max(self._slots, key=lambda slot: shared[slot.number])
            if shared[source.number] > shared[slot.number]:
                slot = min(idle, key=lambda slot: slot.used)
                self.state = on_device.copy(self.definition.mesh, self.state, source.number, slot.number)
            slot.read = shared[source.number]
            slot.keys, slot.wanted, slot.request, slot.scores = wanted[: slot.read], wanted, request, []
            self.store.need(request.digests)
            self.counts['prompt tokens'] += len(wanted)
            self.counts['prompt tokens shared'] += slot.read

    def _keys(self, request):
        """What tells the tokens of a prompt apart: their ids, and for an image's tokens what it is."""
        keys = np.array(request.prompt.ids, np.int64)
        if request.digests:
            codes = [int.from_bytes(known[:7]) for known in request.digests]
            keys[keys == self.image] = -1 - np.repeat(codes, self.patches)
        return keys

    def _read(self):
        """Reads images and pieces of prompts, the oldest request first."""
        reading = sorted((s for s in self._slots if s.request and not s.speaks), key=lambda s: s.request.asked)
        units = UNITS
        for slot in reading:
            while units and slot.request and not slot.speaks:
                units -= 1
                with self._alone(slot):
                    digests, images = slot.request.digests, slot.request.prompt.images
                    if self.store.see_one(self.definition, self.params, digests, images):
                        self.counts['images'] += 1
                    else:
                        self._read_piece(slot)

    @contextlib.contextmanager
    def _alone(self, slot):
        """What fails within it ends the request of this slot and no other, unless the state of all went with it."""
        try:
            yield
        except Exception as error:
            if any(leaf.is_deleted() for leaf in jax.tree.leaves((self.state, self.store.rows))):
                raise
            log.error('a request failed', exc_info=error)
            if slot.speaks:
                self._silence(slot)
            if slot.request:
                self._finish(slot, f'error: {error}')

    def _read_piece(self, slot):
        request, start = slot.request, len(slot.keys)
        stop = min(start + self.piece, len(slot.wanted))
        length = min(self.piece, bucket(stop - start, SHORTEST))
        tokens, following = np.zeros((2, length), np.int32)
        places = np.full(length, -1, np.int32)
        tokens[: stop - start] = request.prompt.ids[start:stop]
        after = request.prompt.ids[start + 1 : stop + 1]
        following[: len(after)] = after
        if request.digests:
            whole = np.full(len(slot.wanted), -1, np.int32)
            whole[request.prompt.ids == self.image] = self.store.tokens(request.digests)
            places[: stop - start] = whole[start:stop]
        self.state, told = on_device.read(
            self.definition, self.params, self.state, self.store.rows, slot.number, tokens, places, following,
            np.int32(start), np.int32(stop - start), scored=request.echo,
        )  # fmt: skip
        if request.echo:
            slot.scores += _scores(*jax.device_get(told), stop - start)
        slot.keys = slot.wanted[:stop]
        slot.read = stop
        if stop == len(slot.wanted):
            self._speak(slot)

    def _speak(self, slot):
        request = slot.request
        met = np.zeros(self.state.logits.shape[1], bool)
        met[request.prompt.ids] = True
        most = min(request.most, self.context - len(slot.keys))
        self._release(slot, request)
        sampler = make_sampler([request.sampling])
        self.state = on_device.admit(self.definition.mesh, self.state, slot.number, np.int32(most), met, sampler)
        slot.speaks = True
        if request.echo:
            # A token's scores come with the one before it, and the first has none.
            self._tell(request, Heard([], [(None, []), *slot.scores[:-1]]))

    def _say(self):
        """Every slot that speaks says some tokens."""
        allowed = np.full((len(self._slots), self.words), ALL)
        for slot in self._slots:
            if slot.speaks and slot.request.guide:
                with self._alone(slot):
                    bits = slot.request.guide.allowed()
                    allowed[slot.number] = 0
                    allowed[slot.number, : len(bits)] = bits
        speaking = [slot for slot in self._slots if slot.speaks]
        if not speaking:
            return
        requests = [slot.request for slot in speaking]
        guided = any(request.guide for request in requests)
        most = SHARED if self.waiting or self.busy() > 1 else CHUNK
        turns = 1 if guided else max(FEWEST, min(most, round(SECONDS / self._pace)))
        scored = any(request.scored for request in requests)
        began = time.monotonic()
        said, self.state = on_device.say(
            self.definition,
            self.params,
            self.state,
            self.stops,
            allowed,
            np.int32(turns),
            columns=self._columns(speaking, turns),
            most=CHUNK,
            greedy=all(request.sampling.temperature < COLD for request in requests),
            scored=scored,
        )
        wanted = said if scored else said._replace(probabilities=None, alternatives=None, theirs=None)
        said, left = jax.device_get((wanted, self.state.left))
        self._pace = 0.7 * self._pace + 0.3 * (time.monotonic() - began) / max(1, int(said.counts.max()))
        for slot in speaking:
            with self._alone(slot):
                self._heard(slot, said, int(left[slot.number]))

    def _columns(self, speaking, turns):
        """How many columns of the cache are to be read: the next of _widths()."""
        needed = max(len(slot.keys) for slot in speaking) + turns
        return min(self.columns, bucket(needed, self.piece))

    def _widths(self):
        """The numbers of columns for which saying tokens is compiled: all of them, and halves down to a piece."""
        widths = [self.piece]
        while widths[-1] < self.columns:
            widths.append(min(2 * widths[-1], self.columns))
        return widths

    def _heard(self, slot, said, left):
        number, request = slot.number, slot.request
        count = int(said.counts[number])
        tokens = said.tokens[number, :count].tolist()
        slot.keys = np.append(slot.keys, tokens)
        scores = None
        if request.scored:
            scores = _scores(said.probabilities[number], said.alternatives[number], said.theirs[number], count)
        stopped = bool(tokens) and tokens[-1] in self.stops
        if request.guide and not stopped and request.guide.ended(tokens):
            left, stopped = 0, True
        if left:
            self._tell(request, Heard(tokens, scores))
            return
        if request.guide:
            self._silence(slot)
        self._finish(slot, 'stop' if stopped else 'length', tokens, scores)

    # Before the first request -----------------------------------------------------------------------------------------

    def warm_up(self):
        """Compiles everything, and yields what is compiled next. Nothing may have been asked yet."""
        zero, model = np.int32(0), (self.definition, self.params)
        length = SHORTEST
        while length <= self.piece:
            yield f'reading {length} tokens'
            none = np.zeros(length, np.int32)
            for scored in (False, True):
                self.state, _ = on_device.read(
                    *model, self.state, self.store.rows, zero, none, none - 1, none, zero, np.int32(1), scored=scored
                )
            length *= 2
        every = np.full((len(self._slots), self.words), ALL)
        for columns in self._widths():
            yield f'saying tokens behind up to {columns}'
            for kind in range(4):
                _, self.state = on_device.say(
                    *model, self.state, self.stops, every, zero, columns=columns, most=CHUNK,
                    greedy=kind % 2 == 0, scored=kind >= 2,
                )  # fmt: skip
        yield 'the rest'
        met = np.zeros(self.state.logits.shape[1], bool)
        self.state = on_device.admit(self.definition.mesh, self.state, zero, zero, met, make_sampler([Sampling()]))
        self.state = on_device.copy(self.definition.mesh, self.state, zero, zero)
        self._silence(self._slots[0])
        if self.sees:
            size, rows = self.config.model.vision.image_size, self.store.rows
            image, nowhere = np.zeros((1, size, size, 3), np.uint8), np.array([len(rows)], np.int32)
            self.store.rows = on_device.see(*model, rows, image, nowhere)


def _size(tree):
    """Bytes of a tree's arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _common(a, b):
    """How many keys both begin with."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _scores(probabilities, alternatives, theirs, count):
    return [
        (float(p), list(zip(which.tolist(), values.tolist(), strict=True)))
        for p, which, values in zip(probabilities[:count], alternatives[:count], theirs[:count], strict=True)
    ]
