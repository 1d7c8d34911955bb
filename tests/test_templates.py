"""Chat templates as data: recognised by what they print, written as ids and as Jinja alike, learned as both say."""

import hashlib
import json
import random

import foreign
import numpy as np
import pytest
import tokenizers
import transformers
from conftest import parse, sentence

from nanovision_jax.data import conversation, index, sandbox, sources, templates
from nanovision_jax.data.tokenizer import SPECIAL, Tokenizer, import_tokenizer
from nanovision_jax.errors import UserError

FAMILIES = tuple(foreign.FAMILIES)
DATES = 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n'


@pytest.fixture(scope='module')
def folders(tokenizer_folder, tmp_path_factory):
    """A function family → (the published folder, ours made from it); 'own' has none to be made from."""
    made, root = {'own': (None, tokenizer_folder)}, tmp_path_factory.mktemp('foreign')

    def get(family):
        if family not in made:
            theirs = foreign.make(family, root / family, tokenizer_folder)
            import_tokenizer(str(theirs), root / f'{family}-ours')
            made[family] = theirs, root / f'{family}-ours'
        return made[family]

    return get


def talk(rng, words, turns, system=False):
    messages = [{'role': 'system', 'content': words(rng)}] if system else []
    for _ in range(turns):
        messages += [{'role': 'user', 'content': words(rng)}, {'role': 'assistant', 'content': words(rng) + 'x'}]
    return messages


def plain(rng):
    """Words with white space in all the wrong places, and no special strings."""
    return rng.choice(['', ' ', '\n', '\n\n', '\t']) + sentence(rng, 0, 5) + rng.choice(['', ' ', '\n', ' \n\n'])


def hostile(tokenizer):
    """A function rng → text that is full of special strings, whole and in pieces."""
    controls = [*tokenizer.controls, *SPECIAL, '<think>']

    def words(rng):
        pieces = [*rng.choices(controls, k=3), *(token[: rng.randint(1, 4)] for token in rng.choices(controls, k=2))]
        pieces += [
            rng.choice(['{{ 1 }}', '{% raw %}', '\u200b', '\xa0', 'é', '👋', "'", '\\n', '\r\n']),
            plain(rng),
            plain(rng),
        ]
        rng.shuffle(pieces)
        return ''.join(pieces)

    return words


def hostile_to_ours(rng):
    pieces = [
        *rng.choices([*SPECIAL, '<|us', 'er|>', '<', '\u200b', '\xa0', 'é', '👋', '{{ x }}', '\r\n'], k=4),
        plain(rng),
        plain(rng),
    ]
    rng.shuffle(pieces)
    return ''.join(pieces)


def parts(rng, message):
    """The same message with its words in parts and pictures between them; and how many pictures."""
    content = [{'type': 'text', 'text': word} for word in message['content'].split(' ')]
    shown = rng.randint(0, 2) if message['role'] == 'user' else 0
    for _ in range(shown):
        content.insert(rng.randint(0, len(content)), {'type': 'image'})
    return message | {'content': content}, shown


# Recognising ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('family', FAMILIES)
def test_what_a_published_template_prints_is_what_we_encode(family, folders):
    theirs, ours = folders(family)
    mine, fast, rng = Tokenizer(ours), transformers.AutoTokenizer.from_pretrained(theirs), random.Random(1)
    options = {'tokenize': True, 'return_dict': False, 'enable_thinking': False, 'date_string': '26 Jul 2024'}
    for number in range(100):
        messages = talk(rng, plain, 1 + number % 3, system=number % 2 == 1)
        assert conversation.encode(messages, mine).ids.tolist() == fast.apply_chat_template(messages, **options)
        asked = conversation.encode(messages[:-1], mine, question=True).ids.tolist()
        assert asked == fast.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)


def test_the_data_of_the_families(folders):
    found = {family: Tokenizer(folders(family)[1]).template for family in FAMILIES}
    assert found['smollm2'].default_system == 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'
    assert found['qwen2'].default_system == 'You are a helpful assistant.'
    assert found['qwen2.5'].default_system.startswith('You are Qwen, ')
    assert found['qwen3'].default_system is None and found['qwen3'].opening == '<think>\n\n</think>\n\n'
    assert found['llama3'].default_system is None and found['llama3'].trim
    assert found['llama3.1'] == found['llama3.2']
    assert found['llama3.1'].default_system == '' and found['llama3.1'].system[0].endswith(DATES)
    assert len({template.digest for template in found.values()}) == 6
    for family in FAMILIES:
        assert Tokenizer(folders(family)[1]).template == templates.read(folders(family)[1]) != templates.OWN


@pytest.mark.parametrize('family', FAMILIES)
def test_an_answer_ends_where_the_template_ends_it_or_leaves_its_turn(family, folders):
    mine = Tokenizer(folders(family)[1])
    said = [mine.decode([i], special=True) for i in mine.stops]
    ends = {'l': ['<|eot_id|>', '<|eom_id|>', '<|end_of_text|>']}.get(family[0], ['<|im_end|>', '<|endoftext|>'])
    turns = ['<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>'] if family[0] == 'l' else ['<|im_start|>']
    assert said[: len(ends)] == ends and set(said) == {*ends, *turns, '<|image|>'}
    assert mine.end == mine.stops[0] and mine.end_of_text == mine.encode_documents([''])[0]
    document = '<|begin_of_text|>' if family[0] == 'l' else '<|endoftext|>'
    assert mine.decode([mine.end_of_text], special=True) == document
    assert mine.user is mine.assistant is None


@pytest.mark.parametrize('family', FAMILIES)
def test_only_the_picture_s_token_is_added(family, folders):
    theirs, ours = (json.loads((folder / 'tokenizer.json').read_text()) for folder in folders(family))
    before, after = ({token['content']: token['id'] for token in content['added_tokens']} for content in (theirs, ours))
    assert after.items() - before.items() == {
        ('<|image|>', max(*theirs['model']['vocab'].values(), *before.values()) + 1)
    }
    assert before.items() <= after.items() and theirs['model']['vocab'].items() <= ours['model']['vocab'].items()
    assert ours['model']['merges'] == theirs['model']['merges']


def test_a_tokenizer_without_a_template_gets_ours_and_so_does_one_that_is_told_to(tokenizer_folder, tmp_path):
    bare = foreign.make('qwen2', tmp_path / 'bare', tokenizer_folder, template=False)
    import_tokenizer(str(bare), tmp_path / 'a')
    import_tokenizer(str(foreign.make('llama3', tmp_path / 'full', tokenizer_folder)), tmp_path / 'b', template='own')
    for name in 'ab':
        mine = Tokenizer(tmp_path / name)
        assert mine.template == templates.OWN and not (tmp_path / name / 'template.json').exists()
        assert set(SPECIAL) <= set(mine.controls)


def test_our_own_template_is_known_by_its_first_text_too(tokenizer_folder, tmp_path):
    """Which refuses a system message; and its digest, which stands in the lineage of older runs, means the same."""
    assert hashlib.sha256(FIRST.encode()).hexdigest() in templates.OWN.former
    raw = tokenizers.Tokenizer.from_file(str(tokenizer_folder / 'tokenizer.json'))
    assert templates.recognise(FIRST, {}, lambda text: raw.encode(text).ids) == templates.OWN
    now = (tokenizer_folder / 'chat_template.jinja').read_text()
    assert templates.recognise(now, {}, lambda text: raw.encode(text).ids) == templates.OWN
    assert templates.CHATML.former == ()


# What older code stored beside its tokenizers.
FIRST = (
    "{%- macro write(text) -%}{{ text | replace('<|endoftext|>', '<\\u200b|endoftext|>') | "
    "replace('<|user|>', '<\\u200b|user|>') | replace('<|assistant|>', '<\\u200b|assistant|>"
    "') | replace('<|end|>', '<\\u200b|end|>') | replace('<|image|>', '<\\u200b|image|>') | "
    "trim }}{%- endmacro -%}{{- '<|endoftext|>' -}}{%- for message in messages -%}{%- if m"
    "essage.role not in ('user', 'assistant') -%}{{- raise_exception('unknown speaker: ' +"
    " message.role) -}}{%- endif -%}{{- '<|' + message.role + '|>' -}}{%- if message.conte"
    'nt is string -%}{{- write(message.content) -}}{%- else -%}{%- set so_far = namespace('
    "text='') -%}{%- for part in message.content -%}{%- if part.type == 'image' -%}{{- wri"
    "te(so_far.text) + '<|image|>' -}}{%- set so_far.text = '' -%}{%- else -%}{%- set so_f"
    "ar.text = so_far.text + '\\n' + part.text -%}{%- endif -%}{%- endfor -%}{{- write(so_f"
    "ar.text) -}}{%- endif -%}{{- '<|end|>' -}}{%- endfor -%}{%- if add_generation_prompt "
    "-%}{{- '<|assistant|>' -}}{%- endif -%}"
)

ALMOST = {
    'another name for the user': foreign.CHATML.replace("m.role + '\n'", "m.role.replace('user', 'human') + '\n'"),
    'no new line behind a turn': foreign.CHATML.replace('<|im_end|>\n', '<|im_end|>'),
    'a thought is opened': foreign.CHATML.replace("assistant\n' -}}", "assistant\n<think>\n' -}}"),
    'answers are changed': foreign.CHATML.replace('m.content', "(m.content | replace('Two', '2'))"),
    'the system is refused': "{{ raise_exception('no') if messages[0].role == 'system' }}" + foreign.CHATML,
    'no Jinja': '{% for',
    'never ends': '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}' + foreign.CHATML,
    'all the memory': "{% set a = 'x' * 10 ** 10 %}" + foreign.CHATML,
    'out of the sandbox': "{{ ''.__class__.__mro__[1].__subclasses__() }}" + foreign.CHATML,
    'an import': "{% include '/etc/passwd' %}" + foreign.CHATML,
}


@pytest.mark.parametrize('why', ALMOST)
def test_an_unknown_template_is_one_sentence(why, tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, 'SECONDS', 3)
    theirs = foreign.make('qwen2', tmp_path / 'theirs', tokenizer_folder, template=ALMOST[why])
    with pytest.raises(  # the endless one too: without a bound this would take days
        UserError, match=r'^the chat template of .* is neither ChatML .*--config\.data\.template=own'
    ) as told:
        import_tokenizer(str(theirs), tmp_path / 'ours')
    assert '\n' not in str(told.value) and not (tmp_path / 'ours').exists()
    import_tokenizer(str(theirs), tmp_path / 'ours', template='own')
    assert Tokenizer(tmp_path / 'ours').template == templates.OWN


def test_a_damaged_template_file_is_one_sentence(folders, tmp_path):
    content = json.loads((folders('qwen2')[1] / 'template.json').read_text())
    changes = [
        {'user': ['x']},
        {'ends': []},
        {'ends': ['<|other|>']},
        {'begin': 3},
        {'more': 1},
        {'system': 'x'},
        {'user': 3},
    ]
    for text in ('', '{', '[]', '{}', '3', *(json.dumps(content | change) for change in changes)):
        (tmp_path / 'template.json').write_text(text)
        with pytest.raises(UserError, match=r'template\.json is no chat template'):
            templates.read(tmp_path)


# Ids and Jinja -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('family', ('own', *FAMILIES))
def test_the_stored_jinja_gives_our_ids_and_marks_what_we_learn(family, folders):
    """For hostile conversations too, with words in parts and with pictures."""
    mine, fast = Tokenizer(folders(family)[1]), transformers.AutoTokenizer.from_pretrained(folders(family)[1])
    rng, words, turn = random.Random(2), hostile(mine), {}
    for number in range(200):
        messages, pictures = talk(rng, plain if number % 4 == 0 else words, 1 + number % 3, system=number % 2 == 1), 0
        if number % 3 == 0:
            messages, shown = zip(*(parts(rng, message) for message in messages), strict=True)
            messages, pictures = list(messages), sum(shown)
        found = fast.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, learned, ends, _ = conversation.encode(messages, mine, [1] * pictures)
        assert found['input_ids'] == ids.tolist()
        assert found['assistant_masks'] == learned.astype(int).tolist()
        assert ids.dtype == np.int32 and learned.dtype == bool and len(ends) == 1 + number % 3 and ends[-1] == len(ids)
        asked = fast.apply_chat_template(messages[:-1], tokenize=True, return_dict=False, add_generation_prompt=True)
        assert asked == conversation.encode(messages[:-1], mine, [1] * pictures, question=True).ids.tolist()
        # Nothing that was said is a special token: they are as many as in a conversation of harmless words.
        shape = len(messages), number % 2, pictures
        turn.setdefault(shape, np.isin(ids, mine.special).sum())
        assert np.isin(ids, mine.special).sum() == turn[shape]


@pytest.mark.parametrize('family', ('own', *FAMILIES))
def test_answers_and_their_ends_are_learned(family, folders):
    mine = Tokenizer(folders(family)[1])
    messages = talk(random.Random(3), lambda rng: sentence(rng), 3, system=True)
    ids, learned, ends, _ = conversation.encode(messages, mine)
    end = mine.decode([mine.end], special=True)
    assert mine.decode(ids[learned], special=True) == ''.join(f'{m["content"]}{end}' for m in messages[2::2])
    cut, marks, _ = conversation.fit((ids, learned, ends, [0, 0, 0]), ends[1])
    assert cut.tolist() == ids[: ends[1]].tolist() and mine.decode(cut[marks], special=True).count(end) == 2


def test_words_that_merge_with_what_stands_before_them(folders):
    """'assistant\\n' and an answer that begins with a new line are read as one text, as the stored Jinja has them."""
    mine = Tokenizer(folders('smollm2')[1])
    merged = mine.template.turns([{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': '\nb'}], str)
    ids, learned = mine.tokenize(list(merged)[-1])
    raw = tokenizers.Tokenizer.from_file(str(mine.folder / 'tokenizer.json'))
    whole = raw.encode('assistant\n\nb', add_special_tokens=False).ids
    assert ids.tolist()[1 : 1 + len(whole)] == whole
    assert mine.decode(ids[learned], special=True).endswith('\nb<|im_end|>')


@pytest.mark.parametrize('family', ('own', *FAMILIES))
def test_a_cut_conversation_is_the_conversation_that_is_left(family, folders):
    """Qwen3 writes its last answer otherwise than those before it: after a cut that is another answer."""
    tokenizer, rng = Tokenizer(folders(family)[1]), random.Random(11)
    config = parse('sft', 'data.length=64')
    for _ in range(30):
        messages = talk(rng, lambda rng: sentence(rng, 1, 12), 4)
        config.data.length = len(conversation.encode(messages, tokenizer).ids) * 2 // 3
        try:
            ids, learned, _ = index.encode_example(sources.Example('', messages, [], []), config, tokenizer)
        except conversation.TooLong:
            continue
        left = [conversation.encode(messages[: 2 * n], tokenizer) for n in range(1, 5)]
        fitting = [encoded for encoded in left if len(encoded.ids) <= config.data.length + 1]
        assert ids.tolist() == fitting[-1].ids.tolist() and learned.tolist() == fitting[-1].learned.tolist()


def test_our_own_template_gives_the_ids_it_always_gave(tokenizer):
    rng, digest = random.Random(9), hashlib.sha256()
    for number in range(300):
        messages, pictures = talk(rng, hostile_to_ours, 1 + number % 3), 0
        if number % 2:
            messages, shown = zip(*(parts(rng, message) for message in messages), strict=True)
            messages, pictures = list(messages), sum(shown)
        ids, learned, ends, _ = conversation.encode(messages, tokenizer, [3] * pictures)
        digest.update(repr((ids.tolist(), learned.tolist(), ends)).encode())
        digest.update(
            repr(conversation.encode(messages[:-1], tokenizer, [3] * pictures, question=True).ids.tolist()).encode()
        )
    assert digest.hexdigest() == 'f20e984062c91eb9c675edfb7adb7295debaddabbaddff80bd9c9fb4166cd4a1'


# The system's words --------------------------------------------------------------------------------------------------


def test_our_template_puts_the_system_s_words_before_the_first_question(tokenizer):
    system = {'role': 'system', 'content': ' Be <|user|> brief. '}
    rest = talk(random.Random(4), lambda rng: sentence(rng), 2)
    first = rest[0] | {'content': f'Be <|user|> brief.\n\n{rest[0]["content"]}'}
    wanted = conversation.encode([first, *rest[1:]], tokenizer)
    found = conversation.encode([system, *rest], tokenizer)
    assert found.ids.tolist() == wanted.ids.tolist() and found.learned.tolist() == wanted.learned.tolist()
    assert conversation.encode([system | {'content': ' \n'}, *rest], tokenizer).ids.tolist() == (
        conversation.encode(rest, tokenizer).ids.tolist()
    )


@pytest.mark.parametrize('family', FAMILIES)
def test_a_system_message_takes_the_place_of_the_default(family, folders):
    mine = Tokenizer(folders(family)[1])
    rest = [{'role': 'user', 'content': 'a cat'}]
    ids = conversation.encode([{'role': 'system', 'content': 'the dog'}, *rest], mine, question=True).ids
    text = mine.decode(ids, special=True)
    assert text.count('the dog') == text.count('system') == 1
    assert (
        mine.template.default_system == ''
        or not mine.template.default_system
        or mine.template.default_system not in text
    )


def test_the_stored_jinja_refuses_tools_and_a_late_system(folders):
    fast = transformers.AutoTokenizer.from_pretrained(folders('llama3.1')[1])
    for role, why in (('ipython', 'the role ipython belongs to tools'), ('system', 'out of turn'), ('bot', 'unknown')):
        with pytest.raises(Exception, match=why):
            fast.apply_chat_template([{'role': 'user', 'content': 'a'}, {'role': role, 'content': 'b'}])
