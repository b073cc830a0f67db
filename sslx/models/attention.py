"""Softmax attention (arXiv:1706.03762) in several forms, and which of them is used where.

All compute the same of `qkv` [B, N, 3, heads, d], with `segments` [B, N] a token's of its own
segment alone; softmax and sums are float32.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from sslx.chips import chip_of
from sslx.sharding import spec
from sslx.types import Array

# Attention scores that a CPU has in its cache at a time: 2 MB of float32.
CACHED = 2**19

# TPUs for which splash compiles, and the fewest tokens that it is used for. It was never timed on
# one: these are millions of cycles, by the compiler, of attention and its gradient on a v5e, 4,096
# tokens in 16 heads of 64; splash without its kernels, .23, .46 and .92 at the chip's peak:
#
#     tokens   plain   splash   temporary
#        256     1.7      1.5    93, 21 MB
#        512     4.2      1.5   269, 21 MB
#      1,024     8.6      2.0   537, 22 MB
SPLASH, LONG = ("v4", "v5e", "v5p", "v6e", "tpu7x"), 512

_heard: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("heard", default=None)


def attention(
    qkv: Float[Array, "B N 3 heads d"],
    segments: Int[Array, "B N"] | None = None,
    drop: Callable[[Array], Array] | None = None,
) -> Float[Array, "B N heads d"]:
    """Softmax attention in the form that is best where what is traced now will run.

    drop  dropout of attention's shares; None is without
    """
    form, why = attention_for(qkv.shape, qkv.dtype, drop is not None)
    lines, (_, tokens, _, heads, width) = _heard.get(), qkv.shape
    line = f"attention of {tokens} tokens, {heads} heads of {width}, {qkv.dtype}: {why}"
    if lines is not None and line not in lines:
        lines.append(line)
    return form(qkv, segments, drop=drop) if drop else form(qkv, segments)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """A list of what `attention` chooses for programs traced meanwhile, and why, each once."""
    lines: list[str] = []
    token = _heard.set(lines)
    try:
        yield lines
    finally:
        _heard.reset(token)


def attention_for(
    shape: Sequence[int], dtype: DTypeLike, dropout: bool
) -> tuple[Callable[..., Array], str]:
    """The form of attention for `qkv` of this shape and dtype, and in words which and why."""
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    kind = device.device_kind if device else jax.local_devices()[0].device_kind
    platform = device.platform if device else jax.default_backend()
    (_, tokens, _, _, width), half = shape, jnp.dtype(dtype).itemsize == 2
    if dropout:
        return dropped, "plain, for no kernel drops its weights"
    if platform == "cpu":
        if mesh.size > 1:
            return fused, "plain, as on several CPU devices"
        return cached, "plain, a few examples at a time"
    if not half:
        return fused, "plain, for kernels are of half precision"
    if platform == "gpu":
        if not cudnn_runs(kind, width):
            return fused, f"plain, for cuDNN has none for {kind} and heads of {width}"
        return flash, "cuDNN's flash attention"
    if chip_of(kind) not in SPLASH:
        return fused, f"plain, as on {kind}"
    if tokens < LONG:
        return fused, f"plain, as below {LONG} tokens on a TPU"
    return splash, "splash attention"


def cudnn_runs(kind: str, width: int) -> bool:
    """Whether cuDNN has flash attention for these GPUs, NVIDIA's from Ampere on, and this head."""
    here = jax.local_devices()[0]  # for others than these nothing is known
    capability = here.compute_capability if here.device_kind == kind else "8.0"
    ampere = capability[0].isdigit() and float(capability) >= 8  # AMD's are such as gfx942
    return ampere and width % 8 == 0 and width <= 128


def same(segments: Int[Array, "B N"]) -> Bool[Array, "B 1 N N"]:
    """Which tokens attend to which: those of one segment; padding attends to padding."""
    return (segments[:, :, None] == segments[:, None, :])[:, None]


def flash(
    qkv: Float[Array, "B N 3 heads d"], segments: Int[Array, "B N"] | None = None
) -> Float[Array, "B N heads d"]:
    """cuDNN's attention, without scores in memory; for half precision and even lengths."""
    tokens = qkv.shape[1]
    odd = tokens % 2
    qkv = jnp.pad(qkv, ((0, 0), (0, odd), (0, 0), (0, 0), (0, 0)))
    q, k, v = (qkv[:, :, i] for i in range(3))
    if segments is None:
        n = jnp.full(len(qkv), tokens, jnp.int32)
        seen = {"query_seq_lengths": n, "key_value_seq_lengths": n}
    else:
        seen = {"mask": same(jnp.pad(segments, ((0, 0), (0, odd)), constant_values=-1))}
    out = jax.nn.dot_product_attention(q, k, v, **seen, implementation="cudnn")
    return out[:, :tokens]


def splash(
    qkv: Float[Array, "B N 3 heads d"],
    segments: Int[Array, "B N"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B N heads d"]:
    """jax's splash attention (Pallas), without scores in memory; each device its own examples and
    heads, for the compiler cuts no kernel.

    Tokens are padded to blocks, in a segment of their own.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas  # no one else pays

    tokens = qkv.shape[1]
    block = min((512, 384, 256), key=lambda n: -(-tokens // n) * n)
    padded = -(-tokens // block) * block
    if segments is None and padded > tokens:
        segments = jnp.zeros(qkv.shape[:2], jnp.int32)
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, padded - tokens)), constant_values=-1)
    sizes = pallas.BlockSizes(*[block] * 6, use_fused_bwd_kernel=True)

    def attend(qkv, segments):
        qkv = jnp.pad(qkv, ((0, 0), (0, padded - tokens), (0, 0), (0, 0), (0, 0)))
        q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2))  # [B, heads, N, d]
        kernel = pallas.make_splash_mha_single_device(
            pallas.MultiHeadMask([pallas.FullMask((padded, padded))] * q.shape[1]),
            block_sizes=sizes,
            residual_checkpoint_name="attention",  # which remat keeps
            interpret=interpret,
        )
        ids = None if segments is None else pallas.SegmentIds(segments, segments)
        out = jax.vmap(kernel)(q * q.shape[-1] ** -0.5, k, v, ids)
        return jnp.moveaxis(out, 1, 2)[:, :tokens]

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(qkv, segments)
    axes = spec(("batch", None, None, "heads", None), qkv.shape, mesh)
    given = (axes, None if segments is None else P(axes[0]))
    out = P(axes[0], None, axes[3])
    return jax.shard_map(attend, in_specs=given, out_specs=out, check_vma=False)(qkv, segments)


def fused(
    qkv: Float[Array, "B N 3 heads d"], segments: Int[Array, "B N"] | None = None
) -> Float[Array, "B N heads d"]:
    """Softmax attention, left to XLA and its libraries."""
    mask = None if segments is None else same(segments)
    return jax.nn.dot_product_attention(*(qkv[:, :, i] for i in range(3)), mask=mask)


def dropped(
    qkv: Float[Array, "B N 3 heads d"],
    segments: Int[Array, "B N"] | None = None,
    *,
    drop: Callable[[Array], Array],
) -> Float[Array, "B N heads d"]:
    """Softmax attention with dropout of its weights, as BERT trains."""
    q, k, v = (qkv[:, :, i] for i in range(3))
    float32 = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k, **float32)
    if segments is not None:
        scores = jnp.where(same(segments), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", drop(jax.nn.softmax(scores).astype(v.dtype)), v)


def cached(
    qkv: Float[Array, "B N 3 heads d"], segments: Int[Array, "B N"] | None = None
) -> Float[Array, "B N heads d"]:
    """Softmax attention of a few examples at a time, recomputed in the backward pass.

    The scores of a whole batch go through memory many times, those of a few examples stay in the
    CPU's cache.
    """
    examples, tokens, _, heads, width = qkv.shape

    def attend(part):
        qkv, segments = part
        q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2)).reshape(3, -1, tokens, width)
        float32 = {"preferred_element_type": jnp.float32}  # h: every head of every example
        scores = jnp.einsum("hqd,hkd->hqk", q * width**-0.5, k, **float32)
        if segments is not None:
            seen = jnp.repeat(same(segments)[:, 0], heads, 0)  # [h, N, N]
            scores = jnp.where(seen, scores, -jnp.inf)
        share = jax.nn.softmax(scores).astype(v.dtype)
        out = jnp.einsum("hqk,hkd->hqd", share, v)
        return out.reshape(-1, heads, tokens, width).swapaxes(1, 2)

    most = max(1, CACHED // (heads * tokens**2))
    few = max(n for n in range(1, most + 1) if examples % n == 0)
    parts = jax.tree.map(lambda x: x.reshape(-1, few, *x.shape[1:]), (qkv, segments))
    return jax.lax.map(jax.checkpoint(attend), parts).reshape(examples, tokens, heads, width)
