"""Transformer encoders of text: BERT (arXiv:1810.04805), RoBERTa (arXiv:1907.11692), and pre-norm.

A batch has `tokens` int32 [B, L] and `segments` int32 [B, L]: 0 where padded, else the number of
the token's document within the window, from 1. Documents packed into one window do not see each
other; positions count through the window, as where BERT and RoBERTa are trained on packed windows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from sslx.models.encoder import Floor, Signature
from sslx.models.layers import Dense, Gelu, LayerNorm, Normal, Table, padded
from sslx.models.transformer import Form, Remat, Transformer
from sslx.sharding import constrain
from sslx.types import Array
from sslx.vocabulary import BERT, ROBERTA, Vocabulary

# width, depth; heads are width / 64: arXiv:1810.04805, section 3; arXiv:1908.08962; mu for tests.
VARIANTS = {
    "mu": (32, 2),
    "tiny": (128, 2),
    "mini": (256, 4),
    "small": (512, 4),
    "medium": (512, 8),
    "base": (768, 12),
    "large": (1024, 24),
}

# google-research/bert, `modeling.py`; transformers computes the same with gelu="erf".
BERT_FORM = Form(
    norm="post",
    epsilon=1e-12,
    gelu="tanh",
    dropout=0.1,
    attention_dropout=0.1,
    init=Normal(0.02, cut=2.0),
)
# fairseq, `models/roberta/model.py`
ROBERTA_FORM = Form(
    norm="post",
    epsilon=1e-5,
    gelu="erf",
    dropout=0.1,
    attention_dropout=0.1,
    init=Normal(0.02),
)


# Columns of word counts at most: 32 KiB a text.
COLUMNS = 8192


@dataclass(frozen=True)
class WordCounts:
    """How often each id below `size` occurs in a window, as shares of its tokens [B, columns].

    Beyond COLUMNS ids share columns (the hashing trick, arXiv:0902.2206).
    """

    size: int

    def __call__(self, tokens: Array, segments: Array) -> Float[Array, "B F"]:
        real, columns = segments > 0, min(self.size, COLUMNS)
        row = jnp.arange(len(tokens))[:, None]
        counts = jnp.zeros((len(tokens), columns)).at[row, tokens % columns].add(real)
        return counts / jnp.maximum(real.sum(1, keepdims=True), 1)


def unpadded(tokens: Array, segments: Array) -> Bool[Array, "B L"]:
    """Which tokens are no padding."""
    return segments > 0


class TextEncoder(nn.Module):
    """Token ids [B, L] -> tokens [B, L, D], each attending to its own segment.

    Without `segments` all that is no padding is one document. In training, `dropout` draws from the
    generator of that name: `apply(..., train=True, rngs={"dropout": key})`.
    """

    vocabulary: Vocabulary
    width: int
    depth: int
    heads: int
    length: int = 512  # rows of the position table that a window can use
    # Rows in front of those; the last of them is the padding's. RoBERTa's is 2, BERT pads like all.
    offset: int = 0
    types: int = 2  # rows of the table of token types
    mlp_ratio: float = 4.0
    form: Form = BERT_FORM
    dtype: DTypeLike = jnp.float32
    remat: Remat = "dots"

    @property
    def signature(self) -> Signature:
        """Padding is no content; compared with counts of words."""
        floor = Floor("word counts", WordCounts(self.vocabulary.size))
        return Signature(("tokens", "segments"), real=unpadded, floor=floor)

    def setup(self):
        form, rows = self.form, self.length + self.offset
        fields = {"init": form.init, "dtype": self.dtype}
        words = self.vocabulary.size
        spare = padded(words) - words
        self.word = Table(words, self.width, ("vocab", "embed"), spare, **fields)
        self.position = Table(rows, self.width, **fields)
        self.type = Table(self.types, self.width, **fields)
        self.norm = LayerNorm(form.epsilon, self.dtype)
        self.drop = nn.Dropout(form.dropout)
        stack = (self.depth, self.heads, self.mlp_ratio, self.dtype, self.remat)
        self.transformer = Transformer(*stack, form)

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        segments: Int[Array, "B L"] | None = None,
        train: bool = False,
        types: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B L D"]:
        """`types` are the token types, 0 where not given.

        Raises ValueError when a window is longer than the position table.
        """
        if segments is None:
            segments = (tokens != self.vocabulary.pad).astype(jnp.int32)
        return self.encode(self.embed(tokens, segments, types), segments, train)

    def embed(self, tokens: Array, segments: Array, types: Array | None) -> Float[Array, "B L D"]:
        """The sum of each token's vectors, before its norm."""
        length = tokens.shape[1]
        if length > self.length:
            raise ValueError(
                f"Windows of {length} tokens are longer than the encoder's table of {self.length} "
                f"positions: tokenize into shorter windows, or build it with length={length}."
            )
        place = jnp.arange(length)
        if self.offset:  # counted over what is no padding, wherever it stands
            real = segments > 0
            place = jnp.cumsum(real, 1) * real + self.offset - 1
        types = jnp.zeros_like(tokens) if types is None else types
        x = self.word(tokens) + self.position(place) + self.type(types)
        return constrain(x, "batch", None, None)

    def encode(self, x: Array, segments: Array, train: bool = False) -> Float[Array, "B L D"]:
        x = self.drop(self.norm(x), deterministic=not train)
        return self.transformer(x, segments, train)


class LMHead(nn.Module):
    """Tokens [..., D] -> float32 logits [..., V]: dense, GELU, norm, then `compare`, and a bias.

    `compare` gives the inner products with the encoder's own word vectors, -inf from V = `words`
    on, where both are padded.
    """

    words: int
    form: Form
    gelu: Gelu
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B D"], compare: Callable[[Array], Array]
    ) -> Float[Array, "*B V"]:
        form, width = self.form, x.shape[-1]
        x = Dense(width, ("embed", None), kernel_init=form.init, dtype=self.dtype, name="dense")(x)
        x = jax.nn.gelu(x, approximate=self.gelu == "tanh")
        x = LayerNorm(form.epsilon, self.dtype, name="norm")(x)
        named = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
        return compare(x) + self.param("bias", named, (padded(self.words),), jnp.float32)


class MaskedLM(nn.Module):
    """Token ids [B, L] and places [B, M] in them -> logits [B, M, V] of what stood there.

    Only the places asked for go through the head.
    """

    encoder: TextEncoder
    gelu: Gelu | None = None  # the head's, where it is not the encoder's

    def setup(self):
        of = self.encoder
        self.head = LMHead(of.vocabulary.size, of.form, self.gelu or of.form.gelu, of.dtype)

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        segments: Int[Array, "B L"] | None,
        places: Int[Array, "B M"],
        train: bool = False,
    ) -> Float[Array, "B M V"]:
        return self.logits(self.encoder(tokens, segments, train), places)

    def logits(self, x: Float[Array, "B L D"], places: Int[Array, "B M"]) -> Float[Array, "B M V"]:
        x = jnp.take_along_axis(x, places[..., None], 1)  # [B, M, D]
        return constrain(self.head(x, self.encoder.word.compare), "batch", None, "vocab")


def bert(
    variant: str = "base", vocabulary: Vocabulary = BERT, length: int = 512, **fields
) -> TextEncoder:
    """BERT as Google trains it, of the size `variant`, one of VARIANTS."""
    return TextEncoder(vocabulary, *shape(variant), length, **fields)


def roberta(
    variant: str = "base", vocabulary: Vocabulary = ROBERTA, length: int = 512, **fields
) -> TextEncoder:
    """RoBERTa as fairseq trains it, of the size `variant`, one of VARIANTS.

    The one token type, a vector that every token gets, is transformers'; fairseq has none.
    """
    fields = {"offset": vocabulary.pad + 1, "types": 1, "form": ROBERTA_FORM} | fields
    return TextEncoder(vocabulary, *shape(variant), length, **fields)


def shape(variant: str) -> tuple[int, int, int]:
    """Width, depth, heads."""
    if variant not in VARIANTS:
        raise ValueError(f"No BERT of variant {variant!r}: choose one of {', '.join(VARIANTS)}.")
    width, depth = VARIANTS[variant]
    return width, depth, max(width // 64, 2)
