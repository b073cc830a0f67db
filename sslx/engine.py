"""The training step, and the only loop. It does not know what it is training."""

import contextlib
import functools
import logging
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sslx.audit import Audit
from sslx.checkpoint import CheckpointError, Checkpoints
from sslx.chips import CHIPS, chip_of, options
from sslx.config import Config, leaves, override
from sslx.gang import Gang
from sslx.goodput import Account, Clock, Compilations
from sslx.log import Log
from sslx.models.attention import heard
from sslx.ops.flops import flops
from sslx.ops.trees import norm
from sslx.paths import Place
from sslx.sharding import batch_sharding, placed, rows_here, slice_of
from sslx.signals import Interrupted, Signals
from sslx.state import TrainState, abstract_batch, abstract_state, check, layers_of
from sslx.types import Array, Batch, Buffers, Metrics, Params
from sslx.watch import FINITE, Scores, Watch

logger = logging.getLogger("sslx")

OWN_METRICS = ("loss", "grad_norm", "param_norm", "learning_rate", "skipped", "dropped")

# What a step's key is folded with, one stream of random numbers for each use: the views of
# micro-batch i with VIEWS + 2 * i, all losses with LOSS, and then with i.
VIEWS, LOSS = 0, 1


# ---- the step ----


def train_step(state: TrainState, batch: Batch, *, config: Config) -> tuple[TrainState, Metrics]:
    """One optimizer step on one global batch, as a pipeline makes it."""
    batch = dict(batch)
    dropped = state.dropped + jnp.sum(batch.pop("dropped", state.dropped[None] * 0), 0)
    loss, grads, buffers, metrics = accumulated(state, batch, config=config)
    layers = layers_of(config, batch)  # where a scan stacks them, for layer-wise optimizers
    updates, opt_state = config.optimizer.update(
        grads, state.opt_state, state.params, state.step, layers
    )
    params = optax.apply_updates(state.params, updates)
    params, buffers = config.objective.update(params, buffers, state.step)
    moved = TrainState(state.step + 1, state.key, params, buffers, opt_state, dropped)
    rate = config.optimizer.learning_rate(state.step)
    norms = {"grad_norm": norm(grads), "param_norm": norm(params)}
    metrics = {"loss": loss, **norms, "learning_rate": rate, "dropped": dropped, **metrics}
    if config.nonfinite == "skip":
        good = jnp.isfinite(jnp.stack([metrics[name] for name in FINITE])).all()
        unmoved = state.replace(step=moved.step, dropped=dropped)
        moved = jax.tree.map(functools.partial(jnp.where, good), moved, unmoved)
        metrics["skipped"] = 1 - good.astype(jnp.int32)
    return moved, metrics


def accumulated(
    state: TrainState, batch: Batch, *, config: Config
) -> tuple[Array, Params, Buffers, Metrics]:
    """Loss, gradient, buffers and metrics of one global batch, in `config.accumulate` parts.

    Loss, gradient and metrics are the means over micro-batches, weighted by the metric `weight`,
    so that they are those of the whole batch; one of weight 0 counts for nothing, even if its loss
    is 0 / 0. Buffers move once, by the mean of what each
    micro-batch would move them. Every micro-batch is rendered by the views when its turn comes, and
    takes every n-th example, so that it is spread over all devices.
    """
    key, n = jax.random.fold_in(state.key, state.step), config.accumulate
    differentiate = jax.value_and_grad(config.objective.loss, has_aux=True)

    def micro_step(batch: Batch, i: Array):
        batch = config.views.train(jax.random.fold_in(key, VIEWS + 2 * i), batch)
        loss_key = jax.random.fold_in(jax.random.fold_in(key, LOSS), i)
        (loss, (buffers, metrics)), grads = differentiate(
            state.params, state.buffers, batch, loss_key, state.step
        )
        if bad := [n for n, x in metrics.items() if n in OWN_METRICS or jnp.ndim(x)]:
            raise ValueError(
                f"The objective's metrics {', '.join(bad)}: a metric is a scalar, and "
                f"{', '.join(OWN_METRICS)} are the step's own."
            )
        metrics = {"loss": loss, **metrics}
        return grads, buffers, metrics, jnp.float32(metrics.pop("weight", 1))

    if n == 1:  # no loop: a CPU's convolutions are 25 times slower in one
        grads, buffers, metrics, _ = micro_step(batch, jnp.int32(0))
        return metrics.pop("loss"), grads, buffers, metrics

    def add(sums, micro):
        grads, buffers, metrics, weight = micro_step(*micro)
        weighted = lambda total, x: total + jnp.where(weight > 0, weight * x, 0)  # noqa: E731
        total, metrics_total, weights, moved = sums
        total, metrics_total = jax.tree.map(weighted, (total, metrics_total), (grads, metrics))
        moved = jax.tree.map(functools.partial(add_share, n), moved, buffers, state.buffers)
        return (total, metrics_total, weights + weight, moved), None

    micros = jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), batch)
    first = jax.tree.map(lambda x: x[0], micros)
    shapes = jax.eval_shape(micro_step, first, jnp.int32(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (shapes[0], shapes[2]))
    start = (*zeros, jnp.float32(0), state.buffers)
    sums, _ = jax.lax.scan(add, start, (micros, jnp.arange(n)))
    grads, metrics, weights, buffers = sums
    share = 1 / jnp.where(weights > 0, weights, 1)
    grads, metrics = jax.tree.map(lambda x: x * share, (grads, metrics))
    grads = jax.tree.map(lambda x, shape: x.astype(shape.dtype), grads, shapes[0])
    return metrics.pop("loss"), grads, buffers, metrics


def add_share(n: int, total: Array, new: Array, old: Array) -> Array:
    """`total` and 1 / n of the change of a buffer from `old` to `new`; integers by all of it, what
    is no number is replaced. A buffer that does not change stays as it is, to the last bit."""
    if jnp.issubdtype(old.dtype, jnp.floating):
        return total + (new - old) / n
    if jnp.issubdtype(old.dtype, jnp.integer):
        return total + (new - old)
    return new


# ---- on a mesh ----


def jitted_step(config: Config, mesh: jax.sharding.Mesh) -> Callable:
    """`train_step` for `config` on `mesh`: (state, batch) -> (state, metrics), state donated."""
    state_shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    out_shardings = (state_shardings, NamedSharding(mesh, P()))
    step = functools.partial(train_step, config=config)
    given = compiler_options(config, list(mesh.devices.flat)) or None
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings, compiler_options=given)


def compiler_options(config: Config, devices: Sequence[jax.Device]) -> dict[str, bool | int | str]:
    """What the step's compiler is given: the table's options for the chip, then the recipe's. Of a
    step that is audited, a GPU's results must not depend on the order of atomic operations."""
    slices = len({slice_of(device) for device in devices})
    exact = config.audit_every is not None and devices[0].platform == "gpu"
    audited = {"xla_gpu_exclude_nondeterministic_ops": True} if exact else {}
    return {**options(devices[0].device_kind, slices), **audited, **config.compiler}


def step_flops(config: Config, mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Floating-point operations of a step on all devices, as it is computed, and without what
    `remat` has computed a second time."""
    state, batch = abstract_state(config, mesh), abstract_batch(config, mesh)
    needed = config
    for path, value in leaves(config.objective, "objective"):
        if path.endswith(".remat") and isinstance(value, str) and value != "none":
            needed = override(needed, path, "none")
    with jax.set_mesh(mesh):
        count = lambda config: flops(functools.partial(train_step, config=config), state, batch)  # noqa: E731
        done = count(config)
        return done, done if needed == config else count(needed)


def fastest(config: Config, mesh: jax.sharding.Mesh) -> float:
    """Steps a second if all devices did what a step needs at their peak; nan where sslx.chips does
    not know the devices, and on all processes but the first. Traces the step, which takes seconds.
    """
    chip = chip_of(mesh.devices.flat[0].device_kind)
    if not chip or jax.process_index():
        return math.nan
    try:
        _, needed = step_flops(config, mesh)
    except Exception as error:  # a metric ends no run
        logger.warning("share_of_peak is not known: %s", error)
        return math.nan
    return mesh.devices.size * CHIPS[chip].peak / max(needed, 1)


@contextlib.contextmanager
def feed(config: Config, mesh: jax.sharding.Mesh, start: int, depth: int = 2):
    """Global batches on the devices from step `start` on, `depth` of them ahead of their use."""
    sharding, expected = batch_sharding(mesh), fed_batch(config, mesh)
    rows = rows_here(config.batch_size, sharding)
    batches = config.data.batches(config.seed, config.batch_size, start, rows)
    ready: queue.Queue = queue.Queue(depth)
    closed = threading.Event()

    def send(item) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def work() -> None:
        try:
            while not closed.is_set():
                batch = placed(next(batches), rows, config.batch_size, sharding)
                check_fed(batch, expected)
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


def fed_batch(config: Config, mesh: jax.sharding.Mesh) -> dict:
    """Shapes and shardings of what enters the step: the batch, and what was dropped for it."""
    dropped = (config.batch_size, config.data.sources)
    return {
        **abstract_batch(config, mesh),
        "dropped": jax.ShapeDtypeStruct(dropped, jnp.float32, sharding=batch_sharding(mesh)),
    }


def check_fed(batch: dict, expected: dict) -> None:
    """Raise ValueError for a batch that is not as the decoder declares: the step was compiled for
    that, and would be compiled again."""
    shapes = [{name: (x.dtype, x.shape) for name, x in of.items()} for of in (batch, expected)]
    if shapes[0] != shapes[1]:
        made, declared = ({k: f"{d}{list(s)}" for k, (d, s) in of.items()} for of in shapes)
        raise ValueError(f"A batch is {made}, but the pipeline's decoder declares {declared}.")


def _raise(error: BaseException):
    raise error


# ---- the loop ----


def train(config: Config, run: Place, gang: Gang, began: float | None = None) -> TrainState:
    """Train to `config.steps` in the directory `run`, from its newest good checkpoint if any, and
    tell `gang`, the processes of the run, what this one does. The time since `began`, by
    time.perf_counter(), counts as its initialization.

    Raises Interrupted after SIGTERM or Ctrl-C, with everything saved; Diverged when a loss or
    gradient is not finite, and Collapsed with collapse.then=stop, the newest checkpoint from before
    being kept; Corrupted when an audit finds silent data corruption; CheckpointError when the last
    step could not be saved.
    """
    run.mkdir(parents=True, exist_ok=True)
    clock = Clock(began, gang.doing)
    mesh = check(config)
    checkpoints = Checkpoints(run / "checkpoints", config.keep)
    try:
        with jax.set_mesh(mesh), Signals() as signals:
            with clock.spending("checkpoint_restore", "restoring"):
                start, state = checkpoints.restore(abstract_state(config, mesh)) or (0, None)
            step_fn = jitted_step(config, mesh)
            choices: list[str] = []
            if start < config.steps:  # what is wrong with an objective shows before evaluations
                with clock.spending("compile", "tracing the step"), heard() as choices:
                    step_fn.trace(abstract_state(config, mesh), fed_batch(config, mesh))
            log, account = Log(run, config.steps, start), None
            try:
                account = Account(log, clock, start)
                if start < config.steps:
                    log.say("\n".join([extent(config, start), *choices]))
                    account.write()
                scores = Scores(config, mesh, run, log, account)
                with Compilations(log, clock), ThreadPoolExecutor(1, "sslx-flops") as aside:
                    state = scores.begin(start, state)
                    if start >= config.steps:
                        log.say(f"{run} is complete: {start} of {config.steps} steps.")
                        return state
                    peak = aside.submit(fastest, config, mesh)  # while the step is compiled
                    watch = Watch(config, log, checkpoints, account, gang, peak)
                    audited = Audit(config.audit_every, step_fn, mesh, log, checkpoints)
                    with clock.spending("step", "step"), watch.profile:
                        return loop(config, mesh, audited, start, state, watch, scores, signals)
            finally:
                with clock.spending("checkpoint_save", "ending"):
                    checkpoints.wait()
                if account and start < config.steps:
                    account.close()
                log.close()
    finally:
        checkpoints.close()


def extent(config: Config, start: int) -> str:
    """How long a run is and where it begins, in a sentence."""
    epochs = config.steps * config.batch_size / len(config.data)
    return (
        f"{config.steps:,} steps of {config.batch_size:,} examples are {epochs:.3g} epochs of "
        f"{len(config.data):,}; from step {start:,}."
    )


def loop(config, mesh, step_fn, start: int, state, watch, scores, signals):
    """The state after all steps. Metrics are read once the next step is on its way."""
    pending, clock = None, watch.clock
    watch.gang.together("the first step")
    with feed(config, mesh, start) as (batches, dropped):
        for step in range(start + 1, config.steps + 1):
            batch = clock.wait(batches, f"waiting for data of step {step}")
            what = f"step {step}" if step > start + 1 else "compiling the step"
            with clock.spending("step", what), watch.stepping(step):
                state, metrics = step_fn(step, state, batch)
            if pending:
                watch.see(*pending)
            pending = (step, metrics, dropped)
            stop = signals.received(step)
            last = step == config.steps or stop
            if last or step % config.save_every == 0 or step % config.eval_every == 0:
                watch.see(*pending)
                pending = None
            if last or step % config.save_every == 0:
                with clock.spending("checkpoint_save", f"saving step {step}"):
                    watch.log.keep(step)
                    watch.checkpoints.save(step, state)
            if not stop and (last or step % config.eval_every == 0):
                scores.add(step, state)
                watch.restart()  # an evaluation counts for no step's time
            if stop:
                raise Interrupted(stop, step, watch.newest())
    if (newest := watch.newest()) < config.steps:
        raise CheckpointError(
            f"The last step could not be saved, nothing after step {newest} is kept: make room, "
            f"and the same command goes on from there."
        )
    return state
