"""Slots and their scheduler: the same answers alone and in company, what is shared, what ends a request."""

import contextlib
import threading
import time
import types

import jax
import micro
import numpy as np
import pytest

from nanovision_jax import config as configs
from nanovision_jax import models
from nanovision_jax.errors import UserError
from nanovision_jax.inference import slots
from nanovision_jax.inference.engine import Engine, Prompt
from nanovision_jax.inference.requests import Full, Request
from nanovision_jax.inference.sampling import Sampling
from nanovision_jax.inference.scheduler import Scheduler
from nanovision_jax.parallel import hardware
from nanovision_jax.parallel import mesh as parallel

CONTEXT, P = 250, 9  # positions of the tiny models, tokens of a picture
ENDLESS = (-1, -2)


def make_run(stage, tokenizer, stops=ENDLESS):
    cfg = micro.odd_config(stage, positions=CONTEXT)
    graphdef, params = micro.model(cfg, tokenizer)
    head = params.get('decoder', params)['head']
    head['kernel'] = head['kernel'].at[:, tokenizer.image].set(0)
    known = types.SimpleNamespace(stops=stops, image=tokenizer.image, size=tokenizer.size)
    return types.SimpleNamespace(config=cfg, graphdef=graphdef, params=params, tokenizer=known)


def prompts_of(run, lengths, rng, pictures=0):
    made = []
    for length in lengths:
        ids = rng.integers(5, 250, length, np.int32)
        images = []
        if pictures and length > 2 + pictures * P:
            ids[2 : 2 + pictures * P] = run.tokenizer.image
            images = list(rng.integers(0, 256, (pictures, 21, 21, 3), np.uint8))
        made.append(Prompt(ids, images))
    return made


class Asked:
    """A request, and what it heard."""

    def __init__(self, prompt, **options):
        self.heard = []
        options = {'most': 20} | options
        self.request = Request(prompt, self.heard.append, **options)

    @property
    def tokens(self):
        return [token for heard in self.heard for token in heard.tokens]

    @property
    def scores(self):
        return [score for heard in self.heard for score in heard.scores or []]

    @property
    def finish(self):
        return self.heard[-1].finish if self.heard else ''


def answered(scheduler, *asked, turns=500):
    """Submits all, and works until all are finished."""
    for one in asked:
        scheduler.submit(one.request)
    for _ in range(turns):
        if all(one.finish for one in asked):
            return
        scheduler.turn()
    raise AssertionError('not finished')


@pytest.fixture(scope='module')
def run(tokenizer):
    return make_run('vision_instruct', tokenizer)


@pytest.fixture
def scheduler(run):
    return Scheduler(run, slots=4, images=4)


def test_answers_are_those_of_the_batch_engine(run, scheduler):
    prompts = prompts_of(run, (32, 17, 70, 100, 33, 5), np.random.default_rng(0), pictures=2)
    engine = Engine(run.config, run.graphdef, run.params, ENDLESS)
    wanted = [[] for _ in prompts]
    for chunk in engine.generate(prompts, 20):
        for row, new in zip(wanted, chunk, strict=True):
            row += new
    asked = [Asked(prompt) for prompt in prompts]
    answered(scheduler, *asked)
    assert not [one.finish for one in asked if 'error' in one.finish]
    assert [one.tokens for one in asked] == wanted and {one.finish for one in asked} == {'length'}


OPTIONS = [
    dict(),
    dict(sampling=Sampling(0.9, seed=3)),
    dict(sampling=Sampling(1.3, top_k=5, seed=4)),
    dict(sampling=Sampling(1.0, top_p=0.8, min_p=0.02, seed=5), most=31),
    dict(sampling=Sampling(repetition_penalty=1.5)),
    dict(scored=True),
]


def test_an_answer_does_not_depend_on_what_else_is_answered(run):
    rng = np.random.default_rng(1)
    prompts = prompts_of(run, (32, 70, 100, 33, 130, 40), rng, pictures=1)
    alone = []
    for prompt, options in zip(prompts, OPTIONS, strict=True):
        asked = Asked(prompt, **options)
        answered(Scheduler(run, slots=4, images=4), asked)
        alone.append(asked)
    together = [Asked(prompt, **options) for prompt, options in zip(prompts, OPTIONS, strict=True)]
    noise = [Asked(prompt, most=int(rng.integers(1, 60))) for prompt in prompts_of(run, (50, 20, 90, 64), rng)]
    crowded = Scheduler(run, slots=4, images=4)
    answered(crowded, *noise[:2], *together[:3], *noise[2:], *together[3:])
    for one, other in zip(alone, together, strict=True):
        assert one.tokens == other.tokens and one.scores == other.scores
    assert len({tuple(one.tokens) for one in alone}) == len(alone)


def test_what_was_read_is_not_read_again(run, scheduler):
    assert scheduler.piece == 64
    rng = np.random.default_rng(2)
    (long,) = prompts_of(run, (150,), rng, pictures=1)
    first = Asked(long)
    answered(scheduler, first)
    assert scheduler.counts['prompt tokens shared'] == 0
    again = Asked(Prompt(long.ids.copy(), list(long.images)))
    answered(scheduler, again)
    assert again.tokens == first.tokens and scheduler.counts['prompt tokens shared'] == 128
    changed = Prompt(np.append(long.ids[:140], long.ids[40:60]), list(long.images))
    after, fresh = Asked(changed), Asked(Prompt(changed.ids, changed.images))
    answered(scheduler, after)
    answered(Scheduler(run, slots=4, images=4), fresh)
    assert after.tokens == fresh.tokens and scheduler.counts['prompt tokens shared'] == 256
    other = Asked(Prompt(long.ids, [255 - long.images[0]]))  # another picture: nothing behind it is shared
    answered(scheduler, other)
    assert other.tokens != first.tokens and scheduler.counts['prompt tokens shared'] == 256
    assert scheduler.counts['images'] == 2


def test_a_slot_that_speaks_shares_what_it_read(run, scheduler):
    (long,) = prompts_of(run, (130,), np.random.default_rng(3))
    first, second = Asked(long, most=100), Asked(long, most=100, sampling=Sampling(1.0, seed=1))
    scheduler.submit(first.request)
    while not first.heard:
        scheduler.turn()
    answered(scheduler, second)
    alone = Asked(long, most=100, sampling=Sampling(1.0, seed=1))
    answered(Scheduler(run, slots=4, images=4), alone)
    assert second.tokens == alone.tokens and scheduler.counts['prompt tokens shared'] == 128
    assert len(first.tokens) > 10


def test_scores_are_those_of_a_full_forward_pass(run, scheduler):
    (prompt,) = prompts_of(run, (100,), np.random.default_rng(4))
    asked = Asked(prompt, scored=True, echo=True, most=5)
    answered(scheduler, asked)
    ids = np.array([[*prompt.ids, *asked.tokens]])
    inputs = [ids, np.arange(105)[None], np.ones_like(ids), np.zeros((1, 1, 21, 21, 3), np.uint8)]
    forward = jax.jit(lambda params, *x: models.merge(run.graphdef, params)(*x))
    logs = np.asarray(jax.nn.log_softmax(forward(run.params, *inputs)[0]))
    assert asked.scores[0] == (None, []) and len(asked.scores) == 105
    for place in range(1, 105):
        found, others = asked.scores[place]
        np.testing.assert_allclose(found, logs[place - 1, ids[0, place]], atol=1e-3)
        best = np.sort(logs[place - 1])[::-1][: slots.ALTERNATIVES]
        np.testing.assert_allclose([value for _, value in others], best, atol=1e-3)
        assert others[0][0] == logs[place - 1].argmax()


def test_a_repetition_penalty_of_a_hundred_repeats_nothing(run, scheduler):
    (prompt,) = prompts_of(run, (20,), np.random.default_rng(5))
    plain, strict = Asked(prompt, most=60), Asked(prompt, most=60, sampling=Sampling(repetition_penalty=100))
    answered(scheduler, plain, strict)
    assert len(set(strict.tokens)) > len(set(plain.tokens))
    assert not set(strict.tokens) & set(prompt.ids.tolist()) or len(set(strict.tokens)) == 60


def test_stops_end_an_answer_and_are_its_last_token(tokenizer, run):
    (prompt,) = prompts_of(run, (20,), np.random.default_rng(6))
    plain = Asked(prompt, most=60)
    answered(Scheduler(run, slots=2), plain)
    stop = plain.tokens[7]
    stopping = types.SimpleNamespace(
        **{**vars(run), 'tokenizer': types.SimpleNamespace(**{**vars(run.tokenizer), 'stops': (stop,)})}
    )
    asked = Asked(prompt, most=60)
    answered(Scheduler(stopping, slots=2), asked)
    first = plain.tokens.index(stop)
    assert asked.tokens == plain.tokens[: first + 1] and asked.finish == 'stop'


def test_prompt_and_answer_fill_the_context(run, scheduler):
    (prompt,) = prompts_of(run, (CONTEXT - 30,), np.random.default_rng(7))
    asked = Asked(prompt, most=1000)
    answered(scheduler, asked)
    assert len(asked.tokens) == 30 and asked.finish == 'length'
    again = Asked(prompt, most=1000)  # over what a full row holds
    answered(scheduler, again)
    assert again.tokens == asked.tokens
    for length in (CONTEXT, 1000):
        with pytest.raises(UserError, match=f'{length} tokens long'):
            scheduler.submit(Asked(Prompt(np.ones(length, np.int32), [])).request)


def test_cancelled_and_late_requests_free_their_slots_within_a_turn(run):
    scheduler = Scheduler(run, slots=2, waiting=3)
    rng = np.random.default_rng(8)
    asked = [Asked(prompt, most=200) for prompt in prompts_of(run, (20, 30, 40), rng)]
    for one in asked:
        scheduler.submit(one.request)
    scheduler.turn()
    assert scheduler.busy() == 2
    asked[0].request.cancel()
    asked[2].request.cancel()  # it waits
    scheduler.turn()
    assert asked[0].finish == asked[2].finish == 'cancelled' and scheduler.busy() == 1
    assert scheduler.counts['finished cancelled'] == 2
    asked[1].request.deadline = time.monotonic() - 1
    scheduler.turn()
    assert asked[1].finish == 'deadline' and not scheduler.busy()
    for prompt in prompts_of(run, (9, 9, 9), rng):
        scheduler.submit(Asked(prompt).request)
    with pytest.raises(Full):
        scheduler.submit(asked[0].request)


def test_a_request_that_fails_fails_alone(run, scheduler):
    good, bad = prompts_of(run, (40, 40), np.random.default_rng(9), pictures=1)
    bad.images[0] = np.zeros((3, 3, 3), np.uint8)
    fine, broken = Asked(good), Asked(bad)
    answered(scheduler, fine, broken)
    assert broken.finish.startswith('error: ') and fine.finish == 'length' and len(fine.tokens) == 20
    for k in range(5):  # more than there are places for images
        again = Asked(Prompt(bad.ids, [np.random.default_rng(k).integers(0, 9, (3, 3, 3), np.uint8)]))
        answered(scheduler, again)
        assert again.finish.startswith('error: ')
    fine = Asked(good)
    answered(scheduler, fine)
    assert fine.finish == 'length'


@contextlib.contextmanager
def compiled_at_most(n):
    """A context in which XLA compiles at most so many programs."""
    compiled = []

    def listen(event, _, **__):
        if event == '/jax/core/compile/backend_compile_duration':
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
        assert len(compiled) <= n
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_is_compiled_after_the_warm_up(run):
    scheduler = Scheduler(run, slots=3, images=2)
    assert len(list(scheduler.warm_up())) == 2 + 3 + 1  # pieces of 32 and 64 tokens; 64, 128 and 256 columns
    rng = np.random.default_rng(10)
    prompts = prompts_of(run, (5, 32, 33, 64, 65, 130, 200, 249), rng, pictures=1)
    with micro.traced_at_most(0), compiled_at_most(0):
        asked = [Asked(prompt, **OPTIONS[i % len(OPTIONS)]) for i, prompt in enumerate(prompts)]
        asked.append(Asked(prompts[1], scored=True, echo=True))
        asked.append(Asked(prompts[5], most=3))
        asked.append(Asked(prompts[5], most=3))
        answered(scheduler, *asked)


@pytest.mark.parametrize('flavour', ['gpt', 'llama'])
def test_a_model_split_over_devices_answers_the_same(tokenizer, flavour):
    """Heads, feed-forward layer and vocabulary on two devices, by training's rules, and the cache's heads with them."""
    cfg = micro.config('vision_instruct')
    cfg.model.flavour, cfg.model.kv_heads, cfg.dtype = flavour, 2 if flavour == 'llama' else 0, 'float32'
    graphdef, params = micro.model(cfg, tokenizer)
    known = types.SimpleNamespace(stops=ENDLESS, image=tokenizer.image, size=tokenizer.size)
    mesh = parallel.make_mesh(configs.Mesh(1, 1, 2), jax.devices()[:2])
    split = jax.device_put(params, parallel.shardings(params, mesh))
    rng, pictures = np.random.default_rng(12), lambda: list(rng.integers(0, 256, (1, 16, 16, 3), np.uint8))
    prompts = []
    for length in (20, 40, 70, 33, 100):
        ids = rng.integers(5, 250, length, np.int32)
        ids[3 : 3 + cfg.model.vision.patches] = tokenizer.image
        prompts.append(Prompt(ids, pictures()))
    found = []
    for weights in (params, split):
        run = types.SimpleNamespace(config=cfg, graphdef=graphdef, params=weights, tokenizer=known)
        scheduler = Scheduler(run, slots=2, images=2)
        list(scheduler.warm_up())
        asked = [Asked(prompt, sampling=Sampling(0.7 * (i % 2), seed=i)) for i, prompt in enumerate(prompts)]
        with compiled_at_most(0):
            answered(scheduler, *asked)
        found.append([one.tokens for one in asked])
        kept = scheduler.state.cache[0][0]
        shard = kept.sharding.shard_shape(kept.shape)
        assert kept.shape[1] // shard[1] == (1 if weights is params else 2)
    assert found[0] == found[1]


def test_a_slot_may_be_shorter_than_the_model_reads(run):
    scheduler = Scheduler(run, slots=2, context=100)
    (prompt, long) = prompts_of(run, (80, 100), np.random.default_rng(13))
    asked = Asked(prompt, most=1000)
    answered(scheduler, asked)
    assert len(asked.tokens) == 20 and asked.finish == 'length'
    with pytest.raises(UserError, match='the context holds 100'):
        scheduler.submit(Asked(long).request)
    assert scheduler.state.cache[0][0].shape[2] == 128


def test_slots_that_memory_does_not_hold_are_refused_before_they_are_made(run):
    with pytest.raises(UserError, match=r'300000 slots of 250 tokens, .* lower --slots, --context or --images'):
        Scheduler(run, slots=300_000)


def test_several_models_are_to_fit_together(run, monkeypatch):
    alone = Scheduler(run, slots=2)
    monkeypatch.setattr(hardware, 'memory', lambda device: int(1.5 * alone.bytes))
    assert Scheduler(run, slots=2).bytes == alone.bytes
    with pytest.raises(UserError, match='GiB of other runs, and there are'):
        Scheduler(run, slots=2, held=alone.bytes)


def test_a_long_context_is_compiled_for_in_all_its_widths(run):
    scheduler = Scheduler(run, slots=1)
    scheduler.piece, scheduler.columns = 32, 250
    assert scheduler._widths() == [32, 64, 128, 250]
    for length in range(1, 240):
        slot = types.SimpleNamespace(keys=np.zeros(length))
        assert scheduler._columns([slot], 8) in scheduler._widths()


def test_what_cannot_begin_anew_tells_all_who_wait(run, caplog):
    scheduler = Scheduler(run, slots=1)
    asked = [Asked(prompt) for prompt in prompts_of(run, (20, 30), np.random.default_rng(15))]
    for one in asked:
        scheduler.submit(one.request)
    scheduler._begin = scheduler._admit = unwell
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and [one.finish for one in asked] == ['error: no memory'] * 2
    with pytest.raises(Full):
        scheduler.submit(asked[0].request)


def unwell():
    raise MemoryError('no memory')


class Whole:
    """A guide that has all it wants after so many tokens."""

    def __init__(self, count):
        self.left = count

    def allowed(self):
        return np.full(4, 0xFFFFFFFF, np.uint32)

    def ended(self, tokens):
        self.left -= len(tokens)
        return self.left <= 0


def test_a_guided_answer_that_is_cut_is_not_told_to_be_whole(run, scheduler):
    prompts = prompts_of(run, (30, 40, 20), np.random.default_rng(16))
    asked = [Asked(prompt, guide=Whole(count)) for prompt, count in zip(prompts, (5, 20, 21), strict=True)]
    answered(scheduler, *asked)  # 20 tokens at most
    assert [one.finish for one in asked] == ['stop', 'stop', 'length']
    assert [len(one.tokens) for one in asked] == [5, 20, 20]


class Failing:
    """A guide that fails in its second turn."""

    def __init__(self, at):
        self.at, self.turns = at, 0

    def allowed(self):
        self.turns += 1
        if self.at == 'allowed' and self.turns == 2:
            raise ValueError('no mask')
        return np.full(4, 0xFFFFFFFF, np.uint32)

    def ended(self, tokens):
        if self.at == 'ended':
            raise ValueError('no token')


def test_a_guide_that_fails_fails_alone(run, scheduler, caplog):
    prompts = prompts_of(run, (30, 40, 20), np.random.default_rng(14))
    alone = Asked(prompts[0])
    answered(Scheduler(run, slots=4, images=4), alone)
    asked = Asked(prompts[0])
    failing = [Asked(prompts[1], guide=Failing('allowed')), Asked(prompts[2], guide=Failing('ended'))]
    answered(scheduler, asked, *failing)
    assert asked.tokens == alone.tokens
    assert [one.finish for one in failing] == ['error: no mask', 'error: no token']
    assert 'a request failed' in caplog.text and not scheduler.busy()


def test_the_thread_ends_when_all_is_answered(run):
    scheduler = Scheduler(run, slots=2)
    done = threading.Event()
    asked = [Asked(prompt) for prompt in prompts_of(run, (20, 30, 40), np.random.default_rng(11))]
    asked[2].request.hear = lambda heard: heard.finish and done.set()
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    for one in asked:
        scheduler.submit(one.request)
    assert done.wait(60)
    scheduler.stop()
    thread.join(30)
    assert not thread.is_alive()
    with pytest.raises(Full):
        scheduler.submit(asked[0].request)
