"""What every objective keeps, as one table: a row says how to build it tiny, and one batch.

A new method is a new row. `test_objectives.py` checks each, item by item.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sslx import engine
from sslx import state as states
from sslx.config import Config
from sslx.data.image import Image
from sslx.data.pipeline import Pipeline
from sslx.data.uri import digits
from sslx.models import heads
from sslx.models.encoder import Encoder, Signature
from sslx.models.heads import Siamese
from sslx.models.text import BERT_FORM, MaskedLM, TextEncoder
from sslx.models.vit import ViT, vit
from sslx.objectives.base import Objective
from sslx.objectives.byol import BYOL
from sslx.objectives.mae import MAE, Decoder
from sslx.objectives.mlm import MLM, Masking
from sslx.objectives.simclr import SimCLR
from sslx.ops.trees import path_of
from sslx.optim import AdamW, Optimizer
from sslx.schedules import Constant, Cosine
from sslx.sharding import Mesh, batch_sharding
from sslx.vocabulary import Vocabulary

BATCH = 16
WORDS = Vocabulary(96)


@dataclass(frozen=True)
class Reorder:
    """A change of the batch, and whether the paper's loss stays the same under it."""

    change: Callable[[dict], dict]
    same: bool
    objective: Objective | None = None  # in place of the row's


@dataclass(frozen=True)
class Row:
    """An objective at its smallest.

    batch    seed -> what the objective reads, as numpy, BATCH examples
    reorders name -> item 10
    still    params that get no gradient, or only rounding's, path -> the reason
    falls    share of the first loss that is left after 20 steps of gradient descent, if not less
    """

    objective: Objective
    batch: Callable[[int], dict]
    reorders: Mapping[str, Reorder]
    still: Mapping[str, str]
    falls: float


# ---- batches and their changes ----


@functools.cache
def images() -> np.ndarray:
    """Digits, float32 [1437, 8, 8, 1] in 0..1."""
    return digits("train").arrays[0].astype(np.float32) / 255


def pictures(seed: int) -> dict:
    """Normalized digits, [B, 8, 8, 1]."""
    rows = np.random.default_rng(seed).choice(len(images()), BATCH, replace=False)
    return {"image": (images()[rows] - 0.3) / 0.37}


def two_views(seed: int) -> dict:
    """Digits twice, each time shifted by up to a pixel and with noise, [B, 2, 8, 8, 1]."""
    random, images = np.random.default_rng(seed), pictures(seed)["image"]
    shifts = random.integers(-1, 2, (BATCH, 2, 2))
    moved = [[np.roll(x, s, (0, 1)) for s in two] for x, two in zip(images, shifts, strict=True)]
    noise = random.normal(0, 0.3, (BATCH, 2, *images.shape[1:]))
    return {"image": (np.asarray(moved) + noise).astype(np.float32)}


FIRST, SECOND, WINDOW = 9, 8, 20  # tokens of a window's documents, and its length


def packed(seed: int) -> dict:
    """Two documents to a window, then padding; some words are common, as in a language."""
    random = np.random.default_rng(seed)
    words = 5 + random.zipf(1.5, (BATCH, WINDOW)) % (WORDS.size - 5)
    segments = np.repeat([1, 2, 0], [FIRST, SECOND, WINDOW - FIRST - SECOND])
    words[:, [0, FIRST]], words[:, [FIRST - 1, FIRST + SECOND - 1]] = WORDS.start, WORDS.end
    words[:, segments == 0] = WORDS.pad
    segments = np.tile(segments, (BATCH, 1))
    return {"tokens": words.astype(np.int32), "segments": segments.astype(np.int32)}


def padding_written_over(batch: dict) -> dict:
    words = np.where(batch["segments"] == 0, 50, batch["tokens"])
    return {**batch, "tokens": words.astype(np.int32)}


def documents_of_others(batch: dict) -> dict:
    """Every second document is the next example's."""
    second = batch["segments"] == 2
    return {**batch, "tokens": np.where(second, np.roll(batch["tokens"], 1, 0), batch["tokens"])}


def one_view(batch: dict) -> dict:
    """What an encoder reads: the batch, or the first view of its pictures."""
    return {name: x[:, 0] if x.ndim == 5 else x for name, x in batch.items()}


def views_swapped(batch: dict) -> dict:
    return {name: x[:, ::-1] for name, x in batch.items()}


def views_swapped_of_some(batch: dict) -> dict:
    some = np.arange(BATCH) % 2 == 0
    return {n: np.where(some[:, None, None, None, None], x[:, ::-1], x) for n, x in batch.items()}


def views_of_others(batch: dict) -> dict:
    """Every second view is the next example's."""
    return {n: np.stack([x[:, 0], np.roll(x[:, 1], 1, 0)], 1) for n, x in batch.items()}


def examples_reversed(batch: dict) -> dict:
    return {name: x[::-1] for name, x in batch.items()}


# ---- objectives of the tests' own ----


class OneMask(MAE):
    """MAE that always hides the same patches: what is left is a mean over examples."""

    def mask(self, key, image):
        order, keep = super().mask(jax.random.key(0), image[:1])
        return tuple(jnp.broadcast_to(x, (len(image), x.shape[1])) for x in (order, keep))


class OneMaskOfText(MLM):
    """MLM that always hides the same places, and predicts there what is no multiple of 3: a mean
    over another number of tokens in each example."""

    def mask(self, key, tokens, segments):
        _, places, weight = super().mask(jax.random.key(0), tokens[:1], segments[:1])
        hidden = jnp.zeros(tokens.shape[1], bool).at[places[0]].set(weight[0] > 0)
        masked = jnp.where(hidden, WORDS.mask, tokens)
        places, weight = (jnp.broadcast_to(x, (len(tokens), x.shape[1])) for x in (places, weight))
        return masked, places, weight * (jnp.take_along_axis(tokens, places, 1) % 3 > 0)


class Convolved(nn.Module):
    """The smallest encoder with BatchNorm: one convolution, tokens [B, 16, D] of 8 x 8 pixels."""

    width: int = 16
    signature: ClassVar[Signature] = Signature(("image",))

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(self.width, (3, 3), 2, use_bias=False, name="conv")(x)
        norm = nn.BatchNorm(not train, momentum=0.9, use_fast_variance=False, name="norm")
        return nn.relu(norm(x)).reshape(len(x), -1, self.width)


@dataclass(frozen=True)
class Follow(Objective):
    """Follow a slow random projection of centered pixels: plain functions, no module library.

    batch    image [B, H, W, C]
    buffers  target: slow w; mean: of the pixels, moving; seen: examples so far
    """

    width: int = 256  # large enough for an unnamed leaf to be cut
    tau: float = 0.9
    share: float = 0.1  # of the batch in the moving mean

    def init(self, key, batch):
        shape = (batch["image"][0].size, self.width)
        w, slow = (jax.random.normal(k, shape) / 8 for k in jax.random.split(key))
        start = {"target": {"w": slow}, "mean": jnp.zeros(shape[0]), "seen": jnp.int32(0)}
        return {"w": w}, start

    def loss(self, params, buffers, batch, key, step):
        x = batch["image"].reshape(len(batch["image"]), -1)
        mean = buffers["mean"] + self.share * (x.mean(0) - buffers["mean"])
        x = x - jax.lax.stop_gradient(mean)
        error = jnp.square(x @ params["w"] - x @ buffers["target"]["w"]).mean(1)
        buffers = {**buffers, "mean": mean, "seen": buffers["seen"] + len(x)}
        return error.mean(), (buffers, {"worst": error.max()})

    def update(self, params, buffers, step):
        mix = lambda slow, w: self.tau * slow + (1 - self.tau) * w  # noqa: E731
        return params, {**buffers, "target": jax.tree.map(mix, buffers["target"], params)}

    def coupling(self, buffers):
        return "pixels are centered by the mean of the whole batch" if self.share else ""

    def encoders(self, params, buffers):
        return {"encoder": Encoder({"params": params}, project, Signature(("image",)))}


def project(variables, image):
    """An encoder that is a plain function: one token, the projected pixels."""
    return (image.reshape(len(image), -1) @ variables["params"]["w"])[:, None]


# ---- the table ----

# Heads over tensor=4. Without remat all compiles in half the time: the first alone has it.
TINY = MAE(vit("mu", 2).clone(heads=4), Decoder(width=32, depth=1, heads=4, remat="none"))
SMALL = ViT(32, 1, 4, patch=4, remat="none")
PROJECTOR, PREDICTOR = heads.byol(64, 32), heads.byol(64, 32)
DECAY = Cosine(0.9, 1.0, 10)

BERT = TextEncoder(WORDS, 32, 2, 4, length=WINDOW, remat="none")
LANGUAGE = MLM(MaskedLM(BERT), Masking(most=4))
STILL = dataclasses.replace(BERT_FORM, dropout=0.0, attention_dropout=0.0)
# Without epsilon, which counts once in each micro-batch.
SAME = OneMaskOfText(MaskedLM(BERT.clone(form=STILL)), LANGUAGE.masking, epsilon=0.0)

# The net is one batch of 2 B, and the loss a mean over anchors: only pairs count.
CONTRASTED = {
    "examples": Reorder(examples_reversed, same=True),
    "views": Reorder(views_swapped, same=True),
    "views of some": Reorder(views_swapped_of_some, same=True),
    "pairs": Reorder(views_of_others, same=False),
}
# Both directions are summed, but BatchNorm sees each view apart.
PREDICTED = {
    "examples": Reorder(examples_reversed, same=True),
    "views": Reorder(views_swapped, same=True),
    "views of some": Reorder(views_swapped_of_some, same=False),
    "pairs": Reorder(views_of_others, same=False),
}
SHIFT = "BatchNorm behind it takes the mean away"
BIASES = {"projector/linear0/bias": SHIFT, "predictor/linear0/bias": SHIFT}
LAST = {"encoder/transformer/norm/bias": SHIFT}

ROWS = {
    "SimCLR": Row(
        SimCLR(Siamese(Convolved(), heads.simclr(3, 64, 32))),
        two_views,
        CONTRASTED,
        still={},
        falls=0.8,
    ),
    "SimCLR with ViT": Row(
        SimCLR(Siamese(SMALL, heads.simclr(2, 64, 32), pool="first"), chunks=2),
        two_views,
        CONTRASTED,
        still=LAST,
        falls=0.8,
    ),
    "BYOL": Row(
        BYOL(Siamese(Convolved(), PROJECTOR, PREDICTOR), DECAY),
        two_views,
        PREDICTED,
        still=BIASES,
        falls=0.8,
    ),
    "MAE": Row(
        TINY,
        pictures,
        {
            # Masks are drawn by place in the batch: another order hides other patches.
            "examples": Reorder(examples_reversed, same=False),
            "examples under one mask": Reorder(
                examples_reversed, same=True, objective=OneMask(TINY.encoder, TINY.decoder)
            ),
        },
        still={},
        falls=0.85,
    ),
    "MLM": Row(
        LANGUAGE,
        packed,
        {
            # Masks and what is dropped are drawn by place in the batch.
            "examples": Reorder(examples_reversed, same=False),
            "examples under one mask": Reorder(examples_reversed, same=True, objective=SAME),
            "documents under one mask": Reorder(documents_of_others, same=True, objective=SAME),
            "padding": Reorder(padding_written_over, same=True),
        },
        still={},
        falls=0.9,
    ),
    "Follow": Row(
        Follow(),
        pictures,
        {"examples": Reorder(examples_reversed, same=True)},
        still={},
        falls=0.2,
    ),
}


# ---- a row on a mesh, through the engine ----


@dataclass(frozen=True)
class Given(Pipeline):
    """A pipeline only in its shapes: those of a batch that the objective reads as it is."""

    batch: Callable[[int], dict] = pictures

    def shapes(self, batch_size):
        given = self.batch(0)
        return {name: ((batch_size, *x.shape[1:]), x.dtype) for name, x in given.items()}


@dataclass(frozen=True)
class Record(Optimizer):
    """Gradient descent with momentum, whose state is the gradient after a first step."""

    learning_rate: Constant = Constant(0.1)

    def transform(self):
        raise NotImplementedError

    def init(self, params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(self, grads, opt_state, params, step, layers=None):
        trace = jax.tree.map(lambda g, old: g + 0.1 * old, grads, opt_state)
        return jax.tree.map(lambda x: -self.learning_rate(0) * x, trace), trace


def config_of(row: Row, **fields) -> Config:
    """A run of `row` without views; `fields` as in Config."""
    optimizer = AdamW(Constant(3e-3), no_decay="")
    fields = {"optimizer": optimizer, "steps": 3, "batch_size": BATCH} | fields
    data = Given(digits("train"), Image(8, channels=1), batch=row.batch)
    return Config(row.objective, data, **fields)


def moving(name: str, tree):
    """A tree of params, or with such in it, without those of the row that stand still."""
    ends = tuple(ROWS[name].still)

    def keep(keys, leaf):
        return None if ends and path_of(keys).endswith(ends) else leaf

    return jax.tree_util.tree_map_with_path(keep, tree)


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    """(replica, fsdp, tensor) over as many devices as that takes."""
    return Mesh(*shape).build(jax.devices()[: int(np.prod(shape))])


def placed(batch: dict, mesh: jax.sharding.Mesh) -> dict:
    return jax.device_put(batch, batch_sharding(mesh))


@functools.cache
def fresh(name: str) -> states.TrainState:
    """The state of a row at step 0, drawn on one device, as numpy; its key as numbers."""
    state = states.fresh_state(config_of(ROWS[name], optimizer=Record()), mesh_of(1, 1, 1))
    return jax.device_get(replace(state, key=jax.random.key_data(state.key)))


@functools.cache
def recorded(name: str, *shape: int, objective: Objective | None = None, accumulate: int = 1):
    """The step on a mesh, whose optimizer records, (state, seed of the batch) -> (state, metrics),
    state donated; and what gives the row's fresh state there.

    With another objective of the same state if given.
    """
    row, mesh = ROWS[name], mesh_of(*shape)
    row = replace(row, objective=objective or row.objective)
    config = config_of(row, optimizer=Record(), accumulate=accumulate)
    step = engine.jitted_step(config, mesh)

    def run(state, seed=0):
        with jax.set_mesh(mesh):
            return step(state, placed(row.batch(seed), mesh))

    where = jax.tree.map(lambda x: x.sharding, states.abstract_state(config, mesh))

    def start():
        state = jax.tree.map(np.copy, fresh(name))
        return jax.device_put(replace(state, key=jax.random.wrap_key_data(state.key)), where)

    return run, start


@functools.cache
def one_step(name: str, *shape: int):
    """(state before, state after, metrics) of one recorded step of a row on a mesh."""
    step, start = recorded(name, *shape)
    return fresh(name), *step(start())
