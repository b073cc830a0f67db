"""MAE on ImageNet-1k, FAIR's recipe to the digit (arXiv:2111.06377; facebookresearch/mae).

    sslx train configs/mae_vit_imagenet.py variant=L data=tfds:imagenet2012:train --workdir RUN

Published after 1,600 epochs: fine-tuning B 83.6, L 85.9, H 86.9; linear probe B 68.0, L 75.8,
H 76.6. Ours: no run yet. FAIR's ViT-L takes 42 hours on 64 V100 for 800 epochs.

Compiled for TPU v5e:4x4 (`sslx plan`, 2026-11-29, jax 0.10.1, libtpu 0.0.41), ViT-L, 64 images a
device, fsdp=16: 1.10 GB of temporaries a device. With remat=dots 4.38 GB and 3 % more cycles by the
compiler's own estimate (2026-11-20, 0.10.2), so all of a block is computed again here.

Departures: pictures are shrunk to 384 px on the long side before the random crop, which is then
cut on the accelerator; bfloat16 with float32 params in place of float16 with a scaler. The residual
stream is bfloat16 too; FAIR's is float32, since autocast adds float16 to float32 position tables.
"""

import jax.numpy as jnp

from sslx.config import Config
from sslx.data.image import Image
from sslx.data.part import Part, train_and_test
from sslx.data.pipeline import Pipeline
from sslx.evals.health import Health
from sslx.evals.knn import KNN
from sslx.evals.pictures import Reconstructions
from sslx.evals.probes import Probes
from sslx.models.vit import vit
from sslx.objectives.mae import MAE, Decoder
from sslx.optim import AdamW, scaled
from sslx.schedules import Cosine, Warmup
from sslx.views import IMAGENET, mae

TRAIN = 1_281_167  # images
SETS = ("tfds:imagenet2012:train", "tfds:imagenet2012:validation")


def config(
    variant: str = "L",
    epochs: int = 800,
    batch_size: int = 4096,
    data: str = SETS[0],
    labelled: str = "",  # what the probes learn from: a tenth of the data
    test: str = "",  # of other data: a share is held out
) -> Config:
    decode = Image(384, fit="pad")
    bf16 = {"dtype": jnp.bfloat16, "remat": "full"}
    data, test = train_and_test(data, test, SETS)
    tenth = "tfds:imagenet2012:train[:10%]" if data == SETS[0] else Part(data, 10)
    per_epoch = TRAIN // batch_size
    steps, warm = epochs * per_epoch, 40 * per_epoch
    rate = scaled(1.5e-4, batch_size)
    held_out = Pipeline(test, decode)
    return Config(
        objective=MAE(vit(variant, 14 if variant == "H" else 16, **bf16), Decoder(**bf16)),
        data=Pipeline(data, decode),
        views=mae(224, share=224 / 256),
        optimizer=AdamW(Warmup(warm, Cosine(rate, 0.0, steps - warm)), b2=0.95, weight_decay=0.05),
        steps=steps,
        batch_size=batch_size,
        evals={
            "probes": Probes(Pipeline(labelled or tenth, decode), held_out, on=(KNN(), Health())),
            "pictures": Reconstructions(held_out, *IMAGENET),
        },
        log_every=100,
        save_every=per_epoch,
        eval_every=50 * per_epoch,
    )
