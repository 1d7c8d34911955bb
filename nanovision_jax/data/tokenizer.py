"""The tokenizer: a byte-level BPE with five special tokens, kept in a Hugging Face tokenizer folder.

Training and reading use `tokenizers`; `transformers` is only imported to make a folder, once per family of runs.
"""

import functools
import hashlib
import json
import os
import pathlib
import re

import numpy as np
import tokenizers

from nanovision_jax.errors import UserError

SPECIAL = ('<|endoftext|>', '<|user|>', '<|assistant|>', '<|end|>', '<|image|>')

# What lineage.json calls our template: the sha256 of the text that was first stored for it.
TEMPLATE_DIGEST = '769bb8cba12ecb1471e2a1fdf0eabf64988ea4cf9981a205e758432c01a3e038'


def chat_template(controls):
    """The chat template stored with a tokenizer: what conversation.encode does, for tools that read templates.

    Its macro `write` is escape(): a control string in anybody's text gets a zero-width space behind its first
    character, so that no text opens a turn.
    """
    return (
        "{%- set controls = [" + ', '.join(json.dumps(token, ensure_ascii=False) for token in controls) + "] -%}"
        "{%- macro write(text) -%}"
        "{%- set safe = namespace(text=text) -%}"
        "{%- for token in controls -%}"
        "{%- set safe.text = safe.text | replace(token, token[:1] + '\\u200b' + token[1:]) -%}"
        "{%- endfor -%}"
        "{{- safe.text | trim -}}"
        "{%- endmacro -%}"
        "{{- '<|endoftext|>' -}}"
        "{%- for message in messages -%}"
        "{%- if message.role not in ('user', 'assistant') -%}"
        "{{- raise_exception('unknown speaker: ' + message.role) -}}"
        "{%- endif -%}"
        "{{- '<|' + message.role + '|>' -}}"
        "{%- if message.content is string -%}{{- write(message.content) -}}"
        "{%- else -%}"
        "{%- set so_far = namespace(text='') -%}"
        "{%- for part in message.content -%}"
        "{%- if part.type == 'image' -%}{{- write(so_far.text) + '<|image|>' -}}{%- set so_far.text = '' -%}"
        "{%- else -%}{%- set so_far.text = so_far.text + '\\n' + part.text -%}{%- endif -%}"
        "{%- endfor -%}{{- write(so_far.text) -}}"
        "{%- endif -%}"
        "{{- '<|end|>' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
    )  # fmt: skip


def escape(text, controls=SPECIAL):
    """`text` with its control strings defused and its ends trimmed; the rule that chat_template() follows too."""
    for token in controls:
        text = text.replace(token, f'{token[:1]}\u200b{token[1:]}')
    return text.strip()


def control_tokens(added):
    """The strings, in the order of their ids, that no text may become: {id: AddedToken} of a tokenizer.

    These are its special tokens, and of its other added tokens those that look like markup: Qwen does not call <think>
    and <tool_call> special, and yet they steer the model. Added words and runs of spaces are text.
    """
    return tuple(
        token.content
        for _, token in sorted(added.items())
        if token.special or re.fullmatch(r'<.+>|\[.+\]', token.content)
    )


class Tokenizer:
    """A tokenizer folder opened for use. Text never becomes a special token: encode() escapes, ids name the roles."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        file = self.folder / 'tokenizer.json'
        if not file.is_file():
            raise UserError(f'no tokenizer in {self.folder}: tokenizer.json is missing.')
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self.digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self.size = self._tokenizer.get_vocab_size()
        ids = [self._tokenizer.token_to_id(token) for token in SPECIAL]
        if None in ids:
            raise UserError(f'the tokenizer in {self.folder} has no {SPECIAL[ids.index(None)]}: it was not made by us.')
        self.end_of_text, self.user, self.assistant, self.end, self.image = ids
        self.stops = (self.end, *(i for i in ids if i != self.end))  # what ends an answer
        self.controls = control_tokens(self._tokenizer.get_added_tokens_decoder())
        self.special = tuple(self._tokenizer.token_to_id(token) for token in self.controls)
        self.encode = functools.lru_cache(maxsize=1 << 16)(self._encode)  # questions repeat

    def __reduce__(self):
        return Tokenizer, (self.folder,)  # data workers open it again

    def escape(self, text):
        """`text` as it is tokenized: without anything that would become one of `controls`, trimmed."""
        return escape(text, self.controls)

    def _encode(self, text):
        return tuple(self._tokenizer.encode(self.escape(text), add_special_tokens=False).ids)

    def encode_documents(self, texts):
        """Each text as ids with <|endoftext|> before it: one int32 array of all of them."""
        encoded = self._tokenizer.encode_batch_fast([self.escape(text) for text in texts], add_special_tokens=False)
        return np.concatenate([np.array([self.end_of_text, *e.ids], np.int32) for e in encoded])

    def decode(self, ids, special=False):
        """Ids as text; special tokens are left out unless asked for."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=not special)

    @functools.cached_property
    def byte_lengths(self):
        """int32 [size]: how many bytes of text each id stands for; special tokens stand for none."""
        lengths = np.zeros(self.size, np.int32)
        for token, i in self._tokenizer.get_vocab().items():
            lengths[i] = len(token)  # a byte-level alphabet writes each byte as one character
        lengths[list(self.special)] = 0
        return lengths


def train_tokenizer(texts, vocab_size, folder):
    """Trains a byte-level BPE of `vocab_size` tokens (specials included) on an iterator of texts; writes `folder`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    _save(_transformers().PreTrainedTokenizerFast(tokenizer_object=tokenizer), folder)


def import_tokenizer(source, folder):
    """Takes a byte-level BPE from a folder or a Hugging Face id, adds our special tokens, writes `folder`."""
    transformers = _transformers()
    try:
        fast = transformers.AutoTokenizer.from_pretrained(source, use_fast=True)
    except (OSError, ValueError) as error:
        raise UserError(f'data.tokenizer {source!r} is no tokenizer folder and no id that can be loaded.') from error
    if not getattr(fast, 'is_fast', False) or '"ByteLevel"' not in fast.backend_tokenizer.to_str():
        raise UserError(f'data.tokenizer {source!r} is not a byte-level BPE (as gpt2 is).')
    _save(fast, folder)


def _save(fast, folder):
    known = fast.get_vocab()
    fast.add_special_tokens({'additional_special_tokens': list(SPECIAL[1:])})
    fast.add_special_tokens(dict.fromkeys(('bos_token', 'eos_token', 'pad_token'), SPECIAL[0]))
    assert all(fast.get_vocab()[token] == i for token, i in known.items()), 'adding special tokens moved old ones'
    fast.chat_template = chat_template(control_tokens(fast.added_tokens_decoder))
    fast.model_max_length = int(1e9)
    fast.save_pretrained(folder)


def _transformers():
    os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')  # it warns that PyTorch is missing; it is not needed
    import transformers

    return transformers
