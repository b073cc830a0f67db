"""Hugging Face checkpoints, written and read without torch or transformers.

`save` makes OUT/, which opens as ViTMAEForPreTraining, and OUT/encoder/, which opens as
ViTModel(..., add_pooling_layer=False): all that a task after pretraining needs. `load` reads a
ViT-MAE, ours or another's. Their position tables are arrays of the checkpoint; ours are computed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sslx.export import keymaps
from sslx.export.keymaps import HF_MAE, HF_POSITIONS, Arrays, listed, positions, sizes
from sslx.models.layers import LayerNorm
from sslx.models.vit import ViT
from sslx.objectives.base import Objective
from sslx.objectives.mae import MAE, Decoder
from sslx.types import Buffers, Params, Tree

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of channels in [0, 1]
Json = dict[str, Any]

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
NEEDED = (
    *(prefix + key for prefix in ("", "decoder_") for key in SHAPE),
    *("image_size", "patch_size", "num_channels", "mask_ratio", "norm_pix_loss"),
)
# What our modules compute, and what passes for it: 1e-12 is transformers' default, which its
# conversions of FAIR's weights kept though they were trained at 1e-6.
COMPUTED = {
    "hidden_act": ("gelu",),  # by erf
    "qkv_bias": (True,),
    "layer_norm_eps": (LayerNorm.epsilon, 1e-12),
}


@dataclass(frozen=True)
class Card:
    """What the model card tells that weights and config do not."""

    step: int | None = None
    recipe: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


def save(
    objective: Objective,
    params: Params,
    directory: Path | str,
    image_size: int | tuple[int, int],
    statistics: Statistics | None = None,
    card: Card = Card(),
    buffers: Buffers | None = None,
) -> None:
    """Write OUT/encoder/, and of an MAE also OUT/ itself: float32 weights, config, model card.

    `statistics` become preprocessor_config.json. Raises ValueError for an image that is not
    square and for a backbone that is no ViT, which transformers' classes do not express.
    """
    directory = Path(directory)
    encoder, weights = backbone(objective, params, buffers)
    side = _square(image_size, encoder.patch)
    channels = len(weights["patch"]["kernel"]) // encoder.patch**2
    if statistics is not None and {len(s) for s in statistics} != {channels}:
        raise ValueError(f"statistics={statistics} do not describe images of {channels} channels.")

    grid = (side // encoder.patch,) * 2

    config = _vit_config(encoder, side, channels)
    arrays = keymaps.write(keymaps.HF_VIT, weights, sizes(encoder, encoder.patch, channels))
    arrays["embeddings.position_embeddings"] = positions(*grid, encoder.width)
    _store(directory / "encoder", config, arrays, _readme(objective, config, card), statistics)

    if isinstance(objective, MAE):
        config |= _mae_config(objective)
        arrays = {f"vit.{name}": array for name, array in arrays.items()}
        of_decoder = sizes(objective.decoder, encoder.patch, channels, encoder.width)
        arrays |= keymaps.write(HF_MAE["decoder"], params["decoder"], of_decoder)
        arrays[HF_POSITIONS["decoder"]] = positions(*grid, objective.decoder.width)
        _store(directory, config, arrays, _readme(objective, config, card), statistics)


def load(directory: Path | str) -> tuple[Json, Params]:
    """A Hugging Face ViT-MAE as the fields of our modules and our params.

    The fields make `MAE(ViT(**encoder), Decoder(**decoder), ratio, normalize)`. Raises ValueError
    with the reason when the checkpoint is not one that these modules compute.
    """
    config, arrays = read_config(directory), _arrays(Path(directory))
    fields = {
        "encoder": {**_stack(config, ""), "patch": config["patch_size"]},
        "decoder": _stack(config, "decoder_"),
        "ratio": config["mask_ratio"],
        "normalize": config["norm_pix_loss"],
    }
    stacks = {"encoder": ViT(**fields["encoder"]), "decoder": Decoder(**fields["decoder"])}
    patch, channels = config["patch_size"], config["num_channels"]
    of = {part: sizes(s, patch, channels, config["hidden_size"]) for part, s in stacks.items()}
    _check_names(arrays, of)
    for part, stack in stacks.items():
        _check_positions(HF_POSITIONS[part], arrays, config["image_size"] // patch, stack.width)
    return fields, {part: keymaps.read(HF_MAE[part], arrays, of[part]) for part in stacks}


def backbone(objective: Objective, params: Params, buffers: Buffers | None) -> tuple[ViT, Tree]:
    """The objective's ViT and its params; raises ValueError when its backbone is another module."""
    module, variables = objective.backbone(params, {} if buffers is None else buffers)
    if not isinstance(module, ViT):
        raise ValueError(
            f"Only a ViT can be exported, but the backbone of {type(objective).__name__} is a "
            f"{type(module).__name__}: read the checkpoint with sslx instead."
        )
    return module, variables["params"]


def read_config(directory: Path | str) -> Json:
    """config.json of a ViT-MAE, with `image_size` a number; raises ValueError for what we lack."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the directory of a Hugging Face checkpoint.")
    config = json.loads(path.read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind != "vit_mae":
        raise ValueError(
            f"{path} describes model_type={kind!r}, but only 'vit_mae' can be imported, as "
            f"ViTMAEForPreTraining saves it."
        )
    if missing := [key for key in NEEDED if key not in config]:
        raise ValueError(f"{path} lacks {listed(missing)}: transformers always writes them.")
    for key, values in COMPUTED.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(
                f"{path} has {key}={config[key]!r}, but sslx computes {values[0]!r}: the outputs "
                f"would differ from the model's."
            )
    return config | {"image_size": _square(config["image_size"], config["patch_size"])}


def _square(image_size: int | Sequence[int], patch: int) -> int:
    sides = {image_size} if isinstance(image_size, int) else set(image_size)
    side = sides.pop()
    if sides or not isinstance(patch, int) or side % patch:
        raise ValueError(
            f"transformers' ViT-MAE sees square images that divide into square patches, not images "
            f"of {image_size} and patches of {patch}: train at a square size, or use --format timm."
        )
    return side


def _arrays(directory: Path) -> Arrays:
    """All arrays, under the names that `keymaps` writes."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        files = {directory / name for name in json.loads(index.read_text())["weight_map"].values()}
    elif single.is_file():
        files = {single}
    elif pickles := sorted(path.name for path in directory.glob("*.bin")):
        raise ValueError(
            f"{directory} holds {listed(pickles)} only, a pickle, which can run any program when "
            f"it is opened: where that is safe, save it again with "
            f"ViTMAEForPreTraining.from_pretrained(DIR).save_pretrained(DIR, "
            f"safe_serialization=True), or download the repository's safetensors."
        )
    else:
        raise ValueError(f"{directory} holds no model.safetensors: it is not a checkpoint.")
    arrays = {}
    for file in files:
        try:
            arrays |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is not whole ({error}): download it again.") from error
    return {_canonical(name): array for name, array in arrays.items()}


def _canonical(name: str) -> str:
    """One spelling: transformers 5 saves `decoder_encoder.layer`; ViTMAEModel saves no `vit.`."""
    name = re.sub(r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers.", name)
    return re.sub(r"^(?=(embeddings|encoder|layernorm)\.)", "vit.", name)


def _check_names(arrays: Arrays, of: Mapping[str, Mapping[str, int]]) -> None:
    expected = set(HF_POSITIONS.values())
    for part, table in HF_MAE.items():
        expected.update(n for _, name, _ in table for n in keymaps.names(name, of[part]))
    missing, unexpected = sorted(expected - set(arrays)), sorted(set(arrays) - expected)
    if missing or unexpected:
        parts = [f"lacks {listed(missing)}"] * bool(missing)
        parts += [f"has {listed(unexpected)}, unknown to a ViT-MAE"] * bool(unexpected)
        raise ValueError(
            f"The checkpoint {' and '.join(parts)}: config.json describes another model, or only "
            f"a part of the model was saved."
        )


def _check_positions(name: str, arrays: Arrays, grid: int, width: int) -> None:
    table, expected = np.asarray(arrays[name], np.float32), positions(grid, grid, width)
    if table.shape != expected.shape or np.abs(table - expected).max() > 0.01:  # room for bfloat16
        raise ValueError(
            f"{name} {list(table.shape)} is not MAE's fixed sin-cos table {list(expected.shape)}, "
            f"the only one that sslx computes: learned or resized positions cannot be imported."
        )


def _stack(config: Json, prefix: str) -> Json:
    width, depth, heads, hidden = (config[prefix + key] for key in SHAPE)
    return {"width": width, "depth": depth, "heads": heads, "mlp_ratio": hidden / width}


def _shape(stack: ViT | Decoder, prefix: str) -> Json:
    of_stack = (stack.width, stack.depth, stack.heads, round(stack.width * stack.mlp_ratio))
    return {prefix + key: value for key, value in zip(SHAPE, of_stack, strict=True)}


def _vit_config(encoder: ViT, image_size: int, channels: int) -> Json:
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        **_shape(encoder, ""),
        "image_size": image_size,
        "patch_size": encoder.patch,
        "num_channels": channels,
        **{key: values[0] for key, values in COMPUTED.items()},
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "dtype": "float32",
    }


def _mae_config(objective: MAE) -> Json:
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        **_shape(objective.decoder, "decoder_"),
        "mask_ratio": objective.ratio,
        "norm_pix_loss": objective.normalize,
    }


def _preprocessor(config: Json, statistics: Statistics) -> Json:
    side, (mean, std) = config["image_size"], statistics
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def _readme(objective: Objective, config: Json, card: Card) -> str:
    """The model card: the method as its docstring names it, how to open it, what it reached."""
    method, opened = type(objective).__name__, config["architectures"][0]
    summary = (type(objective).__doc__ or method).strip().splitlines()[0]
    summary = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", summary)
    bare = ", add_pooling_layer=False" if opened == "ViTModel" else ""
    stack = "width {hidden_size}, depth {num_hidden_layers}, {num_attention_heads} heads, patches "
    stack += "of {patch_size} in images of {image_size}, {num_channels} channels"
    trained = f"sslx {version('sslx')}" + (f", step {card.step}" if card.step is not None else "")
    lines = ["---", "library_name: transformers", f"tags: [sslx, {method.lower()}, vit]", "---"]
    lines += [f"# ViT pretrained with {method}", "", summary, ""]
    lines += [f"Encoder: {stack.format(**config)}. Trained with {trained}.", ""]
    lines += ["```python", f"from transformers import {opened}", ""]
    lines += [f'model = {opened}.from_pretrained("."{bare})', "```"]
    if card.numbers:
        lines += ["", "| evaluation | value |", "|---|---|"]
        lines += [f"| {name} | {value:.6g} |" for name, value in card.numbers.items()]
    if card.recipe:
        lines += ["", "## Recipe", "", "```", card.recipe.strip(), "```"]
    return "\n".join(lines) + "\n"


def _store(
    directory: Path,
    config: Json,
    arrays: dict[str, np.ndarray],
    readme: str,
    statistics: Statistics | None,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(arrays, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "README.md").write_text(readme, encoding="utf-8")
    _dump(directory / "config.json", config)
    if statistics is not None:
        _dump(directory / "preprocessor_config.json", _preprocessor(config, statistics))


def _dump(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
