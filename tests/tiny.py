"""A recipe that takes seconds, compiling included, and that tests can hold and poison."""

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sslx.config import Config
from sslx.data.image import Image
from sslx.data.pipeline import Pipeline
from sslx.data.source import Source
from sslx.evals.health import Health
from sslx.evals.knn import KNN
from sslx.evals.probes import Probes
from sslx.models.vit import ViT
from sslx.objectives.mae import MAE, Decoder
from sslx.optim import AdamW
from sslx.schedules import Constant
from sslx.views import mae

BATCHES = Counter()


@dataclass(frozen=True)
class Held(Source):
    """Waves of ten frequencies, which are there at once where digits would be parsed; they stop
    after `HELD_AFTER` batches of a process while the file `HELD` is there."""

    leaves = ("image",)
    resident = True

    def __len__(self):
        return 1440

    def __getitem__(self, index):
        across, down = np.meshgrid(np.arange(8), np.arange(8))
        wave = np.sin((1 + index % 10) * across / 3 + index * down / 200)
        image = np.uint8(127.5 * (1 + wave))[..., None]
        return {"image": image, "label": index % 10, "name": f"wave {index}"}

    def records(self, indices):
        BATCHES["read"] += 1
        if BATCHES["read"] > int(os.environ.get("HELD_AFTER", 10**9)):
            while Path(os.environ["HELD"]).exists():
                time.sleep(0.02)
        return super().records(indices)


@dataclass(frozen=True)
class Poisoned(MAE):
    """MAE whose loss is not a number at one step."""

    poison: int = -1

    def loss(self, params, buffers, batch, key, step):
        loss, aux = super().loss(params, buffers, batch, key, step)
        return jnp.where(step + 1 == self.poison, jnp.nan, 1.0) * loss, aux


def config(
    steps: int = 40,
    batch_size: int = 16,
    data: str = "",
    size: int = 8,
    channels: int = 1,
    probes: bool = False,
    poison: int = -1,
) -> Config:
    decode = Image(size, channels=channels)
    sets = (Pipeline(f"digits:{split}", decode) for split in ("train", "test"))
    return Config(
        objective=Poisoned(
            ViT(16, 1, 2, patch=2, remat="none"), Decoder(16, 1, 2, remat="none"), poison=poison
        ),
        data=Pipeline(data or Held(), decode, max_corrupt=0.1),
        views=mae(size, statistics=((0.3,), (0.37,))),
        optimizer=AdamW(Constant(1e-3), weight_decay=0.01),
        steps=steps,
        batch_size=batch_size,
        evals={"probes": Probes(*sets, on=(KNN(5), Health()), pairs=64)} if probes else {},
        log_every=5,
        save_every=20,
        eval_every=20,
    )
