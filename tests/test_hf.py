"""Hugging Face weights: the same numbers as transformers with torch, and one clear error for what does not fit."""

import json
import shutil

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from conftest import parse
from PIL import Image
from safetensors.numpy import load_file, save_file

import nanovision_jax
from nanovision_jax import config as configs
from nanovision_jax import hf, models
from nanovision_jax.errors import UserError
from nanovision_jax.hf import configs as hf_configs
from nanovision_jax.hf import decoders, towers
from nanovision_jax.hf.weights import without_prefixes
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.training import loop as train

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((24, 24), (30, 41), (50, 26))]


def save(model, folder, preprocessor):
    model.save_pretrained(folder)
    (folder / 'preprocessor_config.json').write_text(json.dumps(preprocessor))


def clip_preprocessor(size):
    return {
        'crop_size': size, 'do_center_crop': True, 'do_normalize': True, 'do_resize': True, 'size': size, 'resample': 3,
        'feature_extractor_type': 'CLIPFeatureExtractor', 'image_mean': MEAN, 'image_std': STD,
    }  # fmt: skip


def siglip_preprocessor(size):
    return {
        'do_rescale': True, 'do_resize': True, 'image_processor_type': 'SiglipImageProcessor', 'resample': 3,
        'image_mean': [0.5] * 3, 'image_std': [0.5] * 3, 'rescale_factor': 1 / 255,
        'size': {'height': size, 'width': size},
    }  # fmt: skip


def make(kind, folder, **changes):
    """A random model of a family in the published layout, from transformers with torch."""
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    torch.manual_seed(0)
    vision = SMALL | dict(image_size=24, patch_size=8) | changes
    text = SMALL | dict(vocab_size=64, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    if kind == 'clip':
        model = transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
        )
    elif kind == 'clip_vision':
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision))
    elif kind == 'siglip':
        model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text))
    else:
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision))
    with torch.no_grad():  # norms and biases start at 1 and 0, which would hide a swap
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    size = vision['image_size']
    save(model, folder, clip_preprocessor(size) if kind.startswith('clip') else siglip_preprocessor(size))
    return getattr(model, 'vision_model', model).eval()


def theirs(model, pixels, layer):
    import torch

    with torch.no_grad():
        states = model(torch.tensor(pixels).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
    return states[layer].numpy()


@pytest.mark.parametrize('kind', ['clip', 'clip_vision', 'siglip', 'siglip_vision'])
def test_a_tower_gives_the_features_of_its_home(kind, tmp_path):
    model = make(kind, tmp_path)
    first = int(kind.startswith('clip'))  # the class token
    for layer in (-2, -1, 1):
        tower, preprocess = hf.load_vision_tower(tmp_path, layer=layer)
        pixels = preprocess(pictures())
        assert pixels.shape == (3, 24, 24, 3) and pixels.dtype == np.float32
        features = np.asarray(tower(pixels))
        assert features.shape == (3, 9, 32)
        np.testing.assert_allclose(features, theirs(model, pixels, layer)[:, first:], atol=1e-4)


def test_a_tower_s_parameters_go_to_the_device_once(tmp_path):
    make('siglip_vision', tmp_path)
    tower, preprocess = hf.load_vision_tower(tmp_path)
    pixels = jax.device_put(preprocess(pictures()))
    with jax.transfer_guard_host_to_device('disallow'):
        tower(pixels)


@pytest.mark.slow
def test_a_whole_size_tower_gives_the_features_of_its_home(tmp_path):
    whole = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    model = make('clip_vision', tmp_path, **whole, image_size=224, patch_size=32)
    tower, preprocess = hf.load_vision_tower(tmp_path)
    pixels = preprocess(pictures()[1:2])
    np.testing.assert_allclose(np.asarray(tower(pixels)), theirs(model, pixels, -2)[:, 1:], atol=1e-4)


@pytest.mark.parametrize(('kind', 'name'), [('clip', 'CLIPImageProcessorPil'), ('siglip', 'SiglipImageProcessorPil')])
def test_preprocessing_is_that_of_its_home(kind, name, tmp_path):
    transformers = pytest.importorskip('transformers')
    make(kind, tmp_path)
    processor = getattr(transformers, name).from_pretrained(tmp_path)
    wanted = np.stack(processor(pictures(), return_tensors='np')['pixel_values']).transpose(0, 2, 3, 1)
    _, preprocess = hf.load_vision_tower(tmp_path)
    np.testing.assert_allclose(preprocess(pictures()), wanted, atol=1e-6)


def rewrite(folder, change):
    weights = load_file(folder / 'model.safetensors')
    change(weights)
    save_file(weights, folder / 'model.safetensors')


def test_all_that_does_not_fit_is_listed_together(tmp_path):
    make('clip', tmp_path)

    def change(weights):
        del weights['vision_model.pre_layrnorm.bias']
        weights['vision_model.encoder.layers.3.mlp.fc1.bias'] = np.zeros(48, np.float32)
        weights['vision_model.embeddings.class_embedding'] = np.zeros(31, np.float32)
        weights['vision_model.embeddings.position_ids'] = np.zeros((1, 10), np.int64)  # older files have it

    rewrite(tmp_path, change)
    with pytest.raises(UserError) as error:
        hf.load_vision_tower(tmp_path)
    message = str(error.value)
    assert 'pre_layrnorm.bias is missing' in message and 'layers.3.mlp.fc1.bias is unknown' in message
    assert 'class_embedding is [31] and not [32]' in message and message.count(';') == 2


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'base_model.model.', '_orig_mod.module.'])
def test_what_wrappers_put_before_every_name_is_no_part_of_it(prefix, tmp_path):
    make('siglip_vision', tmp_path)
    tower, preprocess = hf.load_vision_tower(tmp_path)
    pixels = preprocess(pictures())
    wanted, weights = np.asarray(tower(pixels)), load_file(tmp_path / 'model.safetensors')
    save_file({prefix + name: value for name, value in weights.items()}, tmp_path / 'model.safetensors')
    tower, _ = hf.load_vision_tower(tmp_path)
    np.testing.assert_array_equal(np.asarray(tower(pixels)), wanted)
    first = min(weights)  # before all names, or it is a name
    partly = {prefix * (name != first) + name: value for name, value in weights.items()}
    assert without_prefixes(partly).keys() == partly.keys() and without_prefixes({}) == {}


def test_ten_complaints_are_listed_and_the_others_counted(tmp_path):
    make('siglip_vision', tmp_path)
    rewrite(tmp_path, lambda weights: [weights.pop(name) for name in sorted(weights)[:14]])
    with pytest.raises(UserError) as error:
        hf.load_vision_tower(tmp_path)
    assert str(error.value).count(' is missing') == 10 and str(error.value).endswith('; and 4 more.')


def test_shards_with_an_index_are_read_and_names_are_never_paths(tmp_path):
    make('siglip_vision', tmp_path)
    tower, preprocess = hf.load_vision_tower(tmp_path)
    pixels = preprocess(pictures())
    wanted = np.asarray(tower(pixels))
    weights = load_file(tmp_path / 'model.safetensors')
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in part}, tmp_path / f'part-{number}.safetensors')
    index = {'weight_map': {name: f'part-{i % 2}.safetensors' for i, name in enumerate(names)}}
    (tmp_path / 'model.safetensors').unlink()
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
    tower, _ = hf.load_vision_tower(tmp_path)
    np.testing.assert_array_equal(np.asarray(tower(pixels)), wanted)
    index['weight_map'][names[0]] = '../part-0.safetensors'
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match='outside its folder'):
        hf.load_vision_tower(tmp_path)


def test_what_is_no_tower_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match='is no folder'):
        hf.load_vision_tower(tmp_path / 'none' / 'such' / 'folder')
    source = tmp_path / 'good'
    source.mkdir()
    make('clip', source)

    def damaged(name, **changes):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        for file, values in changes.items():
            path = folder / f'{file}.json'
            path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return folder

    with pytest.raises(UserError, match="'bert' model"):
        hf.load_vision_tower(damaged('family', config={'model_type': 'bert'}))
    with pytest.raises(UserError, match='must be equal'):
        hf.load_vision_tower(damaged('size', preprocessor_config={'crop_size': 48}))
    with pytest.raises(UserError, match='has size 32'):
        hf.load_vision_tower(damaged('resize', preprocessor_config={'size': 32}))
    with pytest.raises(UserError, match='neither crops'):
        hf.load_vision_tower(damaged('whole', preprocessor_config={'do_center_crop': False}))
    with pytest.raises(UserError, match='resample 1'):
        hf.load_vision_tower(damaged('resample', preprocessor_config={'resample': 1}))
    folder = damaged('torn')
    (folder / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[:-4])
    with pytest.raises(UserError, match='missing or damaged'):
        hf.load_vision_tower(folder)
    folder = damaged('pickle')
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    with pytest.raises(UserError, match='a pickle'):
        hf.load_vision_tower(folder)


# Decoders ------------------------------------------------------------------------------------------------------------

DECODERS = {
    'llama': ('Llama', dict(num_key_value_heads=2, rms_norm_eps=1e-5)),
    'smollm2': ('Llama', dict(num_key_value_heads=1, tie_word_embeddings=True, rope_theta=1e5)),
    'llama31': (
        'Llama',
        dict(
            num_key_value_heads=4, head_dim=12,
            rope_scaling={
                'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
                'original_max_position_embeddings': 32,
            },
        ),
    ),
    'qwen2': ('Qwen2', dict(num_key_value_heads=2, tie_word_embeddings=True)),
    'qwen3': ('Qwen3', dict(num_key_value_heads=2, head_dim=16)),
}  # fmt: skip
VOCAB = 100


def make_decoder(name, folder):
    """A random decoder of a family in the published layout, from transformers with torch."""
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    torch.manual_seed(0)
    family, fields = DECODERS[name]
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    config = getattr(transformers, f'{family}Config')(**sizes, max_position_embeddings=512, **fields)
    model = getattr(transformers, f'{family}ForCausalLM')(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def our_decoder(folder, vocab_size=VOCAB):
    """(graphdef, parameters) of the decoder that a folder holds."""
    cfg = configs.Config(stage='sft', model=configs.Model(**hf_configs.read_decoder_config(folder)))
    graphdef, shapes = models.abstract(cfg, vocab_size, vocab_size - 1)
    return graphdef, decoders.read_decoder(folder, shapes, vocab_size)


@pytest.mark.parametrize('name', DECODERS)
def test_a_decoder_gives_the_logits_of_its_home(name, tmp_path):
    model = make_decoder(name, tmp_path)
    import torch

    graphdef, params = our_decoder(tmp_path)
    tokens = jnp.array(np.random.default_rng(0).integers(0, VOCAB, (2, 40)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(40, dtype=jnp.int32), tokens.shape)
    with torch.no_grad():
        wanted = model(torch.tensor(np.array(tokens))).logits.numpy()
    ours = models.merge(graphdef, params)
    found = np.asarray(ours(tokens, positions, jnp.ones_like(positions)))
    np.testing.assert_allclose(found[..., :VOCAB], wanted, atol=1e-4)
    # and so does its cache
    ours = models.merge(*models.unstack(graphdef, params))
    x, cache = ours.extend(ours.embed(tokens[:, :36]), jnp.zeros(2, jnp.int32), ours.empty_cache(2, 40))
    parts = [ours.logits(x)]
    for column in range(36, 40):
        x, cache = ours.extend(ours.embed(tokens[:, column : column + 1]), jnp.full(2, column), cache)
        parts.append(ours.logits(x))
    np.testing.assert_allclose(np.concatenate(parts, 1)[..., :VOCAB], wanted, atol=1e-4)


def test_new_tokens_get_rows_and_padded_rows_are_zero(tmp_path):
    make_decoder('llama', tmp_path)
    theirs = load_file(tmp_path / 'model.safetensors')
    _, params = our_decoder(tmp_path, VOCAB + 4)
    table, head = params['embedding']['embedding'], params['head']['kernel'].T
    for ours, name in ((table, 'model.embed_tokens.weight'), (head, 'lm_head.weight')):
        np.testing.assert_array_equal(ours[:VOCAB], theirs[name])
        assert (ours[VOCAB + 4 :] == 0).all() and ours[VOCAB : VOCAB + 4].std(0).min() > 0


@pytest.mark.parametrize(
    ('changes', 'why'),
    [
        ({'model_type': 'gpt2'}, "'gpt2' model"),
        ({'rope_parameters': {'rope_type': 'default'}, 'rope_scaling': {'rope_type': 'yarn'}}, "rope type 'yarn'"),
        ({'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4}}, "rope type 'yarn'"),
        ({'hidden_act': 'gelu'}, "hidden_act 'gelu'"),
        ({'mlp_bias': True}, 'a bias in the feed-forward layer'),
        ({'attention_bias': True}, 'a bias on the attention output'),
    ],
)
def test_what_our_decoder_lacks_is_refused_by_name(changes, why, tmp_path):
    make_decoder('llama', tmp_path)
    file = tmp_path / 'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=why):
        hf_configs.read_decoder_config(tmp_path)


def test_a_field_that_published_weights_fix_is_refused(tmp_path):
    make_decoder('qwen2', tmp_path)
    with pytest.raises(UserError, match=r'model.width is 64 here and 32 in the published weights'):
        parse('sft', f'model.decoder={tmp_path}', 'model.width=64', 'data.length=256')
    assert parse('sft', f'model.decoder={tmp_path}', 'model.width=32', 'data.length=256').model.width == 32


# Down the road -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_published_decoder_and_tower_go_down_the_road(tiny_family, tokenizer_folder, tokenizer, tmp_path):
    decoder, tower, family = tmp_path / 'decoder', tmp_path / 'tower', tmp_path / 'runs'
    for folder in (decoder, tower, family):
        folder.mkdir()
    make_decoder('qwen2', decoder)
    make('siglip_vision', tower)
    shutil.copytree(tokenizer_folder, decoder, dirs_exist_ok=True)
    (family / 'data').symlink_to(tiny_family / 'data')
    foreign = {'model__decoder': str(decoder), 'model__tower': str(tower), 'steps': 2, 'data__length': 384}
    named = {'sft': ('model__decoder',), 'vision_pretrain': ('model__tower',), 'vision_instruct': ()}
    for stage in ('sft', 'vision_pretrain', 'vision_instruct'):
        left = {name: value for name, value in foreign.items() if not name.startswith('model') or name in named[stage]}
        cfg = micro.run_config(stage, family, **left)  # what an earlier stage named need not be named again
        assert (cfg.model.flavour, cfg.model.kv_heads, cfg.data.tokenizer) == ('llama', 2, foreign['model__decoder'])
        train.train(cfg)
        if stage == 'sft':  # a run is complete: the decoder may move
            decoder = decoder.rename(tmp_path / 'moved')
    trained = micro.read(family / 'vision_instruct')['params']
    shapes = models.abstract(cfg, tokenizer.size, tokenizer.image)[1]
    micro.assert_same(trained['vision'], towers.tower_weights(tower, shapes['vision']))  # frozen, to the last bit
    given = decoders.read_decoder(decoder, shapes['decoder'], tokenizer.size)
    assert np.abs(trained['decoder']['embedding']['embedding'] - given['embedding']['embedding']).max() > 0
    lineage = runfolder.read_lineage(family / 'vision_pretrain')
    assert [parent['run'] for parent in lineage['parents']] == [str(family / 'sft'), str(tower)]
    assert len({parent['manifest'] for parent in lineage['parents']}) == 2
    logits = np.asarray(nanovision_jax.load(family / 'vision_instruct').logits([[5, 6, 7]]))
    assert np.isfinite(logits[..., : tokenizer.size]).all() and np.ptp(logits[..., : tokenizer.size]) > 0
