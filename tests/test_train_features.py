"""The feature cache: what it holds, and when it is computed anew."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raycap.errors import ConfigurationError
from raycap.images import Preprocessing, decode_image
from raycap.model.config import EncoderConfig
from raycap.model.encoder import Encoder
from raycap.storage import Store, open_store
from raycap.train import features as features_module
from raycap.train.features import Features, cache_key, compute_features
from tests.hostile import encode
from tests.small import small_encoder

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
    return compute_features(encoder, preprocessing, store, names, directory / "features", flip=flip, **settings)


@torch.inference_mode()
def direct(store: Store, name: str, *, mirrored: bool = False) -> np.ndarray:
    """Features [P, C] of one image, without the cache."""
    pixels_HWC = decode_image(store.read(name), PREPROCESSING).pixels_HWC
    pixels_HWC = pixels_HWC[:, ::-1].copy() if mirrored else pixels_HWC
    features_PC: np.ndarray = small_encoder()(torch.from_numpy(pixels_HWC)[None])[0].numpy()
    return features_PC


def test_both_variants_of_every_image(store: Store, tmp_path: Path) -> None:
    features = compute(store, tmp_path)
    assert features.num_variants == 2
    assert features.failed == {}
    assert features.array_NVPC.shape == (5, 2, 4, 6)
    assert features.array_NVPC.dtype == np.float16
    for row, name in enumerate(NAMES):
        for variant in (0, 1):
            expected_PC = direct(store, name, mirrored=variant == 1)
            np.testing.assert_allclose(features.array_NVPC[row, variant], expected_PC, rtol=2e-3, atol=2e-3)
    assert not np.allclose(features.array_NVPC[:, 0], features.array_NVPC[:, 1], atol=1e-2)
    batch = features.batch(np.array([3, 0, 3]), np.array([0, 1, 1]))
    assert batch.dtype == torch.float32
    np.testing.assert_array_equal(batch.numpy(), features.array_NVPC[[3, 0, 3], [0, 1, 1]].astype(np.float32))


def test_without_mirrored_images(store: Store, tmp_path: Path) -> None:
    features = compute(store, tmp_path, flip=False)
    assert features.array_NVPC.shape == (5, 1, 4, 6)
    assert features.batch(np.array([1])).shape == (1, 4, 6)


def test_the_second_time_nothing_is_computed(store: Store, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    first = compute(store, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(5, 5)]
    again = compute(store, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(5, 5)]
    np.testing.assert_array_equal(again.array_NVPC, first.array_NVPC)
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
    ids=str,
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
    same = [np.array_equal(before.array_NVPC[row], after.array_NVPC[row]) for row in range(5)]
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
    assert not features.array_NVPC[[1, 3, 4]].any()
    np.testing.assert_allclose(features.array_NVPC[2, 0], direct(store, "2.png"), rtol=2e-3, atol=2e-3)
    assert compute(store, tmp_path).failed == features.failed, "read from the cache"


def test_the_wrong_directory_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"none of the 2 images .*\(the first is 'images/0\.png'\); check that --i"
    ):
        compute(store, tmp_path, names=["images/0.png", "images/1.png"])


def compute_together(num_workers: int, store: Store, directory: Path, names: list[str]) -> list[Features]:
    """Threads stand for the workers."""
    encoder, barrier = small_encoder(), threading.Barrier(num_workers, timeout=60)

    def work(rank: int) -> Features:
        return compute(
            store,
            directory,
            names=names,
            encoder=encoder,
            rank=rank,
            world_size=num_workers,
            barrier=lambda: wait(barrier),
        )

    with ThreadPoolExecutor(num_workers) as pool:
        return list(pool.map(work, range(num_workers)))


def wait(barrier: threading.Barrier) -> None:
    barrier.wait()


@pytest.mark.parametrize("num_workers", [2, 3])
def test_several_workers_compute_the_same(num_workers: int, store: Store, tmp_path: Path) -> None:
    store.write("3.png", b"no picture")
    alone = compute(store, tmp_path / "alone")
    for features in compute_together(num_workers, store, tmp_path / "together", NAMES):
        np.testing.assert_allclose(features.array_NVPC, alone.array_NVPC, rtol=2e-3, atol=2e-3)
        assert features.failed == alone.failed
    (directory,) = (tmp_path / "together" / "features").iterdir()
    assert {file.name for file in directory.iterdir()} == {"features.npy", "failed.json"}


def test_more_workers_than_images(store: Store, tmp_path: Path) -> None:
    for features in compute_together(3, store, tmp_path, NAMES[:2]):
        assert features.array_NVPC[:, 0].any(axis=(1, 2)).all()


def test_an_interrupted_computation_is_done_again(store: Store, tmp_path: Path) -> None:
    class PowerCutError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise PowerCutError

    with pytest.raises(PowerCutError):
        compute(store, tmp_path, progress=stop)
    (partial,) = (tmp_path / "features").iterdir()
    assert partial.name.endswith(".partial")
    (partial / "features.npy").write_bytes(b"half of it")
    features = compute(store, tmp_path)
    np.testing.assert_allclose(features.array_NVPC[4, 0], direct(store, "4.png"), rtol=2e-3, atol=2e-3)
    assert not partial.exists()


def test_workers_that_do_not_share_the_directory(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"worker 1 does not see .*: --run-dir must be shared by all workers"):
        compute(store, tmp_path, rank=1, world_size=2)


def test_a_full_disk_is_named_before_it_is_full(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigurationError, match=r"the feature cache needs .* are free; choose another --run-dir"):
        compute(store, tmp_path)


def test_more_images_than_a_batch(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "BATCH_SIZE", 2)
    calls: list[tuple[int, int]] = []
    features = compute(store, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 5), (4, 5), (5, 5)]
    for row, name in enumerate(NAMES):
        np.testing.assert_allclose(features.array_NVPC[row, 0], direct(store, name), rtol=2e-3, atol=2e-3)
