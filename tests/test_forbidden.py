"""Old APIs, vague names, words spelled otherwise, and what belongs to one machine only."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
TRACKED = subprocess.run(
    ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
    cwd=REPO,
    capture_output=True,
    text=True,
    check=True,
).stdout.split("\0")
FILES = [REPO / name for name in TRACKED if name and (REPO / name).is_file()]
HERE = Path(__file__)
PYTHON = [path for path in FILES if path.suffix == ".py" and path != HERE]
OURS = [path for path in PYTHON if path.is_relative_to(REPO / "sslx")]

OLD = {
    "pjit": r"\bpjit\b",
    "pmap": r"\bpmap\b",
    "jax.experimental.shard_map": r"experimental(\.| import )shard_map",
    "nnx": r"\bnnx\b",
}
BRITISH = (
    r"(?i)(normalis|colour|centre[ds]?\b|initialis|optimis|regularis|neighbour|behaviour|grey)"
)
VAGUE = re.compile(r"(?i)(^|_)(utils?|helpers?|common|misc)(_|$|\.)")
ELSEWHERE = {
    "a path of one machine": r"(?<![\w.~/-])/(?:root|home|work|Users|mnt/data)/\w+",
    "a package mirror": r"(?i)(index-url|extra-index|artifactory|nexus|pypi\.(?!org))",
    "a registry of one site": r"(?i)\b(?:[\w-]+\.)+(?:internal|local|corp|lan)(?:[:/]|\b)",
}


# What changes the process of whoever imports us.
INTRUSIONS = {
    "a filter of another package's log": r"getLogger\((?!\"sslx\"\))[^)]*\)\.(add|set|disabled)",
    "a hook of the interpreter": r"sys\.(unraisablehook|excepthook|displayhook|settrace)\s*=",
    "a module hidden": r"sys\.modules(\.setdefault\(|\[)[^\n]*None",
    "__main__ changed": r"modules\[.__main__.\]|__spec__",
    "a warning filter for all": r"(?m)^warnings\.",
    "a private field of Grain's or of shared memory": r"(grain|shm|memory)\w*(\.\w+)*\._(?!_)",
}


def places(paths, pattern: str) -> list[str]:
    """file:line of every match in text files."""
    found = []
    for path in paths:
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for match in re.finditer(pattern, text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{path.relative_to(REPO)}:{line}: {match.group()[:80]}")
    return found


@pytest.mark.parametrize("what", OLD)
def test_no_old_api(what):
    assert places(PYTHON, OLD[what]) == []


def untyped_meshes(code: str) -> list[int]:
    """Lines that make a mesh of jax's without `axis_types`; ours takes no grid and no names."""
    lines = []
    for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        makes = name in ("make_mesh", "AbstractMesh") or (name == "Mesh" and len(call.args) == 2)
        if makes and "axis_types" not in {keyword.arg for keyword in call.keywords}:
            lines.append(call.lineno)
    return lines


def test_every_mesh_has_axis_types():
    assert {str(p): n for p in PYTHON if (n := untyped_meshes(p.read_text()))} == {}
    assert untyped_meshes("jax.make_mesh((8,), ('x',))\nMesh(np.array(d), ('x',))") == [1, 2]
    assert untyped_meshes("Mesh(1, -1, 1); Mesh(d, ('x',), axis_types=t); Mesh(fsdp=2)") == []


def test_no_vague_module_names():
    assert [
        str(p) for p in PYTHON for part in p.relative_to(REPO).parts if VAGUE.search(part)
    ] == []


def test_american_spelling():
    assert places(OURS, BRITISH) == []


@pytest.mark.parametrize("what", ELSEWHERE)
def test_nothing_of_one_machine(what):
    assert places([p for p in FILES if p != HERE], ELSEWHERE[what]) == []


@pytest.mark.parametrize("what", INTRUSIONS)
def test_importing_sslx_changes_nothing_else(what):
    assert places(OURS, INTRUSIONS[what]) == []


def test_the_patterns_match_what_they_forbid():
    assert re.search(OLD["pjit"], "from jax.experimental.pjit import pjit")
    assert re.search(OLD["jax.experimental.shard_map"], "from jax.experimental import shard_map")
    assert re.search(BRITISH, "Normalise the centre") and not re.search(BRITISH, "center, gray")
    assert VAGUE.search("train_utils.py") and not VAGUE.search("utility.py")
    assert re.search(ELSEWHERE["a path of one machine"], "cd /root/x")
    assert not re.search(ELSEWHERE["a path of one machine"], "runs/root/x ~/work/x")
    assert re.search(ELSEWHERE["a package mirror"], "--index-url https://x")
    assert re.search(ELSEWHERE["a registry of one site"], "http://pypi.site.internal/simple")
