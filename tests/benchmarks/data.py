"""Images per second per core: sslx against a torch DataLoader that does the same with Pillow.

    python tests/benchmarks/data.py [--data GLOB --size 224] [--workers 2] [--rounds 3]

Same work on both sides: shuffled reading, decoding, short side to `size`, center crop, uint8
batches in the parent process; same number of worker processes, Parquet and ArrayRecord. Rounds
alternate, workers start before the clock does, and medians are printed with their ratio. Processor
time counts workers and parent, and holds on a machine with other work; wall time does not. Without
--data: CIFAR-10 and the ImageNet sample of ../shared/data, or synthetic JPEGs where they are not.
"""

import argparse
import contextlib
import glob
import io
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np

from sslx.data import uri
from sslx.data.formats.arrayrecord import write_arrayrecord
from sslx.data.image import Image
from sslx.data.pipeline import Pipeline

SHARED = os.path.join(os.path.dirname(__file__), "../../../shared/data/images")


class Pictures:
    """The torch side: a map-style dataset over the same files, decoded as users write it."""

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __len__(self):
        return len(self.source)

    def __getitems__(self, indices):  # torch asks for a batch at a time, as sslx does
        return [self.decode(record) for record in self.source.records(indices)]

    def decode(self, record):
        import torch
        from PIL import Image

        picture = Image.open(io.BytesIO(record["image"])).convert("RGB")
        w, h = picture.size
        s = self.size
        if min(w, h) != s:
            w, h = (s, s * h // w) if w < h else (s * w // h, s)
            picture = picture.resize((w, h), Image.Resampling.BICUBIC)
        if (w, h) != (s, s):
            left, top = round((w - s) / 2), round((h - s) / 2)
            picture = picture.crop((left, top, left + s, top + s))
        return torch.from_numpy(np.array(picture))


def through_sslx(source, size, batch_size, workers):
    with Pipeline(source, Image(size), workers=workers).batches(0, batch_size) as batches:
        yield from batches


def through_torch(source, size, batch_size, workers):
    from torch.utils.data import DataLoader

    loader = DataLoader(
        Pictures(source, size),
        batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,
    )
    while True:
        yield from loader


def rate(batches, images, batch_size, workers):
    """Images per second of processor time and per second, once the first buffers are emptied."""
    for _ in range(4 * max(workers, 1)):
        next(batches)
    steps = max(1, images // batch_size)
    clock, cpu = time.perf_counter(), processor_seconds()
    for _ in range(steps):
        next(batches)
    clock, cpu = time.perf_counter() - clock, processor_seconds() - cpu
    batches.close()
    return steps * batch_size / cpu, steps * batch_size / clock


def processor_seconds():
    """Of this process and its children so far; Linux."""
    ticks = 0
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, _, rest = pathlib.Path(path).read_text().rpartition(")")
            numbers = rest.split()
            if str(os.getpid()) in (pid.split()[0], numbers[1]):
                ticks += int(numbers[11]) + int(numbers[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def compare(title, source, size, batch_size, images, workers, rounds):
    sides = {"sslx": through_sslx, "torch": through_torch}
    rates = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            batches = side(source, size, batch_size, workers)
            rates[name].append(rate(batches, images, batch_size, workers))
    print(title)
    for k, unit in enumerate(("images/s/core (processor time)", "images/s (wall)")):
        a, b = ([round(r[k]) for r in rates[name]] for name in ("sslx", "torch"))
        ratio = statistics.median(a) / statistics.median(b)
        print(f"  {unit:31} sslx {statistics.median(a):6.0f}  torch {statistics.median(b):6.0f}")
        print(f"  {'':31} ratio {ratio:.2f}   {a} {b}", flush=True)


def synthetic(folder, count=512, side=320):
    """Parquet of smooth random JPEGs, which compress about as photographs do."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rng, rows = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        data = io.BytesIO()
        coarse.resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(data, "JPEG")
        rows.append({"bytes": data.getvalue(), "path": None})
    path = os.path.join(folder, "synthetic.parquet")
    pq.write_table(pa.table({"image": rows}), path, row_group_size=100)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="glob of Parquet files")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, help="measured in each round")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cifar, sample = f"{SHARED}/cifar10/train-*.parquet", f"{SHARED}/imagenet_sample/*.parquet"
        if args.data:
            sets = {"data": (args.data, args.size, 2000)}
        elif glob.glob(cifar) and glob.glob(sample):
            sets = {"CIFAR-10 32": (cifar, 32, 40_000), "ImageNet sample 224": (sample, 224, 3000)}
        else:
            sets = {"synthetic 224": (synthetic(folder), 224, 2000)}
        for title, (pattern, size, images) in sets.items():
            table = uri.open_uri(f"parquet:{pattern}")
            files = write_arrayrecord(table, os.path.join(folder, str(size)))
            for kind, source in (
                ("Parquet", table),
                ("ArrayRecord", uri.arrayrecord(files[0])),
            ):
                numbers = (args.batch, args.images or images, args.workers, args.rounds)
                compare(f"{title} {kind}", source, size, *numbers)


if __name__ == "__main__":
    main()
