"""The state of a run: its shapes and shardings, its value at step 0, and as it was saved."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
from flax.core.meta import unbox

from sslx.checkpoint import CheckpointError, Checkpoints
from sslx.config import Config, ConfigError
from sslx.ops.trees import axis_named
from sslx.paths import Place
from sslx.sharding import Mesh, batch_sharding, check_batch, shardings, ways
from sslx.types import Array, Batch, Buffers, Params, Tree


@flax.struct.dataclass
class TrainState:
    """All that a checkpoint holds: arrays, or in their place shapes or shardings."""

    step: Tree  # int32 scalar: optimizer steps taken
    key: Tree  # typed; never split, only folded with the step
    params: Params
    buffers: Buffers
    opt_state: Tree
    dropped: Tree  # float32 [sources]: examples, so far, whose record was corrupt


def init_state(key: Array, batch: Batch, *, config: Config) -> TrainState:
    """A fresh state for host batches shaped like `batch`; params still carry their axes' names."""
    batch = config.views.train(key, batch)
    params, buffers = config.objective.init(jax.random.fold_in(key, 0), batch)
    opt_state = config.optimizer.init(params)
    dropped = jnp.zeros(config.data.sources)
    return TrainState(jnp.int32(0), jax.random.fold_in(key, 1), params, buffers, opt_state, dropped)


def layers_of(config: Config, batch: Batch) -> Tree:
    """For each of the params, the axis on which a scan stacks its layers, -1 where none does."""
    return axis_named(boxed_state(config, batch).params, "layers")


def boxed_state(config: Config, batch: Tree) -> TrainState:
    """Shapes and dtypes of the state for batches like `batch`; params carry their axes' names."""
    return _boxed(config, tuple((name, x.shape, x.dtype) for name, x in sorted(batch.items())))


@functools.lru_cache(maxsize=16)
def _boxed(config: Config, shapes: tuple) -> TrainState:
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in shapes}
    fresh = lambda batch: init_state(new_key(config), batch, config=config)  # noqa: E731
    return jax.eval_shape(fresh, batch)


def built_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of `config` over `devices` (all of them by default), by the size of its state."""
    shapes = config.data.shapes(config.batch_size)
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    leaves = jax.tree.leaves(unbox(boxed_state(config, batch)))
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    return config.mesh.build(devices, size)


def check(config: Config) -> jax.sharding.Mesh:
    """The run's mesh; raises ValueError for what names and shapes alone show to fail later."""
    mesh = built_mesh(config)
    config.data.check()
    for evaluation in config.evals.values():
        evaluation.check()
    abstract_state(config, mesh)
    return mesh


@functools.lru_cache(maxsize=8)
def abstract_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state: no memory, no device work."""
    with jax.set_mesh(mesh):
        boxed = boxed_state(config, abstract_batch(config, mesh))
    if config.accumulate > 1 and (reason := config.objective.coupling(boxed.buffers)):
        raise ConfigError(
            f"accumulate={config.accumulate} would change the loss of "
            f"{type(config.objective).__name__}: {reason}; or use accumulate=1."
        )
    where = shardings(boxed, mesh)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(place, unbox(boxed), where)


def abstract_batch(config: Config, mesh: jax.sharding.Mesh) -> Tree:
    """Shapes and shardings of the global batch that views and objective read."""
    check_batch(config.batch_size, mesh, config.accumulate)
    shapes = config.data.shapes(config.batch_size)
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    return {name: struct(*shape) for name, shape in shapes.items()}


def fresh_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """A state at random init, made in one jitted function, so that no two leaves are one array."""
    where = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    shapes = {k: (x.shape, x.dtype) for k, x in abstract_batch(config, mesh).items()}

    def make(key):
        batch = {name: jnp.zeros(*shape) for name, shape in shapes.items()}
        return unbox(init_state(key, batch, config=config))

    with jax.set_mesh(mesh):
        return jax.jit(make, out_shardings=where)(new_key(config))


def first_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """The state of step 0: random init, or with the params that `config.start` brings."""
    state = fresh_state(config, mesh)
    if config.start is None:
        return state
    with jax.set_mesh(mesh):
        params, buffers = config.start(state.params, state.buffers)
    return state.replace(params=params, buffers=buffers)


def restored(
    run: Place, config: Config, step: int | None = None
) -> tuple[Config, jax.sharding.Mesh, int, TrainState]:
    """(config, mesh, step, state) of a run's newest checkpoint that verifies, or of `step`'s.

    A mesh that these devices do not make up is replaced by one over all of them, and a batch that
    these do not divide by the next larger one that they do.
    """
    try:
        mesh = built_mesh(config)
    except ValueError:
        config = dataclasses.replace(config, mesh=Mesh())
        mesh = built_mesh(config)
    unit = ways(mesh) * config.accumulate
    config = dataclasses.replace(config, batch_size=-(-config.batch_size // unit) * unit)
    checkpoints = Checkpoints(run / "checkpoints", config.keep)
    try:
        found = checkpoints.restore(abstract_state(config, mesh), step)
    finally:
        checkpoints.close()
    if found is None:
        raise CheckpointError(f"{run} has no checkpoint yet: train it first.")
    return config, mesh, *found


def new_key(config: Config) -> Array:
    """The root PRNG key of a run."""
    return jax.random.key(config.seed)
