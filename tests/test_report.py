"""report: the numbers it tells, what it says of looking, escaping, and that it needs no network and no jax."""

import io
import json
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from nanovision_jax import config as configs
from nanovision_jax.errors import UserError
from nanovision_jax.evals import base
from nanovision_jax.reporting import blocks, page
from nanovision_jax.runs import config_file as runconfig

HOSTILE = '<script>alert("1")</script> | & *b*'


def png(size, value):
    buffer = io.BytesIO()
    Image.new('RGB', (size, size), (value, 0, 99)).save(buffer, 'PNG')
    return buffer.getvalue()


def write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def make_run(family, stage, **data):
    folder = family / stage
    config = configs.base_config(stage, 'tiny')
    config.name, config.run_dir, config.steps = 'small', str(folder), 30
    config.data = configs.Data(**data)
    lines = [
        {'step': i, 'loss': 40 / i, 'tokens': 1000 * i, 'tokens_per_second': s, 'mfu': s / 10_000, 'seconds': 9.0 * i}
        for i, s in ((10, 1500), (20, 2345), (30, 9000))
    ]
    write_lines(folder / 'metrics.jsonl', [*lines, {'step': 30, 'eval_loss': 1.625}])
    runconfig.save(config)
    parent = {'run': 'runs/small/pretrain', 'step': 30, 'part': 'all', 'manifest': 'abcdef0123456789'}
    lineage = {
        'stage': stage,
        'parents': [parent] if stage != 'pretrain' else [],
        'tokenizer': 'feed' * 16,
        'data': {'source': config.data.source, 'path': config.data.path, 'images': ''},
        'frozen_before': {'vision': 'aa'},
        'sessions': [{'started': '2026-05-04T02:00:21+00:00', 'versions': {'jax': '0.10.2'}, 'devices': '1 × H100'}],
        'finished': 30,
        'frozen_after': {'vision': 'aa'},
        'peak_device_bytes': 3 * 2**30,
    }
    (folder / 'lineage.json').write_text(json.dumps(lineage))
    return folder


def make_vqa(folder, blank=0.25, shuffled=0.2, n=40):
    """Three answers in four are right; pictures 0 to 9 are in the zip, the others are lost."""
    rows = []
    for i in range(n):
        kind, right = ('colour', 'shape')[i // 2 % 2], i % 4 != 0
        text = HOSTILE if i % 2 else f'Question {i}?'
        answer = 'Red.' if right else HOSTILE
        rows.append({'id': f'q{i}', 'image': f'{i % 20}.png', 'question': text, 'reference': 'Red.', 'answer': answer})
        rows[-1] |= {'correct': float(right), 'kind': kind}
    write_lines(folder / 'eval' / 'vqa.jsonl', rows)
    shared = {'n': n // 2, 'chance': 0.125, 'blank': blank, 'shuffled': shuffled}
    by_kind = {kind: shared | {'accuracy': x} for kind, x in (('colour', 0.625), ('shape', 0.875))}
    result = {'task': 'vqa', 'n': n, 'accuracy': 0.75, 'interval': [0.7, 0.8], 'by_kind': by_kind}
    result['controls'] = {'blank': blank, 'shuffled': shuffled}
    (folder / 'eval' / 'vqa.json').write_text(json.dumps(result))
    return rows


@pytest.fixture
def family(tmp_path):
    family = tmp_path / 'small <i>'
    pretrain = make_run(family, 'pretrain', source='text', path='corpus')
    (pretrain / 'eval').mkdir()
    (pretrain / 'eval' / 'bpb.json').write_text(
        json.dumps({'task': 'bpb', 'n': 5000, 'bytes': 20000, 'loss': 2.25, 'bits_per_byte': 0.8125})
    )
    with zipfile.ZipFile(tmp_path / 'images.zip', 'w') as file:
        for i in range(10):
            file.writestr(f'{i}.png', png(300 if i == 0 else 16, 20 * i))
    (tmp_path / 'chat.json').write_text('[]')
    make_vqa(make_run(family, 'vision_instruct', source='conversations', path=str(tmp_path / 'chat.json')))
    return family


def pages(family):
    path = blocks.write(family)
    assert path == family / 'report.html'
    return path.read_text(), (family / 'report.md').read_text()


def test_both_pages_tell_the_same_numbers(family):
    html, markdown = pages(family)
    for text in (
        '4 May 2026',
        '9.0 minutes of training',  # two stages of 270 s
        '2,345',  # the median, not the mean
        '23.4%',
        '30,000',
        '1.333',  # the last loss
        '1.625',
        '3.00 GiB',
        '1 × H100',
        '75.0% of 40 questions',
        '70.0% to 80.0%',
        '62.5%',
        '87.5%',
        '12.5%',
        '−50.0 points',
        '0.812',
        'abcdef012345',
        'vision: unchanged',
        'full-attention convention, padding not counted',
        '--task=bpb',
        '--config=configs/vision_instruct.py:tiny --config.name=small',
    ):
        assert text in html, text
        assert text in markdown, text
    assert 'small &lt;i&gt;' in html
    assert 'small <i>' not in html


def test_what_an_evaluation_left_out_is_told(family):
    folder = family / 'vision_instruct'
    rows = make_vqa(folder)
    file = folder / 'eval' / 'vqa.json'
    for text in pages(family):  # of older code, which did not count
        assert 'left out' not in text.split('Questions about pictures')[1]
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {'asked': 41, 'left_out': {'missing image': 1}, 'other': {}})
    )
    write_lines(folder / 'eval' / 'vqa.jsonl', [{'id': 'x', 'image': None, 'left_out': 'missing', 'kind': None}, *rows])
    for text in pages(family):
        assert 'Questions asked 41, answered 40, left out 1 (1 × missing image).' in text
        assert '75.0% of all' in text


@pytest.mark.parametrize(
    ('blank', 'shuffled', 'said'),
    [
        (0.25, 0.2, 'looks at its pictures: with blank ones it loses 50.0 points'),
        (0.70, 0.2, 'does not look at its pictures'),  # 5 points are not enough
        (0.25, 0.9, 'does not look at its pictures'),  # any picture will do
        (0.69, 0.2, 'looks at its pictures: with blank ones it loses 6.0 points'),
    ],
)
def test_whether_it_looks(family, blank, shuffled, said):
    make_vqa(family / 'vision_instruct', blank, shuffled)
    for text in pages(family):
        assert f'The model {said}' in text


def test_too_few_questions_to_tell_whether_it_looks():
    result = base.Accuracy('vqa', 9, 0.75, [0.4, 0.9], {}, {'blank': 0.6, 'shuffled': 0.2})
    assert 'too few' in result.verdict()


def test_page_is_whole_and_harmless(family):
    html, markdown = pages(family)
    assert '<script' not in html
    assert '<script' not in markdown
    assert '&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; | &amp; *b*' in html
    assert r'&lt;/script&gt; \| &amp; \*b\*' in markdown
    assert not re.search(r'(src|href)\s*=\s*(?!"data:)|url\(|@import', html)
    assert html.count('<figure>') == html.count('</figure>') == 14  # two curves and twelve questions


def test_pictures_are_inlined_and_lost_ones_leave_their_caption(family):
    rows = [row for row in make_vqa(family / 'vision_instruct') if row['image'] in ('0.png', '1.png', '19.png')]
    write_lines(family / 'vision_instruct' / 'eval' / 'vqa.jsonl', rows)
    html, _ = pages(family)
    assert html.count('<img') == 4
    assert html.count('<img class="small" src="data:image/png;base64,') == 2
    assert html.count('<img class="large" src="data:image/jpeg;base64,') == 2  # made smaller
    assert html.count('class="kind"') == len(rows) == 6


def test_chosen_questions_are_spread_and_in_proportion(family):
    rows = make_vqa(family / 'vision_instruct')
    chosen = blocks.choose(rows)
    assert chosen == blocks.choose(rows[::-1])
    assert sum(row['correct'] == 0 for row in chosen) == 3
    assert sorted(row['kind'] for row in chosen) == ['colour'] * 6 + ['shape'] * 6
    assert len({row['image'] for row in chosen}) == 12
    mostly_right = [row | {'correct': float(i > 0)} for i, row in enumerate(rows)]
    assert [row['id'] for row in blocks.choose(mostly_right) if row['correct'] == 0] == ['q0']
    assert blocks.choose(rows[:1]) == rows[:1]


def test_chat_is_shown_with_its_pictures(family):
    (family / 'mine.png').write_bytes(png(16, 7))
    turns = [{'image': 'mine.png', 'question': f'Why {i}?', 'answer': 'So.'} for i in range(2)]
    write_lines(family / 'chat.jsonl', [*turns, {'image': 'gone.png', 'question': 'Where?', 'answer': HOSTILE}])
    html, markdown = pages(family)
    shown = html.split('never seen</h2>')[1].split('<h2>')[0]
    assert (shown.count('<figure>'), shown.count('<img')) == (2, 1)
    assert all(text in shown and text in markdown for text in ('Why 0?', 'Why 1?', 'Where?'))


def test_what_is_missing_is_left_out(tmp_path):
    (tmp_path / 'clip').mkdir()
    (tmp_path / 'clip' / 'metrics.jsonl').write_text('{"step": 5, "loss": 2.5}\n{"step": 10, "lo')
    html, markdown = pages(tmp_path)
    assert '2.500' in html
    assert '2.500' in markdown
    assert not any(text in html for text in ('Minutes', 'Where it came from', 'Questions', 'None', '>nan'))
    with pytest.raises(UserError, match='holds no run'):
        blocks.write(tmp_path / 'clip')


def test_parameters_come_from_the_checkpoint(family):
    file = family / 'pretrain' / 'checkpoints' / '30' / 'params' / '_METADATA'
    file.parent.mkdir(parents=True)
    leaves = [('decoder', [1000, 7]), ('vision', [12])]
    tree = {
        str(i): {'key_metadata': [{'key': k}], 'value_metadata': {'write_shape': s}} for i, (k, s) in enumerate(leaves)
    }
    file.write_text(json.dumps({'tree_metadata': tree}))
    html, _ = pages(family)
    assert '<td>7,012</td>' in html
    assert '<td>7,000</td>' in html  # vision is frozen


@pytest.mark.parametrize('losses', [[3.0], [3.0, 3.0], [9.0, 0.5, 0.02], [2.0, -1.0], np.linspace(4, 3, 50).tolist()])
def test_charts_of_any_losses(losses):
    train = [(10 * (i + 1), loss) for i, loss in enumerate(losses)]
    svg = page.chart('sft', train, train[-1:])
    assert svg.count('<circle') == 1
    points = re.search(r'points="([^"]*)"', svg)[1].replace(',', ' ').split()
    assert all(0 <= float(x) <= 360 for x in points)
    assert ('(log)' in svg) == (losses == [9.0, 0.5, 0.02])


def test_pages_are_made_without_jax(family):
    code = f'from nanovision_jax.reporting import blocks; blocks.write({str(family)!r})'
    code += '; import sys; print("jax" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout == 'False\n'
