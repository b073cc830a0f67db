"""`sslx tokenize` where something goes wrong or is named oddly: disks, names, folders, changes."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import REPO, run

from sslx.data import uri
from sslx.data.text.tokenize import tokenize

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


def test_names_that_are_no_utf8_work_everywhere(done, tmp_path):
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
