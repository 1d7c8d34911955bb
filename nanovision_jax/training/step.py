"""The training state and step of every stage: jax, flax, optax, numpy and jaxtyping are all that it takes.

A state is {'params', 'optimizer'}: the parameters in nested dicts, frozen ones too, and the optimizer's state of those
that learn. `vocabulary` is anything with `size` and `image` (the id of the image token): a Tokenizer, say.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from nanovision_jax import models
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.stages import stage_of
from nanovision_jax.training.objectives import OBJECTIVES

# What learns ---------------------------------------------------------------------------------------------------------


def partition(config, params) -> tuple[dict, dict]:
    """(what learns in the config's stage, what is frozen): parts of `params`, nested dicts, by their paths.

    What is frozen gets no gradient and no optimizer state, and its bytes are the same afterwards.
    """
    return _select(params, stage_of(config).learns), _select(params, lambda path: not stage_of(config).learns(path))


def _select(tree, chosen, path=''):
    """The leaves of nested dicts whose path is `chosen`; dicts without any are left out."""
    kept = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            if inside := _select(value, chosen, f'{path}{name}/'):
                kept[name] = inside
        elif chosen(path + name):
            kept[name] = value
    return kept


def join(a, b) -> dict:
    """Two partitions as one tree again."""
    both = {name: join(a[name], b[name]) for name in a.keys() & b.keys()}
    return a | b | both


# The state -----------------------------------------------------------------------------------------------------------


def abstract_state(config, vocabulary, optimizer, mesh) -> tuple:
    """(graphdef, state) with a jax.ShapeDtypeStruct, sharding included, for every array; allocates nothing.

    Training, checkpoints, tests, benchmarks and planning take the state's shapes from here.
    """
    graphdef, params = models.abstract(config, vocabulary.size, vocabulary.image)
    shapes = {'params': params, 'optimizer': jax.eval_shape(optimizer.init, partition(config, params)[0])}
    shardings = parallel.shardings(shapes, mesh)
    return graphdef, jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def shardings_of(tree):
    """The same tree with the sharding of every array, abstract or not."""
    return jax.tree.map(lambda x: x.sharding, tree)


def init_state(config, vocabulary, optimizer, shapes, params=None) -> dict:
    """A new state of the shapes that abstract_state() gives, each array made where its sharding says.

    params: the parameters as far as they were read; a jax.ShapeDtypeStruct stands for what is still to be made, which
    is random.
    """
    params = shapes['params'] if params is None else params
    missing = [name for name, part in params.items() if isinstance(jax.tree.leaves(part)[0], jax.ShapeDtypeStruct)]

    def made():
        model = models.build(config, vocabulary.size, vocabulary.image, nnx.Rngs(config.seed))
        random = nnx.to_pure_dict(nnx.state(model))
        return {name: random[name] for name in missing}

    params = params | jax.jit(made, out_shardings={name: shardings_of(params[name]) for name in missing})()
    new = jax.jit(lambda p: optimizer.init(partition(config, p)[0]), out_shardings=shardings_of(shapes['optimizer']))
    return {'params': params, 'optimizer': new(params)}


# The step ------------------------------------------------------------------------------------------------------------


def make_gradients(config, graphdef):
    """A function (learned, frozen, batch) → (loss, gradients) of the mean loss, over optim.accumulate parts."""
    parts, objective = config.optim.accumulate, OBJECTIVES[stage_of(config).objective]
    if parts == 1:
        return functools.partial(_gradients, graphdef, objective)
    of_parts = _gradients_across_parts if objective.compare else _gradients_in_parts
    return functools.partial(of_parts, graphdef, objective, parts)


def _model(graphdef, learned, frozen):
    return models.merge(graphdef, join(learned, frozen))


def _total_gradients(graphdef, objective, learned, frozen, batch):
    """((sum of losses, their number), gradients of the sum)."""

    def total(learned):
        return objective.total(_model(graphdef, learned, frozen), batch)

    return jax.value_and_grad(total, has_aux=True)(learned)


def _gradients(graphdef, objective, learned, frozen, batch):
    (loss, count), grads = _total_gradients(graphdef, objective, learned, frozen, batch)
    return loss / count, jax.tree.map(lambda g: g / count, grads)


def _gradients_in_parts(graphdef, objective, parts, learned, frozen, batch):
    def add(so_far, part):
        (loss, count), grads = _total_gradients(graphdef, objective, learned, frozen, part)
        return jax.tree.map(jnp.add, so_far, (loss, count, grads)), None

    zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, learned))
    (loss, count, grads), _ = jax.lax.scan(add, zero, _split(batch, parts))
    return loss / count, jax.tree.map(lambda g: g / count, grads)


def _gradients_across_parts(graphdef, objective, parts, learned, frozen, batch):
    """Every example is compared with those of all parts, as in GradCache (arXiv:2101.06983)."""

    def embed(learned, part):
        return objective.embed(_model(graphdef, learned, frozen), part)

    def loss_of(learned, embedded):
        whole = [x.reshape(-1, x.shape[-1]) for x in embedded]
        return objective.compare(_model(graphdef, learned, frozen), whole)

    def add(so_far, part_and_slope):
        part, slope = part_and_slope
        _, pull = jax.vjp(lambda learned: embed(learned, part), learned)
        return jax.tree.map(jnp.add, so_far, pull(slope)[0]), None

    batch = _split(batch, parts)
    embedded = jax.lax.map(lambda part: embed(learned, part), batch)
    loss, (direct, slopes) = jax.value_and_grad(loss_of, (0, 1))(learned, embedded)
    return loss, jax.lax.scan(add, direct, (batch, slopes))[0]


def _split(batch, parts):
    """Arrays [B, …] as [parts, B / parts, …]. Row i goes to part i mod parts, so every part is sharded over
    the devices as the whole batch is."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)


def make_train_step(config, graphdef, optimizer, shardings):
    """The jitted step (state, batch) → (state, {loss, grad_norm}); the old state's memory becomes the new one's."""
    gradients = make_gradients(config, graphdef)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state, batch):
        learned, frozen = partition(config, state['params'])
        loss, grads = gradients(learned, frozen, batch)
        with jax.named_scope('optimizer'):
            updates, opt_state = optimizer.update(grads, state['optimizer'], learned)
            learned = optax.apply_updates(learned, updates)
        metrics = {'loss': loss, 'grad_norm': optax.tree.norm(grads)}
        return {'params': join(learned, frozen), 'optimizer': opt_state}, metrics

    return train_step


def make_eval_step(config, graphdef):
    """The jitted (params, batch) → (sum of losses, their number)."""
    objective = OBJECTIVES[stage_of(config).objective]
    return jax.jit(lambda params, batch: objective.total(models.merge(graphdef, params), batch))
