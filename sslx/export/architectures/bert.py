"""BERT, RoBERTa and RobertaPreLayerNorm, with or without the head for masked language modeling."""

import re
from dataclasses import replace

from sslx.export.card import About
from sslx.export.directory import SHAPE, Checkpoint, Files, Written
from sslx.export.fields import COUNT, ID, SHARE, SIZE, Json
from sslx.export.keymaps import (
    DOWN,
    NORM,
    NORMS,
    OUT,
    UP,
    Table,
    named_arrays,
    names,
    params_of,
    sizes_of,
    under,
)
from sslx.export.tokenizer import CONFIG, read_vocabulary, tokenizer_files
from sslx.export.weights import COUNTERS, check_names
from sslx.models.encoder import Encoder
from sslx.models.layers import Gelu, Normal
from sslx.models.text import MaskedLM, TextEncoder
from sslx.models.transformer import Form
from sslx.objectives.base import Objective
from sslx.objectives.mlm import MLM
from sslx.types import Params

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
# Defaults are those of transformers: files of 2019 leave these fields out.
FIELDS = {
    **dict(zip(SHAPE, (SIZE, COUNT, SIZE, SIZE), strict=True)),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "type_vocab_size"), SIZE),
    "layer_norm_eps": replace(SHARE, default=1e-12),
    "hidden_dropout_prob": replace(SHARE, default=0.1),
    "attention_probs_dropout_prob": replace(SHARE, default=0.1),
    "initializer_range": replace(SHARE, default=0.02),
    **{f"{name}_token_id": ID for name in CONFIG.values()},
}
COMPUTED = {
    "hidden_act": tuple(GELU),
    "position_embedding_type": ("absolute",),
    "tie_word_embeddings": (True,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
}
# BERT's pooler and its head for pairs of sentences.
UNUSED = re.compile(r"(.*\.)?(pooler|cls\.seq_relationship)\..*")
TITLE = (
    "width {hidden_size}, depth {num_hidden_layers}, {num_attention_heads} heads, windows of "
    "up to {max_position_embeddings} tokens, a vocabulary of {vocab_size}"
)

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
        ("word/table", "embeddings.word_embeddings.weight", "v d -> v d"),
        ("position/table", "embeddings.position_embeddings.weight", "s d -> s d"),
        ("type/table", "embeddings.token_type_embeddings.weight", "z d -> z d"),
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
    arrays = named_arrays(table, tree, sizes(module))
    tokenizer = about.tokenizer()
    files = {} if tokenizer is None else tokenizer_files(tokenizer, module, kind)
    return [Written("", config, arrays, "BERT", TITLE, files)]


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


# ---- reading ----


def read(files: Files) -> Checkpoint:
    """A BERT, RoBERTa or RobertaPreLayerNorm; without a head, params of `encoder` alone.

    The pooler and the head for pairs of sentences are left out. Raises ValueError with the reason
    when it is not one that our encoder computes.
    """
    kind = files.kind
    config = files.fields(FIELDS, COMPUTED)
    width, depth, heads, hidden = (config[key] for key in SHAPE)
    vocabulary = read_vocabulary(files.directory, config, kind)
    offset = 0 if kind == "bert" else vocabulary.pad + 1
    if (length := config["max_position_embeddings"] - offset) < 1:
        raise ValueError(
            f"{files.directory / 'config.json'} has max_position_embeddings="
            f"{length + offset}, of which padding takes {offset}: no position is left."
        )
    form = Form(
        norm="pre" if kind == "roberta-prelayernorm" else "post",
        epsilon=config["layer_norm_eps"],
        gelu=GELU[config["hidden_act"]],
        dropout=config["hidden_dropout_prob"],
        attention_dropout=config["attention_probs_dropout_prob"],
        init=Normal(config["initializer_range"]),
    )
    encoder = TextEncoder(
        vocabulary=vocabulary,
        width=width,
        depth=depth,
        heads=heads,
        length=length,
        offset=offset,
        types=config["type_vocab_size"],
        mlp_ratio=hidden / width,
        form=form,
    )
    table, of = HF_TEXT[kind], sizes(encoder)
    weights = files.weights.renamed(lambda name: canonical(name, kind))
    head = {name for path, name, _ in table if path.startswith("head/")}
    if not head & set(weights):  # saved by AutoModel, or a sentence encoder
        table = tuple(row for row in table if row[0].startswith("encoder/"))
    check_names(weights, {n for _, x, _ in table for n in names(x, of)}, kind)
    params = params_of(table, weights, of)
    gelu = head_gelu(kind, form.gelu)
    net = MaskedLM(encoder, None if gelu == form.gelu else gelu)
    parts = {"objective.net": net, "data.decode.vocabulary": vocabulary}
    return Checkpoint(params, {}, parts, "bert_base" if kind == "bert" else "roberta_base")


def kind_of(config: Json) -> str | None:
    """The model_type of a config.json of 2019, which does not say it; None if it is no such file.

    BERT's named no class either.
    """
    if not {"type_vocab_size", "max_position_embeddings"} <= config.keys():
        return None
    return "roberta" if "Roberta" in str(config.get("architectures")) else "bert"


def canonical(name: str, kind: str) -> str | None:
    """The name of an array in HF_TEXT, None for those that are not used."""
    if UNUSED.fullmatch(name) or COUNTERS.fullmatch(name):
        return None
    prefix = kind.replace("-", "_") + "."
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")  # Google's, converted early
    name = name.replace("LayerNorm.beta", "LayerNorm.bias")
    name = re.sub(r"^(?=(embeddings|encoder|LayerNorm)\.)", prefix, name)  # saved without it
    # Two names for tied weights.
    name = re.sub(r"^(cls\.predictions|lm_head)\.decoder\.bias$", r"\1.bias", name)
    tied = re.fullmatch(r"(cls\.predictions|lm_head)\.decoder\.weight", name)
    return prefix + "embeddings.word_embeddings.weight" if tied else name


def sizes(encoder: TextEncoder) -> dict[str, int]:
    """The letters of a TextEncoder and its head."""
    rows = {"s": encoder.length + encoder.offset, "z": encoder.types}
    return {**sizes_of(encoder), "v": encoder.vocabulary.size, "w": encoder.width, **rows}
