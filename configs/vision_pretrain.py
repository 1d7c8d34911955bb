"""Stage 3: the projector learns to put pictures into the decoder's words, on captions; all else is frozen.

    python -m nanovision_jax.train --config=configs/vision_pretrain.py:tiny
    python -m nanovision_jax.prepare llava_pretrain
    python -m nanovision_jax.train --config=configs/vision_pretrain.py

d20: one epoch of LLaVA-CC3M-Pretrain; 16 rows hold about 128 conversations (arXiv:2304.08485). tiny: 19 s on
two CPU cores.
"""

from nanovision_jax.config import TINY, Checkpoint, Data, Eval, Log, Optim, base_config


def get_config(size='d20'):
    config = base_config('vision_pretrain', size)
    if size in TINY:
        config.steps = 60
        config.data = Data(batch_size=16, length=192, slots=6)
        config.optim = Optim(learning_rate=3e-3, end_learning_rate=0.0, warmup=0.1, weight_decay=0.0)
        config.checkpoint, config.eval, config.log = Checkpoint(every=100), Eval(every=60, batches=4), Log(every=10)
    else:
        config.data = Data('llava_pretrain', 'data', tokenizer='gpt2', batch_size=16, length=2048)
        config.data.slots, config.data.draft, config.data.workers = 7, True, 16
        config.optim = Optim(learning_rate=2e-3, end_learning_rate=0.0, warmup=0.03, weight_decay=0.0)
    return config
