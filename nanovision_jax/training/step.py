"""The training state and step of every stage: jax, flax, optax, numpy and jaxtyping are all that it takes.

A state is {'params', 'optimizer'}: the parameters in nested dicts, frozen ones too, and the optimizer's state of those
that learn. `vocabulary` is anything with `size` and `image` (the id of the image token): a Tokenizer, say.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from nanovision_jax import models
from nanovision_jax.models.layers import platform
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
    """A function (learned, frozen, batch) → (loss, gradients) of the mean loss, over optim.accumulate parts.

    Matrices are cast to the dtype of compute once, whatever the number of parts. Gradients are summed in float32.
    """
    parts, objective = config.optim.parts, OBJECTIVES[stage_of(config).objective]
    dtype, reduce_dtype = models.compute_dtype(config.dtype), jnp.dtype(config.optim.reduce_dtype)

    def model_of(learned, frozen):
        return models.merge(graphdef, join(learned, frozen))

    def in_parts(learned, frozen, batch):
        """(sum of losses, their number, gradients of the sum)."""

        def of_part(part):
            def total(learned):
                return objective.total(model_of(learned, frozen), part)

            (loss, count), grads = jax.value_and_grad(total, has_aux=True)(learned)
            return loss, count, _in_float32(grads)

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, of_part(part)), None

        if parts == 1:
            return of_part(batch)
        zeros = jnp.float32(0), jnp.float32(0), _in_float32(jax.tree.map(jnp.zeros_like, learned))
        return jax.lax.scan(add, zeros, _split(batch, parts))[0]

    def across_parts(learned, frozen, batch):
        """The same where every example is compared with those of all parts (GradCache, arXiv:2101.06983).

        The number is 1, as the loss is a mean already; of the rows that are not this device's, embeddings alone.
        """

        def embed(learned, part):
            return objective.embed(model_of(learned, frozen), part)

        def loss_of(learned, embedded):
            return _compared(objective, model_of(learned, frozen), embedded)

        def add(so_far, part_and_slope):
            part, slope = part_and_slope
            _, pull = jax.vjp(lambda learned: embed(learned, part), learned)
            return jax.tree.map(jnp.add, so_far, _in_float32(pull(slope)[0])), None

        every, here, batch = _embedded(functools.partial(embed, learned), batch, parts)
        loss, (direct, slopes) = jax.value_and_grad(loss_of, (0, 1))(learned, every)
        # What the comparison itself learns is the same on every device, and counts once.
        shares = every[0].shape[0]
        direct, loss = jax.tree.map(lambda x: x / shares, (_in_float32(direct), loss))
        grads = jax.lax.scan(add, direct, (batch, jax.tree.map(lambda x: x[here], slopes)))[0]
        return loss, 1 / shares, grads

    def gradients(learned, frozen, batch):
        learned, frozen = _in_compute_dtype(learned, dtype), _in_compute_dtype(frozen, dtype)
        if objective.compare and parts == 1:  # compared by the partitioner, which reduces once too
            sums = in_parts
        else:
            sums = _reduced_once(across_parts if objective.compare else in_parts, reduce_dtype)
        loss, count, grads = sums(learned, frozen, batch)
        return loss / count, jax.tree.map(lambda g: g / count, grads)

    return gradients


def _in_compute_dtype(params, dtype):
    """Parameters with the matrices in the dtype of compute; norms and tables stay as they are."""

    def cast(path, leaf):
        return leaf.astype(dtype) if parallel.path_name(path).endswith('kernel') else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def _in_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _reduced_once(sums, dtype):
    """sums(learned, frozen, batch) → (loss, count, gradients) of all rows, out of those of each `data` device's.

    Left to itself the partitioner reduces the gradients of every part of a batch, in the dtype of compute.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if 'data' not in mesh.axis_names or mesh.shape['data'] == 1:
        return sums

    if platform() == 'cpu':
        dtype = jnp.float32  # XLA's CPU backend dies of a bfloat16 sum

    def local(learned, frozen, batch):
        loss, count, grads = sums(learned, frozen, batch)
        reduced = jax.lax.psum((loss, count, jax.tree.map(lambda g: g.astype(dtype), grads)), 'data')
        return *reduced[:2], _in_float32(reduced[2])

    specs = (PartitionSpec(), PartitionSpec(), PartitionSpec('data'))
    # Unchecked, as attention kernels do not say over which axes their results vary; gradients are then local.
    return jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec(), axis_names={'data'}, check_vma=False)


def _split(batch, parts):
    """Arrays [B, …] as [parts, B / parts, …]. Row i goes to part i mod parts, so every part is sharded over
    the devices as the whole batch is."""
    if 'ends' in batch:  # counted over all rows: row i is row i // parts of its part
        row, column = jnp.divmod(batch['ends'], batch['tokens'].shape[1])
        batch = batch | {'ends': row // parts * batch['tokens'].shape[1] + column}
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)


def _embedded(embed, batch, parts):
    """(what is compared, [devices along `data`, parts, …]; this device's place; the parts of its batch)."""
    alone = 'data' not in jax.sharding.get_abstract_mesh().manual_axes
    here = 0 if alone else jax.lax.axis_index('data')
    batch = _split(batch | {'ends': batch['ends'] - here * batch['tokens'].size}, parts)
    embedded = jax.lax.map(embed, batch)
    return jax.tree.map(lambda x: x[None] if alone else jax.lax.all_gather(x, 'data'), embedded), here, batch


def _compared(objective, model, embedded):
    """The mean loss of what _embedded() gives of all parts."""
    return objective.compare(model, [x.reshape(-1, x.shape[-1]) for x in embedded])


def make_train_step(config, graphdef, optimizer, shardings):
    """The jitted step (state, batch) → (state, metrics); the old state's memory becomes the new one's.

    metrics: loss, grad_norm, the norms of gradients and updates of each part (grad_norm/decoder), and sound: whether
    loss and gradients are finite. Where they are not, the state stays as it is, bit by bit.
    """
    gradients = make_gradients(config, graphdef)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state, batch):
        learned, frozen = partition(config, state['params'])
        loss, grads = gradients(learned, frozen, batch)
        with jax.named_scope('optimizer'):
            updates, opt_state = optimizer.update(grads, state['optimizer'], learned)
            updated = optax.apply_updates(learned, updates)
            squares = _squares(grads)
            norm = jnp.sqrt(sum(squares.values()))
            sound = jnp.isfinite(loss) & jnp.isfinite(norm)
            before, after = (learned, state['optimizer']), (updated, opt_state)
            learned, opt_state = jax.tree.map(lambda new, old: jnp.where(sound, new, old), after, before)
        metrics = {'loss': loss, 'grad_norm': norm, 'sound': sound}
        for name, parts in (('grad_norm', squares), ('update_norm', _squares(updates))):
            metrics |= {f'{name}/{part}': jnp.sqrt(value) for part, value in parts.items()}
        return {'params': join(learned, frozen), 'optimizer': opt_state}, metrics

    return train_step


def _squares(tree):
    """{part: the sum of squares of its leaves}: the parts are a tree's topmost names."""
    return {part: sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(inside)) for part, inside in tree.items()}


def make_eval_step(config, graphdef):
    """The jitted (params, batch) → (sum of losses, their number); in parts as a step, as the whole may not fit."""
    parts, objective = config.optim.parts, OBJECTIVES[stage_of(config).objective]

    def model_of(params):
        return models.merge(graphdef, params)

    def total(params, batch):
        return objective.total(model_of(params), batch)

    def in_parts(params, _, batch):
        if objective.compare is None:
            sums = jax.lax.map(lambda part: total(params, part), _split(batch, parts))
            return *jax.tree.map(jnp.sum, sums), {}
        every, *_ = _embedded(lambda part: objective.embed(model_of(params), part), batch, parts)
        shares = every[0].shape[0]
        return _compared(objective, model_of(params), every) / shares, jnp.float32(1 / shares), {}

    if parts == 1:
        return jax.jit(total)
    return jax.jit(lambda params, batch: _reduced_once(in_parts, jnp.float32)(params, {}, batch)[:2])
