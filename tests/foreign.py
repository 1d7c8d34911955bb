"""Tokenizer folders as published models have them: their special tokens, their flags, and what their templates do.

The vocabulary is a small BPE; the Jinja is written here, to print what the published templates print.
"""

import json

import tokenizers

from nanovision_jax.data.tokenizer import SPECIAL

SMOLLM2 = '<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars> <issue_start>'
SMOLLM2 = [*SMOLLM2.split(), '<issue_comment>', '<jupyter_start>', '<jupyter_code>', '<empty_output>']
QWEN2 = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|image_pad|>']
QWEN2_PLAIN = ['<tool_call>', '</tool_call>', '<|fim_prefix|>', '<|repo_name|>']  # published as not special
QWEN3_PLAIN = [*QWEN2_PLAIN, '<tool_response>', '<think>', '</think>']
LLAMA3 = ['<|begin_of_text|>', '<|end_of_text|>', *(f'<|reserved_special_token_{i}|>' for i in range(4))]
LLAMA3 += ['<|start_header_id|>', '<|end_header_id|>', '<|eom_id|>', '<|eot_id|>', '<|python_tag|>']
LLAMA3 += [f'<|reserved_special_token_{i}|>' for i in range(4, 60)]  # published: to 247

# Jinja, by behaviour -------------------------------------------------------------------------------------------------

CHATML = """
{%- if messages[0].role != 'system' and default -%}<|im_start|>system\n{{ default }}<|im_end|>\n{% endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
QWEN3 = """
{%- for m in messages -%}
{%- if m.role == 'assistant' and loop.last -%}
{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content.lstrip('\n') + '<|im_end|>\n' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}"""
LLAMA3_TURNS = """
{%- for m in turns -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"""
LLAMA31 = """
{%- if not date_string is defined -%}{%- set date_string = TODAY -%}{%- endif -%}
{%- set turns = messages -%}{%- set system = '' -%}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content | trim -%}{%- set turns = messages[1:] -%}
{%- endif -%}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' -}}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' -}}"""


def _default(text):
    return '{%- set default = ' + json.dumps(text) + ' -%}' + CHATML


# name: (special tokens, other added tokens, bos_token, eos_token, where the special ones stand, chat template)
FAMILIES = {
    'smollm2': (SMOLLM2, [], '<|im_start|>', '<|im_end|>', 'first',
                _default('You are a helpful AI assistant named SmolLM, trained by Hugging Face')),
    'qwen2': (QWEN2[:3], [], None, '<|im_end|>', 'last', _default('You are a helpful assistant.')),
    'qwen2.5': (QWEN2, QWEN2_PLAIN, None, '<|im_end|>', 'last',
                _default('You are Qwen, created by Alibaba Cloud. You are a helpful assistant.')),
    'qwen3': (QWEN2, QWEN3_PLAIN, None, '<|im_end|>', 'last', QWEN3),
    'llama3': (LLAMA3, [], '<|begin_of_text|>', '<|eot_id|>', 'last',
               '{{- bos_token -}}{%- set turns = messages -%}' + LLAMA3_TURNS),
    'llama3.1': (LLAMA3, [], '<|begin_of_text|>', '<|eot_id|>', 'last',
                 LLAMA31.replace('TODAY', "'26 Jul 2024'") + LLAMA3_TURNS),
    'llama3.2': (LLAMA3, [], '<|begin_of_text|>', '<|eot_id|>', 'last',
                 LLAMA31.replace('TODAY', 'strftime_now("%d %b %Y")') + LLAMA3_TURNS),
}  # fmt: skip


def make(name, folder, trained, template=True):
    """Writes the tokenizer of a family to a folder, with the merges of a tokenizer folder that we trained.

    template: False leaves the chat template out, a text takes its place.
    """
    special, plain, bos, eos, where, jinja = FAMILIES[name]
    model = json.loads((trained / 'tokenizer.json').read_text())['model']
    words = [token for token, _ in sorted(model['vocab'].items(), key=lambda item: item[1]) if token not in SPECIAL]
    vocab = {token: i for i, token in enumerate(special + words if where == 'first' else words)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [tuple(pair) for pair in model['merges']]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    if name.startswith('qwen'):
        made.normalizer = tokenizers.normalizers.NFC()
    made.add_special_tokens(special)
    made.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False) for token in plain])
    if name.startswith('llama'):  # as published: it trims offsets, and begins what is not a conversation
        begin = tokenizers.processors.TemplateProcessing(f'{bos} $A', None, [(bos, made.token_to_id(bos))])
        made.post_processor = tokenizers.processors.Sequence(
            [tokenizers.processors.ByteLevel(trim_offsets=True), begin]
        )
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / 'tokenizer.json'))
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': bos, 'eos_token': eos}
    if template:
        settings['chat_template'] = jinja if template is True else template
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    return folder
