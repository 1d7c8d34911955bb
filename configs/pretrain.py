"""Stage 1: the decoder from nothing, on text; every next token is learned.

    python -m nanovision_jax.train --config=configs/pretrain.py:tiny
    python -m nanovision_jax.prepare fineweb_edu
    python -m nanovision_jax.train --config=configs/pretrain.py

d20: 522M parameters, 35,000 steps of 262,144 tokens (9.2B) of FineWeb-Edu. tiny: 33 s on two CPU
cores, 0.276 bits a byte on held-out text.
"""

from nanovision_jax.config import TINY, Checkpoint, Data, Eval, Log, Optim, base_config


def get_config(size='d20'):
    config = base_config('pretrain', size)
    if size in TINY:
        config.steps = 80
        config.data = Data(batch_size=64, length=128)
        config.optim = Optim('muon', learning_rate=4e-3, end_learning_rate=4e-4, warmup=20)
        config.checkpoint, config.eval, config.log = Checkpoint(every=80), Eval(every=80, batches=4), Log(every=10)
    else:
        config.steps = 35_000
        config.data = Data('fineweb_edu', 'data', tokenizer='gpt2', batch_size=256, length=1024)
        config.optim = Optim(learning_rate=1e-3, end_learning_rate=1e-4, warmup=1000)
    return config
