"""The feature cache: what it holds, and when it is computed anew."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raycap.errors import (
    ConfigurationError,
    ObjectAccessDeniedError,
    ObjectError,
    ObjectUnreadableError,
    StorageError,
)
from raycap.images import Preprocessing, decode_image
from raycap.model.config import EncoderConfig
from raycap.model.encoder import Encoder
from raycap.storage import LocalStore, ObjectInfo, Store, open_store
from raycap.train import features as features_module
from raycap.train.features import Features, cache_key, compute_features
from tests.hostile import encode
from tests.small import small_encoder
from tests.training import Together

PREPROCESSING = Preprocessing(size_px=16)
NAMES = [f"{n}.png" for n in range(5)]


def picture(seed: int) -> bytes:
    """2 x 2 colours."""
    pixels_HWC = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels_HWC).resize((32, 32), Image.Resampling.NEAREST), "PNG")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    folder = open_store(str(tmp_path / "images"))
    for n, name in enumerate(NAMES):
        folder.write(name, picture(n))
    return folder


def compute(store: Store, directory: Path, *, names: list[str] = NAMES, flip: bool = True, **settings: Any) -> Features:
    encoder = settings.pop("encoder", None) or small_encoder()
    preprocessing = settings.pop("preprocessing", PREPROCESSING)
    cache = open_store(directory / "features")
    unused = directory / "unused"
    return compute_features(encoder, preprocessing, store, names, cache, local_dir=unused, flip=flip, **settings)


def array(features: Features) -> np.ndarray:
    """float16 [N, V, P, C]."""
    return np.concatenate(features.shards)


@torch.inference_mode()
def direct(store: Store, name: str, *, mirrored: bool = False) -> np.ndarray:
    """Features [P, C] of one image, without the cache."""
    pixels_HWC = decode_image(store.read(name), PREPROCESSING).pixels_HWC
    pixels_HWC = pixels_HWC[:, ::-1].copy() if mirrored else pixels_HWC
    features_PC: np.ndarray = small_encoder()(torch.from_numpy(pixels_HWC)[None])[0].numpy()
    return features_PC


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The five images are three shards, the last of one image."""
    monkeypatch.setattr(features_module, "SHARD_IMAGES", 2)
    monkeypatch.setattr(features_module, "BATCH_SIZE", 1)


def test_both_variants_of_every_image(store: Store, tmp_path: Path) -> None:
    features = compute(store, tmp_path)
    assert features.num_variants == 2
    assert features.failed == {}
    (array_NVPC,) = features.shards
    assert array_NVPC.shape == (5, 2, 4, 6)
    assert array_NVPC.dtype == np.float16
    for row, name in enumerate(NAMES):
        for variant in (0, 1):
            expected_PC = direct(store, name, mirrored=variant == 1)
            np.testing.assert_allclose(array_NVPC[row, variant], expected_PC, rtol=2e-3, atol=2e-3)
    assert not np.allclose(array_NVPC[:, 0], array_NVPC[:, 1], atol=1e-2)
    assert isinstance(array_NVPC, np.memmap)
    assert not (tmp_path / "unused").exists(), "the cache is local already"


@pytest.mark.parametrize("shard_lengths", [(5,), (2, 2, 1), (3, 2)])
def test_batches_are_gathered_from_all_shards(shard_lengths: tuple[int, ...]) -> None:
    array_NVPC = np.random.default_rng(0).normal(size=(5, 2, 3, 4)).astype(np.float16)
    features = Features(np.split(array_NVPC, np.cumsum(shard_lengths)[:-1]), {})
    rows, variants = np.array([3, 0, 4, 3, 2]), np.array([0, 1, 1, 1, 0])
    batch = features.batch(rows, variants)
    assert batch.dtype == torch.float32
    np.testing.assert_array_equal(batch.numpy(), array_NVPC[rows, variants].astype(np.float32))
    np.testing.assert_array_equal(features.batch(rows, 1).numpy(), array_NVPC[rows, 1].astype(np.float32))
    np.testing.assert_array_equal(features.batch(rows).numpy(), array_NVPC[rows, 0].astype(np.float32))


def test_without_mirrored_images(store: Store, tmp_path: Path) -> None:
    features = compute(store, tmp_path, flip=False)
    assert array(features).shape == (5, 1, 4, 6)
    assert features.batch(np.array([1])).shape == (1, 4, 6)


def test_the_second_time_nothing_is_computed(store: Store, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    first = compute(store, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(5, 5)]
    again = compute(store, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(5, 5)]
    np.testing.assert_array_equal(array(again), array(first))
    assert len(list((tmp_path / "features").iterdir())) == 1


def other_weights() -> Encoder:
    return small_encoder(seed=1)


def other_normalisation() -> Encoder:
    """The same weights; mean and std are not among them."""
    encoder = small_encoder()
    return Encoder(EncoderConfig(name="small", num_channels=6, mean=(1.0, 2.0, 3.0)), encoder.backbone).eval()


@pytest.mark.parametrize(
    "change",
    [
        {"preprocessing": Preprocessing(size_px=18)},
        {"preprocessing": Preprocessing(size_px=16, resize="pad")},
        {"preprocessing": Preprocessing(size_px=16, interpolation="bilinear")},
        {"encoder": other_weights},
        {"encoder": other_normalisation},
        {"flip": False},
        {"names": NAMES[:4]},
        {"names": NAMES[::-1]},
    ],
    ids=["size", "resize", "interpolation", "weights", "normalisation", "flip", "fewer", "order"],
)
def test_the_key_follows_what_decides_the_features(change: dict[str, Any], store: Store) -> None:
    def key(
        encoder: Callable[[], Encoder] = small_encoder,
        preprocessing: Preprocessing = PREPROCESSING,
        names: list[str] = NAMES,
        flip: bool = True,
    ) -> str:
        return cache_key(encoder(), preprocessing, store, names, flip=flip)

    assert key() == key()
    assert key(**change) != key()


def test_a_changed_image_is_computed_anew(store: Store, tmp_path: Path) -> None:
    before = compute(store, tmp_path)
    store.write(NAMES[2], picture(77) + b"longer")
    after = compute(store, tmp_path)
    same = [np.array_equal(array(before)[row], array(after)[row]) for row in range(5)]
    assert same == [True, True, False, True, True]
    store.write("another.png", picture(5))
    assert cache_key(small_encoder(), PREPROCESSING, store, NAMES, flip=True) == cache_key(
        small_encoder(), PREPROCESSING, store, NAMES, flip=True
    )
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_failed_and_missing_images_are_named(store: Store, tmp_path: Path) -> None:
    store.write("1.png", b"no picture")
    store.write("3.png", b"")
    store.delete("4.png")
    features = compute(store, tmp_path)
    assert features.failed.keys() == {"1.png", "3.png", "4.png"}
    assert features.failed["1.png"].startswith("not_an_image: ")
    assert features.failed["3.png"].startswith("empty: ")
    assert features.failed["4.png"] == f"not_found: 4.png is in the annotations but not in {store.location}"
    assert not array(features)[[1, 3, 4]].any()
    np.testing.assert_allclose(array(features)[2, 0], direct(store, "2.png"), rtol=2e-3, atol=2e-3)
    assert compute(store, tmp_path).failed == features.failed, "read from the cache"


def test_the_wrong_directory_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"none of the 2 images .*\(the first is 'images/0\.png'\); check that --i"
    ):
        compute(store, tmp_path, names=["images/0.png", "images/1.png"])


def compute_together(
    num_workers: int, store: Store, directory: Path, encoders: list[Encoder] | None = None
) -> list[Features]:
    """Threads stand for the workers."""
    encoders, together = encoders or [small_encoder()] * num_workers, Together(num_workers)

    def work(rank: int) -> Features:
        return compute(
            store,
            directory,
            encoder=encoders[rank],
            rank=rank,
            world_size=num_workers,
            from_first=partial(together.from_first, rank),
            barrier=together.barrier,
        )

    with ThreadPoolExecutor(num_workers) as pool:
        return list(pool.map(work, range(num_workers)))


def files_below(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*.*")}


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("num_workers", [2, 4])
def test_several_workers_compute_the_same(num_workers: int, store: Store, tmp_path: Path) -> None:
    store.write("3.png", b"no picture")
    alone = compute(store, tmp_path / "alone")
    assert [len(shard) for shard in alone.shards] == [2, 2, 1]
    for features in compute_together(num_workers, store, tmp_path / "together"):
        np.testing.assert_allclose(array(features), array(alone), rtol=2e-3, atol=2e-3)
        assert features.failed == alone.failed
    assert files_below(tmp_path / "together") == files_below(tmp_path / "alone")
    assert len(files_below(tmp_path / "alone")) == 6


class Watched(LocalStore):
    """Counts what is asked of it; some images cannot be read for the time being."""

    def __init__(self, path: str, broken: dict[str, ObjectError] | None = None) -> None:
        super().__init__(path)
        self.broken = broken or {}
        self.listed: list[str] = []

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self.listed.append(prefix)
        return super().list(prefix)

    def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
        if key in self.broken:
            raise self.broken[key]
        return super().read(key, max_bytes=max_bytes)


def test_images_are_listed_once_and_no_more_than_the_annotated_ones(store: Store, tmp_path: Path) -> None:
    names = [f"train/COCO_{n}.png" for n in range(5)]
    for n, name in enumerate(names):
        store.write(name, picture(n))
    watched = Watched(store.location)
    encoder, together = small_encoder(), Together(2)

    def work(rank: int) -> Features:
        return compute(
            watched, tmp_path, names=names, encoder=encoder, rank=rank, world_size=2,
            from_first=partial(together.from_first, rank), barrier=together.barrier,
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, range(2))
    assert watched.listed == ["train/COCO_"]
    assert first.failed == second.failed == {}
    np.testing.assert_array_equal(array(first), array(compute(store, tmp_path / "flat")))


def test_workers_whose_encoders_differ_in_a_last_bit_share_a_cache(store: Store, tmp_path: Path) -> None:
    """As after fine-tuning on unequal machines."""
    encoders = [small_encoder(), small_encoder()]
    with torch.no_grad():
        next(encoders[1].parameters()).mul_(1 + 1e-7)
    first, second = compute_together(2, store, tmp_path, encoders)
    np.testing.assert_array_equal(array(first), array(second))


TRANSIENT = [
    ObjectUnreadableError("503, also after retries"),
    ObjectAccessDeniedError("access denied"),
]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("error", TRANSIENT, ids=lambda error: error.code)
def test_what_may_pass_is_not_kept(error: ObjectError, store: Store, tmp_path: Path) -> None:
    store.write("1.png", b"no picture")
    away = Watched(store.location, {"2.png": error})
    with pytest.raises(
        StorageError, match=rf"1 images in .* not be read, such as 2\.png \({error.code}: .*; run the sa"
    ):
        compute(away, tmp_path)
    (directory,) = (tmp_path / "features").iterdir()
    shards = ("shard-00000", "shard-00002")
    assert {file.name for file in directory.iterdir()} == {
        f"{s}.{suffix}" for s in shards for suffix in ("json", "npy")
    }
    calls: list[tuple[int, int]] = []
    features = compute(store, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)], "the rest was done"
    assert features.failed.keys() == {"1.png"}
    np.testing.assert_allclose(array(features)[2, 0], direct(store, "2.png"), rtol=2e-3, atol=2e-3)


class PowerCutError(Exception):
    """Ends a run in the middle."""


@pytest.mark.usefixtures("small_shards")
def test_a_run_that_was_killed_goes_on_with_what_is_missing(store: Store, tmp_path: Path) -> None:
    store.write("1.png", b"no picture")

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        compute(store, tmp_path, progress=stop)
    (directory,) = (tmp_path / "features").iterdir()
    assert {file.name for file in directory.iterdir()} == {"shard-00000.json", "shard-00000.npy"}
    written = directory.joinpath("shard-00000.npy").stat().st_mtime_ns

    calls: list[tuple[int, int]] = []
    features = compute(store, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert directory.joinpath("shard-00000.npy").stat().st_mtime_ns == written
    assert features.failed.keys() == {"1.png"}
    for row in (0, 2, 3, 4):
        np.testing.assert_allclose(array(features)[row, 0], direct(store, NAMES[row]), rtol=2e-3, atol=2e-3)


@pytest.mark.usefixtures("small_shards")
def test_two_runs_that_compute_the_same_do_not_disturb_each_other(store: Store, tmp_path: Path) -> None:
    encoder, both_began = small_encoder(), threading.Barrier(2, timeout=60)

    def run(_: int) -> Features:
        def progress(done: int, total: int) -> None:
            if done == 1:
                both_began.wait()

        return compute(store, tmp_path, encoder=encoder, progress=progress)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    np.testing.assert_array_equal(array(first), array(second))
    np.testing.assert_array_equal(array(first), array(compute(store, tmp_path / "alone")))


@pytest.mark.usefixtures("small_shards")
def test_workers_that_do_not_share_the_cache(store: Store, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"shard-00000\.npy, which is not there: all workers must share --run-d"
    ):
        compute(store, tmp_path, rank=1, world_size=2)


def test_a_full_disk_is_named_before_it_is_full(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 5 * 2 * 4 * 6 * 2 - 1})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigurationError, match=r"the feature cache needs .* are free; choose another --run-dir"):
        compute(store, tmp_path)
    assert list((tmp_path / "features").iterdir()) == []
    usage.free += 1
    compute(store, tmp_path)


def test_more_images_than_a_batch(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "BATCH_SIZE", 2)
    calls: list[tuple[int, int]] = []
    features = compute(store, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 5), (4, 5), (5, 5)]
    for row, name in enumerate(NAMES):
        np.testing.assert_allclose(array(features)[row, 0], direct(store, name), rtol=2e-3, atol=2e-3)


def test_shards_are_made_of_whole_batches() -> None:
    assert features_module.SHARD_IMAGES % features_module.BATCH_SIZE == 0
