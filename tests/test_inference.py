"""nanovision_jax.load: what was saved is what answers, and what a run cannot do is said."""

import gc
import shutil

import chex
import jax
import micro
import numpy as np
import pytest
from PIL import Image

import nanovision_jax
from nanovision_jax.errors import UserError
from nanovision_jax.inference import prompt
from nanovision_jax.inference import run as inference
from nanovision_jax.models import padded

P = 9
OPTIONS = {'max_new_tokens': 30}


@pytest.fixture(scope='module')
def folder(tmp_path_factory, tokenizer):
    """A family of three runs."""
    family = tmp_path_factory.mktemp('runs')
    for stage in ('clip', 'pretrain', 'vision_instruct'):
        micro.run_folder(micro.odd_config(stage, family / stage), tokenizer)
    return family


@pytest.fixture(scope='module')
def vlm(folder):
    return nanovision_jax.load(folder / 'vision_instruct')


@pytest.fixture(scope='module')
def gpt(folder):
    return nanovision_jax.load(str(folder / 'pretrain'))


def picture(seed, mode='RGB'):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (37, 31, 3), np.uint8)).convert(mode)


def image_then(text):
    return [{'type': 'image'}, {'type': 'text', 'text': text}]


def test_a_run_is_what_was_saved(vlm, tokenizer):
    expected = micro.model(vlm.config, tokenizer)[1]
    chex.assert_trees_all_equal(vlm.params, expected, strict=True)
    assert (vlm.step, vlm.config.stage, vlm.tokenizer.digest) == (7, 'vision_instruct', tokenizer.digest)
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(vlm.params)} == {1}
    np.testing.assert_array_equal(vlm.model.decoder.head.kernel[...], expected['decoder']['head']['kernel'])


def test_logits_see_text_and_pictures(vlm, tokenizer):
    ids = np.random.default_rng(0).integers(5, 250, (2, 23))
    ids[:, 1 : 1 + P] = tokenizer.image
    pictures = np.random.default_rng(1).integers(0, 256, (2, 1, 21, 21, 3), np.uint8)
    with micro.traced_at_most(1):
        found, blank = vlm.logits(ids, pictures), vlm.logits(ids)
        ids[:, 20] += 1
        changed = vlm.logits(ids, pictures)
    assert found.shape == (2, 23, padded(tokenizer.size)) and found.dtype == np.float32
    assert (found[:, 0] == blank[:, 0]).all() and (found[:, 1:] != blank[:, 1:]).any(-1).all()
    assert (changed[:, :20] == found[:, :20]).all() and (changed[:, 20:] != found[:, 20:]).any(-1).all()


def test_chat_answers_what_the_engine_answers(vlm):
    given = [{'role': 'user', 'content': image_then('a cat?')}]
    given_prompt = prompt.chat_prompt(vlm.config, vlm.tokenizer, given, [picture(0)])
    (expected,) = vlm.answer([given_prompt], **OPTIONS)
    assert expected
    for messages in ('a cat?', [{'role': 'user', 'content': 'a cat?'}], given):
        assert vlm.chat(messages, images=[picture(0)], **OPTIONS) == expected
    pieces = vlm.chat('a cat?', images=[picture(0)], stream=True, **OPTIONS)
    assert not isinstance(pieces, str) and ''.join(pieces) == expected
    assert vlm.chat('a cat?', images=[picture(1)], **OPTIONS) != expected
    assert vlm.chat('a cat?', images=[picture(0, 'RGBA')], **OPTIONS) == expected
    assert vlm.chat('a cat?', images=picture(0), **OPTIONS) == expected and vlm.answer([]) == []
    for messages, images in (('a cat?', ['a.png']), ('a cat?', np.zeros((9, 9, 3))), (5, [])):
        with pytest.raises(UserError):
            vlm.chat(messages, images=images)


def test_pictures_go_where_the_messages_say(vlm, monkeypatch):
    seen = []

    def stream(self, prompt, **options):
        seen.append((prompt, options))
        return iter(['fine'])

    monkeypatch.setattr(inference.Run, 'stream', stream)
    token, pictures = vlm.tokenizer.image, [picture(0), picture(1)]
    answer = {'role': 'assistant', 'content': 'red'}
    late = [{'role': 'user', 'content': 'a?'}, answer, {'role': 'user', 'content': image_then('b?')}]
    both = [{'role': 'user', 'content': image_then('a?')}, answer, {'role': 'user', 'content': image_then('b?')}]
    assert vlm.chat(late, images=pictures[:1], temperature=0.5) == 'fine'
    vlm.chat(late, images=pictures)
    vlm.chat(both, images=pictures)
    vlm.chat('a?', images=pictures)
    (first, options), (second, _), (third, _), (fourth, _) = seen
    assert options == {'temperature': 0.5}
    assert (first.ids == token).sum() == P and first.ids.tolist().index(token) > 5
    assert second.ids.tolist() == third.ids.tolist() and len(third.images) == 2
    assert (third.ids == token).sum() == 2 * P and (third.ids[2 : 2 + P] == token).all()
    assert (fourth.ids[2 : 2 + 2 * P] == token).all()
    np.testing.assert_array_equal(third.images[0], first.images[0])
    assert both[0]['content'] == image_then('a?') and late[0]['content'] == 'a?'  # what was given stays as it was


def test_a_pretrain_run_continues_text(gpt):
    given_prompt = prompt.text_prompt(gpt.tokenizer, 'the cat sees')
    assert ''.join(gpt.continue_text('the cat sees', **OPTIONS)) == gpt.answer([given_prompt], **OPTIONS)[0] != ''
    with pytest.raises(UserError, match='continue_text'):
        gpt.chat('a cat?')


def test_what_a_run_cannot_do_is_said(vlm, gpt, folder):
    with pytest.raises(UserError, match='pretrain run: talking about pictures takes'):
        gpt.logits(np.ones((1, 3)), np.zeros((1, 1, 21, 21, 3)))
    with pytest.raises(UserError, match='no decoder to chat with'):
        nanovision_jax.load(folder / 'clip').chat('a cat?')
    with pytest.raises(UserError, match='2 image places for 1 images'):
        vlm.chat([{'role': 'user', 'content': image_then('a?')[:1] * 2}], images=[picture(0)])
    with pytest.raises(UserError, match='without text'):
        vlm.chat([{'role': 'user'}], images=[picture(0)])
    with pytest.raises(UserError, match='the context holds 61'):
        vlm.chat('x 1 ' * 61)


def test_what_is_no_run_is_said(folder, tmp_path):
    with pytest.raises(UserError, match=r'no config\.json\. There are: .*vision_instruct'):
        nanovision_jax.load(folder / 'sft')
    with pytest.raises(UserError, match=r'no config\.json\.$'):
        nanovision_jax.load(tmp_path / 'nothing' / 'here')
    assert gc.isenabled()  # as before
    started = shutil.copytree(folder / 'pretrain', tmp_path / 'started', ignore=shutil.ignore_patterns('checkpoints'))
    with pytest.raises(UserError, match='no whole checkpoint yet'):
        nanovision_jax.load(started)
