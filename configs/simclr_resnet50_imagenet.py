"""SimCLR on ImageNet-1k with a ResNet-50, as google-research/simclr has it (arXiv:2002.05709).

    sslx train configs/simclr_resnet50_imagenet.py data=tfds:imagenet2012:train --workdir RUN

Published: linear probe 64.5 after 100 epochs (its README), 69.1 after 1,000 (the paper). Ours: no
run yet. Theirs takes 6 hours on 32 TPU v3 for 100 epochs.

`rate` and `decay` are those of its README; the paper decays by 1e-6. Departures: the stride of a
bottleneck is in its 3x3 ("v1.5"), convolutions are padded alike on all sides, and the random crop
is cut on the accelerator from a picture shrunk to 384 px on the long side.
"""

import jax.numpy as jnp

from sslx.config import Config
from sslx.data.image import Image
from sslx.data.part import Part, train_and_test
from sslx.data.pipeline import Pipeline
from sslx.evals.health import Health
from sslx.evals.knn import KNN
from sslx.evals.probes import Probes
from sslx.models import heads
from sslx.models.layers import lecun
from sslx.models.resnet import resnet
from sslx.objectives.simclr import SimCLR
from sslx.optim import ClassicLARS, scaled
from sslx.schedules import Cosine, Warmup
from sslx.views import simclr

TRAIN = 1_281_167  # images
SETS = ("tfds:imagenet2012:train", "tfds:imagenet2012:validation")


def config(
    depth: int = 50,
    width: int = 1,
    epochs: int = 100,
    batch_size: int = 4096,
    rate: float = 0.3,
    decay: float = 1e-4,
    data: str = SETS[0],
    labelled: str = "",  # what the probes learn from: a tenth of the data
    test: str = "",  # of other data: a share is held out
) -> Config:
    decode, half = Image(384, fit="pad"), jnp.bfloat16
    data, test = train_and_test(data, test, SETS)
    tenth = "tfds:imagenet2012:train[:10%]" if data == SETS[0] else Part(data, 10)
    per_epoch = TRAIN // batch_size
    steps, warm = epochs * per_epoch, min(10, epochs // 4) * per_epoch
    encoder = resnet(depth, width, kernel_init=lecun, dtype=half)
    peak = scaled(rate, batch_size)
    return Config(
        objective=SimCLR(heads.Siamese(encoder, heads.simclr(dtype=half))),
        data=Pipeline(data, decode),
        views=simclr(224, share=224 / 256),
        optimizer=ClassicLARS(Warmup(warm, Cosine(peak, 0.0, steps - warm)), weight_decay=decay),
        steps=steps,
        batch_size=batch_size,
        evals={
            "probes": Probes(
                Pipeline(labelled or tenth, decode), Pipeline(test, decode), (KNN(), Health())
            )
        },
        log_every=100,
        save_every=per_epoch,
        eval_every=max(1, epochs // 10) * per_epoch,
    )
