"""Every form of attention against NumPy in float64, forward and backward; which is used where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import mesh_of
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from sslx.models import attention as forms
from sslx.sharding import AXES


def softmax_attention(qkv, segments, slope):
    """(outputs, the gradient by qkv of their inner product with `slope`), in float64."""
    qkv, slope = qkv.astype(np.float64), np.swapaxes(slope.astype(np.float64), 1, 2)
    q, k, v = np.moveaxis(qkv, (2, 3), (0, 2))  # [B, heads, N, d]
    scale = q.shape[-1] ** -0.5
    scores = scale * q @ np.swapaxes(k, -1, -2)
    if segments is not None:
        scores[
            np.broadcast_to((segments[:, :, None] != segments[:, None])[:, None], scores.shape)
        ] = -np.inf
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    by_shares = slope @ np.swapaxes(v, -1, -2)
    by_scores = shares * (by_shares - (shares * by_shares).sum(-1, keepdims=True))
    by_qkv = np.stack(
        [
            scale * by_scores @ k,
            scale * np.swapaxes(by_scores, -1, -2) @ q,
            np.swapaxes(shares, -1, -2) @ slope,
        ]
    )
    return np.swapaxes(shares @ v, 1, 2), np.moveaxis(by_qkv, (0, 2), (2, 3))


def drawn(batch, tokens, heads, width):
    """qkv, the slope of what follows, and documents of odd lengths with padding behind."""
    r = np.random.default_rng(0)
    qkv = r.normal(size=(batch, tokens, 3, heads, width)).astype(np.float32)
    slope = r.normal(size=(batch, tokens, heads, width)).astype(np.float32)
    return qkv, slope, np.sort(r.integers(0, 4, (batch, tokens)), 1)[:, ::-1]


def both(form, qkv, segments, slope):
    """Outputs and gradient of a form of attention, under jit."""

    @jax.jit
    def run(qkv, slope):
        out, back = jax.vjp(lambda qkv: form(qkv, segments), qkv)
        return out, back(slope)[0]

    return run(qkv, slope)


whole = functools.partial(forms.dropped, drop=lambda x: x)
interpreted = functools.partial(forms.splash, interpret=True)


@pytest.mark.parametrize(
    ("form", "tokens"),
    [(forms.fused, 20), (forms.cached, 20), (whole, 20), (interpreted, 520)],
    ids=["fused", "cached", "dropped", "splash"],
)
def test_all_forms_are_softmax_attention(form, tokens):
    """splash as Pallas interprets it, in several blocks: of 520 tokens it makes 768."""
    qkv, slope, segments = drawn(2, tokens, 2, 24)
    found = both(form, qkv, jnp.asarray(segments), slope)
    for ours, exact in zip(found, softmax_attention(qkv, segments, slope), strict=True):
        np.testing.assert_allclose(ours, exact, atol=5e-5)


@pytest.mark.parametrize("form", [forms.fused, forms.cached, whole])
def test_without_documents_all_see_all(form):
    qkv, slope, _ = drawn(2, 20, 2, 24)
    exact, _ = softmax_attention(qkv, None, slope)
    np.testing.assert_allclose(jax.jit(form)(qkv), exact, atol=5e-5)


def test_splash_on_a_mesh():
    """Each device has its examples and, where tensor divides them, its heads."""
    qkv, slope, segments = drawn(4, 40, 4, 8)
    with jax.set_mesh(mesh_of(2, 2, 2)):
        found = both(interpreted, qkv, jnp.asarray(segments), slope)
        three = jax.jit(interpreted)(qkv[:, :, :, :3])
    for ours, right in zip(found, softmax_attention(qkv, segments, slope), strict=True):
        np.testing.assert_allclose(ours, right, atol=5e-5)
    exact, _ = softmax_attention(qkv[:, :, :, :3], None, slope[:, :, :3])
    np.testing.assert_allclose(three, exact, atol=5e-5)


V5E, H200 = ("TPU v5 lite", "tpu"), ("NVIDIA H200", "gpu")


@pytest.mark.parametrize(
    ("device", "tokens", "width", "dtype", "dropout", "form", "said"),
    [
        (V5E, 2048, 64, "bfloat16", False, forms.splash, "splash"),
        (V5E, 512, 64, "bfloat16", False, forms.splash, "splash"),
        (V5E, 197, 32, "bfloat16", False, forms.fused, "below 512"),
        (V5E, 2048, 64, "float32", False, forms.fused, "half precision"),
        (V5E, 512, 64, "bfloat16", True, forms.dropped, "drops"),
        (("TPU v6 lite", "tpu"), 1024, 80, "bfloat16", False, forms.splash, "splash"),
        (("TPU v5p", "tpu"), 1024, 128, "bfloat16", False, forms.splash, "splash"),
        (("TPU v3", "tpu"), 1024, 128, "bfloat16", False, forms.fused, "on TPU v3"),
        (H200, 50, 64, "bfloat16", False, forms.flash, "cuDNN"),
        (H200, 197, 32, "float16", False, forms.flash, "cuDNN"),
        (H200, 197, 32, "float32", False, forms.fused, "half precision"),
        (H200, 197, 20, "bfloat16", False, forms.fused, "heads of 20"),
        (H200, 197, 160, "bfloat16", False, forms.fused, "heads of 160"),
        (H200, 128, 64, "bfloat16", True, forms.dropped, "drops"),
        (("cpu", "cpu"), 2048, 64, "bfloat16", False, forms.fused, "several"),
    ],
)
def test_which_form_is_used_where(device, tokens, width, dtype, dropout, form, said):
    kind, platform = device
    of = AbstractDevice(kind, None, platform)
    mesh = AbstractMesh((1, 4, 1), AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=of)
    with use_abstract_mesh(mesh):
        found, why = forms.attention_for((8, tokens, 3, 2, width), dtype, dropout)
    assert found is form and said in why


def test_what_is_chosen_is_said():
    """Once for each shape, and to nobody who does not listen."""
    trace = lambda n: jax.eval_shape(forms.attention, jnp.zeros((2, n, 3, 2, 4)))  # noqa: E731
    trace(5)
    with forms.heard() as lines:
        for n in (6, 7, 6):
            trace(n)
    trace(8)
    way = "heads of 4, float32: plain, a few examples at a time"
    assert lines == [f"attention of {n} tokens, 2 {way}" for n in (6, 7)]
