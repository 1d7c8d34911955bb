"""A run as one GGUF file, for llama.cpp and what is built on it: settings, tokenizer, chat template and weights.

llama.cpp computes an architecture by its name, and splits text by a name too. What a name does not mean to the last
token is refused: it would answer wrongly without an error. tests/test_llama_cpp.py asks llama.cpp itself.
"""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np

from nanovision_jax.data.templates import Template
from nanovision_jax.data.tokenizer import Tokenizer
from nanovision_jax.errors import UserError
from nanovision_jax.hf import configs, decoders
from nanovision_jax.models.decoder import rotary_frequencies
from nanovision_jax.runs.folder import read_json, whole
from nanovision_jax.stages import stage_of

# Ours: GGML's name of a number, and of a file that holds mostly such.
DTYPES = {'float32': ('F32', 'ALL_F32'), 'float16': ('F16', 'MOSTLY_F16'), 'bfloat16': ('BF16', 'MOSTLY_BF16')}

# How a tokenizer.json splits text, and a conversation is written ------------------------------------------------------

_GPT2 = {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': True}
_BYTES = _GPT2 | {'use_regex': False}


def _words(digits):
    """Splits off words with what stands before them, so many digits at once, and line ends with what they end."""
    contractions, signs = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
    pattern = rf'{contractions}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{signs}'
    return {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}


# llama.cpp's name: (the steps, whether a word that is a token is left whole). Ours are split as GPT-2's are.
SPLITS = {
    'gpt-2': ([_GPT2], False),
    'smollm': ([{'type': 'Digits', 'individual_digits': True}, _GPT2], False),
    'qwen2': ([_words(r'\p{N}'), _BYTES], False),
    'llama-bpe': ([_words(r'\p{N}{1,3}'), _BYTES], True),
}


def split_name(content: dict) -> str | None:
    """llama.cpp's name for how a tokenizer (what its tokenizer.json holds) makes tokens of text; None: it has none."""
    model, pre = content['model'], content['pre_tokenizer'] or {}
    steps = [{'use_regex': True} | step for step in pre.get('pretokenizers', [pre])]  # so in files of older versions
    for step in steps:
        step.pop('trim_offsets', None)  # tells of places, not of tokens
        if step.get('type') != 'ByteLevel':
            del step['use_regex']
    strange = [model.get(name) for name in ('continuing_subword_prefix', 'end_of_word_suffix', 'byte_fallback')]
    strange += [token[name] for token in content['added_tokens'] for name in ('lstrip', 'rstrip', 'single_word')]
    if any(strange) or (content.get('normalizer') or {'type': 'NFC'}) != {'type': 'NFC'}:  # NFC is left to who asks
        return None
    found = steps, bool(model.get('ignore_merges'))
    return next((name for name, split in SPLITS.items() if split == found), None)


def chat_template(template: Template, controls) -> str:
    """A template as Jinja text that llama.cpp's own Jinja reads too: it does not know \\u."""
    return template.jinja(controls).replace(r'\u200b', '\u200b')


# The file -------------------------------------------------------------------------------------------------------------


def write(run, output: pathlib.Path, dtype: str = 'float32'):
    """Writes a run (inference.run.Run), of a vision run its decoder, to the file `output`, which must not exist yet.

    Raises UserError for what llama.cpp would compute otherwise: see the module's docstring.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("--to=gguf needs the package gguf: pip install -e '.[gguf]'.") from error

    config, tokenizer, model = run.config, run.tokenizer, run.config.model
    if output.exists():
        raise UserError(f'{output} exists: name a file that does not.')
    architecture = _architecture(config)
    content = read_json(tokenizer.folder / 'tokenizer.json')
    if not (split := split_name(content)):
        raise UserError(
            f'the tokenizer in {tokenizer.folder} splits text in a way that llama.cpp has no name for: it would read '
            'other tokens than this model has learned.'
        )
    number, file_type = DTYPES[dtype]
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole(output) as partial:
        writer = gguf.GGUFWriter(partial, architecture)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(f'{config.name} {config.stage}')
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_vocab_size(tokenizer.size)
        writer.add_context_length(model.positions)
        writer.add_embedding_length(model.width)
        writer.add_block_count(model.layers)
        writer.add_feed_forward_length(model.ffn)
        writer.add_head_count(model.heads)
        writer.add_head_count_kv(model.kv_heads or model.heads)
        writer.add_key_length(model.head_size)
        writer.add_value_length(model.head_size)
        writer.add_layer_norm_rms_eps(model.epsilon)
        writer.add_rope_dimension_count(model.head_size)
        writer.add_rope_freq_base(model.rope_theta)
        _add_tokenizer(writer, gguf.TokenType, tokenizer, content, split)
        params = run.params['decoder'] if stage_of(config).sees else run.params
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.layers)
        for name, array in _tensors(params, model, architecture, tokenizer.size).items():
            kind = number if array.ndim > 1 else 'F32'  # llama.cpp adds and multiplies by vectors in float32 alone
            array = np.ascontiguousarray(array.astype(jnp.dtype(dtype if array.ndim > 1 else 'float32')))
            theirs = names.get_name(name, ('.weight', '.bias'))
            writer.add_tensor(theirs, array.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _architecture(config):
    """llama.cpp's name of a run's decoder. Raises UserError where it would compute something else."""
    model, where = config.model, config.run_dir
    if not stage_of(config).decodes:
        raise UserError(f'{where} is a clip run: only runs with a decoder are written as GGUF files.')
    if model.flavour == 'gpt':
        raise UserError(
            f"{where} has GPT's decoder with ReLU, for which llama.cpp would compute GELU and answer wrongly without "
            "an error: only decoders of Llama's kind (sizes l20 and ltiny) are written as GGUF files."
        )
    architecture = configs.architecture_of(model)
    if model.rope_scaling and architecture != 'llama':
        raise UserError(f'{where} has model.rope_scaling, which llama.cpp passes over in a {architecture}.')
    if architecture == 'qwen2' and model.heads * model.head_size != model.width:
        raise UserError(f'{where} has heads that do not make up its width: a qwen2 of llama.cpp has no others.')
    return architecture


def _tensors(params, model, architecture, vocab_size):
    """{name as in transformers: float32 array} of a decoder, its queries and keys as llama.cpp turns them."""
    tensors = decoders.decoder_to_hf(params, decoders.ARCHITECTURES[architecture], vocab_size)
    if architecture == 'llama':  # rotary pairs are neighbours there, and halves of a head in the others
        for name in [name for name in tensors if name.endswith(('q_proj.weight', 'k_proj.weight'))]:
            halves = tensors[name].reshape(-1, 2, model.head_size // 2, model.width)
            tensors[name] = halves.swapaxes(1, 2).reshape(-1, model.width)
    if model.rope_scaling:
        plain = dataclasses.replace(model, rope_scaling=())
        tensors['rope_freqs.weight'] = np.asarray(rotary_frequencies(plain) / rotary_frequencies(model))
    return tensors


def _add_tokenizer(writer, kinds, tokenizer: Tokenizer, content, split):
    """Adds the tokenizer; kinds: gguf.TokenType."""
    tokens = [f'[PAD{i}]' for i in range(tokenizer.size)]  # ids may have gaps
    types = [kinds.UNUSED] * tokenizer.size
    for token, i in content['model']['vocab'].items():
        tokens[i], types[i] = token, kinds.NORMAL
    for token in content['added_tokens']:
        # One that is not special is a token wherever it stands in a text, and is shown.
        kind = kinds.CONTROL if token['special'] else kinds.USER_DEFINED
        tokens[token['id']], types[token['id']] = token['content'], kind
    writer.add_tokenizer_model('gpt2')  # any byte-level BPE
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = content['model']['merges']
    writer.add_token_merges([merge if isinstance(merge, str) else ' '.join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end)
    writer.add_eot_token_id(tokenizer.end)
    writer.add_pad_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)  # the chat template writes it
    writer.add_chat_template(chat_template(tokenizer.template, tokenizer.controls))
