"""The tokenizer: a byte-level BPE with a chat template, kept in a Hugging Face tokenizer folder.

Training and reading use `tokenizers`; `transformers` is only imported to take a folder from elsewhere, once per family
of runs.
"""

import functools
import hashlib
import json
import os
import pathlib
import re

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32

from nanovision_jax.data import templates
from nanovision_jax.data.templates import IMAGE, OWN
from nanovision_jax.data.workers import cores
from nanovision_jax.errors import UserError

# Short turns repeat (questions, mostly), so they are kept as arrays: 4,096 of at most 256 characters, which is 28 MiB a
# process at most (a character may be four tokens of four bytes), and 4 MiB as questions usually are.
CACHED, SHORT = 1 << 12, 256
# A longer run without white space, or of nothing else, is read in pieces of so many characters: merging, and even more
# so the training of merges, takes time by the square of a word's length.
LONGEST_WORD = 4096
# Characters: tokenizers holds 200 bytes for each while it reads, so a document of words is read in parts: behind a word
# the patterns of GPT-2, Llama 3, Qwen and SmolLM split anyway, so that the tokens are those of the whole text.
PART = 1 << 18
BEHIND_WORD = re.compile(r'(?<=[^\W\d_])(?=[\s,.;:!?，。、；：！？])')
SPECIAL = ('<|endoftext|>', '<|user|>', '<|assistant|>', '<|end|>', IMAGE)  # what our own template is made of


def escape(text: str, controls=SPECIAL) -> str:
    """`text` with its control strings defused: each gets a zero-width space behind its first character.

    The rule that the macro `write` of every stored chat template follows too.
    """
    for token in controls:
        text = text.replace(token, f'{token[:1]}\u200b{token[1:]}')
    return text


def control_tokens(added: dict) -> tuple[str, ...]:
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
    """A tokenizer folder opened for use. Text never becomes a special token: what is encoded is escaped.

    template: how conversations are written. controls: the strings that no text becomes; special: their ids.
    stops: the ids that end an answer, the usual one first, which is `end` too. end_of_text: the id that leads each
    document. size: one more than the largest id.

    Words longer than LONGEST_WORD characters are read in pieces; at most CACHED turns of SHORT characters are kept.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        file = self.folder / 'tokenizer.json'
        if not file.is_file():
            raise UserError(f'no tokenizer in {self.folder}: tokenizer.json is missing.')
        self._tokenizer = _open(file)
        self._tokenizer.pre_tokenizer = _in_pieces(self._tokenizer.pre_tokenizer)
        self.digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self.size = max(self._tokenizer.get_vocab().values(), default=-1) + 1  # ids may have gaps
        self.template = template = templates.read(self.folder)
        self.controls = control_tokens(self._tokenizer.get_added_tokens_decoder())
        if missing := template.missing(self.controls):
            raise UserError(f'the tokenizer in {self.folder} has no {missing}: it was not made by us.')
        id_of = self._tokenizer.token_to_id
        self.special = tuple(map(id_of, self.controls))
        written = [token for token in self.controls if template.writes(token) and token not in template.ends]
        # A model that writes another token of the template has left its turn.
        self.stops = tuple(id_of(token) for token in (*template.ends, *written) if token in self.controls)
        self.end, self.end_of_text, self.image = self.stops[0], id_of(template.document), id_of(IMAGE)
        self.user, self.assistant = id_of('<|user|>'), id_of('<|assistant|>')  # None where other turns are written
        longest_first = sorted(map(re.escape, self.controls), key=len, reverse=True)
        self._control = re.compile(f'({"|".join(longest_first)})')
        self._repeated = functools.lru_cache(maxsize=CACHED)(self._tokenize)

    def __reduce__(self):
        return Tokenizer, (self.folder,)  # data workers open it again

    def escape(self, text: str) -> str:
        """`text` without anything that would become one of `controls`."""
        return escape(text, self.controls) if self._control.search(text) else text

    def encode(self, text: str, trim: bool = True) -> tuple[int, ...]:
        """Plain text as a tuple of ids: escaped, and trimmed unless it is a piece that stands between others."""
        text = self.escape(text)
        return tuple(self._read(text.strip() if trim else text).ids)

    def _read(self, text):
        return self._tokenizer.encode(text, add_special_tokens=False)

    def tokenize(self, spans) -> tuple[Int32[np.ndarray, ' n'], Bool[np.ndarray, ' n']]:
        """(ids int32 [n], learned bool [n]) of Spans, read as one text, in which control strings are special tokens.

        A token is learned if one of its characters is: words may merge with what the template writes before them.
        The arrays of short texts are kept for the next time: they are not to be written to.
        """
        short = sum(len(span.text) for span in spans) <= SHORT
        return (self._repeated if short else self._tokenize)(tuple(spans))

    def _tokenize(self, spans):
        learned = np.repeat([span.learned for span in spans], [len(span.text) for span in spans])
        ids, flags, start = [], [], 0
        for number, piece in enumerate(self._control.split(''.join(span.text for span in spans))):
            stop = start + len(piece)
            if number % 2:
                ids.append([self._tokenizer.token_to_id(piece)])
                flags.append(learned[start : start + 1])
            elif piece and not learned[start:stop].any():
                ids.append(self._read(piece).ids)
                flags.append(np.zeros(len(ids[-1]), bool))
            elif piece:
                encoded = self._read(piece)
                ids.append(encoded.ids)
                before = np.append(0, np.cumsum(learned[start:stop]))
                places = np.array(encoded.offsets, np.int32).reshape(-1, 2)
                flags.append(before[places[:, 1]] > before[places[:, 0]])
            start = stop
        return np.concatenate([np.int32([]), *ids]).astype(np.int32), np.concatenate([np.array([], bool), *flags])

    def encode_documents(self, texts: list[str]) -> Int32[np.ndarray, ' n']:
        """Each text as ids with `end_of_text` before it: one int32 array of all of them."""
        found = []
        for parts in _batches((self.escape(text).strip() for text in texts), PART * min(cores(), 8)):
            encoded = self._tokenizer.encode_batch_fast([part for part, _ in parts], add_special_tokens=False)
            for (_, first), read in zip(parts, encoded, strict=True):
                found.append(np.array([self.end_of_text, *read.ids] if first else read.ids, np.int32))
        return np.concatenate([np.int32([]), *found])

    def decode(self, ids, special: bool = False) -> str:
        """Ids as text; special tokens are left out unless asked for."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=not special)

    @functools.cached_property
    def byte_lengths(self) -> Int32[np.ndarray, ' size']:
        """int32 [size]: how many bytes of text each id stands for; control tokens stand for none."""
        lengths = np.zeros(self.size, np.int32)
        for token, i in self._tokenizer.get_vocab().items():
            lengths[i] = len(token)  # a byte-level alphabet writes each byte as one character
        for i, token in self._tokenizer.get_added_tokens_decoder().items():
            lengths[i] = len(token.content.encode())  # these are written as they are
        lengths[list(self.special)] = 0
        return lengths


def _batches(texts, most):
    """Lists of (part of a text, whether it is its first), in order, of `most` characters and the rest of a part."""
    batch, size = [], 0
    for text in texts:
        for number, part in enumerate(_parts(text)):
            batch.append((part, not number))
            size += len(part)
            if size >= most:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _parts(text):
    start = 0
    while cut := BEHIND_WORD.search(text, start + PART):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _open(file):
    """A tokenizer.json. Raises UserError for one that is damaged, or of another version than ours reads."""
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more exact
        why = ' '.join(str(error).split())[:100]
        raise UserError(
            f'{file} cannot be read ({why}): it is damaged, or was written for another version of tokenizers than '
            f'{tokenizers.__version__}.'
        ) from error


def _in_pieces(pre_tokenizer):
    """The same, with longer words than LONGEST_WORD cut: a tokenizer.json is read so, and does not say so itself."""
    run = tokenizers.Regex(rf'\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}')
    steps = [tokenizers.pre_tokenizers.Split(run, 'isolated'), *([pre_tokenizer] if pre_tokenizer else [])]
    return tokenizers.pre_tokenizers.Sequence(steps)


def train_tokenizer(texts, vocab_size: int, folder):
    """Trains a byte-level BPE of `vocab_size` tokens (specials included) on an iterator of texts; writes `folder`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    plain = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = _in_pieces(plain)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = plain
    _save(
        json.loads(tokenizer.to_str()), OWN, dict.fromkeys(('bos_token', 'eos_token', 'pad_token'), SPECIAL[0]), folder
    )


def import_tokenizer(source, folder, template: str = 'auto'):
    """Takes a byte-level BPE from a folder or a Hugging Face id with its chat template, and writes `folder`.

    template: auto keeps a chat template that is one of templates.KNOWN, and gives a tokenizer without any our own; own
    takes ours in any case. Added are the special tokens that the template needs, and <|image|>.
    Raises UserError for what is no such tokenizer, and for a chat template that is not known.
    """
    os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')  # it warns that PyTorch is missing; it is not needed
    import transformers

    file = pathlib.Path(source) / 'tokenizer.json'
    whole = _open(file) if file.is_file() else None
    try:
        fast = transformers.AutoTokenizer.from_pretrained(source, use_fast=True)
    except Exception as error:  # transformers and tokenizers have no one error for a file that they cannot use
        raise UserError(
            f'data.tokenizer {source!r} is no tokenizer folder and no id that can be loaded ({type(error).__name__}).'
        ) from error
    # Of some classes (GPT2Tokenizer, Qwen2Tokenizer) transformers 5 takes words and merges from the file, but splits
    # text as the class does: the file counts, with the tokens that were added beside it.
    backend = whole or getattr(fast, 'backend_tokenizer', None)
    if whole:
        known = {token.content for token in whole.get_added_tokens_decoder().values()}
        beside = [token for _, token in sorted(fast.added_tokens_decoder.items()) if token.content not in known]
        whole.add_tokens(beside)
    content = backend and json.loads(backend.to_str())
    if not content or content['model']['type'] != 'BPE' or '"ByteLevel"' not in json.dumps(content['pre_tokenizer']):
        raise UserError(f'data.tokenizer {source!r} is not a byte-level BPE (as gpt2 is).')
    names = {name: token for name, token in fast.special_tokens_map.items() if isinstance(token, str)}
    content |= {'truncation': None, 'padding': None}
    backend.no_truncation()
    backend.no_padding()
    jinja = fast.chat_template.get('default') if isinstance(fast.chat_template, dict) else fast.chat_template
    if template == 'own' or not fast.chat_template:
        names = dict.fromkeys(('bos_token', 'eos_token', 'pad_token'), SPECIAL[0])
        return _save(content, OWN, names, folder)
    found = jinja and templates.recognise(jinja, names, lambda text: backend.encode(text, add_special_tokens=False).ids)
    if not found or not _keeps_apart(found, backend.get_added_tokens_decoder()):
        raise UserError(
            f'the chat template of {source!r} is neither ChatML (SmolLM2, Qwen) nor Llama 3: '
            '--config.data.template=own (convert: --template=own) takes ours instead, which the model has to learn.'
        )
    names = {'bos_token': found.document, 'pad_token': found.document} | names | {'eos_token': found.ends[0]}
    return _save(content, found, names, folder)


def _keeps_apart(template, added):
    """Whether all special tokens that a template writes are tokens here, and swallow no text beside them."""
    if template.missing([*control_tokens(added), template.document, IMAGE]):
        return False
    return not any(t.lstrip or t.rstrip or t.single_word for t in added.values() if template.writes(t.content))


def _save(content, template, names, folder):
    """Writes a tokenizer folder: `content` of tokenizer.json with the special tokens that a template needs.

    names: its special tokens by name, as tokenizer_config.json has them. Ids that there are stay.
    """
    folder, (vocab, added) = pathlib.Path(folder), (content['model']['vocab'], content['added_tokens'])
    vocab |= {token['content']: token['id'] for token in added}  # else an id follows from how many others there are
    needed = SPECIAL if template == OWN else (template.document, IMAGE)
    for token in needed:
        known = next((other for other in added if other['content'] == token), None)
        if not known:
            known = dict(id=vocab.setdefault(token, max(vocab.values()) + 1), content=token)
            known |= dict(single_word=False, lstrip=False, rstrip=False)
            added.append(known)
        known |= dict(normalized=False, special=True)
    added.sort(key=lambda token: token['id'])
    controls = control_tokens({t['id']: tokenizers.AddedToken(t['content'], special=t['special']) for t in added})
    for token in added:
        token['normalized'] &= token['content'] not in controls  # what escape() lets through must not turn into one
    if post := content['post_processor']:
        for step in post.get('processors', [post]):
            step.update({name: False for name in step if name == 'trim_offsets'})  # what is learned is told by offsets
    settings = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'padding_side': 'left',
        'model_max_length': int(1e9),
        'clean_up_tokenization_spaces': False,
        'extra_special_tokens': [token for token in needed if token not in names.values()],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'tokenizer.json').write_text(json.dumps(content, ensure_ascii=False), encoding='utf-8')
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings | names, indent=2) + '\n')
    (folder / 'chat_template.jinja').write_text(template.jinja(controls), encoding='utf-8')
    template.write(folder)
