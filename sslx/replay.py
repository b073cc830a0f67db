"""A step of a run once more: its state, its batch, and what in it is not finite first."""

import contextlib
import functools
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import einops
import jax
import jax.numpy as jnp
import numpy as np

from sslx.checkpoint import Checkpoints
from sslx.config import Config, ConfigError, Progress, unheard
from sslx.data.source import DataError
from sslx.data.text.tokenizers import tokenizer
from sslx.digest import named
from sslx.engine import VIEWS, accumulated, feed, jitted_step
from sslx.jaxprs import first_nonfinite, first_uses
from sslx.log import png, step_rows, write_whole
from sslx.ops.trees import paths
from sslx.paths import Place
from sslx.sharding import Mesh, check_batch
from sslx.state import TrainState, abstract_state, built_mesh, first_state, layers_of
from sslx.types import Array, Batch, Tree
from sslx.watch import FINITE

SHEET = 64  # examples on one picture


@dataclass(frozen=True)
class Layer:
    """Norms of the params of a layer and of their gradient, and how many entries of the gradient
    are no numbers or infinite."""

    name: str
    params: float
    grads: float
    share: float  # of the square of the gradient's norm
    nonfinite: int


@dataclass(frozen=True)
class Replayed:
    """What a step did.

    begin    the step of the checkpoint that it was reached from
    metrics  of the step, as it was computed now
    logged   of the step, as the run wrote them, if it did
    layers   in the order in which the step uses them
    first    what is not finite, in the order of the step; empty if all is
    folder   where the batch is
    """

    step: int
    begin: int
    metrics: dict[str, float]
    logged: dict[str, float]
    layers: tuple[Layer, ...]
    first: tuple[str, ...]
    folder: Place

    def __str__(self) -> str:
        wide = max(len(layer.name) for layer in self.layers)
        rows = [f"{'layer':{wide}}  {'params':>10}  {'gradient':>10}  {'share':>7}  not finite"]
        rows += [
            f"{x.name:{wide}}  {x.params:10.4g}  {x.grads:10.4g}  "
            + (f"{x.share:7.2%}" if math.isfinite(x.share) else f"{'':7}  {x.nonfinite:10,}")
            for x in self.layers
        ]
        metrics = [
            f"{name} {x:.7g}"
            + (f" (in the run {self.logged[name]:.7g})" if name in self.logged else "")
            for name, x in self.metrics.items()
        ]
        verdict = [f"not finite: {text}" for text in self.first] or ["all is finite"]
        begin = f"from the checkpoint of step {self.begin}" if self.begin else "from step 0"
        head = f"step {self.step}, {begin}; its batch is in {self.folder}"
        return "\n".join([head, *metrics, "", *rows, "", *verdict])


def replay(
    run: Place, config: Config, step: int | None = None, progress: Progress = unheard
) -> Replayed:
    """Compute a step of a run again, on the devices of this process, and write its batch to
    RUN/replay/STEP; the last step whose metrics are not finite by default.

    It begins at the newest checkpoint before the step that verifies, or at step 0, and takes all
    steps between, by the law with the same batches. Nothing else in the run is written. Raises
    ConfigError for a step that the run does not have.
    """
    step = bad_step(run) if step is None else step
    if not 1 <= step <= config.steps:
        raise ConfigError(f"{run} has steps 1 to {config.steps:,}, and no step {step:,}.")
    mesh = mesh_here(config)
    with jax.set_mesh(mesh):
        begin, state = state_before(run, config, mesh, step)
        step_fn = jitted_step(config, mesh)
        with feed(config, mesh, begin) as (batches, _):
            for done in range(begin + 1, step):
                progress("steps", done - begin, step - begin)
                state, _ = step_fn(state, next(batches))
            batch = next(batches)
        progress("steps", step - begin, step - begin)
        folder = run / "replay" / str(step)
        folder.mkdir(parents=True, exist_ok=True)
        seen = jax.jit(functools.partial(rendered, config=config))(state, batch)
        save(folder, config, jax.device_get(batch), jax.device_get(seen))
        layers, first = examined(config, state, batch, seen)
        state, metrics = step_fn(state, batch)
        if not first and (bad := nonfinite_leaf(state)):
            first = (f"{bad}, after the step",)
    rows = [row for row in step_rows(run) if row["step"] == step]
    logged = {name: float(x) for row in rows for name, x in row.items()}
    values = {n: float(x) for n, x in jax.device_get(metrics).items() if np.ndim(x) == 0}
    replayed = Replayed(step, begin, values, logged, layers, first, folder)
    write_whole(folder / "report.txt", f"{replayed}\n")
    return replayed


def bad_step(run: Place) -> int:
    """The last step of metrics.jsonl that is not finite."""
    for row in reversed(list(step_rows(run))):
        if not all(math.isfinite(float(row.get(name, 0))) for name in FINITE):
            return int(row["step"])
    raise ConfigError(
        f"{run / 'metrics.jsonl'} has no step whose loss, gradient or params are not finite: name "
        f"the step, sslx replay {run} STEP."
    )


def mesh_here(config: Config) -> jax.sharding.Mesh:
    """The run's mesh where these devices make it up, else one of as many as divide its batch."""
    with contextlib.suppress(ValueError):
        mesh = built_mesh(config)
        check_batch(config.batch_size, mesh, config.accumulate)
        return mesh
    config, devices = replace(config, mesh=Mesh()), jax.devices()
    for count in range(len(devices), 1, -1):
        with contextlib.suppress(ValueError):
            mesh = built_mesh(config, devices[:count])
            check_batch(config.batch_size, mesh, config.accumulate)
            return mesh
    return built_mesh(config, devices[:1])


def state_before(run: Place, config: Config, mesh, step: int) -> tuple[int, TrainState]:
    """(step, state) of the newest checkpoint before a step that verifies, or of step 0."""
    checkpoints = Checkpoints(run / "checkpoints", config.keep)
    try:
        restored = checkpoints.restore(abstract_state(config, mesh), before=step)
    finally:
        checkpoints.close()
    return restored or (0, first_state(config, mesh))


# ---- what is not finite ----


def examined(
    config: Config, state: TrainState, batch: Batch, seen: Batch
) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """(layers, what is not finite first) of a step on a batch, `seen` as the views render it."""
    batch = {name: x for name, x in batch.items() if name != "dropped"}
    computes = functools.partial(accumulated, config=config)
    axes = paths(layers_of(config, batch))
    loss, sums = jax.device_get(jax.jit(functools.partial(squares, computes, axes))(state, batch))
    order = {number: i for i, number in enumerate(first_uses(computes, state, batch))}
    first = {path: order.get(i, len(order)) for i, path in enumerate(named(state))}
    layers = by_layer(sums, axes, lambda path: first[f"params/{path}"])
    for tree, when in ((state, "before the step"), (batch, "as read"), (seen, "as rendered")):
        if bad := nonfinite_leaf(tree):
            return layers, (f"{bad}, {when}",)
    if math.isfinite(loss) and not any(layer.nonfinite for layer in layers):
        return layers, ()
    return layers, tuple(first_nonfinite(computes, state, batch))


def squares(computes: Callable, axes: dict[str, int], state: TrainState, batch: Batch):
    """The loss, and of each of the params: [sum of squares of it, of its gradient, number of bad
    entries of the gradient], of each layer where layers are stacked along an axis."""
    loss, grads, _, _ = computes(state, batch)

    def summed(x: Array, axis: int) -> Array:
        return x.astype(jnp.float32).sum([i for i in range(x.ndim) if i != axis])

    params, grads = paths(state.params), paths(grads)
    return loss, {
        path: [summed(x, axis) for x in (jnp.square(params[path]), jnp.square(grad), bad)]
        for path, axis in axes.items()
        for grad in [grads[path]]
        for bad in [~jnp.isfinite(grad)]
    }


def by_layer(
    sums: Mapping[str, list[np.ndarray]], axes: dict[str, int], order: Callable[[str], int]
) -> tuple[Layer, ...]:
    """The layers in `order`: modules with params of their own, and the layers of every stack."""
    rows: dict[str, np.ndarray] = {}
    for path in sorted(sums, key=order):
        name, sizes = layer_of(path, axes), np.asarray(sums[path], np.float64)
        stacked = {f"{name}/{i}": x for i, x in enumerate(sizes.T)} if axes[path] >= 0 else {}
        for row, x in (stacked or {name: sizes}).items():
            rows[row] = rows.get(row, 0) + x
    total = sum(grads for _, grads, _ in rows.values()) or 1.0
    return tuple(
        Layer(name, float(np.sqrt(params)), float(np.sqrt(grads)), float(grads / total), int(bad))
        for name, (params, grads, bad) in rows.items()
    )


def layer_of(path: str, axes: dict[str, int]) -> str:
    """The module of a param; of one that is stacked, the module all of whose params are."""
    *modules, _ = path.split("/")
    if axes[path] < 0:
        return "/".join(modules) or path
    for depth in range(1, len(modules)):
        prefix = "/".join(modules[:depth])
        if all(axis >= 0 for other, axis in axes.items() if other.startswith(f"{prefix}/")):
            return prefix
    return "/".join(modules) or path


def nonfinite_leaf(tree: Tree) -> str:
    """The first array with entries that are not finite, in words; empty if there is none."""
    leaves = {path: x for path, x in named(tree).items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    counts = jax.device_get(
        jax.jit(lambda xs: [(~jnp.isfinite(x)).sum() for x in xs])([*leaves.values()])
    )
    for (path, x), count in zip(leaves.items(), counts, strict=True):
        if count:
            return f"{path} has {int(count):,} entries of {x.size:,} that are not"
    return ""


# ---- the batch ----


def rendered(state: TrainState, batch: Batch, *, config: Config) -> Batch:
    """The batch as the step's views render it for the objective."""
    key, n = jax.random.fold_in(state.key, state.step), config.accumulate
    batch = {name: x for name, x in batch.items() if name != "dropped"}
    parts = [
        config.views.train(
            jax.random.fold_in(key, VIEWS + 2 * i), {name: x[i::n] for name, x in batch.items()}
        )
        for i in range(n)
    ]
    return jax.tree.map(lambda *x: jnp.stack(x, 1).reshape(-1, *x[0].shape[1:]), *parts)


def save(folder: Place, config: Config, batch: dict, seen: dict) -> None:
    """Write a batch as the pipeline made it and, where the views change it, as they render it:
    pictures as PNG, SHEET examples on each, tokens as text, all else as batch.npz."""
    arrays = {}
    for name, x in batch.items():
        if pictorial(x):
            sheets(folder, name, x)
        elif name == "tokens":
            write_whole(folder / "tokens.txt", text_of(config, x, batch.get("segments")))
        if not pictorial(x):
            arrays[name] = x
    for name, x in seen.items():
        if pictorial(x) and not (name in batch and np.array_equal(x, batch[name])):
            sheets(folder, f"views-{name}", x)
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_whole(folder / "batch.npz", content.getvalue())


def pictorial(x: np.ndarray) -> bool:
    """Whether an array is pictures [B, H, W, C], or several of each example [B, V, H, W, C]."""
    return x.ndim in (4, 5) and x.shape[-1] in (1, 3) and min(x.shape[-3:-1]) > 1


def sheets(folder: Place, name: str, pictures: np.ndarray) -> None:
    """Write NAME-FIRST.png for every SHEET examples, eight in a row, the views of one side by side.
    Numbers that are no bytes are scaled, each picture from its least to its greatest; what is not
    finite is black."""
    pictures = pictures[:, None] if pictures.ndim == 4 else pictures
    scale = max(1, 64 // pictures.shape[2])  # small ones are shown large
    for begin in range(0, len(pictures), SHEET):
        x = bytes_of(pictures[begin : begin + SHEET])
        x = x.repeat(scale, axis=2).repeat(scale, axis=3)
        blank = -len(x) % 8 if len(x) > 8 else 0
        x = np.pad(x, ((0, blank), (0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)
        rows = max(1, len(x) // 8)
        grid = einops.rearrange(x, "(r n) v h w c -> (r h) (n v w) c", r=rows)
        write_whole(folder / f"{name}-{begin:04d}.png", png(grid))


def bytes_of(x: np.ndarray) -> np.ndarray:
    """Pictures [..., H, W, C] as uint8."""
    if x.dtype == np.uint8:
        return x
    x = np.nan_to_num(np.asarray(x, np.float32), posinf=0, neginf=0)
    low, high = (f(x, axis=(-3, -2, -1), keepdims=True) for f in (np.min, np.max))
    return np.rint(255 * (x - low) / np.maximum(high - low, 1e-12)).astype(np.uint8)


def text_of(config: Config, tokens: np.ndarray, segments: np.ndarray | None) -> str:
    """A line of text for each example, by the tokenizer of the data; else the numbers of its
    tokens. Padding, of segment 0, is left out."""
    segments = np.ones_like(tokens) if segments is None else segments
    rows = [ids[real > 0].tolist() for ids, real in zip(tokens, segments, strict=True)]
    try:
        source, _ = config.data.mixture[0]
        decode = tokenizer(source.path).decode
        return "".join(f"{decode(ids, skip_special_tokens=False)!r}\n" for ids in rows)
    except (AttributeError, DataError):  # no tokenizer is known, as of arrays
        return "".join(" ".join(map(str, ids)) + "\n" for ids in rows)
