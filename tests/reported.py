"""Small run folders, as training and evaluations leave them, of which reports are made."""

import io
import json

from PIL import Image

from nanovision_jax import config as configs
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
