"""What is measured in this process: each stage alone, and all of them in one loop.

Shapes: B images, S x S pixels, P grid cells, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor

from raycap.benchmark.config import BenchmarkConfig
from raycap.benchmark.timing import Measure, timed
from raycap.errors import ConfigurationError, ObjectError
from raycap.model.beam import beam_search
from raycap.model.bundle import Bundle
from raycap.model.captioner import Captioner
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


def engines_of(bundle: Bundle, config: BenchmarkConfig) -> dict[str, Captioner]:
    """By name: "chosen" captions as `config` says, "torch" with engine torch (the same, if that was chosen), and
    "plain" as anybody's PyTorch would, with the bundle's network as it is."""
    load = partial(Captioner, bundle, device=config.device, precision=config.precision)
    chosen = load(engine=config.engine)
    torch_ = chosen if chosen.engine == "torch" else load(engine="torch")
    plain = copy.copy(torch_)
    plain.network = copy.deepcopy(bundle.network).to(torch_.device, torch_.dtype).eval()
    return {"chosen": chosen, "torch": torch_, "plain": plain}


def part_measures(config: BenchmarkConfig, engines: Mapping[str, Captioner], files: list[bytes]) -> list[Measure]:
    """The parts that were asked for, but for bulk and serve. `engines` is as of `engines_of`."""
    captioner = engines["chosen"]
    different = {name: each for name, each in engines.items() if name == "chosen" or each is not captioner}
    measures = []
    if "decode" in config.parts:

        def decode(rows: slice) -> None:
            for data in files[rows]:
                captioner.prepare(data)

        measures.append(_measure("decode", "JPEG to pixels, one core", decode, len(files), config.batch_size))
    if "encode" in config.parts or "search" in config.parts:
        pixels_BSSC = torch.stack([captioner.prepare(data) for data in files]).to(captioner.device)
        if "encode" in config.parts:
            measures += [_encoder(name, each, pixels_BSSC, config.batch_size) for name, each in different.items()]
        if "search" in config.parts:
            settings = [(beams, BATCH_SIZE) for beams in (1, 3, 5)] + [(3, size) for size in SMALL_BATCH_SIZES]
            features = _features(captioner, pixels_BSSC)
            measures += [_search(captioner, features, len(files), *setting) for setting in settings]
    if "path" in config.parts:
        for name, each in different.items():
            measures.append(_path(f"path_{name}", f"tight loop, {_engine(name, each)}", each, files, config.batch_size))
        for beams, batch_size in ((1, BATCH_SIZE), (3, BATCH_SIZE), (3, 1)):
            other = copy.copy(captioner)  # the same network
            other.decoding = captioner.decoding.updated(beam_size=beams)
            title = f"tight loop, {_setting(beams, batch_size)}"
            measures.append(_path(f"path_{beams}_batch_{batch_size}", title, other, files, batch_size))
    return measures


def share_of_equal_captions(captioner: Captioner, plain: Captioner, files: Sequence[bytes], batch_size: int) -> float:
    """Share of the images for which both give the same caption."""
    num_equal = 0
    for rows in _slices(len(files), batch_size):
        pixels = [captioner.prepare(data) for data in files[rows]]
        pairs = zip(captioner.caption(pixels), plain.caption(pixels), strict=True)
        num_equal += sum(one.text == other.text for one, other in pairs)
    return num_equal / len(files)


def _encoder(name: str, captioner: Captioner, pixels_BSSC: Tensor, batch_size: int) -> Measure:
    def encode(rows: slice) -> None:
        with torch.inference_mode():
            captioner.network.features(pixels_BSSC[rows])
        if captioner.device.type == "cuda":
            torch.cuda.synchronize(captioner.device)

    title = f"encoder, {_engine(name, captioner)}"
    return _measure(f"encode_{name}", title, encode, len(pixels_BSSC), batch_size)


def _search(
    captioner: Captioner, features: Tensor | tuple[Tensor, ...], num_images: int, beams: int, batch_size: int
) -> Measure:
    decoding = captioner.decoding.updated(beam_size=beams)
    decoder: Any = captioner.network.decoder

    def search(rows: slice) -> None:
        if isinstance(features, Tensor):
            beam_search(decoder, features[rows], decoding)
        else:
            beam_search(decoder, tuple(features_BPC[rows] for features_BPC in features), decoding)

    title = f"search, {_setting(beams, batch_size)}"
    return _measure(f"search_{beams}_batch_{batch_size}", title, search, num_images, batch_size)


def _path(name: str, title: str, captioner: Captioner, files: list[bytes], batch_size: int) -> Measure:
    def path(rows: slice) -> None:
        captioner.caption([captioner.prepare(data) for data in files[rows]])

    return _measure(name, title, path, len(files), batch_size)


@torch.inference_mode()
def _features(captioner: Captioner, pixels_BSSC: Tensor) -> Tensor | tuple[Tensor, ...]:
    each: list[Any] = [captioner.network.features(batch) for batch in pixels_BSSC.split(BATCH_SIZE)]
    return torch.cat(each) if isinstance(each[0], Tensor) else tuple(map(torch.cat, zip(*each, strict=True)))


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


def _engine(name: str, captioner: Captioner) -> str:
    return "plain PyTorch" if name == "plain" else f"engine {captioner.engine}"


def _setting(beams: int, batch_size: int) -> str:
    search = f"{beams} beams" if beams > 1 else "greedy"
    return f"{search}, {f'batches of {batch_size}' if batch_size > 1 else 'image by image'}"
