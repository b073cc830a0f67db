"""A run as one value: what trains, on what, for how long; loaded, overridden and printed."""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, get_origin, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sslx.checkpoint import Retention
from sslx.data.pipeline import Pipeline
from sslx.log import write_whole
from sslx.objectives.base import Objective
from sslx.optim import Optimizer
from sslx.sharding import Mesh
from sslx.types import Buffers, Params
from sslx.views import Views


class ConfigError(ValueError):
    """A recipe or an override that cannot be."""


@runtime_checkable
class Eval(Protocol):
    """Numbers and pictures of a state: yields (name, float) or (name, uint8 [H, W, C])."""

    def check(self) -> None:
        """Raise ValueError now, before any device work, for what cannot be evaluated."""

    def __call__(
        self, objective: Objective, params: Params, buffers: Buffers, views: Views, sharding=None
    ) -> Iterator[tuple[str, float | np.ndarray]]: ...


def how(default: Any) -> Any:
    """A field that says how a run is executed and watched, not what it computes: two configs that
    differ there alone are equal, and a run may be resumed with another one."""
    return field(default=default, compare=False)


@dataclass(frozen=True)
class Alarm:
    """What counts as collapse: `metric` below a bound for `patience` steps on end.

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
    """Everything that a run is. `batch_size` is global; steps count optimizer steps."""

    objective: Objective
    data: Pipeline
    views: Views
    optimizer: Optimizer
    steps: int
    batch_size: int
    accumulate: int = 1  # micro-batches of one step, one after another
    seed: int = 0
    nonfinite: Literal["stop", "skip"] = "stop"  # what a NaN or infinite loss or gradient does
    evals: Mapping[str, Eval] = field(default_factory=dict, compare=False)
    collapse: Alarm = how(Alarm())
    mesh: Mesh = how(Mesh())
    keep: Retention = how(Retention())
    log_every: int = how(50)
    save_every: int = how(1000)
    eval_every: int = how(5000)

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every", "eval_every"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name}={getattr(self, name)}: it counts from 1; is it the result of too few "
                    f"epochs, or of a batch larger than the data?"
                )
        if self.nonfinite not in ("stop", "skip"):
            raise ConfigError(f"nonfinite={self.nonfinite}: use stop or skip.")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"batch_size={self.batch_size} does not divide into accumulate="
                f"{self.accumulate} micro-batches."
            )


# ---- printed form ----


def lines(value: Any, path: str = "", law: bool = False) -> Iterator[str]:
    """`a.b.c = value` for every leaf of a config; with `law` only what changes the result."""
    if isinstance(value, type) or not (parts := dict(_parts(value, law))):
        yield f"{path} = {_text(value)}"
        return
    if dataclasses.is_dataclass(value):
        yield f"{path} = {type(value).__name__}" if path else type(value).__name__
    for name, part in parts.items():
        yield from lines(part, f"{path}.{name}" if path else str(name), law)


def printed(config: Config) -> str:
    """The whole config, one line a field: the golden text of a recipe."""
    return "\n".join(lines(config)) + "\n"


def difference(old: Config, new: Config) -> list[str]:
    """Diff lines (`- before`, `+ after`) of all that changes the result of a run."""
    before, after = list(lines(old, law=True)), list(lines(new, law=True))
    return [x for x in difflib.ndiff(before, after) if x[:2] in ("- ", "+ ")]


def _parts(value: Any, law: bool = False) -> Iterator[tuple[str, Any]]:
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
    parts, name = dict(_parts(value)), rest[0]
    if name not in parts:
        here = ".".join(path.split(".")[: -len(rest)])
        raise unknown(name, parts, f"{here or 'the config'} ({type(value).__name__})")
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    hint = {f.name: f.type for f in fields}.get(name)
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
    """
    allowed = get_args(hint)
    if text == "None" and type(None) in allowed:
        return None
    if parts := dict(_parts(current)):
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


# ---- recipes ----


@dataclass(frozen=True)
class Recipe:
    """A Python file with a function `config(dials...) -> Config`, and what was overridden."""

    path: Path
    overrides: tuple[str, ...] = ()

    def load(self) -> Config:
        """`name=value` fills an argument of the recipe, `a.b.c=value` replaces along a path."""
        module = self.module()
        dials = inspect.signature(module.config).parameters
        arguments, paths = {}, {}
        for item in self.overrides:
            name, equals, text = item.partition("=")
            if not equals:
                raise ConfigError(f"{item!r} is no override: write name=value.")
            if name in dials:
                arguments[name] = parse(dials[name].default, name, text, dials[name].annotation)
            else:
                paths[name] = text
        empty = inspect.Parameter.empty
        if missing := [n for n, d in dials.items() if d.default is empty and n not in arguments]:
            needs = " ".join(f"{name}=..." for name in missing)
            raise ConfigError(f"{self.path} has no default for {', '.join(missing)}: add {needs}")
        config = module.config(**arguments)
        if not isinstance(config, Config):
            raise ConfigError(f"{self.path}: config(...) returned {config!r} and no Config.")
        for name, text in paths.items():
            if "." not in name and name not in dict(_parts(config)):
                raise unknown(name, {**dials, **dict(_parts(config))}, self.path.name)
            config = override(config, name, text)
        return config

    def module(self):
        if not self.path.is_file():
            near = sorted(str(p) for p in self.path.parent.glob("*.py"))
            match = difflib.get_close_matches(str(self.path), near, 1)
            hint = (
                f"did you mean {match[0]}?" if match else "give the path of a recipe, a .py file."
            )
            raise ConfigError(f"There is no recipe {self.path}: {hint}")
        spec = importlib.util.spec_from_file_location(f"recipe_{self.path.stem}", self.path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not callable(getattr(module, "config", None)):
            raise ConfigError(f"{self.path} has no function config(...) -> Config.")
        return module

    def save(self, run: Path) -> None:
        """Copy into a run directory; a recipe is never read from where it was after that."""
        try:
            run.mkdir(parents=True, exist_ok=True)
            write_whole(run / "recipe.py", self.path.read_text())
            write_whole(run / "overrides.json", json.dumps(self.overrides, indent=1) + "\n")
            write_whole(run / "config.txt", printed(self.load()))
        except OSError as error:
            raise ConfigError(
                f"Cannot write to {run} ({error}): choose another --workdir."
            ) from error


def recipe_of(run: Path) -> Recipe:
    """The recipe that a run directory was started with."""
    if not (run / "overrides.json").is_file():
        raise ConfigError(f"{run} is no run: it has no overrides.json; name the --workdir of one.")
    return Recipe(run / "recipe.py", tuple(json.loads((run / "overrides.json").read_text())))


def load(recipe: str | Path, *overrides: str, **dials: Any) -> Config:
    """The config of a recipe file: `load("configs/mae_digits.py", "batch_size=64")`."""
    return Recipe(Path(recipe), (*overrides, *(f"{k}={v}" for k, v in dials.items()))).load()
