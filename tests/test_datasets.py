"""The builders: every published form is read as it is, and the damage that users met is counted and not a crash."""

import base64
import json

import pyarrow
import pytest
from conftest import is_held_out
from published import (
    CAULDRON,
    FINEVISION,
    IMAGE,
    MAGPIE,
    RATINGS,
    asked,
    llava_rows,
    magpie_rows,
    pictures,
    png,
    said,
    write_jsonl,
    write_parquet,
    write_zip,
)

from nanovision_jax.data import preparation, sources
from nanovision_jax.data.conversation import BadExample
from nanovision_jax.data.datasets import files
from nanovision_jax.data.image_names import NamedImages
from nanovision_jax.errors import UserError


def prepare(name, folder, **options):
    """(what source.json says, {id: Example} of all, {id: split}, the rows of bad_rows.jsonl)."""
    output = folder.parent / f'{folder.name}-data'
    made = preparation.prepare(name, str(folder), str(output), **options)
    found, splits = {}, {}
    for split in ('train', 'validation'):
        source = sources.Prepared(output, name, split)
        for example in (source[i] for i in range(len(source))):
            found[example.id], splits[example.id] = example, split
    bad = [json.loads(line) for line in (output / name / '1.0.0' / 'bad_rows.jsonl').read_text().splitlines()]
    return made, found, splits, bad


@pytest.fixture(scope='module')
def stored():
    return pictures(50)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'raw').mkdir()
    return tmp_path / 'raw'


# LLaVA's captions ----------------------------------------------------------------------------------------------------


def test_llava_pretrain_with_all_its_damage(folder, stored):
    rows, members = llava_rows(900, stored)
    names = list(members)
    damage = {
        5: ("missing image 'GCC_train_none.jpg'", {'image': 'GCC_train_none.jpg'}),
        99: ('image does not decode', {}),  # its JPEG is cut off below
        200: ('empty answer', {'conversations': asked('<image>\nWhat?', ' ')}),
        333: (
            "unknown speaker 'narrator'",
            {'conversations': [{'from': 'narrator', 'value': 'x'}, *asked('<image>\nWhat?')]},
        ),
        400: ('user speaks out of turn', {'conversations': [*asked('<image>\nA?')[:1], *asked('B?')]}),
        500: ('no answer', {'conversations': asked('<image>\nWhat?')[:1]}),
        600: ('1 image places for 0 images', {'image': None}),
        700: ('a turn without text', {'conversations': [{'from': 'human', 'value': None}]}),
    }
    for i, (_, change) in damage.items():
        rows[i] |= change
    members[names[99]] = members[names[99]][:-40]
    wrong = png(stored[1])
    del members[names[300]]
    members['GCC_train_000000300.png'] = wrong  # the row says .jpg
    rows[301] |= {'image': names[:2], 'conversations': asked('<image>\n<image>\nWhat differs?', 'all')}
    (folder / 'chat.json').write_text(json.dumps(rows))
    write_zip(folder / 'images.zip', members)
    made, found, splits, bad = prepare('llava_pretrain', folder)

    assert bad == [{'row': f'chat.json:{i}', 'reason': reason} for i, (reason, _) in damage.items()]
    assert made['reasons'] == {reason.split(" '")[0]: 1 for reason, _ in damage.values()}
    assert (made['rows'], made['bad'], made['pictures']) == (900, 8, 893)
    assert set(found) == {row['id'] for i, row in enumerate(rows) if i not in damage}
    for i, row in enumerate(rows):
        if i in damage or i in (300, 301):
            continue
        example = found[row['id']]
        text = {'type': 'text', 'text': 'Describe the image.'}
        assert example.messages == [
            {'role': 'user', 'content': [text, {'type': 'image'}]},
            {'role': 'assistant', 'content': f'caption {i}'},
        ]
        assert example.images == [members[row['image']]]
        assert (splits[row['id']] == 'validation') == is_held_out(example.images[0])
    assert found[rows[300]['id']].images == [wrong]  # to the last byte
    assert found[rows[301]['id']].images == [members[name] for name in names[:2]]
    parts = found[rows[301]['id']].messages[0]['content']
    assert [part['type'] for part in parts] == ['image', 'image', 'text']


def test_llava_pretrain_558k_in_folders(folder, stored):
    rows = [
        {'id': f'{i:09d}', 'image': f'{i // 10:05d}/{i:09d}.jpg', 'conversations': asked('<image>\nSay.', f'c {i}')}
        for i in range(50)
    ]
    (folder / 'blip_laion_cc_sbu_558k.json').write_text(json.dumps(rows))
    for row, data in zip(rows, stored, strict=True):
        file = folder / 'images' / row['image']
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    made, found, splits, bad = prepare('llava_pretrain', folder)
    assert not bad and {name: example.images for name, example in found.items()} == {
        row['id']: [data] for row, data in zip(rows, stored, strict=True)
    }
    assert (made['train'], made['validation']) == (45, 5)
    assert sorted(splits.values()).count('validation') == 5


# LLaVA's conversations -----------------------------------------------------------------------------------------------


def test_the_665k_mix_reads_every_publishers_files(folder, stored):
    coco, gqa, vg, vg2, text = stored[:5]
    write_zip(folder / 'coco/train2017.zip', {'train2017/000000033471.jpg': coco})
    write_zip(folder / 'gqa/images.zip', {'images/2.jpg': gqa})
    write_zip(folder / 'vg/images.zip', {'VG_100K/2.jpg': vg})  # another picture of the same name
    write_zip(folder / 'vg/images2.zip', {'VG_100K_2/2.jpg': vg2})
    write_zip(folder / 'textvqa/train_val_images.zip', {'train_images/a2b9.jpg': text, 'train_images/x.txt': b'no'})
    (folder / 'ocr_vqa/images').mkdir(parents=True)
    (folder / 'ocr_vqa/images/140031996.gif').write_bytes(stored[5])  # a JPEG, whatever it is called
    (folder / 'ocr_vqa/images/140031997.jpg').write_bytes(stored[6])
    wanted = {
        'coco/train2017/000000033471.jpg': coco,
        'gqa/images/2.jpg': gqa,
        'vg/VG_100K/2.jpg': vg,
        'vg/VG_100K_2/2.jpg': vg2,
        'textvqa/train_images/a2b9.jpg': text,
        'ocr_vqa/images/140031996.jpg': stored[5],
        'ocr_vqa/images/140031997.gif': stored[6],
    }
    rows = [{'id': f'{i}', 'image': name, 'conversations': asked('<image>\nA?')} for i, name in enumerate(wanted)]
    rows += [{'id': f'text{i}', 'model': '', 'conversations': asked(f'q {i}?')} for i in range(100)]
    (folder / 'llava_v1_5_mix665k.json').write_text(json.dumps(rows))
    made, found, _, bad = prepare('llava_instruct', folder)
    assert not bad and made['pictures'] == 7 and len(found) == 107
    for i, data in enumerate(wanted.values()):
        assert found[str(i)].images == [data]
    assert found['text7'].messages == said('q 7?') and found['text7'].images == []


def test_the_150k_finds_cocos_pictures(folder, stored):
    rows = [
        {'id': f'{i:012d}', 'image': f'{i:012d}.jpg', 'conversations': asked('A?\n<image>') + asked('B?')}
        for i in range(50)
    ]
    (folder / 'llava_instruct_150k.json').write_text(json.dumps(rows))
    members = {f'train2017/{i:012d}.jpg': data for i, data in enumerate(stored)}
    write_zip(folder / 'train2017.zip', members)
    _, zipped, _, _ = prepare('llava_instruct', folder)
    (folder / 'train2017.zip').unlink()
    for name, data in members.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    loose = folder.rename(folder.parent / 'loose')
    _, found, _, _ = prepare('llava_instruct', loose)
    assert found == zipped and len(found) == 50
    assert [example.images[0] for _, example in sorted(found.items())] == stored


def test_a_picture_outside_the_folder_is_not_read(folder, stored):
    (folder.parent / 'secret.jpg').write_bytes(stored[0])
    found = NamedImages(folder)
    for name, told in {'../secret.jpg': 'leaves', str(folder.parent / 'secret.jpg'): 'leaves', '': 'missing'}.items():
        with pytest.raises(BadExample, match=told):
            found.read(name)


def test_what_the_hub_keeps_beside_files_is_not_read(tmp_path):
    folder = tmp_path / '.cache/datasets/raw'  # where a user may well keep data
    for name in ('x.jsonl', '.cache/huggingface/download/y.jsonl'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{}\n{}\n')
    assert files.find(folder, ('*.parquet', '*.jsonl')) == [folder / 'x.jsonl']
    assert files.count_rows([folder / 'x.jsonl']) == 2
    (folder / 'x.jsonl').write_text('{}\n{}')
    assert files.count_rows([folder / 'x.jsonl']) == 2
    (folder / 'z.json').write_text(json.dumps([{'conversations': []}] * 3, indent=1))
    assert files.count_rows(files.find(folder, ('z.json',))) == 3


# The Cauldron and FineVision -----------------------------------------------------------------------------------------


def cauldron_row(images, *turns, **more):
    images = [{'bytes': data, 'path': None} for data in images]
    return {'images': images, 'texts': [{'user': q, 'assistant': a, 'source': 'ai2d'} for q, a in turns]} | more


def test_the_cauldron(folder, stored):
    good = [cauldron_row([stored[i % 50]], (f'q {i}', f'a {i}'), (f'r {i}', f'b {i}')) for i in range(500)]
    good[3] = cauldron_row(stored[:3], ('Compare.', 'All differ.'))
    good[4] = cauldron_row(stored[:2], ('Is <image> like <image>?', 'No.'))
    good[5] = cauldron_row([], ('Only words?', 'Yes.'))
    damage = {
        7: (cauldron_row([stored[0][:-40]], ('q', 'a')), 'image does not decode'),
        130: (cauldron_row([b''], ('q', 'a')), 'missing image'),
        131: (cauldron_row([stored[0]], ('q', '')), 'empty answer'),
        132: (cauldron_row([stored[0]]), 'no answer'),
        133: (cauldron_row([stored[0]], ('<image><image>?', 'a')), '2 image places for 1 images'),
    }
    for i, (row, _) in damage.items():
        good[i] = row
    write_parquet(folder / 'ai2d/train-00000-of-00001-2ce340398c113b79.parquet', good[:250], CAULDRON)
    write_parquet(folder / 'clevr/train-00000-of-00001-2ce340398c113b79.parquet', good[250:], CAULDRON)
    made, found, _, bad = prepare('cauldron', folder)
    file = 'ai2d/train-00000-of-00001-2ce340398c113b79.parquet'
    assert bad == [{'row': f'{file}:{i}', 'reason': reason} for i, (_, reason) in damage.items()]
    assert (made['rows'], made['bad'], made['left_out'], len(found)) == (500, 5, 0, 495)
    one = found[f'{file}:0']
    assert one.messages == said('q 0', 'a 0', images=1) + said('r 0', 'b 0') and one.images == stored[:1]
    assert found[f'{file}:3'].messages == said('Compare.', 'All differ.', images=3)
    assert found[f'{file}:3'].images == stored[:3]
    kinds = [part['type'] for part in found[f'{file}:4'].messages[0]['content']]
    assert kinds == ['text', 'image', 'text', 'image', 'text']
    assert found[f'{file}:5'].messages == said('Only words?', 'Yes.')
    other = found['clevr/train-00000-of-00001-2ce340398c113b79.parquet:249']
    assert other.images == [stored[499 % 50]] and other.messages[1]['content'] == 'a 499'


def test_finevisions_ratings_are_filters(folder, stored):
    rows = []
    for i in range(100):
        row = cauldron_row([stored[i % 50]], (f'q {i}', 'a'), (f'r {i}', 'b'), source='ai2d')
        row |= {name: [5, 5] if name.endswith('ratings') else 5 for name in RATINGS}
        rows.append(row)
    for row in rows[:10]:
        row |= {'relevance_ratings': [2, 5], 'relevance_min': 2}  # its first turn goes
    for row in rows[10:30]:
        row |= {'relevance_ratings': [2, 3], 'relevance_min': 2}  # both go
    rows[30] |= {'relevance_ratings': [None, None], 'formatting_ratings': [], 'relevance_min': None}  # not rated
    rows[31] |= {'formatting_ratings': [1, 1], 'formatting_min': 1}
    write_parquet(folder / 'ai2d/train-00000-of-00001.parquet', rows, FINEVISION)
    made, found, _, bad = prepare('cauldron', folder, minimum='relevance:4,formatting:2')
    assert (made['rows'], made['left_out'], len(found)) == (79, 21, 79) and not bad
    assert made['minimum'] == {'relevance': 4, 'formatting': 2}
    file = 'ai2d/train-00000-of-00001.parquet'
    assert found[f'{file}:0'].messages == said('r 0', 'b', images=1)
    assert len(found[f'{file}:30'].messages) == 4 and f'{file}:31' not in found


@pytest.mark.parametrize('minimum, told', {'relevence:4': "Did you mean 'relevance'", 'relevance': 'RATING'}.items())
def test_a_wrong_rating_is_one_sentence(folder, minimum, told):
    with pytest.raises(UserError, match=told):
        preparation.prepare('cauldron', str(folder), minimum=minimum)


def test_a_broken_parquet_file_is_one_sentence(folder):
    (folder / 'x.parquet').write_bytes(b'PAR1 but no more')
    with pytest.raises(UserError, match=r'x\.parquet is no parquet file that can be read'):
        preparation.prepare('cauldron', str(folder), str(folder.parent / 'data'))


# Magpie --------------------------------------------------------------------------------------------------------------


def test_magpie_as_parquet(folder):
    rows = magpie_rows(400)
    rows[1] |= {'conversations': None}
    rows[2] |= {'conversations': asked('What does <image> do in <|user|> HTML?', 'It shows one.')}
    rows[3] |= {'conversations': None, 'response': ''}
    rows[4] |= {'conversations': None, 'instruction': None}
    write_parquet(folder / 'data/train-00000-of-00002.parquet', rows[:200], MAGPIE)
    write_parquet(folder / 'data/train-00001-of-00002.parquet', rows[200:], MAGPIE)
    made, found, splits, bad = prepare('magpie', folder)
    file = 'data/train-00000-of-00002.parquet'
    assert bad == [
        {'row': f'{file}:3', 'reason': 'empty answer'},
        {'row': f'{file}:4', 'reason': 'a turn without text'},
    ]
    assert made['reasons'] == {'a turn without text': 1, 'empty answer': 1} and len(found) == 398
    for i in (0, 1, 399):
        assert found[f'q{i}'].messages == said(f'q {i}?', f'the answer {i}') and not found[f'q{i}'].images
    assert found['q2'].messages[0]['content'] == 'What does <image> do in <|user|> HTML?'
    for i in range(5, 400):
        assert (splits[f'q{i}'] == 'validation') == is_held_out(f'q {i}?'.encode())


def test_magpie_as_json_lines(folder):
    lines = [json.dumps({'prompt': f'p {i}\u2028', 'response': f'r {i}'}) for i in range(200)]
    lines[50], lines[60] = '{"prompt": "half', ''
    (folder / 'magpie.jsonl').write_text('\n'.join(lines))
    made, found, _, bad = prepare('magpie', folder)
    assert bad == [{'row': 'magpie.jsonl:50', 'reason': 'a row that is no JSON object'}]
    assert (made['rows'], len(found)) == (199, 198)
    assert found['magpie.jsonl:3'].messages == said('p 3\u2028', 'r 3')


# Anybody's chat ------------------------------------------------------------------------------------------------------


def test_chat_with_strings_and_parts(folder, stored):
    uri = 'data:image/jpeg;base64,' + base64.b64encode(stored[0]).decode()
    text, image = {'type': 'text', 'text': 'what?'}, {'type': 'image'}
    (folder / 'images').mkdir()
    (folder / 'images/a.jpg').write_bytes(stored[1])

    def row(content, **more):
        return {'messages': [{'role': 'user', 'content': content}, {'role': 'assistant', 'content': 'b'}]} | more

    good = {
        'uri': row([{'type': 'image_url', 'image_url': {'url': uri}}, text]),
        'bare': row([text, {'type': 'image_url', 'image_url': uri}]),
        'name': row([{'type': 'image', 'image': 'a.jpg'}, text]),
        'row': row([image, text, image], images=['a.jpg', uri]),
        'mark': row('<image>\nwhat?', images=['a.jpg']),
        'text': row('no <image> here'),
    }
    wanted = {
        'uri': ([image, text], [stored[0]]),
        'bare': ([text, image], [stored[0]]),
        'name': ([image, text], [stored[1]]),
        'row': ([image, text, image], [stored[1], stored[0]]),
        'mark': ([image, {'type': 'text', 'text': 'what?'}], [stored[1]]),
        'text': ('no <image> here', []),
    }
    bad = {
        'a picture on the web': row([{'type': 'image_url', 'image_url': {'url': 'https://x.org/a.jpg'}}, text]),
        'a picture that is no base64': row([{'type': 'image_url', 'image_url': {'url': 'data:image/png;base64,?'}}]),
        '1 image places for 0 images': row([image, text]),
        'missing image': row([{'type': 'image', 'image': {'url': None}}, text]),
        '1 image places for 2 images': row([image, text], images=['a.jpg', 'a.jpg']),
        'unknown speaker': {'messages': [{'role': 'narrator', 'content': 'x'}]},
        'the role tool belongs to tools, which are not supported': {'messages': [{'role': 'tool', 'content': 'x'}]},
        'a turn without text': row([{'type': 'video'}]),
        'a row without conversations or messages': {'text': 'x'},
    }
    filler = [row(f'question {i}') for i in range(900)]
    write_jsonl(folder / 'x.jsonl', [{'id': name} | row for name, row in good.items()] + list(bad.values()) + filler)
    made, found, _, _ = prepare('chat', folder)
    assert made['reasons'] == dict.fromkeys(sorted(bad), 1)
    for name, (content, images) in wanted.items():
        assert found[name].messages[0] == {'role': 'user', 'content': content}
        assert found[name].images == images


def test_chat_as_parquet(folder, stored):
    part = pyarrow.struct({'type': pyarrow.string(), 'text': pyarrow.string(), 'image': pyarrow.string()})
    message = pyarrow.struct({'role': pyarrow.string(), 'content': pyarrow.list_(part)})
    schema = {'messages': pyarrow.list_(message), 'images': pyarrow.list_(IMAGE)}
    ask = [{'type': 'image'}, {'type': 'text', 'text': 'what?'}]
    rows = [
        {
            'messages': [
                {'role': 'user', 'content': ask},
                {'role': 'assistant', 'content': [{'type': 'text', 'text': f'b {i}'}]},
            ],
            'images': [{'bytes': data, 'path': 'a.jpg'}],
        }
        for i, data in enumerate(stored)
    ]
    write_parquet(folder / 'x.parquet', rows, schema)
    made, found, _, _ = prepare('chat', folder)
    assert (made['rows'], made['bad'], made['pictures']) == (50, 0, 50)
    for i, data in enumerate(stored):
        example = found[f'x.parquet:{i}']
        assert example.images == [data] and example.caption == f'b {i}'
        assert example.messages[0]['content'] == ask
