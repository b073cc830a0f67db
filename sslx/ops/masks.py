"""Which tokens are seen: drawn inside the loss, with static shapes."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from sslx.types import Array


def kept(tokens: int, ratio: float) -> int:
    """How many of `tokens` stay visible when the share `ratio` is masked: FAIR's expression, in
    floating point, so that 100 tokens at .9 keep 9."""
    keep = int(tokens * (1 - ratio))
    if not 0 < keep < tokens:
        raise ValueError(
            f"Masking {ratio:.0%} of {tokens} patches leaves {keep} visible and "
            f"{tokens - keep} to predict, and both are needed: use a smaller patch, a larger "
            f"image or another ratio."
        )
    return keep


def shuffle(key: Array, examples: int, tokens: int) -> Int[Array, "B N"]:
    """An independent random order of the tokens for every example: the sort of uniform noise."""
    return jnp.argsort(jax.random.uniform(key, (examples, tokens)), axis=1)


# ---- text ----
#
# `allowed` are tokens that may be chosen, `count` how many of an example are. What is chosen comes
# with a group: the place whose fate a token shares, its own or that of its span's anchor.

Chosen = tuple[Bool[Array, "B L"], Int[Array, "B L"]]


def rounded(length: Int[Array, "B"], share: float, most: int, longest: int) -> Int[Array, "B"]:
    """How many of `length` tokens BERT masks: at least one, and at most `most`.

    Google's expression (`create_pretraining_data.py`), in Python's float64 for every length.
    """
    table = [min(most, max(1, round(n * share))) for n in range(longest + 1)]
    return jnp.asarray(table, jnp.int32)[length]


def rounded_at_random(
    key: Array, length: Int[Array, "B"], share: float, most: int
) -> Int[Array, "B"]:
    """RoBERTa's count: `share * length` on average (fairseq, `mask_tokens_dataset.py`)."""
    count = share * length + jax.random.uniform(key, length.shape)
    return jnp.minimum(count.astype(jnp.int32), most)


def each(key: Array, allowed: Bool[Array, "B L"], count: Int[Array, "B"]) -> Chosen:
    """Tokens one by one, every set of them as likely."""
    noise = jnp.where(allowed, jax.random.uniform(key, allowed.shape), 2.0)
    rank = jnp.argsort(jnp.argsort(noise, 1), 1)
    return allowed & (rank < count[:, None]), own(allowed)


def whole_words(
    key: Array, allowed: Bool[Array, "B L"], count: Int[Array, "B"], starts: Bool[Array, "B L"]
) -> Chosen:
    """Words in random order, leaving out those that no longer fit: BERT's whole-word masking.

    A word goes from one of `starts` to the next.
    """
    word = jnp.maximum(jnp.cumsum(starts & allowed, 1) - 1, 0)  # [B, L], below L
    row = jnp.arange(len(allowed))[:, None]
    size = jnp.zeros(allowed.shape, jnp.int32).at[row, word].add(allowed)
    noise = jnp.where(size > 0, jax.random.uniform(key, allowed.shape), 2.0)
    order = jnp.argsort(noise, 1)

    def take(left, size):
        taken = (size > 0) & (size <= left)
        return left - size * taken, taken

    _, taken = jax.lax.scan(take, count, jnp.take_along_axis(size, order, 1).T)
    taken = jnp.take_along_axis(taken.T, jnp.argsort(order, 1), 1)  # [B, word]
    return allowed & jnp.take_along_axis(taken, word, 1), own(allowed)


def spans(
    key: Array,
    allowed: Bool[Array, "B L"],
    count: Int[Array, "B"],
    starts: Bool[Array, "B L"],
    most: int,
    p: float = 0.2,
    longest: int = 10,
) -> Chosen:
    """Spans of 1 to `longest` words, their number geometric of `p` (arXiv:1907.10529, section 3.1).

    Each begins with the word of a random token that is not yet masked, and ends where the count is
    reached or the run of allowed tokens does. `most` is the largest count.
    """
    keys, most = jax.random.split(key), min(most, allowed.shape[1])
    noise = jnp.where(allowed, jax.random.uniform(keys[0], allowed.shape), 2.0)
    anchors = jnp.argsort(noise, 1)[:, :most].T  # more are never used: each masks itself
    odds = np.log(p * (1 - p) ** np.arange(longest))  # of 1 word, 2 words ...
    words = 1 + jax.random.categorical(keys[1], jnp.asarray(odds, jnp.float32), shape=anchors.shape)
    word = jnp.cumsum(starts & allowed, 1)
    run = jnp.cumsum(~allowed, 1)  # a span does not cross what is not allowed

    def take(carry, span):
        chosen, group, left = carry
        anchor, n = (x[:, None] for x in span)
        first, here, free = (
            jnp.take_along_axis(x, anchor, 1) for x in (word, run, allowed & ~chosen)
        )
        inside = (word >= first) & (word < first + n) & (run == here) & allowed & ~chosen & free
        taken = inside & (jnp.cumsum(inside, 1) <= left[:, None])
        group = jnp.where(taken, anchor, group)
        return (chosen | taken, group, left - taken.sum(1)), None

    start = (jnp.zeros_like(allowed), own(allowed), count)
    (chosen, group, _), _ = jax.lax.scan(take, start, (anchors, words))
    return chosen, group


def own(allowed: Bool[Array, "B L"]) -> Int[Array, "B L"]:
    """Groups of one token each."""
    return jnp.broadcast_to(jnp.arange(allowed.shape[1]), allowed.shape)


def places(chosen: Bool[Array, "B L"], most: int) -> tuple[Int[Array, "B M"], Float[Array, "B M"]]:
    """The places of chosen tokens in order, filled up to `most`, and their weight: 1, filling 0."""
    positions = jnp.argsort(~chosen, 1, stable=True)[:, :most]
    return positions, jnp.take_along_axis(chosen, positions, 1).astype(jnp.float32)


def replaced(
    key: Array,
    tokens: Int[Array, "B L"],
    chosen: Chosen,
    mask: int,
    others: Int[Array, "B L"],
    shares: tuple[float, float] = (0.8, 0.1),
) -> Int[Array, "B L"]:
    """Chosen tokens replaced: a share by `mask`, another by `others`, the rest kept."""
    which, group = chosen
    fate = jnp.take_along_axis(jax.random.uniform(key, tokens.shape), group, 1)
    hidden, swapped = shares
    new = jnp.where(fate < hidden, mask, jnp.where(fate < hidden + swapped, others, tokens))
    return jnp.where(which, new, tokens)


def any_word(
    key: Array, shape: tuple[int, ...], size: int, without: tuple[int, ...] = ()
) -> Int[Array, "..."]:
    """Random ids below `size`, all as likely but those left out."""
    ids = jax.random.randint(key, shape, 0, size - len(without))
    for special in sorted(without):  # ids from here on are one further
        ids = ids + (ids >= special)
    return ids
