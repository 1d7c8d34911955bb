"""Stage 2: the decoder learns to answer; only the assistant's tokens are learned.

    python -m nanovision_jax.train --config=configs/sft.py:tiny
    python -m nanovision_jax.prepare magpie
    python -m nanovision_jax.train --config=configs/sft.py

d20: 5,000 steps of 32 packed rows of Magpie-Phi3-Pro. tiny: 25 s on two CPU cores.
"""

from nanovision_jax.config import TINY, Checkpoint, Data, Eval, Log, Optim, base_config


def get_config(size='d20'):
    config = base_config('sft', size)
    if size in TINY:
        config.steps = 40
        config.data = Data(batch_size=32, length=256)
        config.optim = Optim('muon', learning_rate=4e-3, end_learning_rate=4e-4, schedule='linear', warmup=10)
        config.checkpoint, config.eval, config.log = Checkpoint(every=100), Eval(every=40, batches=4), Log(every=10)
    else:
        config.steps = 5_000
        config.data = Data('magpie', 'data', tokenizer='gpt2', batch_size=32, length=1024, open_rows=128)
        config.optim = Optim(learning_rate=2e-4, end_learning_rate=2e-5, schedule='linear', warmup=1000)
    return config
