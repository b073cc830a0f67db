"""Augmentation alone: source images per second of each recipe of views, jitted.

    python tests/benchmarks/views.py [simclr byol ...] [--sizes 32 224] [--batch 128] [--rounds 5]

An image counts once, whatever its number of views (last column). Each recipe reads uint8 canvases,
32 pixels for crops of 32, else 256 for every 224, and is timed to `block_until_ready`; the median
of the rounds counts. The device is jax's default one; JAX_PLATFORMS chooses another.
"""

import argparse
import statistics
import time

import jax
import jaxlib
import numpy as np

from sslx import views

CHANNELS = {"digits": 1}  # of three, if not named here
RECIPES = {
    "mae": views.mae,
    "simclr": views.simclr,
    "byol": views.byol,
    "cifar": lambda size: views.cifar(size=size),
    "cifar_asymmetric": lambda size: views.cifar_asymmetric(size=size),
    "digits": views.digits,
}


def batch_of(examples, size, channels):
    canvas = size if size <= 32 else size * 256 // 224
    image = np.random.default_rng(0).integers(0, 256, (examples, canvas, canvas, channels))
    extent = np.full((examples, 2), canvas, np.int32)
    return jax.device_put({"image": image.astype(np.uint8), "extent": extent})


def measured(view, batch, rounds, repeats):
    """(images per second, seconds to compile, bytes of scratch memory, views by leaf)."""
    key, start = jax.random.key(0), time.perf_counter()
    work = jax.jit(view).lower(key, batch).compile()
    compiled = time.perf_counter() - start
    shapes = {k: x.shape for k, x in jax.block_until_ready(work(key, batch)).items()}
    times = []
    for i in range(rounds):
        keys = jax.random.split(jax.random.key(i + 1), repeats)
        start = time.perf_counter()
        for key in keys:
            out = work(key, batch)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / repeats)
    scratch = work.memory_analysis().temp_size_in_bytes
    rendered = " + ".join(str(s[1] if len(s) == 5 else 1) for s in shapes.values())
    return len(batch["image"]) / statistics.median(times), compiled, scratch, rendered


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", metavar="recipe", help=", ".join(RECIPES))
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="calls in a round")
    args = parser.parse_args()
    unknown = set(args.recipes) - RECIPES.keys()
    if unknown:
        parser.error(f"no recipe {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, jaxlib {jaxlib.__version__}, batch {args.batch}")
    print(("{:18}" + "{:>11}" * 5).format("", "px", "images/s", "compile s", "scratch MB", "views"))
    for size in args.sizes:
        for name in args.recipes or RECIPES:
            batch = batch_of(args.batch, size, CHANNELS.get(name, 3))
            view = RECIPES[name](size).train
            speed, compiled, scratch, rendered = measured(view, batch, args.rounds, args.repeats)
            print(
                f"{name:18}{size:11}{speed:11.1f}{compiled:11.1f}{scratch / 1e6:11.1f}"
                f"{rendered:>11}",
                flush=True,
            )


if __name__ == "__main__":
    main()
