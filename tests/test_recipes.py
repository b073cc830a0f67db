"""Recipes are found by name from any folder, import their neighbors, and are copied with them."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from commands import REPO, TINY

from sslx.config import ConfigError, printed
from sslx.recipes import Recipe, load, recipe_of, shipped
from sslx.run import fit_recipe

NEIGHBORS = {
    "sizes.py": "from deeper import base\nWIDTH = 2 * base()\n",
    "deeper.py": "def base():\n    return 8\n",
    "tokenize.py": "raise SystemExit('not asked for')\n",  # named as one of the standard library's
    "mine.py": "from __future__ import annotations\nfrom sizes import WIDTH\n{tiny}",
}


def folder_of(path, **changes):
    """A recipe with neighbors: tiny.py, whose width is another module's."""
    tiny = TINY.read_text().replace("Patches(16, ", "Patches(WIDTH, ")
    tiny = tiny.partition('"""\n')[2]
    for name, text in (NEIGHBORS | changes).items():
        (path / name).write_text(text.replace("{tiny}", tiny))
    return path / "mine.py"


def test_a_name_is_a_recipe_that_comes_with_sslx(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("mae_digits", "batch_size=64") == load(
        REPO / "configs/mae_digits.py", batch_size=64
    )
    assert set(shipped()) == {path.stem for path in (REPO / "configs").glob("*.py")}
    with pytest.raises(ConfigError, match="There is no recipe mae_digit: did you mean mae_digits"):
        load("mae_digit")
    with pytest.raises(ConfigError, match=r"did you mean .*mine\.py"):
        load(folder_of(tmp_path).with_name("min.py"))


def test_a_recipe_imports_its_neighbors_and_takes_them_along(tmp_path):
    (tmp_path / "recipes").mkdir()
    recipe = Recipe(folder_of(tmp_path / "recipes"))
    before = set(sys.modules), list(sys.path)
    config = recipe.load()
    assert config.objective.encoder.width == 16
    assert sys.path == before[1]
    assert not {"sizes", "deeper", "mine"} & (set(sys.modules) - before[0])
    recipe.save(tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").glob("*.py")}
    assert names == {"recipe.py", "sizes.py", "deeper.py"}
    for path in (tmp_path / "recipes").iterdir():
        path.unlink()  # a run reads its own copies
    assert printed(recipe_of(tmp_path / "run").load()) == printed(config)


def test_two_folders_may_have_a_neighbor_of_the_same_name(tmp_path):
    for name, width in (("a", 8), ("b", 16)):
        (tmp_path / name).mkdir()
        folder_of(tmp_path / name, **{"deeper.py": f"def base():\n    return {width // 2}\n"})
    widths = [load(tmp_path / name / "mine.py").objective.encoder.width for name in "ab"]
    assert widths == [8, 16]


def test_an_error_names_the_line_of_the_neighbor_where_it_arose(tmp_path):
    recipe = folder_of(tmp_path, **{"deeper.py": "def base():\n    return 1 / 0\n"})
    with pytest.raises(
        ConfigError, match=r"deeper\.py:2: ZeroDivisionError: division by zero\n    return 1 / 0$"
    ):
        load(recipe)
    recipe = folder_of(tmp_path, **{"deeper.py": "def base(:\n"})
    with pytest.raises(ConfigError, match=r"deeper\.py:1: .*\n    def base\(:$"):
        load(recipe)


WORDS = "from pathlib import Path\n\n\ndef base():\n    return int(PATH.read_text())\n"


def test_a_recipe_takes_the_files_along_that_it_names(tmp_path):
    (tmp_path / "recipes" / "sizes").mkdir(parents=True)
    (tmp_path / "recipes" / "sizes" / "width.txt").write_text("8")
    read = WORDS.replace("PATH", '(Path(__file__).parent / "sizes/width.txt")')
    recipe = Recipe(folder_of(tmp_path / "recipes", **{"deeper.py": read}))
    recipe.save(tmp_path / "run")
    shutil.rmtree(tmp_path / "recipes")
    assert recipe_of(tmp_path / "run").load().objective.encoder.width == 16
    recipe_of(tmp_path / "run").save(tmp_path / "run")  # as `sslx train RUN` does


def test_a_recipe_whose_copy_does_not_load_is_refused_at_once(tmp_path):
    (tmp_path / "width.txt").write_text("8")
    read = WORDS.replace("PATH", 'Path(__file__).with_name("width" + ".txt")')
    recipe = folder_of(tmp_path, **{"deeper.py": read})
    assert load(recipe).objective.encoder.width == 16
    with pytest.raises(ConfigError, match=r"run/deeper\.py:\d: .*width\.txt"):
        Recipe(recipe).save(tmp_path / "run")
    assert not (tmp_path / "run" / "overrides.json").exists()


@pytest.mark.parametrize(
    "line",
    [
        "from helpers.half import WIDTH",
        "from .deeper import base",
        "import importlib; importlib.import_module('deeper')",
    ],
)
def test_how_neighbors_are_imported_is_said(line, tmp_path):
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers/half.py").write_text("WIDTH = 8\n")
    recipe = folder_of(tmp_path)
    text = recipe.read_text().replace("from sizes import WIDTH", f"{line}\nfrom sizes import WIDTH")
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.py:\d+: .* by a plain `import name`"):
        load(recipe)


def test_a_recipe_whose_copy_says_otherwise_is_refused(tmp_path):
    """A folder is searched for files, of which a run would have none."""
    (tmp_path / "recipes").mkdir()
    recipe = folder_of(
        tmp_path / "recipes",
        **{
            "deeper.py": "from pathlib import Path\n\n\ndef base():\n    "
            "return 16 if list(Path(__file__).parent.glob('*.jsonl')) else 8\n"
        },
    )
    (tmp_path / "recipes/a.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"(?s)otherwise:.*- .*width = 16.*\+ .*absolute path"):
        Recipe(recipe).save(tmp_path / "run")
    assert not (tmp_path / "run" / "overrides.json").exists()


def test_a_path_beside_a_recipe_is_the_same_in_its_run(tmp_path):
    (tmp_path / "recipes").mkdir()
    recipe = folder_of(tmp_path / "recipes")
    (tmp_path / "recipes/a.npz").write_text("")
    data = "Pipeline(data or 'folder:' + str(Path(__file__).with_name('a.npz'))"
    recipe.write_text(recipe.read_text().replace("Pipeline(data or Held()", data))
    Recipe(recipe).save(run := tmp_path / "run")
    (run / "overrides.json").write_text('["steps=9"]')
    config = load(recipe)
    with pytest.raises(ConfigError) as error:
        fit_recipe(Recipe(recipe), run)
    assert re.findall(r"\n  [-+].*", str(error.value)) == ["\n  - steps = 9", "\n  + steps = 40"]
    assert config.data.source == f"folder:{tmp_path}/recipes/a.npz"
    assert recipe_of(run).load().data.source == f"folder:{run}/a.npz"


def test_a_recipe_may_be_in_any_coding_and_have_values_of_its_own(tmp_path):
    (tmp_path / "halves.py").write_bytes(
        b"# -*- coding: latin-1 -*-\nfrom __future__ import annotations\n"
        b"from dataclasses import dataclass\nfrom typing import ClassVar\n\n\n"
        b"@dataclass(frozen=True)\nclass Half:\n    of: int = 16\n"
        b"    name: ClassVar[str] = '\xfc'\n    width = property(lambda self: self.of // 2)\n"
    )
    recipe = folder_of(tmp_path)
    text = recipe.read_text().replace("from sizes import WIDTH", "from halves import Half")
    own = "\n\n@dataclass(frozen=True)\nclass Own:\n    half: Half = Half()\n\n\n"
    text = text.replace("BATCHES =", own + "WIDTH = Own().half.width\nBATCHES =")
    recipe.write_bytes(b"#!python\n# coding: latin-1\n'\xfc'\n" + text.encode("latin-1"))
    Recipe(recipe).save(tmp_path / "run")
    assert (tmp_path / "run" / "halves.py").read_bytes() == (tmp_path / "halves.py").read_bytes()
    assert recipe_of(tmp_path / "run").load().objective.encoder.width == 8


def test_an_error_in_what_a_recipe_defines_shows_its_line_alone(tmp_path, capfd):
    from sslx.cli import main

    recipe = folder_of(tmp_path)
    line = "loss = jnp.square(pixels - patchify(image, self.encoder.patch)).mean()"
    wrong = line + "\n        loss = loss.nonsense"
    recipe.write_text(recipe.read_text().replace(line, wrong))
    assert main(["train", str(recipe), "--workdir", str(tmp_path / "run")]) == 2
    said = capfd.readouterr().err
    where = re.escape(f"sslx: {tmp_path}/mine.py:") + r"\d+: AttributeError: .*nonsense.*"
    assert re.fullmatch(where + r"\n    loss = loss\.nonsense \(--trace.*\)\n", said), said


@pytest.mark.parametrize("text", ["", "[", "{}", "[1]", "\x00"])
def test_damaged_overrides_are_named_and_written_again(tmp_path, text):
    recipe = Recipe(folder_of(tmp_path), ("steps=3",))
    run = tmp_path / "run"
    recipe.save(run)
    for name in ("overrides.json", "config.txt", "recipe.py"):
        (run / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"{run}/overrides\.json is damaged: name the recipe"):
        recipe_of(run)
    (run / "config.txt").unlink()
    recipe.save(run)  # as --accept-changes does
    assert recipe_of(run).load().steps == 3 and "\nsteps = 3\n" in (run / "config.txt").read_text()


def test_a_neighbor_called_recipe_is_refused(tmp_path):
    recipe = folder_of(tmp_path, **{"recipe.py": "x = 1\n"})
    recipe.write_text("import recipe\n" + recipe.read_text().replace("from __future__", "# "))
    with pytest.raises(ConfigError, match=r"rename recipe\.py"):
        Recipe(recipe).save(tmp_path / "run")


def test_a_checkout_is_imported_from_the_folder_that_holds_it(tmp_path):
    """Where a folder `sslx`, with no `__init__.py` in it, lies in Python's way."""
    (tmp_path / "sslx").symlink_to(REPO)
    alone = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    code = [sys.executable, "-c", "import sslx; sslx.Config; print(sslx.__file__)"]
    done = subprocess.run(code, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert done.stdout.strip() == str(REPO / "sslx" / "__init__.py"), done.stderr


def test_a_wheel_holds_recipes_types_and_license(tmp_path):
    for name in ("sslx", "configs"):
        shutil.copytree(REPO / name, tmp_path / "tree" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, tmp_path / "tree")
    made = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "-w",
            tmp_path,
            tmp_path / "tree",
        ],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"NOT CHECKED: what a wheel holds ({made.stderr.strip()[-200:]})")
    (wheel,) = tmp_path.glob("*.whl")
    names = {Path(name).as_posix() for name in zipfile.ZipFile(wheel).namelist()}
    assert {f"sslx/configs/{name}.py" for name in shipped()} | {"sslx/py.typed"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "configs")) for name in names)
