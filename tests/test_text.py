"""Tokenizers, windows and the sources of text; every corpus is made here."""

import ast
import gzip
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import REPO, start, stop, until

from sslx.cli import main
from sslx.data import uri
from sslx.data.image import Image
from sslx.data.pipeline import Pipeline
from sslx.data.source import DataError
from sslx.data.text import pydocs
from sslx.data.text.corpus import Tally, parquet_rows, pieces, texts
from sslx.data.text.files import blocks, spans
from sslx.data.text.tokenize import Job, run, tokenize
from sslx.data.text.tokenizers import tokenizer, train_tokenizer, vocabulary
from sslx.data.text.windows import Window, packed, record
from sslx.vocabulary import Vocabulary

L = 24
WORDS = re.findall(
    r"\S+", "the cat sat on a mat and saw two old birds of rain, wind; sun! über naïve ß"
)
SIZE = {"wordpiece": 70, "bpe": 300}


def prose(seed, words):
    rng = np.random.default_rng(seed)
    parts = [WORDS[k] + (" " if rng.random() < 0.9 else "\n") for k in rng.integers(0, 18, words)]
    return "".join(parts).strip()


DOCUMENTS = [prose(i, n) for i, n in enumerate([3, 40, 1, 400, 7, 9, 1000, 22, 2, 60] * 4)]


def write_jsonl(path, documents, **more):
    lines = [json.dumps({"text": document, **more}) + "\n" for document in documents]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The documents as .jsonl, .jsonl.gz, .parquet and .txt files, in this order."""
    root = tmp_path_factory.mktemp("corpus")
    write_jsonl(root / "a.jsonl", DOCUMENTS[:20])
    (root / "b.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS[20:30]).encode())
    )
    pq.write_table(pa.table({"text": DOCUMENTS[30:38]}), root / "c.parquet", row_group_size=3)
    (root / "d.txt").write_text(DOCUMENTS[38])
    (root / "e.txt.gz").write_bytes(gzip.compress(DOCUMENTS[39].encode()))
    return root


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    """The corpus tokenized by this process alone, in parts of 3,000 bytes."""
    out = str(tmp_path_factory.mktemp("out") / "tokens")
    manifest = tokenize(str(corpus), out, vocabulary_size=70, length=L, workers=0, part=3000)
    assert len(manifest["shards"]) > 5
    return out


def bytes_of(folder):
    paths = [*Path(folder).glob("*.array_record"), Path(folder) / "tokenizer.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def library(path):
    """The tokenizer as Hugging Face opens it, none of ours."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(f"{path}/tokenizer.json")


def documents_in(source):
    """Ids of documents, put together again from windows: of one that a window does not end,
    the next segment, at the start of the next window, is the rest."""
    segments = []
    for i in range(len(source)):
        example = source.window(source[i])
        for k in range(1, example["segments"].max() + 1):
            ids = example["tokens"][example["segments"] == k].tolist()
            assert (ids[0], ids[-1]) == (2, 3) and len(ids) > 2
            assert not {0, 2, 3, 4} & set(ids[1:-1])
            segments.append((k, ids[1:-1]))
        held = (example["segments"] > 0).sum()
        assert (example["tokens"][held:] == 0).all() and (example["segments"][:held] > 0).all()
        assert L - held < 16 or i + 1 in source.shards.ends, "room left over"
    return segments


# Windows


def test_windows_hold_every_token_of_every_document_in_order(done):
    source = uri.tokens(done)
    plain = library(done)
    expected = [plain.encode(d, add_special_tokens=False).ids for d in DOCUMENTS]
    segments = [ids for _, ids in documents_in(source)]
    assert list(chain(*segments)) == list(chain(*expected))
    at = set(np.cumsum([len(ids) for ids in segments]).tolist())
    assert set(np.cumsum([len(ids) for ids in expected]).tolist()) <= at  # none shares a segment
    counts = source.manifest["counts"]
    assert counts["tokens"] == sum(map(len, expected)) and counts["documents"] == len(DOCUMENTS)
    assert counts["segments"] == len(segments) and counts["windows"] == len(source)
    assert (counts["empty"], counts["dropped"], source.manifest["dropped"]) == (0, 0, {})


def test_byte_level_windows_spell_the_very_text(corpus, tmp_path):
    tokenize(str(corpus), f"{tmp_path}/out", vocabulary_size=300, kind="bpe", length=L, workers=0)
    source, plain = uri.tokens(f"{tmp_path}/out"), library(tmp_path / "out")
    joined = chain(*(ids for _, ids in documents_in(source)))
    assert plain.decode(list(joined)) == "".join(DOCUMENTS)
    assert source.vocabulary == Vocabulary(300)


def test_packing_fills_windows_and_cuts_only_what_must_be_cut():
    """Room 10 - 2; documents of 3, 20, 1 tokens: [3], [20] in the 3 left and 8, 8, 1, and so on."""

    def stream(*sizes):
        base = 0
        for size in sizes:
            yield np.arange(base, base + size), True
            base += size

    windows = [[len(ids) for ids in w] for w in packed(stream(3, 20, 1), 10)]
    assert windows == [[3], [8], [8], [4, 1]]  # room of 5 is less than SHORTEST: padded
    windows = [[len(ids) for ids in w] for w in packed(stream(30, 98, 3), 64)]
    assert windows == [[30, 30], [62], [6, 3]]
    windows = [[len(ids) for ids in w] for w in packed(stream(46, 9, 20), 64)]
    assert windows == [[46, 9], [20]]  # room of 16 - 11
    for sizes in ((62,), (62, 62), (63,), (61, 1), ()):
        found = [ids for w in packed(stream(*sizes), 64) for ids in w]
        joined = np.concatenate([*found, np.zeros(0, int)])
        assert joined.tolist() == list(range(sum(sizes)))


def test_packing_does_not_depend_on_pieces():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 9, n) for n in rng.integers(0, 300, 60)]

    def split(most):
        for ids in documents:
            cuts = np.unique(rng.integers(0, len(ids) + 1, rng.integers(0, most)))
            for k, piece in enumerate(np.split(ids, cuts)):
                yield piece, k == 0

    whole = [[d.tolist() for d in w] for w in packed(split(1), 32)]
    for _ in range(3):
        assert [[d.tolist() for d in w] for w in packed(split(6), 32)] == whole


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_pieces_of_a_long_document_are_tokenized_as_the_whole(kind, monkeypatch):
    documents = [prose(1, 3000), "a\n\n\n b  c \n\n" * 300, "x" * 500 + " y z" * 200, "ü\n" * 700]
    found = train_tokenizer(lambda: documents, SIZE[kind], kind)
    monkeypatch.setattr("sslx.data.text.corpus.PIECE", 600)
    for document in documents:
        parts = pieces(document)
        assert "".join(parts) == document and max(map(len, parts)) <= 600 and len(parts) > 2
        ids = [id for part in parts for id in found.encode(part, add_special_tokens=False).ids]
        assert ids == found.encode(document, add_special_tokens=False).ids
    assert pieces("x" * 1300) == ["x" * 600, "x" * 600, "x" * 100]


@pytest.mark.parametrize("size, dtype", [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_records_are_as_narrow_as_the_vocabulary_allows(size, dtype):
    special = Vocabulary(size, pad=9, start=7, end=8)
    data = record([np.array([size - 1, 5]), np.array([6])], special)
    assert np.frombuffer(data, dtype).tolist() == [2, 0, 4, 7, size - 1, 5, 8, 7, 6, 8]
    codes = np.frombuffer(data, dtype)
    example = Window(9, special)({"tokens": codes[3:], "starts": codes[1:3]})
    assert example["tokens"].tolist() == [7, size - 1, 5, 8, 7, 6, 8, 9, 9]
    assert example["segments"].tolist() == [1, 1, 1, 1, 2, 2, 2, 0, 0]
    assert {k: (v.shape, v.dtype) for k, v in example.items()} == Window(9, special).shapes


# Determinism, processes, interruption


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_training_a_tokenizer_gives_the_same_in_every_process(kind):
    code = (
        "import hashlib, test_text as t; from sslx.data.text.tokenizers import train_tokenizer\n"
        f"found = train_tokenizer(lambda: t.DOCUMENTS, {SIZE[kind]}, {kind!r})\n"
        "print(hashlib.sha256(found.to_str().encode()).hexdigest(), found.get_vocab_size())"
    )
    env = os.environ | {"PYTHONPATH": f"{REPO}:{REPO}/tests"}
    said = {
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout
        for _ in range(3)
    }
    assert len(said) == 1 and said.pop().endswith(f" {SIZE[kind]}\n")


def test_trained_tokenizers_have_our_special_ids(done):
    assert vocabulary(done) == Vocabulary(70)
    ids = library(done).encode("the mat").ids
    assert (ids[0], ids[-1]) == (2, 3)  # for whoever opens it: [CLS] ... [SEP]
    assert library(done).token_to_id("[MASK]") == 4


def test_same_bytes_whatever_the_number_of_processes(corpus, done, tmp_path):
    options = {"length": L, "part": 3000, "tokenizer": done}
    told = []
    tokenize(
        str(corpus), f"{tmp_path}/two", workers=2, progress=lambda *x: told.append(x), **options
    )
    assert bytes_of(f"{tmp_path}/two") == bytes_of(done)
    assert told[-1][0] == told[-1][1] > 0 and sorted(told) == told
    for i in (2, 0, 1):
        found = tokenize(str(corpus), f"{tmp_path}/hosts", workers=0, process=(i, 3), **options)
        assert (found is None) == (i != 1)
        if i == 0:
            with pytest.raises(DataError, match="unfinished"):
                uri.open_uri(f"tokens:{tmp_path}/hosts")
    assert bytes_of(f"{tmp_path}/hosts") == bytes_of(done)
    assert found == uri.tokens(done).manifest


def test_large_text_files_are_cut_at_lines_and_nothing_is_lost(tmp_path):
    lines = [prose(i, 30).replace("\n", " ") + "\n" for i in range(200)]
    lines[50] = "x" * 5000 + "\n"  # longer than two parts
    (tmp_path / "a.txt").write_text("".join(lines))
    write_jsonl(tmp_path / "a.jsonl", lines)
    for name, documents in (("a.txt", 1), ("a.jsonl", 200)):
        path, joined, tally = str(tmp_path / name), {}, Tally()
        for size in (10**9, 2000, 777):
            stretches = spans(path, size)
            assert (len(stretches) > 1) == (size < 10**9)
            found = [t for s in stretches for t, _ in texts(s, tally)]
            joined[size] = "".join(found)
        assert joined[2000] == joined[777] == joined[10**9] == "".join(lines)
        assert tally.counts == {"documents": 3 * documents}


def test_a_line_that_begins_where_a_part_does_belongs_to_it(tmp_path):
    lines = [f"line {i:04d}\n" for i in range(100)]  # of 10 bytes
    (tmp_path / "a.txt").write_text("".join(lines))
    for size in (9, 10, 11, 100):
        found = [b"".join(blocks(span)).decode() for span in spans(f"{tmp_path}/a.txt", size)]
        assert "".join(found) == "".join(lines)
        if size == 10:
            assert found == lines


def test_large_row_groups_are_cut_at_rows(tmp_path):
    documents = [prose(i, 30) for i in range(50)]
    for rows in (50, 13):
        pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet", row_group_size=rows)
        stretches = spans(f"{tmp_path}/a.parquet", 500)
        assert len(stretches) >= 8
        tally = Tally()
        assert [t for s in stretches for t, _ in texts(s, tally)] == documents
        names = [name for s in stretches for name, _ in parquet_rows(s, ("text",))]
        assert names == [f"{tmp_path}/a.parquet#{i}" for i in range(50)]


def test_interrupted_it_goes_on_and_keeps_what_is_finished(corpus, done, tmp_path):
    out = tmp_path / "out"
    options = {"length": L, "part": 3000, "tokenizer": done, "workers": 0}

    class Stop(Exception):
        pass

    def stop_in_the_fourth(finished, total):
        if len(list(out.glob("tokens-*.json"))) == 3:
            raise Stop

    with pytest.raises(Stop):
        tokenize(str(corpus), str(out), progress=stop_in_the_fourth, **options)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("tokens-*.array_record")}
    assert kept and not (out / "manifest.json").exists()
    with pytest.raises(DataError, match="unfinished: run the same"):
        uri.open_uri(f"tokens:{out}")
    begun = []
    tokenize(str(corpus), str(out), progress=lambda *x: begun.append(x), **options)
    assert begun[0][0] > 0  # the bar starts where it was
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert bytes_of(out) == bytes_of(done)


def test_killed_in_worker_processes_it_goes_on(corpus, done, tmp_path):
    big = tmp_path / "big.jsonl"
    write_jsonl(big, DOCUMENTS * 60)
    out = tmp_path / "out"
    words = ("tokenize", big, out, "--tokenizer", done, "--length", L, "--workers", 2)
    code = (
        "import sys; from sslx.data.text import job; job.PART = 100_000\n"
        "from sslx.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = start(*words, code=code)
    try:
        until(lambda: list(out.glob("tokens-*.json")), process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        stop(process)
    assert not (out / "manifest.json").exists()
    whole = tokenize(
        str(big), str(tmp_path / "whole"), tokenizer=done, length=L, workers=0, part=100_000
    )
    tokenize(str(big), str(out), tokenizer=done, length=L, workers=0, part=100_000)
    assert bytes_of(out) == bytes_of(tmp_path / "whole") and len(whole["shards"]) > 10


def test_what_a_worker_meets_is_raised(corpus, done, tmp_path):
    out = tmp_path / "out"
    job = Job(str(corpus), str(out), L, 3000)
    out.mkdir()
    shutil.copy(f"{done}/tokenizer.json", out)
    _ = job.plan
    os.rename(corpus / "a.jsonl", corpus / "gone")
    try:
        with pytest.raises(OSError, match=r"a\.jsonl"):
            run(job, list(range(len(job.parts))), 0, 1, 2, lambda *x: None)
    finally:
        os.rename(corpus / "gone", corpus / "a.jsonl")


def test_the_same_command_twice_at_once_does_each_part_once(done, tmp_path):
    big, out = tmp_path / "big.jsonl", tmp_path / "out"
    write_jsonl(big, DOCUMENTS * 60)
    words = ("tokenize", big, out, "--tokenizer", done, "--length", L, "--workers", 0)
    code = (
        "import sys; from sslx.cli import main; from sslx.data.text import job\n"
        "job.PART, write = 100_000, job.Job.write_alone\n"
        "def told(job, k, said): print('part', k); write(job, k, said)\n"
        "job.Job.write_alone = told; sys.exit(main(sys.argv[1:]))"
    )
    both = [start(*words, code=code) for _ in range(2)]
    try:
        said = [process.communicate(timeout=60)[0] for process in both]
    finally:
        stop(*both)
    assert [process.returncode for process in both] == [0, 0], said
    parts = [int(k) for k in re.findall(r"part (\d+)", "".join(said))]
    assert sorted(parts) == list(range(len(parts))) and len(parts) > 10
    tokenize(str(big), str(tmp_path / "whole"), tokenizer=done, length=L, part=100_000, workers=0)
    assert bytes_of(out) == bytes_of(tmp_path / "whole") and not list(out.glob("*.new"))


@pytest.mark.parametrize("change, what", [({"length": 32}, "length"), ({"part": 500}, "source")])
def test_a_folder_of_other_settings_is_refused(corpus, done, change, what):
    options = {"length": L, "part": 3000, "vocabulary_size": 70, "workers": 0} | change
    with pytest.raises(DataError, match=f"begun with another {what}: remove it"):
        tokenize(str(corpus), done, **options)
    with pytest.raises(DataError, match="begun with another kind, tokenizer, voc"):
        tokenize(str(corpus), done, length=L, part=3000, tokenizer=done, workers=0)
    with pytest.raises(DataError, match="holds other files"):
        tokenize(str(corpus), str(corpus), vocabulary_size=70)


# The law


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def take(batches, count):
    with batches:
        return [next(batches) for _ in range(count)]


def test_law_holds_for_hosts_workers_and_starts(done):
    source = uri.tokens(done)
    pipeline = Pipeline(source, source.window, workers=0)
    whole = take(pipeline.batches(3, 8), 6)
    assert {k: (v.shape, v.dtype) for k, v in whole[0].items()} == pipeline.shapes(8)
    for hosts, start_ in ((1, 4), (2, 0), (4, 3)):
        shares = np.arange(8).reshape(hosts, -1).tolist()
        parts = [take(pipeline.batches(3, 8, start_, rows), 6 - start_) for rows in shares]
        joined = [
            {name: np.concatenate([p[s][name] for p in parts]) for name in whole[0]}
            for s in range(6 - start_)
        ]
        same(joined, whole[start_:])
    processes = Pipeline(f"tokens:{done}", source.window, workers=2)
    rows = [1, 4, 5]
    same(take(processes.batches(3, 8, 2, rows), 4), take(pipeline.batches(3, 8, 2, rows), 4))
    seen = [w for b in pipeline.epoch(8) for w in b["tokens"][b["valid"]].tolist()]
    assert seen == [source.window(source[i])["tokens"].tolist() for i in range(len(source))]


def test_sources_pickle_as_their_fields(done, corpus):
    for source in (uri.tokens(done), uri.text(f"{corpus}/a.jsonl", done)):
        first = source[0]["tokens"].tolist()
        copy = pickle.loads(pickle.dumps(source))
        assert copy == source and hash(copy) == hash(source) and len(pickle.dumps(source)) < 400
        assert copy[0]["tokens"].tolist() == first
        with pytest.raises(IndexError):
            source[len(source)]
        backwards = [len(source) - 1, 0, 1]
        assert [r["name"] for r in source.records(backwards)] == [
            source[i]["name"] for i in backwards
        ]


# Labelled text


def test_text_is_tokenized_as_it_is_read(tmp_path, done):
    documents, labels = [*DOCUMENTS[:6], "the [MASK] sat"], [0, 3, 1, 1, 0, 2, 3]
    pq.write_table(pa.table({"text": documents, "label": labels}), tmp_path / "news.parquet")
    pipeline = Pipeline(f"text:{tmp_path}/*.parquet?tokenizer={done}", Window(L, Vocabulary(70)))
    [batch] = list(pipeline.epoch(8))
    assert batch["label"][:7].tolist() == labels and batch["valid"].sum() == 7
    plain = library(done)
    for i, document in enumerate(documents[:6]):
        ids = plain.encode(document).ids
        ids = [*ids[: L - 1], 3] if len(ids) > L else ids
        assert batch["tokens"][i].tolist() == ids + [0] * (L - len(ids))
        assert batch["segments"][i].tolist() == [1] * len(ids) + [0] * (L - len(ids))
    assert 4 not in batch["tokens"][6]  # what a text says is no mask
    write_jsonl(tmp_path / "a.jsonl", ["cat", "mat"])
    (tmp_path / "b.txt").write_text("old birds")
    for glob, count in (("*.jsonl", 2), ("b.txt", 1)):
        source = uri.text(f"{tmp_path}/{glob}", done)
        assert len(source) == count and all("label" not in source[i] for i in range(count))
    assert uri.text(f"{tmp_path}/b.txt", uri.tokens(done))[0]["tokens"].tolist() == (
        plain.encode("old birds").ids
    )


def test_a_first_document_without_a_label_hides_no_others(tmp_path, done):
    write_jsonl(tmp_path / "a.jsonl", ["cat", "mat"], label=None)
    write_jsonl(tmp_path / "b.jsonl", ["cat", "mat"], label=1)
    assert not uri.text(f"{tmp_path}/*.jsonl", done).unlabelled
    assert "column `label`, in lower case" in uri.text(f"{tmp_path}/a.jsonl", done).unlabelled


def test_a_class_label_names_the_numbers_of_text(tmp_path, done):
    """As datasets writes it; files that name other classes are no one set."""

    def write(name, names):
        label = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = pa.table({"text": ["the cat", "a mat"], "label": [1, 0]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(label)})
        pq.write_table(table, tmp_path / f"{name}.parquet")

    write("a", ["bad", "good"])
    source = uri.text(f"{tmp_path}/*.parquet", done)
    assert source.classes == ["bad", "good"]
    assert [source[i]["label"] for i in range(2)] == [1, 0]
    write("few", ["bad"])
    with pytest.raises(DataError, match=r"few\.parquet#0: label 1, but .* names 1 classes only"):
        len(uri.text(f"{tmp_path}/few.parquet", done))
    (tmp_path / "few.parquet").unlink()
    write("b", ["good", "bad"])
    with pytest.raises(DataError, match="name other classes"):
        _ = uri.text(f"{tmp_path}/*.parquet", done).classes


# The text that ships with Python


def test_python_documents_are_its_docstrings_and_topics(tmp_path, monkeypatch):
    """On a tenth of them: all take seconds."""
    import argparse
    import inspect
    from pydoc_data.topics import topics

    stdlib = Path(argparse.__file__).parent
    for name in ("argparse.py", "json/__init__.py", "json/decoder.py", "pydoc_data/topics.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(stdlib / name, tmp_path / name)
    for name in ("test/one.py", "json.d/test/two.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text('"""A test."""')
    (tmp_path / "wrong.py").write_text('"""No Python."""; def')
    monkeypatch.setattr(pydocs.sysconfig, "get_path", lambda name: tmp_path)
    found = dict(pydocs.python_documents())
    assert found["topic assert"] == topics["assert"]
    assert found["argparse.py"].startswith(inspect.getdoc(argparse))
    for thing in (argparse.ArgumentParser, argparse.ArgumentParser.add_subparsers):
        assert (inspect.getdoc(thing) or "") in found["argparse.py"]
    assert not any("test/" in name or "wrong" in name for name in found)
    assert len(found) == len(topics) + 3 and sum(map(len, found.values())) > 4e5


def test_pydocs_tokenize_on_first_use_only(tmp_path, monkeypatch):
    known = [("argparse.py", DOCUMENTS[6]), *((f"m{i}", d) for i, d in enumerate(DOCUMENTS))]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pydocs, "python_documents", lambda: iter(known))
    train, test = (uri.pydocs(split, 70, L) for split in ("train", "test"))
    assert not any(tmp_path.iterdir())  # a recipe that is only printed costs nothing
    assert "split='train'" in repr(train) and train.window == Window(L, Vocabulary(70))
    pipelines = [Pipeline(source, source.window) for source in (train, test)]
    batches = [take(pipeline.batches(0, 4), 2) for pipeline in pipelines]
    monkeypatch.setattr(pydocs, "python_documents", lambda: pytest.fail("read twice"))
    again = Pipeline(uri.pydocs("train", 70, L), Window(L, Vocabulary(70)))
    same(take(again.batches(0, 4), 2), batches[0])
    counts = [source.tokens.manifest["counts"]["documents"] for source in (train, test)]
    assert sum(counts) == len(known) and min(counts) > 0
    assert os.listdir(tmp_path / "sslx") == [f"pydocs-{sys.version.split()[0]}-70-{L}"]
    with pytest.raises(DataError, match="no split 'val'"):
        uri.open_uri("pydocs:val")


# Bad input


def test_bad_files_and_rows_are_counted_and_named(tmp_path, done):
    root = tmp_path / "corpus"
    write_jsonl(root / "good.jsonl", DOCUMENTS[:4])
    broken = (
        b'{"text": "ok"}\n{"text": "  "}\n{"text": 3}\nno json\n{"text": "\xff"}\n{"other": 1}\n'
    )
    (root / "rows.jsonl").write_bytes(broken + b'{"text": "\\ud800"}\n["text"]\n\n')
    (root / "empty.txt").write_bytes(b"")
    (root / "blank.txt").write_bytes(b" \n\n \t\n")
    (root / "latin.txt").write_bytes(b"fine at first " * 9 + "naïve".encode("latin1"))
    (root / "binary.txt").write_bytes(bytes(range(256)))
    (root / "cut.txt.gz").write_bytes(gzip.compress(DOCUMENTS[6].encode())[:-20])
    (root / "fake.jsonl.gz").write_bytes(b"not gzip")
    (root / "fake.parquet").write_bytes(b"not parquet")
    pq.write_table(pa.table({"body": ["a"]}), root / "column.parquet")
    invalid = pa.Array.from_buffers(
        pa.string(),
        2,
        [None, pa.py_buffer(np.array([0, 2, 4], "<i4")), pa.py_buffer(b"ab\xff\xfe")],
    )
    pq.write_table(pa.table({"text": invalid}), root / "bytes.parquet")
    (root / "notes.pdf").write_bytes(b"?")
    (root / ".hidden").write_bytes(b"?")
    manifest = tokenize(str(root), f"{tmp_path}/out", tokenizer=done, length=L, workers=0)
    dropped = {os.path.relpath(k, root): v for k, v in manifest["dropped"].items()}
    reasons = {
        "rows.jsonl@15": "is empty",
        "rows.jsonl@30": "has no `text`",
        "rows.jsonl@42": "is damaged: Expecting value",
        "rows.jsonl@50": "is damaged: 'utf-8' codec",
        "rows.jsonl@64": "has no `text`",
        "rows.jsonl@77": "is damaged: 'utf-8' codec",
        "rows.jsonl@96": "is no object with a `text`, but of type list",
        "empty.txt": "is empty",
        "blank.txt": "is empty",
        "latin.txt": "is not UTF-8 near byte 128: convert",
        "binary.txt": "is binary: a zero near byte 0",
        "cut.txt.gz": "is damaged: it ends before its end mark",
        "fake.jsonl.gz": "is not gzipped, but named .gz",
        "fake.parquet": "is not Parquet",
        "column.parquet": "has no column `text` of strings, only body: string",
        "bytes.parquet#1": "is damaged: 'utf-8' codec",
        "notes.pdf": "is none of .txt",
    }
    assert dropped.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert dropped[name].startswith(reason), (name, dropped[name])
    assert manifest["counts"]["dropped"] == 17 and manifest["counts"]["empty"] == 3
    assert manifest["counts"]["documents"] == 4 + 1 + 1


def test_command_names_what_it_dropped(tmp_path, done, capsys):
    write_jsonl(tmp_path / "in" / "a.jsonl", DOCUMENTS[:9])
    (tmp_path / "in" / "b.txt").write_bytes(b"\xff\xfea\0b\0")
    words = [
        "tokenize",
        f"{tmp_path}/in",
        f"{tmp_path}/out",
        "--tokenizer",
        done,
        "--length",
        str(L),
    ]
    assert main(words) == 0
    said, warned = capsys.readouterr()
    assert f"dropped {tmp_path}/in/b.txt: is UTF-16: convert it" in warned.replace("\n", "")
    assert "9 documents" in said and f"windows of {L}" in said
    assert main([*words, "--process", "3/2"]) == 2
    assert "process 3 of 2" in capsys.readouterr().err


def test_nothing_at_all_is_an_error(tmp_path, done):
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="empty folder"):
        tokenize(f"{tmp_path}/in", f"{tmp_path}/out", tokenizer=done)
    (tmp_path / "in" / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"holds no text: .*a\.txt is empty"):
        tokenize(f"{tmp_path}/in", f"{tmp_path}/out", tokenizer=done, workers=0)
    with pytest.raises(DataError, match="matches no file"):
        tokenize(f"{tmp_path}/*.jsonl", f"{tmp_path}/out2", tokenizer=done)


def test_tokenizers_without_what_is_needed_are_refused(tmp_path, done):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0, "<pad>": 1, "<unk>": 2}, [])).save(f"{tmp_path}/t.json")
    with pytest.raises(DataError, match=r"has no start token, neither \[CLS\] nor <s>"):
        vocabulary(f"{tmp_path}/t.json")
    ids = {name: i for i, name in enumerate(("<s>", "<pad>", "</s>", "<unk>", "a"))}
    Tokenizer(models.BPE(ids, [])).save(f"{tmp_path}/gpt.json")
    with pytest.raises(DataError, match=r"gpt\.json has no mask token.*--vocab N"):
        tokenize("anything", f"{tmp_path}/out", tokenizer=f"{tmp_path}/gpt.json")
    assert not (tmp_path / "out").exists()
    Tokenizer(models.BPE(ids | {"<mask>": 9}, [])).save(f"{tmp_path}/roberta.json")
    assert vocabulary(f"{tmp_path}/roberta.json") == Vocabulary(10, 1, 3, 0, 2, 9)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json is no tokenizer"):
        vocabulary(f"{tmp_path}/bad.json")
    with pytest.raises(DataError, match="is missing: name a tokenizer"):
        vocabulary(f"{tmp_path}/none.json")


def test_truncation_and_padding_of_a_tokenizer_are_left_out(done, tmp_path):
    found = library(done)
    found.enable_truncation(5)
    found.enable_padding(length=50)
    found.save(f"{tmp_path}/tokenizer.json")
    plain = library(done).encode(DOCUMENTS[1], add_special_tokens=False).ids
    assert tokenizer(str(tmp_path)).encode(DOCUMENTS[1], add_special_tokens=False).ids == plain


@pytest.fixture
def copied(done, tmp_path):
    return shutil.copytree(done, tmp_path / "copy")


@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_a_shard_deleted_or_truncated_is_named_and_written_again(corpus, done, copied, harm):
    name = uri.tokens(str(copied)).manifest["shards"][2]["name"]
    if harm == "missing":
        (copied / name).unlink()
    else:
        os.truncate(copied / name, 100)
    said = "is missing" if harm == "missing" else r"has 100 of \d+ bytes"
    pipeline = Pipeline(f"tokens:{copied}", Window(L, Vocabulary(70)))
    with pytest.raises(DataError, match=f"{name} {said}: copy it again, or run the same"):
        pipeline.check()
    tokenize(str(corpus), str(copied), vocabulary_size=70, length=L, part=3000, workers=0)
    Pipeline(f"tokens:{copied}", Window(L, Vocabulary(70))).check()
    assert bytes_of(copied) == bytes_of(done)


def test_another_tokenizer_is_seen(corpus, copied):
    found = library(copied)
    found.add_tokens(["birds"])
    found.save(f"{copied}/tokenizer.json")
    with pytest.raises(DataError, match="is not the tokenizer that these windows were written"):
        uri.open_uri(f"tokens:{copied}")
    tokenize(str(corpus), str(copied), vocabulary_size=70, length=L, part=3000, workers=0)
    source = uri.open_uri(f"tokens:{copied}")  # all written again
    expected = [id for d in DOCUMENTS for id in found.encode(d, add_special_tokens=False).ids]
    assert list(chain(*(ids for _, ids in documents_in(source)))) == expected


def test_what_does_not_fit_is_said_before_any_record_is_read(done, corpus):
    with pytest.raises(DataError, match=r"recipe reads Vocabulary\(size=69.*tokenize with"):
        Pipeline(f"tokens:{done}", Window(L, Vocabulary(69))).check()
    with pytest.raises(DataError, match=r"windows of 24 but the recipe reads 64: take length 24"):
        Pipeline(f"tokens:{done}", Window(64, Vocabulary(70))).check()
    with pytest.raises(DataError, match=r"recipe reads Vocabulary\(size=69"):
        Pipeline(uri.text(f"{corpus}/d.txt", done), Window(L, Vocabulary(69))).check()
    with pytest.raises(DataError, match=r"gives tokens, starts, which Image.* use Window"):
        Pipeline(f"tokens:{done}", Image(8)).check()
    with pytest.raises(DataError, match=r"gives image, which Window.* use Image"):
        Pipeline("digits:", Window(L, Vocabulary(70))).check()
    with pytest.raises(DataError, match="fewer than one batch of 100000: take a smaller"):
        Pipeline(f"tokens:{done}", Window(L, Vocabulary(70))).batches(0, 100_000)
    with pytest.raises(DataError, match="needs a tokenizer: text:"):
        uri.open_uri(f"text:{corpus}/d.txt")
    with pytest.raises(DataError, match="lengths are from 8"):
        Window(4, Vocabulary(70))


def test_large_or_wrongly_labelled_text_is_refused(tmp_path, done, monkeypatch, caplog):
    write_jsonl(tmp_path / "a.jsonl", ["cat"], label=[1])
    with pytest.raises(DataError, match=r"label \[1\]: labels are integers from 0, or words"):
        uri.open_uri(f"text:{tmp_path}/a.jsonl?tokenizer={done}")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    write_jsonl(tmp_path / "b.jsonl", ["cat"])
    with caplog.at_level(logging.WARNING, "sslx"):
        assert len(uri.open_uri(f"text:{tmp_path}/b.*?tokenizer={done}")) == 1
    assert [r.getMessage().split(" near")[0] for r in caplog.records] == [
        f"dropped {tmp_path}/b.txt: it is not UTF-8"
    ]
    monkeypatch.setattr("sslx.data.text.documents.RESIDENT", 10)
    with pytest.raises(DataError, match="sslx tokenize"):
        uri.open_uri(f"text:{tmp_path}/b.jsonl?tokenizer={done}")


@pytest.mark.slow
def test_memory_is_flat(tmp_path, done):
    """Of 6 MB of text, here one document, the last 4 take less than 1 MB more. (Memory in use: what
    the system counts holds what earlier work has given back.)"""
    code = (
        "import ctypes, sys; from sslx.data.text.tokenize import tokenize\n"
        "class Heap(ctypes.Structure):\n"
        "    _fields_ = [(name, ctypes.c_size_t) for name in 'abcdefghij']\n"
        "heap, used = ctypes.CDLL(None).mallinfo2, {}\n"
        "heap.restype = Heap\n"
        "def look(done, total):\n"
        "    now = heap()\n"
        "    used[done] = now.e + now.h  # mapped, and in use of arenas\n"
        "tokenize(*sys.argv[1:3], tokenizer=sys.argv[3], workers=0, part=500_000, progress=look)\n"
        "print(used)"
    )
    path = tmp_path / "6.txt"
    path.write_text(DOCUMENTS[3][:1000].ljust(1000, ".") * 6000)
    env = os.environ | {"PYTHONPATH": str(REPO), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", code, path, tmp_path / "out", done]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    used = ast.literal_eval(run.stdout)
    early = max(size for read, size in used.items() if read < 2e6)
    assert max(used) == path.stat().st_size and max(used.values()) < early + 1e6, used
