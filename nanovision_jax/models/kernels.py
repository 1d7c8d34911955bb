"""Attention kernels of one hardware each, and which of them a model goes through.

Flash attention (arXiv:2205.14135) never has the scores [T, S] in memory. Axes: B batch, T length, N heads, K key-value
heads, H head dim.
"""

import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovision_jax.errors import UserError

HEADS = (32, 64, 128)  # head dims that the kernels for packed rows are tested with
RESIDUALS = 'attention'  # the name by which a rematerialisation policy can keep what a kernel's backward pass needs
BLOCKS = (512, 256, 128)  # tokens a block: the first that divides a row


def splash(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    segments: Int[Array, 'B T'],
    interpret: bool = False,
) -> Float[Array, 'B T N H']:
    """Splash attention (TPU) over packed rows. interpret runs it anywhere, slowly."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    length, heads = q.shape[1:3]
    block = _block(length)
    sizes = library.BlockSizes(**{f'block_{part}': block for part in ('q', 'kv', 'q_dkv', 'kv_dkv', 'q_dq', 'kv_dq')})
    mask = library.MultiHeadMask([library.CausalMask((length, length))] * heads)
    kernel = library.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name=RESIDUALS, interpret=interpret
    )

    def row(q, k, v, segments):
        return kernel(q, k, v, segment_ids=library.SegmentIds(segments, segments))

    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jax.vmap(row)(q, k, v, segments).swapaxes(1, 2)


def pallas(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    segments: Int[Array, 'B T'],
    interpret: bool = False,
) -> Float[Array, 'B T N H']:
    """Pallas attention (GPU, by Triton) over packed rows. interpret runs it anywhere, slowly.

    From jax 0.12 on it is deprecated, for tokamax, whose public function takes no segments; jax's Mosaic kernel has
    neither segments nor heads of 32.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*is deprecated.*', DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention as library

    groups = q.shape[2] // k.shape[2]
    k, v = (x if groups == 1 else jnp.repeat(x, groups, axis=2) for x in (k, v))
    return library.mha(q, k, v, segments, sm_scale=q.shape[-1] ** -0.5, causal=True, interpret=interpret)


def cudnn(
    q: Float[Array, 'B T N H'], k: Float[Array, 'B T K H'], v: Float[Array, 'B T K H'], causal: bool
) -> Float[Array, 'B T N H']:
    """cuDNN's attention over rows that are one segment each, in bfloat16. jax's function for it takes no segments."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation='cudnn')


PACKED = {'splash': splash, 'pallas': pallas}  # the kernels for packed rows: causal, in segments
HOMES = {'splash': 'tpu', 'pallas': 'gpu'}


def _block(length):
    return next((size for size in BLOCKS if length % size == 0), None)


def choose(wanted: str, platform: str, dtype, packed: bool, head_size: int, length: int) -> tuple[str, str]:
    """(kernel, why) for a model's attention: xla, one of PACKED, or cudnn.

    wanted: 'auto' takes the fastest that takes the shape. platform: 'cpu', 'gpu' or 'tpu'; packed: whether its rows are
    packed. Raises UserError, with the reason, for a kernel that cannot do it.
    """
    refusals = {
        'xla': '',
        **{name: _refusal(home, platform, packed, head_size, length) for name, home in HOMES.items()},
        'cudnn': _cudnn_refusal(platform, dtype, packed, head_size),
    }
    if wanted != 'auto':
        if refusals[wanted]:
            raise UserError(f'model.attention={wanted}: {refusals[wanted]}.')
        return wanted, 'as asked'
    for name in PACKED:
        if not refusals[name]:
            return name, f'packed rows of {length} tokens in heads of {head_size} on {platform}'
    reasons = [refusals[name] for name, home in HOMES.items() if home == platform]
    return 'xla', reasons[0] if reasons else f'no other kernel runs on {platform}'


def _refusal(home, platform, packed, head_size, length):
    """Why a kernel for packed rows on `home` cannot do it; '' if it can."""
    if platform != home:
        return f'it runs on {home}, and this is {platform}'
    if not packed:
        return 'it is for packed rows'
    if head_size not in HEADS:
        return f'it takes heads of {", ".join(map(str, HEADS))}, not of {head_size}'
    return '' if _block(length) else f'it takes rows of a multiple of {BLOCKS[-1]} tokens, not of {length}'


def _cudnn_refusal(platform, dtype, packed, head_size):
    if platform != 'gpu':
        return f'it runs on gpu, and this is {platform}'
    if packed:
        return "jax's function for it takes no segments, which packed rows have"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f'it takes bfloat16, not {jnp.dtype(dtype).name}'
    return '' if head_size <= 128 else f'it takes heads of up to 128, not of {head_size}'
