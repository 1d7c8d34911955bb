"""Renders a published chat template, which is a program of somebody else, within bounds.

It runs in Jinja's immutable sandbox, in a process of its own that may take 10 seconds and 1 GiB, and says at most a
million characters. It sees the conversations of our probes and the names of special tokens, and nothing else.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

SECONDS, MEMORY, CHARACTERS = 10, 1 << 30, 1_000_000


def render(template, conversations, tokens):
    """The text of each of `conversations` ({'messages', 'add_generation_prompt'}), with None where it fails.

    tokens: special tokens by name. As transformers would render them, except that today is always 26 July 2024: the
    date that Llama 3's templates fall back to.
    """
    given = json.dumps({'template': template, 'conversations': conversations, 'tokens': tokens})
    command = [sys.executable, '-I', str(pathlib.Path(__file__).resolve())]
    quiet = {name: value for name, value in os.environ.items() if name in ('PATH', 'LD_LIBRARY_PATH', 'SYSTEMROOT')}
    try:
        made = subprocess.run(
            command, input=given.encode(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=SECONDS, env=quiet
        )
    except subprocess.TimeoutExpired:
        return [None] * len(conversations)
    return json.loads(made.stdout) if made.returncode == 0 else [None] * len(conversations)


def main():
    """The process: reads what render() gives it, prints a list of texts. Where a text fails, it is None."""
    import datetime
    import resource

    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    given = json.loads(sys.stdin.buffer.read())
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    class Generation(jinja2.ext.Extension):
        """{% generation %}, which only marks."""

        tags = frozenset({'generation'})

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(('name:endgeneration',), drop_needle=True)

    def fail(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters['tojson'] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals['raise_exception'] = fail
    environment.globals['strftime_now'] = datetime.datetime(2024, 7, 26).strftime
    template = environment.from_string(given['template'])
    texts = []
    for conversation in given['conversations']:
        seen = {**given['tokens'], **conversation, 'tools': None, 'documents': None, 'enable_thinking': False}
        try:
            texts.append(template.render(seen))
        except Exception:  # a program of somebody else may raise anything
            texts.append(None)
    if sum(len(text or '') for text in texts) > CHARACTERS:
        raise ValueError('too much is printed')
    sys.stdout.write(json.dumps(texts))


if __name__ == '__main__':
    main()
