"""ResNet: transformers' ResNetModel, and the names of timm and torchvision, which are the same.

Blocks are not stacked: a table is written out for its depth, over all variables (`params/...`,
`batch_stats/...`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from sslx.export.architectures.vit import prepared
from sslx.export.card import About
from sslx.export.directory import Checkpoint, Files, Written
from sslx.export.fields import COUNTS, SIZE, SIZES, Json, one_of, shown
from sslx.export.keymaps import NORM, Arrays, Table, listed, named_arrays, params_of, under
from sslx.export.weights import check_names
from sslx.models.encoder import Encoder
from sslx.models.resnet import BASIC, BOTTLENECK, IMAGENET_STEM, ResNet, block_name, expansion
from sslx.objectives.base import Objective
from sslx.types import Params

MODULE = ResNet
MODEL_TYPES = ("resnet",)

Names = Callable[[int, int, int], tuple[str, str]]

COMPUTED = {
    "hidden_act": ("relu",),
    "downsample_in_first_stage": (False,),
    "downsample_in_bottleneck": (False,),
}
BLOCKS = {"basic": BASIC, "bottleneck": BOTTLENECK}
FIELDS = {
    **{"embedding_size": SIZE, "hidden_sizes": SIZES, "depths": COUNTS},
    **{"layer_type": one_of(BLOCKS), "num_channels": SIZE},
}
TITLE = "{depths} blocks ({layer_type}) of {hidden_sizes} channels, {num_channels} channels in"

CONV = (("kernel", "weight", "p q c d -> d c p q"),)
STATISTICS = (("mean", "running_mean", "d -> d"), ("var", "running_var", "d -> d"))
COUNT = "num_batches_tracked"


def write(objective: Objective, encoder: Encoder, params: Params, about: About) -> list[Written]:
    """OUT/encoder, which opens as ResNetModel; raises ValueError for another stem than its own."""
    module, variables = encoder.module, encoder.variables
    if module.stem != IMAGENET_STEM:
        raise ValueError(
            f"transformers' ResNetModel has ImageNet's stem only, not {module.stem}: use "
            f"--format timm."
        )
    arrays = named_arrays(hf_resnet(module), variables, {})
    channels = variables["params"]["conv"]["kernel"].shape[2]
    files = prepared(about.shapes["image"][1:3], about, channels)
    config = resnet_config(module, channels)
    return [Written("encoder", config, arrays | counts(arrays), "ResNet", TITLE, files)]


def timm_arrays(encoder: Encoder, about: About) -> dict[str, np.ndarray]:
    """The arrays of timm's and torchvision's ResNet, batch statistics included.

    Where the stem is not ImageNet's of 64 channels, the model that reads them needs that stem.
    """
    arrays = named_arrays(timm_resnet(encoder.module), encoder.variables, {})
    return arrays | counts(arrays)


def resnet_config(encoder: ResNet, channels: int) -> Json:
    """config.json of a ResNetModel."""
    stages = range(len(encoder.blocks))
    return {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": channels,
        "embedding_size": encoder.channels,
        "hidden_sizes": [encoder.channels * 2**i * expansion(encoder.kernels) for i in stages],
        "depths": list(encoder.blocks),
        "layer_type": next(name for name, of in BLOCKS.items() if of == encoder.kernels),
        **{key: values[0] for key, values in COMPUTED.items()},
        "dtype": "float32",
    }


def read(files: Files) -> Checkpoint:
    """A ResNetModel, or a classifier without its head.

    Raises ValueError with the reason when the checkpoint is not one that our ResNet computes.
    """
    config = files.fields(FIELDS, COMPUTED)
    kernels, channels = BLOCKS[config["layer_type"]], config["embedding_size"]
    widths = [channels * 2**i * expansion(kernels) for i in range(len(config["depths"]))]
    if config["hidden_sizes"] != widths:
        raise ValueError(
            f"config.json has hidden_sizes={shown(config['hidden_sizes'])}, but a ResNet's double "
            f"from stage to stage, {shown(widths)}: sslx computes no other."
        )
    encoder = ResNet(kernels, tuple(config["depths"]), channels)
    table = hf_resnet(encoder)
    weights = files.weights.renamed(canonical)
    check_names(weights, {name for _, name, _ in table}, "ResNet")
    variables = params_of(table, weights, {})
    check_shapes(encoder, variables, config["num_channels"])
    return Checkpoint(
        params={"encoder": variables["params"]},
        buffers={"stats": {"batch_stats": {"encoder": variables["batch_stats"]}}},
        parts={"objective.net.encoder": encoder},
        recipe="simclr_resnet50_imagenet",
        channels=config["num_channels"],
    )


def canonical(name: str) -> str | None:
    """The array's name in a ResNetModel; None for a classifier's head and torch's counters."""
    unused = name.startswith("classifier.") or name.endswith(COUNT)
    return None if unused else name.removeprefix("resnet.")


def check_shapes(encoder: ResNet, variables: dict, channels: int) -> None:
    """Raise ValueError where arrays have other shapes than the encoder's."""
    image = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    ours = nn.unbox(jax.eval_shape(encoder.init, jax.random.key(0), image))
    ours, theirs = (flatten_dict(tree, sep="/") for tree in (ours, variables))
    if odd := [path for path, array in theirs.items() if array.shape != ours[path].shape]:
        raise ValueError(
            f"{listed(odd)} have other shapes than config.json describes, {odd[0]} "
            f"{list(theirs[odd[0]].shape)} and not {list(ours[odd[0]].shape)}: the weights are "
            f"those of another model."
        )


# ---- names ----


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
    """Zeros for torch's counters of batches, which it reads only without a momentum."""
    variances = [name for name in arrays if name.endswith("running_var")]
    return {name.replace("running_var", COUNT): np.zeros((), np.int64) for name in variances}
