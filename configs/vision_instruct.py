"""Stage 4: projector and decoder learn to talk about pictures; only the assistant's tokens are learned.

    python -m nanovision_jax.train --config=configs/vision_instruct.py:tiny
    python -m nanovision_jax.prepare llava_instruct
    python -m nanovision_jax.train --config=configs/vision_instruct.py

d20: one epoch of LLaVA-Instruct-150K; 40 rows hold about 128 conversations (arXiv:2304.08485). tiny:
832 s on two CPU cores; 19 of 20 questions about new pictures, 5 with blank ones.
"""

from nanovision_jax.config import TINY, Checkpoint, Data, Eval, Log, Optim, base_config


def get_config(size='d20'):
    config = base_config('vision_instruct', size)
    if size in TINY:
        config.steps = 2400  # places come last: after 1,900 steps one tower's were at 99%, another's at 62
        config.data = Data(batch_size=36, length=128, slots=4)
        config.optim = Optim('muon', learning_rate=4e-3, end_learning_rate=0.0, warmup=0.05, b2=0.98, weight_decay=0.0)
        config.checkpoint, config.eval, config.log = Checkpoint(every=300), Eval(every=700, batches=4), Log(every=50)
    else:
        config.data = Data('llava_instruct', 'data', tokenizer='gpt2', batch_size=40, length=2048)
        config.data.slots, config.data.draft, config.data.workers = 4, True, 16
        config.optim = Optim(learning_rate=2e-5, end_learning_rate=0.0, warmup=0.03, weight_decay=0.0)
    return config
