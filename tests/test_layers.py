"""Who may import whom: read with `ast`, and looked up in `sys.modules` of fresh processes."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]

# Each may import only what stands above it, and its own room.
LAYERS = """
types vocabulary console chips hlo exits paths
ops jaxprs
schedules data sharding digest processes rendezvous
models optim views checkpoint log signals cluster gang
objectives groups goodput environment
export
start
config
recipes lock
state evals
watch audit
engine
replay
plan run
importing
cli
configs
"""
DEPTH = {room: i for i, row in enumerate(LAYERS.split("\n")) for room in row.split()}

# What a room must not import although it stands above, or is not ours.
FORBIDDEN = {
    "data": ("sslx.types", "sslx.ops", "jax", "flax", "optax"),
    "objectives": ("sslx.data",),
    "evals": ("sslx.data",),
    "state": ("flax.linen",),
    "engine": ("flax.linen",),
    "checkpoint": ("flax.linen",),
    "optim": ("flax.linen",),
    "groups": ("flax.linen",),
}
ONLY = {"orbax": {"checkpoint"}}  # a package and the rooms that may import it


def imports(code: str) -> set[str]:
    """Dotted names that a module imports, anywhere in it; of `from a import b` also a.b."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def faults(room: str, code: str) -> list[str]:
    """What `code` in `room` imports and must not."""
    found = imports(code)
    ours = {name.split(".")[1] for name in found if name.startswith("sslx.")}
    up = [f"{room} -> {r}" for r in sorted(ours & DEPTH.keys() - {room}) if DEPTH[r] >= DEPTH[room]]
    banned = [f for f in FORBIDDEN.get(room, ()) if any(under(name, f) for name in found)]
    banned += [
        package
        for package, rooms in ONLY.items()
        if room not in rooms and any(under(name, package) for name in found)
    ]
    return up + [f"{room} -> {name}" for name in banned]


def modules():
    for path in sorted((REPO / "sslx").rglob("*.py")):
        name = path.relative_to(REPO / "sslx").parts[0].removesuffix(".py")
        if name != "__init__":
            yield pytest.param(name, path, id=str(path.relative_to(REPO)))
    for path in sorted((REPO / "configs").glob("*.py")):
        yield pytest.param("configs", path, id=str(path.relative_to(REPO)))


@pytest.mark.parametrize("room, path", list(modules()))
def test_imports_go_down_only(room, path):
    assert room in DEPTH, f"{room} has no place among the layers"
    assert faults(room, path.read_text()) == []


@pytest.mark.parametrize(
    "room, code, fault",
    [
        ("ops", "from sslx import sharding", "ops -> sharding"),
        ("ops", "def f():\n    import sslx.models.vit", "ops -> models"),
        ("views", "from sslx.optim import AdamW", "views -> optim"),
        ("objectives", "from sslx.data.image import Image", "objectives -> sslx.data"),
        ("data", "import jax.numpy as jnp", "data -> jax"),
        ("engine", "from flax import linen as nn", "engine -> flax.linen"),
        ("evals", "from orbax.checkpoint import v1", "evals -> orbax"),
        ("types", "import sslx.ops.trees", "types -> ops"),
    ],
)
def test_an_upward_edge_is_seen(room, code, fault):
    assert faults(room, code) == [fault]


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves by way of others."""

    def reached(start: str) -> set[str]:
        seen, left = set(), list(edges[start])
        while left:
            name = left.pop()
            if name not in seen:
                seen.add(name)
                left += edges.get(name, ())
        return seen

    return sorted(name for name in edges if name in reached(name))


def module_edges() -> dict[str, set[str]]:
    """module -> the modules of ours that it imports, inside functions too."""
    files = {p: p.relative_to(REPO).with_suffix("").parts for p in (REPO / "sslx").rglob("*.py")}
    names = {p: ".".join(parts).removesuffix(".__init__") for p, parts in files.items()}
    known = set(names.values())
    return {name: imports(p.read_text()) & known - {"sslx"} for p, name in names.items()}


def test_no_circle_of_files():
    assert circles(module_edges()) == []


def test_a_circle_is_seen():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(edges) == ["b", "c"]


def test_nothing_imports_a_recipe():
    for path in (REPO / "sslx").rglob("*.py"):
        assert not any(under(name, "configs") for name in imports(path.read_text())), path


# ---- what is loaded ----


def loaded(code: str, *names: str) -> list[str]:
    """Which of `names` are in sys.modules of a fresh process that ran `code`."""
    code += f"\nimport sys; print([n for n in {names!r} if n in sys.modules])"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout.splitlines()[-1])


HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "torch", "grain", "PIL")


def test_importing_sslx_loads_nothing():
    assert loaded("import sslx; dir(sslx)", *HEAVY) == []


def test_help_loads_nothing():
    code = """
import contextlib
from sslx.cli import main
for words in (["--help"], ["train", "--help"], ["eval", "--help"]):
    with contextlib.suppress(SystemExit):
        main(words)
"""
    assert loaded(code, *HEAVY) == []


def test_data_loads_no_jax():
    code = (
        "import sslx.data.pipeline; from sslx import Pipeline, Image; Pipeline('digits:', Image(8))"
    )
    assert loaded(code, "jax", "flax", "tensorflow", "torch") == []


def test_public_names_exist():
    import sslx

    for name in sslx.__all__:
        assert getattr(sslx, name).__name__.removeprefix("sslx.") == name
    with pytest.raises(AttributeError, match="no attribute 'Mae'"):
        _ = sslx.Mae
