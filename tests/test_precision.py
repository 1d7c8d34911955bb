"""bfloat16: losses and gradients are those of float32 within its rounding, and what would lose by it is in float32."""

import functools

import jax
import micro
import numpy as np
import pytest

from nanovision_jax import config as configs
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.training import step

# bfloat16 keeps 8 bits, so one rounding errs by up to 0.4%. A loss averages over tokens, and is within 0.02% today; a
# gradient goes through every layer twice and through ReLUs that change sides: a whole leaf is within 10% today.
LOSS, GRADIENT = 0.001, 0.15


def model(stage, dtype):
    """(config, graphdef, parameters, a mesh of one device) of a stage's micro model."""
    cfg = micro.config(stage)
    cfg.dtype = dtype
    return cfg, *micro.params(cfg), parallel.make_mesh(configs.Mesh(), jax.devices()[:1])


@functools.cache
def gradients(stage, dtype):
    """The loss and its gradients."""
    cfg, graphdef, params, mesh = model(stage, dtype)
    with jax.set_mesh(mesh):
        taken = jax.jit(step.make_gradients(cfg, graphdef))(*step.partition(cfg, params), micro.batch(cfg))
    return jax.device_get(taken)


@pytest.mark.parametrize('stage', ['clip', 'pretrain', 'vision_instruct'])
def test_losses_and_gradients_are_those_of_float32(stage):
    (loss, grads), (wanted, expected) = gradients(stage, 'bfloat16'), gradients(stage, 'float32')
    assert loss.dtype == np.float32 and 0 < abs(loss - wanted) < LOSS * wanted
    for (path, leaf), other in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == np.float32
        error = np.linalg.norm(leaf - other) / np.linalg.norm(other)
        assert 0 < error < GRADIENT, f'{parallel.path_name(path)} is off by {error:.1%}'


def equations(jaxpr):
    """Every equation of a jaxpr, those of the functions that it calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, 'jaxpr', inner)
                if hasattr(inner, 'eqns'):
                    yield from equations(inner)


@pytest.mark.parametrize('stage', ['clip', 'pretrain', 'vision_instruct'])
def test_norms_softmax_and_loss_are_in_float32(stage):
    cfg, graphdef, params, mesh = model(stage, 'bfloat16')
    with jax.set_mesh(mesh):
        traced = jax.make_jaxpr(step.make_eval_step(cfg, graphdef))(params, micro.batch(cfg))
    dtypes = {}
    for equation in equations(traced.jaxpr):
        dtypes.setdefault(equation.primitive.name, set()).update(str(x.aval.dtype) for x in equation.invars)
    for name in ('rsqrt', 'exp', 'log'):  # norms; softmax; the loss
        assert dtypes[name] == {'float32'}, name
    assert 'bfloat16' in dtypes['dot_general']
