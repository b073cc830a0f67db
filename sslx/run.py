"""A run as a Python value: train it, open it, and use what it learned.

The command line and a notebook call the same functions.
"""

import dataclasses
import functools
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import jax
import numpy as np

from sslx import engine
from sslx.config import (
    Config,
    ConfigError,
    Numbers,
    Progress,
    difference,
    lines,
    override,
    printed,
    unheard,
    unknown,
)
from sslx.data.formats.arrays import arrays
from sslx.data.pipeline import Pipeline
from sslx.data.source import Source
from sslx.environment import record
from sslx.evals.features import Features, Pool, extract
from sslx.evals.probes import Probes
from sslx.export import hf, timm
from sslx.export.card import About
from sslx.gang import Gang
from sslx.lock import refuse_second, writing
from sslx.log import add_scores, read_scores, step_rows, write_picture, write_whole
from sslx.models.attention import heard
from sslx.models.encoder import Encoder, chosen
from sslx.ops.trees import path_of
from sslx.paths import Place, place
from sslx.processes import by_first
from sslx.recipes import Recipe, folder_of, recipe_of
from sslx.replay import Replayed, replay
from sslx.sharding import batch_sharding
from sslx.state import (
    TrainState,
    abstract_batch,
    abstract_state,
    built_mesh,
    check,
    fresh_state,
    new_key,
    restored,
)
from sslx.watch import evaluate, floors

Data = str | Source | Mapping[str, np.ndarray] | np.ndarray
FORMATS = {"hf": hf.save, "timm": timm.save}
# The recipe of a run whose config was made in Python.
PICKLED = '''"""A config that was made in Python and not by a recipe; config.txt shows it."""

from pathlib import Path

import cloudpickle


def config():
    return cloudpickle.loads(Path(__file__).with_name("config.pickle").read_bytes())
'''


def fit(
    config: Config,
    run: Place | str | None = None,
    accept_changes: bool = False,
    force: bool = False,
) -> "Run":
    """Train `config` to its last step in the directory `run`, and return the Run.

    A run that was stopped goes on from its newest checkpoint. With None the run is in a temporary
    directory, which is removed with the returned value. Raises ConfigError where `run` was started
    with another config, unless `accept_changes`, or where another process trains in it, unless
    `force`; and what `engine.train` raises.
    """
    path = place(tempfile.mkdtemp(prefix="sslx-") if run is None else run)
    fitted = Run(path, config)
    if run is None:
        weakref.finalize(fitted, shutil.rmtree, path, ignore_errors=True)
    start(config, path, lambda: keep(config, path), accept_changes, force)
    return fitted


def fit_recipe(
    recipe: Recipe,
    run: Place,
    accept_changes: bool = False,
    force: bool = False,
    began: float | None = None,
) -> "Run":
    """Train the config of a recipe file, which is copied into the run, and return the Run.
    `began` is when the program began, by time.perf_counter()."""
    config = recipe.load()
    moved = str(folder_of(run).absolute()), recipe.folder
    start(config, run, lambda: recipe.save(run), accept_changes, force, moved, began)
    return Run(run, config)


def start(
    config: Config,
    run: Place,
    save: Callable[[], None],
    accept_changes: bool,
    force: bool,
    moved: tuple[str, str] = ("", ""),
    began: float | None = None,
) -> None:
    """Train in `run`, once `save` has written there what it takes to open it."""
    began = time.perf_counter() if began is None else began
    for line in lines(config, law=True):
        if re.search(" at 0x[0-9a-f]+>", line):
            raise ConfigError(
                f"{line}: this does not tell by which values it computes, so the run could not be "
                "resumed with it: make it a frozen dataclass, or a named function."
            )
    resumed = (run / "overrides.json").is_file() and not accept_changes
    if resumed and (changes := difference(recipe_of(run).load(), config, moved)):
        raise ConfigError(
            f"{run} was started with another recipe:\n  "
            + "\n  ".join(changes)
            + "\nuse another directory, or go on all the same with --accept-changes "
            "(accept_changes=True)."
        )
    with Gang(run, config.stuck_after) as gang:
        refuse_second(run, force)  # before data are opened, which takes long
        check(config)  # what cannot work fails before it is saved
        with writing(run, force):
            by_first(save)
            by_first(lambda: record(run, moved[1]))
            engine.train(config, run, gang, began)


def keep(config: Config, run: Place) -> None:
    """Write a config made in Python into a run directory, so that it opens like any other."""
    run.mkdir(parents=True, exist_ok=True)
    write_whole(run / "config.pickle", cloudpickle.dumps(config))
    write_whole(run / "recipe.py", PICKLED)
    write_whole(run / "overrides.json", "[]\n")
    write_whole(run / "config.txt", printed(config))


class Run:
    """A training run: its config, its metrics, and the encoders of its checkpoints.

    path    its directory, here or in a bucket
    config  what it was trained with

    Methods read the checkpoint of `step`, by default the newest one that is not damaged.
    """

    def __init__(self, path: Place, config: Config):
        self.path, self.config = path, config
        self.pictures: list[Place] = []  # of the last evaluation
        self._restored: dict[int | None, tuple] = {}

    @classmethod
    def open(cls, path: Place | str) -> "Run":
        """The run of a directory. Its recipe is executed, which is code: open what you trust."""
        path = place(path)
        return cls(path, recipe_of(path).load())

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def metrics(self) -> dict[str, np.ndarray]:
        """{"step": [n], name: [n], ...}, float64, a row for each step at which anything was
        measured; NaN where a metric was not. `plt.plot(m["step"], m["loss"])` draws it."""
        rows: dict[int, dict[str, float]] = {}
        for row in step_rows(self.path):
            rows.setdefault(row.pop("step"), {}).update({k: float(v) for k, v in row.items()})
        names = dict.fromkeys(name for row in rows.values() for name in row)
        columns = {n: np.array([row.get(n, np.nan) for row in rows.values()]) for n in names}
        return {"step": np.array(list(rows), np.float64), **columns}

    def restore(self, step: int | None = None) -> tuple[Config, jax.sharding.Mesh, int, TrainState]:
        """(config, mesh, step, state) of a checkpoint; kept, so that it is read once."""
        if step not in self._restored:
            self._restored = {step: restored(self.path, self.config, step)}
        return self._restored[step]

    def replay(self, step: int | None = None, progress: Progress = unheard) -> Replayed:
        """A step computed again from the checkpoint before it: its metrics, the gradient of each
        layer, what is not finite first; its batch is in replay/STEP. By default the last step
        whose metrics are not finite."""
        return replay(self.path, self.config, step, progress)

    def encoder(self, name: str | None = None, step: int | None = None) -> Encoder:
        """An encoder of the objective, by default its first, with the params of a checkpoint."""
        config, _, _, state = self.restore(step)
        return chosen(config.objective.encoders(state.params, state.buffers), name)

    def features(
        self,
        data: Data,
        *,
        encoder: str | None = None,
        pool: Pool = "mean",
        batch_size: int = 256,
        step: int | None = None,
        progress: Progress = unheard,
    ) -> Features:
        """Pooled features of every record of a source or array: x [n, D] and label [n].

        data      a URI, a Source, a dict of arrays by the names of the encoder's leaves, or one
                  array for an encoder of one leaf; axis 0 is the example. The recipe's decoder and
                  eval view render them, but arrays that this decoder does not read are taken as
                  they are
        encoder   which of the objective's encoders; the first by default
        pool      the mean of the tokens, or the "first" (class) token
        progress  called with (what is being done, how many parts are done, how many there are)

        Labels are -1 where there are none.
        """
        config, mesh, _, _ = self.restore(step)
        network, sharding = self.encoder(encoder, step), batch_sharding(mesh)
        pipeline = pipeline_of(config, data, network.signature.leaves[0])
        pipeline = dataclasses.replace(pipeline, labels=pipeline.labelled)
        with jax.set_mesh(mesh):
            return extract(
                network,
                config.views.eval,
                pipeline,
                batch_size,
                pool,
                sharding,
                progress=functools.partial(progress, "features"),
            )

    def evaluate(
        self,
        on: str | tuple[str, ...] = (),
        data: tuple[Data, Data] | None = None,
        step: int | None = None,
        progress: Progress = unheard,
        overrides: tuple[str, ...] = (),
    ) -> Numbers:
        """{column: {name: value}} of every eval of the recipe; also written to evals.json.

        Columns are the checkpoint, random init, and baselines that need no training.

        on         names of evals, or of parts of them such as "knn"; all by default
        data       (train, test) labelled data as `features` takes it, for the probes instead of
                   the recipe's
        overrides  of the evals, such as "evals.probes.on.0.k=5"
        """
        config, mesh, step, state = self.restore(step)
        on = (on,) if isinstance(on, str) else on
        encoders = config.objective.encoders(state.params, state.buffers)
        leaf = chosen(encoders).signature.leaves[0]
        evals = selected(evals_of(config, data, leaf, overrides), on)
        config = dataclasses.replace(config, evals=evals)
        columns = {}
        with jax.set_mesh(mesh):
            values = evaluate(config, mesh, state, prefixed(progress, f"step {step}"))
            columns[f"step {step}"] = numbers(values)
            fresh = evaluate(
                config, mesh, fresh_state(config, mesh), prefixed(progress, "random init")
            )
            columns["random init"] = numbers(fresh)
            columns |= floors(config, mesh, state, prefixed(progress, "baseline"))
        if jax.process_index() == 0:
            pictures = {
                f"{n}-{step:06d}": x for n, x in values.items() if isinstance(x, np.ndarray)
            }
            self.pictures = [write_picture(self.path, name, x) for name, x in pictures.items()]
            where = f" on {' '.join(map(shown, data))}" if data else ""
            where += f" with {' '.join(overrides)}" if overrides else ""
            add_scores(self.path, {f"{name}{where}": of for name, of in columns.items()})
        return columns

    def scores(self) -> Numbers:
        """{column: {name: value}} of evals.json, empty before the first evaluation."""
        return read_scores(self.path)

    def export(
        self,
        out: Path | str,
        format: str = "hf",
        *,
        encoder: str | None = None,
        step: int | None = None,
    ) -> int:
        """Write a checkpoint for transformers ("hf") or timm ("timm"); returns its step.

        Needs no torch. Raises ValueError for an encoder that the format does not express.
        """
        if format not in FORMATS:
            raise unknown(format, FORMATS, "format")
        config, mesh, step, state = self.restore(step)
        params, buffers = jax.tree.map(np.asarray, jax.device_get((state.params, state.buffers)))
        seen = jax.eval_shape(config.views.eval, new_key(config), abstract_batch(config, mesh))
        about = About(
            shapes={name: x.shape for name, x in seen.items()},
            views=config.views,
            data=config.data,
            step=step,
            recipe=printed(self.config),
            numbers=self.scores().get(f"step {step}", {}),
        )
        FORMATS[format](config.objective, params, buffers, Path(out).expanduser(), about, encoder)
        return step


# ---- what the methods share ----


def pipeline_of(config: Config, data: Data, leaf: str) -> Pipeline:
    """The pipeline of `config` on other data; one array is that of the leaf `leaf`."""
    decode = config.data.decode
    if isinstance(data, str) and decode is None:
        raise ConfigError(
            f"{data} is read by a decoder, and this run, which was trained on arrays, has none: "
            f"give arrays like those in Python, Run.features(x) and Run.evaluate(data=(dict({leaf}"
            f"=x, label=y), dict({leaf}=..., label=...)))."
        )
    if isinstance(data, np.ndarray | jax.Array):
        data = {leaf: np.asarray(data)}
    if isinstance(data, Mapping):
        decode = decode if decode and set(decode.reads) <= set(data) else None
        data = arrays(**data)
    return dataclasses.replace(config.data, source=data, decode=decode)


def shown(data: Data) -> str:
    """Data in the name of a column."""
    return data if isinstance(data, str) else "arrays"


def evals_of(
    config: Config, data: tuple[Data, Data] | None, leaf: str, overrides: tuple[str, ...]
) -> dict[str, Any]:
    """The evals of `config`, or its probes on other data; `leaf` is what encoders read."""
    evals = dict(config.evals)
    if data:
        sets = [dataclasses.replace(pipeline_of(config, of, leaf), labels=True) for of in data]
        probes = [e for e in evals.values() if isinstance(e, Probes)] or [Probes(*sets)]
        evals = {"probes": dataclasses.replace(probes[0], train=sets[0], test=sets[1])}
        evals["probes"].check()
    if not evals:
        raise ConfigError(
            "The recipe has no evals: give labelled data, --data TRAIN TEST, as in --data "
            "digits:train digits:test."
        )
    for text in overrides:
        name, _, value = text.partition("=")
        if not name.startswith("evals."):
            raise ConfigError(f"{text!r}: an evaluation takes evals.a=value.")
        evals = override(evals, name.removeprefix("evals."), value)
    return evals


def selected(evals: dict[str, Any], on: tuple[str, ...]) -> dict[str, Any]:
    """Those of the evals, and of their parts, that `on` names; all of them if it is empty."""
    if not on:
        return evals
    parts = {name: tuple(n for n in on if n in e.parts()) for name, e in evals.items()}
    known = dict.fromkeys([*evals, *(n for e in evals.values() for n in e.parts())])
    for name in on:
        if name not in known:
            raise unknown(name, known, "--on")
    return {
        name: evals[name] if name in on else evals[name].only(parts[name])
        for name in evals
        if name in on or parts[name]
    }


def prefixed(progress: Progress, column: str) -> Progress:
    """A Progress whose tasks are those of one column."""
    return lambda task, done, total: progress(f"{column}: {task}", done, total)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation, without its pictures."""
    return {name: x for name, x in values.items() if not isinstance(x, np.ndarray)}


# ---- show ----


def summary(config: Config) -> str:
    """A recipe's params with their shapes and shardings, and its memory and FLOPs, as a table."""
    mesh = built_mesh(config)
    state = abstract_state(config, mesh)
    rows = [("params", "shape", "sharding", "size")]
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        cut = ", ".join("*".join(c) if isinstance(c, tuple) else str(c) for c in leaf.sharding.spec)
        rows.append((path_of(keys), str(leaf.shape), f"({cut})", f"{leaf.size:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join(
            (*(x.ljust(n) for x, n in zip(row[:3], widths, strict=False)), row[3].rjust(widths[3]))
        )
        for row in rows
    ]
    with heard() as choices:
        work, needed = engine.step_flops(config, mesh)
    size = sum(x.size for x in jax.tree.leaves(state.params))
    memory = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / 2**20
    each, once = (f"{x / config.batch_size / 1e9:.4g} G" for x in (work, needed))
    return "\n".join(
        [
            *table,
            f"params {size:,}, on a mesh of {dict(mesh.shape)}",
            f"state {memory:,.1f} MiB (params, moments, buffers), all devices together",
            f"FLOPs of a step per example, rematerialization included: {each}; without it: {once}",
            *choices,
        ]
    )
