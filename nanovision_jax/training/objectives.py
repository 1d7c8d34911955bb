"""What each stage trains, and its loss.

A stage is data (data/pipeline.py), a start (training/start.py), the parts it trains (here) and a loss (here). The rest
is the same for all: loop.py.
"""

import jax.numpy as jnp
import optax

# Top-level parts of the model that learn; None is all of them. What is not named is frozen: it gets no gradient, no
# optimizer state, and its bytes are the same afterwards.
TRAINS = {
    'clip': None,
    'pretrain': None,
    'sft': None,
    'vision_pretrain': ('projector',),
    'vision_instruct': ('projector', 'decoder'),
}


def loss(stage, model, batch):
    """(sum of losses, their number): next-token cross-entropy over learned tokens, or CLIP's loss over pairs."""
    if stage == 'clip':
        pairs = batch['images'].shape[0]
        return model.loss(model(batch['images'], batch['tokens'], batch['ends'])) * pairs, jnp.float32(pairs)
    inputs = [batch[name] for name in ('tokens', 'positions', 'segments', 'images') if name in batch]
    losses = optax.softmax_cross_entropy_with_integer_labels(model(*inputs), batch['targets'])
    return jnp.sum(losses * batch['weights']), jnp.sum(batch['weights'])
