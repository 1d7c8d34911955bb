"""Stage 0 (optional): vision and text tower from nothing, by matching pictures with captions.

    python -m nanovision_jax.train --config=configs/clip.py:tiny
    python -m nanovision_jax.prepare llava_pretrain
    python -m nanovision_jax.train --config=configs/clip.py

d20: a ViT-B/16 on eight GPUs, CLIP's recipe (arXiv:2103.00020). tiny: 125 s on two CPU cores, drawing the data
included.
"""

from nanovision_jax.config import TINY, Checkpoint, Data, Eval, Log, Optim, base_config


def get_config(size='d20'):
    config = base_config('clip', size)
    if size in TINY:
        config.steps = 650
        config.data = Data(batch_size=128, length=36)
        config.optim = Optim('muon', learning_rate=4e-3, end_learning_rate=0.0, warmup=50, b2=0.98)
        config.checkpoint, config.eval, config.log = Checkpoint(every=200), Eval(every=400, batches=4), Log(every=25)
    else:
        config.epochs = 32
        config.data = Data('llava_pretrain', 'data', tokenizer='gpt2', batch_size=4096, length=77)
        config.data.augment, config.data.draft, config.data.workers = True, True, 16
        config.optim = Optim(learning_rate=5e-4, end_learning_rate=0.0, warmup=2000, b2=0.98, weight_decay=0.2)
    return config
