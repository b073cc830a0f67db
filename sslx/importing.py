"""Runs made of the checkpoints of other libraries."""

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sslx.checkpoint import CheckpointError, Checkpoints, check_path
from sslx.config import Config, ConfigError, lines
from sslx.export import hf
from sslx.export.directory import Checkpoint, staged
from sslx.paths import Place
from sslx.recipes import Recipe
from sslx.run import Run
from sslx.state import abstract_batch, built_mesh, first_state, new_key

# What the weights of a model do not determine: how it is computed, initialized and trained.
UNDETERMINED = re.compile(
    r".*\.(dtype|remat|init|kernel_init|last_gamma|dropout|attention_dropout)(\.|$)"
)


def import_checkpoint(
    source: Path, run: Place, recipe: Path | str | None = None, overrides: tuple[str, ...] = ()
) -> Run:
    """A run at step 0 with the weights of a Hugging Face directory, to continue or to probe.

    The recipe is the model's own by default; its model is made the checkpoint's.
    """
    check_path(run)
    if (run / "overrides.json").exists():
        raise ConfigError(f"{run} is a run already: name a new directory.")
    checkpoint = hf.read(source)
    base = Recipe(recipe or checkpoint.recipe)
    fields = determined(checkpoint.parts, base.load())
    where = f"start={os.path.abspath(source)}"
    recipe = Recipe(base.path, (*fields, where, *overrides))
    config = recipe.load()
    try:
        mesh = built_mesh(config)
        check_channels(source, checkpoint, config, mesh)
        state = first_state(config, mesh)
    except ValueError as error:
        hint = "Or name a recipe whose data are like those of the checkpoint, --recipe RECIPE."
        raise ConfigError(f"{base.path}: {error} {hint}") from error
    with staged(run) if isinstance(run, Path) else contextlib.nullcontext(run) as new:
        checkpoints = Checkpoints(new / "checkpoints", config.keep)
        checkpoints.save(0, state)
        checkpoints.close()
        if not checkpoints.good():
            raise CheckpointError(f"{run} could not be written: make room and import again.")
        recipe.save(new)  # a run without it is none
    return Run(run, config)


def check_channels(
    source: Path, model: Checkpoint, config: Config, mesh: jax.sharding.Mesh
) -> None:
    """Raise ValueError where pictures of `config` have other channels than the model reads."""
    seen = jax.eval_shape(config.views.eval, new_key(config), abstract_batch(config, mesh))
    if model.channels and "image" in seen and seen["image"].shape[-1] != model.channels:
        raise ValueError(
            f"the model of {source} reads pictures of num_channels={model.channels}, and those of "
            f"the recipe have {seen['image'].shape[-1]}."
        )


def determined(parts: Mapping[str, Any], config: Config) -> list[str]:
    """Overrides that make the parts of `config` at those paths what a checkpoint determines.

    A path stands for all that end with it: the vocabulary of an eval's data is the data's own.
    """
    known = [line.split(" = ")[0] for line in lines(config)]
    overrides = []
    for path, value in parts.items():
        for place in [p for p in known if f".{p}".endswith(f".{path}")] or [path]:
            of = dict(line.split(" = ") for line in lines(value, place))
            inner = {name.rpartition(".")[0] for name in of}
            overrides += [
                f"{name}={text}"
                for name, text in of.items()
                if name not in inner and not UNDETERMINED.match(name)
            ]
    return overrides
