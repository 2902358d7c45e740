"""A training job: what the driver hands to every worker, and the networks that its settings name. Without Ray."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from raycap.coco import CaptionedImage
from raycap.images import Preprocessing
from raycap.model.config import DecoderConfig
from raycap.model.decoder import Decoder, build_decoder
from raycap.model.encoder import Encoder, pretrained_encoder
from raycap.model.vocabulary import Vocabulary
from raycap.storage import Store
from raycap.train.card import saved_settings
from raycap.train.config import TrainConfig

MAY_CHANGE = frozenset(
    {"epochs", "output", "weights_dtype", "data_notice",
     "num_workers", "use_gpu"}
)  # fmt: skip
"""Settings that a resumed run may change. The paths of its images may too: only their last part counts."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the driver hands to every worker."""

    config: TrainConfig
    vocabulary: Vocabulary
    train_images: list[CaptionedImage]
    val_images: list[CaptionedImage]
    train_store: Store
    """Made on the driver: a relative path means the driver's directory, not a worker's."""
    val_store: Store


def identity(job: Job) -> dict[str, Any]:
    """What a run cannot change when it resumes: the settings that its weights depend on, and its words."""
    settings = saved_settings(job.config)
    vocabulary = hashlib.sha256("\n".join(job.vocabulary.words).encode()).hexdigest()
    return {name: value for name, value in settings.items() if name not in MAY_CHANGE} | {"vocabulary": vocabulary}


def frozen_encoder(config: TrainConfig) -> tuple[Encoder, Preprocessing]:
    """The encoder with its ImageNet weights, and the preprocessing it wants."""
    encoder, size_px = pretrained_encoder(config.encoder)
    return encoder, Preprocessing(size_px=config.size_px or size_px, resize=config.resize)


def new_decoder(config: TrainConfig, encoder: Encoder, vocabulary: Vocabulary) -> Decoder:
    """The decoder with fresh weights."""
    return build_decoder(
        DecoderConfig(
            kind=config.decoder,
            vocabulary_size=len(vocabulary),
            feature_size=encoder.config.num_channels,
            hidden_size=config.hidden_size,
            attention_size=config.attention_size,
            dropout=config.dropout,
        )
    )
