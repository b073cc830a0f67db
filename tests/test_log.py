"""The diary of a run: rates, rows that stay readable, and what a resumed run forgets."""

import json
import re

import numpy as np
import PIL.Image
import pytest

from sslx.log import Log, add_scores, read_scores


def rows(run) -> list[dict]:
    """metrics.jsonl, line by line, by a parser that knows no NaN."""

    def constant(name):
        raise AssertionError(f"{name} is no JSON")

    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=constant) for line in lines]


def diary(run, start=0, steps=10, written=()):
    log = Log(run, steps, start)
    for step in written:
        log.write(step, {"loss": 1 / step if step else 9.0})
    log.close()


# ---- rows ----


def test_rows_are_json_whatever_the_numbers(tmp_path):
    log = Log(tmp_path, 3)
    log.write(1, {"loss": float("nan"), "up": float("inf"), "down": -float("inf"), "n": 3})
    log.write(2, {"loss": 0.5, "picture": np.zeros((4, 4, 3), np.uint8)})
    log.close()
    first, second = rows(tmp_path)
    assert first == {"step": 1, "loss": "nan", "up": "inf", "down": "-inf", "n": 3.0}
    assert second == {"step": 2, "loss": 0.5}
    assert np.isnan(float(first["loss"])) and float(first["down"]) == -np.inf


def test_a_row_is_on_disk_once_written(tmp_path):
    log = Log(tmp_path, 3)
    log.write(1, {"loss": 1.0})
    assert rows(tmp_path) == [{"step": 1, "loss": 1.0}]
    log.close()


ODD = ["3", "[]", '{"a": 1}', '{"step": "x"}', '{"step": null}', '{"step": 3, "loss": [1]}']
ODD += ['{"step": 3, "loss": "low"}', "[" * 100_000, "\udcff", "\x00", '"step"', ""]


@pytest.mark.parametrize("line", ODD)
def test_lines_that_are_no_rows_are_left_out_and_counted(tmp_path, line, caplog):
    diary(tmp_path, written=(0, 2))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line.encode(errors="surrogateescape") + b"\n")
    diary(tmp_path, start=4, written=(6,))
    assert [row["step"] for row in rows(tmp_path)] == [0, 2, 6]
    assert f"{tmp_path}/metrics.jsonl: lines that are no rows, and are left out: 1" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", "[[", '{"step 1": 2}', '{"step 1": {"a": [1]}}'])
def test_scores_that_cannot_be_read_are_put_aside_and_begun_anew(tmp_path, text, caplog):
    (tmp_path / "evals.json").write_text(text)
    add_scores(tmp_path, {"step 1": {"knn": 0.5}})
    add_scores(tmp_path, {"step 1": {"linear": 0.25}})
    assert read_scores(tmp_path) == {"step 1": {"knn": 0.5, "linear": 0.25}}
    assert f"{tmp_path}/evals.json is damaged" in caplog.text
    assert (tmp_path / "evals.damaged.json").read_text() == text


def test_a_diary_that_cannot_be_read_stops_nothing(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").mkdir()
    diary(tmp_path, start=4, written=(6,))
    assert "metrics from step 4 on are lost (" in caplog.text


@pytest.mark.parametrize(
    "cut", ["", '{"step": 9, "lo', '{"step": 3, "loss": 0.1}', "{}}", "\x00\x00"]
)
def test_resuming_forgets_later_rows_and_a_cut_last_line(tmp_path, cut):
    diary(tmp_path, written=(0, 2, 4, 6, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    diary(tmp_path, start=4, written=(6, 10))
    assert [row["step"] for row in rows(tmp_path)] == [0, 2, 4, 6, 10]


def test_resuming_without_a_diary_begins_one(tmp_path):
    diary(tmp_path, start=4, written=(6,))
    assert [row["step"] for row in rows(tmp_path)] == [6]


# ---- pictures ----


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_png_named_by_step(tmp_path, channels):
    picture = np.random.default_rng(0).integers(0, 256, (6, 9, channels)).astype(np.uint8)
    log = Log(tmp_path, 10)
    log.write(7, {"reconstruction": picture, "loss": 1.0})
    log.close()
    found = np.asarray(PIL.Image.open(tmp_path / "pictures" / "reconstruction-000007.png"))
    assert np.array_equal(found.reshape(picture.shape), picture)
    assert rows(tmp_path) == [{"step": 7, "loss": 1.0}]


# ---- TensorBoard ----


def test_tensorboard_gets_numbers_and_pictures(tmp_path):
    log = Log(tmp_path, 10)
    log.write(7, {"loss": 0.25, "face": np.zeros((4, 4, 3), np.uint8)})
    log.close()
    events = b"".join(path.read_bytes() for path in tmp_path.rglob("*events*"))
    assert b"loss" in events and b"face" in events and b"PNG" in events


# ---- console ----


def test_console_says_lines_where_there_is_no_terminal(tmp_path, capsys):
    log = Log(tmp_path, 10)
    log.progress(3)  # moves the bar only
    log.progress(4, "loss 0.5", line=True)
    log.say("step 4:  knn 0.9")
    log.close()
    said = capsys.readouterr().err
    assert re.search(r"^step 4/10  loss 0\.5$", said, re.M) and "step 4:  knn 0.9" in said
    assert "step 3" not in said
