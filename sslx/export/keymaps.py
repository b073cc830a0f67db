"""Our params and the names other libraries give them: one table per architecture, read both ways.

A row holds our path, their name and the einops pattern from our array to theirs; backwards, the
pattern is read from the right. An axis in braces in the name is spread over names: `{l}` counts
the layers, which we stack for the scan, `{t}` is query, key, value. The letters of sizes:

l layers   d width   h heads   e width of a head   t query, key, value   m hidden width of the MLP
k width of the encoder that a decoder reads   p q rows, columns of a patch   c channels

A ResNet's blocks are not stacked: its table is written out for its depth, over all its variables
(`params/...`, `batch_stats/...`).
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping

import einops
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sslx.models.resnet import ResNet, block_name, expansion
from sslx.ops.positions import sincos_2d
from sslx.types import Tree

Table = tuple[tuple[str, str, str], ...]
Arrays = Mapping[str, np.ndarray]
Names = Callable[[int, int, int], tuple[str, str]]

WORDS = {"t": ("query", "key", "value")}


def under(ours: str, theirs: str, table: Table) -> Table:
    """The same rows, inside a branch of our tree and behind a prefix of their names."""
    return tuple((ours + path, theirs + name, how) for path, name, how in table)


NORM = (("scale", "weight", "d -> d"), ("bias", "bias", "d -> d"))
NORMS = (("scale", "weight", "l d -> l d"), ("bias", "bias", "l d -> l d"))  # of all layers
UP = (("kernel", "weight", "l d m -> l m d"), ("bias", "bias", "l m -> l m"))
DOWN = (("kernel", "weight", "l m d -> l d m"), ("bias", "bias", "l d -> l d"))
OUT = (("kernel", "weight", "l h e d -> l d (h e)"), ("bias", "bias", "l d -> l d"))
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

# Text. `v` counts the rows of a table of vectors.
ROWS = (("table", "weight", "v d -> v d"),)
DENSE = (("kernel", "weight", "d w -> w d"), ("bias", "bias", "w -> w"))


def text_encoder(norm1: str, norm2: str, *more: tuple[str, str, str]) -> Table:
    """A post- or pre-norm encoder of text, by the places of its norms in a layer's names."""
    layer = (
        ("attention/qkv/kernel", "attention.self.{t}.weight", "l d t h e -> l t (h e) d"),
        ("attention/qkv/bias", "attention.self.{t}.bias", "l t h e -> l t (h e)"),
        *under("attention/out/", "attention.output.dense.", OUT),
        *under("norm1/", norm1, NORMS),
        *under("mlp/up/", "intermediate.dense.", UP),
        *under("mlp/down/", "output.dense.", DOWN),
        *under("norm2/", norm2, NORMS),
    )
    return (
        *under("word/", "embeddings.word_embeddings.", ROWS),
        *under("position/", "embeddings.position_embeddings.", ROWS),
        *under("type/", "embeddings.token_type_embeddings.", ROWS),
        *under("norm/", "embeddings.LayerNorm.", NORM),
        *under("transformer/blocks/", "encoder.layer.{l}.", layer),
        *more,
    )


POST = text_encoder("attention.output.LayerNorm.", "output.LayerNorm.")
PRE = text_encoder(
    "attention.LayerNorm.",
    "intermediate.LayerNorm.",
    *under("transformer/norm/", "LayerNorm.", NORM),
)


def masked_lm(prefix: str, encoder: Table, dense: str, norm: str, bias: str) -> Table:
    """A whole model for masked language modeling; the word vectors are the decoder's too."""
    return (
        *under("encoder/", prefix, encoder),
        *under("head/dense/", dense, DENSE),
        *under("head/norm/", norm, NORM),
        ("head/bias", bias, "v -> v"),
    )


# By transformers' model_type, which is also its prefix but for the hyphen.
HEAD = ("lm_head.dense.", "lm_head.layer_norm.", "lm_head.bias")
HF_TEXT = {
    "bert": masked_lm(
        "bert.",
        POST,
        "cls.predictions.transform.dense.",
        "cls.predictions.transform.LayerNorm.",
        "cls.predictions.bias",
    ),
    "roberta": masked_lm("roberta.", POST, *HEAD),
    "roberta-prelayernorm": masked_lm("roberta_prelayernorm.", PRE, *HEAD),
}

CONV = (("kernel", "weight", "p q c d -> d c p q"),)
STATISTICS = (("mean", "running_mean", "d -> d"), ("var", "running_var", "d -> d"))
COUNT = "num_batches_tracked"


def conv_norm(ours: tuple[str, str], theirs: tuple[str, str]) -> Table:
    """A convolution and its BatchNorm, under the names (convolution, norm)."""
    (conv, norm), (their_conv, their_norm) = ours, theirs
    return (
        *under(f"params/{conv}/", their_conv, CONV),
        *under(f"params/{norm}/", their_norm, NORM),
        *under(f"batch_stats/{norm}/", their_norm, STATISTICS),
    )


def resnet(encoder: ResNet, stem: tuple[str, str], names: Names) -> Table:
    """Every convolution and norm; `names(stage, block, i)` are theirs, all counted from 0.

    The 0th convolution of a block is its projection; not every block has one.
    """
    rows = conv_norm(("conv", "norm"), stem)
    for stage, blocks in enumerate(encoder.blocks):
        for block in range(blocks):
            ours = block_name(stage, block)
            projected = not block and (stage > 0 or expansion(encoder.kernels) > 1)
            for i in range(0 if projected else 1, len(encoder.kernels) + 1):
                rows += conv_norm((f"{ours}/conv{i}", f"{ours}/norm{i}"), names(stage, block, i))
    return rows


def timm_resnet(encoder: ResNet) -> Table:
    """timm's and torchvision's names, which are the same."""

    def names(stage: int, block: int, i: int) -> tuple[str, str]:
        at = f"layer{stage + 1}.{block}."
        parts = (f"conv{i}.", f"bn{i}.") if i else ("downsample.0.", "downsample.1.")
        return at + parts[0], at + parts[1]

    return resnet(encoder, ("conv1.", "bn1."), names)


def hf_resnet(encoder: ResNet) -> Table:
    """The names of transformers' ResNetModel."""

    def named(at: str) -> tuple[str, str]:
        return f"{at}.convolution.", f"{at}.normalization."

    def names(stage: int, block: int, i: int) -> tuple[str, str]:
        part = f"layer.{i - 1}" if i else "shortcut"
        return named(f"encoder.stages.{stage}.layers.{block}.{part}")

    return resnet(encoder, named("embedder.embedder"), names)


def counts(arrays: Arrays) -> dict[str, np.ndarray]:
    """The counters of batches that torch keeps, and does not read where momentum is a number."""
    variances = [name for name in arrays if name.endswith("running_var")]
    return {name.replace("running_var", COUNT): np.zeros((), np.int64) for name in variances}


def sizes(stack, patch: int, channels: int, reads: int = 0) -> dict[str, int]:
    """The letters of a ViT or of an MAE decoder that reads tokens of width `reads`."""
    hidden = round(stack.width * stack.mlp_ratio)
    of_stack = {"l": stack.depth, "d": stack.width, "h": stack.heads, "m": hidden, "k": reads}
    return {**of_stack, "t": 3, "p": patch, "q": patch, "c": channels}


def sizes_of_text(encoder) -> dict[str, int]:
    """The letters of a TextEncoder."""
    hidden = round(encoder.width * encoder.mlp_ratio)
    return {"l": encoder.depth, "d": encoder.width, "h": encoder.heads, "m": hidden, "t": 3}


def positions(rows: int, columns: int, width: int) -> np.ndarray:
    """Their position table [1, 1 + N, D], which we compute: the class token's row is zero."""
    return np.pad(sincos_2d(rows, columns, width), ((1, 0), (0, 0)))[None]


def write(table: Table, params: Tree, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Our params as their arrays by name, float32.

    Raises ValueError when params and table do not hold the same paths.
    """
    flat, paths = flatten_dict(params, sep="/"), [path for path, _, _ in table]
    if odd := sorted(set(flat) ^ set(paths)):
        raise ValueError(
            f"This model cannot be written in the other library's names: {listed(odd)} stand in "
            f"its params or in the table of sslx/export/keymaps.py, but not in both."
        )
    arrays = {}
    for path, name, how in table:
        array = _rearrange(np.asarray(flat[path], np.float32), how, sizes, path)
        array = array.reshape(-1, *array.shape[name.count("{") :])
        arrays |= dict(zip(names(name, sizes), array, strict=True))
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def read(table: Table, arrays: Arrays, sizes: Mapping[str, int]) -> Tree:
    """Their arrays by name as our params, float32.

    Raises ValueError where an array's shape is not what `sizes` say.
    """
    flat = {}
    for path, name, how in table:
        ours, theirs = how.split(" -> ")
        array = np.stack([np.asarray(arrays[n], np.float32) for n in names(name, sizes)])
        spread = [len(WORDS.get(axis, ())) or sizes[axis] for axis in axes(name)]
        array = array.reshape(*spread, *array.shape[1:])
        flat[path] = _rearrange(array, f"{theirs} -> {ours}", sizes, name)
    return unflatten_dict(flat, sep="/")


def names(name: str, sizes: Mapping[str, int]) -> Iterator[str]:
    """Their names of the arrays that we stack into one, in the order of the stack."""
    values = [WORDS.get(axis) or range(sizes[axis]) for axis in axes(name)]
    for chosen in itertools.product(*values):
        yield name.format(**dict(zip(axes(name), chosen, strict=True)))


def axes(name: str) -> list[str]:
    return re.findall(r"{(\w)}", name)


def listed(items: list[str], most: int = 4) -> str:
    """The first few of a long list, and how many there are."""
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def _rearrange(array: np.ndarray, how: str, sizes: Mapping[str, int], what: str) -> np.ndarray:
    named = {axis: sizes[axis] for axis in re.findall(r"\w", how.split("->")[0]) if axis in sizes}
    try:
        return einops.rearrange(array, how, **named)
    except einops.EinopsError as error:
        expected = ", ".join(f"{axis}={size}" for axis, size in named.items())
        raise ValueError(
            f"{what} has shape {list(array.shape)}, which is not {how.split(' ->')[0]!r} with "
            f"{expected}: the weights are those of another model than the one described."
        ) from error
