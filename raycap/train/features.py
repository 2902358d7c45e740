"""The feature cache: what a frozen encoder says of every image, computed once and kept on disk.

A cache is a directory, named by a digest of everything that decides its content (encoder, preprocessing, images), so it
can be shared by runs and never goes stale. It appears whole or not at all. Two runs must not compute the same one at
the same time.

Shapes: N images, V variants of each (as it is, mirrored), P grid cells, C channels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raycap.errors import ConfigurationError, ObjectError, ObjectNotFoundError
from raycap.images import Preprocessing, decode_image
from raycap.model.encoder import Encoder
from raycap.storage import Store

BATCH_SIZE = 32
FEATURES, FAILED = "features.npy", "failed.json"


@dataclass(frozen=True)
class Features:
    """Features of a list of images, read from disk as they are needed."""

    array_NVPC: np.ndarray
    """float16 [N, V, P, C], memory-mapped."""
    failed: dict[str, str]
    """Images that could not be read, by file name, and why; their features are zeros and are not to be used."""

    @property
    def num_variants(self) -> int:
        """1, or 2 with mirrored images."""
        return int(self.array_NVPC.shape[1])

    def batch(self, rows: np.ndarray, variants: np.ndarray | int = 0) -> Tensor:
        """float32 [B, P, C] of the images `rows`."""
        return torch.from_numpy(self.array_NVPC[rows, variants].astype(np.float32))


def cache_key(encoder: Encoder, preprocessing: Preprocessing, store: Store, names: Sequence[str], *, flip: bool) -> str:
    """A digest of all that decides the features: encoder, preprocessing, and each image's name and version.

    Raises ConfigurationError if the store holds none of the images.
    """
    settings = [dataclasses.asdict(preprocessing), dataclasses.asdict(encoder.config), flip]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    wanted = set(names)
    etags = {info.key: info.etag for info in store.list() if info.key in wanted}
    if not etags:
        raise ConfigurationError(
            f"{store.location}: none of the {len(names)} images of the annotations is here (the first is "
            f"{names[0]!r}); check that --images is the directory that their file_name starts from"
        )
    for name in names:
        digest.update(f"{name}\0{etags.get(name)}\0".encode())
    return digest.hexdigest()[:20]


def compute_features(
    encoder: Encoder,
    preprocessing: Preprocessing,
    store: Store,
    names: Sequence[str],
    directory: Path,
    *,
    flip: bool,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Features:
    """Open the cache of these images below `directory`, computing it first if it is not there.

    Every worker computes its share of the images into the same files, so `directory` must be shared by the workers.
    `barrier` waits for all of them; `progress(done, total)` is called after each batch of this worker.
    """
    final = directory / cache_key(encoder, preprocessing, store, names, flip=flip)
    computed = final.is_dir()
    barrier()  # all have looked before anyone renames
    if not computed:
        partial = final.with_name(final.name + ".partial")
        device = next(encoder.parameters()).device
        if rank == 0:
            with torch.inference_mode():
                blank = torch.zeros(
                    1, preprocessing.size_px, preprocessing.size_px, 3, dtype=torch.uint8, device=device
                )
                _, num_cells, num_channels = encoder(blank).shape
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            shape = (len(names), 1 + flip, num_cells, num_channels)
            _require_space(partial, math.prod(shape) * np.dtype(np.float16).itemsize)
            np.lib.format.open_memmap(partial / FEATURES, mode="w+", dtype=np.float16, shape=shape).flush()
        barrier()
        if not (partial / FEATURES).is_file():
            raise ConfigurationError(f"worker {rank} does not see {partial}: --run-dir must be shared by all workers")
        failed = _fill(encoder, preprocessing, store, names, partial, rank, world_size, progress)
        (partial / f"{FAILED}.{rank}").write_text(json.dumps(failed))
        barrier()
        if rank == 0:
            failed = {}
            for r in range(world_size):
                part = partial / f"{FAILED}.{r}"
                failed |= json.loads(part.read_text())
                part.unlink()
            (partial / FAILED).write_text(json.dumps(failed, indent=1))
            partial.rename(final)
        barrier()
    return Features(np.load(final / FEATURES, mmap_mode="r"), json.loads((final / FAILED).read_text()))


def _require_space(directory: Path, num_bytes: int) -> None:
    """The features are a memory-mapped file: where the disk fills up, the process dies without a word. So ask first."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise ConfigurationError(
            f"{directory.parent}: the feature cache needs {num_bytes / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are "
            "free; choose another --run-dir"
        )


def _fill(
    encoder: Encoder,
    preprocessing: Preprocessing,
    store: Store,
    names: Sequence[str],
    partial: Path,
    rank: int,
    world_size: int,
    progress: Callable[[int, int], None],
) -> dict[str, str]:
    """Compute this worker's rows; return the images that failed."""
    array_NVPC = np.load(partial / FEATURES, mmap_mode="r+")
    flip = array_NVPC.shape[1] == 2
    device = next(encoder.parameters()).device
    rows = range(rank, len(names), world_size)
    failed: dict[str, str] = {}
    done = 0
    for batch in _decoded_batches(store, names, rows, preprocessing):
        good = [(row, pixels) for row, pixels in batch if not isinstance(pixels, ObjectError)]
        failed |= {names[row]: f"{error.code}: {error}" for row, error in batch if isinstance(error, ObjectError)}
        if good:
            pixels_BHWC = torch.from_numpy(np.stack([pixels for _, pixels in good])).to(device)
            with torch.inference_mode():
                variants = [encoder(pixels_BHWC), encoder(pixels_BHWC.flip(2))] if flip else [encoder(pixels_BHWC)]
            array_NVPC[[row for row, _ in good]] = torch.stack(variants, 1).cpu().numpy().astype(np.float16)
        done += len(batch)
        progress(done, len(rows))
    array_NVPC.flush()
    return failed


def _decoded_batches(
    store: Store, names: Sequence[str], rows: range, preprocessing: Preprocessing
) -> Iterator[list[tuple[int, np.ndarray | ObjectError]]]:
    """Read and decode a batch ahead of the encoder."""

    def load(row: int) -> tuple[int, np.ndarray | ObjectError]:
        try:
            return row, decode_image(store.read(names[row]), preprocessing).pixels_HWC
        except ObjectNotFoundError:
            return row, ObjectNotFoundError(f"{names[row]} is in the annotations but not in {store.location}")
        except ObjectError as error:
            return row, error

    with ThreadPoolExecutor(4) as pool:
        chunks = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
        ahead = [pool.submit(load, row) for row in chunks[0]] if chunks else []
        for following in [*chunks[1:], range(0)]:
            current, ahead = ahead, [pool.submit(load, row) for row in following]
            yield [future.result() for future in current]
