"""The configuration of a run as one value, and how it is overridden and printed."""

import abc
import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding

from sslx.checkpoint import Retention
from sslx.data.pipeline import Pipeline
from sslx.objectives.base import Objective
from sslx.optim import Optimizer
from sslx.sharding import Mesh
from sslx.start import Start
from sslx.types import Buffers, Params
from sslx.views import Views


class ConfigError(ValueError):
    """A recipe or an override is invalid."""


Numbers = dict[str, dict[str, float]]  # {column: {name: value}}


# Called with (what is being done, how many parts of it are done, how many there are).
Progress = Callable[[str, int, int], None]


def unheard(task: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""


@dataclass(frozen=True)
class Trained:
    """What an evaluation is about: params and buffers of an objective, and how data reach them.

    views     the recipe's: encoders see what its eval view renders
    sharding  of a batch; None leaves all on one device
    progress  shows how far the evaluation is
    """

    objective: Objective
    params: Params
    buffers: Buffers
    views: Views = Views()
    sharding: NamedSharding | None = None
    progress: Progress = unheard


class Eval(abc.ABC):
    """An evaluation of what was trained, as numbers and pictures."""

    def check(self) -> None:
        """Raise ValueError now, before any device work, for what cannot be evaluated."""
        return None

    @abc.abstractmethod
    def __call__(self, trained: Trained) -> Iterator[tuple[str, float | np.ndarray]]:
        """(name, float) or (name, uint8 picture [H, W, C]), one after another."""

    def floors(self, trained: Trained) -> Numbers:
        """{baseline: {name: value}} of what needs no training; none by default."""
        return {}

    def parts(self) -> tuple[str, ...]:
        """Names of what `only` can choose from; none by default."""
        return ()

    def only(self, names: Collection[str]) -> "Eval":
        """The same evaluation with some of its parts."""
        raise ConfigError(f"{type(self).__name__} has no parts, and so no {', '.join(names)}.")


def how(default: Any) -> Any:
    """A field that says how a run is executed and watched, not what it computes: two configs that
    differ there alone are equal, and a run may be resumed with another one."""
    return field(default=default, compare=False)


@dataclass(frozen=True)
class Alarm:
    """When embeddings count as collapsed: `metric` below a bound for `patience` steps in a row.

    Methods that can collapse report `embedding_std`: 1 on an isotropic sphere, 0 on a point.
    """

    metric: str = "embedding_std"
    below: float = 0.05
    patience: int = 100
    then: Literal["warn", "stop"] = "warn"

    def __post_init__(self):
        if self.patience < 1:
            raise ConfigError(
                f"patience={self.patience}: it counts steps from 1; below=0 never raises the alarm."
            )


@dataclass(frozen=True)
class Config:
    """Everything that a run is.

    objective   the method, a frozen dataclass
    data        where batches come from
    views       how the step renders them: augmentations, normalization
    optimizer   what moves the params
    steps       optimizer steps in all
    batch_size  examples of a step, all devices and micro-batches together
    accumulate  micro-batches that a step is made of, one after another, to save memory
    seed        of all random numbers: data, init, views, masks
    start       what the params of step 0 are taken from, a directory or a Start; None draws them
    nonfinite   what a NaN or an infinite gradient does: "stop" the run, or "skip" the step
    evals       {name: evaluation}, of random init, every `eval_every` steps and at the end

    What follows says how a run is executed and watched, and may differ when it is resumed:

    collapse    when to warn that all embeddings have become nearly one, or to stop
    mesh        how devices share the batch and the params
    compiler    options of XLA for the step, beside those of sslx.chips.OPTIONS and before them
    keep        which checkpoints are kept
    stuck_after seconds without progress after which a run of several processes ends, exit code 42
    log_every, save_every, eval_every  steps between two rows of metrics, checkpoints, evaluations
    profile     steps that jax's profiler traces for XProf and TensorBoard, the first and the last,
                as 100:105
    audit_every  steps between two that are computed twice, to find devices that compute or store
                 wrong bits (sslx.audit); None never. The state is then in memory twice. On a GPU
                 such a run compiles without operations that differ from run to run, which excludes
                 gradients of max-pooling
    """

    objective: Objective
    data: Pipeline
    views: Views = field(default=Views(), kw_only=True)  # keyword, so that no one may come before
    optimizer: Optimizer
    steps: int
    batch_size: int
    accumulate: int = 1
    seed: int = 0
    start: Start | str | None = None
    nonfinite: Literal["stop", "skip"] = "stop"
    evals: Mapping[str, Eval] = field(default_factory=dict, compare=False)
    collapse: Alarm = how(Alarm())
    mesh: Mesh = how(Mesh())
    compiler: Mapping[str, bool | int | str] = field(default_factory=dict, compare=False)
    keep: Retention = how(Retention())
    stuck_after: float = how(1800.0)
    log_every: int = how(50)
    save_every: int = how(1000)
    eval_every: int = how(5000)
    profile: str | None = how(None)
    audit_every: int | None = how(None)

    def __post_init__(self):
        if isinstance(self.start, str | os.PathLike):
            object.__setattr__(self, "start", Start(self.start))
        kinds = {"objective": Objective, "data": Pipeline, "views": Views, "optimizer": Optimizer}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name}={getattr(self, name)!r} is no {kind.__name__}.")
        for name in ("objective", "views", "optimizer"):
            try:
                hash(getattr(self, name))
            except TypeError as error:
                kind = type(getattr(self, name)).__name__
                raise ConfigError(
                    f"{name}: {kind} is no value ({error}): write @dataclass(frozen=True) above it,"
                    f" and tuples in place of lists."
                ) from error
        every = ("log_every", "save_every", "eval_every", "audit_every")
        for name in ("steps", "batch_size", "accumulate", *every):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(
                    f"{name}={getattr(self, name)}: it counts from 1; is it the result of too few "
                    f"epochs, or of a batch larger than the data?"
                )
        if not self.stuck_after > 0:
            raise ConfigError(f"stuck_after={self.stuck_after}: it is seconds; inf waits for ever.")
        if self.profile is not None and (last := window(self.profile)[-1]) > self.steps:
            raise ConfigError(
                f"profile={self.profile}: step {last} is after the last, {self.steps}."
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed}: it is a whole number from 0 to 2**32 - 1.")
        for name in ("objective", "views", "optimizer", "evals", "collapse"):
            for path, value in leaves(getattr(self, name), name):
                if isinstance(value, float) and value != value:
                    raise ConfigError(f"{path}=nan is no number.")
        if self.nonfinite not in ("stop", "skip"):
            raise ConfigError(f"nonfinite={self.nonfinite}: use stop or skip.")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"batch_size={self.batch_size} does not divide into accumulate="
                f"{self.accumulate} micro-batches."
            )


def window(text: str) -> range:
    """The steps of `Config.profile`. Raises ConfigError for what is no such text."""
    first, colon, last = str(text).partition(":")
    if colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
        return range(int(first), int(last) + 1)
    raise ConfigError(
        f"profile={text}: write the first step to trace and the last, counted from 1, as 100:105."
    )


# ---- printed form ----


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf of a config."""
    parts = {} if isinstance(value, type) else dict(parts_of(value))
    for name, part in parts.items():
        yield from leaves(part, f"{path}.{name}")
    if not parts:
        yield path, value


def lines(value: Any, path: str = "", law: bool = False) -> Iterator[str]:
    """`a.b.c = value` for every leaf of a config; with `law` only what changes the result."""
    if isinstance(value, type) or not (parts := dict(parts_of(value, law))):
        yield f"{path} = {_text(value)}"
        return
    if dataclasses.is_dataclass(value):
        yield f"{path} = {type(value).__name__}" if path else type(value).__name__
    for name, part in parts.items():
        yield from lines(part, f"{path}.{name}" if path else str(name), law)


def printed(config: Config) -> str:
    """The whole config, one line a field: the golden text of a recipe."""
    return "\n".join(lines(config)) + "\n"


def difference(old: Config, new: Config, moved: tuple[str, str] = ("", "")) -> list[str]:
    """Diff lines (`- before`, `+ after`) of all that changes the result of a run.

    `moved` are two folders, of the old and of the new: paths within are the same in both.
    """
    before = [line.replace(*moved) for line in lines(old, law=True)]
    after = list(lines(new, law=True))
    return [x for x in difflib.ndiff(before, after) if x[:2] in ("- ", "+ ")]


def parts_of(value: Any, law: bool = False) -> Iterator[tuple[str, Any]]:
    """The named parts of a composite: fields, items, elements that are composites themselves."""
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            hidden = isinstance(value, nn.Module) and f.name in ("parent", "name")
            if f.init and f.repr and not hidden and not (law and not f.compare):
                yield f.name, getattr(value, f.name)
    elif isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        yield from ((str(i), item) for i, item in enumerate(value))


def _text(value: Any) -> str:
    if _is_dtype(value):
        return jnp.dtype(value).name
    if isinstance(value, functools.partial):
        given = [f"{name}={_text(x)}" for name, x in value.keywords.items()]
        return f"partial({', '.join([_text(value.func), *map(_text, value.args), *given])})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' * (len(value) == 1)})"
    return getattr(value, "__qualname__", None) or repr(value)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, np.dtype | type(jnp.float32))


# ---- overrides ----


def override(value: Any, path: str, text: str) -> Any:
    """`value` with the part at dotted `path` replaced by `text`, read as that part's type.

    Goes through dataclasses, Linen modules, mappings and tuples. Raises ConfigError for a path
    that does not exist, naming the nearest that does.
    """
    return _replaced(value, path.split("."), path, text)


def _replaced(value: Any, rest: list[str], path: str, text: str, hint: Any = None) -> Any:
    if not rest:
        return parse(value, path, text, hint)
    parts, name = dict(parts_of(value)), rest[0]
    if name not in parts:
        here = ".".join(path.split(".")[: -len(rest)])
        raise unknown(name, parts, f"{here or 'the config'} ({type(value).__name__})")
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    hint = {f.name: f.type for f in fields}.get(name)
    if isinstance(hint, str):  # from __future__ import annotations
        with contextlib.suppress(NameError):
            hint = get_type_hints(type(value))[name]
    part = _replaced(parts[name], rest[1:], path, text, hint)
    if fields:
        return dataclasses.replace(value, **{name: part})
    if isinstance(value, Mapping):
        return {**value, name: part}
    return (*value[: int(name)], part, *value[int(name) + 1 :])


def parse(current: Any, name: str, text: str, hint: Any = None) -> Any:
    """`text` as a value of the type of `current`: 1e4 is a whole number where one is wanted, the
    name of a function is that of one beside it.

    `hint`, an annotation, may allow more: None, a string in place of a value, one of a few words.
    A mapping can be emptied, evals={}, and an empty one filled, compiler={'xla_a': 1}.
    """
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType, Literal) else ()
    if text == "None" and type(None) in allowed:
        return None
    if isinstance(current, Mapping) and text.startswith("{") and (text == "{}" or not current):
        with contextlib.suppress(ValueError, SyntaxError):
            if isinstance(value := ast.literal_eval(text), dict):
                return value
        raise ConfigError(f"{name}={text}: write it as in Python, {{'name': value}}.")
    if parts := dict(parts_of(current)):
        if str in allowed and text != type(current).__name__:
            return text
        inner = ", ".join(f"{name}.{part}" for part in parts)
        raise ConfigError(f"{name} is a {type(current).__name__}: set one of {inner}.")
    if _is_dtype(current):
        if not _is_dtype(dtype := getattr(jnp, text, None)):
            raise ConfigError(f"{name}={text}: no such dtype; use float32 or bfloat16.")
        return dtype
    if inspect.isfunction(current):
        named = {k: f for k, f in vars(inspect.getmodule(current)).items() if inspect.isfunction(f)}
        if text not in named:
            raise unknown(text, named, name)
        return named[text]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    kind, given = float if hint is float else type(current), type(value)
    if current is None or current is inspect.Parameter.empty:
        kinds = [k for k in (*allowed, hint) if k in (int, float, str, bool)]
        if len(kinds) != 1:
            return value
        kind = kinds[0]
    if kind is str:
        value = value if given is str else text
        if get_origin(hint) is Literal and value not in allowed:
            raise unknown(value, dict.fromkeys(allowed), name)
        return value
    if kind is float and given is int:
        return float(value)
    if kind is int and given is float and value.is_integer():
        return int(value)
    if kind is not given:
        like = f", as {current!r} is" if type(current) is kind else ""
        raise ConfigError(f"{name}={text}: expected {kind.__name__}{like}.")
    return value


def unknown(name: str, known: Mapping, where: str) -> ConfigError:
    """The error for a name that is not there, with the nearest that is."""
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'no parts'}."
    return ConfigError(f"{where} has no {name!r}: {hint}")
