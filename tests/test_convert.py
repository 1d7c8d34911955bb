"""Conversions: transformers says the same as our engine, the way back is bit-equal, and what does not fit is named."""

import json
import shutil

import foreign
import jax
import micro
import numpy as np
import pytest
import transformers
from conftest import parse, sentence
from golden import KINDS, config_of, params_of
from PIL import Image
from safetensors.numpy import load_file, save_file

import nanovision_jax
from nanovision_jax import config as configs
from nanovision_jax import config_checks, convert
from nanovision_jax.data import conversation
from nanovision_jax.data.tokenizer import Tokenizer, import_tokenizer
from nanovision_jax.errors import UserError
from nanovision_jax.evals import base
from nanovision_jax.hf import convert as conversions
from nanovision_jax.hf import engines
from nanovision_jax.inference.prompt import chat_prompt
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.reporting import family as report
from nanovision_jax.runs import checkpoint, lineage
from nanovision_jax.runs import config_file as runconfig
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.training import loop, resume, start


@pytest.fixture(scope='module')
def runs(tokenizer, tmp_path_factory):
    """A function kind → the folder of a run of that kind with random weights; made once each."""
    family, made = tmp_path_factory.mktemp('family'), {}

    def make(kind):
        if kind not in made:
            cfg = config_of(kind, family / f'{len(made)}-{KINDS[kind][0]}')
            cfg.data.tokenizer = str(tokenizer.folder)
            write(cfg, tokenizer)
            made[kind] = cfg.run_dir
        return made[kind]

    return make


def write(cfg, tokenizer):
    """A run folder of random weights, as training leaves it."""
    _, params = params_of(cfg, tokenizer)
    resume.write_run(cfg, tokenizer, [])
    lineage.begin(cfg, tokenizer, [], parallel.make_mesh(configs.Mesh()), 'float32', {}, {}, 0)
    writer = checkpoint.Checkpoints(cfg.run_dir, keep=1)
    writer.save(7, jax.device_put(params), {'count': np.zeros(())}, {})
    writer.wait()


def picture(seed=0, size=(23, 31)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def say(argv, capsys):
    convert.main(argv)
    return capsys.readouterr().out


@pytest.mark.parametrize('kind', KINDS)
def test_transformers_generates_what_our_engine_does(kind, runs, tmp_path, capsys):
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    run, folder = nanovision_jax.load(runs(kind)), tmp_path / 'out'
    assert str(folder) in say(['--to=hf', f'--run={runs(kind)}', f'--output={folder}'], capsys)
    vision = run.config.stage.startswith('vision')
    auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    model, told = auto.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == KINDS[kind][3]
    assert not any(told[name] for name in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    content = [{'type': 'text', 'text': 'the cat sees a tree ?'}]
    if vision:
        content = [{'type': 'image'}, *content]
        processor = transformers.AutoProcessor.from_pretrained(folder)
        messages = [{'role': 'user', 'content': content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(images=picture(), text=text, add_special_tokens=False, return_tensors='pt')
        prompt = chat_prompt(run.config, run.tokenizer, messages, [picture()])
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        messages = [{'role': 'user', 'content': content[0]['text']}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors='pt')
        prompt = chat_prompt(run.config, run.tokenizer, messages)
    inputs.pop('token_type_ids', None)
    assert inputs['input_ids'][0].tolist() == prompt.ids.tolist()
    # Random weights stop nowhere in particular: stopping is left to another test, so that all 64 tokens count.
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=64, min_new_tokens=64, do_sample=False)[0, len(prompt.ids) :]
    pictures = np.stack(prompt.images) if prompt.images else None
    assert ids.tolist() == micro.greedy(run.graphdef, run.params, prompt.ids, pictures, 64, run.tokenizer.special)
    assert len(set(ids.tolist())) > 8


@pytest.mark.parametrize('kind', ['gpt', 'llama', 'qwen2', 'qwen3, siglip'])
def test_a_batch_answers_as_its_prompts_do_alone(kind, runs, tmp_path, capsys):
    """Through plain transformers, from a run whose tokenizer folder is as older code wrote it."""
    torch = pytest.importorskip('torch')
    run, folder = tmp_path / 'run', tmp_path / 'out'
    shutil.copytree(runs(kind), run)
    file = run / 'tokenizer' / 'tokenizer_config.json'
    assert json.loads(file.read_text())['padding_side'] == 'left'
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != 'padding_side'}))
    micro.restamp(run)
    say(['--to=hf', f'--run={run}', f'--output={folder}'], capsys)
    vision = KINDS[kind][0].startswith('vision')
    auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    kind_of = transformers.AutoProcessor if vision else transformers.AutoTokenizer
    model, reader = auto.from_pretrained(folder), kind_of.from_pretrained(folder)
    asked = ['a cat', 'the dog sees a red house under the tree , the bird sees 42 ?']
    content = [[{'type': 'image'}, {'type': 'text', 'text': text}] if vision else text for text in asked]
    said = [
        reader.apply_chat_template([{'role': 'user', 'content': c}], add_generation_prompt=True, tokenize=False)
        for c in content
    ]

    def answers(chosen):
        shown = {'images': [picture(i) for i in chosen]} if vision else {}
        inputs = reader(
            text=[said[i] for i in chosen], padding=True, add_special_tokens=False, return_tensors='pt', **shown
        )
        inputs.pop('token_type_ids', None)
        options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
        with torch.no_grad():
            return model.generate(**inputs, **options)[:, inputs['input_ids'].shape[1] :].tolist()

    alone = [answers([0])[0], answers([1])[0]]
    assert answers([0, 1]) == alone and alone[0] != alone[1]


@pytest.mark.parametrize('kind', KINDS)
def test_there_and_back_is_bit_equal(kind, runs, tmp_path, capsys):
    folder, back = tmp_path / 'out', tmp_path / 'back' / 'run'
    say(['--to=hf', f'--run={runs(kind)}', f'--output={folder}'], capsys)
    assert 'a ' + KINDS[kind][0] in say(['--from=hf', f'--input={folder}', f'--output={back}'], capsys)
    before, after = nanovision_jax.load(runs(kind)), nanovision_jax.load(back)
    micro.assert_same(jax.device_get(after.params), jax.device_get(before.params))
    assert (after.step, after.config.model, after.config.stage) == (7, before.config.model, before.config.stage)
    for name in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'):
        assert (back / 'tokenizer' / name).read_bytes() == (before.tokenizer.folder / name).read_bytes()
    assert runfolder.read_lineage(back)['parents'][0]['run'] == str(folder)


@pytest.mark.parametrize('name', ['model.safetensors', 'tokenizer.json'])
def test_an_export_with_a_flipped_bit_is_not_read_back(name, runs, tmp_path, capsys):
    folder = tmp_path / 'out'
    say(['--to=hf', f'--run={runs("qwen2")}', f'--output={folder}'], capsys)
    data = bytearray((folder / name).read_bytes())
    data[-100] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=rf'{folder}/{name} is not what was written: it is damaged, or was changed'):
        convert.main(['--from=hf', f'--input={folder}', f'--output={tmp_path}/back'])
    assert not (tmp_path / 'back').exists()


def test_another_s_model_comes_in_without_our_file(runs, tmp_path, capsys):
    folder, back = tmp_path / 'out', tmp_path / 'runs' / 'sft'
    say(['--to=hf', f'--run={runs("qwen2")}', f'--output={folder}'], capsys)
    (folder / 'nanovision_jax.json').unlink()
    say(['--from=hf', f'--input={folder}', f'--output={back}'], capsys)
    before, after = nanovision_jax.load(runs('qwen2')), nanovision_jax.load(back)
    micro.assert_same(jax.device_get(after.params), jax.device_get(before.params))
    np.testing.assert_array_equal(after.logits([[5, 6, 7]]), before.logits([[5, 6, 7]]))
    # What is not known of it is said to be not known.
    assert after.config.data.source == 'unknown'
    assert runfolder.read_lineage(back)['data']['source'] == 'unknown'
    say(['--to=hf', f'--run={back}', f'--output={tmp_path}/again'], capsys)
    card = (tmp_path / 'again' / 'README.md').read_text()
    assert '| sft, from out | not known | not known to this card: see where the data come from | not known |' in card
    assert 'tiny_world' not in card
    page = report.write(back.parent).with_suffix('.md').read_text()
    assert f'python -m nanovision_jax.convert --from=hf --input={folder} --output={back}' in page
    with pytest.raises(UserError, match=r'data.source is unknown: say what to learn from'):
        config_checks.check(after.config)


def test_nothing_local_is_exported(runs, tmp_path, capsys):
    """Of paths of data and runs only the last part goes out."""
    run = tmp_path / 'home-of-somebody' / 'runs' / 'sft'
    shutil.copytree(runs('gpt'), run)
    cfg = runconfig.read(run)
    cfg.data.source, cfg.data.path = 'conversations', str(tmp_path / 'home-of-somebody' / 'mine.json')
    cfg.init_from = str(tmp_path / 'home-of-somebody' / 'other')
    runconfig.save(cfg)
    micro.restamp(run)
    say(['--to=hf', f'--run={run}', f'--output={tmp_path}/out'], capsys)
    for file in (tmp_path / 'out').iterdir():
        assert b'home-of-somebody' not in file.read_bytes(), file
    kept = json.loads((tmp_path / 'out' / 'nanovision_jax.json').read_text())['config']
    assert (kept['data']['path'], kept['init_from'], kept['run_dir']) == ('mine.json', 'other', 'sft')


def test_a_published_template_goes_out_and_comes_back(tokenizer_folder, tmp_path, capsys):
    """A ChatML decoder becomes a run with its own turns; so it goes out, and comes back with and without our file."""
    import_tokenizer(str(foreign.make('smollm2', tmp_path / 'theirs', tokenizer_folder)), tmp_path / 'ours')
    cfg, tokenizer = config_of('llama', tmp_path / 'runs' / 'sft'), Tokenizer(tmp_path / 'ours')
    write(cfg, tokenizer)
    run = nanovision_jax.load(cfg.run_dir)
    assert run.tokenizer.template == tokenizer.template and run.tokenizer.template.default_system
    assert json.loads((tmp_path / 'runs/sft/lineage.json').read_text())['template'] == tokenizer.template.digest
    out = tmp_path / 'out'
    say(['--to=hf', f'--run={cfg.run_dir}', f'--output={out}'], capsys)
    settings = json.loads((out / 'generation_config.json').read_text())
    assert settings['eos_token_id'] == list(tokenizer.stops) and settings['eos_token_id'][0] == tokenizer.end
    asked = [{'role': 'user', 'content': 'the cat?'}]
    prompt = chat_prompt(run.config, run.tokenizer, asked).ids.tolist()
    fast = transformers.AutoTokenizer.from_pretrained(out)
    assert fast.apply_chat_template(asked, add_generation_prompt=True, return_dict=False) == prompt
    assert (fast.eos_token, fast.pad_token) == ('<|im_end|>', '<|endoftext|>')
    for number, mine in enumerate(('nanovision_jax.json', None)):
        if not mine:
            (out / 'nanovision_jax.json').unlink()
        say(['--from=hf', f'--input={out}', f'--output={tmp_path / f"back{number}" / "sft"}'], capsys)
        back = nanovision_jax.load(tmp_path / f'back{number}' / 'sft')
        assert back.tokenizer.template == tokenizer.template
        assert chat_prompt(back.config, back.tokenizer, asked).ids.tolist() == prompt


def test_the_jinja_that_goes_out_is_written_from_the_data(runs, tmp_path, capsys):
    """Also where a run's tokenizer folder holds another one: of older code, or of somebody else."""
    run = tmp_path / 'run'
    shutil.copytree(runs('gpt'), run)
    (run / 'tokenizer' / 'chat_template.jinja').write_text('{{ messages[0].content }}')
    micro.restamp(run)
    say(['--to=hf', f'--run={run}', f'--output={tmp_path / "out"}'], capsys)
    assert '{%- generation -%}' in (tmp_path / 'out' / 'chat_template.jinja').read_text()
    (tmp_path / 'out' / 'chat_template.jinja').write_text('{{ messages[0].content }}')
    say(['--from=hf', f'--input={tmp_path / "out"}', f'--output={tmp_path / "back" / "sft"}'], capsys)
    assert '{%- generation -%}' in (tmp_path / 'back/sft/tokenizer/chat_template.jinja').read_text()


def test_bfloat16_halves_the_file(runs, tmp_path, capsys):
    sizes = {}
    for dtype in ('float32', 'bfloat16'):
        folder = tmp_path / dtype
        say(['--to=hf', f'--run={runs("gpt")}', f'--output={folder}', f'--dtype={dtype}'], capsys)
        sizes[dtype] = (folder / 'model.safetensors').stat().st_size
        assert json.loads((folder / 'config.json').read_text())['dtype'] == dtype
    assert 1.8 < sizes['float32'] / sizes['bfloat16'] < 2.0  # names and shapes take room too


def test_a_run_without_an_optimizer_starts_others_and_is_not_gone_on_with(runs, tmp_path, capsys):
    folder, back = tmp_path / 'out', tmp_path / 'back' / 'sft'
    say(['--to=hf', f'--run={runs("gpt")}', f'--output={folder}'], capsys)
    say(['--from=hf', f'--input={folder}', f'--output={back}'], capsys)
    cfg = runconfig.read(back)
    cfg.run_dir, cfg.init_from = str(tmp_path / 'next' / 'sft'), str(back)
    (source,) = start.find(cfg)
    source.prove()
    assert source.step == 7
    with pytest.raises(UserError, match='has no optimizer at step 7'):
        checkpoint.restore(back, 7, 'optimizer', {})


def test_the_card_tells_data_recipe_and_results(runs, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(runs('gpt, clip'), run)
    (run / 'eval').mkdir()
    kinds = {'colour': {'n': 3, 'accuracy': 2 / 3, 'chance': 0.125}}
    result = {'task': 'vqa', 'n': 3, 'accuracy': 2 / 3, 'interval': [0.1, 0.9], 'by_kind': kinds}
    (run / 'eval' / 'vqa.json').write_text(json.dumps(result | {'controls': {'blank': 0.0, 'shuffled': 1 / 3}}))
    say(['--to=hf', f'--run={run}', f'--output={tmp_path / "out"}'], capsys)
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert 'pipeline_tag: image-text-to-text' in card
    assert '| vision_instruct | tiny_world | generated by nanovision_jax (MIT) | unfinished | 8 | 64 | 0.01 |' in card
    assert '66.7% of 3 questions (95% interval 10.0% to 90.0%)' in card and '| colour | 66.7% | 12.5% | 3 |' in card


# What does not fit ---------------------------------------------------------------------------------------------------


def test_wrong_commands_get_one_sentence(runs, tmp_path, tokenizer):
    there, clip = tmp_path / 'there', micro.config('clip', tmp_path / 'clip')
    there.mkdir()
    write(clip, tokenizer)
    gpt, out = runs('gpt'), tmp_path / 'out'
    mistakes = {
        (f'--output={out}',): 'say either',
        ('--to=hf', '--from=hf', f'--output={out}'): 'say either',
        ('--to=hf', f'--output={out}'): 'needs --run',
        ('--from=hf', f'--output={out}'): 'needs --input',
        ('--to=hf', f'--run={gpt}'): '--output',
        ('--to=hf', f'--run={gpt}', f'--output={there}'): 'exists',
        ('--from=hf', f'--input={there}', f'--output={there}'): 'exists',
        ('--to=hf', f'--run={gpt}', f'--output={out}', '--input=x'): '--input does not go with --to=hf',
        ('--from=hf', f'--input={there}', f'--output={out}', '--push=a/b'): '--push does not go with --from=hf',
        ('--to=gguf', f'--run={gpt}', f'--output={out}', '--push=a/b'): '--push does not go with --to=gguf',
        ('--to=onnx', f'--run={gpt}', f'--output={out}'): 'invalid choice',
        ('--to=hf', f'--run={tmp_path / "clip"}', f'--output={out}'): 'is a clip run',
        ('--to=hf', f'--run={there}', f'--output={out}'): 'no run folder',
        ('--from=hf', f'--input={there}', f'--output={out}'): 'config.json is missing',
        ('--from=nanogptvision', f'--input={tmp_path / "x.pt"}', f'--output={out}'): 'there is no',
    }
    for argv, why in mistakes.items():
        with pytest.raises(UserError, match=why):
            convert.main(list(argv))
        assert not out.exists(), argv


def test_what_our_models_cannot_represent_is_refused_by_name(runs, tmp_path, capsys):
    good = {}
    for kind in ('gpt', 'gpt, clip', 'gpt, clip, padded'):
        good[kind] = tmp_path / kind
        say(['--to=hf', f'--run={runs(kind)}', f'--output={good[kind]}'], capsys)

    def refused(kind, why, config=None, change=None):
        folder, out = tmp_path / 'damaged', tmp_path / 'refused' / 'run'
        shutil.copytree(good[kind], folder)
        if config:
            file = folder / 'config.json'
            file.write_text(json.dumps(json.loads(file.read_text()) | config))
        if change:
            weights = load_file(folder / 'model.safetensors')
            change(weights)
            save_file(weights, folder / 'model.safetensors')
            ours = json.loads((folder / 'nanovision_jax.json').read_text())
            (folder / 'nanovision_jax.json').write_text(json.dumps(ours | {'sha256': {}}))
        with pytest.raises(UserError, match=why):
            conversions.from_folder(folder, out)
        assert not out.exists()
        shutil.rmtree(folder)

    def set_to_one(name):
        return lambda weights: weights[name].__setitem__(..., 1)

    layer = 'gpt_neox.layers.1.'
    refused('gpt', 'parallel residual', {'use_parallel_residual': True})
    refused('gpt', 'rotary positions on 0.25', {'rotary_pct': 0.25})
    refused('gpt', "hidden_act 'gelu'", {'hidden_act': 'gelu'})
    refused('gpt', "'bert' model", {'model_type': 'bert'})
    bare = {'model_type': 'gpt_neox', 'hidden_act': 'relu', 'use_parallel_residual': False}
    refused('gpt, clip', "config.json lacks 'num_hidden_layers'", {'text_config': bare})
    file = good['gpt'] / 'nanovision_jax.json'
    whole = file.read_text()
    file.write_text('{}')
    refused('gpt', "nanovision_jax.json lacks 'config'")
    file.write_text(whole)
    refused('gpt', 'layers is 3 in config.json, and 2 in', {'num_hidden_layers': 3})
    refused('gpt', 'layers.1.mlp.dense_h_to_4h.bias is not zero', change=set_to_one(layer + 'mlp.dense_h_to_4h.bias'))
    name = layer + 'attention.query_key_value.bias'
    refused('gpt', 'query_key_value.bias is not zero', change=set_to_one(name))
    refused('gpt', 'embed_out.weight is missing', change=lambda weights: weights.pop('embed_out.weight'))
    refused('gpt', 'extra.weight is unknown', change=lambda weights: weights.update(extra=0, **{
        'extra.weight': weights['embed_out.weight']}) or weights.pop('extra'))  # fmt: skip
    refused('gpt, clip', 'vision_feature_layer -1', {'vision_feature_layer': -1})
    refused('gpt, clip', "strategy 'full'", {'vision_feature_select_strategy': 'full'})
    refused('gpt, clip', "projector_hidden_act 'relu'", {'projector_hidden_act': 'relu'})
    name = 'multi_modal_projector.linear_2.weight'
    refused('gpt, clip', 'linear_2.weight is missing', change=lambda weights: weights.pop(name))
    refused('gpt, clip, padded', 'linear_2 is not the identity', change=set_to_one(name))


# The template --------------------------------------------------------------------------------------------------------


def random_talk(rng, pictures=0):
    """A conversation of one to three turns, every second one hostile; pictures stand anywhere in the questions."""
    special = ['<|user|>', '<|end|>', '<|image|>', '<|endoftext|>', '<|assistant|>hi', '{{ x }}', '<image>', '\u200b']
    messages, turns = [], rng.randint(1, 3)
    for _ in range(turns):
        for role in ('user', 'assistant'):
            text = sentence(rng)
            if rng.random() < 0.5:
                text = rng.choice(special).join([text, sentence(rng, 0, 3)]) + rng.choice(['', ' ', '\n', *special])
            messages.append({'role': role, 'content': text})
    for _ in range(pictures):
        message = messages[2 * rng.randrange(turns)]
        if isinstance(message['content'], str):
            message['content'] = [{'type': 'text', 'text': message['content']}]
        message['content'].insert(rng.randint(0, len(message['content'])), {'type': 'image'})
    return messages


def test_the_tokenizer_s_template_gives_the_ids_of_training(runs, tmp_path, capsys):
    import random

    transformers = pytest.importorskip('transformers')
    folder, rng = tmp_path / 'out', random.Random(0)
    say(['--to=hf', f'--run={runs("gpt")}', f'--output={folder}'], capsys)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    for _ in range(200):
        messages = random_talk(rng)
        wanted, *_ = conversation.encode(messages, ours)
        found = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert found == wanted.tolist(), messages


def test_the_processor_s_template_gives_the_ids_of_training(runs, tmp_path, capsys):
    import random

    pytest.importorskip('torch')  # LLaVA's processor is only made where it is
    transformers = pytest.importorskip('transformers')
    folder, rng = tmp_path / 'out', random.Random(1)
    say(['--to=hf', f'--run={runs("gpt, clip")}', f'--output={folder}'], capsys)
    processor, run = transformers.AutoProcessor.from_pretrained(folder), nanovision_jax.load(runs('gpt, clip'))
    for n in range(50):
        pictures = [picture(n + i) for i in range(rng.randint(1, 3))]
        messages = random_talk(rng, len(pictures))
        patches = run.config.model.vision.patches
        wanted, *_ = conversation.encode(messages, run.tokenizer, [patches] * len(pictures))
        text = processor.apply_chat_template(messages)
        found = processor(images=pictures, text=text, add_special_tokens=False, return_tensors='pt')
        assert found['input_ids'][0].tolist() == wanted.tolist(), messages


# The hub -------------------------------------------------------------------------------------------------------------


def test_push_uploads_the_folder_and_a_refusal_keeps_it(runs, tmp_path, capsys, monkeypatch):
    import huggingface_hub

    calls = []

    class Hub:
        def create_repo(self, name, repo_type, exist_ok):
            if name == 'nobody/none':
                raise OSError('no way there')
            calls.append((name, exist_ok))

        def upload_folder(self, repo_id, repo_type, folder_path, commit_message):
            calls.append((repo_id, folder_path))
            return 'where it is'

    monkeypatch.setattr(huggingface_hub, 'HfApi', Hub)
    out = tmp_path / 'out'
    said = say(['--to=hf', f'--run={runs("gpt")}', f'--output={out}', '--push=me/mine'], capsys)
    assert 'uploaded: where it is' in said and calls == [('me/mine', True), ('me/mine', out)]
    assert not (out / 'report.html').exists()  # there is none
    with pytest.raises(UserError, match=r"not uploaded as 'nobody/none' \(OSError: no way there\).*is complete"):
        convert.main(['--to=hf', f'--run={runs("gpt")}', f'--output={tmp_path / "two"}', '--push=nobody/none'])
    assert (tmp_path / 'two' / 'model.safetensors').is_file()
    run = tmp_path / 'home-of-somebody' / 'sft'
    shutil.copytree(runs('gpt'), run)
    assert 'home-of-somebody' in report.write(run.parent).read_text()
    say(['--to=hf', f'--run={run}', f'--output={tmp_path / "three"}', '--push=me/mine'], capsys)
    page = (tmp_path / 'three' / 'report.html').read_text()
    assert '<h2>Training</h2>' in page and str(tmp_path) not in page


def test_a_space_is_uploaded_as_one(monkeypatch, tmp_path):
    import huggingface_hub

    calls = []

    class Hub:
        def create_repo(self, name, **given):
            calls.append((name, given))

        def upload_folder(self, repo_id, repo_type, folder_path, commit_message):
            calls.append((repo_id, repo_type, folder_path))

    monkeypatch.setattr(huggingface_hub, 'HfApi', Hub)
    conversions.upload(tmp_path, 'me/page', 'space')
    space = {'repo_type': 'space', 'exist_ok': True, 'space_sdk': 'gradio'}
    assert calls == [('me/page', space), ('me/page', 'space', tmp_path)]

    def refused(*_, **__):
        raise OSError('no key')

    monkeypatch.setattr(Hub, 'create_repo', refused)
    for kept, said in {True: rf'^{tmp_path} was not uploaded .*the folder is complete', False: '^nothing was'}.items():
        with pytest.raises(UserError, match=said):
            conversions.upload(tmp_path, 'me/page', 'space', kept=kept)


def test_the_card_tells_scores_with_intervals_and_controls(runs, tmp_path, capsys):
    run = tmp_path / 'runs' / 'vision_instruct'
    shutil.copytree(runs('gpt, clip'), run)

    def of(x):
        return {'accuracy': x}

    groups, controls = {'adversarial': {'n': 20} | of(0.5)}, {'blank': of(0.5), 'shuffled': of(0.475)}
    scores = base.Scores('pope', 40, 'accuracy', of(0.75), [0.65, 0.85], groups, controls, {'chance': 0.25}, asked=41)
    scores.left_out = {'unreadable': 1}
    base.write_result(scores, [], run / 'eval', 'validation')
    say(['--to=hf', f'--run={run}', f'--output={tmp_path / "out"}'], capsys)
    card = (tmp_path / 'out' / 'README.md').read_text()
    for told in (
        '75.0% accuracy of 40 questions (95% interval 65.0% to 85.0%)',
        '| accuracy | 75.0% | 50.0% | 47.5% |',
        '| accuracy, chance | 25.0% |',
        '| accuracy, adversarial (20) | 50.0% |',
        'asked 41, answered 40, left out 1 (1 × unreadable)',
        'The model looks at its pictures: with blank ones it loses 25.0 points.',
    ):
        assert told in card, told


def test_engines_that_would_answer_wrongly_are_named():
    """By flavour and projector: who takes it, and who must not."""

    def told(stage, flavour, projector='mlp', split='gpt-2', bias=False):
        cfg = micro.config(stage)
        cfg.model.flavour, cfg.model.projector, cfg.model.qkv_bias = flavour, projector, bias
        return '\n'.join(engines.told(cfg, split))

    for stage in ('sft', 'vision_instruct'):
        assert 'llama.cpp: NO' in told(stage, 'gpt') and 'train the size l20' in told(stage, 'gpt')
        assert 'vLLM: by its source' in told(stage, 'llama') and 'NO' not in told(stage, 'llama')
        assert 'by convert --to=gguf' in told(stage, 'llama')
    own = 'reads its tokenizer as Qwen2'
    assert own in told('sft', 'llama', bias=True) and own not in told('sft', 'llama', split='qwen2', bias=True)
    assert own not in told('vision_instruct', 'llama', bias=True) and own not in told('sft', 'llama')
    assert 'no linear projector' in told('vision_instruct', 'llama', 'linear')
    assert 'vLLM: no' in told('vision_instruct', 'gpt') and 'SGLang' not in told('sft', 'llama')


@pytest.mark.slow
def test_a_road_of_llamas_kind_ends_in_what_plain_transformers_opens(tiny_family, tmp_path, capsys):
    torch = pytest.importorskip('torch')
    family = tmp_path / 'ltiny'
    family.mkdir()
    (family / 'data').symlink_to(tiny_family / 'data')
    for stage in micro.STAGES:
        small = [f'run_dir={family / stage}', 'steps=3', 'data.batch_size=4', 'eval.batches=1', 'eval.every=3']
        loop.train(parse(stage, *small, size='ltiny'))
    for stage in ('sft', 'vision_instruct'):
        folder, run = tmp_path / stage, nanovision_jax.load(family / stage)
        said = say(['--to=hf', f'--run={family / stage}', f'--output={folder}'], capsys)
        assert run.config.model.flavour == 'llama' and 'vLLM: by its source' in said
        auto = (
            transformers.AutoModelForImageTextToText if run.config.stage != 'sft' else transformers.AutoModelForCausalLM
        )
        model = auto.from_pretrained(folder)
        assert type(model).__name__ == {'sft': 'LlamaForCausalLM'}.get(stage, 'LlavaForConditionalGeneration')
        ids = [[0, 5, 6, 7, 8]]
        with torch.no_grad():
            theirs = model(torch.tensor(ids)).logits.numpy()
        ours = np.asarray(run.logits(ids))[..., : theirs.shape[-1]]
        shown = np.isfinite(ours)
        np.testing.assert_allclose(theirs[shown], ours[shown], atol=1e-3)
