"""Masked language modeling: parity with transformers, masks, isolation, checkpoints both ways."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from sslx.export import hf
from sslx.models.text import BERT_FORM, ROBERTA_FORM, MaskedLM, TextEncoder
from sslx.objectives.mlm import MLM
from sslx.ops.losses import masked_cross_entropy
from sslx.vocabulary import Vocabulary

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
    hf.save_text(objective, params, tmp_path / "a")
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
        "logits": difference(our_logits[real], logits[real]),
        "loss": difference(our_loss, loss),
    }
    # Their gradients as our tree: saved in place of the weights, and loaded.
    for p in model.parameters():
        p.data = p.grad.clone()
    model.save_pretrained(tmp_path / "b")
    flat = flatten_dict(hf.load_text(tmp_path / "b")[1], sep="/")
    assert len(flat) == len(jax.tree.leaves(params)) and all(g.any() for g in flat.values())
    for path, grad in flatten_dict(grads, sep="/").items():
        worst[path] = difference(grad, flat[path])
    at = max(worst, key=worst.get)
    print(f"{name}: logits {worst['logits']:.1e}, at most {worst[at]:.1e}, {at}")
    assert worst[at] < 1e-4, at
