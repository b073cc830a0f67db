"""A recipe that takes seconds, compiling included, and that tests can hold and poison."""

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sslx.config import Config
from sslx.data.image import Image
from sslx.data.pipeline import Pipeline
from sslx.data.source import Source
from sslx.evals.health import Health
from sslx.evals.knn import KNN
from sslx.evals.probes import Probes
from sslx.models.encoder import Floor, Signature, encoder
from sslx.models.layers import Dense
from sslx.models.vit import ViT
from sslx.objectives.base import Objective
from sslx.objectives.mae import MAE, Decoder
from sslx.ops.image import thumbnail
from sslx.ops.patches import grid, patchify
from sslx.optim import AdamW
from sslx.schedules import Constant
from sslx.views import mae as crop

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


class Patches(nn.Module):
    """Image [B, H, W, C] -> tokens [B, N, D], each of its own patch alone."""

    width: int
    patch: int

    @property
    def signature(self) -> Signature:
        return Signature(("image",), floor=Floor("pixels", thumbnail))

    @nn.compact
    def __call__(self, image, train=False):
        x = Dense(self.width, (None, "embed"), name="patch")(patchify(image, self.patch))
        return Dense(self.width, ("embed", "mlp"), name="mlp")(jnp.tanh(x))


@dataclass(frozen=True)
class Denoiser(Objective):
    """An image from the half of its pixels; its loss is not a number at step `poison`.

    (It stands for every method where the loop, checkpoints and the command line are tested: it
    compiles in a third of the time of MAE, and draws, shards and learns as that does.)
    """

    encoder: Patches
    poison: int = -1

    def init(self, key, batch):
        image, keys = batch["image"], jax.random.split(key)
        encoder = self.encoder.init(keys[0], image)["params"]
        tokens = self.encoder.apply({"params": encoder}, image)
        return {
            "encoder": encoder,
            "pixels": self.pixels(image).init(keys[1], tokens)["params"],
        }, {}

    def loss(self, params, buffers, batch, key, step):
        image = batch["image"]
        seen = image * jax.random.bernoulli(key, shape=image.shape)
        tokens = self.encoder.apply({"params": params["encoder"]}, seen, train=True)
        pixels = self.pixels(image).apply({"params": params["pixels"]}, tokens)
        loss = jnp.square(pixels - patchify(image, self.encoder.patch)).mean()
        return jnp.where(step + 1 == self.poison, jnp.nan, 1.0) * loss, (buffers, {})

    def pixels(self, image):
        return Dense(grid(image, self.encoder.patch)[2], ("mlp", None))

    def encoders(self, params, buffers):
        return {"encoder": encoder(self.encoder, {"params": params["encoder"]})}


def config(
    steps: int = 40,
    batch_size: int = 16,
    data: str = "",
    size: int = 8,
    channels: int = 1,
    probes: bool = False,
    mae: bool = False,
) -> Config:
    decode = Image(size, channels=channels)
    autoencoder = MAE(ViT(16, 1, 2, patch=2, remat="none"), Decoder(16, 1, 2, remat="none"))
    sets = (Pipeline(f"digits:{split}", decode) for split in ("train", "test"))
    return Config(
        objective=autoencoder if mae else Denoiser(Patches(16, 2)),
        data=Pipeline(data or Held(), decode, max_corrupt=0.1),
        views=crop(size, statistics=((0.3,), (0.37,))),
        optimizer=AdamW(Constant(1e-3), weight_decay=0.01),
        steps=steps,
        batch_size=batch_size,
        evals={"probes": Probes(*sets, on=(KNN(5), Health()), pairs=64)} if probes else {},
        log_every=5,
        save_every=20,
        eval_every=20,
    )
