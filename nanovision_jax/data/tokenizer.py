"""The tokenizer: a byte-level BPE with five special tokens, kept in a Hugging Face tokenizer folder.

Training and reading use `tokenizers`; `transformers` is only imported to make a folder, once per family of runs.
"""

import functools
import hashlib
import os
import pathlib

import numpy as np
import tokenizers

from nanovision_jax.errors import UserError

SPECIAL = ('<|endoftext|>', '<|user|>', '<|assistant|>', '<|end|>', '<|image|>')

# The chat template stored with the tokenizer: what conversation.encode does, for tools that read templates. Its escape
# is ours: a special string in anybody's text gets a zero-width space behind its '<', so that no text opens a turn.
_ESCAPED = 'text' + ''.join(f" | replace('{token}', '<\\u200b{token[1:]}')" for token in SPECIAL) + ' | trim'
CHAT_TEMPLATE = (
    "{%- macro write(text) -%}{{ " + _ESCAPED + " }}{%- endmacro -%}"
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


def escape(text):
    """`text` with its special strings defused and its ends trimmed; the rule that CHAT_TEMPLATE follows too."""
    if '<|' in text:
        for token in SPECIAL:
            text = text.replace(token, f'<\u200b{token[1:]}')
    return text.strip()


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
        self.end_of_text, self.user, self.assistant, self.end, self.image = self.special = tuple(ids)
        self.encode = functools.lru_cache(maxsize=1 << 16)(self._encode)  # questions repeat

    def __reduce__(self):
        return Tokenizer, (self.folder,)  # data workers open it again

    def _encode(self, text):
        return tuple(self._tokenizer.encode(escape(text), add_special_tokens=False).ids)

    def encode_documents(self, texts):
        """Each text as ids with <|endoftext|> before it: one int32 array of all of them."""
        encoded = self._tokenizer.encode_batch_fast([escape(text) for text in texts], add_special_tokens=False)
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
    fast.chat_template = CHAT_TEMPLATE
    fast.model_max_length = int(1e9)
    fast.save_pretrained(folder)


def _transformers():
    os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')  # it warns that PyTorch is missing; it is not needed
    import transformers

    return transformers
