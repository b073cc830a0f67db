"""How well a masked language model predicts held-out text, and its guesses for single words."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sslx.config import Eval, Trained
from sslx.evals.features import Labelled, batches
from sslx.objectives.mlm import MLM
from sslx.types import Array, Params


@dataclass(frozen=True)
class Perplexity(Eval):
    """Masked perplexity and accuracy on held-out windows, the same masks at every call.

    As the objective masks; what it swaps and leaves alone counts too. Beside them the numbers of
    the best guess that reads nothing: the words' frequencies among these very targets, known as no
    real unigram model knows them. At most `batches` are read.
    """

    data: Labelled
    batch_size: int = 64
    batches: int | None = None

    def check(self) -> None:
        self.data.check()

    def __call__(self, trained: Trained) -> Iterator[tuple[str, float]]:
        sharding, progress = trained.sharding, trained.progress
        run, sums = _sums(trained.objective, trained.views.eval, sharding), []
        counts = None  # of targets by id [V], all batches together
        stream = batches(self.data, self.batch_size, sharding, self.batches)
        with contextlib.closing(stream):
            for i, (batch, total) in enumerate(stream):
                with jax.transfer_guard("allow"):  # of a scalar
                    loss, right, more = run(trained.params, batch, np.int32(i))
                sums.append((loss, right))
                counts = more if counts is None else jax.block_until_ready(counts) + more
                progress("perplexity", i + 1, total)
        if not sums:
            raise ValueError("No windows to predict words of: the held-out pipeline is empty.")
        loss, right = np.sum(jax.device_get(sums), 0, dtype=np.float64)
        counts = np.asarray(jax.device_get(counts), np.float64)
        targets = counts.sum()
        if not targets:
            raise ValueError("No word of the held-out windows can be masked: all are special.")
        share = counts[counts > 0] / targets
        yield "mlm/loss", float(loss / targets)
        yield "mlm/perplexity", float(np.exp(loss / targets))
        yield "mlm/accuracy", float(right / targets)
        yield "unigram/perplexity", float(np.exp(-(share * np.log(share)).sum()))
        yield "unigram/accuracy", float(share.max())


@functools.lru_cache(maxsize=4)
def _sums(objective: MLM, view, sharding: NamedSharding | None):
    """The jitted (params, batch, i) -> sums over what is masked: loss, hits, targets by id [V]."""

    def sums(params: Params, batch, i: Array):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
        seen = view(keys[0], batch)
        tokens, segments = seen["tokens"], seen["segments"]
        masked, places, weight = objective.mask(keys[1], tokens, segments)
        weight = weight * batch["valid"][:, None]
        logits = objective.net.apply({"params": params}, masked, segments, places)
        target = jnp.take_along_axis(tokens, places, 1)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        counts = jnp.zeros(logits.shape[-1], jnp.int32).at[target].add(weight.astype(jnp.int32))
        return (weight * loss).sum(), (weight * (logits.argmax(-1) == target)).sum(), counts

    return jax.jit(sums, out_shardings=sharding and NamedSharding(sharding.mesh, P()))


@functools.lru_cache(maxsize=4)
def _likeliest(objective: MLM, count: int):
    """The jitted (params, tokens [L], segments [L], places [M]) -> probabilities and ids of the
    likeliest words, [M, count] each."""

    def likeliest(params: Params, tokens: Array, segments: Array, places: Array):
        batch = tokens[None], segments[None], places[None]
        return jax.lax.top_k(
            jax.nn.softmax(objective.net.apply({"params": params}, *batch)[0]), count
        )

    return jax.jit(likeliest)


def fill(
    objective: MLM, params: Params, tokenizer: Any, text: str, count: int = 5
) -> list[list[tuple[str, float]]]:
    """The `count` likeliest words and their probabilities for every mask token in `text`.

    `tokenizer` is one of Hugging Face's `tokenizers`. Raises ValueError where the text has no mask
    token, or is longer than the encoder's windows.
    """
    words = objective.net.encoder.vocabulary
    tokenizer = type(tokenizer).from_str(tokenizer.to_str())  # a copy; its settings are ours
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = False
    ids = [i for i in tokenizer.encode(text).ids if i not in (words.start, words.end)]
    tokens = np.array([words.start, *ids, words.end], np.int32)
    places = np.flatnonzero(tokens == words.mask)
    if not places.size:
        name = tokenizer.id_to_token(words.mask)
        raise ValueError(f"There is no {name} in {text!r}: write it where a word is missing.")
    blank = (0, max(0, objective.net.encoder.length - len(tokens)))  # one program for all texts
    window = np.pad(tokens, blank, constant_values=words.pad), np.pad(np.ones_like(tokens), blank)
    share, best = jax.device_get(_likeliest(objective, count)(params, *window, places))
    return [
        [(tokenizer.decode([i]).strip(), float(p)) for i, p in zip(*row, strict=True)]
        for row in zip(best.tolist(), share.tolist(), strict=True)
    ]
