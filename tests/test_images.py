"""Unit tests of raycap.images: each kind of file gets its own status, and the pixels are the right ones."""

from __future__ import annotations

import json
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raycap.errors import ConfigurationError, ImageError, ImageTooLargeError, TruncatedImageError, UnsupportedImageError
from raycap.images import IMAGE_SUFFIXES, DecodedImage, ImageLimits, Preprocessing, decode_image
from tests.hostile import (
    HEIGHT,
    WIDTH,
    base_picture,
    encode,
    exif_with_orientation,
    grey_16_bit,
    hostile_files,
    png,
    png_chunk,
    png_header,
    with_alpha,
    ycck_jpeg,
)

SMALL = Preprocessing(size_px=64)
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def decode(data: bytes, **options: Any) -> DecodedImage:
    return decode_image(data, replace(SMALL, **options))


def status(data: bytes) -> str:
    try:
        decode(data)
    except ImageError as error:
        return error.code
    return "ok"


def expected(image: Image.Image) -> np.ndarray[Any, Any]:
    """What squashing should make of an upright RGB picture."""
    return np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)).astype(int)


def difference(decoded: DecodedImage, image: Image.Image) -> float:
    """Mean absolute difference from the picture, in levels of 255."""
    return float(np.abs(decoded.pixels_HWC.astype(int) - expected(image)).mean())


def grey_of(data: bytes) -> set[int]:
    """The levels of a picture that must have come out grey."""
    pixels_HWC = decode(data).pixels_HWC
    assert (pixels_HWC == pixels_HWC[:, :, :1]).all()
    return {int(level) for level in np.unique(pixels_HWC)}


@pytest.mark.parametrize("name", hostile_files())
def test_every_hostile_file_gets_its_own_status(name: str) -> None:
    data, wanted = hostile_files()[name]
    assert status(data) == wanted


def test_hostile_files_cover_every_code() -> None:
    codes = {wanted for _, wanted in hostile_files().values()}
    assert codes == {"ok", *(error.code for error in ImageError.__subclasses__())}


def test_hostile_files_are_the_same_every_time() -> None:
    assert hostile_files.__wrapped__() == hostile_files()


@pytest.mark.parametrize("name", [name for name, (_, wanted) in hostile_files().items() if wanted == "ok"])
@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_output_is_contiguous_writable_uint8(name: str, resize: str) -> None:
    pixels_HWC = decode(hostile_files()[name][0], resize=resize).pixels_HWC
    assert pixels_HWC.shape == (64, 64, 3)
    assert pixels_HWC.dtype == np.uint8
    assert pixels_HWC.flags.c_contiguous
    assert pixels_HWC.flags.writeable


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("plain.jpg", 2),
        ("progressive.jpg", 2),
        ("profile.jpg", 2),
        ("rotated.jpg", 3),
        ("plain.png", 0),
        ("really-a-png.jpg", 0),
        ("animated.png", 0),
        ("lossy.webp", 3),
        ("animated.webp", 3),
        ("animated.gif", 6),
        ("2000-frames.gif", 6),
        ("plain.bmp", 0),
        ("plain.tiff", 0),
        ("lzw.tif", 0),
    ],
)
def test_pixels_are_those_of_the_picture(name: str, tolerance: float) -> None:
    decoded = decode(hostile_files()[name][0])
    assert difference(decoded, base_picture()) <= tolerance
    assert (decoded.width, decoded.height) == (WIDTH, HEIGHT)


def test_format_is_that_of_the_bytes() -> None:
    formats = {name: decode(data).format for name, (data, wanted) in hostile_files().items() if wanted == "ok"}
    assert formats["really-a-png.jpg"] == formats["no-suffix"] == "PNG"
    assert set(formats.values()) == {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation: int, format: str) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = base_picture().transpose(undo[orientation]) if orientation in undo else base_picture()
    decoded = decode(encode(stored, format, exif=exif_with_orientation(orientation)))
    assert (decoded.width, decoded.height) == (WIDTH, HEIGHT)
    assert difference(decoded, base_picture()) <= 3


@pytest.mark.parametrize(
    "image",
    [with_alpha(), with_alpha().convert("LA"), with_alpha().convert("LA").convert("RGBA")],
    ids=["RGBA", "LA", "grey RGBA"],
)
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_alpha_is_composited_on_white(image: Image.Image, format: str) -> None:
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    rgba_HWC = np.asarray(image.convert("RGBA")).astype(float)
    alpha_HW1 = rgba_HWC[:, :, 3:] / 255
    flat_HWC = rgba_HWC[:, :, :3] * alpha_HW1 + 255 * (1 - alpha_HW1)
    decoded = decode(encode(image, format, **options))
    assert difference(decoded, Image.fromarray(np.rint(flat_HWC).astype(np.uint8))) < 1
    assert decoded.pixels_HWC[:, -1].min() > 245


def test_fully_transparent_is_white() -> None:
    assert (decode(encode(Image.new("RGBA", (9, 9), (10, 20, 30, 0)), "PNG")).pixels_HWC == 255).all()


def test_palette_transparency_is_white() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.paste(1, (4, 0, 8, 8))
    for format in ("PNG", "GIF"):
        pixels_HWC = decode(encode(image, format, transparency=0)).pixels_HWC
        assert tuple(pixels_HWC[32, 4]) == WHITE
        assert tuple(pixels_HWC[32, 60]) == (200, 0, 0)


def test_single_transparent_colour_is_white() -> None:
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    assert (decode(encode(image, "PNG", transparency=(1, 2, 3))).pixels_HWC == 255).all()


@pytest.mark.parametrize(("sample", "level"), [(0, 0), (255, 0), (256, 1), (32_768, 128), (65_535, 255)])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(format: str, sample: int, level: int) -> None:
    data = encode(Image.fromarray(np.full((8, 8), sample, dtype=np.uint16)), format)
    assert grey_of(data) == {level}


def test_16_bit_grey_and_colour_agree() -> None:
    samples_HWC = np.repeat(np.asarray(grey_16_bit())[:, :, None], 3, axis=2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in samples_HWC)
    colour = png(png_header(WIDTH, HEIGHT, bits=16), png_chunk(b"IDAT", zlib.compress(rows)))
    assert (decode(colour).pixels_HWC == decode(encode(grey_16_bit(), "PNG")).pixels_HWC).all()


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_in_both_byte_orders(order: str) -> None:
    mark = b"II" if order == "<" else b"MM"
    short = {256: 4, 257: 4, 258: 16, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 4, 279: 32}
    entries = b"".join(struct.pack(order + "HHIHxx", tag, 3, 1, value) for tag, value in short.items())
    pixels = np.full((4, 4), 0x8001, dtype=order + "u2").tobytes()
    data = mark + struct.pack(order + "HIH", 42, 8, len(short)) + entries + bytes(4) + pixels
    assert grey_of(data) == {0x80}


@pytest.mark.parametrize(
    ("samples", "levels"),
    [
        (np.array([[0.0, 1.0]], dtype=np.float32), {0, 255}),
        (np.array([[0.5, 0.5]], dtype=np.float32), {128}),
        (np.array([[0.0, 200.0]], dtype=np.float32), {0, 200}),
        (np.array([[-5.0, 5.0]], dtype=np.float32), {0, 255}),
        (np.array([[-3e38, 3e38]], dtype=np.float32), {0, 255}),
        (np.array([[np.nan, np.inf]], dtype=np.float32), {0}),
        (np.array([[-1e-38, -1e-38]], dtype=np.float32), {0}),
        (np.array([[0, 65_535]], dtype=np.int32), {0, 255}),
        (np.array([[7, 7]], dtype=np.int32), {7}),
        (np.array([[-(2**31), 2**31 - 1]], dtype=np.int32), {0, 255}),
    ],
)
def test_wide_samples(samples: np.ndarray[Any, Any], levels: set[int]) -> None:
    image = Image.fromarray(samples).resize((64, 64), Image.Resampling.NEAREST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert grey_of(encode(image, "TIFF")) == levels


def test_one_bit() -> None:
    assert grey_of(encode(Image.new("1", (8, 8), 1), "PNG")) == {255}


@pytest.mark.parametrize(
    "data",
    [
        encode(base_picture().convert("CMYK"), format, **options)
        for format, options in (("JPEG", {"quality": 95}), ("TIFF", {}))
    ],
    ids=["JPEG", "TIFF"],
)
def test_cmyk_is_close_to_the_original(data: bytes) -> None:
    assert difference(decode(data), base_picture()) <= 3


def test_cmyk_jpeg_without_adobe_marker_is_not_inverted() -> None:
    cmyk = base_picture().convert("CMYK")
    inverted = Image.merge("CMYK", [band.point(lambda level: 255 - level) for band in cmyk.split()])
    data = encode(inverted, "JPEG", quality=95)
    at = data.index(b"\xff\xee")
    length = struct.unpack(">H", data[at + 2 : at + 4])[0]
    assert difference(decode(data[:at] + data[at + 2 + length :]), base_picture()) <= 3


def test_ycck_is_converted_once() -> None:
    """The marker alone says YCCK here, so the colours are those that the formula makes of the CMYK samples."""
    stored = Image.open(BytesIO(encode(base_picture().convert("CMYK"), "JPEG", quality=90)))
    y_cb_cr_k_HWC = 255 - np.asarray(stored).astype(float)
    y_HW, cb_HW, cr_HW, k_HW = np.moveaxis(y_cb_cr_k_HWC, -1, 0)
    rgb_HWC = np.stack(
        [
            y_HW + 1.402 * (cr_HW - 128),
            y_HW - 0.344136 * (cb_HW - 128) - 0.714136 * (cr_HW - 128),
            y_HW + 1.772 * (cb_HW - 128),
        ],
        axis=-1,
    ).clip(0, 255)
    ink_HWC = 255 - rgb_HWC
    wanted = Image.fromarray((ink_HWC * k_HW[:, :, None] / 255).clip(0, 255).astype(np.uint8))
    assert difference(decode(ycck_jpeg()), wanted) <= 3


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert tuple(decode(data).pixels_HWC[5, 5]) == RED, format


def stripes(width: int, height: int) -> bytes:
    """A PNG in three equal stripes along its long side: red, green, blue."""
    image = Image.new("RGB", (width, height), GREEN)
    third = max(width, height) // 3
    image.paste(RED, (0, 0, third, height) if width > height else (0, 0, width, third))
    image.paste(BLUE, (2 * third, 0, width, height) if width > height else (0, 2 * third, width, height))
    return encode(image, "PNG")


@pytest.mark.parametrize("upright", [False, True])
class TestGeometry:
    """A picture three times as long as it is broad, seen along its long side in the middle of the square."""

    def line(self, resize: str, upright: bool) -> list[tuple[int, ...]]:
        pixels_HWC = decode(stripes(30, 90) if upright else stripes(90, 30), resize=resize).pixels_HWC
        line_LC = pixels_HWC[:, 32] if upright else pixels_HWC[32]
        return [tuple(int(v) for v in line_LC[i]) for i in (2, 32, 61)]

    def across(self, resize: str, upright: bool) -> list[tuple[int, ...]]:
        pixels_HWC = decode(stripes(30, 90) if upright else stripes(90, 30), resize=resize).pixels_HWC
        line_LC = pixels_HWC[32] if upright else pixels_HWC[:, 32]
        return [tuple(int(v) for v in line_LC[i]) for i in (2, 20, 23, 32, 40, 43, 61)]

    def test_squash_shows_everything(self, upright: bool) -> None:
        assert self.line("squash", upright) == [RED, GREEN, BLUE]
        assert set(self.across("squash", upright)) == {GREEN}

    def test_crop_shows_the_middle(self, upright: bool) -> None:
        assert self.line("crop", upright) == [GREEN, GREEN, GREEN]
        assert set(self.across("crop", upright)) == {GREEN}

    def test_pad_shows_everything_between_grey(self, upright: bool) -> None:
        grey = (127, 127, 127)
        assert self.line("pad", upright) == [RED, GREEN, BLUE]
        assert self.across("pad", upright) == [grey, grey, GREEN, GREEN, GREEN, grey, grey]

    @pytest.mark.parametrize(("resize", "shown"), [("squash", (0, 1)), ("crop", (1 / 3, 2 / 3)), ("pad", (0, 1))])
    def test_box_is_what_the_square_shows(self, resize: str, shown: tuple[float, float], upright: bool) -> None:
        across = (-1, 2) if resize == "pad" else (0, 1)
        (left, right), (top, bottom) = (across, shown) if upright else (shown, across)
        box = Preprocessing(resize=resize).box(*((30, 90) if upright else (90, 30)))  # type: ignore[arg-type]
        assert box == pytest.approx((left, top, right, bottom))


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (2, 3)])
def test_extreme_shapes(resize: str, size: tuple[int, int]) -> None:
    decoded = decode(encode(Image.new("RGB", size, RED), "PNG"), resize=resize)
    assert (decoded.width, decoded.height) == size
    assert tuple(decoded.pixels_HWC[31, 31]) == RED


@pytest.mark.parametrize("size_px", [1, 7, 224, 299])
def test_size(size_px: int) -> None:
    assert decode(encode(base_picture(), "JPEG"), size_px=size_px).pixels_HWC.shape == (size_px, size_px, 3)


def test_interpolations_differ() -> None:
    data = encode(base_picture(), "PNG")
    bilinear, bicubic = (decode(data, interpolation=name).pixels_HWC for name in ("bilinear", "bicubic"))
    assert (bilinear != bicubic).any()
    assert np.abs(bilinear.astype(int) - bicubic).mean() < 2


def test_reduced_jpeg_decoding_is_close_to_full_decoding() -> None:
    """1280 x 960 for 64 px is decoded at one eighth."""
    large = base_picture().resize((8 * WIDTH, 8 * HEIGHT), Image.Resampling.BICUBIC)
    decoded = decode(encode(large, "JPEG", quality=95))
    assert (decoded.width, decoded.height) == large.size
    assert difference(decoded, large) < 1.5


def test_byte_limit() -> None:
    data = encode(base_picture(), "PNG")
    decode_image(data, SMALL, ImageLimits(max_bytes=len(data)))
    with pytest.raises(ImageTooLargeError, match="max_bytes"):
        decode_image(data, SMALL, ImageLimits(max_bytes=len(data) - 1))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_pixel_limit(format: str) -> None:
    data = encode(base_picture(), format)
    decode_image(data, SMALL, ImageLimits(max_pixels=WIDTH * HEIGHT))
    with pytest.raises(ImageTooLargeError, match="160 x 120"):
        decode_image(data, SMALL, ImageLimits(max_pixels=WIDTH * HEIGHT - 1))


def test_pixel_limit_is_checked_before_decoding() -> None:
    """There are no pixels at all behind this header, so decoding it would say that it is cut off."""
    with pytest.raises(ImageTooLargeError):
        decode(png(png_header(20_000, 20_000), png_chunk(b"IDAT", b"")))
    with pytest.raises(TruncatedImageError):
        decode(png(png_header(200, 200), png_chunk(b"IDAT", b"")))


def test_limit_above_pillows_own() -> None:
    """The limit that counts is ours: a header of 400 million pixels passes where it is allowed."""
    data = png(png_header(20_000, 20_000, bits=1, color_type=0), png_chunk(b"IDAT", b""))
    with pytest.raises(TruncatedImageError):
        decode_image(data, SMALL, ImageLimits(max_pixels=10**9))


@pytest.mark.parametrize(
    "name", ["plain.jpg", "progressive.jpg", "plain.png", "animated.gif", "lossy.webp", "plain.bmp"]
)
def test_no_cut_returns_a_partial_picture(name: str) -> None:
    data, whole = hostile_files()[name][0], decode(hostile_files()[name][0]).pixels_HWC
    for length in range(20, len(data), len(data) // 40):
        try:
            assert (decode(data[:length]).pixels_HWC == whole).all()
        except TruncatedImageError:
            continue


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_cut_tiff(compression: str) -> None:
    data = encode(base_picture(), "TIFF", compression=compression)
    assert {status(data[:length]) for length in range(9, len(data), len(data) // 20)} == {"truncated"}


def test_messages_say_what_came_and_what_to_do() -> None:
    with pytest.raises(UnsupportedImageError, match=r"expected JPEG, .* got HEIC; convert it"):
        decode(hostile_files()["phone.heic"][0])
    with pytest.raises(ImageTooLargeError, match=r"50,000 x 50,000.*max_pixels"):
        decode(hostile_files()["bomb.png"][0])


def test_seeded_fuzz() -> None:
    """Damaged headers and pixels: a picture or an ImageError, never anything else, and no warning."""
    rng = np.random.default_rng(4)
    sound = [data for data, wanted in hostile_files().values() if wanted == "ok" and len(data) < 40_000]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(600):
            data = bytearray(sound[i % len(sound)])
            reach = len(data) if i % 2 else min(len(data), 300)
            for at in rng.integers(0, reach, size=rng.integers(1, 6)):
                data[at] = rng.integers(256)
            if i % 5 == 0:
                del data[int(rng.integers(reach)) :][:50]
            assert status(bytes(data)) in {
                "ok",
                "corrupt",
                "truncated",
                "not_an_image",
                "unsupported_format",
                "too_large",
            }


def test_nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for data, _ in hostile_files().values():
            status(data)
    assert capfd.readouterr() == ("", "")


def test_threads_agree_with_one_thread() -> None:
    files = [data for data, _ in hostile_files().values()]

    def outcome(data: bytes) -> bytes | str:
        try:
            return decode(data).pixels_HWC.tobytes()
        except ImageError as error:
            return str(error)

    alone = [outcome(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, files * 4)) == alone * 4


def test_pillow_settings_are_left_alone() -> None:
    before = Image.MAX_IMAGE_PIXELS
    for data, _ in hostile_files().values():
        status(data)
    assert before == Image.MAX_IMAGE_PIXELS


def test_preprocessing_survives_json() -> None:
    preprocessing = Preprocessing(size_px=299, resize="pad", interpolation="bilinear")
    assert Preprocessing(**json.loads(json.dumps(asdict(preprocessing)))) == preprocessing


@pytest.mark.parametrize(
    "options",
    [
        {"size_px": 0},
        {"size_px": -1},
        {"size_px": 224.0},
        {"size_px": True},
        {"size_px": "224"},
        {"size_px": 10**6},
        {"resize": "stretch"},
        {"interpolation": "nearest"},
    ],
)
def test_bad_preprocessing(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Preprocessing(**options)


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"max_pixels": -5}, {"max_pixels": 1.5}, {"max_bytes": True}])
def test_bad_limits(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        ImageLimits(**options)


def test_suffixes() -> None:
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in IMAGE_SUFFIXES)
    assert {".jpg", ".png", ".webp", ".tiff"} <= IMAGE_SUFFIXES
