"""Corpora as people have them: damaged, deeply nested, linked, oddly named."""

import gzip
import json
import os
import socket
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sslx.cli import main
from sslx.data import uri
from sslx.data.text import files
from sslx.data.text.corpus import Tally, texts
from sslx.data.text.tokenizers import train_tokenizer

ROWS = [f"row {i} of a corpus, in words that differ: {i * i * 7919}" for i in range(40)]
LINES = [json.dumps({"text": text}).encode() + b"\n" for text in ROWS]


def kept(path):
    """The documents of a path, in order, and the Tally of what was not read."""
    tally = Tally()
    parts, dropped = files.partition(files.files(str(path)), 1000)
    documents = [text for part in parts for span in part for text, _ in texts(span, tally)]
    for name, reason in dropped.items():
        tally.drop(name, reason)
    return documents, tally


# Damage


@pytest.mark.parametrize("cut", [40, 150, -60, -9, -1])
def test_whole_rows_before_the_end_of_a_truncated_gzip_are_kept(tmp_path, cut):
    data = gzip.compress(b"".join(LINES))[:cut]
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    expected = zlib.decompressobj(31).decompress(data).count(b"\n")
    documents, tally = kept(tmp_path)
    assert documents == ROWS[:expected] and (expected > 0) == (cut != 40)
    [reason] = tally.dropped.values()
    assert reason.startswith(f"is damaged, the {expected} rows before that are kept: it ends")


def test_whole_rows_before_damage_within_a_gzip_are_kept(tmp_path):
    """A block of a type that deflate does not know, behind 15 rows."""
    deflate = zlib.compressobj(wbits=31)
    good = b"".join(map(deflate.compress, LINES[:15])) + deflate.flush(zlib.Z_FULL_FLUSH)
    rest = b"".join(map(deflate.compress, LINES[15:])) + deflate.flush()
    (tmp_path / "a.jsonl.gz").write_bytes(good + b"\xff" * 20 + rest[20:])
    documents, tally = kept(tmp_path)
    assert documents == ROWS[:15]
    [reason] = tally.dropped.values()
    assert "the 15 rows before that are kept" in reason and "invalid block type" in reason


def test_rows_of_a_damaged_row_group_are_all_counted(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": ROWS}), path, row_group_size=10, compression="gzip", use_dictionary=False
    )
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    data = bytearray(path.read_bytes())
    end = column.data_page_offset + column.total_compressed_size
    data[end - 60 : end] = b"\xff" * 60
    path.write_bytes(data)
    documents, tally = kept(path)
    assert documents == ROWS[:20] + ROWS[30:] and tally.counts["dropped"] == 10
    assert tally.dropped.keys() == {f"{path}#{i}" for i in range(20, 30)}


@pytest.mark.parametrize("footer", [b"\x15\xff\xff\xff", b"", bytes(40)], ids=len)
def test_a_parquet_file_without_a_footer_is_one_dropped_file(tmp_path, footer):
    (tmp_path / "a.jsonl").write_bytes(LINES[0])
    data = b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    (tmp_path / "b.parquet").write_bytes(data)
    documents, tally = kept(tmp_path)
    assert documents == ROWS[:1]
    assert tally.dropped[f"{tmp_path}/b.parquet"].startswith("is not Parquet, or damaged: ")


@pytest.mark.parametrize(
    "name, data, reason",
    [
        ("a.txt", "text".encode("utf-16"), "is UTF-16: convert it with iconv"),
        ("a.jsonl", LINES[0].decode().encode("utf-16"), "is UTF-16: convert it with iconv"),
        ("a.json", LINES[0].decode().encode("utf-16"), "is UTF-16: convert it with iconv"),
        ("a.jsonl", gzip.compress(LINES[0], mtime=0), "is gzipped: name it .gz"),
        ("a.txt", gzip.compress(b"text", mtime=0), "is gzipped: name it .gz"),
        ("a.jsonl.gz", LINES[0], "is not gzipped, but named .gz"),
        ("a.txt.gz", b"text", "is not gzipped, but named .gz"),
        ("a.json.gz", b"[]", "is not gzipped, but named .gz"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_one_dropped_file(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    documents, tally = kept(tmp_path)
    assert not documents and tally.counts["dropped"] == 1
    assert tally.dropped[f"{tmp_path}/{name}"].startswith(reason)


# Rows that are no documents


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"[" * 10_000, "is damaged: it is nested too deeply"),
        (b'{"text": ' * 10_000, "is damaged: it is nested too deeply"),
        (b'{"text": "ok", "n": ' + b"1" * 5000 + b"}", "is damaged: Exceeds the limit"),
        (b"", None),
        (b"nonsense", "is damaged: Expecting value at character 0, near 'nonsense'"),
        (b'{"text": "a" "b"}', "is damaged: Expecting ',' delimiter at character 13, near"),
        (b'["text"]', "is no object with a `text`, but of type list"),
        (LINES[0].decode().encode("utf-16-le")[:-2], "is damaged: Expecting property name"),
        (b"3", "is no object with a `text`, but of type int"),
        (b"null", "is no object with a `text`, but of type NoneType"),
        (b'{"content": "a", "id": 3}', "has no `text` that is a string, only content: str, id"),
        (b'{"text": null}', "has no `text` that is a string, only text: NoneType"),
        (b'{"text": "' + b"x" * 5000 + b'"}', "is damaged: a line of more than"),
        (b"\xef\xbb\xbf" + LINES[0].strip(), None),
    ],
)
def test_a_bad_row_is_counted_and_the_next_is_read(tmp_path, monkeypatch, line, reason):
    if b"xxx" in line:
        monkeypatch.setattr("sslx.data.text.corpus.ROW", 4000)
        monkeypatch.setattr("sslx.data.text.files.ROW", 4000)
    (tmp_path / "a.jsonl").write_bytes(line + b"\n" + LINES[1])
    documents, tally = kept(tmp_path)
    assert documents[-1] == ROWS[1] and tally.counts["dropped"] == (reason is not None)
    assert len(documents) == 1 + (reason is None and line != b"")
    for name, found in tally.dropped.items():
        assert name == f"{tmp_path}/a.jsonl@0" and found.startswith(reason)


def test_a_line_longer_than_its_part_is_read_once(tmp_path):
    """Parts in the middle of it look for its end no further than their own."""
    path = str(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * (5 << 20) + b'"}\n' + LINES[1])
    assert files.first(files.Span(path, 1000, 2000, 1000)) <= 2000 + files.BLOCK
    parts, _ = files.partition([path], 1 << 20)
    documents = [text for [span] in parts for text, begins in texts(span, Tally()) if begins]
    assert len(parts) == 6 and [text[:3] for text in documents] == ["xxx", "row"]


def test_memory_is_bounded_by_what_comes_out_of_a_gzip(tmp_path, monkeypatch):
    """Lines of JSON and of text that swell: each is one dropped entry, what is before is kept."""
    monkeypatch.setattr("sslx.data.text.files.ROW", 1 << 20)
    zeros = b" " * (1 << 22)
    for name in ("a.jsonl.gz", "b.txt.gz"):
        (tmp_path / name).write_bytes(gzip.compress(LINES[0] + b'{"text": "' + 3 * zeros, 9))
    documents, tally = kept(tmp_path)
    assert documents == ROWS[:1]
    reasons = list(tally.dropped.values())
    assert len(reasons) == 2 and all("it swells 200 times" in x for x in reasons)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt", "a.jsonl.gz", "a.json"])
def test_a_file_without_documents_is_said(tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    else:
        path.write_bytes(gzip.compress(b"\n\n", mtime=0) if name.endswith("gz") else b"")
    (tmp_path / "b.txt").write_text("text")
    documents, tally = kept(tmp_path)
    assert [*filter(None, documents)] == ["text"]
    assert tally.dropped == {str(path): "is empty"} and tally.counts["empty"] == 1


# Files as they lie


def test_names_as_people_write_them(tmp_path):
    """c4's layout, upper case, .json, links to folders (also one that leads back)."""
    c4 = tmp_path / "corpus" / "en" / "c4-train.00000-of-01024.json.gz"
    c4.parent.mkdir(parents=True)
    more = {"timestamp": "2019-04-25T12:57:54Z", "url": "https://a.b/c"}
    c4.write_bytes(gzip.compress(json.dumps({"text": ROWS[0], **more}).encode() + b"\n"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "A.JSONL").write_bytes(LINES[1])
    (other / "B.Txt").write_text(ROWS[2])
    (other / "C.TXT.GZ").write_bytes(gzip.compress(ROWS[3].encode()))
    (other / "d.json").write_bytes(b"".join(LINES[4:6]))
    pq.write_table(pa.table({"text": [ROWS[6]]}), other / "E.PARQUET")
    (tmp_path / "corpus" / "linked").symlink_to(other)
    (tmp_path / "corpus" / "linked.txt").symlink_to(other / "B.Txt")
    (other / "back").symlink_to(tmp_path / "corpus")
    documents, tally = kept(tmp_path / "corpus")
    assert sorted(documents) == sorted([*ROWS[:7], ROWS[2]]) and not tally.dropped


def test_what_is_passed_over_is_said(tmp_path, caplog):
    inner = tmp_path / "b"
    inner.mkdir()
    (tmp_path / "a.txt").write_text("text")
    (inner / "b.txt").write_text("more")
    (tmp_path / "c").symlink_to(inner)
    (tmp_path / ".git").mkdir()
    (inner / ".DS_Store").write_bytes(b"?")
    assert kept(tmp_path)[0] == ["text", "more"]
    [record] = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}: passed over 3 names: {tmp_path}/.git (hidden); {inner}/.DS_Store (hidden); "
        f"{tmp_path}/c (the same as {inner})"
    )


@pytest.mark.parametrize(
    "data", [b'{\n "a": 1\n}\n', b'[{"text": "a"}]', b'[\n{"text": "a"}\n]', b'{"a":\n1}']
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_json_that_is_no_lines_is_one_dropped_file(tmp_path, data, pack):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / f"b.json{'.gz' * (pack is not bytes)}").write_bytes(pack(data))
    documents, tally = kept(tmp_path)
    assert documents == ["text"] and tally.counts["dropped"] == 1
    [reason] = tally.dropped.values()
    assert reason.startswith("is one JSON document, not one in each line: jq")


def test_pipes_sockets_and_broken_links_are_dropped(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.jsonl").symlink_to(tmp_path / "gone")
    (tmp_path / "d.parquet").symlink_to("d.parquet")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(os.path.relpath(tmp_path / "e.txt"))
        documents, tally = kept(tmp_path)
    assert documents == ["text"]
    reasons = {os.path.basename(name): reason for name, reason in tally.dropped.items()}
    assert reasons.keys() == {"b.txt", "c.jsonl", "d.parquet", "e.txt"}
    assert reasons["b.txt"] == reasons["e.txt"] == "is no file, but a pipe, a socket or a device"
    assert reasons["c.jsonl"].startswith("cannot be opened, it or what it links to: No such")


# Tokenizers that do not cover their text


def chinese(path, characters, seed=0):
    """200 documents of characters as frequent as in prose, by Zipf's law."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, characters + 1)
    for text in rng.choice(characters, (200, 300), p=share / share.sum()) + 0x4E00:
        line = json.dumps({"text": "".join(map(chr, text))}) + "\n"
        with path.open("a") as file:
            file.write(line)
    return str(path)


@pytest.mark.parametrize("size, kind", [(300, "wordpiece"), (300, "bpe"), (6000, "wordpiece")])
def test_a_tokenizer_covers_its_text_or_a_warning_says_what_to_do(
    tmp_path, caplog, capsys, size, kind
):
    path, out = chinese(tmp_path / "a.jsonl", 3000), str(tmp_path / "out")
    words = ["tokenize", path, out, "--vocab", str(size), "--kind", kind, "--workers", "0"]
    assert main(words) == 0
    source = uri.tokens(out)
    counts = source.manifest["counts"]
    share = counts["unknown"] / counts["tokens"]
    assert source.vocabulary.size <= size and f"({share:.2%} unknown)" in capsys.readouterr().out
    if (size, kind) != (300, "wordpiece"):
        assert share < 0.001 and not caplog.records
        return
    assert share > 0.2 and source.vocabulary.size == 300
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"{path}, first texts",  # before hours of work
        out,
    ]
    caplog.clear()
    source.check()  # before training, too
    uri.open_uri(f"text:{path}?tokenizer={out}")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all(f"{share:.0%}".replace("%", " %") in said[0] for x in said)
    assert [x.split(": ")[0] for x in said] == [out, path]
    assert all("larger --vocab, or with --kind bpe" in x for x in said)


def test_rare_letters_leave_room_for_words():
    """86 letters that each occur once, with their forms within words 172 ids of 160."""
    words = [a + b + c for a in "abc" for b in "def" for c in "gh"]
    rare = "".join(chr(0x430 + i) for i in range(48)) + "".join(chr(0x10D0 + i) for i in range(38))
    known = train_tokenizer(lambda: [" ".join(words * 4000), rare], 160).get_vocab()
    assert len(known) <= 160 and set(words) < set(known)
