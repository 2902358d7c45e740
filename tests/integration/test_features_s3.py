"""The feature cache with images and cache on a real S3 server."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raycap.errors import ConfigurationError
from raycap.images import Preprocessing
from raycap.model.encoder import Encoder
from raycap.storage import Store, open_store
from raycap.train import features as features_module
from raycap.train.features import Features, compute_features
from tests.hostile import encode
from tests.s3 import S3Server
from tests.small import small_encoder
from tests.training import Together

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_aws_settings", "small_shards")]

NAMES = [f"photos/{n}.png" for n in range(7)]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seven images are four shards."""
    monkeypatch.setattr(features_module, "SHARD_IMAGES", 2)
    monkeypatch.setattr(features_module, "BATCH_SIZE", 2)


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_server.env().items():
        monkeypatch.setenv(name, value)
    return s3_server.make_bucket()


@pytest.fixture
def images(bucket: str) -> Store:
    """Seven images, of which one is corrupt and one is not there."""
    store = open_store(f"s3://{bucket}/images")
    fill(store)
    return store


def fill(store: Store) -> None:
    for n, name in enumerate(NAMES):
        pixels_HWC = np.random.default_rng(n).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        store.write(name, encode(Image.fromarray(pixels_HWC), "PNG"))
    store.write(NAMES[1], b"no picture")
    store.delete(NAMES[4])


def compute(
    images: Store,
    cache: str,
    local_dir: Path,
    *,
    encoder: Encoder | None = None,
    rank: int = 0,
    together: Together | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Features:
    """`together` is of three workers."""
    shared: dict[str, Any] = {}
    if together is not None:
        shared = {"rank": rank, "world_size": 3, "barrier": together.barrier}
        shared["from_first"] = partial(together.from_first, rank)
    return compute_features(
        encoder or small_encoder(),
        Preprocessing(size_px=16),
        images,
        NAMES,
        open_store(cache),
        local_dir=local_dir,
        flip=True,
        progress=progress,
        **shared,
    )


def array(features: Features) -> np.ndarray:
    """float16 [N, V, P, C]."""
    return np.concatenate(features.shards)


def copied(local_dir: Path) -> dict[str, int]:
    """The files of a copy, with the time each was written."""
    return {path.name: path.stat().st_mtime_ns for path in local_dir.glob("*/*")}


def test_a_cache_on_s3_is_copied_and_equals_a_local_one(images: Store, bucket: str, tmp_path: Path) -> None:
    features = compute(images, f"s3://{bucket}/runs/features", tmp_path / "copy")
    local_images = open_store(tmp_path / "images")
    fill(local_images)
    local = compute(local_images, str(tmp_path / "features"), tmp_path / "unused")
    np.testing.assert_array_equal(array(features), array(local))
    assert all(isinstance(shard, np.memmap) for shard in features.shards)
    assert copied(tmp_path / "copy").keys() == {
        f"shard-0000{n}.{suffix}" for n in range(4) for suffix in ("json", "npy")
    }
    assert len(list((tmp_path / "copy").iterdir())) == 1, "no lock is left"


def test_images_that_cannot_be_read_are_named(images: Store, bucket: str, tmp_path: Path) -> None:
    features = compute(images, f"s3://{bucket}/runs/features", tmp_path)
    assert features.failed.keys() == {NAMES[1], NAMES[4]}
    assert features.failed[NAMES[1]].startswith("not_an_image: ")
    missing = f"not_found: {NAMES[4]} is in the annotations but not in s3://{bucket}/images"
    assert features.failed[NAMES[4]] == missing
    assert [array(features)[row].any() for row in range(7)] == [True, False, True, True, False, True, True]


def test_later_runs_compute_nothing_and_copy_what_is_missing(images: Store, bucket: str, tmp_path: Path) -> None:
    cache = f"s3://{bucket}/runs/features"
    calls: list[int] = []
    first = compute(images, cache, tmp_path / "one", progress=lambda done, total: calls.append(done))
    assert calls == [2, 4, 6, 7]
    elsewhere = compute(images, cache, tmp_path / "two", progress=lambda done, total: calls.append(done))
    assert len(calls) == 4
    np.testing.assert_array_equal(array(elsewhere), array(first))

    before = copied(tmp_path / "one")
    next((tmp_path / "one").glob("*/shard-00002.npy")).unlink()
    again = compute(images, cache, tmp_path / "one")
    np.testing.assert_array_equal(array(again), array(first))
    after = copied(tmp_path / "one")
    assert [name for name in before if after[name] != before[name]] == ["shard-00002.npy"]


def test_the_workers_of_a_machine_share_a_copy(
    images: Store, bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder, together = small_encoder(), Together(3)

    def work(rank: int) -> Features:
        cache = f"s3://{bucket}/runs/features"
        return compute(images, cache, tmp_path / "copy", encoder=encoder, rank=rank, together=together)

    with ThreadPoolExecutor(3) as pool, caplog.at_level(logging.INFO, logger="raycap.train.features"):
        found = list(pool.map(work, range(3)))
    assert [record.message.split()[0] for record in caplog.records] == ["copying"], "one worker copies"
    alone = compute(images, f"s3://{bucket}/alone", tmp_path / "alone")
    for features in found:
        np.testing.assert_array_equal(array(features), array(alone))
        assert features.failed == alone.failed
    assert copied(tmp_path / "copy").keys() == copied(tmp_path / "alone").keys()


def test_a_disk_too_full_for_the_copy_is_named(
    images: Store, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(ConfigurationError, match=r"the feature cache needs .* are free; choose another --cache-dir"):
        compute(images, f"s3://{bucket}/runs/features", tmp_path / "copy")
    assert copied(tmp_path / "copy") == {}
