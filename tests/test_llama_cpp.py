"""A run as a GGUF file: what stands in it, what is refused; and llama.cpp says our tokens, where it can be built."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys

import foreign
import golden
import micro
import numpy as np
import pytest
import tokenizers
from conftest import ROOT, sentence

import nanovision_jax
from nanovision_jax import config_checks, convert
from nanovision_jax.data import templates
from nanovision_jax.data.tokenizer import Tokenizer, escape, import_tokenizer
from nanovision_jax.errors import UserError
from nanovision_jax.hf import llama_cpp
from nanovision_jax.inference.prompt import chat_prompt
from nanovision_jax.runs.folder import read_json

gguf = pytest.importorskip('gguf')

LLAMA = dict(flavour='llama', kv_heads=2, rope_theta=1e4)
KINDS = {
    'llama': LLAMA | dict(head_dim=10, rope_scaling=(8.0, 1.0, 4.0, 64.0)),
    'llama, tied': LLAMA | dict(kv_heads=0, tied=True),
    'qwen2': LLAMA | dict(qkv_bias=True, tied=True),
    'qwen3': LLAMA | dict(head_dim=10, qk_norm=True),
}


def write_run(folder, tokenizer, fields, stage='sft'):
    """The folder of a run with random weights of which an answer follows."""
    cfg = micro.config(stage, folder)
    cfg.name, cfg.dtype, cfg.data.length = 'mine', 'float32', 64
    cfg.model = dataclasses.replace(cfg.model, positions=256, **fields)
    config_checks.check(cfg)
    return micro.run_folder(cfg, tokenizer, golden.params_of(cfg, tokenizer)[1])


@pytest.fixture(scope='module')
def runs(tokenizer, tmp_path_factory):
    """A function kind → the folder of a run of that kind; made once each."""
    family, made = tmp_path_factory.mktemp('family'), {}

    def make(kind):
        if kind not in made:
            made[kind] = write_run(family / str(len(made)), tokenizer, KINDS[kind])
        return made[kind]

    return make


def written(run, output, *options):
    """(fields, tensors by name) of the file that convert makes of a run."""
    convert.main(['--to=gguf', f'--run={run}', f'--output={output}', *options])
    reader = gguf.GGUFReader(output)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith('GGUF.')}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


# What stands in the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_the_settings_are_the_models(kind, runs, tmp_path, capsys):
    fields, _ = written(runs(kind), tmp_path / 'new' / 'out.gguf')
    assert capsys.readouterr().out == f'written: {tmp_path}/new/out.gguf\n'
    name, size = kind.partition(',')[0], nanovision_jax.load(runs(kind)).tokenizer.size
    wanted = {
        'context_length': 256, 'embedding_length': 32, 'block_count': 2, 'feed_forward_length': 64, 'vocab_size': size,
        'attention.head_count': 4, 'attention.head_count_kv': 4 if 'tied' in kind else 2, 'rope.freq_base': 1e4,
        'attention.layer_norm_rms_epsilon': pytest.approx(1e-5),
    }  # fmt: skip
    head = 10 if KINDS[kind].get('head_dim') else 8
    wanted |= dict.fromkeys(('attention.key_length', 'attention.value_length', 'rope.dimension_count'), head)
    found = {key: value for key, value in fields.items() if not key.startswith('tokenizer.')}
    general = {'architecture': name, 'type': 'model', 'name': 'mine sft', 'file_type': 0}
    assert found == {f'{name}.{key}': v for key, v in wanted.items()} | {f'general.{k}': v for k, v in general.items()}


def test_the_tokenizer_is_the_runs(runs, tmp_path):
    fields, _ = written(runs('llama'), tmp_path / 'out.gguf')
    tokenizer = nanovision_jax.load(runs('llama')).tokenizer
    model = read_json(tokenizer.folder / 'tokenizer.json')['model']
    found = {key.removeprefix('tokenizer.'): v for key, v in fields.items() if key.startswith('tokenizer.')}
    assert {found['ggml.tokens'][i]: i for i in range(tokenizer.size)} == model['vocab']
    control = [i for i, kind in enumerate(found['ggml.token_type']) if kind == gguf.TokenType.CONTROL]
    assert control == list(tokenizer.special) and set(found['ggml.token_type']) == {1, 3}
    assert found['ggml.merges'] == [' '.join(pair) for pair in model['merges']] and len(found['ggml.merges']) > 50
    stored = (tokenizer.folder / 'chat_template.jinja').read_text()
    assert found['chat_template'] == stored.replace(r'\u200b', '\u200b') != stored
    end = '<|end|>'
    for name, token in {'bos': '<|endoftext|>', 'eos': end, 'eot': end, 'padding': '<|endoftext|>'}.items():
        assert found['ggml.tokens'][found[f'ggml.{name}_token_id']] == token
    assert (found['ggml.model'], found['ggml.pre'], found['ggml.add_bos_token']) == ('gpt2', 'gpt-2', False)


def test_ids_without_a_token_are_filled_and_added_words_stay_words(tokenizer_folder, tmp_path):
    import_tokenizer(str(foreign.make('qwen3', tmp_path / 'theirs', tokenizer_folder)), tmp_path / 'ours')
    content = json.loads((tmp_path / 'ours' / 'tokenizer.json').read_text())
    gap = content['model']['vocab'].pop(''.join(content['model']['merges'].pop()))
    (tmp_path / 'ours' / 'tokenizer.json').write_text(json.dumps(content))
    fields, _ = written(write_run(tmp_path / 'run', Tokenizer(tmp_path / 'ours'), LLAMA), tmp_path / 'out.gguf')
    kinds = dict(zip(fields['tokenizer.ggml.tokens'], fields['tokenizer.ggml.token_type'], strict=True))
    assert kinds[f'[PAD{gap}]'] == gguf.TokenType.UNUSED
    assert kinds['<think>'] == gguf.TokenType.USER_DEFINED and kinds['<|im_end|>'] == gguf.TokenType.CONTROL
    assert fields['tokenizer.ggml.pre'] == 'smollm' and fields['tokenizer.ggml.tokens'][-1] == '<|image|>'


@pytest.mark.parametrize('kind', KINDS)
def test_the_tensors_are_the_parameters(kind, runs, tmp_path):
    _, tensors = written(runs(kind), tmp_path / 'out.gguf')
    run = nanovision_jax.load(runs(kind))
    found = {name: tensor.data.reshape(tuple(tensor.shape[::-1])) for name, tensor in tensors.items()}
    ours, head = run.params, run.config.model.head_size
    matrices = {'q': ours['blocks']['q'], 'k': {}, 'v': {}, 'output': ours['blocks']['out']}
    for name, part in ours['blocks']['kv'].items():
        matrices['k'][name], matrices['v'][name] = part[:, ..., 0, :, :], part[:, ..., 1, :, :]
    order = np.arange(head)
    if kind.startswith('llama'):  # neighbours: what was at i and at i + H/2
        order = np.stack([order[: head // 2], order[head // 2 :]], 1).reshape(-1)
    wanted = {'token_embd.weight': ours['embedding']['embedding'][: run.tokenizer.size]}
    if 'tied' not in kind and kind != 'qwen2':
        wanted['output.weight'] = ours['head']['kernel'].T[: run.tokenizer.size]
    wanted['output_norm.weight'] = ours['norm']['scale']
    for layer in (0, 1):
        block = f'blk.{layer}.'
        for name in 'qkv':
            for part, array in matrices[name].items():
                array = np.asarray(array[layer])[..., order if name != 'v' else np.arange(head)]
                flat = array.reshape(32, -1).T if part == 'kernel' else array.reshape(-1)
                wanted[f'{block}attn_{name}.{"weight" if part == "kernel" else "bias"}'] = flat
        wanted[f'{block}attn_output.weight'] = np.asarray(matrices['output']['kernel'][layer]).reshape(-1, 32).T
        for name, theirs in {'gate': 'gate', 'in': 'up', 'out': 'down'}.items():
            wanted[f'{block}ffn_{theirs}.weight'] = np.asarray(ours['blocks'][f'ffn_{name}']['kernel'][layer]).T
        norms = {
            'attention_norm': 'attn_norm',
            'ffn_norm': 'ffn_norm',
            'q_norm': 'attn_q_norm',
            'k_norm': 'attn_k_norm',
        }
        for name, theirs in norms.items():
            if name in ours['blocks']:
                wanted[f'{block}{theirs}.weight'] = ours['blocks'][name]['scale'][layer]
    if kind == 'llama':
        wanted['rope_freqs.weight'] = [llama3_factor(1e4 ** (-i / 5), 8.0, 1.0, 4.0, 64.0) for i in range(5)]
        assert 1 < wanted['rope_freqs.weight'][1] < wanted['rope_freqs.weight'][-1] == 8
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6 if name.startswith('rope') else 0, err_msg=name)


def llama3_factor(frequency, factor, low, high, original):
    """By how much Llama 3.1 slows a wave down, by its length."""
    length = 2 * math.pi / frequency
    if length < original / high:
        return 1.0
    if length > original / low:
        return factor
    smooth = (original / length - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)


@pytest.mark.parametrize(
    ('dtype', 'kind', 'file', 'exact'), [('float16', 'F16', 1, 2**-11), ('bfloat16', 'BF16', 32, 2**-8)]
)
def test_in_two_bytes_matrices_are_rounded_and_vectors_are_not(dtype, kind, file, exact, runs, tmp_path):
    _, whole = written(runs('qwen2'), tmp_path / 'whole.gguf')
    fields, tensors = written(runs('qwen2'), tmp_path / 'half.gguf', f'--dtype={dtype}')
    assert fields['general.file_type'] == file and whole.keys() == tensors.keys()
    for name, tensor in tensors.items():
        matrix = len(tensor.shape) > 1
        assert tensor.tensor_type.name == (kind if matrix else 'F32') and (tensor.shape == whole[name].shape).all()
        found = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(whole[name].data.shape)
        np.testing.assert_allclose(found, whole[name].data, rtol=exact if matrix else 0, atol=1e-7 if matrix else 0)


def test_of_a_vision_run_it_is_the_decoder(tokenizer, tmp_path, capsys):
    run = write_run(tmp_path / 'run', tokenizer, LLAMA, 'vision_instruct')
    _, tensors = written(run, tmp_path / 'out.gguf')
    assert capsys.readouterr().out.endswith(', its text alone\n') and len(list(tmp_path.glob('*.gguf*'))) == 1
    embedding = nanovision_jax.load(run).params['decoder']['embedding']['embedding']
    np.testing.assert_array_equal(tensors['token_embd.weight'].data, embedding[: tokenizer.size])
    assert all(name.startswith(('blk.', 'token_embd.', 'output')) for name in tensors)


# What is refused ------------------------------------------------------------------------------------------------------


def test_what_llama_cpp_would_compute_otherwise_is_refused(tokenizer, runs, tmp_path, monkeypatch):
    def refused(run, why, output=tmp_path / 'out.gguf'):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(UserError, match=why) as error:
            convert.main(['--to=gguf', f'--run={run}', f'--output={output}'])
        assert str(error.value).count('. ') == 0 and sorted(tmp_path.iterdir()) == before

    made = {
        'gpt': write_run(tmp_path / 'gpt', tokenizer, {}),
        'clip': micro.run_folder(micro.config('clip', tmp_path / 'clip'), tokenizer),
        'scaled': write_run(tmp_path / 'scaled', tokenizer, KINDS['qwen3'] | {'rope_scaling': (8.0, 1.0, 4.0, 64.0)}),
        'wide': write_run(tmp_path / 'wide', tokenizer, KINDS['qwen2'] | {'head_dim': 10}),
        'split': shutil.copytree(runs('llama'), tmp_path / 'split'),
    }
    file = made['split'] / 'tokenizer' / 'tokenizer.json'
    content = json.loads(file.read_text())
    content['pre_tokenizer']['add_prefix_space'] = True
    file.write_text(json.dumps(content))
    micro.restamp(made['split'])
    refused(made['gpt'], "gpt has GPT's decoder with ReLU, for which llama.cpp would compute GELU and answer wrongly")
    refused(made['clip'], 'is a clip run')
    refused(made['scaled'], 'rope_scaling, which llama.cpp passes over in a qwen3')
    refused(made['wide'], 'heads that do not make up its width')
    refused(made['split'], r'split/tokenizer splits text in a way that llama.cpp has no name for')
    (tmp_path / 'there').write_text('mine')
    refused(runs('llama'), 'there exists: name a file that does not', tmp_path / 'there')
    assert (tmp_path / 'there').read_text() == 'mine'
    refused(runs('llama'), 'exists', tmp_path / 'gpt')
    refused(runs('llama'), 'cannot be a folder', tmp_path / 'there' / 'out.gguf')
    monkeypatch.setitem(sys.modules, 'gguf', None)
    refused(runs('llama'), r"pip install -e '\.\[gguf\]'")


def test_only_what_llama_cpp_reads_in_the_same_way_has_a_name(tokenizer_folder, tmp_path):
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    ours = json.loads((tokenizer_folder / 'tokenizer.json').read_text())
    made = tokenizers.pre_tokenizers

    def name(pre=None, **changes):
        content = json.loads(json.dumps(ours))
        if pre:
            backend = tokenizers.Tokenizer.from_str(json.dumps(ours))
            backend.pre_tokenizer = pre
            content = json.loads(backend.to_str())
        content['model'] |= {key: value for key, value in changes.items() if key in content['model']}
        return llama_cpp.split_name(content | {k: v for k, v in changes.items() if k not in content['model']})

    words, plain = made.Split(tokenizers.Regex(PRETOKENIZE_REGEX), 'isolated'), made.ByteLevel(False, use_regex=False)
    threes = made.Split(tokenizers.Regex(PRETOKENIZE_REGEX.replace(r'|\p{N}|', r'|\p{N}{1,3}|')), 'isolated')
    assert name() == name(made.ByteLevel(False, trim_offsets=False)) == 'gpt-2'
    assert name(made.Sequence([made.Digits(True), made.ByteLevel(False)])) == 'smollm'
    assert name(made.Sequence([words, plain])) == name(made.Sequence([words, plain]), normalizer={'type': 'NFC'})
    assert name(made.Sequence([words, plain])) == 'qwen2'
    assert name(made.Sequence([threes, plain]), ignore_merges=True) == 'llama-bpe'
    older = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}  # before there was a use_regex
    assert name(pre_tokenizer=older) == 'gpt-2'
    unknown = [
        name(made.Sequence([threes, plain])),
        name(made.Sequence([made.Digits(False), made.ByteLevel(False)])),
        name(made.Sequence([words, made.ByteLevel(False)])),
        name(plain),
        name(pre_tokenizer=None),
        name(ignore_merges=True),
        name(byte_fallback=True),
        name(end_of_word_suffix='</w>'),
        name(normalizer={'type': 'Lowercase'}),
        name(added_tokens=[ours['added_tokens'][0] | {'rstrip': True}]),
    ]
    assert unknown == [None] * len(unknown)


# llama.cpp itself -----------------------------------------------------------------------------------------------------

VERSION = '0.3.36'  # of llama-cpp-python
FOLDER = ROOT / '.venv-llama-cpp'  # kept: it takes four minutes of a core to build
# The library alone, without what only this machine's processor knows.
OPTIONS = ['-DCMAKE_BUILD_TYPE=Release', '-DGGML_NATIVE=OFF', '-DGGML_OPENMP=OFF', '-DLLAMA_BUILD_COMMON=OFF']
OPTIONS += [f'-DLLAMA_BUILD_{part}=OFF' for part in ('TESTS', 'TOOLS', 'EXAMPLES', 'SERVER', 'APP')]


@pytest.fixture(scope='module')
def built():
    """The environment of the Python that has llama-cpp-python; llama.cpp is built if it is not there."""
    python, source = FOLDER / 'bin' / 'python', FOLDER / f'llama_cpp_python-{VERSION}'
    pip, build, llama = [python, '-m', 'pip', '-q'], FOLDER / 'build', source / 'vendor' / 'llama.cpp'
    jobs = os.environ.get('CMAKE_BUILD_PARALLEL_LEVEL', str(os.cpu_count()))
    jinja = f'jinja/*.cpp {llama}/common/json.cpp {llama}/common/unicode.cpp -I{llama}/common -I{llama}/vendor'
    jinja += f' -I{llama}/include -I{llama}/ggml/include'
    steps = [
        [sys.executable, '-m', 'venv', FOLDER],
        [*pip, 'install', 'cmake', 'ninja', 'numpy', 'jinja2', 'diskcache', 'typing-extensions'],
        [*pip, 'download', '--no-deps', '--no-binary=llama-cpp-python', '-d', FOLDER, f'llama-cpp-python=={VERSION}'],
        ['tar', '-xf', f'{source}.tar.gz', '-C', FOLDER],
        [FOLDER / 'bin' / 'cmake', '-G', 'Ninja', '-S', llama, '-B', build, *OPTIONS],
        [FOLDER / 'bin' / 'cmake', '--build', build, '--target', 'llama', '--parallel', jobs],
        ['sh', '-c', f'c++ -std=c++17 -O1 tests/llama_cpp_jinja.cpp {llama}/common/{jinja} -o {FOLDER}/jinja'],
    ]
    environment = os.environ | {'PATH': f'{FOLDER / "bin"}{os.pathsep}{os.environ["PATH"]}', 'PYTHONPATH': str(source)}
    environment['LLAMA_CPP_LIB_PATH'] = str(build / 'bin')
    if not (FOLDER / VERSION).exists():
        for step in steps:
            done = subprocess.run(
                step, cwd=ROOT, env=environment | {'PYTHONPATH': ''}, capture_output=True, text=True, errors='replace'
            )
            if done.returncode:
                pytest.skip(f'llama.cpp is not to be had: {(done.stderr or done.stdout)[-300:]}')
        (FOLDER / VERSION).touch()
    return environment


def said(command, given, environment):
    """What a program says to a text."""
    done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, encoding='utf-8')
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope='module')
def ask(built):
    """A function (file, **question) → what llama.cpp answers: see llama_cpp_driver.py."""
    command = [FOLDER / 'bin' / 'python', ROOT / 'tests' / 'llama_cpp_driver.py']

    def question(file, texts=(), chat=None, prompt=None, n=0, never=()):
        asked = dict(model=str(file), texts=list(texts), chat=chat, prompt=prompt, n=n, never=list(never))
        return json.loads(said(command, json.dumps(asked), built))

    return question


WORDS = "I'm we'll DON'T it's 'S ' 1 22 4444 55555 ٣٤ ½ Ⅷ ² ... <| |> %& _a_ x2y naïve 你好 世界。 мир مرحبا"
PIECES = [*WORDS.split(), 'e\u0301', 'हिन्दी', 'ไทย', '👩‍👩‍👧', '🙂', '\U0010ffff', '\ufffd', '\u200b', *'.,!?—…$+~']
PIECES += [*'\t\n\r \u00a0\u3000\u2028\x85', '  ', '     ', '\r\n', '\n\n\n', ' \n ']


def hard(rng, pieces=20):
    """Words, and what tokenizers take apart in different ways, in any order."""
    return ''.join(rng.choice([rng.choice(PIECES), sentence(rng, 1, 2)]) for _ in range(pieces))


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_llama_cpp_says_the_same_tokens(kind, runs, ask, tmp_path):
    run, rng = nanovision_jax.load(runs(kind)), random.Random(0)
    written(runs(kind), tmp_path / 'out.gguf')
    chat = [{'role': 'system', 'content': ' Be brief. '}, {'role': 'user', 'content': f'<|end|>{hard(rng)}<|user|>'}]
    prompt = chat_prompt(run.config, run.tokenizer, chat).ids.tolist()
    texts = [run.tokenizer.escape(hard(rng)).strip() for _ in range(200)]
    # Random weights stop nowhere in particular: all 32 tokens count.
    found = ask(tmp_path / 'out.gguf', texts, chat, prompt, 32, run.tokenizer.special)
    assert found['tokens'] == micro.greedy(run.graphdef, run.params, prompt, None, 32, run.tokenizer.special)
    assert len(set(found['tokens'])) > 8 and found['chat'] == prompt
    assert found['texts'] == [list(run.tokenizer.encode(text)) for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize('split', llama_cpp.SPLITS)
def test_llama_cpp_splits_text_as_its_name_says(split, ask, tmp_path):
    """With merges over all that is to be kept apart: what is split elsewhere becomes other tokens."""
    rng, (steps, whole) = random.Random(1), llama_cpp.SPLITS[split]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([hard(rng) for _ in range(500)], trainer)
    content = json.loads(trained.to_str())
    steps = [step | ({'trim_offsets': True} if step['type'] == 'ByteLevel' else {}) for step in steps]
    content['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': steps}
    content['model']['ignore_merges'] = whole
    (tmp_path / 'theirs').mkdir()
    (tmp_path / 'theirs' / 'tokenizer.json').write_text(json.dumps(content))
    (tmp_path / 'theirs' / 'tokenizer_config.json').write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    import_tokenizer(str(tmp_path / 'theirs'), tmp_path / 'ours')
    tokenizer = Tokenizer(tmp_path / 'ours')
    fields, _ = written(write_run(tmp_path / 'run', tokenizer, LLAMA), tmp_path / 'out.gguf')
    assert fields['tokenizer.ggml.pre'] == split
    texts = [tokenizer.escape(hard(rng)).strip() for _ in range(500)]
    assert ask(tmp_path / 'out.gguf', texts)['texts'] == [list(tokenizer.encode(text)) for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize('number', range(len(templates.KNOWN)))
def test_llama_cpps_jinja_writes_a_conversation_as_we_do(number, built, tmp_path):
    """Which llama-server goes by; llama-cpp-python has Python's."""
    template, rng = templates.KNOWN[number], random.Random(2)
    turns = (template.begin, template.document, *template.user, *template.assistant, *(template.system or ()))
    controls = sorted({*re.findall(r'<\|\w+\|>', ''.join((*turns, *template.ends))), templates.IMAGE})
    (tmp_path / 'template').write_text(llama_cpp.chat_template(template, controls), encoding='utf-8')

    def message(role):
        parts = [rng.choice(controls), hard(rng, 4), *'x ', rng.choice(controls), '\n\t', hard(rng, 4) + '.', '']
        text = ''.join(rng.sample(parts, 3)).strip()  # its trim leaves other white space than ASCII's
        text = rng.choice(['', ' ', ' \n\t']).join(['', text, ''])
        return {'role': role, 'content': rng.choice([text, [{'type': 'text', 'text': text}]])}

    talks, wanted = [], []
    for _ in range(200):
        roles, question = ['system'] * rng.randint(0, 1) + ['user', 'assistant'] * rng.randint(1, 3), rng.random() < 0.5
        messages = [message(role) for role in (roles[:-1] if question else roles)]
        talks.append({'messages': messages, 'add_generation_prompt': question})
        spans = [
            span for turn in template.turns(messages, lambda text: escape(text, controls), question) for span in turn
        ]
        wanted.append(''.join(span.text for span in spans))
    lines = ''.join(json.dumps(talk) + '\n' for talk in talks)
    lines = said([FOLDER / 'jinja', tmp_path / 'template'], lines, built).split('\n')[:-1]
    assert [json.loads(line) for line in lines] == wanted
