"""BYOL on ImageNet-1k with a ResNet-50, as deepmind-research/byol has it (arXiv:2006.07733).

    sslx train configs/byol_resnet50_imagenet.py data=tfds:imagenet2012:train --workdir RUN

Published: linear probe 74.3 after 1,000 epochs (the paper; 74.0 to 74.5 by its README), 8 hours on
512 TPU v3; 68.6 after 100 epochs (solo-learn). Ours: no run yet.

`epochs` between the published ones takes the preset below it. Departures: the stride of a
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
from sslx.objectives.byol import BYOL
from sslx.optim import LARS, scaled
from sslx.schedules import Cosine, Warmup
from sslx.views import byol

TRAIN = 1_281_167  # images
SETS = ("tfds:imagenet2012:train", "tfds:imagenet2012:validation")
PRESETS = {  # epochs: learning rate for a batch of 256, weight decay, first tau of the target
    40: (0.45, 1e-6, 0.97),
    100: (0.45, 1e-6, 0.99),
    300: (0.3, 1e-6, 0.99),
    1000: (0.2, 1.5e-6, 0.996),
}


def config(
    depth: int = 50,
    width: int = 1,
    epochs: int = 1000,
    batch_size: int = 4096,
    data: str = SETS[0],
    labelled: str = "",  # what the probes learn from: a tenth of the data
    test: str = "",  # of other data: a share is held out
) -> Config:
    decode, half = Image(384, fit="pad"), jnp.bfloat16
    rate, decay, tau = PRESETS[max((n for n in PRESETS if n <= epochs), default=min(PRESETS))]
    data, test = train_and_test(data, test, SETS)
    tenth = "tfds:imagenet2012:train[:10%]" if data == SETS[0] else Part(data, 10)
    per_epoch = TRAIN // batch_size
    steps, warm = epochs * per_epoch, min(10, epochs // 4) * per_epoch
    encoder = resnet(depth, width, kernel_init=lecun, dtype=half)
    net = heads.Siamese(encoder, heads.byol(dtype=half), heads.byol(dtype=half))
    peak = scaled(rate, batch_size)
    return Config(
        objective=BYOL(net, Cosine(tau, 1.0, steps)),
        data=Pipeline(data, decode),
        views=byol(224, share=224 / 256),
        optimizer=LARS(Warmup(warm, Cosine(peak, 0.0, steps - warm)), weight_decay=decay),
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
