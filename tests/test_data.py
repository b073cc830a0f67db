"""The law of batches, corrupt records, sources and decoding; every file is made here."""

import io
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import PIL.Image
import pytest

from sslx.data import uri as uris
from sslx.data.formats.arrayrecord import write_arrayrecord
from sslx.data.formats.arrays import arrays
from sslx.data.image import Image
from sslx.data.pipeline import Pipeline
from sslx.data.source import DataError

N = 23  # records of the small set below: no batch size used here divides it


def encode(pixels, kind="PNG", mode=None, **options):
    data = io.BytesIO()
    picture = PIL.Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(data, kind, **options)
    return data.getvalue()


def numbered(i, h=9, w=7):
    """A picture that says which record it is: exact in PNG at any one size."""
    pixels = np.random.default_rng(i).integers(0, 256, (h, w, 3), dtype=np.uint8)
    pixels[0, 0] = i
    return pixels


def write_parquet(path, images, labels=None, **options):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"bytes": image, "path": None} for image in images]
    columns = {"image": pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    pq.write_table(pa.table(columns), path, **options)
    return f"parquet:{path}"


@pytest.fixture
def small(tmp_path):
    """N square pictures of 8 x 8, in row groups of 5; record i is labelled i."""
    images = [encode(numbered(i, 8, 8)) for i in range(N)]
    return write_parquet(tmp_path / "small.parquet", images, range(N), row_group_size=5)


def take(batches, count):
    with batches:
        return [next(batches) for _ in range(count)]


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]), name


def shares(batch_size, hosts):
    """The rows of each of several hosts, one after another."""
    return np.arange(batch_size).reshape(hosts, -1).tolist()


# The law


def test_law_holds_for_hosts_workers_and_starts(small):
    pipeline = Pipeline(small, Image(8), labels=True, workers=0)
    whole = take(pipeline.batches(seed=3, batch_size=8), 9)
    assert set(whole[0]) == {"image", "extent", "label"}
    assert whole[0]["image"].shape == (8, 8, 8, 3) and whole[0]["image"].dtype == np.uint8
    for batch in whole:  # labels belong to their pictures
        assert np.array_equal(batch["image"][:, 0, 0, 0], batch["label"])
    for hosts, start in ((1, 4), (2, 0), (2, 5), (4, 3), (8, 0)):
        parts = [take(pipeline.batches(3, 8, start, rows), 9 - start) for rows in shares(8, hosts)]
        assert not any(part[s]["dropped"].any() for part in parts for s in range(9 - start))
        joined = [
            {name: np.concatenate([part[s][name] for part in parts]) for name in whole[0]}
            for s in range(9 - start)
        ]
        same(joined, whole[start:])


def test_law_holds_for_worker_processes(small):
    mixture = ((small, 2.0), ("digits:test", 1.0))
    threads = Pipeline(mixture, Image(8), workers=0)
    processes = Pipeline(mixture, Image(8), workers=2)
    assert threads == processes and hash(threads) == hash(processes)
    same(
        take(processes.batches(1, 6, start=7, rows=(1, 2, 5)), 7),
        take(threads.batches(1, 6, start=7, rows=(1, 2, 5)), 7),
    )


def test_law_is_one_known_order(small):
    """A golden order: if this fails, checkpoints of older runs no longer resume on their data."""
    batch = take(Pipeline(small, Image(8), labels=True).batches(seed=0, batch_size=12), 1)[0]
    assert batch["label"].tolist() == [18, 8, 16, 7, 20, 13, 1, 0, 19, 17, 10, 9]


def test_epochs_are_permutations_and_differ(small):
    pipeline = Pipeline(small, Image(8), labels=True, workers=0)
    orders = {}
    for seed in (0, 1):
        labels = np.concatenate([b["label"] for b in take(pipeline.batches(seed, 10), 7)])
        for epoch in range(3):
            order = labels[epoch * N : (epoch + 1) * N].tolist()
            assert sorted(order) == list(range(N))
            orders[seed, epoch] = tuple(order)
    assert tuple(range(N)) not in orders.values()
    assert len(set(orders.values())) == 6  # seed 1 is not seed 0 one epoch later


def test_batches_without_labels_carry_none(small):
    assert set(take(Pipeline(small, Image(8)).batches(0, 4), 1)[0]) == {"image", "extent"}


def test_mixture_has_its_proportions(small, tmp_path):
    dark = [encode(np.full((8, 8, 3), 200 + i, np.uint8)) for i in range(5)]
    other = write_parquet(tmp_path / "dark.parquet", dark)
    pipeline = Pipeline(((small, 3.0), (other, 1.0)), Image(8), workers=0)
    assert len(pipeline) == N + 5
    first = np.concatenate([b["image"][:, 0, 0, 0] for b in take(pipeline.batches(0, 40), 10)])
    assert 290 <= np.sum(first < N) <= 310
    for part in (first[first < N][: 2 * N], first[first >= N][:10]):  # epochs of each are its own
        assert set(Counter(part.tolist()).values()) == {2}


@pytest.mark.parametrize("batch_size, rows", [(8, [8]), (8, [-1]), (8, [1, 1]), (8, []), (0, None)])
def test_rows_that_are_none_of_the_batch_are_refused(small, batch_size, rows):
    with pytest.raises(DataError, match=rf"a global batch of {batch_size}"):
        Pipeline(small, Image(8)).batches(0, batch_size, rows=rows)


@pytest.mark.parametrize("batch_size, hosts", [(8, 1), (8, 2), (N, 1), (64, 4)])
def test_epoch_visits_every_record_once(small, batch_size, hosts):
    pipeline = Pipeline(small, Image(8), workers=0)
    parts = [list(pipeline.epoch(batch_size, rows)) for rows in shares(batch_size, hosts)]
    assert {len(part) for part in parts} == {-(-N // batch_size)}
    seen = []
    for step in zip(*parts, strict=True):
        assert all(b["image"].shape == (batch_size // hosts, 8, 8, 3) for b in step)
        for b in step:
            assert b["valid"].dtype == bool and b["label"].dtype == np.int32
            seen += b["label"][b["valid"]].tolist()
    assert seen == list(range(N))


@pytest.mark.parametrize("close", ["close", "forget"])
def test_a_program_keeps_its_main_and_leaves_nothing_behind(small, tmp_path, close):
    """Workers end with the program, its __main__ is as it was, and nothing is warned of."""
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, sys\n"
        "from sslx.data.pipeline import Pipeline\n"
        "from sslx.data.image import Image\n"
        "class Dark(Image):\n"
        "    def __call__(self, record, rng):\n"
        "        example = super().__call__(record, rng)\n"
        "        return example | {'image': example['image'] // 2}\n"
        "if __name__ == '__main__':\n"
        "    main = dict(vars(sys.modules['__main__']))\n"
        f"    it = Pipeline({small!r}, Dark(8), workers=1).batches(0, 4)\n"
        "    images = [next(it)['image'] for _ in range(3)]\n"
        "    assert len(multiprocessing.active_children()) == 1\n"
        "    assert main.items() <= vars(sys.modules['__main__']).items()\n"
        "    if 'close' in sys.argv: it.close(); assert not multiprocessing.active_children()\n"
        "    print('ran', max(x.max() for x in images) < 128, __file__[-10:])\n"
    )
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-W", "error", program, close]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "ran True program.py\n", "")
    left, began = set(os.listdir("/dev/shm")) - before, time.monotonic()
    while left & set(os.listdir("/dev/shm")) and time.monotonic() - began < 20:
        time.sleep(0.1)  # what tests beside this one have there goes away
    assert not left & set(os.listdir("/dev/shm"))


def test_a_killed_worker_ends_the_batches(small):
    """As the kernel does when memory runs out; what else it had to give is not waited for."""
    with Pipeline(small, Image(8), workers=2).batches(0, 4) as batches:
        next(batches)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(DataError, match=r"exit code -9.*data\.workers=1"):
            while time.monotonic() - began < 60:
                next(batches)
    assert time.monotonic() - began < 20


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(one)


class Own(DataError):
    def __init__(self, one, two):
        super().__init__(one)


@dataclass(frozen=True)
class Failing(Image):
    """A decoder that raises what no queue carries, or leaves, or makes what it did not say."""

    error: str = ""

    def __call__(self, record, rng):
        if self.error == "other":
            return {"image": np.zeros((9, 8, 3), np.uint8)}
        if self.error == "exit":
            raise SystemExit("left")
        raise (Own if self.error == "own" else Unpicklable)("wrong", 2)


FAILURES = {
    "exit": "SystemExit: left",
    "x": "Unpicklable: wrong",
    "own": r"^wrong\b",
    "other": r"Failing\(size=8.* made {'image': \(9, 8, 3\)} of .*, but its `shapes` are {'image'",
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error, text", FAILURES.items())
def test_an_exception_in_a_decoder_arrives_with_its_text(small, error, text, workers):
    began = time.monotonic()
    with pytest.raises(DataError, match=text):
        take(Pipeline(small, Failing(8, error=error), workers=workers).batches(0, 4), 1)
    assert time.monotonic() - began < 20


# Random decoders and arrays


@dataclass(frozen=True)
class Noisy:
    """A decoder that draws: the record's first pixel, and a random number."""

    reads = ("image",)

    @property
    def shapes(self):
        return {"pixel": ((), np.int32), "noise": ((), np.float32)}

    def __call__(self, record, rng):
        pixel = Image(8)(record)["image"][0, 0, 0]
        return {"pixel": np.int32(pixel), "noise": np.float32(rng.random())}


def test_a_decoder_s_random_numbers_are_those_of_seed_step_and_row(small):
    """(seed, step * batch_size + row) keys Philox; hosts, workers and restarts do not matter."""
    pipeline = Pipeline(small, Noisy(), workers=0)
    whole = take(pipeline.batches(seed=3, batch_size=8), 6)
    for step, batch in enumerate(whole):
        for row, noise in enumerate(batch["noise"]):
            key = np.array([3, step * 8 + row], np.uint64)
            rng = np.random.Generator(np.random.Philox(key=key))
            assert noise == np.float32(rng.random())
    processes = replace(pipeline, workers=2)
    hosts = zip((pipeline, processes), shares(8, 2), strict=True)
    parts = [take(host.batches(3, 8, 2, rows), 4) for host, rows in hosts]
    for k, batch in enumerate(whole[2:]):
        for name, x in batch.items():
            joined = np.concatenate([part[k][name] for part in parts])
            np.testing.assert_array_equal(joined, x)


def test_arrays_are_a_source_like_any_other():
    x = np.random.default_rng(0).normal(size=(50, 4))
    y = np.arange(50)
    source = arrays(spectrum=x, label=y)
    pipeline = Pipeline(source)
    assert pipeline.shapes(8) == {"spectrum": ((8, 4), np.float32)}
    batches = take(pipeline.batches(1, 10), 12)
    assert all(batch.keys() == {"spectrum"} for batch in batches)
    rows = np.concatenate([batch["spectrum"] for batch in batches[:5]])
    np.testing.assert_array_equal(np.sort(rows, 0), np.sort(x.astype(np.float32), 0))
    slow = Pipeline(source, OneByOne())  # the same order as decoding one by one
    for fast, other in zip(batches, take(slow.batches(1, 10), 12), strict=True):
        np.testing.assert_array_equal(fast["spectrum"], other["spectrum"])
    *_, last = pipeline.epoch(16)
    assert last["valid"].tolist() == [True] * 2 + [False] * 14
    labels = np.concatenate([b["label"][b["valid"]] for b in pipeline.epoch(16)])
    assert labels.tolist() == y.tolist() and labels.dtype == np.int32
    mixed = Pipeline(((source, 1.0), (arrays(spectrum=x[:7]), 1.0)))
    assert next(mixed.batches(0, 4))["spectrum"].shape == (4, 4)


@dataclass(frozen=True)
class OneByOne:
    """A decoder that gives back the spectrum of a record."""

    reads = ("spectrum",)

    @property
    def shapes(self):
        return {"spectrum": ((4,), np.float32)}

    def __call__(self, record, rng):
        return {"spectrum": record["spectrum"]}


def test_arrays_are_values():
    x = np.ones((3, 2), np.float32)
    source = arrays(spectrum=x)
    assert source == arrays(spectrum=x.copy()) and hash(source) == hash(arrays(spectrum=x))
    assert source != arrays(spectrum=x + 1) and "float32[3, 2]" in repr(source)
    assert pickle.loads(pickle.dumps(source)) == source
    odd = arrays(
        a=np.arange(3, dtype=">f4"), b=np.arange(3, dtype=np.longdouble), c=np.ones(3, bool)
    )
    assert [str(dtype) for _, dtype in odd.shapes.values()] == ["float32", "float32", "bool"]
    assert odd.table["a"].tolist() == [0, 1, 2] and odd.table["a"].dtype.isnative
    for columns, words in (
        ({}, "at least one array"),
        ({"label": [1]}, "at least one array"),
        ({"a": x, "b": x[:2]}, "different lengths"),
        ({"a": np.array(["x"])}, "numbers with the example"),
        ({"a": 3.0}, "numbers with the example"),
        ({"a": x, "label": [0.5, 1, 2]}, "one whole number each"),
        ({"a": np.array([2**40])}, "more than 32 bits"),
        ({"a": np.array([-(2**40), 0])}, "holds -1099511627776, more than 32 bits"),
        ({"a": x, "label": np.array([0, 1, 2**31], np.uint32)}, "holds 2147483648, more"),
        ({"a": np.array([1e300])}, "holds more than float32 does"),
        ({"a": np.ma.array([1.0, 2.0], mask=[0, 1])}, "masked values: fill them"),
        ({"a": [[1, 2], [3]]}, "is no array"),
        ({"name": x}, "uses itself"),
    ):
        with pytest.raises(DataError, match=words):
            arrays(**columns)


def test_encoded_records_need_a_decoder(small):
    with pytest.raises(DataError, match="give the pipeline a decoder, such as Image"):
        Pipeline(small).shapes(4)


# Corrupt records


@pytest.fixture
def spoiled(tmp_path):
    """60 JPEGs; 7 is cut short, 8 is no picture, 20 is empty, 59 is cut short."""
    images = [encode(numbered(i, 8, 8), "JPEG") for i in range(60)]
    images[7], images[8], images[20] = images[7][:-30], b"not a picture", None
    images[59] = images[59][: len(images[59]) // 2]
    uri = write_parquet(tmp_path / "spoiled.parquet", images, range(60), row_group_size=25)
    return uri, {"#0:7", "#0:8", "#0:20", "#2:9"}


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_records_give_way_to_the_next(spoiled, workers, caplog):
    uri, names = spoiled
    good = [i for i in range(60) if i not in (7, 8, 20, 59)]
    next_good = {7: 9, 8: 9, 20: 21, 59: 0} | {i: i for i in good}
    pipeline = Pipeline(uri, Image(8), labels=True, max_corrupt=0.1, workers=workers)
    with caplog.at_level(logging.WARNING, "sslx"):
        batches = pipeline.batches(seed=5, batch_size=20)
        labels = np.concatenate([next(batches)["label"] for _ in range(6)])
        batches.close()
    assert {re.sub(".*parquet", "", name) for name in batches.dropped} == names
    assert "truncated" in next(r for n, r in batches.dropped.items() if n.endswith("#0:7"))
    assert sorted(r.args[0] for r in caplog.records) == sorted(batches.dropped)  # once each
    expected = Counter(next_good[i] for i in range(60))
    for epoch in (labels[:60], labels[60:]):
        assert Counter(epoch.tolist()) == expected
    if workers:
        same(
            take(pipeline.batches(5, 20), 3),
            take(Pipeline(uri, Image(8), True, 0.1, workers=0).batches(5, 20), 3),
        )


def test_epoch_marks_what_stands_in_for_corrupt_records(spoiled):
    batches = Pipeline(spoiled[0], Image(8), max_corrupt=0.1, workers=0).epoch(16)
    seen = np.concatenate([b["label"][b["valid"]] for b in batches])
    assert seen.tolist() == [i for i in range(60) if i not in (7, 8, 20, 59)]
    assert len(batches.dropped) == 4


@pytest.mark.parametrize("max_corrupt, workers", [(0.05, 0), (0.01, 0), (0.0, 0), (0.05, 1)])
def test_too_many_corrupt_records_stop_the_run(spoiled, max_corrupt, workers):
    pipeline = Pipeline(spoiled[0], Image(8), max_corrupt=max_corrupt, workers=workers)
    with pytest.raises(DataError, match=r"spoiled\.parquet#\d:\d+ \(.*raise max_corrupt"):
        take(pipeline.batches(0, 20), 3)


def test_one_corrupt_record_of_a_small_set_is_allowed(tmp_path):
    images = [encode(numbered(i, 8, 8)) for i in range(4)] + [b"?"]
    pipeline = Pipeline(write_parquet(tmp_path / "a.parquet", images), Image(8), workers=0)
    assert len(take(pipeline.batches(0, 5), 3)) == 3
    nothing = write_parquet(tmp_path / "b.parquet", [b"?"] * 4)
    with pytest.raises(DataError, match="too many of 4"):
        take(Pipeline(nothing, Image(8), max_corrupt=1.0, workers=0).batches(0, 2), 1)


def test_a_file_that_goes_away_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("sslx.data.source.PATIENCE", 0.1)
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encode(numbered(i)))
    pipeline = Pipeline(f"folder:{tmp_path}", Image(8), max_corrupt=1.0, workers=0)
    assert len(pipeline) == 4
    (tmp_path / "2.png").unlink()
    with pytest.raises(DataError, match=r"record 2 could .*2\.png.*restore"):
        take(pipeline.batches(0, 4), 1)


# Sources


def write_tfds(root, images, labels, shards=1):
    """What `tfds build --file_format=array_record` leaves, written without TensorFlow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    root = root / "tiny" / "1.0.0"
    root.mkdir(parents=True)
    image = tfds.features.Image(shape=(None, None, 3))
    label = tfds.features.ClassLabel(num_classes=3)
    tfds.features.FeaturesDict({"image": image, "label": label}).save_config(root)
    lengths = [len(part) for part in np.array_split(labels, shards)]
    pairs = zip(images, labels, strict=True)
    for k, length in enumerate(lengths):
        name = f"tiny-train.array_record-{k:05d}-of-{shards:05d}"
        file = ArrayRecordWriter(str(root / name), "group_size:1")
        for picture, number in itertools.islice(pairs, length):
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(picture)
            example.features.feature["label"].int64_list.value.append(number)
            file.write(example.SerializeToString())
        file.close()
    split = {"name": "train", "shardLengths": [str(n) for n in lengths], "numBytes": "1"}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    about = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (root / "dataset_info.json").write_text(json.dumps(about))


def test_all_sources_agree(tmp_path):
    images, labels = [encode(numbered(i)) for i in range(9)], [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / "folder" / "abc"[label]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / "abc"[label] / f"{i}.png").write_bytes(image)
    write_parquet(tmp_path / "0.parquet", images[:4], labels[:4], row_group_size=3)
    write_parquet(tmp_path / "1.parquet", images[4:], labels[4:], row_group_size=3)
    write_tfds(tmp_path, images, labels)
    table = uris.parquet(f"{tmp_path}/*.parquet")
    assert write_arrayrecord(table, f"{tmp_path}/a", shards=2) == [
        f"{tmp_path}/a-00000-of-00002",
        f"{tmp_path}/a-00001-of-00002",
    ]
    for uri in (
        f"parquet:{tmp_path}/*.parquet",
        f"folder:{tmp_path}/folder",
        f"arrayrecord:{tmp_path}/a-*",
        f"tfds:tiny:train?data_dir={tmp_path}",
        f"tfds:{tmp_path}/tiny/1.0.0:train",
    ):
        source = uris.open_uri(uri)
        assert len(source) == 9
        assert [source[i]["image"] for i in range(9)] == images, uri
        assert [source[i]["label"] for i in range(9)] == labels, uri
        assert len({source[i]["name"] for i in range(9)}) == 9
        copy = pickle.loads(pickle.dumps(source))  # opened, yet it pickles as its fields
        assert copy == source and hash(copy) == hash(source) and len(pickle.dumps(source)) < 400
        assert copy[8]["image"] == images[8]
        backwards = [8, 0, 4]
        assert source.records(backwards) == [source[i] for i in backwards]
        with pytest.raises(IndexError):
            source[9]
    assert uris.open_uri(f"folder:{tmp_path}/folder").classes == ["a", "b", "c"]


def test_plain_bytes_flat_folders_and_raw_records(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from array_record.python.array_record_module import ArrayRecordWriter

    image = encode(numbered(1))
    pq.write_table(pa.table({"img": [image], "id": [3]}), tmp_path / "plain.parquet")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "x.PNG").write_bytes(image)
    (tmp_path / "flat" / "notes.txt").write_text("not a picture")
    file = ArrayRecordWriter(f"{tmp_path}/raw.array_record", "group_size:1")
    file.write(image)
    file.close()
    for uri in ("parquet:plain.parquet", "folder:flat", "arrayrecord:raw.array_record"):
        scheme, name = uri.split(":")
        source = uris.open_uri(f"{scheme}:{tmp_path}/{name}")
        assert len(source) == 1 and source[0]["image"] == image and "label" not in source[0]


def test_paths_are_relative_or_of_the_home(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(uris.open_uri("parquet:small.parquet")) == len(uris.open_uri("parquet:~/s*")) == N


def test_digits_are_the_sklearn_digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, test = uris.open_uri("digits:train"), uris.open_uri("digits:test")
    assert (len(train), len(test), len(uris.digits())) == (1437, 360, 1797)
    assert train[0]["image"].shape == (8, 8, 1) and train[0]["image"].dtype == np.uint8
    assert np.abs(test[0]["image"][..., 0] / 255 - digits.images[1437] / 16).max() < 0.5 / 255
    assert test[0]["label"] == digits.target[1437]
    with pytest.raises(DataError, match="train, test"):
        uris.open_uri("digits:valid")


def test_row_groups_are_kept_within_bounds(small, monkeypatch, caplog):
    monkeypatch.setattr("sslx.data.formats.parquet.RESIDENT", 1)
    source = uris.open_uri(small)
    assert [source[i]["label"] for i in range(N)] == list(range(N))
    assert source.read.cache_info().maxsize == 2 and source.read.cache_info().misses == 5
    assert "write_arrayrecord" in caplog.text


def bad_source(tmp_path, case):
    """A URI with something wrong in it, and what the message must say."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "empty" / "inner").mkdir(parents=True)
    pq.write_table(pa.table({"text": ["a"], "id": [3]}), tmp_path / "text.parquet")
    (tmp_path / "junk").write_bytes(b"junk" * 50)
    return {
        "scheme": ("parqet:x", "did you mean parquet:x"),
        "no scheme": ("data.bin", "known: digits, parquet"),
        "no match": (f"parquet:{tmp_path}/missing*.parquet", "matches no file"),
        "directory": (f"parquet:{tmp_path}/empty", "is a folder"),
        "no column": (f"parquet:{tmp_path}/text.parquet", r"text: string, id: int64"),
        "not parquet": (f"parquet:{tmp_path}/junk", "not Parquet"),
        "no records": (write_parquet(tmp_path / "none.parquet", []), "no records"),
        "no folder": (f"folder:{tmp_path}/nowhere", "is no folder"),
        "empty folder": (f"folder:{tmp_path}/empty", "no pictures"),
        "no arrayrecord": (f"arrayrecord:{tmp_path}/x*", "matches no file"),
        "not arrayrecord": (f"arrayrecord:{tmp_path}/junk", "not ArrayRecord"),
        "tfds unsplit": ("tfds:cifar10", "tfds:NAME:SPLIT"),
        "tfds unknown": (f"tfds:nope:train?data_dir={tmp_path}", "nope.*tfds build"),
    }[case]


CASES = """scheme; no scheme; no match; directory; no column; not parquet; no records; no folder;
empty folder; no arrayrecord; not arrayrecord; tfds unsplit; tfds unknown"""


@pytest.mark.parametrize("case", re.split(r";\s", CASES))
def test_what_is_wrong_is_said_at_once(tmp_path, case):
    uri, message = bad_source(tmp_path, case)
    with pytest.raises(DataError, match=message):
        Pipeline(uri, Image(8)).batches(0, 4)


def test_labels_that_are_not_there_are_refused(tmp_path):
    uri = write_parquet(tmp_path / "a.parquet", [encode(numbered(i)) for i in range(3)])
    with pytest.raises(DataError, match="labels=False"):
        Pipeline(uri, Image(8), labels=True).check()
    assert "label" not in next(iter(Pipeline(uri, Image(8), workers=0).epoch(3)))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        uris.open_uri("digits:")


# Decoding


def smooth(h, w):
    coarse = np.random.default_rng(h * w).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return np.asarray(PIL.Image.fromarray(coarse).resize((w, h), PIL.Image.Resampling.BICUBIC))


def close(a, b, mean=0.5, most=8):
    """Equal but for the order in which Pillow rounds its two passes."""
    difference = np.abs(a.astype(int) - b.astype(int))
    assert a.shape == b.shape and difference.mean() < mean and difference.max() <= most


@pytest.mark.parametrize("h, w", [(60, 60), (60, 91), (91, 60), (33, 40), (20, 200), (200, 31)])
def test_crop_is_pillow_resize_and_center_crop(h, w):
    pixels, s = smooth(h, w), 32
    new = (s, int(s * h / w)) if w < h else (int(s * w / h), s)
    left, top = round((new[0] - s) / 2), round((new[1] - s) / 2)
    resized = PIL.Image.fromarray(pixels).resize(new, PIL.Image.Resampling.BICUBIC)
    out = Image(s)({"image": encode(pixels)})
    close(out["image"], np.asarray(resized.crop((left, top, left + s, top + s))))
    assert out["extent"].tolist() == [s, s] and out["extent"].dtype == np.int32


@pytest.mark.parametrize(
    "h, w, extent", [(64, 40, (32, 20)), (10, 16, (20, 32)), (1, 200, (1, 32))]
)
def test_pad_keeps_aspect_and_says_what_is_valid(h, w, extent):
    pixels = smooth(h, w)
    out = Image(32, "pad")({"image": encode(pixels)})
    resized = PIL.Image.fromarray(pixels).resize(extent[::-1], PIL.Image.Resampling.BICUBIC)
    assert tuple(out["extent"]) == extent and out["image"].shape == (32, 32, 3)
    close(out["image"][: extent[0], : extent[1]], np.asarray(resized))
    assert not out["image"][extent[0] :].any() and not out["image"][:, extent[1] :].any()


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_what_fits_is_not_resampled(fit):
    pixels, jpeg = numbered(5, 32, 32), encode(smooth(32, 32), "JPEG", quality=80)
    assert np.array_equal(Image(32, fit)({"image": encode(pixels)})["image"], pixels)
    assert np.array_equal(Image(32, fit)({"image": pixels})["image"], pixels)
    decoded = np.asarray(PIL.Image.open(io.BytesIO(jpeg)))
    assert np.array_equal(Image(32, fit)({"image": jpeg})["image"], decoded)
    crop = Image(20)({"image": encode(numbered(6, 20, 26))})["image"]
    assert np.array_equal(crop, numbered(6, 20, 26)[:, 3:23])


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    pixels = smooth(400, 520)
    out = Image(32)({"image": encode(pixels, "JPEG", quality=95)})["image"]
    close(out, Image(32)({"image": encode(pixels)})["image"], mean=2.0, most=12)


def test_modes_become_rgb():
    pixels = numbered(3, 8, 8)
    gray, image = pixels[..., 0], Image(8)
    repeated = np.repeat(gray[..., None], 3, -1)
    assert np.array_equal(image({"image": encode(gray)})["image"], repeated)
    assert np.array_equal(image({"image": gray[..., None]})["image"], repeated)
    deep = encode(gray.astype(np.uint16) * 256 + 77)  # 16 bits: the high byte stays
    assert np.array_equal(image({"image": deep})["image"], repeated)
    flat = np.full((8, 8, 3), 51, np.uint8)
    palette = encode(flat, mode="P")
    assert np.array_equal(image({"image": palette})["image"], flat)
    clear = np.concatenate([flat, np.zeros((8, 8, 1), np.uint8)], -1)
    clear[0, 0, 3], clear[0, 1, 3] = 255, 51  # opaque, a fifth, and elsewhere transparent
    white = image({"image": encode(clear)})["image"]
    assert white[0, 0].tolist() == [51] * 3 and white[5, 5].tolist() == [255] * 3
    assert abs(int(white[0, 1, 0]) - (0.2 * 51 + 0.8 * 255)) <= 1
    cmyk = image({"image": encode(flat, "JPEG", mode="CMYK")})["image"]
    assert np.abs(cmyk.astype(int) - 51).max() <= 3
    one = Image(8, channels=1)
    assert np.array_equal(one({"image": encode(gray)})["image"], gray[..., None])
    assert one({"image": flat})["image"].shape == (8, 8, 1)


def test_orientation_is_ignored():
    exif = PIL.Image.Exif()
    exif[274] = 6  # a quarter turn
    pixels = smooth(16, 16)
    turned = Image(16)({"image": encode(pixels, "JPEG", exif=exif)})["image"]
    assert np.array_equal(turned, Image(16)({"image": encode(pixels, "JPEG")})["image"])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_bombs_raise_whatever_the_warning_filter(kind, monkeypatch, recwarn):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)  # warned of above, refused above twice
    data = encode(smooth(36, 36), kind)
    import warnings

    warnings.simplefilter("always")
    with pytest.raises((PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning)):
        Image(8)({"image": data})
    assert not recwarn.list


def test_decoders_are_values():
    assert Image(8) == Image(8, "crop") and hash(Image(8)) == hash(Image(8))
    assert repr(Image(8)) == "Image(size=8, fit='crop', channels=3, upright=False)"
    for wrong in ({"size": 0}, {"size": 8, "channels": 4}):
        with pytest.raises(ValueError, match="channels 1 or 3"):
            Image(**wrong)


# Imports


def test_workers_stay_light(small):
    """Neither the sources nor the pipeline import jax, TensorFlow or torch, and running does not
    import the last two. (Grain itself imports jax where it is installed, for its tree functions.)
    """
    program = (
        "import sys\n"
        "def loaded(): return [m for m in ('jax', 'tensorflow', 'torch') if m in sys.modules]\n"
        "import sslx.data.uri\n"
        "heavy = ('grain', 'PIL', 'pyarrow', 'sklearn', 'tensorflow_datasets', 'array_record')\n"
        "assert not [m for m in heavy if m in sys.modules]\n"
        "from sslx.data.pipeline import Pipeline\n"
        "from sslx.data.image import Image\n"
        "assert not loaded() and 'grain' not in sys.modules\n"
        f"with Pipeline({small!r}, Image(8), workers=0).batches(0, 4) as b: next(b)\n"
        "assert set(loaded()) <= {'jax'}, loaded()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
