"""From a run's checkpoint to a model bundle with its scores and card. Knows nothing of Ray."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from raycap.evaluate import score_captions
from raycap.model.bundle import Bundle
from raycap.model.network import CaptionNetwork
from raycap.train.card import last_part, model_card, saved_settings
from raycap.train.job import Job, frozen_encoder, new_decoder

log = logging.getLogger(__name__)

STATE, CAPTIONS = "learner.pt", "captions.json"


def write_checkpoint(directory: Path, state: dict[str, Any], captions: dict[int, str]) -> None:
    """What `Learner.state_dict` gave, and the captions of the validation images by image id."""
    torch.save(state, directory / STATE)
    (directory / CAPTIONS).write_text(json.dumps(captions))


def read_state(directory: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The learner's state in a checkpoint."""
    state: dict[str, Any] = torch.load(directory / STATE, map_location=device, weights_only=True)
    return state


def write_bundle(job: Job, directory: Path) -> dict[str, Any]:
    """Write the bundle of a checkpoint to the job's output, its validation captions scored with every metric.

    Returns the bundle's metrics.
    """
    config = job.config
    state = read_state(directory)
    captions = {int(image_id): caption for image_id, caption in json.loads((directory / CAPTIONS).read_text()).items()}
    encoder, preprocessing = frozen_encoder(config)
    decoder = new_decoder(config, encoder, job.vocabulary)
    averaged = {
        name.removeprefix("module."): tensor for name, tensor in state["averaged"].items() if name != "n_averaged"
    }
    decoder.load_state_dict(averaged)
    references = {image.image_id: list(image.captions) for image in job.val_images if image.image_id in captions}
    scores = score_captions(references, captions)
    metrics = {
        "split": last_part(config.val_annotations),
        "num_images": scores.num_images,
        "epoch": state["epoch"],
        "beam_size": config.beam_size,
        "length_penalty": config.length_penalty,
        "tokenizer": scores.tokenizer,
        "scores": scores.values,
    }
    card = model_card(
        config,
        metrics,
        num_images=len(job.train_images),
        num_captions=sum(len(image.captions) for image in job.train_images),
        vocabulary_size=len(job.vocabulary),
    )
    bundle = Bundle(
        network=CaptionNetwork(encoder, decoder),
        vocabulary=job.vocabulary,
        preprocessing=preprocessing,
        decoding=config.decoding,
        metrics=metrics | {"training": saved_settings(config)},
        card=card,
    )
    model_id = bundle.save(config.output, s3=config.s3, weights_dtype=config.weights_dtype)
    log.info("wrote bundle %s to %s", model_id, config.output)
    return metrics
