"""The forms of conversations that people have: read alike from JSON, JSON lines and parquet, prepared or not."""

import base64
import json
import unicodedata

import pyarrow
import pytest
from published import IMAGE, pictures, write_jsonl, write_parquet, write_zip

from nanovision_jax.data import formats, preparation, sources
from nanovision_jax.data.conversation import BadExample, check, encode, kind_of, split_of
from nanovision_jax.data.image_names import NamedImages, fetch, name_of
from nanovision_jax.errors import UserError

STORED = pictures(8)
URI = 'data:image/jpeg;base64,' + base64.b64encode(STORED[0]).decode()
IMAGE_PART, ASK = {'type': 'image'}, {'type': 'text', 'text': 'what?'}
ANSWER = {'role': 'assistant', 'content': 'a cat'}


def message(content, role='user'):
    return {'role': role, 'content': content}


def turns(question, **more):
    return [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': 'a cat', **more}]


# name: (row, content of the first question, numbers of its pictures). a.jpg is picture 0, b.jpg picture 1.
FORMS = {
    'llava': ({'image': 'a.jpg', 'conversations': turns('<image>\nwhat?')}, [IMAGE_PART, 'what?'], [0]),
    'sharegpt': (
        {'conversations': [{'from': 'user', 'value': 'what?'}, {'from': 'assistant', 'value': 'a cat'}]},
        'what?',
        [],
    ),
    'roles in conversations': ({'conversations': [message('what?'), ANSWER]}, 'what?', []),
    'llama factory': ({'messages': [message('<image>what?'), ANSWER], 'images': ['a.jpg']}, [IMAGE_PART, 'what?'], [0]),
    'no picture': ({'messages': [message('what is <image>?'), ANSWER]}, 'what is <image>?', []),
    'nan': ({'image': float('nan'), 'images': [None, ''], 'messages': [message('what?'), ANSWER]}, 'what?', []),
    'transformers': (
        {'messages': [message([{'type': 'image', 'image': 'b.jpg'}, ASK]), ANSWER]},
        [IMAGE_PART, 'what?'],
        [1],
    ),
    'url': ({'messages': [message([{'type': 'image', 'url': 'a.jpg'}, ASK]), ANSWER]}, [IMAGE_PART, 'what?'], [0]),
    'path': ({'messages': [message([ASK, {'type': 'image', 'path': 'a.jpg'}]), ANSWER]}, ['what?', IMAGE_PART], [0]),
    'openai': (
        {'messages': [message([{'type': 'image_url', 'image_url': {'url': URI}}, ASK]), ANSWER]},
        [IMAGE_PART, 'what?'],
        [0],
    ),
    'bare url': (
        {'messages': [message([{'type': 'image_url', 'image_url': URI}, ASK]), ANSWER]},
        [IMAGE_PART, 'what?'],
        [0],
    ),
    'both': (
        {
            'messages': [message([IMAGE_PART, {'type': 'image', 'image': 'b.jpg'}, IMAGE_PART]), ANSWER],
            'images': [URI, 'b.jpg'],
        },
        [IMAGE_PART] * 3,
        [0, 1, 1],
    ),
    'folder': ({'image': 'images/a.jpg', 'conversations': turns('<image>')}, [IMAGE_PART], [0]),
    'dot': ({'image': './images\\a.jpg', 'conversations': turns('<image>')}, [IMAGE_PART], [0]),
    'ending': ({'image': 'a.gif', 'conversations': turns('<image>')}, [IMAGE_PART], [0]),
    'composed': (
        {'image': unicodedata.normalize('NFC', 'é.jpg'), 'conversations': turns('<image>')},
        [IMAGE_PART],
        [2],
    ),
    'decomposed': (
        {'image': unicodedata.normalize('NFD', 'é.jpg'), 'conversations': turns('<image>')},
        [IMAGE_PART],
        [2],
    ),
}


def parts(content):
    if isinstance(content, str):
        return content
    return [{'type': 'text', 'text': part} if isinstance(part, str) else part for part in content]


@pytest.fixture(params=['folder', 'zip', 'beside', 'zip within'])
def place(tmp_path, request):
    """A folder with the pictures in one of the places where they may lie."""
    named = {'a.jpg': STORED[0], 'b.jpg': STORED[1], unicodedata.normalize('NFD', 'é.jpg'): STORED[2]}
    if 'zip' in request.param:
        within = 'images/' if 'within' in request.param else ''
        write_zip(tmp_path / 'images.zip', {within + name: data for name, data in named.items()})
        return tmp_path
    folder = tmp_path / ('images' if request.param == 'folder' else '')
    folder.mkdir(exist_ok=True)
    for name, data in named.items():
        (folder / name).write_bytes(data)
    return tmp_path


def test_every_form_is_read_alike(place):
    rows = [{'id': name, **row} for name, (row, _, _) in FORMS.items()]
    (place / 'x.json').write_text(json.dumps(rows))
    write_jsonl(place / 'y.jsonl', rows)
    for source in (sources.Conversations(place / 'x.json'), sources.Conversations(place / 'y.jsonl')):
        for i, (name, (_, content, numbers)) in enumerate(FORMS.items()):
            example = source[i]
            assert example.id == name and example.messages == [message(parts(content)), ANSWER], name
            assert example.images == [STORED[n] for n in numbers], name
            assert len(set(zip(example.names, example.images, strict=True))) == len(set(example.names)), name


def test_prepare_reads_what_conversations_read(place):
    filler = [{'messages': [message(f'q {i}'), ANSWER]} for i in range(100)]
    write_jsonl(place / 'y.jsonl', [{'id': name, **row} for name, (row, _, _) in FORMS.items()] + filler)
    made = preparation.prepare('chat', str(place / 'y.jsonl'), str(place / 'out'))
    assert made['bad'] == 0
    read = {}
    for split in ('train', 'validation'):
        prepared = sources.Prepared(place / 'out', 'chat', split)
        read |= {example.id: example for example in (prepared[i] for i in range(len(prepared)))}
    source = sources.Conversations(place / 'y.jsonl')
    for example in (source[i] for i in range(len(FORMS))):
        assert (read[example.id].messages, read[example.id].images) == (example.messages, example.images)


def test_parquet_is_data_too(tmp_path):
    part = pyarrow.struct({'type': pyarrow.string(), 'text': pyarrow.string()})
    turn = pyarrow.struct({'role': pyarrow.string(), 'content': pyarrow.list_(part)})
    schema = {'messages': pyarrow.list_(turn), 'images': pyarrow.list_(IMAGE)}
    answer = {'role': 'assistant', 'content': [{'type': 'text', 'text': 'a cat'}]}
    rows = [
        {'messages': [message([IMAGE_PART, ASK]), answer], 'images': [{'bytes': data, 'path': 'one.jpg'}]}
        for data in STORED
    ]
    rows.append({'messages': [message([ASK]), answer], 'images': None})
    write_parquet(tmp_path / 'x.parquet', rows, schema, rows_a_group=3)
    source = sources.Conversations(tmp_path / 'x.parquet')
    assert len(source) == 9
    for i, data in enumerate(STORED):
        assert source[i].images == [data] and source[i].messages[0] == message([IMAGE_PART, ASK])
    assert len({name for i in range(8) for name in source[i].names}) == 8  # vqa tells pictures apart by name
    only = sources.Conversations(tmp_path / 'x.parquet', text_only=True)
    assert [only.number(i) for i in range(len(only))] == [8] and only[0].messages[0] == message([ASK])


def test_a_parquet_file_beyond_memory_is_for_prepare(tmp_path, monkeypatch):
    write_parquet(tmp_path / 'x.parquet', [{'a': 'b' * 999}] * 9, {'a': pyarrow.string()})
    monkeypatch.setattr(formats, 'MAX_TABLE', 10)
    with pytest.raises(UserError, match=r'of which 0 are held in memory: run .*prepare chat --from=.*x\.parquet'):
        len(sources.Conversations(tmp_path / 'x.parquet'))


def test_a_kind_is_kept(tmp_path):
    rows = [
        {'conversations': turns('what?', kind='colour')},
        {'messages': [message('what?'), ANSWER | {'kind': 'colour'}]},
    ]
    for row in rows:
        assert formats.read_row(row)[0] == [message('what?'), ANSWER | {'kind': 'colour'}]


@pytest.mark.parametrize(
    'row',
    [
        {'conversations': [{'from': 'system', 'value': 'Be brief.'}, *turns('what?')]},
        {'conversations': turns('what?'), 'system': 'Be brief.'},
        {'messages': [message('Be brief.', 'system'), message('what?'), ANSWER]},
        {'messages': [message([{'type': 'text', 'text': 'Be brief.'}], 'system'), message('what?'), ANSWER]},
    ],
)
def test_a_system_message_is_passed_on(row):
    messages, _ = formats.read_row(row)
    assert [one['role'] for one in messages] == ['system', 'user', 'assistant']
    assert messages[0]['content'] in ('Be brief.', [{'type': 'text', 'text': 'Be brief.'}])


def test_a_system_message_has_its_place_and_no_picture():
    for messages in ([message('a'), message('b', 'system')], [message('a', 'system'), message('b', 'system')]):
        with pytest.raises(BadExample, match='system speaks out of turn'):
            check(messages)
    with pytest.raises(BadExample, match='a picture in a system message'):
        check([message([IMAGE_PART], 'system')])


def test_the_first_question_decides_the_side_whatever_the_system_message():
    sides = []
    for head in ([], [message('Be brief.', 'system')], [message('Be kind.', 'system')]):
        sides.append([split_of([*head, message(f'question {i}'), ANSWER], []) for i in range(200)])
    assert sides[0] == sides[1] == sides[2] and set(sides[0]) == {'train', 'validation'}


@pytest.mark.parametrize('lost', [[None], [], '', None, float('nan'), {'bytes': None, 'path': None}])
@pytest.mark.parametrize('key', ['image', 'images'])
def test_a_question_whose_picture_is_lost_is_no_text(lost, key):
    """A column of pictures makes <image> a place, whatever it holds in this row."""
    row = {'messages': [message('<image>\nwhat?'), ANSWER], key: lost}
    messages, references = formats.read_row(row)
    assert messages[0]['content'] == parts([IMAGE_PART, 'what?']) and references == []
    with pytest.raises(BadExample, match='1 image places for 0 images'):
        encode(messages, None)
    row['messages'][0] = message('what?')
    assert formats.read_row(row) == ([message('what?'), ANSWER], []) and not formats.has_images(row)


def test_a_part_of_nothing_carries_no_picture():
    part = {'type': 'image', 'image': {'bytes': None, 'path': None}}
    assert formats.read_row({'messages': [message([part]), ANSWER], 'images': ['a.jpg']})[1] == ['a.jpg']


def test_what_a_row_asks_for_and_is_not_supported_is_named():
    row = {'messages': [message('what?'), ANSWER]}
    for system in (3, ['Be brief.'], {'text': 'Be brief.'}):
        with pytest.raises(BadExample, match=r'^a system that is no text$'):
            formats.read_row(row | {'system': system})
    for key in ('video', 'videos', 'audio', 'audios'):
        for value in ('a.mp4', ['a.mp4'], {'path': 'a.mp4'}):
            with pytest.raises(BadExample, match=f'^a row with {key}, which is not supported$'):
                formats.read_row(row | {key: value})
    for weight in (0, 0.0):
        with pytest.raises(BadExample, match=r'^an answer with weight 0: .* not supported$'):
            formats.read_row({'messages': [message('what?'), ANSWER | {'weight': weight}]})
    # What says nothing asks for nothing.
    row['messages'] = [message('what?') | {'weight': 0}, ANSWER | {'weight': 1}]
    for nothing in (None, '', float('nan')):
        assert formats.read_row(row | {'system': nothing, 'videos': [nothing], 'audio': nothing}) == (
            [message('what?'), ANSWER],
            [],
        )


@pytest.mark.parametrize('role', ['tool', 'function', 'observation', 'function_call'])
def test_tools_are_refused_by_name(role):
    for row in ({'messages': [message('x', role)]}, {'conversations': [{'from': role, 'value': 'x'}]}):
        with pytest.raises(BadExample, match=f'the role {role} belongs to tools, which are not supported'):
            formats.read_row(row)


TALK = [{'conversations': turns('what?')}] * 3


@pytest.mark.parametrize(
    'data, told',
    {
        json.dumps(
            [{'instruction': 'a', 'input': '', 'output': 'b'}]
        ): 'in the form of Alpaca.* the forms taken are con',
        json.dumps({'instruction': 'a', 'output': 'b'}) + '\n{}': 'in the form of Alpaca',
        json.dumps([{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}]): 'in the form of preferences',
        json.dumps({'data': TALK}): "a JSON object with the rows under 'data': write that list alone to a file",
        json.dumps({'version': '1', 'data': TALK}, indent=1): "a JSON object with the rows under 'data'",
        json.dumps(TALK[0], indent=1): 'a JSON object of several lines: write each row on a line of its own',
        ''.join(json.dumps(row) + '\n' for row in TALK).encode('utf-16'): 'is not UTF-8 text: .* iconv -f UTF-16',
        json.dumps(TALK).encode('utf-16-le'): 'is not UTF-8 text: .* iconv -f UTF-16',
    }.items(),
)
def test_another_form_is_named_at_once(tmp_path, data, told):
    (tmp_path / 'x.json').write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(UserError, match=told) as caught:
        len(sources.Conversations(tmp_path / 'x.json'))
    assert '\n' not in str(caught.value)
    with pytest.raises(UserError, match=told):
        preparation.prepare('chat', str(tmp_path), str(tmp_path / 'out'))


def test_reasons_of_one_kind_are_one():
    for one, other in (
        ("missing image 'a.jpg'", 'missing image "b\'s.jpg"'),
        ("image 'a' cannot be read from the zip file", "image 'b' cannot be read from the zip file"),
        ('image of 9000 × 80 pixels', 'image of 20 × 17000 pixels'),
    ):
        assert kind_of(one) == kind_of(other)
    assert kind_of('the role tool belongs') != kind_of('the role function belongs')


def test_a_link_to_pictures_elsewhere_is_followed_where_it_is_the_folder(tmp_path):
    (tmp_path / 'far').mkdir()
    (tmp_path / 'far/a.jpg').write_bytes(STORED[0])
    (tmp_path / 'near').mkdir()
    (tmp_path / 'near/images').symlink_to(tmp_path / 'far')
    for name in ('a.jpg', 'images/a.jpg'):
        assert NamedImages(tmp_path / 'near').read(name) == STORED[0]
    (tmp_path / 'secret.jpg').write_bytes(STORED[0])
    with pytest.raises(BadExample, match='leaves the folder'):
        NamedImages(tmp_path / 'near').read('../secret.jpg')


def test_the_picture_of_the_named_zip_comes_first(tmp_path):
    write_zip(tmp_path / 'backup.zip', {'a.jpg': STORED[1], 'deep/c.jpg': STORED[3]})
    write_zip(tmp_path / 'images.zip', {'a.jpg': STORED[0]})
    assert NamedImages(tmp_path).read('a.jpg') == STORED[0] and NamedImages(tmp_path).read('c.jpg') == STORED[3]
    assert NamedImages(tmp_path / 'backup.zip').read('images/a.jpg') == STORED[1]


@pytest.mark.parametrize('name', ['images/', 'images\\', 'images/.', '.', './', '..', 'images/..', '/', '//', 'a/..'])
def test_the_name_of_a_folder_is_no_picture(tmp_path, name):
    for place in ('images', 'a'):
        (tmp_path / place).mkdir()
    write_zip(tmp_path / 'more.zip', {'images/b.jpg': STORED[0]})
    for near in (NamedImages(tmp_path), NamedImages(tmp_path / 'more.zip')):
        with pytest.raises(BadExample, match=r'missing image|leaves the folder'):
            near.read(name)
        near.stamp_of([name])


def damage(file):
    """A zip file whose directory is no directory, though its end tells where one is."""
    write_zip(file, {'b.jpg': STORED[1]})
    file.write_bytes(file.read_bytes().replace(b'PK\1\2', b'PK\7\7'))


@pytest.mark.parametrize('make', [damage, lambda file: file.write_bytes(b'PK'), lambda file: file.mkdir()])
@pytest.mark.parametrize('place', ['images.zip', 'other.zip', 'deep/other.zip', '._other.zip'])
def test_a_damaged_zip_nearby_is_told_where_a_picture_is_missing(tmp_path, make, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    make(tmp_path / place)
    (tmp_path / 'a.jpg').write_bytes(STORED[0])
    write_zip(tmp_path / 'whole.zip', {'c.jpg': STORED[2]})
    rows = [FORMS[name][0] for name in ('sharegpt', 'llava')]
    write_jsonl(tmp_path / 'x.jsonl', [*rows, {'image': 'b.jpg', 'conversations': turns('<image>')}])
    source = sources.Conversations(tmp_path / 'x.jsonl')
    assert source.key and source[0].images == [] and source[1].images == [STORED[0]]
    assert NamedImages(tmp_path).read('c.jpg') == STORED[2]
    told = f', and {place} is a damaged zip file' if (tmp_path / place).is_file() and place[0] != '.' else ''
    with pytest.raises(BadExample) as caught:
        source[2]
    assert str(caught.value) == "missing image 'b.jpg'" + told


def test_a_damaged_zip_that_is_named_is_one_sentence(tmp_path):
    damage(tmp_path / 'b.zip')
    with pytest.raises(UserError, match=r'b\.zip is a damaged zip file: '):
        NamedImages(tmp_path / 'b.zip').read('b.jpg')
    write_jsonl(tmp_path / 'x.jsonl', [FORMS['llava'][0]])
    with pytest.raises(UserError, match=r'b\.zip is a damaged zip file: '):
        print(sources.Conversations(tmp_path / 'x.jsonl', tmp_path / 'b.zip').key)


def test_a_picture_is_found_by_its_uri(tmp_path):
    for name, data in {'a b.jpg': STORED[0], 'c%20d.jpg': STORED[1]}.items():
        (tmp_path / name).write_bytes(data)
    root = tmp_path.as_posix()
    for uri, data in {
        f'file://{root}/a%20b.jpg': STORED[0],
        f'FILE://{root}/a b.jpg': STORED[0],
        f'file://{root}/c%2520d.jpg': STORED[1],
        f'file://{root}/c%20d.jpg': STORED[1],
        'file://a%20b.jpg': STORED[0],
    }.items():
        assert fetch(uri, NamedImages(tmp_path)) == data, uri
    with pytest.raises(BadExample, match='missing image'):
        fetch('a%20b.jpg', NamedImages(tmp_path))  # no URI
    with pytest.raises(BadExample, match='on the web'):
        fetch('http://a.b/a%20b.jpg', NamedImages(tmp_path))


def test_base64_may_have_line_breaks_and_any_case_before_it():
    broken = base64.encodebytes(STORED[0]).decode()
    assert broken.count('\n') > 2
    for uri in (URI, 'DATA' + URI[4:], 'data:image/jpeg;base64,' + broken, 'Data:;base64,\r\n' + broken):
        assert fetch(uri, None) == STORED[0] and name_of(uri, 'other') == 'other'
    with pytest.raises(BadExample, match='no base64'):
        fetch(URI + '!', None)


def test_the_stamp_tells_which_pictures_are_there(tmp_path):
    (tmp_path / 'a.jpg').write_bytes(STORED[0])
    stamps = [NamedImages(tmp_path).stamp_of(['a.jpg', 'c.jpg'])]
    (tmp_path / 'unrelated.jpg').write_bytes(STORED[0])
    assert NamedImages(tmp_path).stamp_of(['a.jpg', 'c.jpg']) == stamps[0]
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images/c.png').write_bytes(STORED[2])
    stamps.append(NamedImages(tmp_path).stamp_of(['a.jpg', 'c.jpg']))
    write_zip(tmp_path / 'images.zip', {'c.jpg': STORED[3]})
    stamps.append(NamedImages(tmp_path).stamp_of(['a.jpg', 'c.jpg']))
    assert len(set(stamps)) == 3
