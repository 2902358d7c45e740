"""A tiny training for tests: eight pictures of four colours each, and a network that learns them in seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from raycap.coco import CaptionedImage
from raycap.images import Preprocessing
from raycap.model.bundle import Bundle
from raycap.model.config import DecoderConfig
from raycap.model.decoder import Decoder, build_decoder
from raycap.model.network import CaptionNetwork
from raycap.model.vocabulary import Vocabulary
from raycap.storage import open_store
from raycap.train.config import StageKind, TrainConfig
from raycap.train.data import Batch, CaptionData, Part
from raycap.train.job import Job
from raycap.train.loop import Learner, Read
from raycap.train.pixels import read_part
from raycap.train.self_critical import SelfCritical
from tests.hostile import encode
from tests.small import small_encoder

ALL_STAGES = {"epochs": 2, "fine_tune_epochs": 2, "scst_epochs": 2}
COLOURS = ("red", "green", "blue", "white")
IMAGES = [
    CaptionedImage(
        100 + n, f"{n}.png", (f"a {COLOURS[n % 4]} dog {'runs' if n < 4 else 'sleeps'}", f"one {COLOURS[n % 4]} dog")
    )
    for n in range(8)
]
VOCABULARY = Vocabulary.from_captions((c for image in IMAGES for c in image.captions), min_count=1)
PREPROCESSING = Preprocessing(size_px=8)
_QUARTERS_N22C = np.random.default_rng(0).integers(0, 256, (8, 2, 2, 3), dtype=np.uint8)
PIXELS_NHWC = torch.from_numpy(_QUARTERS_N22C.repeat(4, 1).repeat(4, 2))
FEATURES_NPC = small_encoder()(PIXELS_NHWC).detach()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small take many times as long on several threads when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_config(**settings: Any) -> TrainConfig:
    """Of one stage of cross-entropy, unless the settings say otherwise."""
    defaults: dict[str, Any] = {
        "annotations": "a.json", "images": "i", "val_annotations": "v.json", "output": "o",
        "epochs": 2, "batch_size": 4, "hidden_size": 16, "attention_size": 8,
        "dropout": 0.3, "warmup_steps": 2, "learning_rate": 1e-2, "ema_decay": 0.9,
    }  # fmt: skip
    if "init" in settings:  # the bundle decides them
        del defaults["hidden_size"], defaults["attention_size"]
    return TrainConfig(**(defaults | settings))


def tiny_network(config: TrainConfig) -> CaptionNetwork:
    """Random weights by the seed; the encoder is always the same."""
    encoder = small_encoder()
    torch.manual_seed(config.seed)
    decoder = build_decoder(
        DecoderConfig(
            kind=config.decoder,
            vocabulary_size=len(VOCABULARY),
            feature_size=6,
            hidden_size=config.hidden_size,
            attention_size=config.attention_size,
            dropout=config.dropout,
        )
    )
    return CaptionNetwork(encoder, decoder)


@cache
def _half_trained_weights() -> dict[str, Tensor]:
    learner = tiny_learner(tiny_config(epochs=30, batch_size=2, dropout=0.0, learning_rate=2e-2))
    for epoch in range(30):
        learner.train_epoch(epoch)
    return copied(learner.network)


def half_trained(*, dropout: float = 0.0) -> CaptionNetwork:
    """It knows the words, and is wrong of some images."""
    network = tiny_network(tiny_config(dropout=dropout))
    network.load_state_dict(_half_trained_weights())
    return network


def tiny_data(config: TrainConfig, **settings: Any) -> CaptionData:
    return CaptionData.encode(
        IMAGES, VOCABULARY, max_length=config.max_length, batch_size=config.batch_size, seed=config.seed, **settings
    )


def from_memory(inputs: Tensor, *, unreadable: Iterable[int] = ()) -> Read:
    """A reader of features or pixels that are all here."""
    bad = list(unreadable)

    def read(parts: Iterable[Part]) -> Iterator[tuple[Part, Tensor, np.ndarray]]:
        for part in parts:
            yield part, inputs[part.images_B], ~np.isin(part.images_B, bad)

    return read


def tiny_learner(
    config: TrainConfig,
    kind: StageKind = "cross_entropy",
    *,
    network: CaptionNetwork | None = None,
    data: CaptionData | None = None,
    read: Read | None = None,
) -> Learner:
    """In the config's stage of this kind, on features in memory; while the CNN learns, on pixels."""
    (stage,) = (stage for stage in config.stages if stage.kind == kind)
    return Learner(
        config,
        stage,
        network or tiny_network(config),
        data or tiny_data(config),
        read or from_memory(PIXELS_NHWC if kind == "fine_tune" else FEATURES_NPC),
        SelfCritical(config, IMAGES, VOCABULARY) if kind == "self_critical" else None,
    )


class Recording(SelfCritical):
    """Keeps what it has given."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config, IMAGES, VOCABULARY)
        self.given: list[tuple[Batch, dict[str, float]]] = []

    def samples(self, decoder: Decoder, images_B: np.ndarray, features_BPC: Tensor) -> tuple[Batch, dict[str, float]]:
        self.given.append(super().samples(decoder, images_B, features_BPC))
        return self.given[-1]


def tiny_job(directory: Path, network: CaptionNetwork | None = None, **settings: Any) -> Job:
    """With pictures below `directory`, the same ones for training and validation."""
    images = directory / "images"
    images.mkdir(exist_ok=True)
    for image, pixels_HWC in zip(IMAGES, PIXELS_NHWC.numpy(), strict=True):
        (images / image.file_name).write_bytes(encode(Image.fromarray(pixels_HWC), "PNG"))
    config = tiny_config(images=str(images), run_dir=str(directory / "runs"), log_every_s=0.0, **settings)
    store = open_store(config.images)
    return Job(
        config=config,
        start=Bundle(
            network=network or tiny_network(config),
            vocabulary=VOCABULARY,
            preprocessing=PREPROCESSING,
            decoding=config.decoding,
        ),
        train_images=IMAGES,
        val_images=IMAGES,
        train_store=store,
        val_store=store,
    )


class Together:
    """How threads that stand for workers wait for each other."""

    def __init__(self, num_workers: int) -> None:
        self._all = threading.Barrier(num_workers, timeout=60)
        self._made: Any = None

    def barrier(self) -> None:
        self._all.wait()

    def from_first(self, rank: int, make: Callable[[], Any]) -> Any:
        if rank == 0:
            self._made = make()
        self._all.wait()
        made = self._made
        self._all.wait()
        return made


def read_pixels(job: Job, failed: dict[str, str]) -> Read:
    """Augmented images, one part after the other; `failed` takes note of those that cannot be used."""

    def read(parts: Iterable[Part]) -> Iterator[tuple[Part, Tensor, np.ndarray]]:
        for part in parts:
            rows = {"name": np.array([job.train_images[image].file_name for image in part.images_B])}
            block = read_part(
                job.train_store, job.start.preprocessing, rows | {"seed": part.seeds_B},
                flip=job.config.flip, crop=job.config.crop,
            )  # fmt: skip
            failed.update(
                {str(name): str(error) for name, error in zip(block["name"], block["error"], strict=True) if error}
            )
            yield part, torch.from_numpy(block["pixels"]), block["error"] == ""

    return read


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit by bit."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def trained(learner: Learner, num_epochs: int = 2) -> list[dict[str, float]]:
    """What was reported of each batch."""
    reports: list[dict[str, float]] = []
    for epoch in range(num_epochs):
        learner.train_epoch(epoch, lambda step, metrics: reports.append(metrics))
    return reports


def losses(learner: Learner, num_epochs: int = 2) -> list[float]:
    return [metrics["train/loss"] for metrics in trained(learner, num_epochs)]


def gradients(learner: Learner) -> dict[str, Tensor]:
    """Of the last batch."""
    return {name: p.grad.clone() for name, p in learner.scorer.named_parameters() if p.grad is not None}


@contextmanager
def one_of_two(rank: int, directory: str) -> Iterator[None]:
    """The process is one of two workers, which meet in `directory`; gloo connects them until the block ends."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()
