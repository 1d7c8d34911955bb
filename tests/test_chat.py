"""The terminal: conversations, pictures at any turn, one prompt, text to continue, and mistakes in one sentence."""

import copy
import io
import sys

import pytest
import tiny
from PIL import Image

import nanovision_jax
from nanovision_jax import chat, errors, inference
from nanovision_jax.errors import UserError


@pytest.fixture(scope='module')
def folder(tmp_path_factory, tokenizer):
    """Two runs, two pictures, and a file that is none."""
    folder = tmp_path_factory.mktemp('runs')
    for stage in ('pretrain', 'vision_instruct'):
        tiny.run_folder(folder / stage, stage, tokenizer)
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
        f'error: {folder}/words.png: image does not decode; pictures are JPEG, PNG, WEBP.',
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
        errors.run(chat.main)
    assert stop.value.code == 2
    assert capsys.readouterr() == ('', f"error: no picture '{folder}/green.png'.\n")


def test_help_says_how(capsys):
    with pytest.raises(SystemExit) as stop:
        chat.main(['--help'])
    assert stop.value.code == 0
    assert '/image FILE' in (said := capsys.readouterr().out) and '--max-new-tokens' in said
