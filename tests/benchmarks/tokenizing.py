"""MB of text per second of processor time, and peak memory, beside `datasets.map`.

    python tests/benchmarks/tokenizing.py [--sizes 10 100 1000] [--rounds 3] [--text FILE.parquet]

Same work on both sides, one process with one thread each: rows of .jsonl of about 4,000 characters,
the same tokenizer (WordPiece, 8,192 ids), windows of 128 tokens on disk. `datasets` does it as
`transformers`' run_mlm.py does, a map that encodes and a map that regroups (without the special
tokens and the segments that sslx adds); its caches are off. Rounds alternate; medians are printed
with their ratio. Peak memory is of a fresh process for each size: it should not grow. The text is
novels of ../shared/data, repeated up to the size, or random words where they are not.
"""

import sys

sys.path.pop(0)  # this folder, in which this file would be the standard library's `tokenize`

import argparse
import json
import os
import pathlib
import re
import resource
import statistics
import subprocess
import tempfile
import time

NOVELS = pathlib.Path(__file__).parents[3] / "shared/data/text/novels/train.parquet"
LENGTH, ROW = 128, 4000


def through_sslx(source, out, tokenizer):
    from sslx.data.text.tokenize import tokenize

    tokenize(source, out, tokenizer=tokenizer, length=LENGTH, workers=0)


def through_datasets(source, out, tokenizer):
    import datasets
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    datasets.disable_progress_bars()

    def encode(rows):
        return {"ids": [code.ids for code in encoder.encode_batch(rows["text"])]}

    def group(rows):
        ids = [id for row in rows["ids"] for id in row]
        return {"ids": [ids[i : i + LENGTH] for i in range(0, len(ids) // LENGTH * LENGTH, LENGTH)]}

    rows = datasets.load_dataset("json", data_files=source, cache_dir=out, split="train")
    rows = rows.map(encode, batched=True, remove_columns=["text"])
    rows.map(group, batched=True)


SIDES = {"sslx": through_sslx, "datasets": through_datasets}


def child(side, source, out, tokenizer):
    """In a process of its own: processor seconds, seconds and peak bytes, as JSON."""
    begin, clock = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    SIDES[side](source, out, tokenizer)
    end = resource.getrusage(resource.RUSAGE_SELF)
    cpu = end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime
    print(json.dumps([cpu, time.perf_counter() - clock, peak()]))


def peak():
    """Bytes this program held at most; Linux. (ru_maxrss would count the parent it forked from.)"""
    [line] = re.findall(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return int(line) * 1024


def measure(side, source, tokenizer):
    env = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir=os.path.dirname(source)) as out:
        command = [sys.executable, __file__, "--child", side, source, f"{out}/out", tokenizer]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def corpus(folder, megabytes, text):
    """A .jsonl of that size, of rows of the text over and over."""
    path, written = f"{folder}/{megabytes}.jsonl", 0
    lines = [json.dumps({"text": row}) + "\n" for row in split(text)]
    with open(path, "w") as file:
        while written < megabytes * 1_000_000:
            for line in lines:
                written += file.write(line)
                if written >= megabytes * 1_000_000:
                    break
    return path


def split(text):
    return [text[i : i + ROW] for i in range(0, len(text), ROW)]


def words():
    """Where there is no text: 10 MB of words that no language has."""
    import random

    draw = random.Random(0)
    known = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(1, 9))) for _ in range(20_000)]
    return " ".join(draw.choices(known, k=1_500_000))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000], help="in MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", default=str(NOVELS), help="Parquet with a column `text`")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    from sslx.data.text.tokenizers import train_tokenizer

    if os.path.exists(args.text):
        import pyarrow.parquet as pq

        body = "\n".join(pq.read_table(args.text, columns=["text"])["text"].to_pylist())
    else:
        body = words()
    have = subprocess.run([sys.executable, "-c", "import datasets"], capture_output=True)
    sides = [side for side in SIDES if side == "sslx" or not have.returncode]
    if len(sides) < 2:
        print("no `datasets` here to compare with: pip install datasets")
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(lambda: split(body[:5_000_000]), 8192).save(f"{folder}/tokenizer.json")
        for size in args.sizes:
            source, found = corpus(folder, size, body), {side: [] for side in sides}
            for _ in range(args.rounds if size < 100 else 1):
                for side in sides:
                    found[side].append(measure(side, source, folder))
            rates = {s: [size / cpu for cpu, _, _ in runs] for s, runs in found.items()}
            print(f"{size} MB")
            for side, runs in found.items():
                held = statistics.median(most for _, _, most in runs) / 1e6
                each = " ".join(f"{rate:.2f}" for rate in rates[side])
                rate = statistics.median(rates[side])
                print(f"  {side:9} {rate:6.2f} MB/s/core [{each}]   peak {held:6.0f} MB")
            if len(sides) > 1:
                ratio = statistics.median(rates["sslx"]) / statistics.median(rates["datasets"])
                print(f"  {'ratio':9} {ratio:6.2f}", flush=True)
            os.remove(source)


if __name__ == "__main__":
    main()
