"""Chat templates as data: what stands round the turns of a conversation, and which tokens end an answer.

OWN is ours; ChatML (SmolLM2, Qwen) and Llama 3 are recognised in a published model's Jinja template by what it prints
(recognise), never by name. From the data come our ids (Template.turns) and the Jinja text that is stored and exported
(Template.jinja); the two print the same.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import NamedTuple

from nanovision_jax.data import sandbox
from nanovision_jax.errors import UserError

FILE = 'template.json'  # beside tokenizer.json; a tokenizer folder without it has our own template
IMAGE = '<|image|>'
TOOL_ROLES = ('tool', 'tool_call', 'tool_response', 'function', 'function_call', 'observation', 'ipython')


class Span(NamedTuple):
    """A piece of a conversation as it is written out, and whether the model learns to write it."""

    text: str
    learned: bool = False


@dataclasses.dataclass(frozen=True)
class Template:
    """What stands round a conversation's turns. Every turn must begin with a special token.

    A turn of the user is user[0], the words, user[1]; so are the system's and the assistant's. Learned are the words of
    an answer and the first of `ends`, with which assistant[1] begins.
    """

    begin: str  # before the first turn
    document: str  # the token before each document of plain text
    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None  # None: its text stands at the head of the first question, as in Gemma's template
    default_system: str | None  # the system's words where a conversation has none; None: then it has no such turn
    ends: tuple[str, ...]  # the tokens that end an answer
    trim: bool  # words lose the white space at their ends
    opening: str = ''  # before the last answer: Qwen3's empty think block

    @property
    def digest(self):
        """The sha256 of the data, in hex."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def former(self):
        """Digests that mean this template in the lineage of older runs: there, ours is that of its first Jinja text."""
        return ('769bb8cba12ecb1471e2a1fdf0eabf64988ea4cf9981a205e758432c01a3e038',) if self == OWN else ()

    def writes(self, token):
        """Whether a special token belongs to the turns of this template, or to its documents."""
        turns = (*self.user, *self.assistant, *(self.system or ()), self.begin, self.document, IMAGE)
        return any(token in text for text in turns)

    def missing(self, controls):
        """What this template needs and is not among `controls`, or does not begin with one; None if nothing is."""
        if lacking := [token for token in (self.document, self.ends[0], IMAGE) if token not in controls]:
            return lacking[0]
        turns = (self.user[0], self.assistant[0], (self.system or self.user)[0])
        return next((text for text in turns if not text.startswith(tuple(controls))), None)

    def turns(self, messages, escape, question=False):
        """Yields each turn of a conversation that encode() has checked, as a list of Spans.

        escape: defuses the control strings in words. question: the last turn is the user's, and one more follows that
        the assistant is to fill.
        """
        head, begin = '', self.begin
        given = _text(messages[0]['content']) if messages and messages[0]['role'] == 'system' else None
        messages = messages[given is not None :]
        if self.system is None:
            head = f'{escape(given).strip()}\n\n' if given and given.strip() else ''
        elif (words := self.default_system if given is None else self._words(escape(given))) is not None:
            yield [Span(begin + self.system[0] + words + self.system[1])]
            begin = ''
        for number, message in enumerate(messages):
            if message['role'] == 'user':
                words = self._content(message['content'], escape, head)
                yield [Span(begin + self.user[0] + words + self.user[1])]
                begin = head = ''
                continue
            opened, words = self.assistant[0], self._content(message['content'], escape)
            if self.opening and number == len(messages) - 1:
                opened, words = opened + self.opening, words.lstrip('\n')
            end = self.ends[0]
            yield [Span(opened), Span(words + end, True), Span(self.assistant[1].removeprefix(end))]
        if question:
            yield [Span(self.assistant[0] + self.opening)]

    def _words(self, text):
        return text.strip() if self.trim else text

    def _content(self, content, escape, head=''):
        """The words of a message with IMAGE wherever an image is; texts side by side are lines of one."""
        runs = [[]]  # of texts between images; one text could else hold a part of a control string, the next the rest
        for part in [{'type': 'text', 'text': content}] if isinstance(content, str) else content:
            if part['type'] == 'image':
                runs.append([])
            else:
                runs[-1].append(part['text'])
        joined = ['\n'.join(run) for run in runs]
        joined[0] = head + self._words(joined[0])
        return IMAGE.join(self._words(escape(run)) for run in joined)

    def jinja(self, controls):
        """The template as Jinja text, with {% generation %} round what is learned.

        controls: the strings that no text may become. Raises an exception for roles other than system, user, assistant.
        """
        trim = ' | trim' if self.trim else ''
        end = self.ends[0]
        lines = [
            f'{{%- set controls = [{", ".join(map(_quoted, controls))}] -%}}',
            '{%- macro write(text) -%}',
            '{%- set safe = namespace(text=text) -%}',
            '{%- for token in controls -%}{%- if token in safe.text -%}',
            "{%- set safe.text = safe.text | replace(token, token[:1] + '\\u200b' + token[1:]) -%}",
            '{%- endif -%}{%- endfor -%}',
            f'{{{{- safe.text{trim} -}}}}',
            '{%- endmacro -%}',
            '{%- macro words(content, head) -%}',
            f'{{%- if content is string -%}}{{{{- write(head + (content{trim})) -}}}}',
            '{%- else -%}',
            '{%- set run = namespace(text=[], head=head) -%}',
            '{%- for part in content -%}',
            "{%- if part.type == 'image' -%}",
            f"{{{{- write(run.head + (run.text | join('\\n'){trim})) + {_quoted(IMAGE)} -}}}}",
            "{%- set run.text = [] -%}{%- set run.head = '' -%}",
            '{%- else -%}{%- set run.text = run.text + [part.text] -%}{%- endif -%}',
            '{%- endfor -%}',
            f"{{{{- write(run.head + (run.text | join('\\n'){trim})) -}}}}",
            '{%- endif -%}',
            '{%- endmacro -%}',
            f'{{{{- {_quoted(self.begin)} -}}}}',
            "{%- set turns, first = messages, namespace(head='') -%}",
            "{%- if messages and messages[0].role == 'system' -%}{%- set turns = messages[1:] -%}",
            *self._system_lines(),
            '{%- endif -%}',
            '{%- for message in turns -%}',
            "{%- if message.role == 'user' -%}",
            f'{{{{- {_quoted(self.user[0])} + words(message.content, first.head) + {_quoted(self.user[1])} -}}}}',
            "{%- set first.head = '' -%}",
            "{%- elif message.role == 'assistant' -%}",
            "{%- set answer = words(message.content, '') -%}",
            f'{{{{- {_quoted(self.assistant[0])} -}}}}',
            *self._opening_lines(),
            f'{{%- generation -%}}{{{{- answer + {_quoted(end)} -}}}}{{%- endgeneration -%}}',
            f'{{{{- {_quoted(self.assistant[1].removeprefix(end))} -}}}}',
            f'{{%- elif message.role in {list(TOOL_ROLES)} -%}}',
            "{{- raise_exception('the role ' + message.role + ' belongs to tools, which are not supported') -}}",
            "{%- elif message.role == 'system' -%}{{- raise_exception('system speaks out of turn') -}}",
            "{%- else -%}{{- raise_exception('unknown speaker: ' + message.role) -}}{%- endif -%}",
            '{%- endfor -%}',
            f'{{%- if add_generation_prompt -%}}{{{{- {_quoted(self.assistant[0] + self.opening)} -}}}}{{%- endif -%}}',
        ]
        return '\n'.join(lines)

    def _system_lines(self):
        if self.system is None:
            return [
                "{%- set text = words(messages[0].content, '') | trim -%}",
                "{%- if text -%}{%- set first.head = text + '\\n\\n' -%}{%- endif -%}",
            ]
        before, after = map(_quoted, self.system)
        lines = [f"{{{{- {before} + words(messages[0].content, '') + {after} -}}}}"]
        if self.default_system is not None:
            lines += [
                '{%- else -%}',
                f'{{{{- {_quoted("".join((self.system[0], self.default_system, self.system[1])))} -}}}}',
            ]
        return lines

    def _opening_lines(self):
        if not self.opening:
            return []
        strip = "{%- set answer = answer.lstrip('\\n') -%}"
        return ['{%- if loop.last -%}', f'{{{{- {_quoted(self.opening)} -}}}}', strip, '{%- endif -%}']

    def write(self, folder):
        """Writes template.json into a tokenizer folder; our own needs none."""
        if self != OWN:
            content = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
            (pathlib.Path(folder) / FILE).write_text(content + '\n', encoding='utf-8')


def read(folder):
    """The Template of a tokenizer folder. Raises UserError for a file that is damaged."""
    file = pathlib.Path(folder) / FILE
    if not file.is_file():
        return OWN
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
        pairs = {name: tuple(content[name]) for name in ('user', 'assistant', 'ends')}
        system = content['system'] and tuple(content['system'])
        template = Template(**(content | pairs | {'system': system}))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f'{file} is no chat template as we write them: take it from where the model came from.'
        ) from error
    texts = [template.begin, template.document, template.opening, *template.ends]
    for pair in (template.user, template.assistant, template.system or ('', '')):
        texts += pair if len(pair) == 2 else [None]
    texts.append(template.default_system or '')
    if not all(isinstance(text, str) for text in texts) or not template.assistant[1].startswith(template.ends[:1]):
        raise UserError(f'{file} is no chat template as we write them: take it from where the model came from.')
    return template


def _text(content):
    """A system message's words."""
    return content if isinstance(content, str) else '\n'.join(part['text'] for part in content)


def _quoted(text):
    return json.dumps(text, ensure_ascii=False)


OWN = Template(
    begin='<|endoftext|>',
    document='<|endoftext|>',
    user=('<|user|>', '<|end|>'),
    assistant=('<|assistant|>', '<|end|>'),
    system=None,
    default_system=None,
    ends=('<|end|>',),
    trim=True,
)

# Recognising a published template ------------------------------------------------------------------------------------

CHATML = Template(
    begin='',
    document='<|endoftext|>',
    user=('<|im_start|>user\n', '<|im_end|>\n'),
    assistant=('<|im_start|>assistant\n', '<|im_end|>\n'),
    system=('<|im_start|>system\n', '<|im_end|>\n'),
    default_system=None,
    ends=('<|im_end|>', '<|endoftext|>'),
    trim=False,
)
LLAMA3 = Template(
    begin='<|begin_of_text|>',
    document='<|begin_of_text|>',
    user=('<|start_header_id|>user<|end_header_id|>\n\n', '<|eot_id|>'),
    assistant=('<|start_header_id|>assistant<|end_header_id|>\n\n', '<|eot_id|>'),
    system=('<|start_header_id|>system<|end_header_id|>\n\n', '<|eot_id|>'),
    default_system=None,
    ends=('<|eot_id|>', '<|eom_id|>', '<|end_of_text|>'),
    trim=True,
)
QWEN3 = dataclasses.replace(CHATML, opening='<think>\n\n</think>\n\n')
KNOWN = (OWN, CHATML, QWEN3, LLAMA3)


def _said(*texts):
    roles = ('user', 'assistant') * len(texts)
    return [{'role': role, 'content': text} for role, text in zip(roles, texts, strict=False)]


_SYSTEM = [{'role': 'system', 'content': 'Be brief.'}]
# (messages, is it a question): the first two tell the system's turn, all of them have to agree.
PROBES = (
    (_said('Hello?'), True),
    (_SYSTEM + _said('Hello?'), True),
    (_said('Hello?', 'Yes.'), False),
    (_said('One', 'Two', 'Three'), True),
    (_SYSTEM + _said('One', 'Two', 'Three', 'Four'), False),
    (_said(' \n spaces before', 'and behind \n ', '\tand\u3000'), True),
    (_SYSTEM + _said('你好, naïve 👋', '\n\nline\n'), False),
    ([{'role': 'system', 'content': ' \n padded '}, *_said('{{ 7 * 7 }} & <b>', "it's \\n")], False),
)


def recognise(jinja, tokens, ids_of):
    """The Template that a published Jinja text is, or None.

    tokens: its special tokens by name, as bos_token. ids_of: text → token ids, special tokens included. The text is
    rendered in a sandbox (sandbox.py), and what it prints must have the ids of what the found Template prints.
    """
    rendered = sandbox.render(jinja, [{'messages': m, 'add_generation_prompt': q} for m, q in PROBES], tokens)
    wanted = [text and ids_of(text) for text in rendered]
    for known in KNOWN:
        found = _fitted(known, rendered[0] or '', rendered[1] or '')
        printed = [ids_of(_printed(found, *probe)) for probe in PROBES]
        agrees = [ids == theirs for ids, theirs in zip(printed, wanted, strict=True)]
        if known == OWN:  # its first Jinja text refused a system message, where it stands in older tokenizer folders
            agrees = [same or theirs is None for same, theirs in zip(agrees, wanted, strict=True)]
        if wanted[0] and all(agrees):
            return found
    return None


def _printed(template, messages, question):
    return ''.join(span.text for turn in template.turns(messages, str, question) for span in turn)


def _fitted(known, plain, with_system):
    """`known` with the system's turn that two probes show: one without and one with a system message."""
    if known.system is None:
        return known
    (before, after), rest, turns = known.system, _printed(known, *PROBES[0]), []
    for text in (plain, with_system):
        head = text.removeprefix(known.begin).removesuffix(rest.removeprefix(known.begin))
        inside = head.startswith(before) and head.endswith(after)
        turns.append(head[len(before) : len(head) - len(after)] if inside else None)
    default, given = turns
    if default is None or given is None:
        return known
    if given == default + _SYSTEM[0]['content']:  # what is always there: Llama 3.1's dates
        return dataclasses.replace(known, system=(before + default, after), default_system='')
    return dataclasses.replace(known, default_system=default)
