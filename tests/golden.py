"""Writes tests/golden/*.npz: what transformers says of small random models, for machines without PyTorch.

    python tests/golden.py

A model's weights follow from a seed. They are written as convert writes them, opened by transformers, and the file
keeps its greedy tokens, its logits, a tower's features and a digest of the written tensors. test_golden.py compares.
"""

import hashlib
import json
import pathlib
import sys
import tempfile

import micro
import numpy as np

from nanovision_jax import config_checks
from nanovision_jax.hf import configs as hf_configs
from nanovision_jax.hf import decoders, llava
from nanovision_jax.hf.weights import write_weights

FOLDER = pathlib.Path(__file__).parent / 'golden'
PROMPT, NEW = 24, 64
LLAMA = dict(flavour='llama', kv_heads=2, head_dim=10, rope_theta=1e4)
# name: (stage, fields of model, fields of model.vision, the class that it is written as)
KINDS = {
    'gpt': ('sft', {}, {}, 'GPTNeoXForCausalLM'),
    'gpt, tied': ('pretrain', dict(tied=True), {}, 'GPTNeoXForCausalLM'),
    'llama': ('sft', LLAMA | dict(rope_scaling=(8.0, 1.0, 4.0, 32.0)), {}, 'LlamaForCausalLM'),
    'qwen2': ('sft', LLAMA | dict(qkv_bias=True, tied=True), {}, 'Qwen2ForCausalLM'),
    'qwen3': ('sft', LLAMA | dict(qk_norm=True), {}, 'Qwen3ForCausalLM'),
    'gpt, clip': ('vision_instruct', {}, {}, 'LlavaForConditionalGeneration'),
    'gpt, clip, padded': (
        'vision_pretrain',
        dict(projector='linear'),
        dict(fit='pad'),
        'LlavaForConditionalGeneration',
    ),
    'qwen3, siglip': (
        'vision_instruct',
        LLAMA | dict(qk_norm=True),
        dict(kind='siglip', fit='stretch', resample='bilinear', activation='gelu_tanh', epsilon=1e-6),
        'LlavaForConditionalGeneration',
    ),
}


def config_of(kind, run_dir='runs/none'):
    """The config of a run of a kind."""
    stage, model, vision, _ = KINDS[kind]
    cfg = micro.config(stage, run_dir)
    cfg.dtype, cfg.data.length = 'float32', 64
    for name, value in (model | {'positions': 256}).items():
        setattr(cfg.model, name, value)
    for name, value in vision.items():
        setattr(cfg.model.vision, name, value)
    config_checks.check(cfg)
    return cfg


def params_of(cfg, tokenizer):
    """(graphdef, float32 parameters) drawn from a seed; padded rows are zero, as training leaves them.

    Embeddings are large, so that a token follows from those before it: else a model says one
    word for ever.
    """
    graphdef, params = micro.params(cfg, tokenizer)
    text = params.get('decoder', params)
    if 'embedding' in text:
        text['embedding']['embedding'] *= 10 if 'head' in text else 1
        text['blocks']['ffn_out']['kernel'] *= 1 if 'head' in text else 10  # tied: else a token is followed by itself
        text['embedding']['embedding'][tokenizer.size :] = 0
    if 'head' in text:
        text['head']['kernel'][:, tokenizer.size :] = 0
    return graphdef, params


def model_of(kind):
    """(config, graphdef, parameters, {their name: array}, config.json) of a kind."""
    cfg, tokenizer = config_of(kind), micro.TOKENIZER
    graphdef, params = params_of(cfg, tokenizer)
    if cfg.stage.startswith('vision'):
        tensors = llava.llava_to_hf(params, cfg.model, tokenizer.size)
        return cfg, graphdef, params, tensors, llava.llava_json(cfg.model, tokenizer.size, tokenizer.image)
    content = hf_configs.decoder_json(cfg.model, tokenizer.size)
    architecture = decoders.ARCHITECTURES[content['model_type']]
    return cfg, graphdef, params, decoders.decoder_to_hf(params, architecture, tokenizer.size), content


def inputs_of(cfg):
    """(ids [1, PROMPT] with a picture's image tokens in a vision stage, the picture uint8 [size, size, 3] or None)."""
    rng, tokenizer = np.random.default_rng(1), micro.TOKENIZER
    ids, picture = rng.integers(0, tokenizer.size - 1, (1, PROMPT)), None
    if cfg.stage.startswith('vision'):
        size = cfg.model.vision.image_size
        ids[0, 2 : 2 + cfg.model.vision.patches] = tokenizer.image
        picture = rng.integers(0, 256, (size, size, 3), np.uint8)
    return ids, picture


def digest(tensors):
    """The sha256 over names and bytes of tensors, in hex."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode() + np.ascontiguousarray(tensors[name], np.float32).tobytes())
    return whole.hexdigest()


def main():
    """Writes every file anew."""
    import torch
    import transformers

    FOLDER.mkdir(exist_ok=True)
    for kind in KINDS:
        cfg, _, _, tensors, content = model_of(kind)
        ids, picture = inputs_of(cfg)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            pathlib.Path(folder, 'config.json').write_text(json.dumps(content))
            write_weights(tensors, pathlib.Path(folder))
            model = getattr(transformers, KINDS[kind][3]).from_pretrained(folder).eval()
            inputs, found = {'input_ids': torch.tensor(ids)}, {'digest': digest(tensors)}
            if picture is not None:
                vision = cfg.model.vision
                pixels = (picture[None] / np.float32(255) - np.float32(vision.mean)) / np.float32(vision.std)
                inputs['pixel_values'] = torch.tensor(pixels).permute(0, 3, 1, 2)
                states = model.model.vision_tower(inputs['pixel_values'], output_hidden_states=True).hidden_states
                found['features'] = states[-2][:, vision.class_tokens :].numpy()
            found['logits'] = model(**inputs).logits.numpy()
            # The image token and end of text, which other models stop at, are forbidden: all 64 tokens count.
            bad = [[micro.TOKENIZER.image]]
            config = transformers.GenerationConfig(
                max_new_tokens=NEW, eos_token_id=None, pad_token_id=0, bad_words_ids=bad
            )
            found['tokens'] = model.generate(**inputs, generation_config=config)[0, PROMPT:].numpy()
        np.savez_compressed(FOLDER / f'{kind.replace(", ", "-")}.npz', **found)
        print(kind, found['tokens'][:8])


if __name__ == '__main__':
    sys.exit(main())
