"""Small copies of published data sets, each in its exact layout and schema."""

import io
import itertools
import json
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
from conftest import is_held_out, jpeg
from PIL import Image


def pictures(n, seed=0):
    """n different JPEGs, every tenth of them on the validation side."""
    rng, found = np.random.default_rng(seed), {True: [], False: []}
    while len(found[True]) < n // 10 or len(found[False]) < n - n // 10:
        data = jpeg(rng, (int(rng.integers(9, 20)), int(rng.integers(9, 20))))
        found[is_held_out(data)].append(data)
    return [*found[False][: n - n // 10], *found[True][: n // 10]]


def png(data):
    """The same picture as a PNG that ends in zeros, which a careless reader strips."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, 'PNG')
    return buffer.getvalue() + b'\0\0'


def write_zip(file, members):
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, 'w') as out:
        for name, data in members.items():
            out.writestr(name, data)


def asked(question, answer='a cat'):
    """LLaVA's turns."""
    return [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]


def said(question, answer='a cat', images=0):
    """The same as our messages; pictures come first."""
    content = [{'type': 'image'}] * images + [{'type': 'text', 'text': question}] if images else question
    return [{'role': 'user', 'content': content}, {'role': 'assistant', 'content': answer}]


def write_jsonl(file, rows):
    file.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')


def write_parquet(file, rows, schema, rows_a_group=100):
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows, pyarrow.schema(schema))
    pyarrow.parquet.write_table(table, file, row_group_size=rows_a_group)


IMAGE = pyarrow.struct({'bytes': pyarrow.binary(), 'path': pyarrow.string()})
TURN = pyarrow.struct({'from': pyarrow.string(), 'value': pyarrow.string()})
CAULDRON_TURN = pyarrow.struct({name: pyarrow.string() for name in ('user', 'assistant', 'source')})
CAULDRON = {'images': pyarrow.list_(IMAGE), 'texts': pyarrow.list_(CAULDRON_TURN)}
RATINGS = [f'{name}_{kind}' for name, kind in itertools.product(
    ('relevance', 'image_correspondence', 'visual_dependency', 'formatting'), ('ratings', 'min'))]  # fmt: skip
FINEVISION = {
    'images': pyarrow.list_(IMAGE),
    'texts': pyarrow.list_(pyarrow.struct({'user': pyarrow.string(), 'assistant': pyarrow.string()})),
    'source': pyarrow.string(),
} | {name: pyarrow.list_(pyarrow.int64()) if name.endswith('ratings') else pyarrow.int64() for name in RATINGS}
MAGPIE = {
    'uuid': pyarrow.string(),
    'model': pyarrow.string(),
    'instruction': pyarrow.string(),
    'response': pyarrow.string(),
    'conversations': pyarrow.list_(TURN),
    'difficulty': pyarrow.string(),
    'instruct_reward': pyarrow.float64(),
}


def magpie_rows(n, prefix='q'):
    """n rows as Magpie-Align publishes them."""
    return [
        {
            'uuid': f'{prefix}{i}',
            'model': 'phi3',
            'instruction': f'{prefix} {i}?',
            'response': f'the answer {i}',
            'conversations': asked(f'{prefix} {i}?', f'the answer {i}'),
            'difficulty': 'easy',
            'instruct_reward': 0.5,
        }
        for i in range(n)
    ]


def llava_rows(n, stored):
    """n rows of captions as in chat.json, and the members of images.zip."""
    members = {f'GCC_train_{i:09d}.jpg': stored[i % len(stored)] for i in range(n)}
    rows = [
        {'id': name[:-4], 'image': name, 'conversations': asked('Describe the image.\n<image>', f'caption {i}')}
        for i, name in enumerate(members)
    ]
    return rows, members
