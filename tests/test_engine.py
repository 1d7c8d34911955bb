"""The engine: cached answers, batches, sampling, stops, the context's limit, streaming, and few compilations."""

import types

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from PIL import Image

from nanovision_jax import models
from nanovision_jax.data import conversation, images
from nanovision_jax.errors import UserError
from nanovision_jax.inference import engine, sampling
from nanovision_jax.inference.engine import Engine, Prompt
from nanovision_jax.inference.prompt import chat_prompt, text_prompt
from nanovision_jax.inference.run import Run, forward
from nanovision_jax.inference.sampling import Sampling

STAGES = ('sft', 'vision_instruct')
CONTEXT, P = 61, 9  # positions of the tiny models, tokens of a picture
ENDLESS = (-1, -2, -3, -4, -5)  # stops that no model says


@pytest.fixture(scope='module', params=STAGES)
def case(request, tokenizer):
    """An engine whose tokenizer knows no stops, and three prompts of different lengths for it.

    From these lengths on, every answer of the tests below runs in the same shapes: rows of 32, a cache of 128 columns.
    """
    return make(request.param, tokenizer)


@pytest.fixture(scope='module')
def text(tokenizer):
    return make('sft', tokenizer)


def make(stage, tokenizer, positions=CONTEXT):
    cfg = micro.odd_config(stage, positions=positions)
    rng, prompts = np.random.default_rng(0), []
    for length, pictures in ((32, 2), (17, 0), (23, 1)):
        ids = rng.integers(5, 250, length, np.int32)
        prompts.append(Prompt(ids, []))
        if stage.startswith('vision'):
            ids[2 : 2 + pictures * P] = tokenizer.image
            prompts[-1].images = list(rng.integers(0, 256, (pictures, 21, 21, 3), np.uint8))
    graphdef, params = micro.model(cfg, tokenizer)
    head = params.get('decoder', params)['head']
    head['kernel'] = head['kernel'].at[:, tokenizer.image].set(0)  # which is not to be said: no picture belongs to it
    return Engine(cfg, graphdef, params, ENDLESS), prompts


def answers(runner, prompts, **options):
    """The token ids of each answer."""
    ids, most = [[] for _ in prompts], options.pop('max_new_tokens', 256)
    for chunk in runner.generate(prompts, most, Sampling(**options)):
        for row, new in zip(ids, chunk, strict=True):
            row += new
    return ids


def test_greedy_answers_are_the_likeliest_tokens_of_a_full_forward_pass(case):
    runner, prompts = case
    found = answers(runner, prompts, max_new_tokens=20)
    tokens = np.zeros((3, CONTEXT), np.int32)
    for row, prompt, answer in zip(tokens, prompts, found, strict=True):
        row[: len(prompt.ids) + 20] = [*prompt.ids, *answer]
    inputs = [tokens, np.broadcast_to(np.arange(CONTEXT), tokens.shape), np.ones_like(tokens)]
    if runner.config.stage == 'vision_instruct':
        pictures = np.zeros((3, 2, 21, 21, 3), np.uint8)
        pictures[0], pictures[2, 0] = prompts[0].images, prompts[2].images[0]
        inputs.append(pictures)
    scores = np.asarray(jax.jit(lambda params, *x: models.merge(runner.graphdef, params)(*x))(runner.params, *inputs))
    for row, prompt, answer in zip(scores, prompts, found, strict=True):
        here = row[len(prompt.ids) - 1 :][:20]
        assert len(set(answer)) > 5  # not one token over and over
        np.testing.assert_allclose(here[np.arange(20), answer], here.max(axis=1), atol=1e-4)


def test_a_batch_of_unequal_prompts_answers_as_each_alone(case):
    runner, prompts = case
    together = answers(runner, prompts, max_new_tokens=20)
    for prompt, answer in list(zip(prompts, together, strict=True))[1:]:
        assert answers(runner, [prompt], max_new_tokens=20) == [answer]


def test_pictures_are_looked_at(tokenizer):
    runner, (prompt, *others) = make('vision_instruct', tokenizer)
    answer, *rest = answers(runner, [prompt, *others], max_new_tokens=20)
    other, *same = answers(runner, [Prompt(prompt.ids, prompt.images[::-1]), *others], max_new_tokens=20)
    assert answer != other and rest == same


def test_sampled_answers_depend_on_the_rows_seed_alone(text):
    runner, prompts = text
    options = {'max_new_tokens': 20, 'temperature': 0.8}
    together = answers(runner, prompts, seed=3, **options)
    assert answers(runner, prompts[1:2], seed=4, **options) == together[1:2]
    assert answers(runner, prompts[2:3], seed=5, **options) == together[2:3]
    assert answers(runner, prompts[2:3], seed=6, **options) != together[2:3]
    assert answers(runner, prompts[:1] * 3, seed=3, **options)[0] == together[0]
    assert len({*map(tuple, answers(runner, prompts[:1] * 3, seed=3, **options))}) == 3


def test_every_row_of_a_batch_has_options_of_its_own(text):
    runner, prompts = text
    options = [Sampling(), Sampling(0.8, seed=4), Sampling(1.3, top_k=3, top_p=0.9, seed=9)]
    chunks = list(runner.generate(prompts, 20, options))
    together = [[token for chunk in chunks for token in chunk[row]] for row in range(3)]
    for prompt, one, answer in zip(prompts, options, together, strict=True):
        assert answers(runner, [prompt], max_new_tokens=20, **one._asdict()) == [answer]


def test_the_one_likeliest_token_is_the_greedy_one(text):
    runner, prompts = text
    greedy = answers(runner, prompts, max_new_tokens=20)
    assert answers(runner, prompts, max_new_tokens=20, temperature=1.3, top_k=1) == greedy
    assert answers(runner, prompts, max_new_tokens=20, temperature=1.3, top_p=1e-6) == greedy
    assert answers(runner, prompts, max_new_tokens=20, temperature=1.3) != greedy


def test_any_whole_number_is_a_seed_and_any_top_k_is_taken(text):
    runner, prompts = text
    options = {'max_new_tokens': 20, 'temperature': 0.8}
    plain = answers(runner, prompts, seed=3, **options)
    for seed in (3 + 2**32, 3 - 2**32, 3 + 7 * 2**64, np.int64(3)):
        assert answers(runner, prompts, seed=seed, **options) == plain
    largest = answers(runner, prompts, seed=2**32 - 1, **options)
    assert largest == answers(runner, prompts, seed=-1, **options)
    assert answers(runner, prompts[1:2], seed=0, **options) == largest[1:2]  # rows count on from there
    seeds = (2**31 - 1, 2**31, 99_999_999_999, -5)
    assert len({str(answers(runner, prompts, seed=seed, **options)) for seed in seeds}) == len(seeds)
    for top_k in (10**6, 2**31, 2**40, 10**30):
        assert answers(runner, prompts, seed=3, top_k=top_k, **options) == plain


def test_a_repetition_penalty_is_about_prompt_and_answer(text):
    runner, prompts = text
    for prompt, answer in zip(
        prompts, answers(runner, prompts, max_new_tokens=29, repetition_penalty=100), strict=True
    ):
        assert len(set(answer)) == len(answer) and not set(answer) & set(prompt.ids.tolist())
    assert any(len(set(answer)) < 29 for answer in answers(runner, prompts, max_new_tokens=29))


def test_temperatures_at_the_end_of_float32_are_the_likeliest_token_or_refused(text):
    runner, prompts = text
    greedy = answers(runner, prompts, max_new_tokens=20)
    for temperature in (1e-6, 1e-7, 1e-38, 1e-45, 1e-300, 0):
        assert answers(runner, prompts, max_new_tokens=20, temperature=temperature) == greedy, temperature
    assert answers(runner, prompts, max_new_tokens=20, temperature=1e6) != greedy


@pytest.mark.parametrize(
    ('option', 'value'),
    [
        *(('seed', value) for value in ('1', 1.0, None, float('nan'), [3])),
        *(('top_k', value) for value in (-1, 2.5, '3', None, -(10**30))),
        *(('max_new_tokens', value) for value in (0, -1, 7.0, None, 'many')),
        *(('temperature', value) for value in (-1, float('nan'), float('inf'), 1e300, 10**400, 'hot', None, [1])),
        *(('top_p', value) for value in (0, -0.1, 1.1, float('nan'), 'x', None)),
        *(('min_p', value) for value in (-0.1, 1.1, float('nan'), 'x', None)),
        *(('repetition_penalty', value) for value in (0, -1, 101, float('nan'), 'x', None)),
    ],
)
def test_options_that_make_no_sense_are_one_sentence(text, option, value):
    runner, prompts = text
    with pytest.raises(UserError, match=option) as error:
        answers(runner, prompts, **{'temperature': 0.5} | {option: value})
    assert '\n' not in str(error.value)


def test_text_that_is_none_is_not_continued(tokenizer):
    for text in ('h\udce9llo', '\ud83d', b'bytes', None, 3):
        with pytest.raises(UserError, match=r'cannot be continued: text that is not Unicode\.$') as error:
            text_prompt(tokenizer, text)
        assert str(error.value).isascii()


def test_every_stop_token_ends_its_row_and_no_other(text, monkeypatch):
    monkeypatch.setattr(engine, 'QUICK', 0)  # chunks stay small
    runner, prompts = text
    plain = answers(runner, prompts, max_new_tokens=29)
    stops = plain[0][3], plain[1][19], plain[2][10]

    for special in ((*stops, -1, -2), (-1, -2, *stops)):
        stopping = Engine(runner.config, runner.graphdef, runner.params, special)
        chunks = list(stopping.generate(prompts, max_new_tokens=29))
        found = [[token for chunk in chunks for token in chunk[row]] for row in range(3)]
        assert found == [row[: first(row, stops)] for row in plain]
        assert len(chunks) == 1 + max(map(len, found)) // 16  # and when all have ended, so does the work


def first(row, stops):
    """Where the first of the stops is in a row."""
    return min(i for i, token in enumerate(row) if token in stops)


@pytest.mark.parametrize('n', [1, 16, 17, 20])
def test_an_answer_has_exactly_as_many_tokens_as_asked_for(text, n):
    runner, prompts = text
    assert answers(runner, prompts, max_new_tokens=n) == [
        row[:n] for row in answers(runner, prompts, max_new_tokens=29)
    ]
    assert [len(row) for row in answers(runner, prompts, max_new_tokens=n)] == [n, n, n]


def test_prompt_and_answer_fill_the_context_and_no_more(text):
    runner, prompts = text
    found = answers(runner, prompts, max_new_tokens=1000)
    assert [len(prompt.ids) + len(row) for prompt, row in zip(prompts, found, strict=True)] == [CONTEXT] * 3
    assert [row[:29] for row in found] == answers(runner, prompts, max_new_tokens=29)
    for length in (CONTEXT, 2000):
        with pytest.raises(UserError, match=rf'{length} tokens long, and the context holds {CONTEXT}'):
            list(runner.generate([prompts[1], Prompt(np.ones(length, np.int32), [])]))


def test_a_prompt_one_short_of_the_context_gets_one_token(tokenizer):
    runner, _ = make('vision_instruct', tokenizer)
    ids = np.random.default_rng(1).integers(5, 250, CONTEXT - 1, np.int32)
    assert [len(row) for row in answers(runner, [Prompt(ids, [])])] == [1]


def test_answers_go_on_as_the_cache_grows(tokenizer, monkeypatch):
    runner, prompts = make('sft', tokenizer, positions=211)
    found = answers(runner, prompts, max_new_tokens=170)  # through caches of 128 and 256 columns
    tokens = np.array([[*prompt.ids, *row][:180] for prompt, row in zip(prompts, found, strict=True)])
    inputs = [tokens, np.broadcast_to(np.arange(180), tokens.shape), np.ones_like(tokens)]
    forward = jax.jit(lambda params, *x: models.merge(runner.graphdef, params)(*x))
    scores = np.asarray(forward(runner.params, *inputs))
    for row, prompt, answer in zip(scores, prompts, found, strict=True):
        n = 180 - len(prompt.ids)
        here = row[len(prompt.ids) - 1 :][:n]
        np.testing.assert_allclose(here[np.arange(n), answer[:n]], here.max(axis=1), atol=1e-4)
    monkeypatch.setattr(engine, 'QUICK', 0)  # and whatever the chunks
    assert answers(runner, prompts, max_new_tokens=170) == found


def test_prompts_of_one_bucket_compile_nothing_new(text):
    runner, prompts = text
    answers(runner, prompts, max_new_tokens=20)
    with micro.traced_at_most(0):
        for lengths in ((18, 25, 31), (13, 19, 32), (1, 2, 29)):
            other = [Prompt(np.full(n, 7, np.int32), []) for n in lengths]
            answers(Engine(runner.config, runner.graphdef, runner.params, ENDLESS), other, max_new_tokens=29)
        with pytest.raises(AssertionError, match='traced > 0 times'):  # another bucket
            answers(runner, [Prompt(np.full(3, 7, np.int32), [])] * 5, max_new_tokens=1)


def test_sampling_follows_the_distribution():
    probability = np.array([0.06, 0.4, 0, 0.15, 0.04, 0.25, 0.1])
    logits = jnp.log(jnp.float32(probability))
    keys = jax.vmap(jax.random.key)(jnp.arange(20_000))
    draw = jax.jit(lambda *options: jax.vmap(sampling.sample, in_axes=(0, *[None] * 5))(keys, logits, *options))

    def check(expected, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
        found = draw(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p))
        expected = np.array(expected) / np.sum(expected)
        share = np.bincount(found, minlength=7) / len(found)
        assert (share[expected == 0] == 0).all()
        np.testing.assert_allclose(share, expected, atol=5 * 0.5 / len(found) ** 0.5)

    only = [[p if p >= least else 0 for p in probability] for least in (0.25, 0.15, 0.1)]
    check(probability)
    check(probability**2, temperature=0.5)
    check(probability**0.5, temperature=2.0)
    check(only[0], top_k=2)
    check(only[1], top_k=3)
    check(only[1], top_p=0.7)  # 0.4 and 0.25 do not reach it
    check(only[2], top_p=0.85)
    check(only[1], top_k=4, top_p=0.7)  # the narrower of both
    check(only[0], top_k=2, top_p=0.7)
    check(probability, top_k=100)
    check(only[1], min_p=0.3)  # of 0.4
    check(only[0], min_p=0.3, top_k=2)


def test_of_equals_the_first_is_the_likeliest():
    scores = np.random.default_rng(0).integers(0, 9, (40, 31)).astype(np.float32)
    scores[0], scores[1, 7:], scores[2] = -np.inf, -np.inf, np.nan
    found = np.asarray(jax.jit(sampling.first_largest)(scores))
    np.testing.assert_array_equal(np.delete(found, 2), np.delete(scores.argmax(1), 2))
    assert 0 <= found[2] < 31  # a token all the same


def test_streamed_pieces_are_whole_characters_and_join_to_the_answer(text, tokenizer, monkeypatch):
    runner, prompts = text
    endless = types.SimpleNamespace(stops=ENDLESS, decode=tokenizer.decode)
    run = Run(runner.config, 1, runner.graphdef, runner.params, endless)
    options = {'max_new_tokens': 40, 'temperature': 1.0}
    assert ''.join(run.stream(prompts[1], **options)) == run.answer(prompts[1:2], **options)[0] != ''

    def stream(ids, size):
        chunks = [[ids[i : i + size]] for i in range(0, len(ids), size)]
        monkeypatch.setattr(run.engine, 'generate', lambda *_, **__: iter(chunks))
        return list(run.stream(prompts[0]))

    said = 'The 🦔 and the 日本 über\n naïve — fine'
    ids, hedgehog = list(tokenizer.encode(said)), list(tokenizer.encode('a 🦔'))
    assert len(hedgehog) > 3  # one character of several tokens
    for size in (1, 2, 3, 16):
        pieces = stream(ids, size)
        assert ''.join(pieces) == said and not any('\ufffd' in piece for piece in pieces)
    assert ''.join(stream(hedgehog[:-1], 1)) == tokenizer.decode(hedgehog[:-1]) == 'a \ufffd'
    assert ''.join(stream([*hedgehog[:-1], *tokenizer.encode('!')], 1)) == 'a \ufffd!'
    assert stream([], 1) == []


def test_prompts_are_what_training_sees(tokenizer):
    cfg = micro.odd_config('vision_instruct')
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8))
    messages = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'a cat?'}]}]
    prompt = chat_prompt(cfg, tokenizer, messages, [picture])
    answered = [*messages, {'role': 'assistant', 'content': 'the dog'}]
    ids, learned, *_ = conversation.encode(answered, tokenizer, [P])
    assert prompt.ids.tolist() == ids[: int(learned.argmax())].tolist() and prompt.ids[-1] == tokenizer.assistant
    np.testing.assert_array_equal(prompt.images, [images.prepare(picture, cfg.model.vision)])
    continued = text_prompt(tokenizer, 'the cat runs').ids
    assert continued.tolist() == tokenizer.encode_documents(['the cat runs']).tolist()


def test_a_system_message_leads_and_pictures_go_with_the_question(tokenizer):
    cfg, picture = micro.odd_config('vision_instruct'), Image.new('RGB', (9, 9))
    system, question = {'role': 'system', 'content': 'the dog'}, {'role': 'user', 'content': 'a cat?'}
    ids = chat_prompt(cfg, tokenizer, [system, question], [picture]).ids.tolist()
    t = tokenizer
    wanted = [t.end_of_text, t.user, *t.encode('the dog'), *[t.image] * P, *t.encode('a cat?'), t.end, t.assistant]
    assert ids == wanted
    ids = chat_prompt(micro.odd_config('sft'), tokenizer, [system, question]).ids.tolist()
    assert ids == [t.end_of_text, t.user, *t.encode('the dog\n\na cat?'), t.end, t.assistant]


def test_what_cannot_be_answered_is_said(tokenizer):
    cfg = micro.odd_config('sft')
    question, answer = {'role': 'user', 'content': 'a?'}, {'role': 'assistant', 'content': 'b'}
    picture = Image.new('RGB', (9, 9))
    for messages, pictures in (
        ([], []),
        ([question, answer], []),
        ([question, question], []),
        ([answer], []),
        ([{'role': 'system', 'content': 'x'}], []),
        ([{'role': 'tool', 'content': 'x'}, question], []),
        ([{'role': 'user', 'content': [{'type': 'image'}] * 2}], [picture]),
        ([{'role': 'user'}], []),
    ):
        with pytest.raises(UserError, match='cannot be answered'):
            chat_prompt(cfg, tokenizer, messages, pictures)
    with pytest.raises(UserError, match='no decoder to chat with'):
        Engine(micro.odd_config('clip'), None, None, tokenizer.stops)


# Judging options -----------------------------------------------------------------------------------------------------


def options_of(prompts):
    """Options of unequal lengths and numbers, single tokens among them."""
    rng = np.random.default_rng(1)
    return [[rng.integers(5, 250, n, np.int32) for n in lengths] for lengths in ((1, 1, 7), (12, 3), (1, 2, 5, 1))]


def by_hand(runner, prompt, option):
    """(log-probabilities, whether each is the likeliest) of an option by one forward pass of everything."""
    tokens = np.zeros((1, CONTEXT + 1), np.int32)
    tokens[0, : len(prompt.ids) + len(option)] = [*prompt.ids, *option]
    inputs = [tokens, np.arange(CONTEXT + 1, dtype=np.int32)[None], np.ones_like(tokens)]
    if runner.config.stage == 'vision_instruct':
        pictures = np.zeros((1, 2, 21, 21, 3), np.uint8)
        pictures[0, : len(prompt.images)] = prompt.images or 0
        inputs.append(pictures)
    scores = forward(runner.graphdef, runner.params, inputs)[0, len(prompt.ids) - 1 :][: len(option)]
    logs = np.asarray(jax.nn.log_softmax(scores, axis=1))
    return logs[np.arange(len(option)), option], logs.argmax(axis=1) == option


def test_options_are_as_likely_as_a_full_forward_pass_says(case):
    runner, prompts = case
    options = options_of(prompts)
    # What the model would say itself is among them, with and without a token that it would not.
    said = answers(runner, prompts, max_new_tokens=6)
    for each, ids in zip(options, said, strict=True):
        each += [np.array(ids, np.int32), np.array([*ids[:5], (ids[5] + 1) % 250], np.int32)]
    for prompt, each, found in zip(prompts, options, runner.judge(prompts, options), strict=True):
        assert len(found) == len(each)
        for option, (likely, greedy) in zip(each, found, strict=True):
            wanted, first = by_hand(runner, prompt, option)
            assert likely.shape == greedy.shape == option.shape
            np.testing.assert_allclose(likely, wanted, atol=1e-5)
            assert (greedy == first).all()
        assert [greedy.all() for _, greedy in found[-2:]] == [True, False] and found[-1][1][:5].all()


def test_an_option_is_judged_alike_in_any_company(case):
    runner, prompts = case
    options = options_of(prompts)
    together = runner.judge(prompts, options)
    for prompt, each, found in zip(prompts, options, together, strict=True):
        ((alone, *_),) = runner.judge([prompt], [each[:1]])  # in narrower shapes
        np.testing.assert_allclose(alone[0], found[0][0], atol=1e-5)
        for option, (likely, greedy) in zip(each, runner.judge([prompt] * 3, [each] * 3)[1], strict=True):
            wanted, first = by_hand(runner, prompt, option)
            np.testing.assert_allclose(likely, wanted, atol=1e-5)
            assert (greedy == first).all()


def test_what_the_context_does_not_hold_is_not_judged(text):
    runner, prompts = text
    option = np.arange(5, 5 + CONTEXT - 32 + 1, dtype=np.int32)  # the last of its tokens is said, and not read
    ((found,),) = runner.judge(prompts[:1], [[option]])
    np.testing.assert_allclose(found[0], by_hand(runner, prompts[0], option)[0], atol=1e-5)
    with pytest.raises(UserError, match='prompt and option are 62 tokens long, and the context holds 61'):
        runner.judge(prompts[:2], [[option[:3]], [option, np.arange(5, 5 + 46, dtype=np.int32)]])
