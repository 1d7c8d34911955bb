"""The terminal: conversations, pictures at any turn, one prompt, text to continue, and mistakes in one sentence."""

import copy
import errno
import io
import os
import pathlib
import re
import select
import shlex
import shutil
import subprocess
import sys

import micro
import pytest
from conftest import ROOT
from PIL import Image

import nanovision_jax
from nanovision_jax import chat, cli
from nanovision_jax.data import images
from nanovision_jax.errors import UserError
from nanovision_jax.inference import run as inference


@pytest.fixture(scope='module')
def folder(tmp_path_factory, tokenizer):
    """Two runs, two pictures, and a file that is none."""
    folder = tmp_path_factory.mktemp('runs')
    for stage in ('pretrain', 'vision_instruct'):
        micro.run_folder(micro.odd_config(stage, folder / stage), tokenizer)
    for name, colour in (('red', (250, 3, 5)), ('blue', (7, 11, 240))):
        Image.new('RGB', (31, 23), colour).save(folder / f'{name}.png')
    (folder / 'words.png').write_text('these are words')
    return folder


@pytest.fixture
def talk(monkeypatch, capsys):
    """A function (argv, *lines) → (stdout, stderr) of the command with these lines at its input."""

    def run(argv, *lines):
        monkeypatch.setattr(sys, 'stdin', io.StringIO(''.join(f'{line}\n' for line in lines)))
        chat.main(list(map(str, argv)))
        return capsys.readouterr()

    return run


@pytest.fixture
def asked(monkeypatch):
    """What Run.chat is given, call by call; its answers are 'one', 'two', …, or as the list's `answers` say."""

    class Asked(list):
        answers = iter(('one', 'two', 'three', 'four'))

    calls = Asked()

    def answer(self, messages, images=(), stream=False, **options):
        colours = [picture.getpixel((0, 0)) for picture in images]
        calls.append((copy.deepcopy(messages), colours, options))
        said = next(calls.answers)
        if isinstance(said, Exception):
            raise said
        return iter([said[:2], said[2:]])

    monkeypatch.setattr(inference.Run, 'chat', answer)
    return calls


def user(text, pictures=0):
    return {'role': 'user', 'content': [{'type': 'image'}] * pictures + [{'type': 'text', 'text': text}]}


def assistant(text):
    return {'role': 'assistant', 'content': text}


RED, BLUE = (250, 3, 5), (7, 11, 240)


def test_what_is_no_address_is_no_picture():
    with pytest.raises(UserError, match=r'no picture'):
        chat.find_image('file://[')


def test_a_conversation_keeps_its_turns_and_pictures(talk, asked, folder):
    said = talk(
        [f'--run={folder}/vision_instruct', f'--image={folder}/red.png', '--temperature=0.5', '--top-k=3'],
        'what is it?',
        '',
        f'/image {folder}/blue.png',
        'and this?',
        'both?',
        '/new',
        'who?',
        '/quit',
        'never read',
    )
    assert said.out == 'one\ntwo\nthree\nfour\n'
    assert '/image FILE' in said.err
    first, second, third, fourth = asked
    assert first[:2] == ([user('what is it?', 1)], [RED])
    assert second[:2] == ([user('what is it?', 1), assistant('one'), user('and this?', 1)], [RED, BLUE])
    assert third[:2] == ([*second[0], assistant('two'), user('both?')], [RED, BLUE])
    assert fourth[:2] == ([user('who?')], [])
    assert first[2] == {'temperature': 0.5, 'top_k': 3, 'top_p': 1.0, 'seed': 0, 'max_new_tokens': 256}


def test_a_system_message_stands_before_every_conversation(talk, asked, folder):
    argv, system = [f'--run={folder}/vision_instruct', '--system=Be brief.'], {'role': 'system', 'content': 'Be brief.'}
    talk(argv, 'a?', 'b?', '/new', 'c?')
    talk([*argv, '--prompt=d?'])
    assert [messages for messages, *_ in asked] == [
        [system, user('a?')],
        [system, user('a?'), assistant('one'), user('b?')],
        [system, user('c?')],
        [system, user('d?')],
    ]
    with pytest.raises(UserError, match='is a pretrain run: it continues text, and takes no --system'):
        talk([f'--run={folder}/pretrain', '--system=Be brief.', '--prompt=x'])


def test_a_mistake_in_a_conversation_is_said_and_taken_back(talk, asked, folder):
    asked.answers = iter((UserError('the prompt is too long.'), ' \n', 'two'))
    said = talk(
        [f'--run={folder}/vision_instruct'],
        f'/image {folder}/red.png',
        f'/image {folder}/green.png',
        f'/image {folder}/words.png',
        '/image',
        'long?',
        'short?',
        'then?',
    )
    assert [line for line in said.out.splitlines() if line.startswith('error')] == [
        f"error: no picture '{folder}/green.png'.",
        f'error: {folder}/words.png: image does not decode; pictures are {", ".join(images.FORMATS)}.',
        "error: no picture ''.",
        'error: the prompt is too long.',
    ]
    assert asked[1][:2] == ([user('short?', 1)], [RED])  # the picture waits for the next question
    assert asked[2][0] == [user('short?', 1), assistant('…'), user('then?')]  # an empty answer can be gone on from


def test_one_prompt_is_answered_and_no_more(talk, folder):
    argv = [f'--run={folder}/vision_instruct', f'--image={folder}/red.png', '--prompt=a cat?', '--max-new-tokens=30']
    said = talk(argv, 'never read')
    picture = Image.open(folder / 'red.png')
    expected = nanovision_jax.load(folder / 'vision_instruct').chat('a cat?', images=[picture], max_new_tokens=30)
    assert (said.out, said.err) == (expected + '\n', '')


def test_a_whole_conversation_with_the_model_itself(talk, folder):
    question = 'the cat sees ' * 8
    said = talk(
        [f'--run={folder}/vision_instruct', '--max-new-tokens=7'],
        question,
        f'/image {folder}/blue.png',
        'b?',
    )
    run, picture = nanovision_jax.load(folder / 'vision_instruct'), Image.open(folder / 'blue.png')
    first = run.chat(question, max_new_tokens=7)
    second = run.chat(
        [user(question), assistant(first.strip() or '…'), user('b?', 1)], images=[picture], max_new_tokens=7
    )
    assert said.out == f'{first}\n{second}\n'


def test_a_pretrain_run_continues_text_and_says_so(talk, folder):
    argv = [f'--run={folder}/pretrain', '--max-new-tokens=30']
    expected = 'the cat sees' + ''.join(
        nanovision_jax.load(folder / 'pretrain').continue_text('the cat sees', max_new_tokens=30)
    )
    said = talk([*argv, '--prompt=the cat sees'])
    assert said.out == expected + '\n' and 'continues your text' in said.err
    assert talk(argv, 'the cat sees', 'the cat sees').out == f'{expected}\n' * 2


def test_a_picture_is_found_as_a_terminal_writes_it(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    for name in ('my cat.png', "cat's 100%.png", 'größe \U0001f408.png', '~.png', 'a\\b.png'):
        file = tmp_path / name
        file.write_bytes(b'')
        escaped = re.sub(r"([\s'\\])", r'\\\1', str(file))
        for written in (
            str(file),
            f' {file} ',
            shlex.quote(str(file)),
            f'"{file}"' if '\\' not in name else escaped,
            escaped,
            f'~/{name}',
            escaped.replace(str(tmp_path), '~'),
            file.as_uri(),
            file.as_uri().replace('file://', 'FILE://localhost'),
        ):
            assert chat.find_image(written) == str(file), written
    (tmp_path / 'quoted').mkdir()
    monkeypatch.chdir(tmp_path / 'quoted')
    for name in ("'x.png'", 'x\\ y.png'):  # a file that is called so comes first
        pathlib.Path(name).write_bytes(b'')
        assert chat.find_image(name) == name
    for none in ('', '""', '~', '/', str(tmp_path), 'x' * 5000, '\0', '\udce9.png', "it's", 'file://', 'a.png b.png'):
        with pytest.raises(UserError, match=r'^no picture '):
            chat.find_image(none)


def test_a_dragged_picture_is_shown(talk, asked, folder, tmp_path):
    shutil.copy(folder / 'red.png', tmp_path / 'my cat.png')
    argv = [f'--run={folder}/vision_instruct', f"--image='{tmp_path}/my cat.png'"]
    talk(argv, f'/image {tmp_path}/my\\ cat.png', 'two?')
    assert asked[0][1] == [RED, RED]


def test_a_picture_that_may_not_be_read_is_said(folder, monkeypatch):
    monkeypatch.setattr(pathlib.Path, 'read_bytes', refuse)  # a test may run as root, who may read everything
    with pytest.raises(UserError, match=r'red\.png cannot be read: Permission denied\.$'):
        chat.open_image(str(folder / 'red.png'))


def refuse(path):
    raise PermissionError(errno.EACCES, 'Permission denied')


def test_bytes_that_are_no_text_are_one_sentence(talk, asked, folder):
    with pytest.raises(UserError, match=r"^'h\\udce9' cannot be continued: text that is not Unicode\.$"):
        talk([f'--run={folder}/pretrain', '--prompt=h\udce9'])
    argv = [f'--run={folder}/pretrain', '--max-new-tokens=3']
    said = talk(argv, 'the cat', 'h\udce9', 'the cat').out.splitlines()
    assert said[1] == r"error: 'h\udce9' cannot be continued: text that is not Unicode." and said[0] == said[2]
    long = 'the cat sees ' * 80
    said = talk(argv, long, 'the cat').out.splitlines()
    assert said[0].startswith('error: the prompt is') and len(said) == 2


def test_broken_text_in_a_conversation_is_taken_back(talk, folder):
    argv = [f'--run={folder}/vision_instruct', '--max-new-tokens=3']
    said = talk(argv, 'h\udce9', 'the cat?').out.splitlines()
    assert said[0] == 'error: this conversation cannot be answered: text that is not Unicode.'
    assert said[1:] == talk(argv, 'the cat?').out.splitlines()
    with pytest.raises(UserError, match='text that is not Unicode'):
        talk([*argv, '--prompt=h\udce9'])


def test_a_closed_input_is_an_end(monkeypatch):
    monkeypatch.setattr(sys, 'stdin', None)
    assert list(chat.typed('you: ')) == []


def test_a_terminal_has_arrow_keys_and_a_history(tmp_path):
    pytest.importorskip('readline')
    program = 'import sys; from nanovision_jax import chat; print([*chat.typed("you: ")]); print("jax" in sys.modules)'
    main, terminal = os.openpty()
    env = os.environ | {'HOME': str(tmp_path), 'TERM': 'xterm'}
    done = subprocess.Popen([sys.executable, '-c', program], cwd=ROOT, env=env, stdin=terminal, stdout=terminal)
    os.close(terminal)
    said, keys = b'', [b'ct\x1b[Da\n', b'\x1b[A?\n', b'\x04']
    for key in [*keys, b'']:
        while select.select([main], [], [], 60)[0]:
            try:
                said += os.read(main, 4096)
            except OSError:  # the program has ended
                break
            if key and said.count(b'you: ') > keys.index(key):
                break
        os.write(main, key) if key else None
    assert done.wait(60) == 0
    assert b"['cat', 'cat?']\r\nFalse" in said and not list(tmp_path.iterdir())
    os.close(main)


def test_mistakes_are_one_sentence(talk, folder):
    pictures = [f'--image={folder}/{name}.png' for name in ('red', 'green', 'words')]
    for argv, message in (
        ([f'--run={folder}/pretrain', pictures[0]], 'is a pretrain run: talking about pictures takes a vision_'),
        ([f'--run={folder}/vision_instruct', pictures[1]], r"no picture '.*green\.png'\.$"),
        (
            [f'--run={folder}/vision_instruct', pictures[2]],
            r'words\.png: image does not decode; pictures are JPEG, PNG',
        ),
        ([f'--run={folder}/sft'], r'is no run folder: it has no config\.json\. There are: .*pretrain'),
        ([], 'arguments are required: --run'),
        ([f'--run={folder}/pretrain', '--promt=x'], "unknown argument '--promt=x'. Did you mean '--prompt'"),
        ([f'--run={folder}/pretrain', '--temperature=hot'], "invalid float value: 'hot'"),
    ):
        with pytest.raises(UserError, match=message) as error:
            talk(argv)
        assert '\n' not in str(error.value)


def test_a_mistake_ends_the_command_with_code_2(monkeypatch, capsys, folder):
    monkeypatch.setattr(sys, 'argv', ['chat', f'--run={folder}/pretrain', f'--image={folder}/green.png'])
    with pytest.raises(SystemExit) as stop:
        cli.run(chat.main)
    assert stop.value.code == 2
    assert capsys.readouterr() == ('', f"error: no picture '{folder}/green.png'.\n")


def test_help_says_how(capsys):
    with pytest.raises(SystemExit) as stop:
        chat.main(['--help'])
    assert stop.value.code == 0
    assert '/image FILE' in (said := capsys.readouterr().out) and '--max-new-tokens' in said
