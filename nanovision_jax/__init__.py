"""nanovision_jax: a vision-language model from a blank page, in JAX.

import nanovision_jax as nv
vlm = nv.load('runs/tiny/vision_instruct')
vlm.chat('What is in the picture?', images=[picture])
"""

import gc

__version__ = '0.1.0'


def load(run_dir, weights=''):
    """Opens a run folder for use, its weights as trained or 'bfloat16' or 'int8'; see inference.run.Run."""
    collecting = gc.isenabled()
    gc.disable()  # what is loaded here stays: looking for garbage among it took a quarter of the time
    try:
        from nanovision_jax.inference.run import load  # jax and the rest load here, not at import

        return load(run_dir, weights)
    finally:
        if collecting:
            gc.enable()
