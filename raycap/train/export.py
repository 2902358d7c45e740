"""From a run's checkpoint to a model bundle with its scores and card. Knows nothing of Ray."""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raycap.errors import ConfigurationError
from raycap.evaluate import score_captions
from raycap.model.bundle import Bundle
from raycap.model.network import CaptionNetwork
from raycap.train.card import last_part, model_card, saved_settings
from raycap.train.config import StageKind
from raycap.train.job import Job

log = logging.getLogger(__name__)

STATE = "training.pt"


@dataclass(frozen=True)
class Best:
    """The network with the best validation CIDEr-D so far. Plain values: it is part of every checkpoint."""

    cider_d: float
    stage: StageKind
    epoch: int
    """Finished epochs of the stage; 0: as it was before them."""
    captions: dict[int, str]
    """Of the validation images, by image id."""
    decoder: dict[str, Tensor]
    encoder: dict[str, Tensor] | None
    """None: as at the start."""

    @classmethod
    def of(
        cls,
        network: CaptionNetwork,
        start: Bundle,
        cider_d: float,
        stage: StageKind,
        epoch: int,
        captions: dict[int, str],
    ) -> Best:
        """A copy of the network's weights."""
        encoder, at_start = _copied(network.encoder), start.single.encoder.state_dict()
        same = all(torch.equal(tensor, at_start[name]) for name, tensor in encoder.items())
        return cls(cider_d, stage, epoch, captions, _copied(network.decoder), None if same else encoder)

    def network(self, start: Bundle) -> CaptionNetwork:
        """The network itself."""
        network = copy.deepcopy(start.single)
        network.decoder.load_state_dict(self.decoder)
        if self.encoder is not None:
            network.encoder.load_state_dict(self.encoder)
        return network


def _copied(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def write_state(directory: Path, state: dict[str, Any]) -> None:
    """A checkpoint: tensors and plain values."""
    torch.save(state, directory / STATE)


def read_state(directory: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `write_state` wrote. Raises ConfigurationError if it cannot be read."""
    try:
        state: dict[str, Any] = torch.load(directory / STATE, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigurationError(
            f"the run's checkpoint cannot be read ({reason}); it may be of an older raycap: give another --name"
        ) from error
    return state


def write_bundle(job: Job, directory: Path) -> dict[str, Any]:
    """Write the bundle of a checkpoint's best network to the job's output, its validation captions scored with every
    metric.

    Returns the bundle's metrics.
    """
    config = job.config
    best = Best(**read_state(directory)["best"])
    scores = score_captions(job.val_references(best.captions), best.captions)
    metrics = {
        "split": last_part(config.val_annotations),
        "num_images": scores.num_images,
        "stage": best.stage,
        "epoch": best.epoch,
        "beam_size": config.beam_size,
        "length_penalty": config.length_penalty,
        "tokenizer": scores.tokenizer,
        "scores": scores.values,
    }
    bundle = replace(
        job.start,
        network=best.network(job.start),
        decoding=config.decoding,
        metrics=metrics | {"training": saved_settings(config)},
        card=model_card(
            config,
            metrics,
            encoder=job.start.single.encoder.config.name,
            decoder=job.start.single.decoder.config.kind,
            num_images=len(job.train_images),
            num_captions=job.num_captions,
            vocabulary_size=len(job.start.vocabulary),
            fine_tuned=best.encoder is not None,
        ),
    )
    model_id = bundle.save(config.output, s3=config.s3, weights_dtype=config.weights_dtype)
    log.info("wrote bundle %s to %s", model_id, config.output)
    return metrics
