"""Record formats: labels and their names, schemas, damage, what is lost and found, open files."""

import errno
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data import N, encode, numbered, small, take, write_parquet, write_tfds  # noqa: F401

from sslx.data import uri as uris
from sslx.data.formats.arrayrecord import write_arrayrecord
from sslx.data.image import Image
from sslx.data.load import Load
from sslx.data.order import Once
from sslx.data.part import Part
from sslx.data.pipeline import Pipeline
from sslx.data.source import DataError, Source

IMAGES = [encode(numbered(i, 8, 8)) for i in range(6)]


def write(path, metadata=None, images=IMAGES, **columns):
    """A Parquet file of the first pictures, and a column for each array."""
    count = len(next(iter(columns.values()), images))
    table = pa.table({"image": images[:count], **columns})
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=2)
    return f"parquet:{path}"


def class_label(*names, **more):
    """The metadata that Hugging Face's datasets write for a ClassLabel."""
    label = {"names": names, "_type": "ClassLabel"} | more
    return {"huggingface": json.dumps({"info": {"features": {"label": label}}})}


def labels(uri):
    source = uris.open_uri(uri)
    return [source[i].get("label") for i in range(len(source))]


# ---- labels ----


def test_parquet_knows_its_classes(tmp_path):
    named = write(tmp_path / "a.parquet", class_label("cat", "ant"), label=[0, 1, 1])
    assert uris.open_uri(named).classes == ["cat", "ant"] and labels(named) == [0, 1, 1]
    for words in (["cow", "ant", None, "bee", "ant"], pa.array(["cow", "ant"]).dictionary_encode()):
        uri = write(tmp_path / "b.parquet", label=words)
        known = sorted({word for word in pa.array(words).to_pylist() if word})
        assert uris.open_uri(uri).classes == known
        expected = [known.index(word) if word else None for word in pa.array(words).to_pylist()]
        assert labels(uri) == expected
    for metadata in ({"huggingface": "[]"}, {"huggingface": "{"}, class_label(1, 2)):
        odd = write(tmp_path / "c.parquet", metadata, label=[0, 1])
        assert uris.open_uri(odd).classes == [] and labels(odd) == [0, 1]


def test_a_label_beyond_the_names_is_refused(tmp_path):
    uri = write(tmp_path / "a.parquet", class_label("cat", "ant"), label=[0, 2])
    with pytest.raises(DataError, match=r"a\.parquet has a label 2, but names 2 classes only"):
        labels(uri)


def test_a_file_name_may_be_in_latin_1(tmp_path):
    uri = write(tmp_path / "a.parquet", label=[1, 0])
    (tmp_path / "a.parquet").rename(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.parquet"))
    assert labels(uri.replace("a.parquet", "*.parquet")) == [1, 0]


def test_tfds_knows_its_classes(tmp_path):
    write_tfds(tmp_path, IMAGES[:3], [2, 0, 1])
    source = uris.open_uri(f"tfds:tiny:train?data_dir={tmp_path}")
    assert source.classes == ["0", "1", "2"] and not source.unlabelled


@pytest.mark.parametrize(
    "column", [{"label": [0.5, 1.7]}, {"label": [[1], [2]]}, {"label": [b"a", b"b"]}]
)
def test_labels_that_are_no_whole_numbers_are_refused(tmp_path, column):
    uri = write(tmp_path / "a.parquet", **column)
    reason = "column `label`: .*, neither whole numbers nor words"
    with pytest.raises(DataError, match=reason):
        Pipeline(uri, Image(8), labels=True).check()
    assert "label" not in take(Pipeline(uri, Image(8), workers=0).epoch(2), 1)[0]
    assert len(take(Pipeline(uri, Image(8), workers=0).batches(0, 2), 1)) == 1  # none is read


@pytest.mark.parametrize("name", ["Label", "labels", "fine_label"])
def test_a_column_that_is_almost_called_label_is_named(tmp_path, name):
    uri = write(tmp_path / "a.parquet", **{name: [1, 2], "id": [1, 2]})
    with pytest.raises(DataError, match=f"no `label`, only image, .*: rename `{name}`"):
        Pipeline(uri, Image(8), labels=True).check()


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_row_without_a_label_is_one_wherever_it_is(tmp_path, first):
    column = pa.array([None if i == first else i for i in range(3)], pa.int64())
    pipeline = Pipeline(write(tmp_path / "a.parquet", label=column), Image(8), workers=0)
    expected = [-1 if i == first else i for i in range(3)]
    assert take(pipeline.epoch(3), 1)[0]["label"].tolist() == expected


def test_no_label_has_many_names(tmp_path):
    """-1 is none, as in the test sets of the Hub, and so is a file whose column is all null."""
    write(tmp_path / "0.parquet", label=pa.array([None, None], pa.null()))
    write(tmp_path / "1.parquet", label=[-1, 4])
    assert labels(f"parquet:{tmp_path}/*.parquet") == [None, None, None, 4]
    with pytest.raises(DataError, match="null in every row"):
        Pipeline(f"parquet:{tmp_path}/0.parquet", Image(8), labels=True).check()


@pytest.mark.parametrize("value", [2**40, 2**31])
def test_a_label_beyond_bounds_is_named(tmp_path, value):
    uri = write(tmp_path / "a.parquet", label=[0, value])
    with pytest.raises(DataError, match=rf"a.parquet#0:1: label {value} is beyond 31 bits"):
        take(Pipeline(uri, Image(8), workers=0).epoch(2), 1)


class Custom(Source):
    """A source of one's own: pictures, and labels as given; reading may fail as `errors` say."""

    leaves = ("image",)

    def __init__(self, given=(0, 1), errors=()):
        self.given, self.errors = given, list(errors)

    def __len__(self):
        return len(self.given)

    def __getitem__(self, index):
        if index == 1 and self.errors:
            raise self.errors.pop()
        return {"image": IMAGES[index], "label": self.given[index], "name": f"custom#{index}"}

    def __getstate__(self):
        return vars(self)


@pytest.mark.parametrize("value", [0.5, "ant", 2**40])
def test_labels_of_a_source_of_one_s_own_are_not_cut(value):
    with pytest.raises(DataError, match=r"custom#1: label "):
        take(Pipeline(Custom((0, value)), Image(8), workers=0).epoch(2), 1)


def test_a_mixture_has_labels_of_the_same_classes_only(tmp_path):
    pairs = [("a", "ant bee"), ("b", "bee ant"), ("c", "ant bee")]
    uri = {k: write(tmp_path / k, class_label(*v.split()), label=[0, 1]) for k, v in pairs}
    same = Pipeline(((uri["a"], 1.0), (uri["c"], 1.0)), Image(8), labels=True)
    same.check()
    assert same.classes == ["ant", "bee"]
    other = ((uri["a"], 1.0), (uri["b"], 1.0))
    Pipeline(other, Image(8)).check()  # labels that are not read need no names
    with pytest.raises(DataError, match="have other classes, ant, bee and bee, ant"):
        Pipeline(other, Image(8), labels=True).check()


def test_arrayrecord_without_labels_says_so(tmp_path):
    """A first record without a label is no reason; records without HEADER are."""
    some = write(tmp_path / "a.parquet", label=pa.array([None, 1], pa.int64()))
    none = write(tmp_path / "b.parquet")
    write_arrayrecord(uris.open_uri(some), f"{tmp_path}/some")
    write_arrayrecord(uris.open_uri(none), f"{tmp_path}/none")
    assert not uris.open_uri(f"arrayrecord:{tmp_path}/some-*").unlabelled
    assert labels(f"arrayrecord:{tmp_path}/some-*") == [None, 1]
    with pytest.raises(DataError, match="without HEADER"):
        Pipeline(f"arrayrecord:{tmp_path}/none-*", Image(8), labels=True).check()


# ---- files that differ, or are damaged ----


DIFFERENT = {
    "column of pictures": ({"img": IMAGES[:2]}, {}),
    "no pictures": ({"text": ["a", "b"]}, {}),
    "no label": ({"image": IMAGES[:2]}, {}),
    "words": ({"image": IMAGES[:2], "label": ["a", "b"]}, {}),
    "classes": ({"image": IMAGES[:2], "label": [0, 1]}, class_label("bee", "ant")),
}
MESSAGES = {
    "column of pictures": "1.parquet: the column of pictures: img; but image in .*0.parquet",
    "no pictures": "1.parquet has no column `image`",
    "no label": "1.parquet: column `label`: absent; but whole numbers in .*0.parquet",
    "words": "1.parquet: column `label`: words; but whole numbers in .*0.parquet",
    "classes": r"1.parquet: the classes of `label`: \['bee', 'ant'\]; but \['ant', 'bee'\] in",
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_files_that_differ_are_refused_at_once(tmp_path, case):
    write(tmp_path / "0.parquet", class_label("ant", "bee"), label=[0, 1])
    columns, metadata = DIFFERENT[case]
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), tmp_path / "1.parquet")
    with pytest.raises(DataError, match=MESSAGES[case]):
        uris.open_uri(f"parquet:{tmp_path}/*.parquet")


@pytest.mark.parametrize("name", ["image", "label"])
def test_two_columns_of_one_name_are_refused(tmp_path, name):
    columns = [pa.array(IMAGES[:2]), pa.array([0, 1]), pa.array([1, 2])]
    columns[2] = columns[name == "label"]
    pq.write_table(pa.Table.from_arrays(columns, ["image", "label", name]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=f"a.parquet has 2 columns called `{name}`"):
        uris.open_uri(f"parquet:{tmp_path}/a.parquet")


def test_files_may_differ_in_what_is_not_read(tmp_path):
    write(tmp_path / "0.parquet", class_label("ant", "bee"), label=[0, 1])
    write(tmp_path / "1.parquet", {"pandas": "{}"}, label=pa.array([1, 0], pa.int8()), x=[1, 2])
    write_parquet(tmp_path / "2.parquet", IMAGES[:1], [0])  # struct<bytes, path>
    source = uris.open_uri(f"parquet:{tmp_path}/*.parquet")
    assert [source[i]["label"] for i in range(5)] == [0, 1, 1, 0, 0]
    assert [source[i]["image"] for i in (2, 4)] == [IMAGES[0], IMAGES[0]]


@pytest.mark.parametrize("damage", ["cut", "empty", "footer"])
def test_a_damaged_file_is_named_at_once(tmp_path, damage):
    write(tmp_path / "0.parquet", label=[0, 1])
    write(tmp_path / "1.parquet", label=[0, 1])
    path = tmp_path / "1.parquet"
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    wrong = {"cut": data[: len(data) // 2], "empty": b""}
    path.write_bytes(wrong.get(damage, data[:footer] + b"\xff" * 40 + data[footer + 40 :]))
    with pytest.raises(DataError, match=r"1\.parquet is not Parquet, or damaged"):
        uris.open_uri(f"parquet:{tmp_path}/*.parquet")


def test_a_file_that_is_cut_while_it_is_read_is_no_signal(tmp_path):
    """A mapped file ends the program with SIGBUS; what is read is an error, or was read before."""
    rng = np.random.default_rng(0)
    write(tmp_path / "a.parquet", images=[rng.bytes(1 << 20) for _ in range(4)])
    program = (
        "import os, sys, pyarrow.parquet as pq\n"
        "from sslx.data.uri import open_uri\n"
        "class Cut(pq.ParquetFile):\n"
        "    def read_row_group(self, *args, **options):\n"
        "        os.truncate(sys.argv[1], 100)\n"
        "        return super().read_row_group(*args, **options)\n"
        "pq.ParquetFile = Cut\n"
        "source = open_uri('parquet:' + sys.argv[1])\n"
        "try: source[0]\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "a.parquet"], capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stdout, run


def test_a_damaged_row_group_is_corrupt_records(tmp_path):
    uri = write(tmp_path / "a.parquet", label=range(6))
    pages = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(0)
    with (tmp_path / "a.parquet").open("r+b") as file:
        file.seek(pages.dictionary_page_offset or pages.data_page_offset)
        file.write(b"\xff" * pages.total_compressed_size)
    with Pipeline(uri, Image(8), max_corrupt=0.5, workers=0).epoch(6) as batches:
        batch = next(batches)
    assert batch["label"][batch["valid"]].tolist() == [0, 1, 4, 5]
    assert len(batches.dropped) == 2


# ---- lost disks and memory ----


@pytest.mark.parametrize("error", [OSError(errno.EIO, "gone"), MemoryError(), TimeoutError()])
def test_what_is_lost_for_a_while_is_waited_for(error, caplog):
    """The bulk of a batch fails, then the record alone, and then it is there."""
    with Pipeline(Custom(errors=[error] * 2), Image(8), workers=0).epoch(2) as batches:
        batch = next(batches)
    assert batch["valid"].all() and not batches.dropped
    assert caplog.text.count("trying again for 60 s") <= 1


@pytest.mark.parametrize("error", [OSError(errno.EIO, "gone"), MemoryError(), ConnectionError()])
def test_what_stays_lost_ends_the_run_by_name(error, monkeypatch):
    monkeypatch.setattr("sslx.data.source.PATIENCE", 0.1)
    source = Custom(errors=[error] * 99)
    reason = f"record 1 could not be read for 0 s \\({type(error).__name__}.*restore"
    with pytest.raises(DataError, match=reason):
        take(Pipeline(source, Image(8), max_corrupt=1.0, workers=0).epoch(2), 1)


@pytest.mark.parametrize("error", [OSError("short"), OSError(errno.EACCES, "no"), SyntaxError()])
def test_what_is_corrupt_is_not_waited_for(error, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waited"))
    source = Custom(errors=[error] * 99)
    with Pipeline(source, Image(8), max_corrupt=1.0, workers=0).epoch(2) as batches:
        assert next(batches)["valid"].tolist() == [True, False]


def test_memory_that_ends_while_decoding_is_no_corrupt_picture(monkeypatch):
    left, decode = [MemoryError()], Image.fitted

    def fitted(image, picture):
        if left:
            raise left.pop()
        return decode(image, picture)

    monkeypatch.setattr(Image, "fitted", fitted)
    with Pipeline(Custom(), Image(8), workers=0).epoch(2) as batches:
        assert next(batches)["valid"].all() and not batches.dropped


# ---- open files ----

LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from sslx.data.uri import open_uri
source = open_uri(sys.argv[1])
n = len(source)
for _ in range(2):
    rows = [source[i] for i in range(n)]
rows += source.records(list(range(n)))
assert [row["image"][-4:] for row in rows] == [b"%04d" % i for i in range(n)] * 2
print(n, len(os.listdir("/proc/self/fd")) < 60)
"""


@pytest.mark.parametrize("kind", ["arrayrecord", "tfds", "parquet"])
def test_more_shards_than_files_may_be_open(tmp_path, kind):
    """100 files within 64 descriptors, and so 100,000 within 256."""
    records = [b"picture %04d" % i for i in range(100)]
    if kind == "parquet":
        for i, data in enumerate(records):
            pq.write_table(pa.table({"image": [data]}), tmp_path / f"{i:03d}.parquet")
        uri = f"parquet:{tmp_path}/*.parquet"
    elif kind == "tfds":
        write_tfds(tmp_path, records, [0] * 100, shards=100)
        uri = f"tfds:tiny:train?data_dir={tmp_path}"
    else:
        pq.write_table(pa.table({"image": records}), tmp_path / "all.parquet")
        write_arrayrecord(uris.open_uri(f"parquet:{tmp_path}/all.parquet"), f"{tmp_path}/a", 100)
        uri = f"arrayrecord:{tmp_path}/a-*"
    run = subprocess.run([sys.executable, "-c", LIMITED, uri], capture_output=True, text=True)
    assert run.stdout == "100 True\n", run.stderr[-2000:]


def test_a_file_that_was_written_anew_is_read_anew(tmp_path):
    for image in IMAGES[:2]:
        uri = write(tmp_path / "a.parquet", images=[image])
        [path] = write_arrayrecord(uris.open_uri(uri), f"{tmp_path}/a")
        assert uris.open_uri(f"arrayrecord:{path}")[0]["image"] == image


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("kind", ["folder", "parquet", "arrayrecord"])
def test_workers_see_what_was_listed_once(tmp_path, kind, part):
    """A file that comes later would shift the records of those that list anew, and of no other."""
    rows = uris.open_uri(write(tmp_path / "all"))
    suffix = {"folder": "png", "parquet": "parquet", "arrayrecord": "array_record"}[kind]

    def add(name):
        path = tmp_path / kind / f"{name}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        if kind == "arrayrecord":
            [made] = write_arrayrecord(rows, str(tmp_path / name))
            os.rename(made, path)
        else:
            path.write_bytes((tmp_path / "all").read_bytes() if kind == "parquet" else IMAGES[0])

    add("m")
    glob = "" if kind == "folder" else "/*"
    uri = f"{kind}:{tmp_path}/{kind}{glob}"
    pipeline = Pipeline(Part(uri, 2) if part else uri, Image(8), workers=0)
    count = len(pipeline)
    sources = (pipeline.mixture[0][0],)
    load = Load(sources, Image(8), False, 0.0, Once(0, count), (range(count),))
    add("a")
    add("b")
    worker, anew = (pickle.loads(pickle.dumps(x)) for x in (load, load.sources[0]))
    assert worker == load and len(worker.sources[0]) == count
    assert len(anew) > count


# ---- globs ----


@pytest.mark.parametrize("pattern", ["set [v2]/*", "set [v2]/*.parquet", "set [v2]/[a-z].parquet"])
def test_brackets_of_a_folder_are_no_pattern(tmp_path, pattern):
    (tmp_path / "set [v2]").mkdir()
    write(tmp_path / "set [v2]/a.parquet")
    assert len(uris.open_uri(f"parquet:{tmp_path}/{pattern}")) == 6


def test_brackets_of_a_file_are_no_pattern_unless_they_are(tmp_path):
    write(tmp_path / "a [1].parquet")
    assert len(uris.open_uri(f"parquet:{tmp_path}/a [1].parquet")) == 6
    assert len(uris.open_uri(f"parquet:{tmp_path}/a [1]*")) == 6
    write(tmp_path / "a 1.parquet", label=[0, 1])
    assert len(uris.open_uri(f"parquet:{tmp_path}/a [1].parquet")) == 2


@pytest.mark.parametrize("scheme", ["parquet", "arrayrecord"])
def test_a_glob_names_what_is_no_file(tmp_path, scheme):
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "broken.arrow").symlink_to("nowhere")
    (tmp_path / "inner").mkdir()
    for glob, words in {
        "p*": "pipe.parquet is no file, but a pipe",
        "b*": "broken.arrow cannot be opened: .*No such file",
        "i*": f"{scheme}:{tmp_path}/inner is a folder: name its files, {scheme}:{tmp_path}/inner/*",
    }.items():
        with pytest.raises(DataError, match=words.replace("/*", r"/\*")):
            uris.open_uri(f"{scheme}:{tmp_path}/{glob}")
