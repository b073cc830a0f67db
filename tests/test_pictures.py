"""Pictures as people have them: odd formats, ranges, notes, orientations, links and folders."""

import io
import logging
import os
import socket
import struct
import zlib

import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import PIL.ImageOps
import PIL.TiffImagePlugin
import pytest
from test_data import encode, numbered, smooth

from sslx.data import uri as uris
from sslx.data.formats import folder
from sslx.data.image import Image
from sslx.data.pipeline import Pipeline
from sslx.data.source import DataError

# ---- ranges ----


def tiff(pixels, **tags):
    """A TIFF of pixels; `tags` are added to it, by the names that Pillow gives them."""
    data, numbers = io.BytesIO(), PIL.TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        numbers[PIL.TiffImagePlugin.__dict__[name]] = value
    PIL.Image.fromarray(pixels).save(data, "TIFF", tiffinfo=numbers)
    return data.getvalue()


def tag_set(data, tag, value):
    """A little-endian TIFF of which a short tag has another value."""
    at = data.index(struct.pack("<HHI", tag, 3, 1)) + 8
    return data[:at] + struct.pack("<H", value) + data[at + 2 :]


def twelve_bits():
    """A TIFF of 4 x 2 pixels of 12 bits, two of them in three bytes, and its values."""
    x = np.array([[0, 16, 1000, 4095], [4000, 2048, 5, 800]])
    rows = ["".join(f"{v:012b}" for v in row) for row in x]
    body = int("".join(rows), 2).to_bytes(12)
    tags = [(256, 4), (257, 2), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2)]
    tags += [(279, 12)]
    entries = b"".join(struct.pack("<HHIHxx", tag, 3, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(body))
    return head + body + struct.pack("<H", len(tags)) + entries + bytes(4), x


def gray(data, shape=(8, 8)):
    out = Image(max(shape), "pad", channels=1)({"image": data})["image"]
    return out[: shape[0], : shape[1], 0]


def test_floats_from_0_to_1_are_that_wide():
    x = np.random.default_rng(0).random((8, 8)).astype(np.float32)
    x[0, :2] = 0, 1
    np.testing.assert_array_equal(gray(tiff(x)), np.rint(x * 255))
    pfm = b"Pf\n8 8\n-1.0\n" + x[::-1].astype("<f4").tobytes()
    np.testing.assert_array_equal(gray(pfm), np.rint(x * 255))


@pytest.mark.parametrize("scale, shift", [(255, 0), (1, -0.5), (1, np.nan)])
def test_other_floats_are_refused(scale, shift):
    x = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8) * scale + np.float32(shift)
    with pytest.raises(ValueError, match="only those from 0 to 1"):
        gray(tiff(x))


def test_integers_whose_range_is_unknown_are_refused():
    for x in (np.arange(64, dtype=np.int32), np.arange(64, dtype=np.int32) << 9):
        with pytest.raises(ValueError, match="tell no range"):
            gray(tiff(x.reshape(8, 8)))


def test_gray_keeps_the_high_bits_of_its_type():
    x = (np.arange(64, dtype=np.uint16) * 1023 + 5).reshape(8, 8)
    np.testing.assert_array_equal(gray(tiff(x)), x >> 8)
    np.testing.assert_array_equal(gray(encode(x)), x >> 8)
    np.testing.assert_array_equal(gray(b"P5 8 8 65535\n" + x.astype(">u2").tobytes()), x >> 8)
    np.testing.assert_array_equal(gray(tag_set(tiff(x), 262, 0)), 255 - (x >> 8))  # white is 0
    data, x = twelve_bits()
    np.testing.assert_array_equal(gray(data, (2, 4)), x >> 4)


# ---- formats ----


def test_only_listed_formats_are_opened(monkeypatch):
    """EPS would be handed to Ghostscript, and a message tells bytes and no address."""

    def ghostscript(*args, **options):
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", ghostscript)
    eps = io.BytesIO()
    PIL.Image.fromarray(numbered(1, 8, 8)).save(eps, "EPS")
    for data in (eps.getvalue(), b"no picture at all", b"\x89PNG\r\n\x1a\n", b"GIF89a"):
        with pytest.raises(ValueError, match=r"begin with b'.* no whole picture of JPEG, PNG"):
            Image(8)({"image": data})


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_listed_formats_are_opened(kind, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)  # as programs set it
    options = {"WEBP": {"lossless": True}, "JPEG2000": {"irreversible": False}}.get(kind, {})
    pixels = np.repeat(numbered(1, 8, 8)[..., :1], 3, -1)
    out = Image(8)({"image": encode(pixels, kind, **options)})["image"]
    np.testing.assert_array_equal(out, pixels)


# ---- notes beside the pixels ----


def chunk(kind, data, crc=0):
    whole = zlib.crc32(kind + data) ^ crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", whole)


def segment(marker, data):
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


BOMB = zlib.compress(bytes(1 << 21))  # beyond what Pillow reads of a text
CHUNKS = {
    "text of a wrong checksum": chunk(b"tEXt", b"a\0b", crc=1),
    "text beyond bounds": chunk(b"zTXt", b"a\0\0" + BOMB),
    "international text": chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB),
    "large profile": chunk(b"iCCP", b"icc\0\0" + BOMB),
    "damaged profile": chunk(b"iCCP", b"icc\0\0" + BOMB[:20], crc=1),
    "damaged Exif": chunk(b"eXIf", b"MM\0*junk", crc=1),
    "short density": chunk(b"pHYs", b"\1"),
    "animation": chunk(b"acTL", b"\0"),
    "a private note": chunk(b"prVt", b"?", crc=1),
}
SEGMENTS = {
    "short profile": segment(0xE2, b"ICC_PROFILE\0"),
    "large profile": segment(0xE2, b"ICC_PROFILE\0\1\2" + bytes(60_000)) * 3,
    "short Adobe": segment(0xEE, b"Adobe"),
    "short JFIF": segment(0xE0, b"JFIF\0"),
    "damaged Exif": segment(0xE1, b"Exif\0\0MM\0*\0\0\xff\xff"),
    "comment": segment(0xFE, b"?" * 70),
    "Photoshop": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed"),
    "more pictures": segment(0xE2, b"MPF\0MM\0*\0\0\xff\xff"),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("note", CHUNKS)
def test_notes_of_a_png_do_not_spoil_it(note, place):
    pixels = numbered(2, 8, 8)
    data = encode(pixels)
    at = 33 if place == "before" else len(data) - 12
    out = Image(8)({"image": data[:at] + CHUNKS[note] + data[at:]})["image"]
    np.testing.assert_array_equal(out, pixels)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("note", SEGMENTS)
def test_notes_of_a_jpeg_do_not_spoil_it(note, mode):
    data = encode(smooth(8, 8), "JPEG", mode)
    expected = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
    out = Image(8)({"image": data[:2] + SEGMENTS[note] + data[2:]})["image"]
    np.testing.assert_array_equal(out, expected)


def test_damage_of_the_pixels_still_counts():
    for kind in ("PNG", "JPEG", "TIFF", "WEBP"):
        data = encode(smooth(40, 40), kind)
        cuts = range(1, len(data), max(1, len(data) // 40))
        bad = [Image(40), Image(40, upright=True)]
        for cut in list(cuts)[:-1]:
            for image in bad:
                with pytest.raises(Exception):  # noqa: B017 - decoders raise what they like
                    image({"image": data[:cut]})


# ---- orientation ----


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_upright_turns_by_exif(kind, turn):
    exif = PIL.Image.Exif()
    exif[274] = turn
    data = encode(smooth(24, 40), kind, exif=exif)
    turned = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert("RGB")
    for fit, size in (("pad", 40), ("pad", 20), ("crop", 24), ("crop", 11)):
        as_it_lies = np.array(turned)  # an array, which has no EXIF
        expected = Image(size, fit)({"image": as_it_lies})
        out = Image(size, fit, upright=True)({"image": data})
        for name, x in expected.items():
            np.testing.assert_array_equal(out[name], x)


def test_a_large_jpeg_on_its_side_is_decoded_small():
    exif = PIL.Image.Exif()
    exif[274] = 6
    data = encode(smooth(400, 520), "JPEG", exif=exif, quality=95)
    turned = np.array(PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))))
    for fit in ("crop", "pad"):
        out = Image(32, fit, upright=True)({"image": data})["image"]
        expected = Image(32, fit)({"image": turned})["image"]
        assert np.abs(out.astype(int) - expected).mean() < 2


def test_the_first_picture_on_its_side_is_warned_of(caplog):
    from sslx.data.source import warned

    warned.cache_clear()
    exif = PIL.Image.Exif()
    exif[274] = 6
    pixels = smooth(16, 16)
    data = encode(pixels, "JPEG", exif=exif)
    with caplog.at_level(logging.WARNING, "sslx"):
        Image(16)({"image": encode(pixels, "JPEG")})
        assert not caplog.records
        for size in (16, 8):
            Image(size)({"image": data})
        Image(16, upright=True)({"image": data})
    assert [r.getMessage().count("upright=True") for r in caplog.records] == [1]


# ---- folders ----


def put(path, i=0, kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(numbered(i, 8, 8), kind))


def names(source):
    return [os.path.relpath(source[i]["name"], source.path) for i in range(len(source))]


def test_a_class_is_all_below_its_folder(tmp_path, caplog):
    for i, name in enumerate(("ant/0.png", "ant/deep/er/1.JFIF", "ant/deep/2.Tiff", "cow/3.PNG")):
        put(tmp_path / "set" / name, i)
    put(tmp_path / "elsewhere/4.png", 4)
    (tmp_path / "set/bee").mkdir()
    (tmp_path / "set/bee/notes.txt").touch()
    (tmp_path / "set/bee/x.heic").touch()
    (tmp_path / "set/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/cow/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/cow/ring").symlink_to(tmp_path / "set/cow")
    (tmp_path / "set/cow/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/cow/.hidden.png").touch()
    source = uris.open_uri(f"folder:{tmp_path}/set")
    ant = ["ant/0.png", "ant/deep/2.Tiff", "ant/deep/er/1.JFIF"]
    assert names(source) == [*ant, "cow/3.PNG", "cow/linked/4.png", "dog/4.png"]
    assert [source[i]["label"] for i in range(6)] == [0, 0, 0, 2, 2, 3]
    assert source.classes == ["ant", "bee", "cow", "dog"]
    assert "passed over 2 files (1 .txt, 1 .heic)" in caplog.text
    assert "3 pictures lie in folders below class folders, such as ant/deep," in caplog.text
    assert "no pictures in bee, counted among its classes all the same" in caplog.text


def test_pictures_a_folder_deeper_are_pointed_at(tmp_path):
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            put(tmp_path / split / name / "0.png")
    with pytest.raises(DataError, match=f"pictures lie deeper.*such as folder:{tmp_path}/train$"):
        uris.open_uri(f"folder:{tmp_path}")
    put(tmp_path / "train/loose.png")
    with pytest.raises(DataError, match=r"both pictures \(loose.png\) and class folders \(ant\)"):
        uris.open_uri(f"folder:{tmp_path}/train")
    (tmp_path / "none").mkdir()
    (tmp_path / "none/a.heic").touch()
    with pytest.raises(DataError, match=r"no pictures .*, only 1 file \(1 .heic\)"):
        uris.open_uri(f"folder:{tmp_path}/none")


def test_classes_whose_pictures_all_lie_in_one_folder_below_are_read(tmp_path, caplog):
    """CLASS/images/*.JPEG beside CLASS/boxes.txt, as Tiny ImageNet comes."""
    for i, name in enumerate(("n01", "n02", "n03")):
        put(tmp_path / name / "images/0.JPEG", i, "JPEG")
        (tmp_path / name / "boxes.txt").touch()
    source = uris.open_uri(f"folder:{tmp_path}")
    assert [source[i]["label"] for i in range(len(source))] == [0, 1, 2]
    assert "such as n01/images, and are of the class above them" in caplog.text
    for names in (("train", "val"), ("a", "b/c"), ("a", "b")):  # splits, other depths, two folders
        root = tmp_path / "-".join(names).replace("/", "+")
        for name in names:
            put(root / name / "images/0.png")
        if names == ("a", "b"):
            put(root / "a" / "masks/0.png")
        with pytest.raises(DataError, match="pictures lie deeper"):
            uris.open_uri(f"folder:{root}")


def test_what_is_no_file_is_no_picture(tmp_path, caplog):
    """A link that leads nowhere, to itself, to a folder or to a pipe is a record that is corrupt;
    a pipe, a socket and a folder are none. Nothing waits for a pipe."""
    for i in (0, 9):
        put(tmp_path / f"{i}.png", i)
    os.mkfifo(tmp_path / "1.png")
    (tmp_path / "2.png").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "3.png"))
    (tmp_path / "4.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "5.png").symlink_to(tmp_path / "5.png")
    (tmp_path / "6.png").symlink_to(tmp_path / "2.png")
    (tmp_path / "7.png").symlink_to(tmp_path / "1.png")
    (tmp_path / "8.png").symlink_to(tmp_path / "9.png")
    pipeline = Pipeline(f"folder:{tmp_path}", Image(8), max_corrupt=1.0, workers=0)
    assert len(pipeline) == 7
    with pipeline.epoch(7) as batches:
        batch = next(batches)
    assert batch["valid"].tolist() == [True, False, False, False, False, True, True]
    assert batch["image"][batch["valid"]][:, 0, 0, 0].tolist() == [0, 9, 9]
    reasons = "".join(batches.dropped.values())
    for words in ("4.png is a broken link", "symbolic links", "6.png is no file", "7.png is no fi"):
        assert words in reasons
    assert "passed over 2 files (2 pipe or device)" in caplog.text


def test_a_folder_is_listed_without_a_look_at_each_file(tmp_path, monkeypatch):
    """A million files are listed in seconds: no call per file, be it a link or not."""
    put(tmp_path / "a/0.png")
    for i in range(1, 60):
        (tmp_path / f"a/{i}.png").symlink_to("0.png")
    calls, stat = [], os.stat

    def counted(*args, **options):
        calls.append(args)
        return stat(*args, **options)

    monkeypatch.setattr(folder.os, "stat", counted)
    assert len(uris.folder(str(tmp_path))) == 60
    assert len(calls) < 10
