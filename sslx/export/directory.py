"""Directories of Hugging Face checkpoints: their files, written and read without torch."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sslx.export.keymaps import Arrays, listed
from sslx.types import Buffers, Params

Json = dict[str, Any]

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
class Checkpoint:
    """A checkpoint of another library as params, buffers and parts of a config.

    params, buffers  under the branches of the objectives: params["encoder"], buffers["stats"]
    parts            {path in a config: value} of what the weights determine: modules, numbers
    recipe           the name of the recipe that trains such a model
    """

    params: Params
    buffers: Buffers
    parts: Mapping[str, Any]
    recipe: str


def write_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write a safetensors file with the permissions of any new file; the library's own choice is
    that nobody but its owner reads it."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(arrays), path, metadata={"format": "pt"})
    path.chmod(mode)


def read_json(path: Path) -> Json:
    """A JSON file of a checkpoint; raises ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the directory of a Hugging Face checkpoint.")
    return json.loads(path.read_text(encoding="utf-8"))


def model_type(directory: Path) -> str:
    """What config.json says that a checkpoint is, such as "vit_mae", "bert" or "roberta"."""
    return read_json(directory / "config.json").get("model_type", "")


def read_config(
    directory: Path,
    needed: Sequence[str],
    computed: Mapping[str, tuple],
) -> Json:
    """config.json; raises ValueError where a key of `needed` is missing, or a key of `computed`
    has another value than sslx computes."""
    path = directory / "config.json"
    config = read_json(path)
    if missing := [key for key in needed if key not in config]:
        raise ValueError(f"{path} lacks {listed(missing)}: transformers always writes them.")
    for key, values in computed.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(
                f"{path} has {key}={config[key]!r}, but sslx computes {values[0]!r}: the outputs "
                f"would differ from the model's."
            )
    return config


def read_arrays(directory: Path) -> Arrays:
    """All arrays of a checkpoint, whole or in shards."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        files = {directory / name for name in json.loads(index.read_text())["weight_map"].values()}
    elif single.is_file():
        files = {single}
    elif pickles := sorted(path.name for path in directory.glob("*.bin")):
        raise ValueError(
            f"{directory} holds {listed(pickles)} only, a pickle, which can run any program when "
            f"it is opened: where that is safe, save it again with from_pretrained(DIR)."
            f"save_pretrained(DIR, safe_serialization=True) of its class in transformers, such as "
            f"ViTMAEForPreTraining or ResNetModel, or download the repository's safetensors."
        )
    else:
        raise ValueError(f"{directory} holds no model.safetensors: it is not a checkpoint.")
    arrays = {}
    for file in files:
        try:
            arrays |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is not whole ({error}): download it again.") from error
    return arrays


def check_names(arrays: Arrays, expected: set[str], model: str) -> None:
    missing, unexpected = sorted(expected - set(arrays)), sorted(set(arrays) - expected)
    if missing or unexpected:
        parts = [f"lacks {listed(missing)}"] * bool(missing)
        parts += [f"has {listed(unexpected)}, unknown to a {model}"] * bool(unexpected)
        raise ValueError(
            f"The checkpoint {' and '.join(parts)}: config.json describes another model, or only "
            f"a part of the model was saved."
        )
