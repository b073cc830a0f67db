"""Views are keyed by example, the same on any mesh, and never look beyond a picture's extent.

That their pixels are Pillow's is test_parity.py's.
"""

import colorsys
import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import mesh_of, placed

from sslx import views
from sslx.ops import image as ops
from sslx.views import (
    Blur,
    CenterCrop,
    Chain,
    ColorJitter,
    Factor,
    Flip,
    Grayscale,
    MultiCrop,
    Normalize,
    RandomResizedCrop,
    Shift,
    Solarize,
    Stack,
)

B, SIZE = 16, 24
TRAIN = views.mae(8, scale=(0.2, 1.0), share=0.75)
JITTER = ColorJitter(
    Factor(ops.brightness, 0.8),
    Factor(ops.contrast, 0.8),
    Factor(ops.saturation, 0.8),
    Shift(ops.hue, 0.2),
)
COLORED = Chain(
    (
        RandomResizedCrop(8),
        Flip(),
        JITTER,
        Grayscale(),
        Blur(5),
        Solarize(),
        Normalize(*views.CIFAR10),
    )
)
EVERYTHING = Stack((COLORED, Chain((RandomResizedCrop(8),))))
RECIPES = {
    "simclr": views.simclr(8),
    "byol": views.byol(8),
    "cifar": views.cifar(size=8),
    "cifar_asymmetric": views.cifar_asymmetric(size=8),
    "digits": views.digits(8),
}
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
    view = jax.jit(EVERYTHING)
    one, same = (np.asarray(view(KEY, x)["image"]) for x in (mixed, given))
    np.testing.assert_allclose(one[0], same[0], atol=1e-5)
    assert not np.allclose(one[1], same[1], atol=0.1)


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


@pytest.mark.parametrize(
    "view", [TRAIN.train, TRAIN.eval, EVERYTHING], ids=["train", "eval", "everything"]
)
def test_same_on_any_mesh(view):
    results = []
    for sizes in ((1, 1, 1), (8, 1, 1), (2, 2, 2)):
        mesh = mesh_of(*sizes)
        with jax.set_mesh(mesh):
            image = jax.jit(view)(KEY, placed(batch(), mesh))["image"]
        held = image.addressable_shards[0].data.shape[0]
        assert held == B // (sizes[0] * sizes[1])  # and cut, not gathered
        results.append(np.asarray(image))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=1e-5 if view is EVERYTHING else 1e-6)


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


# ---- color ----


def digit(place: int, image, amount):
    """A change of color that writes its number behind those that came before it."""
    return 10 * image + place


def test_jitter_takes_every_order_alike_and_each_change_once():
    one, two, three, four = (functools.partial(digit, i) for i in (1, 2, 3, 4))
    jitter = ColorJitter(
        Shift(one, 0.0), Factor(two, 0.0), Factor(three, 0.0), Shift(four, 0.0), probability=0.75
    )
    image = seen(jitter, {"image": np.zeros((9600, 1, 1, 1), np.float32)}).ravel().astype(int)
    assert abs((image == 0).mean() - 0.25) < 0.03
    orders, counts = np.unique(image[image > 0], return_counts=True)
    expected = sorted(int("".join(p)) for p in itertools.permutations("1234"))
    assert orders.tolist() == expected
    assert counts.min() > 220 and counts.max() < 380  # of 300 each; five deviations


def test_jitter_draws_its_amounts_over_their_ranges():
    """Of each change alone: the others are off."""
    off, none = Factor(ops.contrast, 0.0), Shift(ops.hue, 0.0)
    of_amount = Shift(lambda image, amount: image + amount[:, None, None, None], 0.3)
    jitter = ColorJitter(of_amount, off, off, none, probability=1.0)
    amount = seen(jitter, {"image": np.full((4000, 1, 1, 1), 0.5, np.float32)}).ravel() - 0.5
    assert -0.3001 < amount.min() < -0.295 and 0.295 < amount.max() < 0.3001
    assert abs(amount.mean()) < 0.01 and abs(amount.std() - 0.3 / 3**0.5) < 0.01
    for amount, low, high in ((0.8, 0.2, 1.8), (1.5, 0.0, 2.5)):
        factor = np.asarray(Factor(ops.brightness, amount).draw(KEY, 4000))
        assert low <= factor.min() < low + 0.01 and high - 0.01 < factor.max() <= high
        assert abs(factor.mean() - (low + high) / 2) < 0.04


def test_jitter_is_the_four_changes_in_some_order():
    """... of float64, on two pixels whose gray mean the contrast must read at its turn."""
    pixels = np.array([[0.9, 0.2, 0.3], [0.4, 0.5, 0.1]])
    half = [Factor(op, 0.0) for op in (ops.brightness, ops.contrast, ops.saturation)]
    fixed = [replace(part, op=functools.partial(at, part.op, 0.5)) for part in half]
    jitter = ColorJitter(*fixed, Shift(functools.partial(at, ops.hue, 0.25), 0.0), probability=1.0)
    image = np.broadcast_to(pixels[None, None], (300, 1, 2, 3)).astype(np.float32)
    found = np.unique(seen(jitter, {"image": image}).round(4).reshape(300, 6), axis=0)
    gray = lambda x: (x @ [0.2989, 0.587, 0.114])[:, None]  # noqa: E731

    def turned(x):
        hsv = [colorsys.rgb_to_hsv(*p) for p in x]
        return np.array([colorsys.hsv_to_rgb((h + 0.25) % 1, s, v) for h, s, v in hsv])

    changes = (
        lambda x: x / 2,
        lambda x: (x + gray(x).mean()) / 2,
        lambda x: (x + gray(x)) / 2,
        turned,
    )
    expected = []
    for order in itertools.permutations(changes):
        expected.append(functools.reduce(lambda x, change: change(x), order, pixels).ravel())
    distance = np.abs(found[:, None] - np.array(expected)[None]).max(-1)  # [found, 24]
    assert distance.min(1).max() < 1e-4 and distance.min(0).max() < 1e-4


def at(op, amount: float, image, drawn):
    return op(image, jnp.full_like(drawn, amount))


@pytest.mark.parametrize(
    ("view", "changed"),
    [
        (Grayscale(0.2), lambda x: np.broadcast_to(x @ [[0.2989], [0.587], [0.114]], x.shape)),
        (Solarize(0.2, threshold=0.4), lambda x: np.where(x < 0.4, x, 1 - x)),
    ],
    ids=["gray", "solarize"],
)
def test_a_change_comes_with_its_probability(view, changed):
    image = np.random.default_rng(0).uniform(0, 1, (2000, 2, 2, 3)).astype(np.float32)
    out = seen(view, {"image": image})
    kept = (out == image).all((1, 2, 3))
    assert abs(kept.mean() - 0.8) < 0.04
    np.testing.assert_allclose(out[~kept], changed(image[~kept]), atol=1e-6)
    assert np.array_equal(seen(replace(view, probability=0.0), {"image": image}), image)
    always = seen(replace(view, probability=1.0), {"image": image})
    np.testing.assert_allclose(always, changed(image), atol=1e-6)


def test_blur_draws_its_sigma():
    """Read back from how a point spreads: the ratio of neighbors is exp(-1 / 2 sigma^2)."""
    point = np.zeros((4000, 7, 7, 1), np.float32)
    point[:, 3, 3] = 1
    out = seen(Blur(7, 0.5, (0.5, 2.0)), {"image": point})
    kept = (out == point).all((1, 2, 3))
    assert abs(kept.mean() - 0.5) < 0.04
    sigma = np.sqrt(-0.5 / np.log(out[~kept, 3, 4, 0] / out[~kept, 3, 3, 0]))
    assert 0.499 < sigma.min() < 0.51 and 1.99 < sigma.max() < 2.001
    assert abs(sigma.mean() - 1.25) < 0.05


# ---- several views ----


def test_stacked_views_are_of_one_picture_and_draw_apart():
    given = {**alike(batch()), "label": np.arange(B, dtype=np.int32)}
    place = Chain((RandomResizedCrop(8),))
    out = jax.jit(Stack((place, place, Chain((CenterCrop(8),)))))(KEY, given)
    image = np.asarray(out["image"])
    assert image.shape == (B, 3, 8, 8, 3) and out.keys() == {"image", "label"}
    assert np.array_equal(out["label"], given["label"])
    assert np.array_equal(image[:, 2], seen(CenterCrop(8), given))
    assert not np.isclose(image[:, 0], image[:, 1], atol=1e-3).all((1, 2, 3)).any()
    given["image"] = np.full_like(given["image"], 51)
    np.testing.assert_allclose(seen(Stack((place, place)), given), 0.2, atol=1e-6)


def test_many_crops_of_two_sizes():
    whole, part = (
        Chain((RandomResizedCrop(n, scale),)) for n, scale in ((8, (0.4, 1.0)), (4, (0.1, 0.4)))
    )
    view = MultiCrop(Stack((whole, whole)), Stack((part,) * 3))
    given = {**alike(batch()), "label": np.arange(B, dtype=np.int32)}
    out = jax.jit(view)(KEY, given)
    assert {name: x.shape for name, x in out.items()} == {
        "image": (B, 2, 8, 8, 3),
        "local": (B, 3, 4, 4, 3),
        "label": (B,),
    }
    again = jax.jit(MultiCrop(Stack((part,) * 3), Stack((part,) * 3)))(KEY, given)
    assert not np.isclose(again["image"], again["local"], atol=1e-3).all((2, 3, 4)).any()


def test_stack_of_two_sizes():
    sizes = Stack((CenterCrop(8), CenterCrop(4)))
    with pytest.raises(ValueError, match=r"give their crops one size, or put .* MultiCrop"):
        jax.eval_shape(sizes, KEY, batch())


# ---- recipes ----


def links_of(recipe, kind) -> list[list]:
    """The links of a kind in every chain of a recipe's train views."""
    train = recipe.train
    chains = (
        (*train.whole.chains, *train.part.chains) if isinstance(train, MultiCrop) else train.chains
    )
    return [[link for link in chain.links if isinstance(link, kind)] for chain in chains]


def amounts(jitter) -> tuple:
    parts = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    return tuple(round(part.amount, 6) for part in parts)


STRONG, WEAK = (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.2, 0.1)


@pytest.mark.parametrize(
    ("recipe", "jitter", "blur", "solarize", "statistics"),
    [  # reference.md 1, 3.1, 3.2; a number for each view
        (views.simclr(224), STRONG, (0.5, 0.5), (0, 0), None),
        (views.simclr(32, 0.5, blur=0.0), (0.4, 0.4, 0.4, 0.1), (0, 0), (0, 0), None),
        (views.byol(224), WEAK, (1.0, 0.1), (0, 0.2), views.IMAGENET),
        (views.cifar(), STRONG, (0, 0), (0, 0), views.CIFAR10),
        (views.cifar(0.5), (0.4, 0.4, 0.4, 0.1), (0, 0), (0, 0), views.CIFAR10),
        (views.cifar_asymmetric(), WEAK, (0, 0), (0, 0.2), views.CIFAR10),
    ],
)
def test_recipes_are_as_published(recipe, jitter, blur, solarize, statistics):
    def probability(kind):
        return tuple(sum(link.probability for link in of) for of in links_of(recipe, kind))

    assert probability(Blur) == blur and probability(Solarize) == solarize
    assert set(probability(Flip)) == {0.5} and set(probability(Grayscale)) == {0.2}
    assert set(probability(ColorJitter)) == {0.8}
    assert {amounts(x) for (x,) in links_of(recipe, ColorJitter)} == {jitter}
    assert {x.size for of in links_of(recipe, Blur) for x in of} == ({23} if any(blur) else set())
    normal = {(x.mean, x.std) for of in links_of(recipe, Normalize) for x in of}
    assert normal == ({statistics} if statistics else set())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_values(name):
    recipe, channels = RECIPES[name], 1 if name == "digits" else 3
    given = batch()
    given["image"] = given["image"][..., :channels]
    out = jax.eval_shape(recipe.train, KEY, given)
    assert out["image"].shape == (B, 2, 8, 8, channels)
    assert all(x.dtype == jnp.float32 for x in out.values())
    assert jax.eval_shape(recipe.eval, KEY, given)["image"].shape == (B, 8, 8, channels)
    same = getattr(views, name)(size=8)
    assert recipe == same and hash(recipe) == hash(same) and repr(recipe) == repr(same)
    assert recipe != views.mae(8)


def test_pixels_of_two_unlike_views_in_their_normalized_range():
    """BYOL's, whole: through every kind of link."""
    image = seen(views.byol(8).train, batch())
    pixels = image * np.array(views.IMAGENET[1]) + np.array(views.IMAGENET[0])
    assert -1e-5 < pixels.min() < 0.05 and 0.95 < pixels.max() < 1 + 1e-5
    assert not np.isclose(image[:, 0], image[:, 1], atol=0.05).all((1, 2, 3)).any()


# ---- bad input ----


@pytest.mark.parametrize("view", [RandomResizedCrop(32), CenterCrop(32), views.byol(32).train])
def test_an_image_smaller_than_the_crop(view):
    with pytest.raises(
        ValueError, match=r"smaller than the crop: 24 x 24 .* Image\(32\), or .* 24"
    ):
        jax.eval_shape(view, KEY, batch())


def test_a_gray_image_where_colors_are_normalized():
    gray = {**batch(), "image": batch()["image"][..., :1]}
    with pytest.raises(ValueError, match=r"for 3 channels, .* 8, 8, 1\]: set Image\(channels=3\)"):
        jax.eval_shape(views.cifar(size=8).train, KEY, gray)
    out = jax.eval_shape(views.cifar(size=8, statistics=views.GRAY).train, KEY, gray)
    assert out["image"].shape == (B, 2, 8, 8, 1)
