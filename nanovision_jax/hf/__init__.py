"""Hugging Face weights in and out: CLIP's and SigLIP's towers, Llama's kin as decoders, whole runs as folders.

    from nanovision_jax.hf import load_vision_tower
    tower, preprocess = load_vision_tower('openai/clip-vit-large-patch14')
    features = tower(preprocess([picture]))        # [B, P, D]

Training takes them as --config.model.tower=… and --config.model.decoder=…; convert writes and reads whole runs.
"""

from nanovision_jax.hf.decoders import find_decoder, read_decoder, read_decoder_config
from nanovision_jax.hf.towers import find_tower, load_vision_tower, tower_weights, vision_config

__all__ = [
    'find_decoder',
    'find_tower',
    'load_vision_tower',
    'read_decoder',
    'read_decoder_config',
    'tower_weights',
    'vision_config',
]
