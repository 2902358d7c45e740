"""Core-milliseconds of decoding and of the encoder, for encoders and image sizes: rows of docs/sizing.md.

    python -m tests.benchmarks.encoders PHOTOS [--encoders efficientnet_lite0 timm:resnet50 ...] [--size-px 224]

Bundles of random weights go through `raycap benchmark`: the time does not depend on the weights, and no weights are
downloaded. The search does depend on them, so it is not measured here.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from raycap.benchmark.config import BenchmarkConfig
from raycap.benchmark.run import benchmark
from raycap.images import Preprocessing
from raycap.model.bundle import Bundle
from raycap.model.config import DecoderConfig, DecodingConfig
from raycap.model.decoder import build_decoder
from raycap.model.encoder import named_encoder
from raycap.model.network import CaptionNetwork
from raycap.model.vocabulary import SPECIAL_TOKENS, Vocabulary


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decoding and encoding costs."""

    photos: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PHOTOS")]]
    encoders: tuple[str, ...] = (
        "efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2", "timm:resnet50", "timm:resnet101",
    )  # fmt: skip
    size_px: int | None = None
    """Of the images; by default the one that suits each encoder."""
    num_images: int = 64
    repeats: int = 3


def random_bundle(encoder_name: str, size_px: int | None) -> Bundle:
    """This encoder with a decoder that has no part in what is measured."""
    encoder, suitable_px = named_encoder(encoder_name, pretrained=False)
    decoder = DecoderConfig(
        kind="show_tell", vocabulary_size=len(SPECIAL_TOKENS) + 1, feature_size=encoder.config.num_channels
    )
    return Bundle(
        network=CaptionNetwork(encoder, build_decoder(decoder)).eval().requires_grad_(False),
        vocabulary=Vocabulary([*SPECIAL_TOKENS, "thing"]),
        preprocessing=Preprocessing(size_px=size_px or suitable_px),
        decoding=DecodingConfig(),
        card="# Random weights\n",
    )


def main() -> None:
    """Parse, measure, print."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    table = Table(box=box.SIMPLE)
    for title in ("encoder", "size px", "decode", "encode", "engine", "pixels, MB/s of 1,000 images/s"):
        table.add_column(title, justify="right")
    for name in options.encoders:
        with tempfile.TemporaryDirectory() as model:
            bundle = random_bundle(name, options.size_px)
            bundle.save(model)
            result = benchmark(
                BenchmarkConfig(
                    sources=(options.photos,), model=model, parts=("decode", "encode"), num_images=options.num_images,
                    repeats=options.repeats,
                )
            )  # fmt: skip
        decode, encode = (result["measurements"][part]["core_ms_per_image"] for part in ("decode", "encode_chosen"))
        size_px = bundle.preprocessing.size_px
        megabytes = f"{1000 * 3 * size_px**2 / 1e6:.0f}"
        table.add_row(name, str(size_px), f"{decode:.1f}", f"{encode:.1f}", result["engine"], megabytes)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
