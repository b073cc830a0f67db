"""BERT, RoBERTa and RobertaPreLayerNorm, with or without the head for masked language modeling."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np

from sslx.data.text.tokenizers import tokenizer_file
from sslx.export.card import About
from sslx.export.directory import (
    SHAPE,
    Checkpoint,
    Json,
    Written,
    check_names,
    model_type,
    read_arrays,
    read_config,
)
from sslx.export.keymaps import (
    DOWN,
    NORM,
    NORMS,
    OUT,
    UP,
    Table,
    listed,
    named_arrays,
    names,
    params_of,
    sizes_of,
    under,
)
from sslx.models.encoder import Encoder
from sslx.models.layers import Gelu, Normal
from sslx.models.text import MaskedLM, TextEncoder
from sslx.models.transformer import Form
from sslx.objectives.base import Objective
from sslx.objectives.mlm import MLM
from sslx.types import Params
from sslx.vocabulary import BERT, NAMES, ROBERTA, Vocabulary

MODULE = TextEncoder
# By transformers' model_type: the class of the whole, and what AutoModel opens.
CLASSES = {
    "bert": ("BertForMaskedLM", "BertModel"),
    "roberta": ("RobertaForMaskedLM", "RobertaModel"),
    "roberta-prelayernorm": ("RobertaPreLayerNormForMaskedLM", "RobertaPreLayerNormModel"),
}
MODEL_TYPES = tuple(CLASSES)

# Google's tanh form has two names in transformers, for one function.
GELU: dict[str, Gelu] = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
NEEDED = (
    *SHAPE,
    *("vocab_size", "max_position_embeddings", "type_vocab_size", "layer_norm_eps"),
    *("hidden_act", "pad_token_id"),
)
COMPUTED = {
    "hidden_act": tuple(GELU),
    "position_embedding_type": ("absolute",),
    "tie_word_embeddings": (True,),
    "is_decoder": (False,),
}
# Arrays that are not read: BERT's pooler and its head for pairs of sentences, copies of tied
# weights, and a buffer that old versions saved.
UNUSED = re.compile(r"(.*\.)?(pooler\..*|cls\.seq_relationship\..*|position_ids|decoder\.bias)")
TIED = re.compile(r"(cls\.predictions|lm_head)\.decoder\.weight")
SIZE = (
    "width {hidden_size}, depth {num_hidden_layers}, {num_attention_heads} heads, windows of "
    "up to {max_position_embeddings} tokens, a vocabulary of {vocab_size}"
)

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


# ---- writing ----


def write(objective: Objective, encoder: Encoder, params: Params, about: About) -> list[Written]:
    """OUT, which opens as AutoModelForMaskedLM where the objective has such a head, and as
    AutoModel, whose pooler is then new: masked language modeling trains none.

    Raises ValueError for an encoder that is neither BERT's, RoBERTa's nor RobertaPreLayerNorm's,
    and for another model's tokenizer.
    """
    module, whole = encoder.module, isinstance(objective, MLM)
    kind = text_kind(module)
    if whole and (objective.net.gelu or module.form.gelu) != head_gelu(kind, module.form.gelu):
        raise ValueError(
            f"The GELU of {CLASSES[kind][0]}'s head is {head_gelu(kind, module.form.gelu)!r} where "
            f"that of the encoder is {module.form.gelu!r}: no other head can be exported."
        )
    table, tree = HF_TEXT[kind], dict(params) if whole else {}
    tree["encoder"] = encoder.variables["params"]
    if not whole:
        table = tuple(row for row in table if row[0].startswith("encoder/"))
    config = text_config(module, kind, CLASSES[kind][0 if whole else 1])
    arrays = named_arrays(table, tree, sizes_of(module))
    tokenizer = about.tokenizer()
    files = {} if tokenizer is None else tokenizer_files(tokenizer, module, kind)
    return [Written("", config, arrays, "BERT", SIZE, files)]


def text_kind(encoder: TextEncoder) -> str:
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


def head_gelu(kind: str, gelu: Gelu) -> Gelu:
    """The GELU of the head in transformers: BERT's is the encoder's, RoBERTa's always exact."""
    return gelu if kind == "bert" else "erf"


def text_config(encoder: TextEncoder, kind: str, opened: str) -> Json:
    """config.json of an encoder, for the class that opens it."""
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


def tokenizer_files(folder: str, encoder: TextEncoder, kind: str) -> dict[str, Json | Path]:
    """tokenizer_config.json and tokenizer.json, by their names, from a tokenizer's folder or file.

    Raises ValueError where it is another model's.
    """
    path = Path(tokenizer_file(folder))
    words = encoder.vocabulary
    spelled = {w["id"]: w["content"] for w in added_tokens(path)}
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
    return {"tokenizer_config.json": config, "tokenizer.json": path}


# ---- reading ----


def read(directory: Path) -> Checkpoint:
    """A BERT, RoBERTa or RobertaPreLayerNorm; without a head, params of `encoder` alone.

    The pooler and the head for pairs of sentences are left out. Raises ValueError with the reason
    when it is not one that our encoder computes.
    """
    kind = model_type(directory)
    config = read_config(directory, NEEDED, COMPUTED)
    width, depth, heads, hidden = (config[key] for key in SHAPE)
    vocabulary = read_vocabulary(directory, config)
    offset = 0 if kind == "bert" else vocabulary.pad + 1
    form = Form(
        norm="pre" if kind == "roberta-prelayernorm" else "post",
        epsilon=config["layer_norm_eps"],
        gelu=GELU[config["hidden_act"]],
        dropout=config.get("hidden_dropout_prob", 0.1),
        attention_dropout=config.get("attention_probs_dropout_prob", 0.1),
        init=Normal(config.get("initializer_range", 0.02)),
    )
    encoder = TextEncoder(
        vocabulary=vocabulary,
        width=width,
        depth=depth,
        heads=heads,
        length=config["max_position_embeddings"] - offset,
        offset=offset,
        types=config["type_vocab_size"],
        mlp_ratio=hidden / width,
        form=form,
    )
    table, of = HF_TEXT[kind], sizes_of(encoder)
    arrays = text_arrays(directory, kind)
    head = {name for path, name, _ in table if path.startswith("head/")}
    if not head & set(arrays):  # saved by AutoModel, or a sentence encoder
        table = tuple(row for row in table if row[0].startswith("encoder/"))
    check_names(arrays, {n for _, x, _ in table for n in names(x, of)}, kind)
    params = params_of(table, arrays, of)
    check_rows(encoder, params["encoder"])
    gelu = head_gelu(kind, form.gelu)
    net = MaskedLM(encoder, None if gelu == form.gelu else gelu)
    parts = {"objective.net": net, "data.decode.vocabulary": vocabulary}
    return Checkpoint(params, {}, parts, "bert_base" if kind == "bert" else "roberta_base")


def check_rows(encoder: TextEncoder, params: Params) -> None:
    """Raise ValueError where a table has other rows than config.json says."""
    rows = {
        "word": encoder.vocabulary.size,
        "position": encoder.length + encoder.offset,
        "type": encoder.types,
    }
    for name, count in rows.items():
        if (held := len(params[name]["table"])) != count:
            raise ValueError(
                f"The table of {name} vectors has {held} rows and config.json says {count}: the "
                f"weights are those of another model."
            )


def text_arrays(directory: Path, kind: str) -> dict[str, np.ndarray]:
    """A checkpoint's arrays under the names of HF_TEXT, without the unused ones."""
    prefix, arrays = kind.replace("-", "_") + ".", {}
    for name, array in read_arrays(directory).items():
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
    return {name: array for name, array in arrays.items() if not UNUSED.fullmatch(name)}


def read_vocabulary(directory: Path, config: Json) -> Vocabulary:
    """The vocabulary, from the tokenizer beside the weights."""
    size, path = config["vocab_size"], directory / "tokenizer.json"
    if path.is_file():
        words = {w["content"]: w["id"] for w in added_tokens(path)}
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


def added_tokens(path: Path) -> list[Json]:
    """The special tokens of a tokenizer.json."""
    return json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
