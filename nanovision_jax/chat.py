"""Talks with a run in the terminal.

    python -m nanovision_jax.chat --run=runs/tiny/vision_instruct --image=photo.png
    python -m nanovision_jax.chat --run=runs/tiny/vision_instruct --image=photo.png --prompt='What is this?'

--prompt answers once and exits; --system=TEXT stands before the conversation. A pretrain run continues text. In a
conversation:
  /image FILE   shows a picture with the next question
  /new          forgets the conversation and its pictures
  /quit         leaves (so does the end of input)
"""

import contextlib
import itertools
import os.path
import pathlib
import shlex
import sys
import urllib.parse

from nanovision_jax.cli import Parser, run
from nanovision_jax.data import images as image_files
from nanovision_jax.data.conversation import BadExample
from nanovision_jax.errors import UserError
from nanovision_jax.stages import stage_of


def find_image(text):
    """The file that a path means: as it stands, or as terminals and file managers write one that is dragged in.

    That is in quotes, with its spaces escaped, with ~ for the home folder, or as a file:// address.
    Raises UserError where none of them is a file.
    """
    text = text.strip()
    for path in map(os.path.expanduser, _readings(text)):
        if os.path.isfile(path):
            return path
    raise UserError(f'no picture {text!r}.')


def _readings(text):
    yield text
    with contextlib.suppress(ValueError):  # a quote without its end: an apostrophe in a name
        (text,) = shlex.split(text)
        yield text
    with contextlib.suppress(ValueError):  # no address
        if text.lower().startswith('file:'):
            yield urllib.parse.unquote(urllib.parse.urlsplit(text).path)


def open_image(text):
    """A PIL picture from a file, as find_image() finds it. Raises UserError if there is none."""
    path = find_image(text)
    try:
        return image_files.load(pathlib.Path(path).read_bytes())
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}.') from error
    except BadExample as error:
        raise UserError(f'{path}: {error}; pictures are {", ".join(image_files.FORMATS)}.') from error


def say(pieces):
    """Prints an answer piece by piece, and returns it whole."""
    answer = ''
    for piece in pieces:
        print(piece, end='', flush=True)
        answer += piece
    print()
    return answer


def question(text, images):
    """A user message: the pictures, then the words."""
    return {'role': 'user', 'content': [{'type': 'image'}] * images + [{'type': 'text', 'text': text}]}


def typed(prompt):
    """The lines of standard input. A terminal shows `prompt`, and has arrow keys and a history, which no file keeps."""
    if sys.stdin is None:  # closed, as in <&-
        return
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # Windows has none, and needs none
            import readline  # noqa: F401  input() uses it from then on
    while True:
        try:
            line = input(prompt if terminal else '')
        except EOFError:
            return
        yield line


def converse(model, system, images, options):
    """The conversation: reads lines until the end of input or /quit. `system`: the messages that it begins with."""
    messages, shown = list(system), list(images)
    waiting = len(shown)  # pictures that go with the next question
    for line in map(str.strip, typed('you: ')):
        if line == '/quit':
            return
        if line == '/new':
            messages, shown, waiting = list(system), [], 0
        elif line.split()[:1] == ['/image']:
            try:
                image = open_image(line.removeprefix('/image').strip())
                model.check_sees()
            except UserError as error:
                print(f'error: {error}')
                continue
            shown.append(image)
            waiting += 1
        elif line:
            messages.append(question(line, waiting))
            try:
                answer = say(model.chat(messages, images=shown, stream=True, **options))
            except UserError as error:  # a full context, say: the question is taken back
                print(f'error: {error}')
                messages.pop()
                continue
            waiting = 0
            messages.append({'role': 'assistant', 'content': answer.strip() or '…'})


def continued(model, text, options):
    """Prints a text and what the model continues it with. Raises UserError before anything is printed."""
    pieces = model.continue_text(text, **options)
    first = next(pieces, '')
    say(itertools.chain([text, first], pieces))


def continue_lines(model, options):
    """Continues each line of the input."""
    for line in typed('text: '):
        try:
            continued(model, line, options)
        except UserError as error:  # a line that is too long, say: the next one may do
            print(f'error: {error}')


def main(argv):
    """The command: see the module's docstring."""
    parser = Parser(prog='python -m nanovision_jax.chat', description=__doc__)
    parser.add_argument('--run', required=True, help='a run folder')
    parser.add_argument('--image', action='append', default=[], help='a picture to talk about; may be given again')
    parser.add_argument('--prompt', help='answer this and exit')
    parser.add_argument('--system', help='a system message, which stands before every conversation')
    parser.add_argument('--temperature', type=float, default=0.0, help='0 (default) takes the likeliest token')
    parser.add_argument('--top-k', type=int, default=0, help='sample among the k likeliest tokens; 0 (default): all')
    parser.add_argument('--top-p', type=float, default=1.0, help='sample among the likeliest tokens of this mass')
    parser.add_argument('--seed', type=int, default=0, help='of the sampling: any whole number')
    parser.add_argument('--max-new-tokens', type=int, default=256, help='the longest answer')
    parser.add_argument('--weights', default='', help='keep them as bfloat16 or int8: less memory, and faster on a GPU')
    args = parser.parse(argv)
    images = [open_image(path) for path in args.image]
    options = {name: getattr(args, name) for name in ('temperature', 'top_k', 'top_p', 'seed', 'max_new_tokens')}

    from nanovision_jax.inference.run import load

    model = load(args.run, args.weights)
    stage = stage_of(model.config)
    if not stage.decodes:
        raise UserError(f'{args.run} is a {stage.name} run: it compares pictures with captions, and does not answer.')
    if images:
        model.check_sees()
    system = [] if args.system is None else [{'role': 'system', 'content': args.system}]
    if system and not stage.answers:
        raise UserError(f'{args.run} is a {stage.name} run: it continues text, and takes no --system.')
    if not stage.answers:
        print(f'(a {stage.name} run has not learned to answer: it continues your text)', file=sys.stderr)
        if args.prompt is None:
            continue_lines(model, options)
        else:
            continued(model, args.prompt, options)
    elif args.prompt is not None:
        say(model.chat([*system, question(args.prompt, len(images))], images=images, stream=True, **options))
    else:
        print('(/image FILE shows a picture, /new starts over, /quit leaves)', file=sys.stderr)
        converse(model, system, images, options)


if __name__ == '__main__':
    run(main)
