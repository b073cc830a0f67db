"""Views are keyed by example, the same on any mesh, and never look beyond a picture's extent.

That their pixels are Pillow's is test_parity.py's.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import mesh_of, placed

from sslx import views
from sslx.views import CenterCrop, Chain, Flip, Normalize, RandomResizedCrop

B, SIZE = 16, 24
TRAIN = views.mae(8, scale=(0.2, 1.0), share=0.75)
KEY = jax.random.key(7)


def batch(padding: int = 0, seed: int = 0) -> dict:
    """Pictures of many shapes at the top left of 24 x 24 pixels, the rest `padding`."""
    r = np.random.default_rng(seed)
    extent = np.stack([r.integers(9, SIZE + 1, B), r.integers(9, SIZE + 1, B)], 1).astype(np.int32)
    image = r.integers(0, 256, (B, SIZE, SIZE, 3)).astype(np.uint8)
    row, column = np.ogrid[:SIZE, :SIZE]
    inside = (row < extent[:, :1, None]) & (column < extent[:, 1:, None])
    return {"image": np.where(inside[..., None], image, padding).astype(np.uint8), "extent": extent}


def seen(view, given: dict, key=KEY) -> np.ndarray:
    """The image that `view` makes, jitted as in a step."""
    return np.asarray(jax.jit(view)(key, given)["image"])


def alike(given: dict) -> dict:
    """Every example is the first one."""
    return {name: np.repeat(x[:1], B, 0) for name, x in given.items()}


@pytest.mark.parametrize("view", [TRAIN.train, TRAIN.eval, CenterCrop(8), RandomResizedCrop(8)])
def test_shape_dtype_and_what_is_passed_on(view):
    given = {**batch(), "label": np.arange(B, dtype=np.int32)}
    out = jax.jit(view)(KEY, given)
    assert out["image"].shape == (B, 8, 8, 3) and out["image"].dtype == jnp.float32
    assert out.keys() == {"image", "label"}  # the extent was of the uncropped picture
    assert np.array_equal(out["label"], given["label"])


@pytest.mark.parametrize("view", [RandomResizedCrop(8), Chain((CenterCrop(8), Flip()))])
def test_each_example_has_a_key_of_its_own(view):
    image = seen(view, alike(batch()))
    assert len(np.unique(image.reshape(B, -1), axis=0)) >= (2 if "Flip" in repr(view) else B // 2)
    assert np.array_equal(image, seen(view, alike(batch())))
    assert not np.array_equal(image, seen(view, alike(batch()), jax.random.key(8)))


def test_an_example_does_not_look_at_the_others():
    given, other = batch(), batch(seed=1)
    mixed = {name: np.concatenate([x[:1], other[name][1:]]) for name, x in given.items()}
    np.testing.assert_allclose(seen(TRAIN.train, mixed)[0], seen(TRAIN.train, given)[0], atol=1e-6)


def test_links_of_a_chain_draw_apart():
    """Two links of one kind, under one key, do different things."""
    first, second = (
        seen(Chain((*before, RandomResizedCrop(8))), alike(batch())) for before in ((), (Plain(),))
    )
    assert not np.allclose(first, second)


class Plain:
    """A view that changes nothing."""

    def __call__(self, key, batch):
        return batch


@pytest.mark.parametrize("view", [TRAIN.train, TRAIN.eval], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_same_on_any_mesh(view, shape):
    results = []
    for sizes in ((1, 1, 1), shape):
        mesh = mesh_of(*sizes)
        with jax.set_mesh(mesh):
            image = jax.jit(view)(KEY, placed(batch(), mesh))["image"]
        held = image.addressable_shards[0].data.shape[0]
        assert held == B // (sizes[0] * sizes[1])  # and cut, not gathered
        results.append(np.asarray(image))
    np.testing.assert_allclose(*results, atol=1e-6)


@pytest.mark.parametrize("view", [TRAIN.train, TRAIN.eval, CenterCrop(8), RandomResizedCrop(8)])
def test_nothing_is_read_from_the_padding(view):
    assert np.array_equal(seen(view, batch(padding=0)), seen(view, batch(padding=255)))


def test_crop_reads_the_whole_extent():
    """... and a change of any corner pixel of it shows in the largest crop."""
    whole = RandomResizedCrop(8, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    given = batch()
    given["extent"][:] = (20, 20)  # a square: the crop is all of it
    before = seen(whole, given)
    for row, column in ((0, 0), (0, 19), (19, 0), (19, 19)):
        changed = replace_pixel(given, row, column)
        differs = (seen(whole, changed) != before).any(-1)  # [B, 8, 8]
        assert differs[:, -(row > 0), -(column > 0)].all()
    assert np.array_equal(seen(whole, replace_pixel(given, 20, 3)), before)


def replace_pixel(given: dict, row: int, column: int) -> dict:
    image = given["image"].copy()
    image[:, row, column] = 255 - (image[:, row, column] > 127) * np.uint8(255)
    return {**given, "image": image}


def test_random_crops_cover_scale_and_place():
    """Through the view itself, on a picture whose pixels tell where they are from."""
    row, column = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    image = np.stack([row, column, 0 * row], -1)[None] * 10
    given = {"image": image.astype(np.uint8).repeat(512, 0), "extent": np.full((512, 2), SIZE)}
    given["extent"] = given["extent"].astype(np.int32)
    out = seen(RandomResizedCrop(8, scale=(0.25, 1.0)), given) * 25.5  # places of pixels read
    height, width = (np.ptp(out[..., i], axis=(1, 2)) * 8 / 7 for i in (0, 1))
    share, aspect = height * width / SIZE**2, width / height
    assert 0.2 < share.min() < 0.32 and 0.9 < share.max() < 1.1
    assert 0.5 < share.mean() < 0.65  # uniform, but for what does not fit
    assert 0.68 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.47
    center = out[..., :2].mean((1, 2))
    assert abs(center.mean() - (SIZE - 1) / 2) < 0.5 and center.std() > 1.0


def test_eval_view_is_deterministic_and_centered():
    given = batch()
    given["extent"][:] = (20, 24)
    assert np.array_equal(seen(TRAIN.eval, given), seen(TRAIN.eval, given, jax.random.key(1)))
    mirrored = {**given, "image": given["image"][:, :20, ::-1]}
    mirrored["image"] = np.pad(mirrored["image"], ((0, 0), (0, 4), (0, 0), (0, 0)))
    np.testing.assert_allclose(
        seen(CenterCrop(8), mirrored), seen(CenterCrop(8), given)[:, :, ::-1], atol=1e-5
    )


def test_flip_mirrors_with_its_probability():
    given = {"image": np.arange(1000 * 6, dtype=np.float32).reshape(1000, 1, 6, 1)}
    image = seen(Flip(0.3), given)
    kept = (image == given["image"]).all((1, 2, 3))
    assert np.array_equal(image[~kept], given["image"][~kept][:, :, ::-1])
    assert 0.25 < 1 - kept.mean() < 0.35
    assert np.array_equal(seen(Flip(0.0), given), given["image"])
    assert np.array_equal(seen(Flip(1.0), given), given["image"][:, :, ::-1])


def test_normalize_gives_zero_mean_and_unit_variance():
    r = np.random.default_rng(0)
    mean, std = (0.2, 0.5, 0.7), (0.1, 0.2, 0.05)
    image = r.normal(mean, std, (64, 9, 9, 3)).astype(np.float32)
    out = seen(Normalize(mean, std), {"image": image})
    np.testing.assert_allclose(out.mean((0, 1, 2)), 0, atol=0.05)
    np.testing.assert_allclose(out.std((0, 1, 2)), 1, atol=0.05)
    np.testing.assert_allclose(out, (image - mean) / std, rtol=1e-4, atol=1e-5)


def test_train_pixels_are_shares_before_they_are_normalized():
    image = seen(RandomResizedCrop(8), batch())
    assert 0 <= image.min() < 0.05 and 0.95 < image.max() <= 1


def test_views_are_values():
    assert views.mae(8) == views.mae(8) and hash(views.mae(8)) == hash(views.mae(8))
    assert views.mae(8) != views.mae(8, flip=0.0)
    link = replace(TRAIN.train.links[0], size=4)
    train = replace(TRAIN.train, links=(link, *TRAIN.train.links[1:]))
    assert seen(train, batch()).shape == (B, 4, 4, 3)
