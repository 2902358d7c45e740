"""The model card that training writes into a bundle."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from raycap.model.config import DecoderKind
from raycap.train.config import TrainConfig

_TEMPLATE = """\
# {name}

An image captioner: {encoder} ({encoder_weights}) with {decoder}, trained by raycap.
{training}

## Use

    raycap caption DIRECTORY OUTPUT --model BUNDLE

## Data

{num_images:,} images with {num_captions:,} captions for training, {num_val_images:,} images for validation.
Vocabulary: {vocabulary_size:,} words.

{data_notice}

## Scores

{split}; beam size {beam_size}; tokenizer: {tokenizer}; {chosen}, chosen by CIDEr-D on the same split.

{scores}

## Command

    {command}

## Limits

The captions are as good as the scores say: often right about people, animals and places, often wrong about counts,
colours and rare things. The model knows only the words of its training captions, and repeats their habits and biases,
about people above all. Do not use it where a wrong caption does harm.
"""

NOT_IN_CARD = frozenset(
    {"s3", "ray_address", "run_dir", "cache_dir", "name", "log_every_s", "cpus_per_worker", "dry_run"}
)
"""Settings of the place where a training ran; they do not change the model."""

LOCATIONS = frozenset({"annotations", "images", "val_annotations", "val_images", "output", "init"})
"""Settings that are paths or s3:// addresses. Only their last part goes with a model: the rest tells of the machine."""

_DECODERS = {
    "att2in": "an LSTM that the attended feature enters (Att2in, Rennie et al. 2017)",
    "attention": "a two-layer LSTM with top-down attention (Anderson et al. 2018)",
    "show_tell": "the LSTM of Show and Tell (Vinyals et al. 2015)",
}


_STAGES = {
    "cross_entropy": "cross-entropy with a frozen CNN",
    "fine_tune": "cross-entropy with a CNN that learns too",
    "self_critical": "self-critical training on CIDEr-D (Rennie et al. 2017) with a frozen CNN",
}


def model_card(
    config: TrainConfig,
    metrics: dict[str, Any],
    *,
    encoder: str,
    decoder: DecoderKind,
    num_images: int,
    num_captions: int,
    vocabulary_size: int,
    fine_tuned: bool,
) -> str:
    """The card's text. `metrics` is what goes into the bundle's metrics.json; `fine_tuned`: the CNN has learnt too, in
    this training."""
    names = {"bleu_1": "BLEU-1", "bleu_4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider_d": "CIDEr-D"}
    scores = {label: metrics["scores"].get(name) for name, label in names.items()}
    head = "| " + " | ".join(scores) + " |\n|" + "---|" * len(scores)
    values = "| " + " | ".join("-" if value is None else f"{100 * value:.1f}" for value in scores.values()) + " |"
    stages = [f"{stage.epochs} epochs of {_STAGES[stage.kind]}" for stage in config.stages]
    start = f", from the bundle {last_part(config.init)}" if config.init else ""
    encoder_weights = f"as in the bundle {last_part(config.init)}" if config.init else "with its ImageNet weights"
    return _TEMPLATE.format(
        name=config.run_name,
        encoder=encoder,
        encoder_weights="fine-tuned" if fine_tuned else encoder_weights,
        decoder=_DECODERS[decoder],
        training=f"Training{start}: {', then '.join(stages)}.",
        num_images=num_images,
        num_captions=num_captions,
        num_val_images=metrics["num_images"],
        vocabulary_size=vocabulary_size,
        data_notice=config.data_notice or "The licence of the training data was not stated.",
        split=f"Validation split, {metrics['num_images']:,} images, x100",
        beam_size=config.beam_size,
        tokenizer=metrics["tokenizer"],
        chosen=f"epoch {metrics['epoch']} of {_STAGES[metrics['stage']]}",
        scores=f"{head}\n{values}",
        command=command_line(config),
    )


def command_line(config: TrainConfig) -> str:
    """The command that repeats a training: every setting that is not the default and that the result depends on.

    Of files and directories only the last part of the path.
    """
    words = ["raycap", "train"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in NOT_IN_CARD or value == field.default:
            continue
        flag = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        else:
            words += [flag, last_part(value) if field.name in LOCATIONS else str(value)]
    return shlex.join(words)


def saved_settings(config: TrainConfig) -> dict[str, Any]:
    """The training settings as they are kept with a model: nothing of the machine, of paths only the last part."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_IN_CARD}
    return settings | {name: last_part(settings[name]) for name in LOCATIONS if settings[name] is not None}


def last_part(location: str) -> str:
    """The name of a file, directory or prefix, without what it is in."""
    return location.rstrip("/").rsplit("/", 1)[-1]
