"""Attention: every kernel is the plain one, nothing leaks between segments, and which kernel is taken."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from nanovision_jax import config as configs
from nanovision_jax import models
from nanovision_jax.errors import UserError
from nanovision_jax.models import attention, kernels
from nanovision_jax.models.attention import Structure, attend
from nanovision_jax.parallel import mesh as parallel

T, N, K = 256, 4, 2
SEGMENTS = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [100, 60, 90, 6], axis=1)[:, :T].astype(np.int32)


def inputs(head, seed=0):
    """(q, k, v, a weight for every number of the result), as float32."""
    rng = np.random.default_rng(seed)
    shapes = (2, T, N, head), (2, T, K, head), (2, T, K, head), (2, T, N, head)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def with_gradients(function, q, k, v, weight):
    """(result, its weighted sum's gradients in q, k and v)."""

    def total(q, k, v):
        found = function(q, k, v)
        return jnp.sum(found * weight), found

    return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)


def by_hand(q, k, v):
    """Causal attention inside segments, one query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    found = np.zeros(q.shape)
    for b, t, n in np.ndindex(2, T, N):
        seen = [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t]]
        scores = k[b, seen, n // (N // K)] @ q[b, t, n] / np.sqrt(q.shape[-1])
        chances = np.exp(scores - scores.max())
        found[b, t, n] = chances @ v[b, seen, n // (N // K)] / chances.sum()
    return found


def test_the_plain_one_is_attention_as_it_is_written_down():
    q, k, v, _ = inputs(32)
    found = attend(q, k, v, Structure(causal=True, segments=jnp.asarray(SEGMENTS)))
    np.testing.assert_allclose(found, by_hand(q, k, v), atol=2e-6)


@pytest.mark.parametrize('columns', [32, 40, 1024])
def test_a_cache_is_attended_as_without_one(columns):
    """In pieces, of one row among others or of all at once; what stands behind the last column seen is of no effect."""
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 30, heads, 8)), jnp.float32) for heads in (N, K, K))
    wanted = attend(q, k, v, Structure(causal=True))
    piece = jax.jit(attention.attend_cached)

    def in_pieces(rows, row):
        cache = tuple(jnp.full((rows, K, columns, 8), 1e6, jnp.float32) for _ in range(2))
        found = []
        for start, stop in ((0, 16), (16, 29), (29, 30)):
            part = (jnp.repeat(x[:, start:stop], rows if row is None else 1, axis=0) for x in (q, k, v))
            some, cache = piece(*part, jnp.full(rows if row is None else 1, start), cache, row)
            found.append(some[-1:])
        return jnp.concatenate(found, axis=1)

    np.testing.assert_allclose(in_pieces(3, None), wanted, atol=1e-5)
    np.testing.assert_allclose(in_pieces(3, jnp.int32(1)), wanted, atol=1e-5)


@pytest.mark.parametrize('head', kernels.HEADS)
@pytest.mark.parametrize('name', kernels.PACKED)
def test_a_kernel_is_the_plain_one_with_its_gradients(name, head):
    kernel = functools.partial(kernels.PACKED[name], segments=jnp.asarray(SEGMENTS), interpret=True)
    plain = functools.partial(attend, structure=Structure(causal=True, segments=jnp.asarray(SEGMENTS)))
    found, wanted = (with_gradients(function, *inputs(head)) for function in (kernel, plain))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())  # float32 sums of 256 numbers in another order


@pytest.mark.parametrize('name', ['xla', *kernels.PACKED])
def test_nothing_leaks_between_segments(name):
    """What a segment holds changes no bit of another's result, nor of the gradients that flow to it."""
    structure, segments = Structure(causal=True, segments=jnp.asarray(SEGMENTS)), jnp.asarray(SEGMENTS)
    if name == 'xla':
        function = functools.partial(attend, structure=structure)
    else:
        function = functools.partial(kernels.PACKED[name], segments=segments, interpret=True)
    inside, others = SEGMENTS == 2, inputs(32, seed=1)
    q, k, v, weight = inputs(32)
    weight = jnp.where(inside[:, :, None, None], weight, 0)
    changed = [jnp.where(inside[:, :, None, None], a, 100 * b) for a, b in zip((q, k, v), others, strict=False)]
    (_, before), slopes = with_gradients(function, q, k, v, weight)
    (_, after), other_slopes = with_gradients(function, *changed, weight)
    np.testing.assert_array_equal(np.asarray(before)[inside], np.asarray(after)[inside])
    for a, b in zip(slopes, other_slopes, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[inside], np.asarray(b)[inside])
        assert not np.asarray(a)[~inside].any() and not np.asarray(b)[~inside].any()


@pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated')  # jax 0.12; kernels.pallas says more
@pytest.mark.parametrize('head', kernels.HEADS)
def test_the_gpus_kernel_lowers_with_its_gradients(head):
    def total(q, k, v):
        return kernels.pallas(q, k, v, jnp.asarray(SEGMENTS)).sum()

    card = AbstractDevice('NVIDIA H100 80GB HBM3', num_cores=None, platform='gpu')
    arrays = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in inputs(head)[:3]]
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ('x',), (AxisType.Auto,), abstract_device=card)):
        traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(*arrays)
        program = traced.lower(lowering_platforms=('cuda',)).as_text()
    assert program.count('mha_forward') and program.count('mha_backward')


@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='libtpu compiles it: pip install -e .[tpu]')
@pytest.mark.parametrize('head', kernels.HEADS)
def test_the_tpus_kernel_compiles_for_a_real_chip(head):
    from jax.experimental import topologies

    chip = topologies.get_topology_desc('v5e:1x1', 'tpu', chips_per_host_bounds=(1, 1, 1)).devices
    whole = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(chip), ('data',)), jax.sharding.PartitionSpec())

    def total(q, k, v, segments):
        return kernels.splash(q, k, v, segments).astype(jnp.float32).sum()

    arrays = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=whole) for x in inputs(head)[:3]]
    arrays.append(jax.ShapeDtypeStruct(SEGMENTS.shape, jnp.int32, sharding=whole))
    program = jax.jit(jax.grad(total, (0, 1, 2))).lower(*arrays).compile().as_text()
    assert f'[2,4,{T},{T}]' not in program and 'splash' in program


def test_a_kernel_gets_each_devices_rows_and_heads(monkeypatch):
    seen, mesh = [], parallel.make_mesh(configs.Mesh(2, 2, 2))

    def watched(q, k, v, segments):
        seen.append((q.shape, k.shape, segments.shape))
        return attention._plain(q, k, v, Structure(causal=True, segments=segments))

    monkeypatch.setitem(kernels.PACKED, 'splash', watched)
    q, k, v, _ = (jnp.concatenate([x, x]) for x in inputs(32))
    structure = Structure(causal=True, segments=jnp.concatenate([SEGMENTS, SEGMENTS]))
    with jax.set_mesh(mesh):
        found = jax.jit(lambda q, k, v: attend(q, k, v, structure, 'splash'))(q, k, v)
    assert seen == [((1, T, N // 2, 32), (1, T, K // 2, 32), (1, T))]
    np.testing.assert_allclose(found, attend(q, k, v, structure), atol=1e-6)


# Which kernel --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('wanted', 'platform', 'packed', 'head', 'length', 'kernel', 'why'),
    [
        ('auto', 'cpu', True, 128, 1024, 'xla', 'no other kernel runs on cpu'),
        ('auto', 'tpu', True, 128, 1024, 'splash', 'packed rows of 1024 tokens in heads of 128 on tpu'),
        ('auto', 'tpu', True, 64, 384, 'splash', 'packed rows of 384 tokens'),
        ('auto', 'tpu', True, 64, 1000, 'xla', 'a multiple of 128 tokens, not of 1000'),
        ('auto', 'tpu', True, 80, 1024, 'xla', 'heads of 32, 64, 128, not of 80'),
        ('auto', 'tpu', False, 64, 128, 'xla', 'for packed rows'),
        ('auto', 'gpu', True, 64, 2048, 'pallas', 'packed rows of 2048 tokens in heads of 64 on gpu'),
        ('xla', 'tpu', True, 128, 1024, 'xla', 'as asked'),
        ('cudnn', 'gpu', False, 64, 77, 'cudnn', 'as asked'),
    ],
)
def test_auto_takes_the_fastest_kernel_that_takes_the_shape(wanted, platform, packed, head, length, kernel, why):
    found = kernels.choose(wanted, platform, jnp.bfloat16, packed, head, length)
    assert found[0] == kernel and why in found[1]


@pytest.mark.parametrize(
    ('wanted', 'platform', 'dtype', 'packed', 'head', 'why'),
    [
        ('splash', 'cpu', 'bfloat16', True, 128, 'it runs on tpu, and this is cpu'),
        ('pallas', 'tpu', 'bfloat16', True, 128, 'it runs on gpu, and this is tpu'),
        ('splash', 'tpu', 'bfloat16', False, 128, 'it is for packed rows'),
        ('pallas', 'gpu', 'bfloat16', True, 48, 'not of 48'),
        ('cudnn', 'gpu', 'bfloat16', True, 128, 'takes no segments'),
        ('cudnn', 'gpu', 'float32', False, 64, 'bfloat16, not float32'),
        ('cudnn', 'gpu', 'bfloat16', False, 256, 'heads of up to 128'),
        ('cudnn', 'cpu', 'bfloat16', False, 64, 'it runs on gpu, and this is cpu'),
    ],
)
def test_a_kernel_that_is_asked_for_and_cannot_do_it_is_refused(wanted, platform, dtype, packed, head, why):
    with pytest.raises(UserError, match=f'model.attention={wanted}: .*{why}'):
        kernels.choose(wanted, platform, jnp.dtype(dtype), packed, head, 1024)


def test_the_mesh_at_hand_says_what_the_hardware_is():
    """Compiled for a topology the hardware is not there."""
    cfg = micro.config('pretrain')
    cfg.model.attention = 'splash'
    with jax.set_mesh(parallel.make_mesh(configs.Mesh(8, 1, 1))), pytest.raises(UserError, match='this is cpu'):
        models.abstract(cfg, 128, 127)
