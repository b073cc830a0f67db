"""`sslx tokenize` where something goes wrong or is named oddly: disks, names, folders, changes."""

import gzip
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import REPO, run

from sslx.cli import parser
from sslx.data import uri
from sslx.data.source import DataError
from sslx.data.text.tokenize import tokenize
from sslx.vocabulary import Continuations

TEXTS = [f"document {i} says {'more and ' * (i % 9)}more of the same" for i in range(120)]
LATIN = b"caf\xe9"  # no UTF-8


def write_jsonl(path, documents, **more):
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in documents))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder of windows, with its corpus beside it."""
    root = tmp_path_factory.mktemp("done")
    write_jsonl(root / "a.jsonl", TEXTS)
    tokenize(f"{root}/a.jsonl", f"{root}/out", vocabulary_size=90, length=16, workers=0, part=1000)
    return root / "out"


def shards(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.array_record")}


# Names


def test_names_that_are_no_utf8_work_everywhere(done, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sslx"), "propagate", False)  # xdist sends no such names
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + LATIN))
    root.mkdir()
    name = os.fsdecode(LATIN)
    write_jsonl(root / f"{name}.jsonl", TEXTS[:5], label=1)
    (root / f"{name}.txt").write_text(TEXTS[5])
    (root / f"{name}.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "six"}).encode()))
    pq.write_table(pa.table({"text": TEXTS[7:9]}), tmp_path / "a.parquet")
    os.rename(tmp_path / "a.parquet", root / f"{name}.parquet")
    (root / f"{name}.bin").write_bytes(b"?")
    (root / f"bad {name}.jsonl").write_bytes(b"3\n")
    out = f"{root}/out {name}"
    os.mkdir(f"{root}/{name}")
    words = ["tokenize", f"{root}/[!o]*.*", out, "--tokenizer", done, "--workers", 2]
    said = run(*words, PYTHONIOENCODING="utf-8").replace("\\udce9", "é")
    assert "/café/bad café.jsonl@0: is no object" in said and "9 documents" in said
    assert "/café/café.bin: is none of" in said and said.count("dropped") == 2
    source = uri.open_uri(f"tokens:{out}")
    assert source[0]["name"].startswith(out) and len(source.manifest["dropped"]) == 2
    json.loads(Path(out, "manifest.json").read_bytes().decode())  # UTF-8
    assert len(uri.open_uri(f"text:{root}/*.jsonl?tokenizer={out}")) == 5


def test_source_and_folder_may_be_written_as_recipes_name_them(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    options = {"length": 16, "workers": 0, "part": 1000}
    tokenize("a.jsonl", "plain", tokenizer=str(done), **options)
    tokenize("text:a.jsonl", "tokens:one", tokenizer=f"tokens:{done}", **options)
    tokenize(f"text:a.jsonl?tokenizer={done}", "two", **options)
    assert shards("plain") == shards("one") == shards("two") == shards(done)
    write_jsonl(tmp_path / "text:b.jsonl", TEXTS[:1])
    assert tokenize("text:b.jsonl", "three", tokenizer="one", workers=0)["counts"]["documents"] == 1


# Disks


@pytest.mark.parametrize("limit, file", [(100, "job.json"), (9000, "tokens-")])
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(done, tmp_path, limit, file):
    """A limit on the size of files, which writes meet as they meet the end of a disk."""
    out, source = tmp_path / "out", done.parent / "a.jsonl"
    options = f"tokenizer={str(done)!r}, length=16, part=1000"
    code = (
        "import resource, sys; from sslx.data.text.tokenize import tokenize\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"try: tokenize({str(source)!r}, {str(out)!r}, workers=0, {options})\n"
        "except OSError as error: print(error)"
    )
    env = os.environ | {"PYTHONPATH": str(REPO)}
    ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    said = ended.stdout
    assert said.startswith(f"{out}/{file}") and said.count("\n") == 1, ended
    assert "File too large" in said and "the same command goes on" in said
    assert not list(out.glob("*.new")) and not (out / "manifest.json").exists()
    assert all(shards(done)[name] == data for name, data in shards(out).items())
    tokenize(str(source), str(out), workers=0, tokenizer=str(done), length=16, part=1000)
    assert shards(out) == shards(done)


# Changes


def test_files_that_change_without_changing_size_are_tokenized_again(done, tmp_path, caplog):
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", TEXTS[:40])
    out, options = tmp_path / "out", {"tokenizer": str(done), "length": 16, "workers": 0}
    options["part"] = (tmp_path / "a.jsonl").stat().st_size
    tokenize(f"{tmp_path}/*.jsonl", str(out), **options)
    before = shards(out)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    changed = (tmp_path / "b.jsonl").read_text().replace("more", "same")
    (tmp_path / "b.jsonl").write_text(changed)
    os.utime(tmp_path / "b.jsonl", (1, 1))  # of an older file, moved here
    tokenize(f"{tmp_path}/*.jsonl", str(out), **options)
    [record] = caplog.records
    assert "1 parts are written again, for their files have changed" in record.getMessage()
    assert (
        [path.name for path in times if path.stat().st_mtime_ns != times[path]]
        == [name for name in before if shards(out)[name] != before[name]]
        == ["tokens-00001-of-00003.array_record"]
    )
    again = tokenize(f"{tmp_path}/*.jsonl", f"{tmp_path}/new", **options)
    assert shards(out) == shards(tmp_path / "new") and again == uri.tokens(str(out)).manifest


# Damaged folders


@pytest.mark.parametrize(
    "field, value, said",
    [
        (None, "", "is no JSON, or damaged (Expecting value"),
        (None, "[" * 100_000, "is no JSON, or damaged (maximum recursion"),
        (None, "[]", "is no JSON object, but of type list"),
        ("length", "16", "length='16' where int is"),
        ("shards", None, "shards=None where list is"),
        ("vocabulary", {"size": "90"}, "vocabulary.size='90' where int is"),
        ("vocabulary", {"size": True}, "vocabulary.size=True where int is"),
        ("counts", {}, "counts.tokens=None where int is"),
        ("shards", [3], "shards[0].name=3 where str is"),
        ("shards", [{"name": "a", "bytes": 1}], "shards[0].windows=None where int is"),
    ],
)
def test_a_damaged_manifest_is_named_and_written_anew(done, tmp_path, field, value, said):
    folder = shutil.copytree(done, tmp_path / "out")
    file = folder / "manifest.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {field: value}) if field else value)
    with pytest.raises(DataError) as caught:
        uri.open_uri(f"tokens:{folder}")
    text = str(caught.value)
    assert text.startswith(f"{file} ") and said in text and "same `sslx tokenize` again" in text
    source = done.parent / "a.jsonl"
    options = {"vocabulary_size": 90, "length": 16, "workers": 0, "part": 1000}
    assert tokenize(str(source), str(folder), **options) == whole
    (folder / "job.json").write_text("{")
    with pytest.raises(DataError, match=r"job\.json is no JSON, or damaged \(.*\): remove"):
        tokenize(str(source), str(folder), **options)


@pytest.mark.parametrize(
    "described, said",
    [
        ("", "Expecting value"),
        ("[" * 100_000, "RecursionError"),
        ("[]", "TypeError"),
        ("{}", "model"),
        ('{"model": {"type": "BPE"}}', "vocab"),
        ('{"model": {"type": "BPE", "vocab": {"a": 1000000000000}}}', "1000000000000"),
        ('{"model": {"type": "BPE", "vocab": {"a": "b"}}}', "TypeError"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": 3}', "int"),
    ],
)
def test_a_tokenizer_without_words_is_named(tmp_path, described, said):
    path = tmp_path / "tokenizer.json"
    path.write_text(described)
    with pytest.raises(ValueError) as caught:
        Continuations.read(path)
    assert str(caught.value).startswith(f"{path} ") and said in str(caught.value)
    with pytest.raises(DataError, match=r"tokenizer\.json is no tokenizer of Hugging Face"):
        uri.open_uri(f"text:{path}?tokenizer={path}")


@pytest.mark.parametrize("label", [1.5, 2**40, float("nan"), [1], {"a": 1}])
def test_labels_that_are_no_numbers_of_classes_are_named(done, tmp_path, label):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, TEXTS[:2], label=label)
    with pytest.raises(DataError) as caught:
        uri.open_uri(f"text:{path}?tokenizer={done}")
    assert str(caught.value).startswith(f"{path}@0: label {label!r}: labels are integers from 0")


def test_words_are_classes(done, tmp_path):
    path = tmp_path / "a.jsonl"
    labels = ["dog", "ant", None, "cat", "ant"]
    path.write_text("".join(json.dumps({"text": "x", "label": x}) + "\n" for x in labels))
    source = uri.open_uri(f"text:{path}?tokenizer={done}")
    assert source.classes == ["ant", "cat", "dog"]
    assert [source[i].get("label") for i in range(5)] == [2, 0, None, 1, 0]
    with path.open("a") as file:
        file.write('{"text": "x", "label": 3}\n')
    with pytest.raises(DataError, match="label 3: labels are integers from 0, or words, in all"):
        uri.open_uri(f"text:{path}?tokenizer={done}")
    path.write_text('{"text": "x", "label": -1}\n{"text": "y", "label": 2}\n')
    source = uri.open_uri(f"text:{path}?tokenizer={done}")
    assert [source[i].get("label") for i in range(2)] == [None, 2] and source.classes == []


def test_text_in_memory_is_bounded_by_what_comes_out(done, tmp_path, monkeypatch):
    monkeypatch.setattr("sslx.data.text.documents.RESIDENT", 10_000)
    for name, data in (
        ("a.txt.gz", b"word " * 4000),
        ("b.jsonl.gz", b'{"text": "words"}\n' * 4000),
    ):
        (tmp_path / name).write_bytes(gzip.compress(data, mtime=0))
        assert (tmp_path / name).stat().st_size < 3000
        with pytest.raises(DataError, match=r"holds more than 0 MiB of text: `sslx tokenize` it"):
            uri.open_uri(f"text:{tmp_path}/{name}?tokenizer={done}")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"vocabulary_size": 0}, "wordpiece vocabulary of 0 ids"),
        ({"vocabulary_size": 10**12}, "has at most 16,777,216"),
        ({"vocabulary_size": 261, "kind": "bpe"}, "bpe vocabulary of 261 ids"),
        ({"workers": -1}, "-1 workers: 0 is this process alone"),
        ({"process": (2, 2)}, "process 2 of 2: processes count from 0"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_written(done, tmp_path, options, said):
    with pytest.raises(DataError, match=said):
        tokenize(f"{done.parent}/a.jsonl", f"{tmp_path}/out", **options)
    assert not (tmp_path / "out").exists()


def test_a_process_is_written_as_two_numbers():
    arguments = parser().parse_args(["tokenize", "x", "y", "--process", "²/2"])
    with pytest.raises(ValueError, match="--process ²/2 is written I/N"):
        arguments.run(arguments)


# Many shards


def test_shards_are_opened_a_few_at_a_time(done, tmp_path):
    """400 shards, read in an order that goes back to each, where 128 files may be open."""
    folder = shutil.copytree(done, tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    row = manifest["shards"][0]
    manifest["shards"] = [row | {"name": f"{i}.array_record"} for i in range(400)]
    for copy in manifest["shards"]:
        os.link(folder / row["name"], folder / copy["name"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))\n"
        "from sslx.data import uri; import numpy as np\n"
        f"source = uri.open_uri('tokens:{folder}'); count = len(source)\n"
        "order = np.random.default_rng(0).permutation(np.tile(np.arange(count), 2))\n"
        "records = [source.records(part.tolist()) for part in np.array_split(order, 20)]\n"
        "rows = {(r['name'].split('#')[1], *r['tokens']) for x in records for r in x}\n"
        "print(count, *rows, sep=';')"
    )
    env = os.environ | {"PYTHONPATH": str(REPO)}
    ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    count, *found = ended.stdout.split(";")
    assert int(count or 0) == 400 * row["windows"], ended
    source = uri.tokens(str(done))
    same = {str((str(i), *source[i]["tokens"])) for i in range(row["windows"])}
    assert {x.strip() for x in found} == same
