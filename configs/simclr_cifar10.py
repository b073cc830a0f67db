"""SimCLR on CIFAR-10 (arXiv:2002.05709) with a ResNet-18, by two published small recipes.

    sslx train configs/simclr_cifar10.py data='parquet:DIR/train-*.parquet' \\
        test='parquet:DIR/test-*.parquet' --workdir runs/simclr

or data=tfds:cifar10:train test=tfds:cifar10:test, prepared as array_record. On an accelerator add
half=True. The probes read the labels of both splits; pretraining reads none.

    published=lightly      200 epochs, batches of 128: k-NN .847, of 512: .848 (the best epochs)
    published=solo-learn   1,000 epochs, batches of 256: online linear 90.74

lightly's projector is that of its older versions, without BatchNorm; which one gave .847 is not
said. Both libraries pass the two views apart, here BatchNorm sees them together, as in the paper;
and the projector's maps start as Haiku's, where theirs are torch's, two thirds as large.

Ours: the recipe has not run on an accelerator yet. A short run of a small net on two cores of an
AMD EPYC, shared with another job, 2026-11-20, jax 0.10.2, 9 min 30 s with both evaluations:
`batch_size=256 epochs=2 objective.net.encoder.channels=32 objective.net.encoder.blocks='(1,1,1)'
objective.net.encoder.stem.kernel=4 objective.net.encoder.stem.stride=2`, some 220 images a second.

                k-NN    linear    RankMe
    2 epochs    .450    .491      46
    random init .314    .385      23
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
from sslx.models.heads import Head, Siamese
from sslx.models.layers import Init, he, torch_uniform
from sslx.models.resnet import CIFAR_STEM, Stem, resnet
from sslx.objectives.simclr import SimCLR
from sslx.ops.image import triangle
from sslx.optim import SGD, ClippedLARS, Optimizer, scaled
from sslx.schedules import Cosine, Warmup
from sslx.views import IMAGENET, Views, cifar

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
    temperature: float
    views: Views
    optimizer: Callable[[int, int, int], Optimizer]


def sgd(batch_size: int, steps: int, warm: int) -> Optimizer:
    del warm
    rate = Cosine(scaled(0.06, batch_size, per=128), 0.0, steps)
    return SGD(rate, weight_decay=5e-4, no_decay="")


def lars(batch_size: int, steps: int, warm: int) -> Optimizer:
    rate = Warmup(warm, Cosine(scaled(0.4, batch_size), 0.0, steps - warm))
    return ClippedLARS(rate, trust=0.02, weight_decay=1e-4)


PUBLISHED = {
    "lightly": Published(
        epochs=200,
        batch_size=128,
        stem=CIFAR_STEM,
        kernel_init=torch_uniform,
        head=Head((512, 128), norm="none", bias="all"),
        temperature=0.5,
        views=cifar(0.5, statistics=IMAGENET, kernel=triangle),
        optimizer=sgd,
    ),
    "solo-learn": Published(
        epochs=1000,
        batch_size=256,
        stem=Stem(kernel=3, stride=1, padding=2, pool=False),
        kernel_init=he,
        head=Head((2048, 256), norm="none", bias="all"),
        temperature=0.2,
        views=cifar(),
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
    encoder = resnet(depth, stem=p.stem, last_gamma=1.0, kernel_init=p.kernel_init, dtype=dtype)
    pipeline, held_out = (Pipeline(d, Image(32)) for d in train_and_test(data, test, CIFAR))
    return Config(
        objective=SimCLR(Siamese(encoder, p.head.clone(dtype=dtype)), p.temperature, "anchors"),
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
