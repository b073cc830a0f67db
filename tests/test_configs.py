"""Recipes build and print as their golden text; overrides reach every part of a config.

`python tests/test_configs.py` writes tests/golden anew; the difference is read in review.
"""

import difflib
import functools
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import pytest
from contract import ROWS, config_of
from flax import linen as nn

from sslx.checkpoint import Retention
from sslx.config import (
    Alarm,
    ConfigError,
    Eval,
    difference,
    lines,
    override,
    parse,
    printed,
)
from sslx.models.vit import vit
from sslx.recipes import Recipe, load
from sslx.schedules import Constant, Warmup
from sslx.sharding import Mesh
from sslx.start import Start

REPO = Path(__file__).parents[1]
RECIPES = sorted((REPO / "configs").glob("*.py"))
GOLDEN = Path(__file__).parent / "golden"
DIGITS = REPO / "configs" / "mae_digits.py"

every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


# ---- recipes ----


@every_recipe
def test_recipe_prints_as_its_golden_text(recipe):
    golden = GOLDEN / f"{recipe.stem}.txt"
    before = golden.read_text() if golden.exists() else ""
    now = printed(load(recipe))
    change = "\n".join(
        difflib.unified_diff(before.splitlines(), now.splitlines(), lineterm="", n=0)
    )
    assert now == before, f"{change}\nIf this is meant: python tests/test_configs.py"


def test_no_golden_text_without_its_recipe():
    assert {path.stem for path in GOLDEN.iterdir()} == {path.stem for path in RECIPES}


@every_recipe
def test_recipe_needs_no_data_and_no_network(recipe, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("a recipe reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    load(recipe)


@every_recipe
def test_recipe_is_a_lab_book(recipe):
    module = Recipe(recipe).module()
    assert f"sslx train configs/{recipe.name}" in module.__doc__
    assert difference(load(recipe), load(recipe)) == []
    assert load(recipe) == load(recipe) and hash(load(recipe)) == hash(load(recipe))


@every_recipe
def test_every_printed_leaf_can_be_given_back(recipe):
    """`a.b = v` of the printed form, as `a.b=v`, changes nothing; composites say what they have."""
    config, before = load(recipe), printed(load(recipe))
    for line in before.splitlines()[1:]:
        path, _, text = line.partition(" = ")
        if leaf(part_of(config, path)):
            assert printed(override(config, path, text)) == before, line
        else:
            with pytest.raises(ConfigError, match=rf"{path} is a .*: set one of {path}\."):
                override(config, path, text)


def part_of(value, path: str):
    for name in path.split("."):
        if isinstance(value, Mapping):
            value = value[name]
        else:
            value = value[int(name)] if isinstance(value, tuple) else getattr(value, name)
    return value


def leaf(value) -> bool:
    return isinstance(value, type) or not (is_dataclass(value) and fields(value))


@every_recipe
def test_dials_are_overrides_and_arguments(recipe):
    dials = {"batch_size": 64, "epochs": 3}
    config = load(recipe, **dials)
    assert config == load(recipe, "batch_size=64", "epochs=3") and config.batch_size == 64
    assert config != load(recipe, "batch_size=64", "epochs=4")


# ---- overrides ----


@dataclass(frozen=True)
class Box:
    """One of each kind of part."""

    whole: int = 3
    real: float = 0.5
    flag: bool = True
    word: str = "full"
    pair: tuple[float, float] = (0.2, 1.0)
    nothing: float | None = None
    dtype: type = jnp.float32
    net: nn.Module = vit("mu", 2)
    steps: tuple = (Constant(1.0), Warmup(3, Constant(2.0)))
    named: Mapping[str, Constant] = field(default_factory=lambda: {"a": Constant(1.0)}, hash=False)
    inner: "Box | None" = None


BOX = Box(inner=Box())


@pytest.mark.parametrize(
    "path, text, value",
    [
        ("whole", "7", 7),
        ("whole", "1e4", 10_000),
        ("whole", "-2", -2),
        ("real", "2", 2.0),
        ("real", "3e-4", 3e-4),
        ("real", "-.5", -0.5),
        ("flag", "False", False),
        ("word", "dots", "dots"),
        ("word", "'dots'", "dots"),
        ("word", "3", "3"),
        ("word", "a=b", "a=b"),
        ("pair", "(0.4, 0.5)", (0.4, 0.5)),
        ("pair", "0.4,0.5", (0.4, 0.5)),
        ("nothing", "None", None),
        ("nothing", "1.5", 1.5),
        ("dtype", "bfloat16", jnp.bfloat16),
        ("net.dtype", "bfloat16", jnp.bfloat16),
        ("net.heads", "4", 4),
        ("steps.0.value", "5", 5.0),
        ("steps.1.then.value", "5", 5.0),
        ("steps.1.steps", "5", 5),
        ("named.a.value", "5", 5.0),
        ("inner.whole", "5", 5),
        ("inner.net.remat", "full", "full"),
        ("inner.steps.1.then.value", "5", 5.0),
    ],
)
def test_override_replaces_one_part(path, text, value):
    found = override(BOX, path, text)
    part = part_of(found, path)
    assert part == value and type(part) is type(value)
    # ... and that one alone: the printed forms differ in its line.
    change = [x for x in difflib.ndiff(list(lines(BOX)), list(lines(found))) if x[0] in "+-"]
    assert all(x[2:].startswith(f"{path} = ") for x in change)
    assert len(change) == (0 if value is None else 2)


@pytest.mark.parametrize(
    "path, text, message",
    [
        ("whole", "1.5", "whole=1.5: expected int, as 3 is"),
        ("whole", "many", "whole=many: expected int"),
        ("whole", "True", "whole=True: expected int"),
        ("whole", "1e999", "whole=1e999: expected int"),
        ("real", "fast", "real=fast: expected float"),
        ("real", "True", "real=True: expected float"),
        ("flag", "1", "flag=1: expected bool"),
        ("flag", "yes", "flag=yes: expected bool"),
        ("pair", "0.4", "pair=0.4: expected tuple"),
        ("dtype", "float31", "dtype=float31: no such dtype"),
        ("dtype", "sum", "dtype=sum: no such dtype"),
        ("net", "float32", "net is a ViT: set one of net.width"),
        ("steps", "3", "steps is a tuple: set one of steps.0, steps.1"),
        ("named", "3", "named is a dict: set one of named.a"),
        ("whle", "3", "has no 'whle': did you mean 'whole'?"),
        ("net.widht", "3", "net (ViT) has no 'widht': did you mean 'width'?"),
        ("net.parent", "3", "net (ViT) has no 'parent'"),
        ("steps.2.value", "3", "steps (tuple) has no '2'"),
        ("named.b.value", "3", "named (dict) has no 'b'"),
        ("whole.x", "3", "whole (int) has no 'x'"),
        ("net.remat", "dot", "net.remat has no 'dot': did you mean 'dots'?"),
    ],
)
def test_override_that_cannot_be(path, text, message):
    with pytest.raises(ConfigError) as error:
        override(BOX, path, text)
    assert message in str(error.value)


def test_functions_print_the_same_in_every_process():
    box = {"pair": (len, 1.0), "whole": functools.partial(sorted, (), key=len)}
    printed_lines = list(lines(box))
    assert "pair = (len, 1.0)" in printed_lines
    assert "whole = partial(sorted, (), key=len)" in printed_lines


def test_a_mapping_can_be_emptied():
    assert override(BOX, "named", "{}").named == {}
    assert load("mae_digits", "evals={}").evals == {}
    assert load("mae_digits", "compiler={'xla_a': 2}").compiler == {"xla_a": 2}
    with pytest.raises(ConfigError, match="write it as in Python"):
        load("mae_digits", "compiler={xla_a: 2}")
    with pytest.raises(ConfigError, match="write it as in Python"):
        load("mae_digits", "compiler={'xla_a'}")  # a set


def test_parse_reads_a_dial_as_its_default():
    assert parse(200, "epochs", "1e2") == 100
    assert parse("tfds:x", "data", "digits:train") == "digits:train"
    assert parse(None, "anything", "3") == 3 and parse(None, "anything", "x") == "x"
    assert parse(None, "epochs", "1e3", int | None) == 1000
    for text in ("abc", "2.5"):
        with pytest.raises(ConfigError, match=f"epochs={text}: expected int"):
            parse(None, "epochs", text, int | None)
    assert parse(1, "epochs", "0.3", float) == 0.3 and parse(1, "epochs", "3", float) == 3.0


@dataclass(frozen=True)
class Loose:
    """Parts whose annotations allow more than what they hold."""

    clip: float | None = 0.3
    source: str | Constant = Constant(1.0)


def test_an_annotation_may_allow_more():
    assert override(Loose(), "clip", "None").clip is None
    assert override(Loose(), "source", "digits:test").source == "digits:test"
    assert override(Loose(), "source.value", "2").source == Constant(2.0)


def test_a_dial_without_default_is_asked_for(tmp_path):
    recipe = tmp_path / "bare.py"
    recipe.write_text(DIGITS.read_text().replace("epochs: int = 100", "epochs: int"))
    with pytest.raises(ConfigError, match=r"no default for epochs: add epochs=\.\.\."):
        load(recipe)
    assert load(recipe, "epochs=100") == load(DIGITS)


@pytest.mark.parametrize(
    "item, message",
    [
        ("epoch=3", "mae_digits.py has no 'epoch': did you mean 'epochs'?"),
        ("batch_sizes=3", "did you mean 'batch_size'?"),
        ("objective.ratios=3", "objective (MAE) has no 'ratios': did you mean 'ratio'?"),
        ("optimizer.weight_decay", "'optimizer.weight_decay' is no override: write name=value"),
        ("epochs=many", "epochs=many: expected int"),
    ],
)
def test_recipe_override_that_cannot_be(item, message):
    with pytest.raises(ConfigError) as error:
        load(DIGITS, item)
    assert message in str(error.value)


def test_recipe_that_is_not_there():
    with pytest.raises(ConfigError, match=r"did you mean .*mae_digits\.py\?"):
        load(DIGITS.with_name("mae_digit.py"))


def test_recipe_without_config(tmp_path):
    (tmp_path / "x.py").write_text("steps = 3\n")
    with pytest.raises(ConfigError, match=r"has no function config"):
        load(tmp_path / "x.py")


# ---- equality and difference ----

CONFIG = config_of(ROWS["MAE"])


class Silent(Eval):
    """An eval without numbers."""

    def __call__(self, trained):
        yield from ()


HOW = {
    "compiler": {"xla_a": 1},
    "collapse": Alarm(then="stop"),
    "evals": {"none": Silent()},
    "mesh": Mesh(fsdp=4, tensor=2),
    "keep": Retention(last=9),
    "log_every": 3,
    "save_every": 3,
    "eval_every": 3,
    "profile": "1:1",
    "audit_every": 3,
    "stuck_after": 60.0,
}
LAW = {
    "steps": 4,
    "batch_size": 32,
    "accumulate": 2,
    "seed": 1,
    "start": Start("runs/other"),
    "nonfinite": "skip",
    "objective": replace(CONFIG.objective, ratio=0.5),
    "optimizer": replace(CONFIG.optimizer, b2=0.95),
    "data": replace(CONFIG.data, max_corrupt=0.5),
    "views": replace(CONFIG.views, train=replace(CONFIG.views.train, links=(Constant(1.0),))),
}


def test_every_field_is_law_or_how():
    assert {f.name for f in fields(CONFIG)} == HOW.keys() | LAW.keys()


@pytest.mark.parametrize("name", HOW)
def test_how_a_run_is_executed_does_not_count(name):
    other = replace(CONFIG, **{name: HOW[name]})
    assert other == CONFIG and hash(other) == hash(CONFIG)
    assert difference(CONFIG, other) == []


def test_workers_do_not_count():
    other = replace(CONFIG, data=replace(CONFIG.data, workers=3))
    assert other == CONFIG and difference(CONFIG, other) == []
    assert printed(other) != printed(CONFIG)


@pytest.mark.parametrize("name", LAW)
def test_what_a_run_computes_counts(name):
    other = replace(CONFIG, **{name: LAW[name]})
    assert other != CONFIG
    change = difference(CONFIG, other)
    assert change and all(x[2:].startswith(name) and x[:2] in ("- ", "+ ") for x in change)


def test_difference_says_before_and_after():
    other = override(CONFIG, "objective.encoder.depth", "3")
    assert difference(CONFIG, other) == [
        "- objective.encoder.depth = 2",
        "+ objective.encoder.depth = 3",
    ]


def test_printed_form_has_no_addresses_and_no_two_equal_paths():
    for recipe in RECIPES:
        paths = [line.split(" = ")[0] for line in printed(load(recipe)).splitlines()]
        assert len(set(paths)) == len(paths)
        assert " at 0x" not in printed(load(recipe))


def test_a_run_directory_keeps_its_recipe(tmp_path):
    recipe = Recipe(DIGITS, ("epochs=3", "objective.encoder.depth=1"))
    recipe.save(tmp_path / "run")
    stored = Recipe(tmp_path / "run" / "recipe.py", recipe.overrides)
    assert stored.load() == recipe.load()
    assert (tmp_path / "run" / "config.txt").read_text() == printed(recipe.load())


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.iterdir():
        path.unlink()
    for path in RECIPES:
        (GOLDEN / f"{path.stem}.txt").write_text(printed(load(path)))
        print(GOLDEN / f"{path.stem}.txt")
