"""Conversations to tokens: what is learned, what is refused, where pictures stand, and where a long one is cut."""

import random

import numpy as np
import pytest
from conftest import sentence

from nanovision_jax.data.conversation import BadExample, check, encode, fit, from_llava, text_of

PATCHES = 7
PICTURE = {'type': 'image'}


def user(*content):
    return {'role': 'user', 'content': content[0] if isinstance(content[0], str) else list(content)}


def assistant(content):
    return {'role': 'assistant', 'content': content}


def words(text):
    return {'type': 'text', 'text': text}


@pytest.fixture
def talk():
    return [user('a cat?'), assistant(' the dog sees '), user('42'), assistant('naïve 你好')]


def test_the_layout(tokenizer, talk):
    ids, learned, ends, _ = encode(talk, tokenizer)
    t, text = tokenizer, tokenizer.encode
    first = [t.end_of_text, t.user, *text('a cat?'), t.end, t.assistant, *text('the dog sees'), t.end]
    second = [t.user, *text('42'), t.end, t.assistant, *text('naïve 你好'), t.end]
    assert ids.tolist() == first + second
    assert ends == [len(first), len(first + second)]
    assert ids.dtype == np.int32 and learned.dtype == bool and len(learned) == len(ids)


def test_answers_and_their_ends_are_learned_and_nothing_else(tokenizer, talk):
    ids, learned, *_ = encode(talk, tokenizer)
    assert tokenizer.decode(ids[learned], special=True) == 'the dog sees<|end|>naïve 你好<|end|>'
    left = tokenizer.decode(ids[~learned], special=True)
    assert left == '<|endoftext|><|user|>a cat?<|end|><|assistant|><|user|>42<|end|><|assistant|>'


def test_special_strings_in_a_conversation_are_only_text(tokenizer):
    ids, learned, *_ = encode([user('a<|end|><|assistant|>b'), assistant('<|end|><|user|>')], tokenizer)
    assert np.isin(ids, tokenizer.special).sum() == 5
    assert learned.sum() == len(tokenizer.encode('<|end|><|user|>')) + 1


@pytest.mark.parametrize(
    'content',
    [[PICTURE, words('what?')], [words('what?'), PICTURE], [words('first'), PICTURE, words('second')], [PICTURE]],
)
def test_a_picture_is_a_run_of_tokens_at_its_place(tokenizer, content):
    ids, learned, *_ = encode([user(*content), assistant('a dog')], tokenizer, [PATCHES])
    body = []
    for part in content:
        body += [tokenizer.image] * PATCHES if part is PICTURE else tokenizer.encode(part['text'])
    assert ids.tolist()[1 : len(body) + 3] == [tokenizer.user, *body, tokenizer.end]
    assert not learned[ids == tokenizer.image].any()


def test_every_image_has_as_many_tokens_as_it_is_given(tokenizer):
    talk = [user(PICTURE, words('a?'), PICTURE), assistant('yes'), user(words('b?'), PICTURE), assistant('no')]
    ids, learned, ends, images = encode(talk, tokenizer, [3, 1, 5])
    runs = [len(run) for run in ''.join('x' if i == tokenizer.image else ' ' for i in ids).split()]
    assert (runs, images, len(ids)) == ([3, 1, 5], [2, 3], ends[-1])
    assert not learned[ids == tokenizer.image].any()
    assert len(encode(talk, tokenizer, [1, 1, 1]).ids) == len(ids) - 6
    with pytest.raises(BadExample, match='3 image places for 2 images'):
        encode(talk, tokenizer, [3, 1])


def test_two_pictures_side_by_side(tokenizer):
    ids, *_ = encode([user(PICTURE, PICTURE, words('two?')), assistant('yes')], tokenizer, [PATCHES] * 2)
    assert (ids[2 : 2 + 2 * PATCHES] == tokenizer.image).all()
    assert (ids == tokenizer.image).sum() == 2 * PATCHES


def test_texts_side_by_side_are_lines_of_one(tokenizer):
    parts, *_ = encode([user(words('a cat'), words('a dog')), assistant('yes')], tokenizer)
    whole, *_ = encode([user('a cat\na dog'), assistant('yes')], tokenizer)
    assert parts.tolist() == whole.tolist()


def test_a_last_question_without_an_answer_is_left_out(tokenizer, talk):
    whole, learned, ends, _ = encode(talk, tokenizer)
    ids, again, more, _ = encode([*talk, user('and then?')], tokenizer)
    assert ids.tolist() == whole.tolist() and again.tolist() == learned.tolist() and more == ends


def test_a_question_stays_and_opens_the_answer(tokenizer, talk):
    whole, *_ = encode(talk, tokenizer)
    ids, learned, *_ = encode(talk[:3], tokenizer, question=True)
    assert ids.tolist() == whole[: len(ids)].tolist()
    assert ids[-1] == tokenizer.assistant and not learned[-1]


Q, A = user('a'), assistant('b')
BAD = {
    'system speaks out of turn': ([Q, A, {'role': 'system', 'content': 'x'}, Q, A], {}),
    'a picture in a system message': ([{'role': 'system', 'content': [PICTURE]}, Q, A], {'image_tokens': [PATCHES]}),
    'the role tool belongs to tools, which are not supported': ([Q, {'role': 'tool', 'content': 'x'}, A], {}),
    'the role ipython belongs to tools, which are not supported': ([Q, {'role': 'ipython', 'content': 'x'}, A], {}),
    "unknown speaker 'narrator'": ([{'role': 'narrator', 'content': 'x'}, Q, A], {}),
    'unknown speaker None': ([{'content': 'x'}], {}),
    'user speaks out of turn': ([Q, Q, A], {}),
    'assistant speaks out of turn': ([A], {}),
    'a picture in an answer': ([Q, assistant([PICTURE])], {'image_tokens': [PATCHES]}),
    'empty answer': ([Q, assistant(' \n')], {}),
    'no answer': ([Q], {}),
    '0 image places for 1 images': ([Q, A], {'image_tokens': [PATCHES]}),
    '2 image places for 1 images': ([user(PICTURE, PICTURE), A], {'image_tokens': [PATCHES]}),
    '1 image places for 0 images': ([user(PICTURE), A], {}),
    'no question to answer': ([Q, A], {'question': True}),
    'a turn without text': ([Q, {'role': 'assistant'}], {}),
    'text that is not Unicode': ([Q, assistant('half \ud83d of it')], {}),
}


@pytest.mark.parametrize('reason', BAD)
def test_what_is_refused(tokenizer, reason):
    messages, options = BAD[reason]
    with pytest.raises(BadExample) as caught:
        encode(messages, tokenizer, **options)
    assert str(caught.value) == reason


def test_no_messages_have_no_answer(tokenizer):
    with pytest.raises(BadExample, match='no answer'):
        encode([], tokenizer)


@pytest.mark.parametrize(
    'message',
    [
        'a string',
        None,
        {},
        {'role': 'user'},
        {'role': 'user', 'content': None},
        {'role': 'user', 'content': ['a string']},
        {'role': 'user', 'content': [{}]},
        {'role': 'user', 'content': [{'type': 'video'}]},
        {'role': 'user', 'content': [{'type': 'text'}]},
        {'role': 'user', 'content': [{'type': 'text', 'text': 3}]},
        {'role': ['user'], 'content': 'x'},
    ],
)
def test_what_is_no_message_is_a_bad_example_and_not_a_crash(tokenizer, message):
    with pytest.raises(BadExample):
        check([message])
    with pytest.raises(BadExample):
        encode([message, A], tokenizer)


# Cutting -------------------------------------------------------------------------------------------------------------


def test_fit_cuts_after_the_last_answer_that_fits(tokenizer, talk):
    example = encode(talk * 3, tokenizer)
    ids, learned, ends, _ = example
    assert len(ends) == 6
    for length in range(ends[0] - 1, len(ids) + 3):
        cut, cut_learned, _ = fit(example, length)
        whole = max(end for end in ends if end - 1 <= length)  # a row holds one id more, as a target
        assert cut.tolist() == ids[:whole].tolist() and cut_learned.tolist() == learned[:whole].tolist()
        assert cut[-1] == tokenizer.end and cut_learned[-1]


def test_fit_refuses_an_answer_that_is_too_long(tokenizer, talk):
    example = encode(talk, tokenizer)
    ends = example.ends
    assert len(fit(example, ends[0] - 1)[0]) == ends[0]
    with pytest.raises(BadExample, match=f'ends at token {ends[0]}, beyond a row of {ends[0] - 2}'):
        fit(example, ends[0] - 2)


def test_the_pictures_behind_a_cut_go_with_it(tokenizer):
    """Random conversations, cut at every length: as many pictures are left as there are places for."""
    rng = random.Random(0)
    for _ in range(100):
        talk, pictures = [], 0
        for _ in range(rng.randint(1, 5)):
            shown = rng.choice([0, 0, 1, 2])
            pictures += shown
            talk += [user(*[PICTURE] * shown, words('42?')), assistant(' '.join(['dog'] * rng.randint(1, 9)))]
        if rng.random() < 0.5:  # a last question without an answer
            talk.append(user(PICTURE, words('and this?')))
            pictures += 1
        example = encode(talk, tokenizer, [PATCHES] * pictures)
        assert example.images[-1] == (example.ids == tokenizer.image).sum() / PATCHES
        for length in range(example.ends[0] - 1, example.ends[-1] + 2):
            ids, _, kept = fit(example, length)
            assert kept * PATCHES == (ids == tokenizer.image).sum()


# LLaVA's form --------------------------------------------------------------------------------------------------------


def human(value):
    return {'from': 'human', 'value': value}


@pytest.mark.parametrize(
    'value, content',
    {
        'what is it?': 'what is it?',
        '<image>\nwhat is it?': [PICTURE, words('what is it?')],
        'what is it?\n<image>': [words('what is it?'), PICTURE],
        'one <image> two <image>': [words('one '), PICTURE, words(' two '), PICTURE],
        '<image> <image>': [PICTURE, PICTURE],
        '<image>': [PICTURE],
    }.items(),
)
def test_image_stands_for_a_picture(value, content):
    assert from_llava([human(value)]) == [{'role': 'user', 'content': content}]


def test_image_in_an_answer_is_text(tokenizer):
    messages = from_llava([human('<image>\nwhich tag?'), {'from': 'gpt', 'value': 'it is <image>'}])
    assert messages[1] == {'role': 'assistant', 'content': 'it is <image>'}
    ids, learned, *_ = encode(messages, tokenizer, [PATCHES])
    assert (ids == tokenizer.image).sum() == PATCHES
    assert tokenizer.decode(ids[learned]) == 'it is <image>'


def test_places_and_pictures_must_match(tokenizer):
    messages = from_llava([human('<image> and <image>?'), {'from': 'gpt', 'value': 'yes'}])
    assert (encode(messages, tokenizer, [PATCHES] * 2)[0] == tokenizer.image).sum() == 2 * PATCHES
    for images in (0, 1, 3):
        with pytest.raises(BadExample, match=f'2 image places for {images} images'):
            encode(messages, tokenizer, [PATCHES] * images)


@pytest.mark.parametrize(
    'turn, reason',
    [
        ({'from': 'narrator', 'value': 'x'}, "unknown speaker 'narrator'"),
        ({'value': 'x'}, 'unknown speaker None'),
        ({'from': 'human'}, 'a turn without text'),
        ({'from': 'human', 'value': 3}, 'a turn without text'),
        ('a string', 'unknown speaker None'),
    ],
)
def test_what_is_no_turn_is_refused(turn, reason):
    with pytest.raises(BadExample, match=reason):
        from_llava([turn])


def test_kinds_are_kept_and_words_are_read():
    turns = [human('<image>\nwhere?'), {'from': 'gpt', 'value': 'here', 'kind': 'place'}]
    question, answer = from_llava(turns)
    assert answer == {'role': 'assistant', 'content': 'here', 'kind': 'place'}
    assert (text_of(question), text_of(answer)) == ('where?', 'here')


def test_a_hundred_random_conversations(tokenizer):
    rng = random.Random(0)
    for _ in range(100):
        said = [sentence(rng) for _ in range(2 * rng.randint(1, 5))]
        turns = [{'from': ('human', 'gpt')[i % 2], 'value': text} for i, text in enumerate(said)]
        ids, learned, ends, _ = encode(from_llava(turns), tokenizer)
        assert tokenizer.decode(ids[learned], special=True) == ''.join(f'{text}<|end|>' for text in said[1::2])
        assert len(ends) == len(said) // 2 and ends[-1] == len(ids)
