"""ViT, and MAE with its decoder: transformers' ViTModel and ViTMAEForPreTraining, timm's ViT.

Their position tables are arrays of the checkpoint; ours are computed.
"""

import re
from collections.abc import Sequence

import numpy as np

from sslx.export.card import About
from sslx.export.directory import SHAPE, Checkpoint, Files, Written
from sslx.export.fields import COUNT, FLAG, FRACTION, SIDES, SIZE, Json
from sslx.export.keymaps import (
    DOWN,
    NORM,
    NORMS,
    OUT,
    UP,
    named_arrays,
    names,
    params_of,
    sizes_of,
    under,
)
from sslx.export.weights import Weights, check_names
from sslx.models.encoder import Encoder
from sslx.models.layers import LayerNorm
from sslx.models.vit import ViT
from sslx.objectives.base import Objective
from sslx.objectives.mae import MAE, Decoder
from sslx.ops.positions import sincos_2d
from sslx.types import Params
from sslx.views import Chain, Normalize, View

MODULE = ViT
MODEL_TYPES = ("vit_mae", "vit")

STACK = dict(zip(SHAPE, (SIZE, COUNT, SIZE, SIZE), strict=True))
FIELDS = {
    "vit": {**STACK, "image_size": SIDES, "patch_size": SIDES, "num_channels": SIZE},
    "vit_mae": {
        **{f"decoder_{key}": kind for key, kind in STACK.items()},
        **{"mask_ratio": FRACTION, "norm_pix_loss": FLAG},
    },
}
FIELDS["vit_mae"] |= FIELDS["vit"]
# What our modules compute, and what passes for it: 1e-12 is transformers' default, which its
# conversions of FAIR's weights kept though they were trained at 1e-6.
COMPUTED = {
    "hidden_act": ("gelu",),  # by erf
    "qkv_bias": (True,),
    "layer_norm_eps": (LayerNorm.epsilon, 1e-12),
}
TITLE = (
    "width {hidden_size}, depth {num_hidden_layers}, {num_attention_heads} heads, patches of "
    "{patch_size} in images of {image_size}, {num_channels} channels"
)

PATCH = (("kernel", "weight", "(p q c) d -> d c p q"), ("bias", "bias", "d -> d"))
TOKEN = "x y d -> x y d"
HF_BLOCK = (
    *under("norm1/", "layernorm_before.", NORMS),
    ("attention/qkv/kernel", "attention.attention.{t}.weight", "l d t h e -> l t (h e) d"),
    ("attention/qkv/bias", "attention.attention.{t}.bias", "l t h e -> l t (h e)"),
    *under("attention/out/", "attention.output.dense.", OUT),
    *under("norm2/", "layernorm_after.", NORMS),
    *under("mlp/up/", "intermediate.dense.", UP),
    *under("mlp/down/", "output.dense.", DOWN),
)

HF_VIT = (
    ("class", "embeddings.cls_token", TOKEN),
    *under("patch/", "embeddings.patch_embeddings.projection.", PATCH),
    *under("transformer/blocks/", "encoder.layer.{l}.", HF_BLOCK),
    *under("transformer/norm/", "layernorm.", NORM),
)

# transformers 5 saves `decoder_encoder.layer`, which 4 does not read: both read this spelling.
HF_MAE_DECODER = (
    ("embed/kernel", "decoder_embed.weight", "k d -> d k"),
    ("embed/bias", "decoder_embed.bias", "d -> d"),
    ("mask", "mask_token", TOKEN),
    *under("transformer/blocks/", "decoder_layers.{l}.", HF_BLOCK),
    *under("transformer/norm/", "decoder_norm.", NORM),
    ("pixels/kernel", "decoder_pred.weight", "d (p q c) -> (p q c) d"),
    ("pixels/bias", "decoder_pred.bias", "(p q c) -> (p q c)"),
)

# A whole ViTMAEForPreTraining, by the branches of our params.
HF_MAE = {
    "encoder": under("", "vit.", HF_VIT),
    "decoder": under("", "decoder.", HF_MAE_DECODER),
}
HF_POSITIONS = {
    "encoder": "vit.embeddings.position_embeddings",
    "decoder": "decoder.decoder_pos_embed",
}

TIMM_BLOCK = (
    *under("norm1/", "norm1.", NORMS),
    ("attention/qkv/kernel", "attn.qkv.weight", "l d t h e -> l (t h e) d"),
    ("attention/qkv/bias", "attn.qkv.bias", "l t h e -> l (t h e)"),
    *under("attention/out/", "attn.proj.", OUT),
    *under("norm2/", "norm2.", NORMS),
    *under("mlp/up/", "mlp.fc1.", UP),
    *under("mlp/down/", "mlp.fc2.", DOWN),
)

TIMM_VIT = (
    ("class", "cls_token", TOKEN),
    *under("patch/", "patch_embed.proj.", PATCH),
    *under("transformer/blocks/", "blocks.{l}.", TIMM_BLOCK),
    *under("transformer/norm/", "norm.", NORM),
)


# ---- writing ----


def write(objective: Objective, encoder: Encoder, params: Params, about: About) -> list[Written]:
    """OUT/encoder, which opens as ViTModel(..., add_pooling_layer=False), and of an MAE also OUT.

    Raises ValueError for images that are not square.
    """
    sides, weights = about.shapes["image"][1:3], encoder.variables["params"]
    module: ViT = encoder.module
    side, channels = square(sides, module.patch), channels_of(module, weights)
    arrays = named_arrays(HF_VIT, weights, sizes(module, module.patch, channels))
    rows = side // module.patch
    arrays["embeddings.position_embeddings"] = positions(rows, rows, module.width)
    config = vit_config(module, side, channels)
    files = prepared(sides, about, channels)
    written = [Written("encoder", config, arrays, "ViT", TITLE, files)]
    if isinstance(objective, MAE):
        config = config | mae_config(objective)
        arrays = {f"vit.{name}": array for name, array in arrays.items()}
        of_decoder = sizes(objective.decoder, module.patch, channels, module.width)
        arrays |= named_arrays(HF_MAE["decoder"], params["decoder"], of_decoder)
        arrays[HF_POSITIONS["decoder"]] = positions(rows, rows, objective.decoder.width)
        written.append(Written("", config, arrays, "ViT", TITLE, files))
    return written


def timm_arrays(encoder: Encoder, about: About) -> dict[str, np.ndarray]:
    """The arrays of timm's VisionTransformer.

    No mask token is among them: it would make timm take them for DINOv2's and rename them. Raises
    ValueError for an image that the patches do not divide.
    """
    module, weights = encoder.module, encoder.variables["params"]
    sides = about.shapes["image"][1:3]
    if any(side % module.patch for side in sides):
        raise ValueError(f"Images of {sides} do not divide into patches of {module.patch}.")
    of_encoder = sizes(module, module.patch, channels_of(module, weights))
    arrays = named_arrays(TIMM_VIT, weights, of_encoder)
    rows, columns = (side // module.patch for side in sides)
    return arrays | {"pos_embed": positions(rows, columns, module.width)}


def prepared(sides: Sequence[int], about: About, channels: int) -> dict[str, Json]:
    """preprocessor_config.json, by its name, where the eval view normalizes; else nothing."""
    if (channel_statistics := statistics(about.views.eval)) is None:
        return {}
    if {len(s) for s in channel_statistics} != {channels}:
        raise ValueError(
            f"The eval view normalizes by {channel_statistics}, which does not describe images of "
            f"{channels} channels."
        )
    (height, width), (mean, std) = sides, channel_statistics
    config = {
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
    return {"preprocessor_config.json": config}


def statistics(view: View) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The (mean, std) that a view normalizes pictures by, None where it does not."""
    links = view.links if isinstance(view, Chain) else (view,)
    pairs = [(link.mean, link.std) for link in links if isinstance(link, Normalize)]
    return pairs[0] if pairs else None


def vit_config(encoder: ViT, image_size: int, channels: int) -> Json:
    """config.json of a ViTModel."""
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        **shape(encoder, ""),
        "image_size": image_size,
        "patch_size": encoder.patch,
        "num_channels": channels,
        **{key: values[0] for key, values in COMPUTED.items()},
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "dtype": "float32",
    }


def mae_config(objective: MAE) -> Json:
    """What config.json of a ViTMAEForPreTraining says beside its encoder's."""
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        **shape(objective.decoder, "decoder_"),
        "mask_ratio": objective.ratio,
        "norm_pix_loss": objective.normalize,
    }


def shape(stack: ViT | Decoder, prefix: str) -> Json:
    """The sizes of a stack, under their names in config.json."""
    of_stack = (stack.width, stack.depth, stack.heads, round(stack.width * stack.mlp_ratio))
    return {prefix + key: value for key, value in zip(SHAPE, of_stack, strict=True)}


# ---- reading ----


def read(files: Files) -> Checkpoint:
    """A ViTMAEForPreTraining or a ViTModel.

    Raises ValueError with the reason when the checkpoint is not one that our modules compute.
    """
    with_decoder = files.kind == "vit_mae"
    config = files.fields(FIELDS[files.kind], COMPUTED)
    side = square(config["image_size"], config["patch_size"])
    weights = files.weights.renamed(canonical if with_decoder else without_pooler)
    patch, channels = config["patch_size"], config["num_channels"]
    stacks = {"encoder": ViT(**stack(config, ""), patch=patch)}
    parts = {"objective.encoder": stacks["encoder"]}
    if with_decoder:
        stacks["decoder"] = Decoder(**stack(config, "decoder_"))
        parts["objective.decoder"] = stacks["decoder"]
        parts["objective.ratio"] = config["mask_ratio"]
        parts["objective.normalize"] = config["norm_pix_loss"]
    of = {part: sizes(s, patch, channels, config["hidden_size"]) for part, s in stacks.items()}
    expected = {n for part in stacks for _, x, _ in HF_MAE[part] for n in names(x, of[part])}
    tables = {HF_POSITIONS[part] for part in stacks}
    check_names(weights, expected | tables, "ViT-MAE" if with_decoder else "ViT")
    for part, module in stacks.items():
        check_positions(HF_POSITIONS[part], weights, side // patch, module.width)
    params = {part: params_of(HF_MAE[part], weights, of[part]) for part in stacks}
    return Checkpoint(params, {}, parts, "mae_vit_imagenet", channels)


def canonical(name: str) -> str:
    """The array's name in transformers 4's ViTMAEForPreTraining, whichever class saved it."""
    name = re.sub(r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers.", name)
    return re.sub(r"^(?=(embeddings|encoder|layernorm)\.)", "vit.", name)


def without_pooler(name: str) -> str | None:
    return None if name.startswith("pooler.") else canonical(name)


def check_positions(name: str, weights: Weights, grid: int, width: int) -> None:
    """Raise ValueError where a table of positions is not the one that we compute."""
    held, expected = weights.shape(name), (1, 1 + grid**2, width)
    if held != expected or np.abs(weights[name] - positions(grid, grid, width)).max() > 0.01:
        raise ValueError(  # 0.01 is room for bfloat16
            f"{name} {list(held)} is not MAE's fixed sin-cos table {list(expected)}, the only one "
            f"that sslx computes: learned or resized positions cannot be imported."
        )


def stack(config: Json, prefix: str) -> Json:
    """The fields of a stack, from their names in config.json."""
    width, depth, heads, hidden = (config[prefix + key] for key in SHAPE)
    return {"width": width, "depth": depth, "heads": heads, "mlp_ratio": hidden / width}


# ---- both ----


def square(image_size: int | Sequence[int], patch: int) -> int:
    """The side of square images that divide into patches; raises ValueError for others."""
    sides = {image_size} if isinstance(image_size, int) else set(image_size)
    side = sides.pop()
    if sides or not isinstance(patch, int) or side % patch:
        raise ValueError(
            f"transformers' ViT-MAE sees square images that divide into square patches, not "
            f"image_size={image_size} and patches of {patch}: export others with --format timm."
        )
    return side


def sizes(module: ViT | Decoder, patch: int, channels: int, reads: int = 0) -> dict[str, int]:
    """The letters of a ViT, or of an MAE decoder that reads tokens of width `reads`."""
    return {**sizes_of(module), "k": reads, "p": patch, "q": patch, "c": channels, "x": 1, "y": 1}


def channels_of(module: ViT, weights: Params) -> int:
    return len(weights["patch"]["kernel"]) // module.patch**2


def positions(rows: int, columns: int, width: int) -> np.ndarray:
    """Their position table [1, 1 + N, D], which we compute: the class token's row is zero."""
    return np.pad(sincos_2d(rows, columns, width), ((1, 0), (0, 0)))[None]
