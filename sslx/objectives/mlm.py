"""Masked language modeling."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from sslx.models.encoder import Encoder, encoder
from sslx.models.text import MaskedLM
from sslx.objectives.base import Objective, apply
from sslx.ops import masks
from sslx.ops.losses import masked_cross_entropy
from sslx.types import Array, Batch, Buffers, Metrics, Params
from sslx.vocabulary import Continuations, Vocabulary


@dataclass(frozen=True)
class Masking:
    """Which tokens of a window are predicted, and what stands in their place; BERT's by default.

    Special tokens and padding are never chosen; their number counts for the share all the same, as
    in both published codes.

    share  of the tokens of a window
    most   predictions of a window, which all windows have room for: BERT's 20 of 128
    count  BERT rounds the share, RoBERTa rounds it up or down at random
    swaps  random tokens are of the whole vocabulary (BERT) or none of the special ones (RoBERTa)
    unit   what is chosen whole: tokens; words (BERT's whole-word masking); spans of words, which
           share their fate (SpanBERT, arXiv:1907.10529)
    words  which ids continue a word, for words and spans; a span without it is one of tokens
    """

    share: float = 0.15
    most: int = 20
    count: Literal["rounded", "random"] = "rounded"
    swaps: Literal["all", "ordinary"] = "all"
    unit: Literal["tokens", "words", "spans"] = "tokens"
    words: Continuations | None = None

    def __post_init__(self):
        if not 0 < self.share < 1 or self.most < 1:
            raise ValueError(f"{self}: share is between 0 and 1, and most counts from 1.")
        choices = {"count": ("rounded", "random"), "swaps": ("all", "ordinary")}
        for name, allowed in {**choices, "unit": ("tokens", "words", "spans")}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {allowed}.")
        if self.unit == "words" and self.words is None:
            raise ValueError(
                "unit='words' needs to know which ids continue a word: give "
                "words=Continuations.read(DIR/tokenizer.json)."
            )

    def __call__(
        self,
        key: Array,
        tokens: Int[Array, "B L"],
        segments: Int[Array, "B L"],
        vocabulary: Vocabulary,
    ) -> tuple[Int[Array, "B L"], Int[Array, "B M"], Float[Array, "B M"]]:
        """(tokens with some replaced, the places to predict, 1 or 0 where there is no more)."""
        keys = jax.random.split(key, 4)
        special = (tokens[..., None] == jnp.array(vocabulary.special)).any(-1)
        allowed = ~special & (segments > 0)
        chosen = self.choose(
            keys[0], allowed, self.counted(keys[1], segments), tokens, vocabulary.size
        )
        without = () if self.swaps == "all" else vocabulary.special
        others = masks.any_word(keys[2], tokens.shape, vocabulary.size, without)
        masked = masks.replaced(keys[3], tokens, chosen, vocabulary.mask, others)
        return masked, *masks.places(chosen[0], self.most)

    def counted(self, key: Array, segments: Int[Array, "B L"]) -> Int[Array, "B"]:
        """The number of tokens chosen in each window."""
        length = (segments > 0).sum(1)
        if self.count == "rounded":
            return masks.rounded(length, self.share, self.most, segments.shape[1])
        return masks.rounded_at_random(key, length, self.share, self.most)

    def choose(
        self,
        key: Array,
        allowed: Bool[Array, "B L"],
        count: Int[Array, "B"],
        tokens: Int[Array, "B L"],
        size: int,
    ) -> masks.Chosen:
        """`size` is the vocabulary's."""
        if self.unit == "tokens":
            return masks.each(key, allowed, count)
        # A word also begins behind what may not be chosen: the start of a window or a document.
        starts = ~jnp.pad(allowed, ((0, 0), (1, 0)))[:, :-1]
        if self.words is None:
            starts = jnp.ones_like(starts)
        else:
            starts = starts | ~jnp.asarray(self.words.table(size))[tokens]
        if self.unit == "words":
            return masks.whole_words(key, allowed, count, starts)
        return masks.spans(key, allowed, count, starts, self.most)


@dataclass(frozen=True)
class MLM(Objective):
    """Predict words of a text that are hidden from it (arXiv:1810.04805, arXiv:1907.11692).

    batch    tokens, segments [B, L]: 0 where padded, else the number of the token's document
    buffers  none

    Without the prediction of next sentences, as RoBERTa. The loss is the mean over all tokens that
    were hidden in the batch, so windows do not count alike; `epsilon` is added to their number,
    in each micro-batch where there are several.
    """

    net: MaskedLM
    masking: Masking = Masking()
    epsilon: float = 1e-5  # google-research/bert, `run_pretraining.py`; RoBERTa has none

    def init(self, key: Array, batch: Batch) -> tuple[Params, Buffers]:
        tokens = batch["tokens"]
        return self.net.init(key, tokens, batch["segments"], tokens[:, :1])["params"], {}

    def loss(
        self, params: Params, buffers: Buffers, batch: Batch, key: Array, step: Array
    ) -> tuple[Array, tuple[Buffers, Metrics]]:
        tokens, segments = batch["tokens"], batch["segments"]
        mask, dropout = jax.random.split(key)
        masked, places, weight = self.mask(mask, tokens, segments)
        rngs = {"dropout": dropout}
        logits, _ = apply(self.net, params, {}, masked, segments, places, rngs=rngs)  # [B, M, V]
        target = jnp.take_along_axis(tokens, places, 1)
        loss = masked_cross_entropy(logits, target, weight, self.epsilon)
        right, targets = (weight * (logits.argmax(-1) == target)).sum(), weight.sum()
        accuracy = right / jnp.maximum(targets, 1)
        return loss, (buffers, {"accuracy": accuracy, "weight": targets})

    def mask(self, key: Array, tokens: Int[Array, "B L"], segments: Int[Array, "B L"]):
        """(masked tokens [B, L], places [B, M], weight [B, M])."""
        return self.masking(key, tokens, segments, self.net.encoder.vocabulary)

    def encoders(self, params: Params, buffers: Buffers) -> dict[str, Encoder]:
        return {"encoder": encoder(self.net.encoder, {"params": params["encoder"]})}
