"""Hugging Face directories as others hand them over: every array is used once, or named."""

import json
import logging
import shutil

import ml_dtypes
import numpy as np
import pytest
from commands import TINY
from exports import about
from safetensors.numpy import load_file, save_file

from sslx.export import hf
from sslx.models.vit import ViT
from sslx.objectives.mae import MAE, Decoder
from sslx.vocabulary import Vocabulary

WORDS, PLACES, WIDTH, HIDDEN, LAYERS = 11, 6, 8, 16, 2
# As google-research/bert writes it: no model_type, no epsilon, no ids.
GOOGLE = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": PLACES,
    "num_attention_heads": 2,
    "num_hidden_layers": LAYERS,
    "type_vocab_size": 2,
    "vocab_size": WORDS,
}
SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
TOKENIZER = {
    "added_tokens": [{"id": i, "content": word} for word, i in SPECIAL.items()],
    "model": {"type": "WordPiece", "vocab": SPECIAL | {f"w{i}": i for i in range(5, WORDS)}},
}
BIAS, TIED = "cls.predictions.bias", "cls.predictions.decoder.bias"
WORD, QUERY = "bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.attention.self.query"


def linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name):
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def bert_arrays():
    """A BertForMaskedLM as transformers names it."""
    shapes = {
        WORD: (WORDS, WIDTH),
        "bert.embeddings.position_embeddings.weight": (PLACES, WIDTH),
        "bert.embeddings.token_type_embeddings.weight": (2, WIDTH),
        **norm("bert.embeddings.LayerNorm"),
        **linear("cls.predictions.transform.dense", WIDTH, WIDTH),
        **norm("cls.predictions.transform.LayerNorm"),
        BIAS: (WORDS,),
    }
    for i in range(LAYERS):
        at = f"bert.encoder.layer.{i}"
        for name in ("query", "key", "value"):
            shapes |= linear(f"{at}.attention.self.{name}", WIDTH, WIDTH)
        shapes |= linear(f"{at}.attention.output.dense", WIDTH, WIDTH)
        shapes |= linear(f"{at}.intermediate.dense", HIDDEN, WIDTH)
        shapes |= linear(f"{at}.output.dense", WIDTH, HIDDEN)
        shapes |= norm(f"{at}.attention.output.LayerNorm") | norm(f"{at}.output.LayerNorm")
    r = np.random.default_rng(0)
    return {name: r.normal(0.1, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder, config=(), arrays=(), tokenizer=TOKENIZER):
    """A BERT's directory, with changes to it; a field or an array of ... is taken out."""
    folder.mkdir(exist_ok=True)
    kept = lambda of: {name: x for name, x in of.items() if x is not ...}  # noqa: E731
    config = kept(GOOGLE | {"model_type": "bert"} | dict(config))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(kept(bert_arrays() | dict(arrays)), folder / "model.safetensors")
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
def bert(tmp_path):
    return write(tmp_path / "bert")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small ViT-MAE."""
    import jax
    from flax import linen as nn

    path = tmp_path_factory.mktemp("exported") / "mae"
    objective = MAE(ViT(8, 1, 2, 2), Decoder(8, 1, 2))
    batch = {"image": jax.ShapeDtypeStruct((1, 4, 4, 3), np.float32)}
    shapes, _ = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0), batch))
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    hf.save(objective, params, {}, path, about(4))
    return path


@pytest.fixture
def mae(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "mae")


def refused(directory, *said):
    """Reading must fail with one line that holds all of these."""
    with pytest.raises(ValueError) as error:
        hf.read(directory)
    text = str(error.value)
    assert all(x in text for x in said) and "\n" not in text and len(text) < 500, text


def edit(directory, name, **fields):
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---- arrays ----


def test_a_bert_written_by_hand_is_read(bert):
    """The values at their places, by the names of transformers."""
    loaded, arrays = hf.read(bert), bert_arrays()
    net = loaded.parts["objective.net"]
    assert (net.encoder.width, net.encoder.depth, net.encoder.form.epsilon) == (WIDTH, 2, 1e-12)
    assert net.encoder.vocabulary == Vocabulary(WORDS)
    np.testing.assert_array_equal(loaded.params["head"]["bias"][:WORDS], arrays[BIAS])
    qkv = loaded.params["encoder"]["transformer"]["blocks"]["attention"]["qkv"]["kernel"]
    np.testing.assert_array_equal(qkv[1, :, 0].reshape(WIDTH, WIDTH), arrays[f"{QUERY}.weight"].T)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_every_floating_type_is_read(dtype, tmp_path):
    arrays = {name: x.astype(dtype) for name, x in bert_arrays().items()}
    loaded = hf.read(write(tmp_path / "bert", arrays=arrays))
    table = loaded.params["encoder"]["word"]["table"][:WORDS]
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, arrays[WORD].astype(np.float32))


def spoiled(value, dtype=np.float32):
    array = np.ones((WIDTH, WIDTH), dtype)
    array[2, 3] = value
    return {f"{QUERY}.weight": array}


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (spoiled(np.nan), "1 values of 64 that are NaN or infinite"),
        (spoiled(-np.inf, np.float16), "1 values of 64 that are NaN or infinite"),
        (spoiled(1e300, np.float64), "1 values of 64 that are NaN or infinite"),  # in float32
        (spoiled(100, np.int8), "is of type I8"),
        (spoiled(1, np.int64), "is of type I64"),
        (spoiled(1, np.bool_), "is of type BOOL"),
        (spoiled(1, ml_dtypes.float8_e4m3fn), "is of type F8_E4M3"),
        ({f"{QUERY}.weight": np.ones((4, WIDTH), np.float32)}, "shapes [4, 8] and [8, 8]"),
        ({f"{QUERY}.weight": ...}, f"lacks {QUERY}.weight"),
    ],
)
def test_an_array_that_is_no_weight_is_named(arrays, said, tmp_path):
    try:
        directory = write(tmp_path / "bert", arrays=arrays)
    except KeyError:
        pytest.skip("this safetensors writes no such type")
    refused(directory, "attention.self.", said)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({TIED: np.ones(WORDS, np.float32)}, (BIAS, TIED, "differ")),
        ({TIED: np.ones(3, np.float32)}, (BIAS, TIED, "differ")),
        ({"cls.predictions.decoder.weight": np.ones((WORDS, WIDTH), np.float32)}, (WORD, "differ")),
        ({"bert.embeddings.LayerNorm.gamma": np.zeros(WIDTH, np.float32)}, ("gamma", "differ")),
        ({"embeddings.LayerNorm.bias": np.zeros(WIDTH, np.float32)}, ("differ",)),
        ({BIAS: np.ones(WORDS + 1, np.float32)}, (BIAS, "[12]", "v=11")),
        ({"bert.embeddings.LayerNorm.bias": np.array(1, np.float32)}, ("LayerNorm.bias", "[]")),
        ({"bert.encoder.more": np.ones(1, np.float32)}, ("has bert.encoder.more, unknown",)),
        ({"x\n\x1b[2J": np.ones(1, np.float32)}, (r"has 'x\n\x1b[2J', unknown",)),
        ({"x" * 10_000: np.ones(1, np.float32)}, ("has xxx",)),
    ],
)
def test_no_array_is_dropped_though_it_differs(arrays, said, tmp_path):
    refused(write(tmp_path / "bert", arrays=arrays), *said)


def test_a_bias_under_its_other_name_is_the_bias(tmp_path):
    bias = bert_arrays()[BIAS]
    for name, arrays in {"both": {TIED: bias}, "alone": {TIED: bias, BIAS: ...}}.items():
        loaded = hf.read(write(tmp_path / name, arrays=arrays))
        np.testing.assert_array_equal(loaded.params["head"]["bias"][:WORDS], bias)


def test_what_is_not_used_is_named(tmp_path, caplog):
    more = {"bert.pooler.dense.bias": np.ones(WIDTH, np.float32)}
    more["bert.embeddings.position_ids"] = np.arange(PLACES)[None]
    fields = {"sparse": 2, "chunked": False, "id2label": {"0": "a"}, "bos_token_id": 9}
    directory = write(tmp_path / "bert", fields, more)
    save_file({"x": np.ones(1, np.float32)}, directory / "adapter_model.safetensors")
    with caplog.at_level(logging.WARNING, "sslx"):
        hf.read(directory)
    said = [record.getMessage().removeprefix(f"{directory}") for record in caplog.records]
    assert said == [
        ": adapter_model.safetensors not used",
        "/config.json: sparse=2 not used",
        f"/config.json says bos_token_id=9, and {directory}/tokenizer.json has [CLS] at 2, which "
        "is used",
        ": bert.pooler.dense.bias not used",
    ]


# ---- channels ----


def test_a_color_model_is_not_imported_into_a_gray_recipe(mae, tmp_path):
    from sslx.importing import import_checkpoint

    side = json.loads((mae / "config.json").read_text())["image_size"]
    said = f"the model of {mae} reads pictures of num_channels=3, and those of the recipe have 1"
    with pytest.raises(ValueError, match=said):
        import_checkpoint(mae, tmp_path / "run", TINY, ("mae=True", f"size={side}"))
    assert not (tmp_path / "run").exists()


# ---- shards ----


def shards(directory, **changes):
    """The arrays in two shards by their index; `changes` are to weight_map."""
    arrays = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(arrays))}
    for file in set(places.values()):
        held = {name: x for name, x in arrays.items() if places[name] == file}
        save_file(held, directory / file)
    index = {"metadata": {}, "weight_map": places | changes}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return places


def test_shards_are_read(bert):
    shards(bert)
    np.testing.assert_array_equal(hf.read(bert).params["head"]["bias"][:WORDS], bert_arrays()[BIAS])


def test_an_array_in_two_shards_is_refused(bert):
    places = shards(bert)
    other = next(x for x in sorted(set(places.values())) if x != places[BIAS])
    held = load_file(bert / other)
    save_file(held | {BIAS: np.zeros(WORDS, np.float32)}, bert / other)
    refused(bert, other, BIAS, f"places in {places[BIAS]}")


def test_shards_that_are_not_what_the_index_says(bert):
    places = shards(bert, more="model-0.safetensors")
    refused(bert, "index.json names more, and its shards lack them")
    (bert / places[BIAS]).unlink()
    refused(bert, places[BIAS], "is missing: download it again")


@pytest.mark.parametrize(
    "place", ["../model.safetensors", "/etc/hosts", "a/b", "..", "", 3, None, ["x"], "x\0y"]
)
def test_an_index_does_not_leave_the_directory(bert, place):
    shutil.copy(bert / "model.safetensors", bert.parent)
    shards(bert, more=place)
    refused(bert, "is missing" if place == "x\0y" else "index.json places more in")


@pytest.mark.parametrize("index", [{}, [], {"weight_map": []}, {"weight_map": {}}, None, "x"])
def test_an_index_without_a_map(bert, index):
    (bert / "model.safetensors").unlink()
    (bert / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(bert, "model.safetensors.index.json")


def test_one_file_is_read_before_shards_as_in_transformers(bert, caplog):
    arrays = load_file(bert / "model.safetensors")
    shards(bert)
    save_file(arrays | {BIAS: np.full(WORDS, 7, np.float32)}, bert / "model.safetensors")
    with caplog.at_level(logging.WARNING, "sslx"):
        assert (hf.read(bert).params["head"]["bias"][:WORDS] == 7).all()
    assert "model-0.safetensors, model-1.safetensors, model.safetensors.index.json" in caplog.text


# ---- config.json and tokenizer.json ----


FIELDS = [
    *(("hidden_size", x) for x in (0, -1, 10**12, "8", 8.0, True, None, [8])),
    *(("num_hidden_layers", x) for x in (0, 10**12, 10**30, None)),
    *(("num_attention_heads", x) for x in (0, 10**12, None)),
    *((f"{x}", 10**12) for x in ("vocab_size", "max_position_embeddings", "type_vocab_size")),
    ("intermediate_size", 0),
    *(("layer_norm_eps", x) for x in (-1.0, "x", None, float("nan"), 1e999)),
    *(("hidden_dropout_prob", x) for x in (1.0, -0.1, "x")),
    *(("pad_token_id", x) for x in (10**12, -1, "x", 1.5)),
    ("mask_token_id", 5),
    ("pad_token_id", 5),
    ("initializer_range", "x"),
    ("quantization_config", {"load_in_8bit": True}),
    ("pruned_heads", {"0": [1]}),
    ("add_cross_attention", True),
    ("model_type", 3),
    ("model_type", ["bert"]),
]


@pytest.mark.parametrize(("name", "value"), FIELDS, ids=str)
def test_fields_are_checked_before_anything_of_their_size_is_made(bert, name, value):
    edit(bert, "config.json", **{name: value})
    refused(bert, str(bert / "config.json"), name)


MAE_FIELDS = [
    *(("mask_ratio", x) for x in (2, 0, 1.0, -0.5, "0.75", None, True)),
    *(("norm_pix_loss", x) for x in (1, "true", None)),
    *(("image_size", x) for x in (None, 0, 10**12, "4", [], [4, 4, 4], [4, None])),
    *(("patch_size", x) for x in (None, 0, 10**12)),
    *(("num_channels", x) for x in (None, 0, 10**12)),
    *(("decoder_num_hidden_layers", x) for x in (0, 10**12)),
]


@pytest.mark.parametrize(("name", "value"), MAE_FIELDS, ids=str)
def test_fields_of_vit_mae_are_checked(mae, name, value):
    edit(mae, "config.json", **{name: value})
    refused(mae, str(mae / "config.json"), name)


def test_dropout_that_a_vit_does_not_have_is_named(mae, caplog):
    edit(mae, "config.json", hidden_dropout_prob=0.1)
    with caplog.at_level(logging.WARNING, "sslx"):
        hf.read(mae)
    assert [r.getMessage() for r in caplog.records] == [
        f"{mae}/config.json: hidden_dropout_prob=0.1 not used"
    ]


TEXTS = [b"", b"[]", b"null", b'"x"', b"{", b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}"]
TEXTS += [b"\xff\xfe{\0}\0", b'{"a": "caf\xe9"}', b"version https://git-lfs.github.com/spec/v1\n"]


@pytest.mark.parametrize("text", TEXTS, ids=lambda x: x[:9])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_files_that_are_no_object(bert, name, text):
    (bert / name).write_bytes(text)
    refused(bert, str(bert / name))


def test_a_byte_order_mark_is_read(bert):
    for name in ("config.json", "tokenizer.json"):
        (bert / name).write_bytes(b"\xef\xbb\xbf" + (bert / name).read_bytes())
    assert hf.read(bert).parts["data.decode.vocabulary"] == Vocabulary(WORDS)


def added(word, at):
    kept = [token for token in TOKENIZER["added_tokens"] if token["content"] != word]
    return {"added_tokens": [*kept, {"content": word, "id": at}]}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"added_tokens": None}, "added_tokens=None"),
        ({"added_tokens": [3]}, "3 in added_tokens"),
        ({"added_tokens": [{"id": 3}]}, "in added_tokens"),
        ({"model": None}, "model.vocab=None"),
        ({"model": {"vocab": {"a": "b"}}}, "an id 'b'"),
        (added("[MASK]", None), "an id None"),
        (added("[MASK]", -1), "an id -1"),
        (added("[MASK]", 11), "ids up to 11 and"),
        (added("[MASK]", 10**6), "vocab_size=11"),
        (added("[MASK]", 0), "one id to several special words"),
        ({"model": {"vocab": {"w": 11}}}, "ids up to 11 and"),
        ({"model": {"vocab": [["w", 0.0]] * 12}}, "ids up to 11 and"),
        ({"added_tokens": []}, "has no [PAD], [UNK], [CLS], [SEP] and 1 more"),
        (added("[PAD]", 7), "says pad_token_id=0, and"),
    ],
)
def test_tokenizers_that_do_not_fit(bert, fields, said):
    edit(bert, "tokenizer.json", **fields)
    refused(bert, str(bert / "tokenizer.json"), said)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ((0, 1, 2, 3, 11), "vocab_size=11"),
        ((0, 1, 2, 3, 3), "one id to several special words"),
        ((0, 1, 2, 3, None), "a vocabulary of 11 is neither BERT's nor RoBERTa's"),
    ],
)
def test_ids_of_a_config_without_a_tokenizer(ids, said, tmp_path):
    names = ("pad", "unk", "bos", "eos", "mask")
    config = {f"{name}_token_id": at for name, at in zip(names, ids, strict=True)}
    refused(write(tmp_path / "bert", config, tokenizer=None), said)


# ---- files of 2019 ----


def test_files_of_2019_are_read(tmp_path, caplog):
    """Google's config, TensorFlow's names of norms, and a list of words in place of a tokenizer."""
    old, names = {}, {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
    for name, x in bert_arrays().items():
        renamed = name
        for new, before in names.items():
            renamed = renamed.replace(new, before)
        old |= {name: ..., renamed: x}
    old["bert.embeddings.position_ids"] = np.arange(PLACES)[None]
    directory = write(tmp_path / "bert", {"model_type": ...}, old, tokenizer=None)
    words = ["[PAD]", "a", "b", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "猫", "d", "e", "f"]
    (directory / "vocab.txt").write_text("\r\n".join(words) + "\r\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING, "sslx"):
        loaded = hf.read(directory)
    assert "has no model_type: read as bert" in caplog.text
    assert loaded.parts["data.decode.vocabulary"] == Vocabulary(WORDS, 0, 3, 4, 5, 6)
    assert loaded.parts["objective.net"].encoder.form.epsilon == 1e-12
    scale = loaded.params["encoder"]["norm"]["scale"]
    np.testing.assert_array_equal(scale, bert_arrays()["bert.embeddings.LayerNorm.weight"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"caf\xe9\n", "vocab.txt is not UTF-8"),
        (b"", "vocab.txt has no [PAD]"),
        ("\n".join([*SPECIAL, *"abcdefg"]).encode(), "vocab.txt has ids up to 11 and"),
    ],
)
def test_lists_of_words_that_do_not_fit(text, said, tmp_path):
    directory = write(tmp_path / "bert", tokenizer=None)
    (directory / "vocab.txt").write_bytes(text)
    refused(directory, said)


def test_a_config_of_something_else_without_a_type(bert):
    (bert / "config.json").write_text("{}")
    refused(bert, "model_type=None, but only vit_mae")
