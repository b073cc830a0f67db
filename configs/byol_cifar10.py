"""BYOL on CIFAR-10 (arXiv:2006.07733) with a ResNet-18, by two published small recipes.

    sslx train configs/byol_cifar10.py data='parquet:DIR/train-*.parquet' \\
        test='parquet:DIR/test-*.parquet' --workdir runs/byol

or data=tfds:cifar10:train test=tfds:cifar10:test, prepared as array_record. On an accelerator add
half=True. The probes read the labels of both splits; pretraining reads none.

    published=lightly      200 epochs, batches of 128: k-NN .869, of 512: .868 (the best epochs)
    published=solo-learn   1,000 epochs, batches of 256: online linear 92.58

lightly halves and averages the loss, a quarter of the paper's, which is ours: so its learning rate
is divided by 4 here and its decay multiplied, which with SGD gives the same steps. Its target, and
solo-learn's, starts as a copy; ours, as DeepMind's, from a key of its own. The heads' maps start as
Haiku's, where theirs are torch's, two thirds as large.

Ours: no run yet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from sslx.config import Config
from sslx.data.image import Image
from sslx.data.part import train_and_test
from sslx.data.pipeline import Pipeline
from sslx.evals.health import Health
from sslx.evals.knn import KNN
from sslx.evals.linear import LinearProbe
from sslx.evals.probes import Probes
from sslx.models.heads import Head, Siamese, byol
from sslx.models.layers import Init, he, torch_uniform
from sslx.models.resnet import CIFAR_STEM, Stem, resnet
from sslx.objectives.byol import BYOL
from sslx.ops.image import triangle
from sslx.optim import SGD, ClippedLARS, Optimizer, scaled
from sslx.schedules import Constant, Cosine, Warmup
from sslx.types import Schedule
from sslx.views import IMAGENET, Views, cifar_asymmetric

TRAIN = 50_000  # images
CIFAR = ("tfds:cifar10:train", "tfds:cifar10:test")


@dataclass(frozen=True)
class Published:
    """What differs between the two; `optimizer` of (batch size, steps, steps of warm-up)."""

    epochs: int
    batch_size: int
    stem: Stem
    kernel_init: Init
    head: Head
    decay: Callable[[int], Schedule]  # of the number of steps
    views: Views
    optimizer: Callable[[int, int, int], Optimizer]


def sgd(batch_size: int, steps: int, warm: int) -> Optimizer:
    del warm
    rate = Cosine(scaled(0.06 / 4, batch_size, per=128), 0.0, steps)
    return SGD(rate, weight_decay=4 * 5e-4, no_decay="")


def lars(batch_size: int, steps: int, warm: int) -> Optimizer:
    rate = Warmup(warm, Cosine(scaled(1.0, batch_size), 0.0, steps - warm))
    return ClippedLARS(rate, trust=0.02, weight_decay=1e-5)


PUBLISHED = {
    "lightly": Published(
        epochs=200,
        batch_size=128,
        stem=CIFAR_STEM,
        kernel_init=torch_uniform,
        head=Head((1024, 256), bias="all"),
        decay=lambda steps: Constant(0.99),
        views=cifar_asymmetric(statistics=IMAGENET, kernel=triangle),
        optimizer=sgd,
    ),
    "solo-learn": Published(
        epochs=1000,
        batch_size=256,
        stem=Stem(kernel=3, stride=1, padding=2, pool=False),
        kernel_init=he,
        head=byol(bias="all"),
        decay=lambda steps: Cosine(0.99, 1.0, steps),
        views=cifar_asymmetric(),
        optimizer=lars,
    ),
}


def config(
    data: str = CIFAR[0],
    test: str = "",  # of other data: a share is held out
    published: Literal["lightly", "solo-learn"] = "lightly",
    epochs: int | None = None,
    batch_size: int | None = None,
    depth: int = 18,
    half: bool = False,
) -> Config:
    p, dtype = PUBLISHED[published], jnp.bfloat16 if half else jnp.float32
    epochs = p.epochs if epochs is None else epochs
    batch_size = p.batch_size if batch_size is None else batch_size
    per_epoch = TRAIN // batch_size
    steps, warm = epochs * per_epoch, min(10, epochs // 4) * per_epoch
    head = p.head.clone(dtype=dtype)  # the projector's form and the predictor's
    encoder = resnet(depth, stem=p.stem, last_gamma=1.0, kernel_init=p.kernel_init, dtype=dtype)
    pipeline, held_out = (Pipeline(d, Image(32)) for d in train_and_test(data, test, CIFAR))
    return Config(
        objective=BYOL(Siamese(encoder, head, head.clone()), p.decay(steps)),
        data=pipeline,
        views=p.views,
        optimizer=p.optimizer(batch_size, steps, warm),
        steps=steps,
        batch_size=batch_size,
        evals={"probes": Probes(pipeline, held_out, (KNN(200, 0.1), LinearProbe(), Health()))},
        log_every=50,
        save_every=10 * per_epoch,
        eval_every=max(1, epochs // 4) * per_epoch,
    )
