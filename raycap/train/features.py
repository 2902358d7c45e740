"""The feature cache: what a frozen encoder says of every image, computed once and kept in a store that workers share.

A cache is named by a digest of everything that decides its content (encoder, preprocessing, images), so it can be
shared by runs and never goes stale. It is made of shards, each written once it is computed: a run that was killed goes
on with those that are missing, and two runs that compute the same cache write the same.

    KEY/shard-00000.json   images of the shard that could not be read
    KEY/shard-00000.npy    features of the shard's images

Shapes: B, N images, H x W pixels, V variants of each image (as it is, mirrored), P grid cells, C channels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from raycap.errors import ConfigurationError, FetchError, NotFoundError, ObjectError, ObjectNotFoundError, StorageError
from raycap.images import Preprocessing, decode_image
from raycap.model.encoder import Encoder
from raycap.readahead import read_ahead
from raycap.storage import LocalStore, Store
from raycap.storage.files import locked

log = logging.getLogger(__name__)

BATCH_SIZE = 32
SHARD_IMAGES = 256
"""A multiple of BATCH_SIZE, so that no batch is of two shards. A shard is held in memory when it is written and when it
is copied: with mirrored images, 81 cells and 1,280 channels it has 106 MB."""
NUM_READERS = 8
"""Threads that read and decode images."""
NUM_DOWNLOADS = 4
"""Shards of a cache on S3 that are downloaded at once."""

T = TypeVar("T")


class FromFirst(Protocol):
    """What the first worker makes, on all workers; it waits for that one."""

    def __call__(self, make: Callable[[], T]) -> T: ...


def _alone(make: Callable[[], T]) -> T:
    return make()


@dataclass(frozen=True)
class Features:
    """Features of a list of images, read from disk as they are needed."""

    shards: Sequence[np.ndarray]
    """float16 [N, V, P, C] each, memory-mapped. All but the last hold as many images as the first."""
    failed: dict[str, str]
    """Images that could not be read, by file name, and why; their features are zeros and are not to be used."""

    @property
    def num_variants(self) -> int:
        """1, or 2 with mirrored images."""
        return int(self.shards[0].shape[1])

    def batch(self, rows: np.ndarray, variants: np.ndarray | int = 0) -> Tensor:
        """float32 [B, P, C] of the images `rows`, counted through all shards."""
        shard_images = len(self.shards[0])
        features_BPC = np.empty((len(rows), *self.shards[0].shape[2:]), np.float16)
        for index, (row, variant) in enumerate(np.broadcast(rows, variants)):
            features_BPC[index] = self.shards[row // shard_images][row % shard_images, variant]
        return torch.from_numpy(features_BPC).float()  # three times as fast as NumPy's astype


def cache_key(
    encoder: Encoder, preprocessing: Preprocessing, images: Store, names: Sequence[str], *, flip: bool
) -> str:
    """A digest of all that decides the files of a cache: encoder, preprocessing, and each image's name and version.

    Raises ConfigurationError if the store holds none of the images.
    """
    settings = [dataclasses.asdict(preprocessing), dataclasses.asdict(encoder.config), flip, SHARD_IMAGES]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    wanted = set(names)
    begin = os.path.commonprefix(names)  # noqa: RUF071  # of text, not of directories: prefixes of keys are text
    etags = {info.key: info.etag for info in images.list(begin) if info.key in wanted}
    if not etags:
        raise ConfigurationError(
            f"{images.location}: none of the {len(names)} images of the annotations is here (the first is "
            f"{names[0]!r}); check that --images is the directory that their file_name starts from"
        )
    for name in names:
        digest.update(f"{name}\0{etags.get(name)}\0".encode())
    return digest.hexdigest()[:20]


def compute_features(
    encoder: Encoder,
    preprocessing: Preprocessing,
    images: Store,
    names: Sequence[str],
    cache: Store,
    *,
    local_dir: Path,
    flip: bool,
    rank: int = 0,
    world_size: int = 1,
    from_first: FromFirst = _alone,
    barrier: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Features:
    """Open the features of these images in `cache`, computing first those that are not there.

    Each worker computes every `world_size`th shard, so `cache` must be shared by the workers. The first one looks what
    there is and tells the others by `from_first`; `barrier` waits for all. `progress(done, total)` is called after each
    batch of this worker. A cache on S3 is copied to `local_dir`, which the workers of a machine, and later runs, share.

    Images that are missing or broken are named in the result. Raises StorageError if some could not be read for a
    reason that may pass: what a cache holds depends on its key alone.
    """
    shards = [names[start : start + SHARD_IMAGES] for start in range(0, len(names), SHARD_IMAGES)]

    def look() -> tuple[str, list[int]]:
        key = cache_key(encoder, preprocessing, images, names, flip=flip)
        present: set[str] = set()
        with suppress(NotFoundError):  # no such directory yet
            present = {info.key for info in cache.list(f"{key}/")}
        return key, [number for number in range(len(shards)) if _file(key, number, "npy") not in present]

    key, missing = from_first(look)
    if mine := [number for number in missing if number % world_size == rank]:
        shape_VPC = (1 + flip, *_grid(encoder, preprocessing))
        if isinstance(cache, LocalStore):
            num_values = sum(len(shards[number]) for number in missing) * math.prod(shape_VPC)
            _require_space(Path(cache.location), num_values * np.dtype(np.float16).itemsize, "--run-dir")
        encoded = _encode_shards(
            encoder, preprocessing, images, [shards[number] for number in mine], shape_VPC, progress
        )
        unread: dict[str, str] = {}
        for number, (array_NVPC, failed, unread_here) in zip(mine, encoded, strict=True):
            unread |= unread_here
            if unread_here:
                continue
            content = io.BytesIO()
            np.save(content, array_NVPC)
            cache.write(_file(key, number, "json"), json.dumps(failed, indent=1).encode())
            cache.write(_file(key, number, "npy"), content.getvalue())  # last: where it is, the shard is done
        if unread:
            name, reason = next(iter(unread.items()))
            raise StorageError(
                f"{len(unread)} images in {images.location} could not be read, such as {name} ({reason}); run the same "
                "command again, which goes on with what is missing, or take them out of the annotations"
            )
    barrier()
    directory = Path(cache.location) if isinstance(cache, LocalStore) else _copy(cache, key, local_dir)
    return _open(directory, key, len(shards))


def _encode_shards(
    encoder: Encoder,
    preprocessing: Preprocessing,
    images: Store,
    shards: Sequence[Sequence[str]],
    shape_VPC: tuple[int, int, int],
    progress: Callable[[int, int], None],
) -> Iterator[tuple[np.ndarray, dict[str, str], dict[str, str]]]:
    """The features of each shard's images; the images that are missing or broken, and why; and those that could not be
    read though they may be whole, and why."""
    names = [name for shard in shards for name in shard]

    def decode(data: bytes) -> np.ndarray:
        return decode_image(data, preprocessing).pixels_HWC

    batches = read_ahead(images, names, decode, batch_size=BATCH_SIZE, num_threads=NUM_READERS)
    for shard in shards:
        array_NVPC = np.zeros((len(shard), *shape_VPC), np.float16)
        failed: dict[str, str] = {}
        unread: dict[str, str] = {}
        for start in range(0, len(shard), BATCH_SIZE):
            batch = next(batches)
            good = [(start + n, pixels) for n, (_, pixels) in enumerate(batch) if not isinstance(pixels, ObjectError)]
            if good:
                rows, pixels = zip(*good, strict=True)
                array_NVPC[list(rows)] = _encode(encoder, np.stack(pixels), num_variants=shape_VPC[0])
            for index, error in batch:
                if isinstance(error, ObjectNotFoundError):
                    error = ObjectNotFoundError(f"{names[index]} is in the annotations but not in {images.location}")
                elif isinstance(error, FetchError):
                    unread[names[index]] = f"{error.code}: {error}"
                    continue
                if isinstance(error, ObjectError):
                    failed[names[index]] = f"{error.code}: {error}"
            progress(batch[-1][0] + 1, len(names))
        yield array_NVPC, failed, unread


@torch.inference_mode()
def _encode(encoder: Encoder, pixels_BHWC: np.ndarray, *, num_variants: int) -> np.ndarray:
    """[B, V, P, C] of prepared images."""
    pixels = torch.from_numpy(pixels_BHWC).to(next(encoder.parameters()).device)
    variants = [pixels, pixels.flip(2)][:num_variants]
    features_BVPC: np.ndarray = torch.stack([encoder(variant) for variant in variants], 1).cpu().numpy()
    return features_BVPC


def _grid(encoder: Encoder, preprocessing: Preprocessing) -> tuple[int, int]:
    """P and C of the encoder's features."""
    blank_BHWC = np.zeros((1, preprocessing.size_px, preprocessing.size_px, 3), np.uint8)
    _, _, num_cells, num_channels = _encode(encoder, blank_BHWC, num_variants=1).shape
    return num_cells, num_channels


def _copy(cache: Store, key: str, local_dir: Path) -> Path:
    """Download what is not in `local_dir` yet."""
    local_dir.mkdir(parents=True, exist_ok=True)
    local = LocalStore(str(local_dir))
    # The first worker of a machine downloads, the others wait for it and find everything there.
    with locked(str(local_dir / f"{key}.lock")), ThreadPoolExecutor(NUM_DOWNLOADS) as pool:
        missing = [info for info in cache.list(f"{key}/") if not local.exists(info.key)]
        num_bytes = sum(info.size for info in missing)
        _require_space(local_dir, num_bytes, "--cache-dir")
        if missing:
            log.info("copying %.1f GiB of features from %s to %s", num_bytes / 2**30, cache.location, local_dir)
        list(pool.map(lambda info: local.write(info.key, cache.read(info.key)), missing))
    return local_dir


def _open(directory: Path, key: str, num_shards: int) -> Features:
    """Raises ConfigurationError if a shard is missing."""
    shards: list[np.ndarray] = []
    failed: dict[str, str] = {}
    try:
        for number in range(num_shards):
            shards.append(np.load(directory / _file(key, number, "npy"), mmap_mode="r"))
            failed |= json.loads((directory / _file(key, number, "json")).read_text())
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"expected the features of another worker in {error.filename}, which is not there: all workers must share "
            "--run-dir, and the images must not change while they are encoded"
        ) from None
    return Features(shards, failed)


def _require_space(directory: Path, num_bytes: int, option: str) -> None:
    """A disk that fills up after hours of encoding is seen before."""
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise ConfigurationError(
            f"{directory}: the feature cache needs {num_bytes / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are free; "
            f"choose another {option}"
        )


def _file(key: str, number: int, suffix: str) -> str:
    return f"{key}/shard-{number:05d}.{suffix}"
