"""The state, the step, and the only loop. It does not know what it is training."""

import contextlib
import dataclasses
import functools
import json
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core.meta import unbox
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sslx.checkpoint import CheckpointError, Checkpoints
from sslx.config import Config, recipe_of
from sslx.log import Clock, Log, write_whole
from sslx.ops.trees import norm
from sslx.sharding import Mesh, batch_sharding, check_batch, shardings
from sslx.signals import Interrupted, Signals
from sslx.types import Array, Batch, Buffers, Metrics, Params, Tree

# What a step's key is folded with: one stream of random numbers for each use.
VIEWS, LOSS = 0, 1
# The metrics that show a step to be sound: a good loss alone does not vouch for the params it left.
FINITE = ("loss", "grad_norm", "param_norm")


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds, and nothing more; or the shapes or shardings of all that."""

    step: Tree  # int32 scalar: optimizer steps taken
    key: Tree  # typed; never split, only folded with the step
    params: Params
    buffers: Buffers
    opt_state: Tree


class Diverged(RuntimeError):
    """The loss or a gradient is not finite."""


class Collapsed(Diverged):
    """The embeddings of all examples have become one."""


# ---- the step ----


def init_state(key: Array, batch: Batch, *, config: Config) -> TrainState:
    """A fresh state for host batches shaped like `batch`; params still carry their axes' names."""
    batch = config.views.train(key, batch)
    params, buffers = config.objective.init(jax.random.fold_in(key, 0), batch)
    opt_state = config.optimizer.init(params)
    return TrainState(jnp.int32(0), jax.random.fold_in(key, 1), params, buffers, opt_state)


def train_step(state: TrainState, batch: Batch, *, config: Config) -> tuple[TrainState, Metrics]:
    """One optimizer step on one global batch."""
    key = jax.random.fold_in(state.key, state.step)
    batch = config.views.train(jax.random.fold_in(key, VIEWS), batch)
    loss, grads, buffers, metrics = accumulated(
        config.objective.loss, state, batch, jax.random.fold_in(key, LOSS), config.accumulate
    )
    updates, opt_state = config.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    buffers = config.objective.update(params, buffers, state.step)
    moved = TrainState(state.step + 1, state.key, params, buffers, opt_state)
    rate = config.optimizer.learning_rate(state.step)
    norms = {"grad_norm": norm(grads), "param_norm": norm(params)}
    metrics = {"loss": loss, **norms, "learning_rate": rate, **metrics}
    if config.nonfinite == "skip":
        good = jnp.isfinite(jnp.stack([metrics[name] for name in FINITE])).all()
        still = state.replace(step=moved.step, opt_state=counted(state.opt_state, opt_state))
        moved = jax.tree.map(functools.partial(jnp.where, good), moved, still)
        metrics["skipped"] = 1 - good.astype(jnp.int32)
    return moved, metrics


def counted(before: Tree, after: Tree) -> Tree:
    """An optimizer's state with only its counts moved: its schedules keep up with the step."""
    whole = lambda x: jnp.issubdtype(x.dtype, jnp.integer)  # noqa: E731
    return jax.tree.map(lambda b, a: a if whole(b) else b, before, after)


def accumulated(
    loss: Callable, state: TrainState, batch: Batch, key: Array, parts: int
) -> tuple[Array, Params, Buffers, Metrics]:
    """Loss, gradient and metrics of a batch as the means over `parts` micro-batches, in turn.

    Every micro-batch takes each parts-th example, so that it is spread over all devices.
    """
    differentiate = jax.value_and_grad(loss, has_aux=True)

    def part(carry, micro):
        total, buffers, i = carry
        (value, (buffers, metrics)), grads = differentiate(
            state.params, buffers, micro, jax.random.fold_in(key, i), state.step
        )
        total = jax.tree.map(lambda t, g: t + g / parts, total, grads)
        return (total, buffers, i + 1), (value, metrics)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    start = (zeros, state.buffers, jnp.int32(0))
    if parts == 1:  # no loop: a CPU's convolutions are 25 times slower in what was one
        (grads, buffers, _), (value, metrics) = part(start, batch)
        return value, grads, buffers, metrics
    micros = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    (grads, buffers, _), (values, metrics) = jax.lax.scan(part, start, micros)
    return values.mean(), grads, buffers, jax.tree.map(lambda m: m.mean(0), metrics)


# ---- on a mesh ----


def check(config: Config) -> jax.sharding.Mesh:
    """Raise now whatever can be known to fail later, from names and shapes alone; the mesh."""
    mesh = config.mesh.build()
    config.data.check()
    for evaluation in config.evals.values():
        evaluation.check()
    abstract_state(config, mesh)
    return mesh


@functools.lru_cache(maxsize=8)
def abstract_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state: no memory, no device work."""
    batch = abstract_batch(config, mesh)
    with jax.set_mesh(mesh):  # the key inside too: the mesh may be of devices that are not there
        fresh = lambda batch: init_state(new_key(config), batch, config=config)  # noqa: E731
        boxed = jax.eval_shape(fresh, batch)
    where = shardings(boxed, mesh)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(place, unbox(boxed), where)


def abstract_batch(config: Config, mesh: jax.sharding.Mesh) -> Tree:
    """Shapes and shardings of the global batch that the host sends."""
    check_batch(config.batch_size, mesh, config.accumulate)
    shapes = config.data.shapes(config.batch_size)
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    return {name: struct(*shape) for name, shape in shapes.items()}


def fresh_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """The state of step 0, made in one jitted function, so that no two leaves are one array."""
    where = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    shapes = {k: (x.shape, x.dtype) for k, x in abstract_batch(config, mesh).items()}

    def make(key):
        batch = {name: jnp.zeros(*shape) for name, shape in shapes.items()}
        return unbox(init_state(key, batch, config=config))

    with jax.set_mesh(mesh):
        return jax.jit(make, out_shardings=where)(new_key(config))


def restored(
    run: Path | str, step: int | None = None
) -> tuple[Config, jax.sharding.Mesh, int, TrainState]:
    """(config, mesh, step, state) of a run's newest checkpoint that verifies, or of `step`'s.

    A mesh that these devices do not make up is replaced by one over all of them.
    """
    run = Path(run)
    config = recipe_of(run).load()
    try:
        mesh = config.mesh.build()
    except ValueError:
        config = dataclasses.replace(config, mesh=Mesh())
        mesh = config.mesh.build()
    checkpoints = Checkpoints(run / "checkpoints", config.keep)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise CheckpointError(f"{run} has no checkpoint yet: train it first.")
        if step is not None and step not in steps:
            raise CheckpointError(f"{run} has no checkpoint of step {step}, only of {steps}.")
        found = checkpoints.restore(abstract_state(config, mesh), step)
    finally:
        checkpoints.close()
    return config, mesh, *found


def new_key(config: Config) -> Array:
    return jax.random.key(config.seed)


def jitted_step(config: Config, mesh: jax.sharding.Mesh) -> Callable:
    """`train_step` for `config` on `mesh`: (state, batch) -> (state, metrics), state donated."""
    where = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    step = functools.partial(train_step, config=config)
    return jax.jit(step, donate_argnums=0, out_shardings=(where, NamedSharding(mesh, P())))


@contextlib.contextmanager
def feed(config: Config, mesh: jax.sharding.Mesh, start: int, depth: int = 2):
    """Global batches on the devices from step `start` on, `depth` of them ahead of their use."""
    host, hosts = jax.process_index(), jax.process_count()
    batches = config.data.batches(config.seed, config.batch_size, start, host, hosts)
    place = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    ready: queue.Queue = queue.Queue(depth)
    closed = threading.Event()

    def send(item) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def work() -> None:
        try:
            while not closed.is_set():
                batch = jax.tree.map(place, next(batches))
                send(lambda batch=batch: batch)
        except BaseException as error:  # raised where the batch is asked for
            send(functools.partial(_raise, error))

    def take() -> Iterator[Batch]:
        while True:
            yield ready.get()()

    thread = threading.Thread(target=work, name="sslx-feed", daemon=True)
    thread.start()
    try:
        yield take(), batches.dropped
    finally:
        closed.set()
        thread.join()
        batches.close()


def _raise(error: BaseException):
    raise error


# ---- the loop ----


def train(config: Config, run: Path) -> TrainState:
    """Train to `config.steps` in the directory `run`, from its newest good checkpoint if any.

    Raises Interrupted after SIGTERM or Ctrl-C, with everything saved; Diverged when the loss is no
    longer finite, and Collapsed on request, with the newest checkpoint from before; CheckpointError
    when the last step could not be saved.
    """
    run.mkdir(parents=True, exist_ok=True)
    mesh = check(config)
    checkpoints = Checkpoints(run / "checkpoints", config.keep)
    try:
        with jax.set_mesh(mesh), Signals() as signals:
            start, state = checkpoints.restore(abstract_state(config, mesh)) or (0, None)
            log = Log(run, config.steps, start)
            try:
                scores = Scores(config, mesh, run, log)
                state = scores.begin(start, state)
                if start >= config.steps:
                    log.say(f"{run} is complete: {start} of {config.steps} steps.")
                    return state
                watch = Watch(config, log, checkpoints)
                return loop(config, mesh, start, state, watch, scores, signals)
            finally:
                checkpoints.wait()
                log.close()
    finally:
        checkpoints.close()


def loop(config, mesh, start: int, state: TrainState, watch, scores, signals) -> TrainState:
    """Dispatch a step, then look at the one before; evals and saves lie between two steps."""
    step_fn, pending = jitted_step(config, mesh), None
    with feed(config, mesh, start) as (batches, dropped):
        for step in range(start + 1, config.steps + 1):
            state, metrics = step_fn(state, watch.clock.wait(batches))
            if pending:
                watch.see(*pending)
            pending = (step, metrics, dropped)
            stop = signals.received(step)
            last = step == config.steps or stop
            if last or step % config.save_every == 0 or step % config.eval_every == 0:
                watch.see(*pending)
                pending = None
            if last or step % config.save_every == 0:
                watch.checkpoints.save(step, state)
            if not stop and (last or step % config.eval_every == 0):
                scores.add(step, state)
                watch.clock.read(0)
            if stop:
                raise Interrupted(stop, step, watch.newest())
    if (newest := watch.newest()) < config.steps:
        raise CheckpointError(
            f"The last step could not be saved, nothing after step {newest} is kept: make room, "
            f"and the same command goes on from there."
        )
    return state


class Watch:
    """Looks at metrics once they have arrived: says them, and stops what has gone wrong."""

    def __init__(self, config: Config, log: Log, checkpoints: Checkpoints):
        self.config, self.log, self.checkpoints = config, log, checkpoints
        self.clock, self.since, self.skipped, self.flat = Clock(), 0, 0, 0

    def see(self, step: int, metrics: Metrics, dropped: dict[str, str]) -> None:
        """One step's metrics, fetched here, while the next step is already under way."""
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        self.skipped += int(values.pop("skipped", 0))
        finite = all(np.isfinite(values[name]) for name in FINITE)
        if not finite and self.config.nonfinite == "stop":
            raise Diverged(self.diagnosis(step, values))
        self.collapse(step, values)
        self.since += 1
        if step > 1 and step % self.config.log_every and step != self.config.steps:
            return self.log.progress(step)
        rate, waited = self.clock.read(self.since)
        self.since, speed = 0, rate * self.config.batch_size
        counts = {"skipped": self.skipped, "data/dropped": len(dropped)}
        counts = {name: n for name, n in counts.items() if n}
        self.log.write(step, {**values, "examples_per_s": speed, "data/waited": waited, **counts})
        said = [f"loss {values['loss']:.4f}", f"{speed:,.0f} examples/s", f"waited {waited:.0%}"]
        said += [f"{name} {n}" for name, n in counts.items()]
        self.log.progress(step, "  ".join(said), line=True)

    def diagnosis(self, step: int, values: dict[str, float]) -> str:
        said = ", ".join(f"{name} {values[name]:.4g}" for name in FINITE)
        return (
            f"Step {step}: {said}; {self.kept(step)}. "
            f"Lower the learning rate or clip gradients, or drop such steps: nonfinite=skip."
        )

    def collapse(self, step: int, values: dict[str, float]) -> None:
        """Warn, once, or stop when the embeddings of all examples have become one."""
        alarm = self.config.collapse
        self.flat = self.flat + 1 if values.get(alarm.metric, np.inf) < alarm.below else 0
        if self.flat != alarm.patience:
            return
        text = (
            f"Step {step}: {alarm.metric} {values[alarm.metric]:.2g} has been below {alarm.below} "
            f"for {alarm.patience} steps, all embeddings are nearly one: the run has collapsed; "
            f"{self.kept(step - alarm.patience)}. Look at the learning rate, the predictor and the "
            f"target's decay, the views"
        )
        if alarm.then == "stop":
            raise Collapsed(f"{text}; or go on with collapse.then=warn.")
        self.log.warn(f"{text}; collapse.then=stop would end it here.")

    def kept(self, step: int) -> str:
        good = self.newest(step)
        return f"the newest checkpoint from before is step {good}" if good else "nothing saved"

    def newest(self, before: int | None = None) -> int:
        """The newest checkpoint, once all is written, or the newest before a step; 0 for none."""
        self.checkpoints.wait()
        return max((s for s in self.checkpoints.steps() if before is None or s < before), default=0)


class Scores:
    """The evaluations of a run, in evals.json: those of random init first."""

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, run: Path, log: Log):
        self.config, self.mesh, self.log, self.path = config, mesh, log, run / "evals.json"
        self.known = json.loads(self.path.read_text()) if self.path.exists() else {}

    def begin(self, start: int, state: TrainState | None) -> TrainState:
        """The state to go on from, after the evaluations that are missing: random init, once in a
        run's life, and the step resumed from, if a stop came between its save and its evaluation.
        """
        config, names = self.config, ("random init", f"step {start}")
        missing = np.asarray([bool(config.evals) and name not in self.known for name in names])
        if jax.process_count() > 1:  # a shared disk may show its files unequal
            missing = multihost_utils.broadcast_one_to_all(missing)
        if state is None or missing[0]:
            fresh = fresh_state(config, self.mesh)
            self.add(0, fresh, "random init")
        if state is None:
            return fresh
        if missing[1] and (start % config.eval_every == 0 or start >= config.steps):
            self.add(start, state)
        return state

    def add(self, step: int, state: TrainState, name: str = "") -> None:
        """Run every eval, write its numbers and pictures, say them beside random init's."""
        if not self.config.evals:
            return
        self.log.progress(step, "evaluating")
        values = evaluate(self.config, self.mesh, state)
        self.log.write(step, values)
        scores = {k: v for k, v in values.items() if not isinstance(v, np.ndarray)}
        base = self.known.get("random init", {})
        self.known[name or f"step {step}"] = scores
        if self.log.speaks:
            with self.log.forgiving(step, self.path.name):
                write_whole(self.path, json.dumps(self.known, indent=1) + "\n")
        said = [
            f"{k} {v:.4g}" + (f" ({base[k]:.4g})" if k in base else "") for k, v in scores.items()
        ]
        self.log.say(f"step {step}{' (random init)' * bool(base)}:  " + "  ".join(said))


def evaluate(config: Config, mesh: jax.sharding.Mesh, state: TrainState) -> dict:
    """All numbers and pictures of all evals of `config` for a state on `mesh`."""
    given = (config.objective, state.params, state.buffers, config.views, batch_sharding(mesh))
    return {name: value for run in config.evals.values() for name, value in run(*given)}
