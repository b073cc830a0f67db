"""Hugging Face checkpoints, written and read without torch or transformers.

`save` makes OUT/encoder/, which opens as ViTModel(..., add_pooling_layer=False) or as ResNetModel:
all that a task after pretraining needs; and of an MAE OUT/, which opens as ViTMAEForPreTraining.
`load` reads a ViT-MAE, `load_resnet` a ResNet, ours or another's. Their position tables are arrays
of the checkpoint; ours are computed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sslx.export import keymaps
from sslx.export.keymaps import HF_MAE, HF_POSITIONS, Arrays, listed, positions, sizes
from sslx.models.layers import LayerNorm
from sslx.models.resnet import BASIC, BOTTLENECK, IMAGENET_STEM, ResNet, expansion
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
COMPUTED_RESNET = {
    "hidden_act": ("relu",),
    "downsample_in_first_stage": (False,),
    "downsample_in_bottleneck": (False,),
}
VIT = (
    "ViT",
    (
        "width {hidden_size}, depth {num_hidden_layers}, {num_attention_heads} heads, patches of "
        "{patch_size} in images of {image_size}, {num_channels} channels"
    ),
)
# What the model card says of what opens with a class of transformers'.
KINDS = {
    "ViTModel": VIT,
    "ViTMAEForPreTraining": VIT,
    "ResNetModel": (
        "ResNet",
        "{depths} blocks ({layer_type}) of {hidden_sizes} channels, {num_channels} channels in",
    ),
}
BLOCKS = {"basic": BASIC, "bottleneck": BOTTLENECK}


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

    `statistics` become preprocessor_config.json. Raises ValueError for a backbone that
    transformers' classes do not express: no ViT and no ResNet, a ViT of images that are not square,
    a ResNet with another stem than ImageNet's.
    """
    directory = Path(directory)
    encoder, variables = backbone(objective, params, buffers)
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if isinstance(encoder, ResNet):
        config, arrays = _resnet(encoder, variables)
    else:
        config, arrays = _vit(encoder, variables["params"], sides)
    channels, prepare = config["num_channels"], None
    if statistics is not None:
        if {len(s) for s in statistics} != {channels}:
            said = f"statistics={statistics} do not describe images of {channels} channels."
            raise ValueError(said)
        prepare = _preprocessor(sides, statistics)
    _store(directory / "encoder", config, arrays, _readme(objective, config, card), prepare)

    if isinstance(objective, MAE):
        config |= _mae_config(objective)
        arrays = {f"vit.{name}": array for name, array in arrays.items()}
        of_decoder = sizes(objective.decoder, encoder.patch, channels, encoder.width)
        arrays |= keymaps.write(HF_MAE["decoder"], params["decoder"], of_decoder)
        grid = (sides[0] // encoder.patch,) * 2
        arrays[HF_POSITIONS["decoder"]] = positions(*grid, objective.decoder.width)
        _store(directory, config, arrays, _readme(objective, config, card), prepare)


def _vit(encoder: ViT, weights: Params, sides: tuple[int, int]) -> tuple[Json, dict]:
    """config.json and the arrays of a ViTModel."""
    side = _square(sides, encoder.patch)
    channels = len(weights["patch"]["kernel"]) // encoder.patch**2
    arrays = keymaps.write(keymaps.HF_VIT, weights, sizes(encoder, encoder.patch, channels))
    grid = (side // encoder.patch,) * 2
    arrays["embeddings.position_embeddings"] = positions(*grid, encoder.width)
    return _vit_config(encoder, side, channels), arrays


def _resnet(encoder: ResNet, variables: Tree) -> tuple[Json, dict]:
    """config.json and the arrays of a ResNetModel."""
    if encoder.stem != IMAGENET_STEM:
        raise ValueError(
            f"transformers' ResNetModel has ImageNet's stem only, not {encoder.stem}: use "
            f"--format timm."
        )
    arrays = keymaps.write(keymaps.hf_resnet(encoder), variables, {})
    channels = variables["params"]["conv"]["kernel"].shape[2]
    return _resnet_config(encoder, channels), arrays | keymaps.counts(arrays)


def load(directory: Path | str) -> tuple[Json, Params]:
    """A Hugging Face ViT-MAE as the fields of our modules and our params.

    The fields make `MAE(ViT(**encoder), Decoder(**decoder), ratio, normalize)`. Raises ValueError
    with the reason when the checkpoint is not one that these modules compute.
    """
    config = read_config(directory)
    arrays = {_canonical(name): array for name, array in _arrays(Path(directory)).items()}
    fields = {
        "encoder": {**_stack(config, ""), "patch": config["patch_size"]},
        "decoder": _stack(config, "decoder_"),
        "ratio": config["mask_ratio"],
        "normalize": config["norm_pix_loss"],
    }
    stacks = {"encoder": ViT(**fields["encoder"]), "decoder": Decoder(**fields["decoder"])}
    patch, channels = config["patch_size"], config["num_channels"]
    of = {part: sizes(s, patch, channels, config["hidden_size"]) for part, s in stacks.items()}
    expected = {
        n for part, t in HF_MAE.items() for _, x, _ in t for n in keymaps.names(x, of[part])
    }
    _check_names(arrays, expected | set(HF_POSITIONS.values()), "ViT-MAE")
    for part, stack in stacks.items():
        _check_positions(HF_POSITIONS[part], arrays, config["image_size"] // patch, stack.width)
    return fields, {part: keymaps.read(HF_MAE[part], arrays, of[part]) for part in stacks}


def load_resnet(directory: Path | str) -> tuple[Json, Tree]:
    """A Hugging Face ResNet as the fields of our ResNet and its variables, statistics included.

    A classifier's head is left out. Raises ValueError with the reason when the checkpoint is not
    one that our ResNet computes.
    """
    needed = ("embedding_size", "hidden_sizes", "depths", "layer_type", "num_channels")
    config = _config(directory, "resnet", "ResNetModel", needed, COMPUTED_RESNET)
    kernels, channels = BLOCKS[config["layer_type"]], config["embedding_size"]
    widths = [channels * 2**i * expansion(kernels) for i in range(len(config["depths"]))]
    if list(config["hidden_sizes"]) != widths:
        raise ValueError(
            f"config.json has hidden_sizes={config['hidden_sizes']}, but a ResNet's double from "
            f"stage to stage, {widths}: sslx computes no other."
        )
    fields = {"kernels": kernels, "blocks": tuple(config["depths"]), "channels": channels}
    encoder = ResNet(**fields)
    arrays = {n.removeprefix("resnet."): a for n, a in _arrays(Path(directory)).items()}
    aside = ("classifier.", keymaps.COUNT)
    arrays = {n: a for n, a in arrays.items() if not any(part in n for part in aside)}
    table = keymaps.hf_resnet(encoder)
    _check_names(arrays, {name for _, name, _ in table}, "ResNet")
    variables = keymaps.read(table, arrays, {})
    image = jax.ShapeDtypeStruct((1, 32, 32, config["num_channels"]), jnp.float32)
    ours = nn.unbox(jax.eval_shape(encoder.init, jax.random.key(0), image))
    ours, theirs = (flatten_dict(tree, sep="/") for tree in (ours, variables))
    if odd := [path for path, array in theirs.items() if array.shape != ours[path].shape]:
        raise ValueError(
            f"{listed(odd)} have other shapes than config.json describes, {odd[0]} "
            f"{list(theirs[odd[0]].shape)} and not {list(ours[odd[0]].shape)}: the weights are "
            f"those of another model."
        )
    return fields, variables


def backbone(
    objective: Objective, params: Params, buffers: Buffers | None
) -> tuple[ViT | ResNet, Tree]:
    """The objective's encoder and all its variables; raises ValueError where it is another."""
    module, variables = objective.backbone(params, {} if buffers is None else buffers)
    if not isinstance(module, ViT | ResNet):
        raise ValueError(
            f"Only a ViT or a ResNet can be exported, but the backbone of "
            f"{type(objective).__name__} is a {type(module).__name__}: read the checkpoint with "
            f"sslx instead."
        )
    return module, variables


def read_config(directory: Path | str) -> Json:
    """config.json of a ViT-MAE, with `image_size` a number; raises ValueError for what we lack."""
    config = _config(directory, "vit_mae", "ViTMAEForPreTraining", NEEDED, COMPUTED)
    return config | {"image_size": _square(config["image_size"], config["patch_size"])}


def _config(
    directory: Path | str,
    kind: str,
    saved: str,
    needed: Sequence[str],
    computed: Mapping[str, tuple],
) -> Json:
    """config.json of a model of one kind, saved by one class of transformers'."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the directory of a Hugging Face checkpoint.")
    config = json.loads(path.read_text(encoding="utf-8"))
    found = config.get("model_type")
    if found != kind:
        raise ValueError(
            f"{path} describes model_type={found!r}, but only {kind!r} can be imported, as "
            f"{saved} saves it."
        )
    if missing := [key for key in needed if key not in config]:
        raise ValueError(f"{path} lacks {listed(missing)}: transformers always writes them.")
    for key, values in computed.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(
                f"{path} has {key}={config[key]!r}, but sslx computes {values[0]!r}: the outputs "
                f"would differ from the model's."
            )
    return config


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


def _canonical(name: str) -> str:
    """One spelling: transformers 5 saves `decoder_encoder.layer`; ViTMAEModel saves no `vit.`."""
    name = re.sub(r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers.", name)
    return re.sub(r"^(?=(embeddings|encoder|layernorm)\.)", "vit.", name)


def _check_names(arrays: Arrays, expected: set[str], model: str) -> None:
    missing, unexpected = sorted(expected - set(arrays)), sorted(set(arrays) - expected)
    if missing or unexpected:
        parts = [f"lacks {listed(missing)}"] * bool(missing)
        parts += [f"has {listed(unexpected)}, unknown to a {model}"] * bool(unexpected)
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


def _resnet_config(encoder: ResNet, channels: int) -> Json:
    stages = range(len(encoder.blocks))
    return {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": channels,
        "embedding_size": encoder.channels,
        "hidden_sizes": [encoder.channels * 2**i * expansion(encoder.kernels) for i in stages],
        "depths": list(encoder.blocks),
        "layer_type": next(name for name, of in BLOCKS.items() if of == encoder.kernels),
        **{key: values[0] for key, values in COMPUTED_RESNET.items()},
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


def _preprocessor(sides: tuple[int, int], statistics: Statistics) -> Json:
    (height, width), (mean, std) = sides, statistics
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
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
    kind, stack = KINDS[opened]
    trained = f"sslx {version('sslx')}" + (f", step {card.step}" if card.step is not None else "")
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [sslx, {method.lower()}, {kind.lower()}]",
        "---",
    ]
    lines += [f"# {kind} pretrained with {method}", "", summary, ""]
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
    prepare: Json | None,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(arrays, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "README.md").write_text(readme, encoding="utf-8")
    _dump(directory / "config.json", config)
    if prepare is not None:
        _dump(directory / "preprocessor_config.json", prepare)


def _dump(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
