"""The viewer: a row told as the model gets it, and the command for every kind of stage."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT

from nanovision_jax import show
from nanovision_jax.data import batch as batches
from nanovision_jax.data import conversation
from nanovision_jax.errors import UserError


@pytest.fixture(scope='module')
def row(tokenizer):
    """Two examples in one row, the second without a picture."""
    picture = {'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'a cat?'}]}
    examples = []
    for question, pictures in ((picture, 1), ({'role': 'user', 'content': 'a dog?'}, 0)):
        messages = [question, {'role': 'assistant', 'content': 'red, über'}]
        ids, learned, *_ = conversation.encode(messages, tokenizer, [9] * pictures)
        examples.append((ids, learned, [{'images': np.zeros((21, 21, 3), np.uint8)}] * pictures))
    return batches.pack(examples, 61, {'images': np.zeros((2, 21, 21, 3), np.uint8)})


def test_a_row_is_told_example_by_example(row, tokenizer):
    assert show.render(row, tokenizer, colour=False) == (
        '<|endoftext|><|user|>[picture: 9 tokens]a cat?<|end|><|assistant|>«red, über<|end|>»  ▏1\n'
        '<|endoftext|><|user|>a dog?<|end|><|assistant|>«red, über<|end|>»  ▏2\n'
    )


def test_colours_say_what_is_learned(row, tokenizer):
    said = show.render(row, tokenizer)
    assert re.findall(r'\033\[32m(.*?)\033\[0m', said) == ['red, über<|end|>'] * 2
    assert re.findall(r'\033\[44;97m(.*?)\033\[0m', said) == ['[picture: 9 tokens]']
    assert re.sub(r'\033\[[\d;]+m', '', said) == re.sub('[«»]', '', show.render(row, tokenizer, colour=False))


def shown(stage, family, *options):
    batch = ['--config.data.batch_size=3', '--config.data.length=200', f'--config.run_dir={family}/{stage}']
    show.main([f'--config={ROOT}/configs/{stage}.py:tiny', *batch, *options])


def test_the_command_shows_the_first_batch_of_a_stage(llava_folder, tmp_path, capsys):
    (tmp_path / 'words.txt').write_text('\n'.join(f'the {n} birds.' for n in range(300)))
    source = ['--config.data.source=conversations', f'--config.data.path={llava_folder}/instruct.json']
    captions = [source[0], f'--config.data.path={llava_folder}/pretrain.json']
    shown('pretrain', tmp_path, '--config.data.source=text', f'--config.data.path={tmp_path}/words.txt', '--rows', '1')
    text = capsys.readouterr().out
    assert 'tokens     int32    [3, 200]' in text and text.count('\nrow ') == 1
    assert 'learned: 100.0% of the row; padding: 0.0%' in text and re.search(r'birds\.\nthe \d+ birds\.', text)

    shown('clip', tmp_path, *captions)
    pairs = re.findall(r'\[picture\] <\|endoftext\|>(.*)<\|end\|>', capsys.readouterr().out)
    answers = {row['conversations'][1]['value'] for row in json.loads((llava_folder / 'pretrain.json').read_text())}
    assert len(pairs) == 2 and answers.issuperset(pairs)

    shown('vision_instruct', tmp_path, *source, '--rows=3')
    text = capsys.readouterr().out
    turns = [row['conversations'] for row in json.loads((llava_folder / 'instruct.json').read_text())]
    answers = {turn['value'] for row in turns for turn in row if turn['from'] == 'gpt'}
    learned = re.findall('«(.*?)<\\|end\\|>»', text)
    assert 'images     uint8    [3, ' in text and '[picture: 9 tokens]' in text and text.count('\nrow ') == 3
    assert len(learned) > 6 and answers.issuperset(learned)


@pytest.mark.parametrize('count', ['0', '-1', 'two', '1.5', ''])
def test_rows_is_a_number(count):
    for rows in ([f'--rows={count}'], ['--rows', count]):
        with pytest.raises(UserError, match=f"--rows takes (a number above 0, not {count}\\.|int, not '{count}')"):
            show.main([f'--config={ROOT}/configs/sft.py:tiny', *rows])


def test_unknown_options_are_answered(tmp_path):
    with pytest.raises(UserError, match='unknown argument --row'):
        show.main([f'--config={ROOT}/configs/sft.py:tiny', '--row=3'])
