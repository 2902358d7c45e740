"""What is measured in this process: each stage alone, and all of them in one loop.

Shapes: B images, S x S pixels, P grid cells, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final

import torch
from torch import Tensor

from raycap.benchmark.config import BenchmarkConfig
from raycap.benchmark.timing import Measure, timed
from raycap.errors import ConfigurationError, ObjectError
from raycap.model.beam import beam_search
from raycap.model.captioner import Captioner
from raycap.model.network import CaptionNetwork
from raycap.storage import Store

BATCH_SIZE: Final = 64
"""Where numbers of beams are compared."""
SMALL_BATCH_SIZES: Final = (1, 8)
"""Of the search with 3 beams, besides."""
_WARM_UP_BATCHES: Final = 2


def read_images(store: Store, captioner: Captioner, num_images: int) -> list[bytes]:
    """The files of the first images in the order of the listing. Raises ConfigurationError if there are none."""

    def readable() -> Iterator[bytes]:
        for info in store.list():
            try:
                data = store.read(info.key)
                captioner.prepare(data)
            except ObjectError:
                continue
            yield data

    files = list(islice(readable(), num_images))
    if not files:
        raise ConfigurationError(f"{store.location}: expected images to measure with, found none that can be read")
    return files


def part_measures(config: BenchmarkConfig, captioner: Captioner, plain: Captioner, files: list[bytes]) -> list[Measure]:
    """The parts that were asked for, but for bulk. `plain` captions with engine torch, `captioner` as was chosen; they
    may be the same."""
    engines = {"chosen": captioner} | ({"torch": plain} if plain is not captioner else {})
    measures = []
    if "decode" in config.parts:

        def decode(rows: slice) -> None:
            for data in files[rows]:
                captioner.prepare(data)

        measures.append(_measure("decode", "JPEG to pixels, one core", decode, len(files), config.batch_size))
    if "encode" in config.parts or "search" in config.parts:
        pixels_BSSC = torch.stack([captioner.prepare(data) for data in files]).to(captioner.device)
        if "encode" in config.parts:
            measures += [_encoder(name, each, pixels_BSSC, config.batch_size) for name, each in engines.items()]
        if "search" in config.parts:
            settings = [(beams, BATCH_SIZE) for beams in (1, 3, 5)] + [(3, size) for size in SMALL_BATCH_SIZES]
            features = [_features(captioner, batch) for batch in pixels_BSSC.split(BATCH_SIZE)]
            measures += [_search(captioner, features, beams, batch_size) for beams, batch_size in settings]
    if "path" in config.parts:
        for name, each in engines.items():
            measures.append(_path(f"path_{name}", f"tight loop, engine {each.engine}", each, files, config.batch_size))
        for beams, batch_size in ((1, BATCH_SIZE), (3, BATCH_SIZE), (3, 1)):
            other = copy.copy(captioner)  # the same network
            other.decoding = captioner.decoding.updated(beam_size=beams)
            title = f"tight loop, {_setting(beams, batch_size)}"
            measures.append(_path(f"path_{beams}_batch_{batch_size}", title, other, files, batch_size))
    return measures


def share_of_equal_captions(captioner: Captioner, plain: Captioner, files: Sequence[bytes], batch_size: int) -> float:
    """Share of the images that both give the same caption."""
    num_equal = 0
    for rows in _slices(len(files), batch_size):
        pixels = [captioner.prepare(data) for data in files[rows]]
        pairs = zip(captioner.caption(pixels), plain.caption(pixels), strict=True)
        num_equal += sum(one.text == other.text for one, other in pairs)
    return num_equal / len(files)


def _encoder(name: str, captioner: Captioner, pixels_BSSC: Tensor, batch_size: int) -> Measure:
    def encode(rows: slice) -> None:
        _features(captioner, pixels_BSSC[rows])
        if captioner.device.type == "cuda":
            torch.cuda.synchronize(captioner.device)

    title = f"encoder, engine {captioner.engine}"
    return _measure(f"encode_{name}", title, encode, len(pixels_BSSC), batch_size)


def _search(captioner: Captioner, features: list[tuple[Tensor, ...]], beams: int, batch_size: int) -> Measure:
    decoding = captioner.decoding.updated(beam_size=beams)
    network = captioner._network
    each_BPC = [torch.cat(of_encoder) for of_encoder in zip(*features, strict=True)]

    def search(rows: slice) -> None:
        batch = tuple(features_BPC[rows] for features_BPC in each_BPC)
        if isinstance(network, CaptionNetwork):
            beam_search(network.decoder, batch[0], decoding)
        else:
            beam_search(network.decoder, batch, decoding)

    title = f"search, {_setting(beams, batch_size)}"
    return _measure(f"search_{beams}_batch_{batch_size}", title, search, len(each_BPC[0]), batch_size)


def _path(name: str, title: str, captioner: Captioner, files: list[bytes], batch_size: int) -> Measure:
    def path(rows: slice) -> None:
        captioner.caption([captioner.prepare(data) for data in files[rows]])

    return _measure(name, title, path, len(files), batch_size)


@torch.inference_mode()
def _features(captioner: Captioner, pixels_BSSC: Tensor) -> tuple[Tensor, ...]:
    """Features [B, P, C] for each member of an ensemble, or the one of a single network."""
    network = captioner._network
    return (network.encoder(pixels_BSSC),) if isinstance(network, CaptionNetwork) else network._features(pixels_BSSC)


def _measure(name: str, title: str, work: Callable[[slice], None], num_images: int, batch_size: int) -> Measure:
    """`work` on all images, batch after batch. A few batches warm it up now."""
    batches = list(_slices(num_images, batch_size))

    def run(rows: Sequence[slice] = batches) -> None:
        for batch in rows:
            work(batch)

    run(batches[:_WARM_UP_BATCHES])
    return Measure(name=name, title=title, run=lambda: timed(run, num_images))


def _slices(num_images: int, batch_size: int) -> Iterator[slice]:
    for start in range(0, num_images, batch_size):
        yield slice(start, start + batch_size)


def _setting(beams: int, batch_size: int) -> str:
    search = f"{beams} beams" if beams > 1 else "greedy"
    return f"{search}, {f'batches of {batch_size}' if batch_size > 1 else 'image by image'}"
