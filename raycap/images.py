"""Bytes of an image file -> uint8 RGB pixels of one fixed size. The only preprocessing of raycap.

Training, the bulk job and the endpoint all call `decode_image`, so the same bytes and the same `Preprocessing` give the
same pixels everywhere. Normalisation is not done here: it belongs to the encoder.

Knows nothing of Ray, the network, torch or the model. Bytes are hostile until decoded: whatever they hold,
`decode_image` either returns a picture or raises an `ImageError`. Colour profiles are ignored; of an animation the
first frame counts.

Shape suffixes: H height, W width, C the three channels red, green, blue.
"""

from __future__ import annotations

import logging
import re
import struct
import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final, Literal

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from raycap.errors import (
    ConfigurationError,
    CorruptImageError,
    EmptyImageError,
    ImageError,
    ImageTooLargeError,
    NotAnImageError,
    TruncatedImageError,
    UnsupportedImageError,
)

__all__ = ["IMAGE_SUFFIXES", "UNREAD_IMAGE_SUFFIXES", "DecodedImage", "ImageLimits", "Preprocessing", "decode_image"]

IMAGE_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"}
)
"""Names of the formats that are read, lower-case. Decoding goes by content, never by the name."""

UNREAD_IMAGE_SUFFIXES: Final = frozenset(
    {".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".psd", ".ico", ".svg", ".eps", ".xcf"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".dds", ".qoi", ".exr", ".tga", ".dng", ".cr2", ".nef", ".arw"}
)
"""Names of pictures that are not read. Their owner wants to hear that they failed, so they are tried as well."""

_PAD_GREY: Final = (127, 127, 127)
"""Colour beside a padded picture: mid-range, so about zero after normalisation, as a convolution's own padding is."""

_DRAFT_FACTOR: Final = 2
"""A JPEG is decoded to no less than this many times the final size on both sides (see `_load`)."""

_TRANSPOSE: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a stored picture upright, by its EXIF orientation (EXIF 2.32, tag 0x0112)."""

_UNSUPPORTED_MAGIC: Final = (
    (re.compile(rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)", re.DOTALL), "HEIC"),
    (re.compile(rb"....ftyp(avif|avis)", re.DOTALL), "AVIF"),
    (re.compile(rb"8BPS"), "Photoshop (PSD)"),
    (re.compile(rb"\x00\x00[\x01\x02]\x00[^\x00]\x00"), "icon (ICO, CUR)"),
    (re.compile(rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51"), "JPEG 2000"),
    (re.compile(rb"\x00\x00\x00\x0cJXL |\xff\x0a"), "JPEG XL"),
    (re.compile(rb"P[1-7][\s#]"), "Netpbm (PBM, PGM, PPM)"),
    (re.compile(rb"%!PS-Adobe-\d\.\d EPSF"), "EPS"),
    (re.compile(rb"DDS \x7c"), "DDS"),
    (re.compile(rb"qoif"), "QOI"),
    (re.compile(rb"\x76\x2f\x31\x01"), "OpenEXR"),
    (re.compile(rb"gimp xcf"), "GIMP (XCF)"),
    (re.compile(rb"(?is)(\xef\xbb\xbf)?\s*((<\?xml|<!--|<!doctype svg)(?!.*<html).*?)?<svg"), "SVG"),
)
"""How pictures of formats that raycap does not read begin: it names them instead of calling them no image."""

_SNIFFED_BYTES: Final = 4096
"""How much of the start is searched for the signs above. An SVG may have a licence comment before its first tag."""


Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in widths and heights of a picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How a picture becomes the square the encoder sees. Saved in the model bundle's config."""

    size_px: int = 224
    """Side of the square, in pixels."""

    resize: Literal["squash", "crop", "pad"] = "squash"
    """How a picture becomes square. "squash" resizes both sides and ignores the aspect ratio, so nothing is cut off;
    "crop" takes the largest centred square; "pad" fits the long side and puts mid-grey beside the short one."""

    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Resampling filter. Both are antialiased when they shrink."""

    def __post_init__(self) -> None:
        if isinstance(self.size_px, bool) or not isinstance(self.size_px, int) or not 1 <= self.size_px <= 4096:
            raise ConfigurationError(f"size_px must be a whole number of pixels from 1 to 4096, not {self.size_px!r}")
        if self.resize not in ("squash", "crop", "pad"):
            raise ConfigurationError(f'resize must be "squash", "crop" or "pad", not {self.resize!r}')
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ConfigurationError(f'interpolation must be "bilinear" or "bicubic", not {self.interpolation!r}')

    def box(self, width: int, height: int) -> Box:
        """Where the square lies over a picture of that size: one that was cropped within 0..1, one that was padded
        reaches beyond."""
        if self.resize == "squash":
            return 0.0, 0.0, 1.0, 1.0
        side = min(width, height) if self.resize == "crop" else max(width, height)
        left, top = (1 - side / width) / 2, (1 - side / height) / 2
        return left, top, 1 - left, 1 - top


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What one file may cost at most. Both limits are checked before any pixel is decoded."""

    max_bytes: int = 64 * 2**20
    """Largest file, in bytes. 64 MiB holds any JPEG of a 100-megapixel camera."""

    max_pixels: int = 100_000_000
    """Most pixels, width times height. 100 million is a little above the 89 million at which Pillow starts to suspect a
    decompression bomb. Decoding takes 4 bytes of memory a pixel, so up to 0.4 GB here, and up to three times that with
    transparency."""

    def __post_init__(self) -> None:
        for name, value in (("max_bytes", self.max_bytes), ("max_pixels", self.max_pixels)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{name} must be a positive whole number, not {value!r}")


@dataclass(frozen=True, slots=True, eq=False)
class DecodedImage:
    """One picture, ready for the encoder, and what its file said about it."""

    pixels_HWC: np.ndarray[Any, np.dtype[np.uint8]]
    """uint8 [size_px, size_px, 3], RGB, C-contiguous, writable."""

    width: int
    """Width of the original in pixels, after EXIF rotation."""

    height: int
    """Height of the original in pixels, after EXIF rotation."""

    format: str
    """What the bytes are, whatever the name said: JPEG, PNG, WEBP, GIF, BMP or TIFF."""


_DEFAULT_LIMITS: Final = ImageLimits()


def decode_image(data: bytes, preprocessing: Preprocessing, limits: ImageLimits = _DEFAULT_LIMITS) -> DecodedImage:
    """Decode one image file and bring it to the size the encoder wants.

    Transparent parts become white. Grey, palette, CMYK and YCCK pictures become RGB; samples of 16 bits are scaled to
    8. Safe to call from many threads; deterministic for one version of Pillow.

    Raises:
        ImageError: a subclass for each reason, with the `code` of the output row. Nothing else, whatever `data` holds.
    """
    if not data:
        raise EmptyImageError("expected an image file, got zero bytes; upload it again")
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(f"expected at most {limits.max_bytes:,} bytes, got {len(data):,} (max_bytes)")
    plugin = _sniff(data)
    _quiet_pillow()
    file = BytesIO(data)
    try:
        # The plugin is called directly, not through Image.open: no other format is tried, no process-wide pixel limit
        # applies, and the plugin's own message survives.
        with plugin(file) as image:
            width, height = image.size
            if width * height > limits.max_pixels:
                raise ImageTooLargeError(
                    f"expected at most {limits.max_pixels:,} pixels, got {width:,} x {height:,} (max_pixels)"
                )
            picture = _load(image, data, preprocessing)
            orientation = _orientation(image)
            picture = _to_rgb(picture)
        if orientation in _TRANSPOSE:
            picture = picture.transpose(_TRANSPOSE[orientation])
            if orientation >= 5:
                width, height = height, width
        # np.array copies: the result outlives the picture, and torch.from_numpy wants writable memory.
        pixels_HWC = np.array(_resize(picture, preprocessing), dtype=np.uint8, order="C")
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageTooLargeError("the picture does not fit into memory; max_pixels is too high") from error
    except Exception as error:  # whatever a decoder does on hostile bytes, it is that picture's failure
        raise _classify(error, file, plugin.format or "image", data) from error
    return DecodedImage(pixels_HWC=pixels_HWC, width=width, height=height, format=plugin.format or "")


def _sniff(data: bytes) -> type[ImageFile.ImageFile]:
    """The reader for these bytes, by their magic number."""
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImageFile
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GifImageFile
    # "BM" alone is also how a text may begin, so the size of the header that follows must be one that exists.
    if data.startswith(b"BM") and (len(data) < 18 or (data[14] in _BMP_HEADER_SIZES and data[15:18] == b"\0\0\0")):
        return BmpImageFile
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return TiffImageFile
    head = data[:_SNIFFED_BYTES]
    for magic, name in _UNSUPPORTED_MAGIC:
        if magic.match(head):
            raise UnsupportedImageError(f"expected {_READ_FORMATS}, got {name}; convert it first")
    raise NotAnImageError(f"expected {_READ_FORMATS}, got bytes that begin with {data[:12]!r}")


_READ_FORMATS: Final = "JPEG, PNG, WebP, GIF, BMP or TIFF"
_BMP_HEADER_SIZES: Final = (12, 16, 40, 52, 56, 64, 108, 124)


def _quiet_pillow() -> None:
    """Keep Pillow's plugins from writing to stderr about odd files.

    Not `warnings.catch_warnings`: that swaps the process's filters and races between threads. Not once at import:
    whoever resets the filters (pytest does) would undo it. The filter covers Pillow's modules alone. What libtiff
    writes about a damaged TIFF comes from C and cannot be kept back here.
    """
    if _PILLOW_FILTER not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW_MODULES)
        logging.getLogger("PIL").addHandler(_NULL_HANDLER)  # adding it twice does nothing


_PILLOW_MODULES: Final = r"PIL\."
_PILLOW_FILTER: Final = ("ignore", None, Warning, re.compile(_PILLOW_MODULES), 0)
_NULL_HANDLER: Final = logging.NullHandler()


def _load(image: ImageFile.ImageFile, data: bytes, preprocessing: Preprocessing) -> Image.Image:
    """Decode the pixels of the first frame. The result still has the file's own mode and rotation."""
    if isinstance(image, JpegImageFile):
        if image.fp and _has_zero_tail(data, image.fp.tell()):
            raise TruncatedImageError("the JPEG has no end marker and is filled up with zeros; upload it again")
        # libjpeg decodes at 1/2, 1/4 or 1/8 in about half the time. Its reduction is cruder than the resize after it,
        # so twice the final size must be left. Against a full decode, photographs at 6 times their size then differ by
        # 0.2 of 255 on average and by 3 at most; down to the final size itself it would be 0.6 and 13.
        least = _DRAFT_FACTOR * preprocessing.size_px
        image.draft("RGB", (least, least))
    image.load()
    if isinstance(image, JpegImageFile) and image.mode == "CMYK" and "adobe" not in image.info:
        return ImageChops.invert(image)  # Pillow takes every CMYK JPEG for Adobe's, which are stored inverted
    return image


def _has_zero_tail(data: bytes, scan_start: int) -> bool:
    """Whether a JPEG ends in zeros and its end marker is nowhere after the start of its first scan.

    Interrupted copies are often zero-filled to their full length. libjpeg makes plain grey of the zeros without a word.
    A JPEG that was cut and then closed with an end marker is not noticed: to libjpeg it is whole.
    """
    return data.endswith(bytes(16)) and data.find(b"\xff\xd9", scan_start) < 0


def _orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation, 1 to 8; 1 for a file without one or with damaged EXIF data: a sideways picture beats none.

    Pillow has turned a TIFF upright by itself when loading it, and taken the tag away.
    """
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the EXIF parser may raise anything on hostile data
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes to RGB; transparency on white."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(samples_HW: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Grey samples of more than 8 bits to 0..255.

    Of 16-bit samples the high byte is kept, which is what Pillow does with 16-bit colour. 32-bit integers and floats
    have no known range: the first of 0..1 (floats), 0..255 and 0..65535 that holds them all is taken, and if none does
    they are stretched from their minimum to their maximum.
    """
    if samples_HW.dtype.kind == "u" and samples_HW.dtype.itemsize == 2:
        return (samples_HW >> 8).astype(np.uint8)
    values_HW = samples_HW.astype(np.float32)
    np.nan_to_num(values_HW, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values_HW.min()), float(values_HW.max())
    tops = (1.0, 255.0, 65535.0) if samples_HW.dtype.kind == "f" else (255.0, 65535.0)
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top is None:
        scale = 255.0 / max(high - low, _LEAST_RANGE)
        offset = -low * scale
    else:
        scale, offset = 255.0 / top, 0.0
    values_HW *= scale
    values_HW += offset
    np.rint(values_HW.clip(0, 255, out=values_HW), out=values_HW)
    return values_HW.astype(np.uint8)


_LEAST_RANGE: Final = 1e-30
"""Floats closer together than this are one flat grey; stretching them would overflow float32."""


def _resize(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """RGB of any size to RGB [size_px, size_px].

    Without Pillow's `reducing_gap`: it would be a second approximation on top of the JPEG draft.
    """
    size, (width, height) = preprocessing.size_px, image.size
    resample = Image.Resampling.BICUBIC if preprocessing.interpolation == "bicubic" else Image.Resampling.BILINEAR
    if preprocessing.resize == "squash":
        return image.resize((size, size), resample)
    if preprocessing.resize == "crop":
        # Cropping in source coordinates: a 1 x 4000 picture never becomes 224 x 896000 on the way.
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return image.resize((size, size), resample, box=(left, top, left + side, top + side))
    scale = size / max(width, height)
    inner = max(1, round(width * scale)), max(1, round(height * scale))
    padded = Image.new("RGB", (size, size), _PAD_GREY)
    padded.paste(image.resize(inner, resample), ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return padded


def _classify(error: Exception, file: BytesIO, name: str, data: bytes) -> ImageError:
    """The typed error for what a decoder raised."""
    reason = str(error) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return ImageTooLargeError(f"the {name} claims too many pixels to be decoded safely: {reason}")
    if _is_cut_short(error, file, name, data):
        return TruncatedImageError(f"the {name} is cut off after {len(data):,} bytes ({reason}); upload it again")
    if re.search(r"unsupported|not supported|cannot handle|unknown (pixel mode|data organi)", reason, re.IGNORECASE):
        return UnsupportedImageError(f"this kind of {name} is not read: {reason}; convert it first")
    return CorruptImageError(f"the {name} is damaged: {reason}; upload it again")


def _is_cut_short(error: Exception, file: BytesIO, name: str, data: bytes) -> bool:
    if re.search(r"truncated|not enough (image )?data|unexpected end", str(error), re.IGNORECASE):
        return True
    if name == "WEBP":  # its decoder takes the whole file at once; the RIFF header says how long that is
        return len(data) < 12 or len(data) < struct.unpack_from("<I", data, 4)[0] + 8
    if name == "TIFF":
        return _tiff_ends_early(data)
    # A reader that is still in the headers and has reached the end.
    return isinstance(error, (SyntaxError, EOFError, struct.error)) and not file.closed and file.tell() >= len(data)


def _tiff_ends_early(data: bytes) -> bool:
    """Whether the first directory of a TIFF, or a value it points at, lies past the end. Pillow skips such values."""
    order = "<" if data.startswith(b"I") else ">"
    if len(data) < 8 or data[2:4] in (b"+\0", b"\0+"):  # BigTIFF is laid out differently
        return len(data) < 16
    start = struct.unpack_from(order + "I", data, 4)[0]
    if start + 2 > len(data):
        return True
    num_entries = struct.unpack_from(order + "H", data, start)[0]
    if start + 2 + 12 * num_entries > len(data):
        return True
    for i in range(num_entries):
        _, kind, count, offset = struct.unpack_from(order + "HHII", data, start + 2 + 12 * i)
        num_bytes = count * _TIFF_TYPE_BYTES.get(kind, 0)
        if num_bytes > 4 and offset + num_bytes > len(data):
            return True
    return False


_TIFF_TYPE_BYTES: Final = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
"""Size of one value by its field type (TIFF 6.0, section 2)."""
