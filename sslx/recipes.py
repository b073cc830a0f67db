"""Recipe files: found by name or path, executed, and copied into the runs that they start."""

import ast
import atexit
import builtins
import contextlib
import difflib
import functools
import inspect
import json
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from sslx.config import (
    Config,
    ConfigError,
    difference,
    override,
    parse,
    parts_of,
    printed,
    unknown,
)
from sslx.log import write_whole
from sslx.paths import Place, Remote

LARGEST = 1 << 24  # bytes of a file that is copied into a run
# The files that a run has itself, beside those of its recipe.
OWN = {"recipe.py", "overrides.json", "config.txt", "config.pickle", "metrics.jsonl", "evals.json"}
OWN |= {"environment.json", "goodput.json"}


@dataclass(frozen=True)
class Recipe:
    """A Python file with a function `config(dials...) -> Config`, and what is overridden.

    path       a .py file, or the name of a recipe that comes with sslx, as `mae_digits`
    overrides  `name=value` for an argument of config(), `a.b.c=value` for a part of its result

    A recipe may `import` Python modules from its own folder, and those each other, and read files
    that it names in a string: `Path(__file__).parent / "words.txt"`. All are copied into a run with
    it. What it finds in its folder otherwise must have an absolute path, or the run is refused.
    """

    path: Path | str
    overrides: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        """The file that `path` names. Raises ConfigError with near names if there is none."""
        path, names = Path(self.path), shipped()
        if path.is_file():
            return path
        if path.name == str(path) and path.name in names:
            return names[path.name]
        beside = sorted(map(str, path.parent.glob("*.py")))
        near = difflib.get_close_matches(str(path), beside, 1)
        near = near or difflib.get_close_matches(path.stem, names)
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"give the path of a .py file, or one of these names: {', '.join(names)}."
        )
        raise ConfigError(f"There is no recipe {path}: {hint}")

    @property
    def folder(self) -> str:
        """The absolute path of what lies beside it."""
        return str(self.file.absolute().parent)

    def load(self) -> Config:
        """The config, with the overrides applied.

        Raises ConfigError for an override that cannot be, and for any error inside the recipe,
        whose line it names.
        """
        module = self.module()
        with _located(self.file):
            dials = inspect.signature(module.config, eval_str=True).parameters
        arguments, paths = {}, {}
        for text in self.overrides:
            name, equals, value = text.partition("=")
            if not equals:
                raise ConfigError(f"{text!r} is no override: write name=value.")
            if name in dials:
                arguments[name] = parse(dials[name].default, name, value, dials[name].annotation)
            else:
                paths[name] = value
        empty = inspect.Parameter.empty
        if missing := [n for n, d in dials.items() if d.default is empty and n not in arguments]:
            needs = " ".join(f"{name}=..." for name in missing)
            raise ConfigError(f"{self.path} has no default for {', '.join(missing)}: add {needs}")
        with _located(self.file):
            config = module.config(**arguments)
        if not isinstance(config, Config):
            raise ConfigError(f"{self.path}: config(...) returned {config!r} and no Config.")
        for name, value in paths.items():
            if "." not in name and name not in dict(parts_of(config)):
                raise unknown(name, {**dials, **dict(parts_of(config))}, self.file.name)
            config = override(config, name, value)
        return config

    def module(self) -> ModuleType:
        """The recipe executed as a module."""
        with _located(self.file):
            module = execute(self.file)
        if not callable(getattr(module, "config", None)):
            raise ConfigError(f"{self.path} has no function config(...) -> Config.")
        return module

    def save(self, run: Place) -> None:
        """Copy the recipe, what it uses of its folder, and the overrides into a run directory,
        which does not read the originals after that."""
        folder, copies = folder_of(run), neighbors(self.file)
        for name in copies.keys() & OWN:
            same = [
                p for p in (self.file, folder / name) if p.exists() and p.samefile(copies[name])
            ]
            if not same:
                raise ConfigError(
                    f"{self.path} uses {name} beside it, but a run keeps a file of its own under "
                    f"that name: rename {name}."
                )
        copies["recipe.py"] = self.file
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, path in copies.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_whole(folder / name, path.read_bytes())
            config = printed(self.copied(folder)).replace(str(folder), str(run))
            write_whole(folder / "config.txt", config)
            write_whole(folder / "overrides.json", json.dumps(self.overrides, indent=1) + "\n")
            for name in [*copies, "config.txt", "overrides.json"] * (folder != run):
                write_whole(run / name, (folder / name).read_bytes())
        except OSError as error:
            raise ConfigError(
                f"Cannot write to {run} ({error}): choose another --workdir."
            ) from error

    def copied(self, run: Path) -> Config:
        """The config of the copy in a run, as it will be when the run is resumed.

        Raises ConfigError where it is not that of the original.
        """
        hint = (
            f"{run}/recipe.py is the copy of {self.path} that the run would go on with. Taken along"
            f" are files of {self.file.parent} of at most {LARGEST >> 20} MiB whose whole name a "
            "string in the recipe says: name the others by an absolute path."
        )
        try:
            copy = Recipe(run / "recipe.py", self.overrides).load()
        except ConfigError as error:
            raise ConfigError(f"{error}\n{hint}") from error
        if changes := difference(copy, self.load(), (str(run.absolute()), self.folder)):
            raise ConfigError("\n  ".join(["The copy says otherwise:", *changes]) + f"\n{hint}")
        return copy


def recipe_of(run: Place, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe that a run directory was started with, and more overrides."""
    if not (run / "overrides.json").is_file():
        raise ConfigError(f"{run} is no run: it has no overrides.json; name the --workdir of one.")
    stored = None
    with contextlib.suppress(ValueError):
        stored = json.loads((run / "overrides.json").read_text())
    if not isinstance(stored, list) or not all(isinstance(text, str) for text in stored):
        raise ConfigError(
            f"{run}/overrides.json is damaged: name the recipe and its overrides again, `sslx "
            f"train RECIPE name=value ... --workdir {run} --accept-changes`."
        )
    if isinstance(run, Remote):
        fetch(run, folder_of(run))
    return Recipe(folder_of(run) / "recipe.py", (*stored, *overrides))


@functools.cache
def folder_of(run: Place) -> Path:
    """Where the recipe of a run is executed: in the run, or, if that is in a bucket, in a temporary
    folder, removed at exit."""
    if not isinstance(run, Remote):
        return run
    folder = Path(tempfile.mkdtemp(prefix="sslx-recipe-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def fetch(run: Remote, folder: Path) -> None:
    """Copy the recipe of a run, and what it uses of the run's files, into a folder."""
    there = {path.name for path in run.iterdir()}
    names = ["recipe.py"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((run / name).read_bytes())
        if name.endswith(".py"):
            used = [n for n in sorted(_named(folder / name)) if n.split("/")[0] in there]
            names += [n for n in used if n not in names and (run / n).is_file()]


def load(recipe: str | Path, *overrides: str, **dials: Any) -> Config:
    """The config of a recipe, by name or path: `load("mae_digits", "batch_size=64")`."""
    return Recipe(recipe, (*overrides, *(f"{k}={v}" for k, v in dials.items()))).load()


def shipped() -> dict[str, Path]:
    """{name: file} of the recipes that come with sslx."""
    package = Path(__file__).parent
    installed, checkout = package / "configs", package.parent / "configs"
    folder = installed if installed.is_dir() else checkout
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


# ---- modules ----


def execute(file: Path) -> ModuleType:
    """Execute a file as a module whose imports look in the file's folder first.

    The modules of that folder are executed anew, for this module alone. They are not found through
    sys.path, where a `tokenize.py` beside a recipe would also be the standard library's. In
    sys.modules all have names that no import statement can write.
    """
    folder, executed = file.absolute().parent, {}

    def module_beside(name, globals=None, locals=None, fromlist=(), level=0):
        path = folder / f"{name}.py"
        if level:
            raise ImportError("a recipe is in no package")
        if not path.is_file():
            return builtins.__import__(name, globals, locals, fromlist, level)
        return executed.get(path) or run(path)

    def run(path: Path) -> ModuleType:
        module = executed[path] = ModuleType(f"recipe:{path}")
        module.__file__ = str(path)
        module.__builtins__ = {**vars(builtins), "__import__": module_beside}
        sys.modules[module.__name__] = module  # where dataclasses look annotations up
        cloudpickle.register_pickle_by_value(module)  # Grain's workers cannot import it
        exec(compile(path.read_bytes(), path, "exec", dont_inherit=True), vars(module))
        return module

    return run(folder / file.name)


def neighbors(file: Path) -> dict[str, Path]:
    """{name: file} of what a recipe uses of its folder, also through others: modules that it
    imports, and files that a string in it names."""
    paths, unread = {}, [file]
    while unread:
        for name in _named(unread.pop()) - paths.keys():
            path = file.parent / name
            if path.is_file() and path.stat().st_size <= LARGEST:
                paths[name] = path
                unread += [path] if path.suffix == ".py" else []
    return paths


def _named(file: Path) -> set[str]:
    """The names of files that a module may use: what it imports, and every short string in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {f"{alias.name}.py" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(f"{node.module}.py")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return {n for n in names if n.isprintable() and len(n) < 200 and ".." not in n and n[:1] != "/"}


def _beside(folder: Path, module: str | None) -> bool:
    """Whether a module that was not found lies in a folder all the same; None is a relative one."""
    first = (module or ".").partition(".")[0]
    return (folder / first).exists() or (folder / f"{first}.py").exists()


@contextlib.contextmanager
def _located(file: Path) -> Iterator[None]:
    """Errors raised within become ConfigErrors that begin with the file and line of the recipe, or
    of its neighbor, where they arose, and end with the text of that line."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        places = [(Path(frame.filename), frame.lineno, frame.line) for frame in frames]
        text = str(error)
        if isinstance(error, SyntaxError) and error.filename:
            places.append((Path(error.filename), error.lineno, error.text))
            text = error.msg
        folder = file.absolute().parent
        own = [(f"{file.with_name(p.name)}:{n}", s) for p, n, s in places if p.parent == folder]
        where, source = own[-1] if own else (str(file), None)
        if isinstance(error, ImportError) and _beside(folder, error.name):
            text += (
                f". A recipe finds modules that lie beside it, by a plain `import name` or `from "
                f"name import x`: install {folder} as a package for others"
            )
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        line = f"\n    {source.strip()}" if source else ""
        raise ConfigError(f"{where}: {kind}{' '.join(text.split())}{line}") from error
