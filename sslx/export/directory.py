"""Directories of Hugging Face checkpoints: written whole or not at all, and what is read."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sslx.export.fields import Json, Kind, checked
from sslx.export.weights import Weights
from sslx.types import Buffers, Params

# How transformers names the sizes of a stack of transformer blocks.
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True)
class Written:
    """A directory to be written: its place under OUT, config.json, arrays, and further files.

    kind, size  what the model card calls it, and a format of its size by the keys of config
    files       {name: JSON value, or the path of a file to copy}
    """

    folder: str
    config: Json
    arrays: dict[str, np.ndarray]
    kind: str
    size: str
    files: Mapping[str, Json | Path] = field(default_factory=dict)

    def save(self, out: Path, card: str) -> None:
        directory = out / self.folder
        directory.mkdir(parents=True, exist_ok=True)
        write_arrays(self.arrays, directory / "model.safetensors")
        (directory / "README.md").write_text(card, encoding="utf-8")
        for name, value in {"config.json": self.config, **self.files}.items():
            if isinstance(value, Path):
                shutil.copyfile(value, directory / name)
            else:
                text = json.dumps(value, indent=2) + "\n"
                (directory / name).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Files:
    """A checkpoint to be read: its directory, model_type, config.json, and its arrays, unread."""

    directory: Path
    kind: str
    config: Json
    weights: Weights

    def fields(self, kinds: Mapping[str, Kind], computed: Mapping[str, tuple]) -> Json:
        """The fields of config.json; raises ValueError where one is not what sslx computes."""
        sizes = (self.weights.total, len(self.weights))
        return checked(self.directory / "config.json", self.config, kinds, computed, sizes)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of another library as params, buffers and parts of a config.

    params, buffers  under the branches of the objectives: params["encoder"], buffers["stats"]
    parts            {path in a config: value} of what the weights determine: modules, numbers
    recipe           the name of the recipe that trains such a model
    channels         of the pictures that the model reads; None where it reads none
    """

    params: Params
    buffers: Buffers
    parts: Mapping[str, Any]
    recipe: str
    channels: int | None = None


def write_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write a safetensors file with the permissions of any new file; the library's own choice is
    that nobody but its owner reads it."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(arrays), path, metadata={"format": "pt"})
    path.chmod(mode)


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new directory whose content replaces that of `out` when the context ends without an error.

    After an error nothing is left of it. Raises OSError with the path of `out`.
    """
    beside = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    new = beside / f".{out.name}.{os.getpid()}.new"
    try:
        new.mkdir()
        yield new
        out.parent.mkdir(parents=True, exist_ok=True)
        moved(new, out)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{out} could not be written ({error}), and nothing of it is kept: make room, or name "
            f"another directory."
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def moved(new: Path, out: Path) -> None:
    """Rename `new` to `out`; where both are directories, what is in `new` into `out`."""
    if out.is_dir() and new.is_dir():
        for path in new.iterdir():
            moved(path, out / path.name)
    else:
        new.replace(out)
