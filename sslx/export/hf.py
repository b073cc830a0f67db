"""Hugging Face checkpoints, written and read without torch or transformers.

`save` makes OUT/encoder/, which opens as ViTModel(..., add_pooling_layer=False) or as ResNetModel:
all that a task after pretraining needs; and of an MAE OUT/, which opens as ViTMAEForPreTraining.
`load` reads a ViT-MAE, `load_resnet` a ResNet, ours or another's. Their position tables are arrays
of the checkpoint; ours are computed. `save_text` and `load_text` do both for BERT and RoBERTa.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
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

from sslx.data.tokenizers import tokenizer_file
from sslx.export import keymaps
from sslx.export.keymaps import HF_MAE, HF_POSITIONS, Arrays, listed, positions, sizes
from sslx.models.layers import Gelu, LayerNorm, Normal
from sslx.models.resnet import BASIC, BOTTLENECK, IMAGENET_STEM, ResNet, expansion
from sslx.models.text import MaskedLM, TextEncoder
from sslx.models.transformer import Form
from sslx.models.vit import ViT
from sslx.objectives.base import Objective
from sslx.objectives.mae import MAE, Decoder
from sslx.objectives.mlm import MLM
from sslx.types import Buffers, Params, Tree
from sslx.vocabulary import BERT, NAMES, ROBERTA, Vocabulary

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
# Google's tanh form has two names in transformers, for one function.
GELU: dict[str, Gelu] = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
NEEDED_TEXT = (
    *SHAPE,
    *("vocab_size", "max_position_embeddings", "type_vocab_size", "layer_norm_eps"),
    *("hidden_act", "pad_token_id"),
)
COMPUTED_TEXT = {
    "hidden_act": tuple(GELU),
    "position_embedding_type": ("absolute",),
    "tie_word_embeddings": (True,),
    "is_decoder": (False,),
}
# Their classes for a model_type: the whole, and what AutoModel opens.
CLASSES = {
    "bert": ("BertForMaskedLM", "BertModel"),
    "roberta": ("RobertaForMaskedLM", "RobertaModel"),
    "roberta-prelayernorm": ("RobertaPreLayerNormForMaskedLM", "RobertaPreLayerNormModel"),
}
# Arrays that stand beside the model's: BERT's pooler and its head for pairs of sentences, copies of
# tied weights, and a buffer that old versions saved.
ASIDE = re.compile(r"(.*\.)?(pooler\..*|cls\.seq_relationship\..*|position_ids|decoder\.bias)")
TIED = re.compile(r"(cls\.predictions|lm_head)\.decoder\.weight")
TEXT = (
    "BERT",
    (
        "width {hidden_size}, depth {num_hidden_layers}, {num_attention_heads} heads, windows of "
        "up to {max_position_embeddings} tokens, a vocabulary of {vocab_size}"
    ),
)
# What the model card says of what opens with a class of transformers'.
KINDS = {
    "ViTModel": VIT,
    "ViTMAEForPreTraining": VIT,
    **{name: TEXT for names in CLASSES.values() for name in names},
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


# ---- text ----


def model_type(directory: Path | str) -> str:
    """What a checkpoint's config.json says it is, such as "vit_mae", "bert" or "roberta"."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the directory of a Hugging Face checkpoint.")
    return json.loads(path.read_text(encoding="utf-8")).get("model_type", "")


def save_text(
    objective: Objective,
    params: Params,
    directory: Path | str,
    card: Card = Card(),
    tokenizer: Path | str | None = None,
) -> None:
    """Write OUT/: float32 weights, config, model card, and the tokenizer of a file or folder.

    It opens as AutoModelForMaskedLM where the objective has such a head, and as AutoModel, whose
    pooler is then new: masked language modeling trains none. Raises ValueError for an encoder that
    is neither BERT's, RoBERTa's nor RobertaPreLayerNorm's, and for another model's tokenizer.
    """
    directory = Path(directory)
    encoder, variables = objective.backbone(params, {})
    if not isinstance(encoder, TextEncoder):
        raise ValueError(f"Only a TextEncoder is exported as text, not {type(encoder).__name__}.")
    kind, whole = _text_kind(encoder), isinstance(objective, MLM)
    if whole and (objective.net.gelu or encoder.form.gelu) != _head(kind, encoder.form.gelu):
        raise ValueError(
            f"The GELU of {CLASSES[kind][0]}'s head is {_head(kind, encoder.form.gelu)!r} where "
            f"that of the encoder is {encoder.form.gelu!r}: no other head can be exported."
        )
    table, tree = keymaps.HF_TEXT[kind], dict(params) if whole else {}
    tree["encoder"] = variables["params"]
    if not whole:
        table = tuple(row for row in table if row[0].startswith("encoder/"))
    config = _text_config(encoder, kind, CLASSES[kind][0 if whole else 1])
    arrays = keymaps.write(table, tree, keymaps.sizes_of_text(encoder))
    words = None if tokenizer is None else Path(tokenizer_file(str(tokenizer)))
    files = {} if words is None else _tokenizer(words, encoder, kind)
    _store(directory, config, arrays, _readme(objective, config, card), None)
    for name, value in files.items():
        _dump(directory / name, value)
    if words:
        shutil.copyfile(words, directory / "tokenizer.json")


def load_text(directory: Path | str) -> tuple[MaskedLM, Params]:
    """A Hugging Face BERT or RoBERTa as our net and its params.

    A checkpoint without a head gives those of `encoder` alone. The pooler and the head for pairs of
    sentences are left out. Raises ValueError with the reason when it is not one that ours computes.
    """
    directory = Path(directory)
    found = model_type(directory)
    kind = found if found in CLASSES else "bert"  # `_config` then says what can be imported
    config = _config(directory, kind, CLASSES[kind][0], NEEDED_TEXT, COMPUTED_TEXT)
    width, depth, heads, hidden = (config[key] for key in SHAPE)
    vocabulary = _vocabulary(directory, config)
    offset = 0 if kind == "bert" else vocabulary.pad + 1
    form = Form(
        "pre" if kind == "roberta-prelayernorm" else "post",
        config["layer_norm_eps"],
        GELU[config["hidden_act"]],
        config.get("hidden_dropout_prob", 0.1),
        config.get("attention_probs_dropout_prob", 0.1),
        Normal(config.get("initializer_range", 0.02)),
    )
    encoder = TextEncoder(
        vocabulary,
        width,
        depth,
        heads,
        length=config["max_position_embeddings"] - offset,
        offset=offset,
        types=config["type_vocab_size"],
        mlp_ratio=hidden / width,
        form=form,
    )
    table, of = keymaps.HF_TEXT[kind], keymaps.sizes_of_text(encoder)
    arrays = _text_arrays(directory, kind)
    head = {name for path, name, _ in table if path.startswith("head/")}
    if not head & set(arrays):  # saved by AutoModel, or a sentence encoder
        table = tuple(row for row in table if row[0].startswith("encoder/"))
    _check_names(arrays, {n for _, x, _ in table for n in keymaps.names(x, of)}, kind)
    params = keymaps.read(table, arrays, of)
    rows = {"word": vocabulary.size, "position": encoder.length + offset, "type": encoder.types}
    for name, count in rows.items():
        if (found := len(params["encoder"][name]["table"])) != count:
            raise ValueError(
                f"The table of {name} vectors has {found} rows and config.json says {count}: the "
                f"weights are those of another model."
            )
    head = _head(kind, form.gelu)
    return MaskedLM(encoder, None if head == form.gelu else head), params


def _head(kind: str, gelu: Gelu) -> Gelu:
    """The head's GELU in transformers: BERT's as the encoder's, RoBERTa's exact in any case."""
    return gelu if kind == "bert" else "erf"


def _text_kind(encoder: TextEncoder) -> str:
    """The model_type that computes what an encoder does."""
    padded = encoder.vocabulary.pad + 1
    kinds = {("post", 0): "bert", ("post", padded): "roberta"}
    kinds[("pre", padded)] = "roberta-prelayernorm"
    norm, offset = encoder.form.norm, encoder.offset
    if (norm, offset) not in kinds:
        raise ValueError(
            f"transformers has no encoder with norm={norm!r} and offset={offset} positions: use "
            f"'post' with 0 (BERT), or 'post' or 'pre' with {padded}, one more than the padding's "
            f"id (RoBERTa, RobertaPreLayerNorm)."
        )
    return kinds[norm, offset]


def _text_config(encoder: TextEncoder, kind: str, opened: str) -> Json:
    form, words = encoder.form, encoder.vocabulary
    hidden = round(encoder.width * encoder.mlp_ratio)
    of_stack = (encoder.width, encoder.depth, encoder.heads, hidden)
    return {
        "architectures": [opened],
        "model_type": kind,
        **dict(zip(SHAPE, of_stack, strict=True)),
        "vocab_size": words.size,
        "max_position_embeddings": encoder.length + encoder.offset,
        "type_vocab_size": encoder.types,
        "layer_norm_eps": form.epsilon,
        "hidden_act": next(name for name, gelu in GELU.items() if gelu == form.gelu),
        "hidden_dropout_prob": form.dropout,
        "attention_probs_dropout_prob": form.attention_dropout,
        "initializer_range": getattr(form.init, "std", 0.02),
        "pad_token_id": words.pad,
        "bos_token_id": words.start,
        "eos_token_id": words.end,
        "unk_token_id": words.unknown,
        "mask_token_id": words.mask,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def _text_arrays(directory: Path, kind: str) -> dict[str, np.ndarray]:
    """A checkpoint's arrays under the names of keymaps.HF_TEXT, without those that stand aside."""
    prefix, arrays = kind.replace("-", "_") + ".", {}
    found = _arrays(directory)
    for name, array in found.items():
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")  # Google's, converted early
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if re.match(r"(embeddings|encoder|pooler|LayerNorm)\.", name):  # saved without its prefix
            name = prefix + name
        arrays[name] = array
    words = arrays.get(prefix + "embeddings.word_embeddings.weight")
    for name in [name for name in arrays if TIED.fullmatch(name)]:
        if words is None or not np.array_equal(arrays.pop(name), words):
            raise ValueError(
                f"{name} is not the table of word vectors: sslx computes tied weights only."
            )
    return {name: array for name, array in arrays.items() if not ASIDE.fullmatch(name)}


def _vocabulary(directory: Path, config: Json) -> Vocabulary:
    """How many words, and which are special, by the tokenizer that lies beside the weights."""
    size, path = config["vocab_size"], directory / "tokenizer.json"
    if path.is_file():
        words = {w["content"]: w["id"] for w in _added(path)}
        ids = {
            name: next((words[w] for w in spelled if w in words), None)
            for name, spelled in NAMES.items()
        }
        if lacking := [NAMES[name][0] for name, at in ids.items() if at is None]:
            raise ValueError(
                f"{path} has no {listed(lacking)}: masked language modeling needs the special "
                f"words of BERT or RoBERTa; use the checkpoint's own tokenizer."
            )
        return Vocabulary(size, **ids)
    ours = ("pad", "unk", "bos", "eos", "mask")
    ids = [config.get(f"{name}_token_id") for name in ours]
    if None not in ids:
        return Vocabulary(size, *ids)
    for known in (BERT, ROBERTA):
        if (known.size, known.pad) == (size, config["pad_token_id"]):
            return known
    raise ValueError(
        f"{path} is missing, and a vocabulary of {size} is neither BERT's nor RoBERTa's: which ids "
        f"are special is not known; save it with AutoTokenizer.from_pretrained(DIR)."
        f"save_pretrained(DIR)."
    )


def _tokenizer(path: Path, encoder: TextEncoder, kind: str) -> dict[str, Json]:
    """tokenizer_config.json, by its name, for a tokenizer.json."""
    words = encoder.vocabulary
    spelled = {w["id"]: w["content"] for w in _added(path)}
    if lacking := [
        f"{name}={at}" for name, at in asdict(words).items() if name in NAMES and at not in spelled
    ]:
        raise ValueError(
            f"{path} has no special words at {listed(lacking)}: it is the tokenizer of another "
            f"vocabulary than the model's."
        )
    names = {"pad": "pad", "unknown": "unk", "start": "cls", "end": "sep", "mask": "mask"}
    config = {f"{theirs}_token": spelled[getattr(words, ours)] for ours, theirs in names.items()}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": encoder.length,
        "model_input_names": inputs if kind == "bert" else [inputs[0], inputs[2]],
    }
    return {"tokenizer_config.json": config}


def _added(path: Path) -> list[Json]:
    return json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])


# ---- parts ----


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
