"""nanoGPTVision's checkpoints (checkpoint_NNNNNN.pt, PyTorch): the decoder that our first flavour follows.

A file is a dict with `model_state_dict`, `config` and `current_step`. Names may be led by what torch.compile and
DistributedDataParallel add. Its rotary positions turn interleaved pairs, as ours do.
"""

import pathlib

from nanovision_jax import config as configs
from nanovision_jax import models
from nanovision_jax.errors import UserError
from nanovision_jax.hf.decoders import Architecture, decoder_from_hf
from nanovision_jax.hf.weights import INTO_HEADS, LINEAR, OUT_OF_HEADS, SAME, Tensor, Weights, without_prefixes

_ATTENTION = 'blocks.{}.multihead_attention.'
_QKV = tuple(f'{_ATTENTION}{name}_fc.weight' for name in ('query', 'key', 'value'))
TABLE = {
    'blocks/attention_norm/scale': ('blocks.{}.layer_norm1.weight', SAME),
    'blocks/attention_norm/bias': ('blocks.{}.layer_norm1.bias', SAME),
    'blocks/qkv/kernel': (_QKV, INTO_HEADS),
    'blocks/out/kernel': (_ATTENTION + 'output_projection.weight', OUT_OF_HEADS),
    'blocks/out/bias': (_ATTENTION + 'output_projection.bias', SAME),
    'blocks/ffn_norm/scale': ('blocks.{}.layer_norm2.weight', SAME),
    'blocks/ffn_norm/bias': ('blocks.{}.layer_norm2.bias', SAME),
    'blocks/ffn_in/kernel': ('blocks.{}.feed_forward.net.0.weight', LINEAR),
    'blocks/ffn_out/kernel': ('blocks.{}.feed_forward.net.2.weight', LINEAR),
    'norm/scale': ('vocab_projection.output_norm.weight', SAME),
    'norm/bias': ('vocab_projection.output_norm.bias', SAME),
}
ARCHITECTURE = Architecture(
    TABLE, '', 'token_embedding_layer.token_embedding_table.weight', 'vocab_projection.vocab_projection.weight'
)
# Their config: ours.
_FIELDS = {
    'layer_count': 'layers',
    'embedding_dim': 'width',
    'num_attention_heads': 'heads',
    'hidden_dim': 'ffn',
    'max_sequence_length': 'positions',
    'rope_theta': 'rope_theta',
}


def read(file: pathlib.Path) -> tuple[configs.Config, int, Weights]:
    """(config.Config of stage pretrain, step, Weights) of a checkpoint, read without executing anything in it.

    Raises UserError where PyTorch is missing, and for a file that is not such a checkpoint.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError('reading a .pt file takes PyTorch: pip install torch (its CPU build will do).') from error
    try:
        content = torch.load(file, map_location='cpu', weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f'there is no {file}.') from error
    except Exception as error:  # torch has no one error for a file that is damaged, or would run code
        raise UserError(f'{file} cannot be read as plain tensors (weights_only): {type(error).__name__}.') from error
    if not isinstance(content, dict) or {'model_state_dict', 'config', 'current_step'} - content.keys():
        raise UserError(f'{file} is no nanoGPTVision checkpoint: it lacks model_state_dict, config or current_step.')
    theirs = content['config']
    if missing := [name for name in _FIELDS if name not in theirs]:
        raise UserError(f'the config in {file} lacks {", ".join(missing)}.')
    model = configs.Model(**{ours: theirs[name] for name, ours in _FIELDS.items()})
    data = configs.Data(configs.UNKNOWN, length=min(1024, model.positions))
    step = max(1, int(content['current_step']))
    config = configs.Config('pretrain', size='nanogptvision', steps=step, model=model, data=data)
    tensors = {}
    for name, tensor in without_prefixes(content['model_state_dict']).items():
        name += '.weight' * (
            name == ARCHITECTURE.embedding.removesuffix('.weight')
        )  # a bare parameter in some versions
        tensors[name] = Tensor(tuple(tensor.shape), lambda t=tensor: t.float().numpy())
    return config, step, Weights(file, tensors)


def parameters(config: configs.Config, weights: Weights, tokenizer) -> dict:
    """The decoder's parameters (nested dicts of numpy arrays). Raises UserError where the weights do not fit."""
    shapes = models.abstract(config, tokenizer.size, tokenizer.image)[1]
    return decoder_from_hf(weights, ARCHITECTURE, shapes, tokenizer.size)
