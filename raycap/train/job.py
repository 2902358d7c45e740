"""A training job: what the driver hands to every worker. Without Ray."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

import torch

from raycap.coco import CaptionedImage, read_captions
from raycap.images import Preprocessing
from raycap.model.bundle import Bundle
from raycap.model.config import DecoderConfig
from raycap.model.decoder import build_decoder
from raycap.model.encoder import pretrained_encoder
from raycap.model.network import CaptionNetwork
from raycap.model.vocabulary import Vocabulary
from raycap.storage import Store, open_store
from raycap.train.card import saved_settings
from raycap.train.config import TrainConfig

log = logging.getLogger(__name__)

MAY_CHANGE = frozenset(
    {"output", "weights_dtype", "data_notice", "num_workers", "min_workers", "use_gpu", "images_per_pass", "patience",
     "checkpoint_every", "keep_checkpoints", "max_failures"}
)  # fmt: skip
"""Settings that a resumed run may change. The paths of its images may too: only their last part counts."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the driver hands to every worker."""

    config: TrainConfig
    start: Bundle
    """The network that training begins with, on the CPU: workers need no model hub and no bundle."""
    train_images: list[CaptionedImage]
    val_images: list[CaptionedImage]
    train_store: Store
    """Made on the driver: a relative path means the driver's directory, not a worker's."""
    val_store: Store

    @classmethod
    def open(cls, config: TrainConfig) -> Job:
        """Read the annotations, look at the stores, build the network.

        Everything that can be wrong before workers start is found here; raises ConfigurationError or StorageError.
        """
        train_images = read_captions(config.annotations, config.s3)
        val_images = read_captions(config.val_annotations, config.s3)
        train_store = open_store(config.images, config.s3)
        val_store = open_store(config.val_images or config.images, config.s3)
        train_store.check_readable()
        val_store.check_readable()
        open_store(config.output, config.s3).check_writable()
        start = start_bundle(config, train_images)
        if config.frozen_stages:  # the stage does it; here it is to find out whether it can
            start.single.encoder.freeze(config.frozen_stages)
        job = cls(
            config=config,
            start=start,
            train_images=train_images,
            val_images=val_images,
            train_store=train_store,
            val_store=val_store,
        )
        log.info(
            "training on %d images (%d captions), validating on %d; %d words",
            len(train_images),
            job.num_captions,
            len(val_images),
            len(job.start.vocabulary),
        )
        return job

    @property
    def num_captions(self) -> int:
        """Of the training images."""
        return sum(len(image.captions) for image in self.train_images)

    def val_references(self, captions: Container[int]) -> dict[int, list[str]]:
        """The references of the validation images that were captioned, by image id."""
        return {image.image_id: list(image.captions) for image in self.val_images if image.image_id in captions}

    @property
    def identity(self) -> dict[str, Any]:
        """What a run cannot change when it resumes: the settings that its weights depend on, and its words."""
        settings = {name: value for name, value in saved_settings(self.config).items() if name not in MAY_CHANGE}
        vocabulary = hashlib.sha256("\n".join(self.start.vocabulary.words).encode()).hexdigest()
        return settings | {"vocabulary": vocabulary, "model_id": self.start.model_id}


def start_bundle(config: TrainConfig, images: list[CaptionedImage]) -> Bundle:
    """The network before its training: a bundle's, or ImageNet weights with a new decoder."""
    captions = (caption for image in images for caption in image.captions)
    if config.init is not None:
        bundle = Bundle.load(config.init, s3=config.s3)
        vocabulary, decoder = bundle.vocabulary, bundle.single.decoder
        if config.extend_vocabulary:
            vocabulary = vocabulary.extended(captions, min_count=config.min_count)
            decoder = decoder.with_vocabulary(len(vocabulary), seed=config.seed)
        decoder.dropout.p = config.dropout
        return replace(bundle, network=CaptionNetwork(bundle.single.encoder, decoder), vocabulary=vocabulary)
    vocabulary = Vocabulary.from_captions(captions, min_count=config.min_count)
    encoder, size_px = pretrained_encoder(config.encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        decoder = build_decoder(
            DecoderConfig(
                kind=config.decoder,
                vocabulary_size=len(vocabulary),
                feature_size=encoder.config.num_channels,
                hidden_size=config.hidden_size,
                attention_size=config.attention_size,
                dropout=config.dropout,
            )
        )
    return Bundle(
        network=CaptionNetwork(encoder, decoder),
        vocabulary=vocabulary,
        preprocessing=Preprocessing(size_px=config.size_px or size_px, resize=config.resize),
        decoding=config.decoding,
    )
