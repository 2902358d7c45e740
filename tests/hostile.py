"""Hostile and unusual image files, built in code: every kind a bucket of real uploads holds.

`hostile_files()` maps a file name to its bytes and to what must come of it: "ok", or the `code` of the error. Names are
part of the test: some have spaces, percent signs or no fitting suffix. One version of Pillow builds the same bytes
every time.
"""

from __future__ import annotations

import gzip
import struct
import zipfile
import zlib
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 160, 120
"""Size of `base_picture`: small, so that building and decoding all of them takes well under a second."""


@cache
def base_picture() -> Image.Image:
    """RGB, smooth colours with a little seeded noise. Its four corners differ, so a rotation shows."""
    down_H1, right_1W = np.linspace(0, 1, HEIGHT)[:, None], np.linspace(0, 1, WIDTH)[None, :]
    red_HW = 230 * down_H1 * (1 - right_1W)
    green_HW = 230 * (1 - down_H1) * right_1W
    blue_HW = 200 * down_H1 * right_1W
    noise_HWC = np.random.default_rng(20260101).normal(0, 3, (HEIGHT, WIDTH, 3))
    pixels_HWC = np.stack([red_HW, green_HW, blue_HW], axis=-1) + 15 + noise_HWC
    return Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    """The bytes of one image file."""
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exif_with_orientation(orientation: int) -> bytes:
    """EXIF data that holds nothing but the orientation tag."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def png_chunk(kind: bytes, body: bytes, *, crc: int | None = None) -> bytes:
    """One PNG chunk, with the right checksum unless another is given."""
    checksum = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png(*chunks: bytes) -> bytes:
    """A PNG file of these chunks and an end chunk."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + png_chunk(b"IEND", b"")


def png_header(width: int, height: int, *, bits: int = 8, color_type: int = 2) -> bytes:
    """The IHDR chunk."""
    return png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))


def grey_16_bit() -> Image.Image:
    """The base picture's green channel over the full range of 16 bits."""
    return Image.fromarray(np.asarray(base_picture().getchannel("G")).astype(np.uint16) * 257)


def with_alpha() -> Image.Image:
    """The base picture, fading out from opaque on the left to transparent on the right."""
    image = base_picture().convert("RGBA")
    alpha_HW = np.repeat(np.linspace(255, 0, WIDTH).astype(np.uint8)[None, :], HEIGHT, axis=0)
    image.putalpha(Image.fromarray(alpha_HW))
    return image


def palette_with_transparency() -> bytes:
    """A palette PNG with an alpha value for every palette entry."""
    return encode(base_picture().quantize(64), "PNG", transparency=bytes(range(0, 256, 4)))


def animation(format: str, num_frames: int = 3, **options: Any) -> bytes:
    """The base picture first, then turned and inverted ones."""
    frames = [base_picture().rotate(90 * i) for i in range(num_frames)]
    return encode(frames[0], format, save_all=True, append_images=frames[1:], duration=40, **options)


def ycck_jpeg() -> bytes:
    """A four-channel JPEG whose Adobe marker says YCCK, as Photoshop writes CMYK."""
    data = encode(base_picture().convert("CMYK"), "JPEG", quality=90)
    at = data.index(b"Adobe") + 11
    return data[:at] + b"\x02" + data[at + 1 :]


def _zip(name: str, body: bytes) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), body)
    return buffer.getvalue()


def _sound_files(picture: Image.Image) -> dict[str, bytes]:
    grey = picture.convert("L")
    grey_alpha = with_alpha().convert("LA")
    profile = np.random.default_rng(1).bytes(500_000)  # eight segments of a colour profile that is none
    gif_frame = b"," + struct.pack("<4H", 0, 0, 1, 1) + b"\0\x02\x02\x44\x01\0"
    stripe = Image.fromarray(np.asarray(picture)[:, :1].repeat(4000 // HEIGHT + 1, axis=0)[:4000])
    return {
        "plain.jpg": encode(picture, "JPEG"),
        "a b/ü%20+#.jpg": encode(picture, "JPEG", quality=80),
        "UPPER.JPG": encode(picture, "JPEG", quality=70),
        "progressive.jpg": encode(picture, "JPEG", progressive=True),
        "grey.jpg": encode(grey, "JPEG"),
        "cmyk.jpg": encode(picture.convert("CMYK"), "JPEG"),
        "ycck.jpg": ycck_jpeg(),
        "rotated.jpg": encode(picture.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif_with_orientation(6)),
        "absurd-exif.jpg": encode(picture, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(range(256))),
        "wrong-orientation.jpg": encode(picture, "JPEG", exif=exif_with_orientation(4711)),
        "profile.jpg": encode(picture, "JPEG", icc_profile=profile),
        "trailing-bytes.jpg": encode(picture, "JPEG") + b"appended by the camera" + bytes(64),
        "plain.png": encode(picture, "PNG"),
        "no-suffix": encode(picture, "PNG"),
        "really-a-png.jpg": encode(picture, "PNG"),
        "16-bit.png": encode(grey_16_bit(), "PNG"),
        "1-bit.png": encode(grey.convert("1"), "PNG"),
        "alpha.png": encode(with_alpha(), "PNG"),
        "grey-alpha.png": encode(grey_alpha, "PNG"),
        "palette-transparency.png": palette_with_transparency(),
        "animated.png": animation("PNG"),
        "1x1.png": encode(picture.resize((1, 1)), "PNG"),
        "1x4000.png": encode(stripe, "PNG"),
        "animated.gif": animation("GIF"),
        "2000-frames.gif": animation("GIF")[:-1] + gif_frame * 2000 + b";",
        "lossy.webp": encode(picture, "WEBP"),
        "alpha-lossless.webp": encode(with_alpha(), "WEBP", lossless=True),
        "animated.webp": animation("WEBP"),
        "plain.bmp": encode(picture, "BMP"),
        "plain.tiff": encode(picture, "TIFF"),
        "lzw.tif": encode(picture, "TIFF", compression="tiff_lzw"),
        "16-bit.tif": encode(grey_16_bit(), "TIFF"),
        "float.tif": encode(Image.fromarray(np.asarray(grey, dtype=np.float32) / 255), "TIFF"),
    }


def _broken_files(picture: Image.Image) -> dict[str, tuple[bytes, str]]:
    jpeg, whole_png = encode(picture, "JPEG"), encode(picture, "PNG")
    webp, tiff, gif = encode(picture, "WEBP"), encode(picture, "TIFF"), encode(picture, "GIF")
    bomb_row = zlib.compress(bytes(1 + 50_000 // 8) * 64, 9)
    scrambled = bytearray(whole_png)
    scrambled[len(scrambled) // 2 : len(scrambled) // 2 + 64] = bytes(range(64))
    noise = np.random.default_rng(7).bytes(2048)
    heading = b"<!DOCTYPE html>\n<html><head><title>403 Forbidden</title></head>"
    long_text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3 * 2**20), 9))
    return {
        "empty.jpg": (b"", "empty"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut-in-header.jpg": (jpeg[:200], "truncated"),
        "zero-filled.jpg": (jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2), "truncated"),
        "half.png": (whole_png[: len(whole_png) // 2], "truncated"),
        "half.webp": (webp[: len(webp) // 2], "truncated"),
        "half.tiff": (tiff[: len(tiff) // 2], "truncated"),
        "half.gif": (gif[: len(gif) // 2], "truncated"),
        "noise-after-header.jpg": (jpeg[:20] + b"\xff\xc0\x00\x03" + noise, "corrupt"),
        "broken-pixels.png": (bytes(scrambled), "corrupt"),
        "broken-header-crc.png": (png(png_chunk(b"IHDR", bytes(13), crc=1)), "corrupt"),
        "zero-width.png": (png(png_header(0, 10), png_chunk(b"IDAT", zlib.compress(b""))), "corrupt"),
        "huge-comment.png": (whole_png[:33] + long_text + whole_png[33:], "corrupt"),
        "bomb.png": (png(png_header(50_000, 50_000, bits=1, color_type=0), png_chunk(b"IDAT", bomb_row)), "too_large"),
        "text.jpg": (b"this is not the picture you are looking for\n", "not_an_image"),
        "BM-text.bmp": (b"BM stands for bitmap, and for many other things\n", "not_an_image"),
        "error-page.jpg": (heading + b"<body><svg width='1'/></body></html>", "not_an_image"),
        "archive.jpg": (_zip("photo.jpg", jpeg), "not_an_image"),
        "compressed.jpg": (gzip.compress(jpeg, mtime=0), "not_an_image"),
        "document.jpg": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n", "not_an_image"),
        "drawing.png": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>\n', "unsupported_format"),
        "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "unsupported_format"),
        "phone.avif": (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(64), "unsupported_format"),
        "layers.psd": (b"8BPS\0\x01" + bytes(64), "unsupported_format"),
        "favicon.ico": (encode(picture.resize((16, 16)), "ICO"), "unsupported_format"),
        "plain.ppm": (encode(picture, "PPM"), "unsupported_format"),
        "12-bit.jpg": (jpeg.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"), "unsupported_format"),
    }


@cache
def hostile_files() -> dict[str, tuple[bytes, str]]:
    """File name -> (bytes, "ok" or the expected error code)."""
    picture = base_picture()
    files = {name: (data, "ok") for name, data in _sound_files(picture).items()}
    return files | _broken_files(picture)
