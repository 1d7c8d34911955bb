#!/usr/bin/env bash
# How the run beside this file was made, by the code of commit a9adaae (before runs kept their paths relative):
#
#   git worktree add /somewhere a9adaae, an environment for it, and there: bash tests/golden/run/make.sh PYTHON
#
# Checkpoint 4 is taken away, so that the run goes on from step 2; expected.json keeps what followed.
set -euo pipefail
python=$1 here=$(cd "$(dirname "$0")" && pwd)
$python - <<'PY'
import io, json, random, zipfile
from PIL import Image
rng, rows, captions = random.Random(0), [], []
colours = {'red': (160, 30, 30), 'green': (30, 160, 30), 'blue': (30, 30, 160), 'grey': (120, 120, 120)}
with zipfile.ZipFile('images.zip', 'w') as file:
    for i in range(90):
        name = rng.choice(list(colours))
        data = io.BytesIO()
        Image.new('RGB', (18, 18), tuple(c + i for c in colours[name])).save(data, 'PNG')
        file.writestr(zipfile.ZipInfo(f'{i}.png'), data.getvalue())
        ask = [{'from': 'human', 'value': '<image>\nWhich colour is it?'}, {'from': 'gpt', 'value': f'It is {name}.'}]
        rows.append({'id': str(i), 'image': f'{i}.png', 'conversations': ask})
        ask = [{'from': 'human', 'value': f'What is {i} and {i}?'}, {'from': 'gpt', 'value': f'It is {2 * i}.'}]
        rows.append({'id': f't{i}', 'conversations': ask})
json.dump(rows, open('data.json', 'w'))
json.dump([r for r in rows if 'image' in r], open('captions.json', 'w'))
open('text.txt', 'w').write('The quick brown fox is red. What is number 7? It is the number 7.\n' * 200)
PY
small='--config.model.layers=2 --config.model.unroll=1 --config.model.width=32 --config.model.heads=2 --config.model.ffn=64'
small+=' --config.model.positions=128 --config.data.batch_size=2 --config.data.length=64 --config.eval.batches=1'
small+=' --config.model.vision.image_size=16 --config.model.vision.patch_size=8 --config.model.vision.layers=2'
small+=' --config.model.vision.width=32 --config.model.vision.heads=2 --config.model.vision.ffn=64 --config.model.text.width=32'
small+=' --config.data.vocab_size=300 --config.name=run --config.log.every=1 --config.steps=4 --config.checkpoint.every=2'
train() { stage=$1; shift; $python -m nanovision_jax.train --config="configs/$stage.py:tiny" $small --config.run_dir="family/$stage" "$@"; }
chats='--config.data.source=conversations --config.data.path'
train pretrain --config.data.source=text --config.data.path=text.txt
train clip $chats=captions.json
train sft $chats=data.json
train vision_pretrain $chats=captions.json
train vision_instruct $chats=data.json
rm -r family/vision_instruct/checkpoints/4
$python - <<'PY'
import json
import nanovision_jax as nv
lines = [json.loads(line) for line in open('family/vision_instruct/metrics.jsonl')]
logits = nv.load('family/vision_instruct').logits([[5, 6, 7]])[0, -1, :8].tolist()
losses = {line['step']: line['loss'] for line in lines if 'loss' in line and line['step'] > 2}
json.dump({'losses': losses, 'logits': logits}, open('expected.json', 'w'))
PY
mkdir -p "$here/family"
cp -r family/tokenizer family/vision_instruct "$here/family"
sed -i '/"step": [34]/d' "$here/family/vision_instruct/metrics.jsonl"
cp data.json images.zip expected.json "$here"
