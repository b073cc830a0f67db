"""Encoded pictures: bytes of a file -> a Pillow picture of 8 bits a channel."""

import io
import math
import struct
import threading
import warnings
import zlib

import numpy as np
import PIL.Image
from PIL.JpegImagePlugin import JpegImageFile

# What Pillow opens more of is rare, and some of it runs other programs (EPS: Ghostscript).
FORMATS = ("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO", "AVIF")
LOCK = threading.Lock()
NOTES = {0xE0: (b"JFIF", 18), 0xE1: (b"Exif\0\0", 10), 0xEE: (b"Adobe", 16)}  # that tell of pixels


def opened(data: bytes | None):
    """Encoded bytes -> a Pillow picture, not yet decoded; too many pixels raise."""
    if not data:
        raise ValueError("no bytes: the record holds no picture, or only the path of one")
    if data[:3] == b"\xff\xd8\xff":
        picture = Jpeg(io.BytesIO(bare_jpeg(data)))
    else:
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            data = bare_png(data)
        try:
            with LOCK, warnings.catch_warnings():  # Pillow warns of a bomb, only twice that raises
                warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
                picture = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        except (PIL.UnidentifiedImageError, KeyError) as error:  # KeyError: a Pillow without AVIF
            raise ValueError(
                f"its {len(data)} bytes, which begin with {data[:8]!r}, are no whole picture of "
                f"JPEG, {', '.join(FORMATS)}"
            ) from error
    w, h = picture.size
    if w * h > (PIL.Image.MAX_IMAGE_PIXELS or math.inf):
        raise PIL.Image.DecompressionBombError(f"{w} x {h} pixels")
    return picture


class Jpeg(JpegImageFile):
    """A JPEG, opened without probing for formats and without EXIF, whose damage would only warn."""

    def _read_dpi_from_exif(self):
        pass


def bare_jpeg(data: bytes) -> bytes:
    """A JPEG without comments, profiles and previews: no pixel depends on them, and Pillow refuses
    the picture where one is damaged. JFIF and Adobe tell of colors, Exif of the orientation."""
    kept, at = [data[:2]], 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":  # the pixels begin
        marker, size = struct.unpack_from(">xBH", data[at : at + 4].ljust(4))
        part = data[at : at + 2 + size]
        if marker == 0xFF or size < 2 or len(part) < 2 + size:
            break  # padding or damage: for Pillow to judge
        start, least = NOTES.get(marker, (b"", len(data)))
        if marker < 0xE0 or (part[4:].startswith(start) and len(part) >= least):  # no APPn, COM
            kept.append(part)
        at += 2 + size
    return b"".join(kept) + data[at:]


def bare_png(data: bytes) -> bytes:
    """A PNG without texts, profiles and animation, of which the pixels of its picture do not depend
    and of which Pillow refuses damaged or large ones; Exif stays if it is sound."""
    kept, at = [data[:8]], 8
    while at + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        part = data[at : at + 12 + size]
        sound = kind == b"eXIf" and zlib.crc32(part[4:-4]).to_bytes(4) == part[-4:]
        if not kind[:1].islower() or kind == b"tRNS" or sound:
            kept.append(part)
        at += 12 + size
    return b"".join(kept) + data[at:]


def orientation(picture) -> int:
    """How a picture lies, 1 to 8, by its EXIF; 1 is upright, as are TIFFs, which Pillow turns
    itself, and pictures whose EXIF is damaged."""
    if "exif" not in picture.info:
        return 1
    exif = PIL.Image.Exif()
    try:
        exif.load(picture.info["exif"])
        return exif.get(274, 1)
    except Exception:  # damaged EXIF raises this and that; the pixels may be sound
        return 1


def flat(picture, mode: str):
    """Any Pillow mode -> RGB or L; transparency is laid on white."""
    if picture.mode == mode and "transparency" not in picture.info:
        return picture
    if picture.mode[0] in "IF":
        picture = PIL.Image.fromarray(eight_bits(picture))
    if "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        color = picture.convert("RGBA")
        picture = PIL.Image.new("RGBA", color.size, "white")
        picture.alpha_composite(color)
    return picture if picture.mode == mode else picture.convert(mode)


def eight_bits(picture) -> np.ndarray:
    """Gray of more than 8 bits -> uint8 [H, W], by the range of its type and not of its values.

    16 bits, or the 12 that a TIFF says, lose the low ones; floats are 0 to 1. Raises ValueError for
    other floats, and for integers of 32 bits or with a sign, whose range nothing tells.
    """
    x, mode, tiff = np.asarray(picture), picture.mode, picture.format == "TIFF"
    if mode == "F":
        if not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(
                f"its floats are from {x.min():.4g} to {x.max():.4g}: only those from 0 to 1 tell "
                "their range; store 8 or 16 bits"
            )
        x = np.rint(x * 255).astype(np.uint8)
    elif tiff and mode == "I":
        raise ValueError("integers of 32 bits, or with a sign, tell no range: store 8 or 16 bits")
    else:
        bits = picture.tag_v2.get(258, (16,))[0] if tiff else 16
        x = np.clip(x.astype(np.int32) >> (bits - 8), 0, 255).astype(np.uint8)
    return 255 - x if tiff and picture.tag_v2.get(262) == 0 else x  # white is zero
