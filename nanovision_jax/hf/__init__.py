"""Hugging Face weights in and out: CLIP's and SigLIP's towers, Llama's kin as decoders, whole runs as folders.

    from nanovision_jax.hf import load_vision_tower
    tower, preprocess = load_vision_tower('openai/clip-vit-large-patch14')
    features = tower(preprocess([image]))        # [B, P, D]

Training takes them as --config.model.tower=… and --config.model.decoder=…; convert writes and reads whole runs.
"""


def load_vision_tower(source, layer: int = -2, dtype='float32'):
    """(tower, preprocess) of a CLIP or SigLIP model; see nanovision_jax.hf.towers.load_vision_tower."""
    from nanovision_jax.hf import towers  # jax loads here: the configs beside it are read without

    return towers.load_vision_tower(source, layer, dtype)
